"""The loss of a step: what the loop observed, or else the model's own where backward really ran from it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sharpwatch.agent.hooks import Hook, backward_is_compiled
from sharpwatch.agent.safety import ExceptionBarrier, warn
from sharpwatch.agent.statistics.tap import AsyncHostCopy
from sharpwatch.curvature.objective.outputs import find_loss

ITEMS_IN_BATCH = "num_items_in_batch"  # an argument by which Hugging Face's models divide the sum of their losses
MAX_FORWARDS = 1024  # of a step, the newest, whose own losses count
_SILENT_STEPS = 2  # whose own loss was not trained on, and none observed, before that is logged

Number = float | AsyncHostCopy


@dataclass(slots=True)
class StepLoss:
    """The loss of one step, whose numbers may still be on their way from the device.

    Attributes:
        terms: The loss of each micro-batch, and the weights with which backward took it.
        adds_up: A micro-batch's loss is its share of the step's mean, not a mean of its own.
    """

    terms: list[tuple[Number, list[Number]]] = field(default_factory=list)
    adds_up: bool = False

    @property
    def ready(self) -> bool:
        """Whether `read` would return at once."""
        numbers = (number for value, weights in self.terms for number in (value, *weights))
        return all(number.ready for number in numbers if isinstance(number, AsyncHostCopy))

    def read(self) -> float | None:
        """The mean over the micro-batches by their weights, so that a GradScaler's factor drops out."""
        read = [(_read(value), sum(map(_read, weights))) for value, weights in self.terms]
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
        self.value = _number(loss)
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
                self.weights.append(_number(gradient))


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

    def observe(self, loss: float | Tensor) -> StepLoss | None:
        """The loss if it belongs to the step already taken; None if it is kept for the next."""
        self._silent_steps = 0
        term: tuple[Number, list[Number]] = (_checked_number(loss), [1.0])
        # A loop may call another method of the model, past its hooks: then no forward is ever seen.
        if self._sees_forwards and self._forwards == 0 and not self._undecided:
            self.comes_after_step = True
            self.source = "observed"
            return StepLoss([term])
        self._observed.append(term)
        return None

    def present(self) -> list[float]:
        """The losses observed since the last step, in order."""
        return [_read(value) for value, _ in self._observed]

    def take(self) -> StepLoss:
        """The loss of the step just taken; without terms where none is known."""
        trained = [(own.value, own.weights) for own in self._own if own.was_trained_on()]
        taken = StepLoss(list(self._observed)) if self._observed else StepLoss(trained, self._own_adds_up)
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


def _read(number: Number) -> float:
    return float(number.read()) if isinstance(number, AsyncHostCopy) else number


def _checked_number(loss: float | Tensor) -> Number:
    """As `_number`; raises `TypeError` for anything else."""
    # Not numbers alone: NumPy's have `__float__` too.
    if not (loss.numel() == 1 if isinstance(loss, Tensor) else hasattr(loss, "__float__")):
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise TypeError(f"loss must be a number or a tensor with one element, got {got}")
    return _number(loss)


def _number(value: float | Tensor) -> Number:
    """A number as it is now; one on a device is copied without a sync."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return AsyncHostCopy(value)
    return float(value.detach()) if isinstance(value, Tensor) else float(value)
