"""Samples of a model's outputs in the training loop, with the gradients that its backward brings them.

The gradient that reaches an output of the model is ∂L/∂z of the loss that is stepped on. A few positions of it, with
the output there, are held against `CANDIDATES`; which positions get a gradient at all is seen for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sharpwatch.curvature.objective.candidates import BINARY, CANDIDATES, SQUARES, Candidate
from sharpwatch.curvature.objective.fits import Derivatives
from sharpwatch.curvature.objective.seen import SeenLoss
from sharpwatch.errors import EmptyBatchError, ObjectiveError, UndecidedError

KEPT_ENTRIES = 2**23  # of all outputs and gradients of a forward, at whole positions
_EARLIER_ENTRIES = 2**18  # of each output of a forward that others have followed in the step
_MIN_POSITIONS, _MAX_POSITIONS = 32, 1024
_ENTRIES = 1024  # of an output without classes
_WHOLE = 1e-4  # relative error of a weight that is one over a whole number
_NICE = 1e-3  # relative error of the scale of a mean square
_ROUNDINGS = 8  # of sums of gradients in the format that they are in
_MAX_ZEROS = 0.05  # share of entries without a gradient in a mean square; more have a mask, or are of one column
_ALIKE = 4  # tolerances within which entries are too near to each other to tell losses apart
_MAX_COMPARED = 2**22  # entries of a gradient that are looked at for a mean over one dimension


@dataclass(slots=True, eq=False)
class _Part:
    """Some positions of an output, for one choice of the dimension that holds the classes."""

    classes: int | None
    index: tuple[Tensor, ...]
    output: Tensor
    gradient: Tensor | None = None
    live: Tensor | None = None  # which of all positions get a gradient
    lowest: Tensor | None = None  # of the gradient's entries at all positions

    @property
    def alike(self) -> bool:
        """Whether the outputs are so near to each other that every loss's gradient looks the same."""
        spread = (self.output.float().amax(-1) - self.output.float().amin(-1)).max()
        return float(spread) <= _ALIKE * Derivatives(self.output, self.output).tolerance

    @property
    def has_sure(self) -> bool:
        """Whether positions without a gradient may be ones of whose label the model is sure, to rounding."""
        if self.live is None:
            return False
        log_p = self.output[~self.live[self.index]].float().log_softmax(-1).amax(-1)
        return bool((log_p >= -torch.finfo(torch.float32).eps).any())

    def keep(self, count: int) -> None:
        """Keep the first `count` positions; the memory of the others is freed."""
        self.index = tuple(each[:count].clone() for each in self.index)
        self.output = self.output[:count].clone()
        self.gradient = None if self.gradient is None else self.gradient[:count].clone()


class OutputSample:
    """Samples of one output and of its gradient; holds no reference to the output itself.

    Args:
        name: The output's name.
        output: The output; copies of some positions are taken.
        generator: Draws the positions, on the CPU.
        kept: How many entries are copied, about.
    """

    def __init__(self, name: str, output: Tensor, generator: torch.Generator, kept: int = KEPT_ENTRIES) -> None:
        self.name = name
        self.shape = output.shape
        self._gradients = 0  # how many have come
        self._sizes: list[Tensor] = []  # of what came directly, of that without the model's own loss, and of roundings
        self._square: Tensor | None = None
        self._pooled: Tensor | None = None  # whether the gradient is alike along a dimension
        forms = dict.fromkeys(candidate.classes for candidate in CANDIDATES if candidate.takes(output))
        self._parts = [_part(output.detach(), classes, generator, kept) for classes in forms]

    @torch.no_grad()
    def take(self, gradient: Tensor, inner: Tensor | None = None, own: Tensor | None = None) -> None:
        """As `direct_gradients.Receiver.take`; temporaries are of the output's size where there is `inner` or `own`."""
        gradient = gradient.detach()
        self._gradients += 1
        # Where nothing else takes the output, what the own loss's node returned is what arrives.
        is_own = own is not None and _is_same(own, gradient)
        arrived = [_norm(each) for each in (gradient, inner, None if is_own else own) if each is not None]
        rounding = torch.stack(arrived).sum() * (torch.finfo(gradient.dtype).eps * _ROUNDINGS * (len(arrived) > 1))
        gradient = gradient if inner is None else gradient - inner
        norm = arrived[0] if inner is None else _norm(gradient)
        beyond = norm if own is None else norm * 0 if is_own else _norm(gradient - own)
        self._sizes.append(torch.stack([norm, beyond, rounding]))
        self._square = norm.square()
        if gradient.numel() <= _MAX_COMPARED:
            alike = [(gradient == gradient.narrow(dim, 0, 1)).all() for dim, n in enumerate(gradient.shape) if n > 1]
            self._pooled = torch.stack(alike).any() if alike else None
        for part in self._parts:
            values = gradient if part.classes is None else gradient.movedim(part.classes, -1)
            part.gradient = values[part.index]
            if part.classes is not None:
                # Unlike a norm these do not underflow, and they take a fifth of the largest magnitude's time.
                lowest = gradient.amin(part.classes)
                part.live, part.lowest = (gradient.amax(part.classes) != 0) | (lowest != 0), lowest.min()

    @property
    def reached(self) -> bool:
        """Whether the loss is of this output, and not of others alone that the model makes of it."""
        return any(not float(sizes[0]) <= float(sizes[2]) for sizes in self._sizes)

    @property
    def got_zeros(self) -> bool:
        """Whether a gradient came, and all of it was zero."""
        return bool(self._sizes) and all(float(sizes[0]) == 0 for sizes in self._sizes)

    @property
    def beyond_own_loss(self) -> bool:
        """Whether the loop's loss is of this output in another way than through the model's own loss."""
        return any(not float(sizes[1]) <= float(sizes[2]) for sizes in self._sizes)

    def shorten(self) -> None:
        """Keep fewer positions, as another forward has followed in the step."""
        for part in self._parts:
            wanted = max(1, _EARLIER_ENTRIES // max(1, part.output[0].numel()))
            part.keep(wanted if part.classes is not None else _ENTRIES)

    def seen(self, loss: float | None, forwards: int = 1) -> SeenLoss:
        """Tell which loss it was.

        Args:
            loss: The value of the loss, where it is known: a mean square is told by it.
            forwards: How many the step had: each may weigh as many times less.

        Returns:
            The loss.

        Raises:
            ObjectiveError: It is none of the candidates, or positions have different weights.
            UndecidedError: The samples do not show it.
            EmptyBatchError: No position predicts.
        """
        if not all(bool(sizes.isfinite().all()) for sizes in self._sizes):
            raise UndecidedError(f"the gradient of {self.name} is not finite")
        if self._gradients > 1:
            raise ObjectiveError(f"{self.name} got several gradients in one step: pass loss_fn")
        for candidate in CANDIDATES:
            found = self._fit(candidate, loss, forwards)
            if found is not None:
                return found
        what = f"the gradient of {self.name} {tuple(self.shape)} is not that of a cross-entropy"
        if loss is None:
            raise UndecidedError(
                f"{what}: pass loss_fn; if it is a mean square, watch.observe(loss=...) before the step is enough"
            )
        raise ObjectiveError(f"{what} nor of a mean square, which gnb knows: pass loss_fn, or logits_fn")

    def shows(self, other: SeenLoss, loss: float | None, forwards: int) -> bool:
        """Whether the loss is the same as the one of another forward.

        Raises:
            UndecidedError, EmptyBatchError: The samples do not show it.
        """
        found = None if self._gradients > 1 else self._fit(other.candidate, loss, forwards)
        return found is not None and found.is_like(other)

    def seen_again(self, known: SeenLoss) -> SeenLoss | None:
        """The loss of an earlier batch, of which this one shows no more than which positions predict."""
        part = self._part_for(known.candidate)
        if part is None or part.live is None or self.name != known.name or not bool(part.live.any()):
            return None
        if part.gradient is None or bool(part.gradient.any()):
            return None  # it shows another loss
        return replace(known, live=part.live, weight=known.total / int(part.live.sum()))

    def _part_for(self, candidate: Candidate) -> _Part | None:
        return next((part for part in self._parts if part.classes == candidate.classes), None)

    def _fit(self, candidate: Candidate, loss: float | None, forwards: int) -> SeenLoss | None:
        part = self._part_for(candidate)
        if part is None or part.gradient is None:
            return None
        if candidate is SQUARES:
            return self._squares(loss, forwards)
        if candidate is BINARY:
            return self._binary(part.output, part.gradient)
        gradient, live, lowest = part.gradient, part.live, part.lowest
        if live is None or lowest is None:
            return None
        if not bool(gradient.any()):
            raise UndecidedError("none of the positions that were looked at predicts")
        known = Derivatives(part.output, gradient)
        fit = candidate.fit(known)
        if fit is None:
            return None
        if part.alike:
            raise UndecidedError(f"the entries of {self.name} are too near to each other as yet to show a loss")
        weights = fit.weights[fit.predicting]
        weight = float(weights.double().mean())
        # No entry of w (p − q) is below −w, also where no sample was taken.
        equal = float((weights - weight).abs().max()) <= known.tolerance * weight
        equal = equal and -float(lowest) <= weight * (1 + 2 * known.tolerance)
        sure = _sure(weight, live, forwards) if part.has_sure else 0
        return SeenLoss(self.name, candidate, live, weight, equal=equal, sure=sure)

    def _binary(self, output: Tensor, gradient: Tensor) -> SeenLoss | None:
        """Weights |g| / |σ − y|, with targets y of 0 or 1 by the gradient's sign."""
        known = Derivatives(output, gradient)
        gradient, output = gradient.float(), output.float()
        weights = gradient.abs() / torch.sigmoid(torch.where(gradient < 0, -output, output))
        live = gradient != 0
        mean = float(weights[live].mean()) if bool(live.any()) else 0.0
        if not mean > 0 or not bool(live.all()) or float((weights - mean).abs().max()) > known.tolerance * mean:
            return None
        if float((gradient.abs() - gradient.abs().mean()).abs().max()) <= _ALIKE * known.tolerance * mean:
            raise UndecidedError(f"the entries of {self.name} are too near to zero as yet to show a loss")
        return SeenLoss(self.name, BINARY, torch.ones(self.shape, dtype=torch.bool, device=output.device), mean)

    def _squares(self, loss: float | None, forwards: int) -> SeenLoss | None:
        """L = w Σ(z − y)² has ‖∂L/∂z‖² = 4 w L; w must be 1/M of a mean over the M entries, or 1 of a sum.

        One of n forwards may weigh 1/n, with its loss told before or after it is divided.
        """
        if loss is None or not loss > 0 or self._square is None:
            return None
        # The norm alone would be that of a square of a mean over some entries too, or of some of them alone.
        sampled = next(part.gradient for part in self._parts if part.classes is None)
        some = sampled is None or float((sampled == 0).float().mean()) > _MAX_ZEROS
        if some or (self._pooled is not None and bool(self._pooled)):
            return None
        entries = math.prod(self.shape)
        weight = float(self._square) / (4 * loss)
        scales = {1.0, 1 / forwards, 1 / forwards**2}
        nice = [scale * each for scale in scales for each in (1 / entries, 0.5 / entries, 1.0, 0.5)]
        if not any(abs(weight / each - 1) < _NICE for each in nice):
            return None
        return SeenLoss(
            self.name, SQUARES, torch.ones(self.shape, dtype=torch.bool, device=self._square.device), weight
        )


@dataclass(frozen=True, slots=True, eq=False)
class SeenForward:
    """One forward of a training step.

    Attributes:
        samples: Samples of its outputs.
        has_loss: Whether the model returned a loss.
    """

    samples: Sequence[OutputSample]
    has_loss: bool = False

    @property
    def reached(self) -> list[OutputSample]:
        """The outputs that the loop's loss is of."""
        return [sample for sample in self.samples if sample.reached]

    @property
    def beyond_own_loss(self) -> list[OutputSample]:
        """The outputs that the loop's loss is of in another way than through the model's own loss."""
        return [sample for sample in self.samples if sample.beyond_own_loss]

    def seen(self, loss: float | None, forwards: int = 1, known: SeenLoss | None = None) -> SeenLoss:
        """Tell which loss it was of; as `seen_loss`."""
        reached = self.reached
        if len(reached) > 1:
            names = ", ".join(sample.name for sample in reached)
            raise ObjectiveError(f"the loop's loss depends on several outputs of the model, {names}: pass loss_fn")
        try:
            return reached[0].seen(loss, forwards)
        except UndecidedError:
            again = None if known is None else reached[0].seen_again(known)
            if again is None:
                raise
            return again


def seen_loss(
    forwards: Sequence[SeenForward], losses: Sequence[float] = (), known: SeenLoss | None = None
) -> SeenLoss | None:
    """Tell which loss the backward of a step was from.

    Args:
        forwards: The forwards of the step, or those of them that were looked at; the newest last.
        losses: The losses that the loop told, in order.
        known: That of an earlier batch; taken where the samples do not show it.

    Returns:
        The loss; None if no gradient came to any output.

    Raises:
        ObjectiveError: The loss can't be told, or it differs from forward to forward.
        UndecidedError: The newest forward was not trained on.
        EmptyBatchError: No position predicts.
    """
    trained = [forward for forward in forwards if forward.reached]
    if not trained:
        for sample in (sample for forward in forwards for sample in forward.samples if sample.got_zeros):
            raise EmptyBatchError(f"{sample.name} got no gradient: no position predicts")
        return None
    if trained[-1] is not forwards[-1]:
        raise UndecidedError("no backward came through the newest of the forwards before the step")
    told = losses if len(losses) == len(trained) else [None] * len(trained)
    found = trained[-1].seen(told[-1], len(trained), known)
    _require_alike(trained[:-1], told, found, len(trained))
    if not found.equal:
        raise ObjectiveError(f"the positions of {found.name} have different weights in the loss: pass loss_fn")
    return found


def require_alike(forwards: Sequence[SeenForward]) -> None:
    """Check that the forwards of a step have the same loss, as far as the newest shows one that is known.

    Raises:
        ObjectiveError: They have not.
    """
    trained = [forward for forward in forwards if forward.reached]
    found = _shown(trained[-1]) if len(trained) > 1 else None
    if found is not None:
        _require_alike(trained[:-1], [None] * len(trained), found, len(trained))


def equal(forwards: Sequence[SeenForward]) -> bool:
    """Whether the positions of each forward have the same weight, as far as they show it."""
    return all(found is None or found.equal for found in map(_shown, forwards))


def _shown(forward: SeenForward) -> SeenLoss | None:
    try:
        return forward.seen(None) if forward.reached else None
    except (ObjectiveError, EmptyBatchError):
        return None


def _require_alike(
    earlier: Sequence[SeenForward], told: Sequence[float | None], found: SeenLoss, forwards: int
) -> None:
    for loss, forward in zip(told, earlier, strict=False):
        reached = forward.reached
        try:
            if len(reached) == 1 and reached[0].shows(found, loss, forwards):
                continue
        except (EmptyBatchError, UndecidedError):
            continue  # the samples do not show it
        other = _shown(forward)
        texts = ["one that gnb does not know" if other is None else other.objective.text, found.objective.text]
        if other is not None and texts[0] == texts[1]:
            weights = f"{other.weight:.3g} and {found.weight:.3g}"
            raise ObjectiveError(
                f"the forwards of a step weigh each position of {found.name} by {weights}: pass loss_fn"
            )
        raise ObjectiveError(f"the forwards of a step have different losses, {' and '.join(texts)}: pass loss_fn")


def _sure(weight: float, live: Tensor, forwards: int) -> int:
    """How many positions a mean over N counts beside those with a gradient; of n forwards each may weigh 1/n."""
    count = int(live.sum())
    for share in (1, forwards):
        positions = round(1 / (weight * share))
        if positions == count:
            return 0
        if count < positions <= live.numel() and abs(weight * share * positions - 1) <= _WHOLE:
            return positions - count
    return 0


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one in memory."""
    views = [(each.data_ptr(), each.shape, each.stride(), each.dtype) for each in (one, other)]
    return views[0] == views[1]


def _norm(values: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float32)
    return norm


def _part(output: Tensor, classes: int | None, generator: torch.Generator, kept: int) -> _Part:
    values = output if classes is None else output.movedim(classes, -1)
    shape = values.shape if classes is None else values.shape[:-1]
    count, wanted = math.prod(shape), _ENTRIES
    if classes is not None:
        wanted = min(max(kept // values.shape[-1], _MIN_POSITIONS), _MAX_POSITIONS)
    # Drawn with replacement where there are many: a permutation of all would take memory for each.
    if count <= 4 * wanted:
        chosen = torch.randperm(count, generator=generator, device="cpu")[:wanted]
    else:
        chosen = torch.randint(count, (wanted,), generator=generator, device="cpu")
    index = tuple(each.to(output.device) for each in torch.unravel_index(chosen, shape))
    return _Part(classes, index, values[index])
