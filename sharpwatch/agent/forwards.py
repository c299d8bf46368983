"""What is done at each forward of the model in training, and how one is told from an evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from sharpwatch.agent.losses import ITEMS_IN_BATCH, MAX_FORWARDS, LossTracker
from sharpwatch.agent.probes.runner import Captured
from sharpwatch.agent.probes.scheduler import ProbeScheduler

_LOG = logging.getLogger("sharpwatch")


class Forwards:
    """Keeps what the model was called with for the probes, and the loss of its output.

    In training mode each forward with gradients counts. In evaluation mode, in which `from_pretrained` leaves a model
    and dropout is frozen, one counts as soon as a backward comes through its output.

    Args:
        losses: Takes the losses.
        scheduler: Takes what the model was called with.
        begins: Called with each forward that counts, before anything else.
    """

    def __init__(self, losses: LossTracker, scheduler: ProbeScheduler, begins: Callable[[], None]) -> None:
        self._losses = losses
        self._scheduler = scheduler
        self._begins = begins

    def called(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The model is called in training."""
        self._count(self._scheduler.capture(args, kwargs), kwargs)

    def output(self, output: Any) -> None:
        """That call returned `output`."""
        own = self._losses.output(output)
        self._scheduler.output(output, own.was_trained_on if own else None)

    def undecided(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[Any], Callable[[], None]]:
        """The model is called in evaluation mode.

        Returns:
            A function to call with the output; it returns one to call when a backward comes through the output.
        """
        self._losses.undecided()
        # Until the backward no more is held of the call than a probe takes, without any graph.
        items = {name: value for name, value in kwargs.items() if name == ITEMS_IN_BATCH}
        return partial(self._returned, self._scheduler.capture(args, kwargs), items)

    def _returned(self, captured: Captured | None, items: Mapping[str, Any], output: Any) -> Callable[[], None]:
        own = self._losses.read(output)
        returned = self._scheduler.returned(captured, output, own.was_trained_on if own else None)

        def trains() -> None:
            self._count(returned, items)
            self._losses.add(own)

        return trains

    def _count(self, captured: Captured | None, kwargs: Mapping[str, Any]) -> None:
        self._begins()
        if self._losses.forward(kwargs) == MAX_FORWARDS:
            _LOG.warning(
                "%d forwards without a step of a watched optimizer: if it was replaced, call attach again", MAX_FORWARDS
            )
        self._scheduler.forward(captured)
