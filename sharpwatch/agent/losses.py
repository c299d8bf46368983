"""The loss of a step: what the loop observed, or else the model's own where backward really ran from it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sharpwatch.agent.hooks import Hook, backward_is_compiled
from sharpwatch.agent.safety import ExceptionBarrier, warn
from sharpwatch.agent.statistics.host_copy import AsyncHostCopy, Number, copied, is_ready, number
from sharpwatch.curvature.objective.outputs import find_loss

ITEMS_IN_BATCH = "num_items_in_batch"  # an argument by which Hugging Face's models divide the sum of their losses
MAX_FORWARDS = 1024  # of a step, the newest, whose own losses count
_SILENT_STEPS = 2  # whose own loss was not trained on, and none observed, before that is logged


@dataclass(slots=True)
class StepLoss:
    """The loss of one step, whose numbers may still be on their way from the device.

    Attributes:
        terms: The loss of each micro-batch, and the weights with which backward took it.
        adds_up: A micro-batch's loss is its share of the step's mean, not a mean of its own.
        gradient_norm: The norm of all gradients before clipping, if the loop told it; else NaN.
    """

    terms: list[tuple[Number, list[Number]]] = field(default_factory=list)
    adds_up: bool = False
    gradient_norm: Number = math.nan

    @property
    def ready(self) -> bool:
        """Whether `read` would return at once."""
        return is_ready(self.gradient_norm) and all(
            is_ready(n) for value, weights in self.terms for n in (value, *weights)
        )

    def read(self) -> float | None:
        """The mean over the micro-batches by their weights, so that a GradScaler's factor drops out."""
        read = [(number(value), sum(map(number, weights))) for value, weights in self.terms]
        total = sum(weight for _, weight in read)
        if not total:
            return None
        mean = sum(value * weight for value, weight in read) / total
        return mean * len(read) if self.adds_up else mean


class OwnLoss:
    """The loss in the output of one forward, and whether backward ran from it.

    A hook on the node of the loss runs when its gradient arrives there: d(what backward ran from)/d(loss), which
    is 1, or a scale, or one over the number of micro-batches.

    Args:
        loss: The loss.
        barrier: Ends errors of its hook.
        named: Whether the model calls it so; a number in a tuple may be another one, and is not shown.
    """

    def __init__(self, loss: Tensor, barrier: ExceptionBarrier, *, named: bool = True) -> None:
        self.named = named
        self.value = copied(loss)
        self.weights: list[Number] = []
        self._barrier = barrier
        self._output = loss.output_nr
        if loss.grad_fn is None:
            return
        if backward_is_compiled():
            self.weights.append(1.0)  # no hook runs there: it is assumed
        else:
            loss.grad_fn.register_prehook(Hook(self._arrived))

    def was_trained_on(self) -> bool:
        """Whether backward ran from it; False for one without a graph."""
        return any(isinstance(weight, AsyncHostCopy) or weight != 0 for weight in self.weights)

    def _arrived(self, gradients: tuple[Tensor | None, ...]) -> None:
        # The node may be that of all outputs of a compiled or wrapped model; only its own gradient counts.
        with self._barrier.guard("reading the weight of the model's loss"):
            gradient = gradients[self._output]
            if gradient is not None:
                self.weights.append(copied(gradient))


class LossTracker:
    """Tells which step a loss belongs to.

    An observed loss wins over the model's own. Where a loss is observed with no forward since the last `step()`, the
    loop observes after stepping: the loss is that step's, whose record therefore waits for it.

    Attributes:
        comes_after_step: Whether the loop observes after stepping.
        source: Where the newest step's loss is from; empty before the first step.
    """

    def __init__(self, barrier: ExceptionBarrier) -> None:
        self.comes_after_step = False
        self.source = ""
        self._barrier = barrier
        self._observed: deque[tuple[Number, list[Number]]] = deque(maxlen=MAX_FORWARDS)
        self._gradient_norm: Number = math.nan
        self._own: deque[OwnLoss] = deque(maxlen=MAX_FORWARDS)
        self._own_adds_up = False
        self._forwards = 0
        self._sees_forwards = False
        self._evaluation_trains = False  # whether the model is trained in evaluation mode
        self._undecided = False  # whether a forward in that mode waits for its backward
        self._silent_steps = 0  # in a row: the model gave a loss, but not the one trained on, and none was observed

    def forward(self, kwargs: Mapping[str, Any]) -> int:
        """A training forward begins; how many there were since the last step, with this one."""
        # Hugging Face divides the loss of each micro-batch by this number, which is of the whole step.
        self._own_adds_up = kwargs.get(ITEMS_IN_BATCH) is not None
        self._forwards += 1
        self._sees_forwards = True
        return self._forwards

    def undecided(self) -> None:
        """A forward in evaluation mode begins; it trains if a backward comes."""
        self._undecided = self._evaluation_trains

    def output(self, output: Any) -> OwnLoss | None:
        """Keep the loss that the model's `output` carries, if any."""
        own = self.read(output)
        self._keep(own)
        return own

    def read(self, output: Any) -> OwnLoss | None:
        """The loss that the model's `output` carries, if any."""
        loss, named = find_loss(output)
        return OwnLoss(loss, self._barrier, named=named) if isinstance(loss, Tensor) and loss.numel() == 1 else None

    def add(self, own: OwnLoss | None) -> None:
        """A forward in evaluation mode, whose loss is `own`, turned out to train."""
        self._evaluation_trains = True
        self._keep(own)

    def _keep(self, own: OwnLoss | None) -> None:
        if own is not None and own.named:
            self._own.append(own)

    def observe(self, loss: float | Tensor | None, gradient_norm: float | Tensor | None = None) -> StepLoss | None:
        """What was observed, if it belongs to the step already taken; None if it is kept for the next."""
        norm = math.nan if gradient_norm is None else _checked_number(gradient_norm, "grad_norm")
        # A loop may call another method of the model, past its hooks: then no forward is ever seen.
        late = self._sees_forwards and self._forwards == 0 and not self._undecided
        terms: list[tuple[Number, list[Number]]] = []
        if loss is not None:
            self._silent_steps = 0
            terms = [(_checked_number(loss), [1.0])]
            if late:
                self.comes_after_step = True
                self.source = "observed"
        if late:
            return StepLoss(terms, gradient_norm=norm)
        self._observed += terms
        if gradient_norm is not None:
            self._gradient_norm = norm
        return None

    def present(self) -> list[float]:
        """The losses observed since the last step, in order."""
        return [number(value) for value, _ in self._observed]

    def take(self) -> StepLoss:
        """The loss of the step just taken; without terms where none is known."""
        trained = [(own.value, own.weights) for own in self._own if own.was_trained_on()]
        taken = StepLoss(list(self._observed)) if self._observed else StepLoss(trained, self._own_adds_up)
        taken.gradient_norm, self._gradient_norm = self._gradient_norm, math.nan
        self._note_source(bool(trained))
        self._own.clear()
        self._observed.clear()
        self._forwards, self._undecided = 0, False
        return taken

    def _note_source(self, trained: bool) -> None:
        if self._observed:
            self.source = "observed"
        elif trained:
            self.source = "the model's own"
        elif not self.comes_after_step:
            self.source = "none: backward did not run from the model's own" if self._own else "none"
            self._silent_steps += bool(self._own)
        if self._silent_steps == _SILENT_STEPS:
            self._silent_steps += 1  # once
            warn(
                "the loop does not train on the loss that the model returns, so no loss is shown, and probes of the "
                "loss need attach(loss_fn=...): report the loss with watch.observe(loss=...)"
            )


def _checked_number(loss: float | Tensor, name: str = "loss") -> Number:
    """As `copied`; raises `TypeError` for anything else."""
    # Not numbers alone: NumPy's have `__float__` too.
    if not (loss.numel() == 1 if isinstance(loss, Tensor) else hasattr(loss, "__float__")):
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise TypeError(f"{name} must be a number or a tensor with one element, got {got}")
    return copied(loss)
