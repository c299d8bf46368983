"""How much each micro-batch weighs in the gradient of a step, read where its gradient enters the model's output.

Two conventions are common: the mean of each micro-batch counts alike, or each token does. The loop does not say which,
but the gradient at the logits does: of a loss Σ c_t·CE(z_t, y_t) it is c_t (softmax(z_t) − onehot(y_t)), so c_t follows
from one entry of the gradient and its probability. A micro-batch then weighs Σ c_t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sharpwatch.agent.hooks import Hook
from sharpwatch.curvature.objective.nested import tensors
from sharpwatch.errors import ProbeError

_CHUNK_ENTRIES = 2**22  # of the logits whose probabilities are computed at once
_MAX_NAMED = 4
_MAX_UNEVEN = 0.005  # relative difference of weights that are taken for equal
_MAX_MISFIT = 0.02  # relative, of a gradient from that of a cross-entropy; bfloat16 gives below 0.005


@dataclass(frozen=True, slots=True)
class MicroBatchSize:
    """What one backward showed at the model's output, on its device.

    Attributes:
        positions: How many positions have a gradient; for an output that is a loss, how many labels there are.
        weight: c, the weight of each position; of a loss, its own weight.
        misfit: How far the gradient is from that of a cross-entropy, relative; 0 for a loss.
        is_loss: The output is a loss.
        is_sum: That loss is a sum over positions, divided by a number that all micro-batches share.
    """

    positions: Tensor
    weight: Tensor
    misfit: Tensor
    is_loss: bool = False
    is_sum: bool = False


@dataclass(frozen=True, slots=True)
class Shares:
    """The parts that micro-batches have in their accumulated gradient.

    Attributes:
        raw: The weights as they were read, up to a common factor; float64 [M] on the CPU.
        positions: How many positions each has, of the same shape.
    """

    raw: Tensor
    positions: Tensor

    @property
    def weights(self) -> Tensor:
        """The weights, which add up to 1."""
        return self.raw / self.raw.sum()

    def noise_in_residual(self, ranks: int) -> float:
        """The trace of the gradient's covariance over the expected Σ‖h_i‖²/w_i − ‖G‖²; see `MicroBatches.noise`."""
        contribute = self.positions > 0
        if ranks > 1:
            return 1 / (ranks * int(contribute.sum()) - 1)
        each, squared = (
            float((self.weights**power / self.positions)[contribute].sum()) for power in (1, 2)
        )  # of s, in E Q and in the covariance
        return squared / (each - squared)

    def require_even(self) -> None:
        """Check that the micro-batches of other ranks weigh as much as this rank's, which alone are known.

        By convention each weighs 1, or 1/M of M, up to a loss scale, which is a power of two.

        Raises:
            ProbeError: They may weigh something else, as where each token of all ranks weighs alike.
        """
        low, high = float(self.raw.min()), float(self.raw.max())
        scales = (math.frexp(high)[0], math.frexp(high * len(self.raw))[0])
        powers = any(abs(scale * 2 - 1) <= _MAX_UNEVEN or abs(scale - 1) <= _MAX_UNEVEN for scale in scales)
        if high - low > _MAX_UNEVEN * high or not powers:
            raise ProbeError("micro-batches weigh differently, and those of other ranks can't be known")


def shares_of(sizes: Sequence[MicroBatchSize | None]) -> Shares:
    """The shares of micro-batches in their accumulated gradient.

    Raises:
        ProbeError: They can't be read from what the backwards showed.
    """
    known = [each for each in sizes if each is not None]
    if len(known) < len(sizes):
        raise ProbeError(
            "the gradient does not pass through the model's output, so micro-batches' weights are not known"
        )
    positions, weights, misfits = (
        torch.stack([getattr(each, name).detach().double().cpu() for each in known])
        for name in ("positions", "weight", "misfit")
    )
    reached = positions > 0
    if int(reached.sum()) < 2 <= len(known):
        raise ProbeError("of the step's micro-batches, fewer than two have a gradient")
    per_position = all(each.is_sum or not each.is_loss for each in known)
    if per_position and bool(((misfits <= _MAX_MISFIT) & (weights > 0))[reached].all()):
        return Shares((weights * positions).where(reached, torch.zeros_like(positions)), positions)
    if len(set(positions.tolist())) == 1:
        return Shares(weights if known[0].is_loss else torch.ones_like(positions), positions)
    counts = ", ".join(f"{count:.0f}" for count in positions[:_MAX_NAMED].tolist())
    more = ", ..." if len(positions) > _MAX_NAMED else ""
    raise ProbeError(
        f"micro-batches of {counts}{more} positions: how they weigh in the loss is only known for a cross-entropy of "
        "the model's logits"
    )


def only_of(found: Sequence[MicroBatchSize]) -> MicroBatchSize | None:
    """What one forward's output showed in a backward, at the logits if they took part; None if there were several."""
    logits = [each for each in found if not each.is_loss]
    losses = [each for each in found if each.is_loss]
    one_forward = max(len(logits), len(losses)) == 1
    return (logits or losses)[0] if one_forward else None


def listen(found: Callable[[MicroBatchSize], None], output: Any, *, labels: Tensor | None, is_sum: bool) -> None:
    """Hook into the gradient at one forward's output; the hook goes away with its graph.

    Args:
        found: Called in the backward with what it shows.
        output: The model's output.
        labels: How many labels there are, for an output that is a loss; None if that is not known.
        is_sum: See `MicroBatchSize`.
    """
    # No hook may hold the output itself, which would never be freed then.
    logits, loss = _logits(output), _loss(output)
    if logits is not None:
        reference = _References.of(logits.detach())
        _listen(logits, lambda gradient: found(reference.compare(gradient)))
    if loss is not None and labels is not None:  # compiled or fused, a loss may not come from the logits beside it
        size = partial(MicroBatchSize, labels, is_loss=True, is_sum=is_sum)
        _listen(loss, lambda gradient: found(size(gradient.reshape(()), torch.zeros_like(gradient).reshape(()))))


@dataclass(frozen=True, slots=True)
class _References:
    """For each position the two most probable classes [T, 2] and their probabilities; one of them is not the label."""

    classes: Tensor
    probabilities: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> _References:
        rows = _rows(logits)
        classes, probabilities = [], []
        for piece in torch.split(rows, max(1, _CHUNK_ENTRIES // max(1, rows.shape[1]))):
            exact = piece.float()
            top = exact.topk(min(2, exact.shape[1]), dim=1)
            classes.append(top.indices)
            probabilities.append((top.values - exact.logsumexp(1, keepdim=True)).exp())
        return cls(torch.cat(classes), torch.cat(probabilities))

    def compare(self, gradient: Tensor) -> MicroBatchSize:
        """How `gradient` at the logits relates to that of a cross-entropy."""
        rows = _rows(gradient)
        # Without temporaries of the logits' size, which the step itself may need.
        absolute = torch.linalg.vector_norm(rows, 1, dim=1, dtype=torch.float32)
        lowest, label = rows.min(1)
        column = (self.classes[:, :1] == label[:, None]).long() if self.classes.shape[1] > 1 else label[:, None] * 0
        reached = absolute > 0
        probability = self.probabilities.gather(1, column)[:, 0] * reached
        entry = rows.gather(1, self.classes.gather(1, column))[:, 0].float()
        weight = entry.sum() / probability.sum()
        # All entries but the label's are positive, they add up to zero, and the weight is the same everywhere.
        apart = (absolute + 2 * lowest.float()).abs().sum() + rows.sum(1, dtype=torch.float32).abs().sum()
        uneven = (entry - weight * probability).abs().sum() / entry.sum()
        misfit = (apart / absolute.sum() + uneven.abs()).nan_to_num(nan=math.inf)
        return MicroBatchSize(reached.sum(), weight, misfit)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1] if tensor.dim() > 1 else 1)


def _listen(tensor: Tensor, call: Callable[[Tensor], None]) -> None:
    node, index = tensor.grad_fn, tensor.output_nr
    if node is not None:

        def arrived(gradients: tuple[Tensor | None, ...]) -> None:
            gradient = gradients[index]
            if gradient is not None:
                call(gradient.detach())

        node.register_prehook(Hook(arrived))


def _logits(output: Any) -> Tensor | None:
    """The logits, or else the first output with a vector for each position."""
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    candidates = [named] if isinstance(named, Tensor) else tensors(output)
    return next((each for each in candidates if each.dim() >= 1 and each.numel() > 1 and _is_plain(each)), None)


def _loss(output: Any) -> Tensor | None:
    named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    candidates = [named] if isinstance(named, Tensor) else tensors(output)
    return next((each for each in candidates if each.numel() == 1 and _is_plain(each)), None)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.is_floating_point() and tensor.grad_fn is not None
