"""What the training loop holds: the agent's public face."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, Self

from torch import Tensor

from sharpwatch.agent.control.commands import RollbackRequest
from sharpwatch.agent.run import WatchedRun
from sharpwatch.agent.status import WatchStatus, collect


class Watch:
    """One attempt of one run under watch. Everything public may be called at any time, and never raises.

    What can't be done is logged; after `close` nothing is.

    What does reach the loop, through `optimizer.step()`, is what `on_rollback` raises, and `DesyncError`.
    """

    def __init__(self, run: str, step: int, loop: WatchedRun | None, *, disabled: bool = False) -> None:
        self._run = run
        self._step = step
        self._loop = loop  # None: disabled, or closed
        state: Literal["watching", "disabled", "closed"] = "closed" if loop is None else "watching"
        self._last_status = WatchStatus(state="disabled" if disabled else state, run=run, step=step)

    def __reduce__(self) -> tuple[type[Self], tuple[str, int, None]]:
        """A copy of what holds a watch (a model, a trainer) is not watched: it has a closed one."""
        return type(self), (self.run, self.step, None)

    @property
    def run(self) -> str:
        """The run's name."""
        return self._run if self._loop is None else self._loop.run

    @property
    def step(self) -> int:
        """Optimizer steps that took effect."""
        return self._step if self._loop is None else self._loop.step

    @property
    def status(self) -> WatchStatus:
        """What is watched, whether the daemon is reached, and how probes and control are doing; prints as a table."""
        if self._loop is not None:
            with self._loop.border.guard("collecting the status"):
                return collect(self._loop)
        return replace(self._last_status, run=self.run, step=self.step)

    @property
    def pending_rollback(self) -> RollbackRequest | None:
        """For loops that restore on their own: the rollback to do now, then call `restored`."""
        return None if self._loop is None else self._loop.parts.control.pending_rollback

    def observe(self, *, loss: float | Tensor) -> None:
        """The step's loss, before or after `optimizer.step()`; no sync."""
        if self._loop is not None:
            with self._loop.border.guard("observing the loss"):
                self._loop.observe(loss)

    def saved_checkpoint(self, step: int, uri: str) -> None:
        """A checkpoint of `step` stands at `uri`: a place that a rollback can go to."""
        if self._loop is not None:
            with self._loop.border.guard("noting a checkpoint"):
                self._loop.checkpoint(int(step), str(uri))

    def restored(self, step: int) -> None:
        """The loop put the run back to `step`."""
        if self._loop is not None:
            with self._loop.border.guard("noting a restore"):
                self._loop.restored(int(step))

    def rollback_failed(self, reason: str) -> None:
        """The pending rollback can't be done; the loop stands where it stood."""
        if self._loop is not None:
            with self._loop.border.guard("telling of a failed rollback"):
                self._loop.parts.control.rollback_failed(self._loop.step, str(reason))

    def state_dict(self) -> dict[str, Any]:
        """The agent's own state for the run's checkpoint, as plain values: what is in force, what probes have cost.

        The same on every rank; empty where sharpwatch is disabled or closed.
        """
        if self._loop is not None:
            with self._loop.border.guard("making the agent's state"):
                return self._loop.state_dict()
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the run that made `state`: its name, step and multipliers; to be called before the first forward.

        Later it does nothing: a run that is rolled back keeps what is in force. So does the state of another training
        job, or of another run than the one named at `attach`, and an empty one. On several ranks all of them call it,
        with the same state, or none takes it up.
        """
        if self._loop is not None:
            with self._loop.border.guard("loading the agent's state"):
                self._loop.load_state_dict(state)

    def close(self) -> None:
        """Take every hook away and say goodbye; takes at most 2 s, 3 s on several ranks. Ctrl-C waits as long, once."""
        self._close(in_order=True)

    def _close(self, *, in_order: bool) -> None:
        if self._loop is not None:
            self._run, self._step = self._loop.run, self._loop.step
            self._loop.close(in_order=in_order)
            self._last_status = self.status
            self._loop = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(in_order=error is None)
