"""`Watch`: the object that `attach` returns to the training loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, Self

from torch import Tensor

from sharpwatch.agent.control.commands import RollbackRequest
from sharpwatch.agent.status import WatchStatus, collect
from sharpwatch.agent.watched_run import WatchedRun
from sharpwatch.wire import MAX_STEP, MAX_TEXT


class Watch:
    """One attempt of one run under watch, as `attach` returns it; also a context manager that closes itself.

    Its methods may be called at any time and never raise: errors are logged. After `close` they do nothing. Two errors
    do reach the training loop, through `optimizer.step()`: what `on_rollback` raises, and `DesyncError`.
    """

    def __init__(self, run: str, step: int, watched: WatchedRun | None, *, disabled: bool = False) -> None:
        self._run = run
        self._step = step
        self._watched = watched  # None: disabled, or closed
        state: Literal["watching", "disabled", "closed"] = "closed" if watched is None else "watching"
        self._last_status = WatchStatus(state="disabled" if disabled else state, run=run, step=step)

    def __reduce__(self) -> tuple[type[Self], tuple[str, int, None]]:
        """A copy, as of a trainer that holds a watch, is a closed watch."""
        return type(self), (self.run, self.step, None)

    @property
    def run(self) -> str:
        """The run's name."""
        return self._run if self._watched is None else self._watched.run

    @property
    def step(self) -> int:
        """Optimizer steps that took effect, those before `attach` included."""
        return self._step if self._watched is None else self._watched.step

    @property
    def status(self) -> WatchStatus:
        """The state of the watch at this moment: blocks, daemon, probes, overhead, control. Prints as a table."""
        if self._watched is not None:
            with self._watched.barrier.guard("collecting the status"):
                return collect(self._watched)
        return replace(self._last_status, run=self.run, step=self.step)

    @property
    def pending_rollback(self) -> RollbackRequest | None:
        """The rollback that the loop must do now, or None; afterwards call `restored`, or say why not."""
        return None if self._watched is None else self._watched.control.pending_rollback

    def observe(
        self, *, loss: float | Tensor | None = None, batch: Any = None, grad_norm: float | Tensor | None = None
    ) -> None:
        """Report the loss of a step, and the batch it is of; does not wait for the device.

        The loss may be reported before or after the `optimizer.step()` of its step. Several in one step are averaged.
        The batch must come before it, best between backward and step: probes run within `optimizer.step()`.

        Args:
            loss: The loss as a number, or a tensor with one element. Without it the loss in the model's output is used,
                where backward ran from it.
            batch: What `attach(loss_fn=...)` is to be called with, for loops whose targets are no arguments of the
                model: a tensor, or a dict, list, tuple or dataclass of tensors and others. Probes call
                `loss_fn(model, rows)`, where `rows` is the same with some rows of every tensor that has one for each
                row of the batch. Nothing is copied before a probe; tensors must not change in place until the step.
            grad_norm: The norm of all gradients before clipping, for loops that clip otherwise than by torch's
                `clip_grad_norm_`, which the agent sees by itself. Gradient norms are then shown as before clipping.
        """
        if self._watched is not None:
            with self._watched.barrier.guard("observing the loss"):
                self._watched.observe(loss, batch, grad_norm)

    def saved_checkpoint(self, step: int, uri: str) -> None:
        """Report a checkpoint, to which a rollback may go.

        Args:
            step: The step after which it was saved.
            uri: Where it is; a rollback names it by this. A checkpoint that was reported with the same `uri` before
                counts as overwritten.
        """
        if self._watched is not None:
            with self._watched.barrier.guard("reporting a checkpoint"):
                self._watched.checkpoint(_checked_step(step), _checked_uri(uri))

    def deleted_checkpoint(self, uri: str) -> None:
        """Report that a checkpoint was deleted, so that no rollback goes to it.

        Where `uri` is the path of a file or folder, the agent finds that out when the next checkpoint is saved.

        Args:
            uri: As given to `saved_checkpoint`.
        """
        if self._watched is not None:
            with self._watched.barrier.guard("reporting a deleted checkpoint"):
                self._watched.checkpoint_deleted(_checked_uri(uri))

    def restored(self, step: int) -> None:
        """Report that the loop has restored the checkpoint of `step`; the next step is `step` + 1."""
        if self._watched is not None:
            with self._watched.barrier.guard("reporting a restore"):
                self._watched.restored(_checked_step(step))

    def rollback_failed(self, reason: str) -> None:
        """Report that the pending rollback can't be done, and why; training continues from the present step.

        Its checkpoint is not offered again until it is saved anew.
        """
        if self._watched is not None:
            with self._watched.barrier.guard("reporting a failed rollback"):
                self._watched.control.rollback_failed(self._watched.step, str(reason))

    def rollback_refused(self, reason: str) -> None:
        """Report that the pending rollback can't be done as it was asked for, though its checkpoint is good.

        Such as one that skips data which the loop can't skip. Training continues from the present step.
        """
        if self._watched is not None:
            with self._watched.barrier.guard("reporting a refused rollback"):
                self._watched.control.rollback_failed(self._watched.step, str(reason), "refused")

    def state_dict(self) -> dict[str, Any]:
        """Return the agent's own state for the run's checkpoint: multipliers in force, and what probes have cost.

        Returns:
            Plain values, the same on every rank; empty if the watch is disabled or closed.
        """
        if self._watched is not None:
            with self._watched.barrier.guard("making the agent's state"):
                return self._watched.state_dict()
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue as the run that made `state`, with its name, step and multipliers.

        Must be called before the first forward; later it does nothing, so that a rollback keeps the multipliers in
        force. It also does nothing if `state` is empty, of another training job, or of another run than the one named
        at `attach`. On several ranks all must call it with the same state, or none of them uses it.

        Args:
            state: What `state_dict` returned.
        """
        if self._watched is not None:
            with self._watched.barrier.guard("loading the agent's state"):
                self._watched.load_state_dict(state)

    def close(self) -> None:
        """Remove every hook and send the last samples; takes at most 2 s, or 3 s on several ranks.

        The first Ctrl-C during `close` is deferred until it returns; a second one interrupts it.
        """
        self._close(in_order=True)

    def _close(self, *, in_order: bool) -> None:
        if self._watched is not None:
            self._run, self._step = self._watched.run, self._watched.step
            self._watched.close(in_order=in_order)
            self._last_status = self.status
            self._watched = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(in_order=error is None)


def _checked_step(step: object) -> int:
    """A step that the daemon takes: it would refuse the whole sample for another."""
    try:
        number = int(step)  # type: ignore[call-overload]  # whatever was passed
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number <= MAX_STEP:
        raise ValueError(f"step must be a whole number >= 0, got {step!r}")
    return int(number)


def _checked_uri(uri: object) -> str:
    """The URI of a checkpoint as text, as `_checked_step`."""
    text = "" if uri is None or isinstance(uri, int | float) else str(uri)
    if not 0 < len(text) <= MAX_TEXT:
        raise ValueError(f"uri must be a path or another text of 1 to {MAX_TEXT} characters, got {uri!r}")
    return text
