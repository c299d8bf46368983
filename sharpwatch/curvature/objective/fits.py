"""Reads the weights and targets of a known loss off its derivatives at a model's output.

A loss is a sum L = Σ_i w_i c(z_i) over positions i of one output z. Weights and targets are read off ∂L/∂z rather than
guessed from labels:

- Cross-entropy with target distribution q: ∂L/∂z_i = w_i (p_i − q_i) with p = softmax(z), and ∂²L/∂z_i² =
  w_i (diag p_i − p_i p_iᵀ), whatever q is. At classes outside of the target the quotient of gradient and p is w_i. So
  label smoothing, soft targets, ignored labels (w_i = 0) and class weights (w_i depends on the true class) are all
  covered.
- Negative log-likelihood of log-probabilities z: ∂L/∂z_i = −w_i at the target alone; it is the cross-entropy of z.
- Squares: ∂²L/∂z² is diagonal with 2 w_i. Binary cross-entropy: diagonal with w_i σ(z_i)(1 − σ(z_i)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

# What torch's own errors about a missing second derivative say.
NO_SECOND_DERIVATIVE = ("not implemented", "differentiate twice", "double backward", "no autograd formula")
_CHUNK_ENTRIES = 2**22  # of a temporary: the rows of an output are worked through in pieces
_TOLERANCE_UNITS = 12  # rounding errors of a softmax and its gradient, in units of the last place
_MIN_TOLERANCE = 1e-3  # float32 sums over a vocabulary
_MIN_BALANCE = 1e-4  # of the entries of one position's gradient, which sum to zero
_SOFT_CLASSES = 2  # classes of one target that stand out: two in mixup, one with smoothed labels
_MIN_VARIANCE = 1e-6  # σ(z)(1 − σ(z)) of a binary output whose weight can be told
_MIN_SOFT_CLASSES = 10  # of which the others are fitted by two numbers
_SLOPES = 32  # pairs of classes


@dataclass(frozen=True, slots=True, eq=False)
class Derivatives:
    """The first derivative of a loss with respect to one output, and access to the second.

    Attributes:
        output: z, [positions, classes] or [positions].
        gradient: `scale` times ∂L/∂z, of the same shape.
        scale: The factor of the gradient.
        curvature: v -> `scale` times (∂²L/∂z²) v; None if only the gradient is known.
    """

    output: Tensor
    gradient: Tensor
    scale: float = 1.0
    curvature: Callable[[Tensor], Tensor] | None = None

    @property
    def tolerance(self) -> float:
        """Relative error that rounding can cause in the gradient."""
        return max(_MIN_TOLERANCE, _TOLERANCE_UNITS * torch.finfo(self.output.dtype).eps)

    @property
    def chunk(self) -> int:
        """How many positions are worked on at a time."""
        return max(1, _CHUNK_ENTRIES // max(1, self.output[0].numel()))

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Output and gradient in float32, some positions at a time."""
        pieces = (torch.split(each, self.chunk) for each in (self.output, self.gradient))
        for output, gradient in zip(*pieces, strict=True):
            yield output.float(), gradient.float() / self.scale


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """A candidate with its weights.

    Attributes:
        weights: w_i, float32 [positions]; 0 where nothing predicts.
        loss: Σ_i w_i c_i, to be held against the loss itself.
        rounding: Relative error of `loss` beyond that of float32.
        targets: The class of each position, int64 [positions]; None if targets are no classes.
        sure: Number of positions beyond those of `weights` that a mean counts: the model is so sure of their labels
            that their gradient is rounded to zero.
    """

    weights: Tensor
    loss: float
    rounding: float = 0.0
    targets: Tensor | None = None
    sure: int = 0

    @property
    def predicting(self) -> Tensor:
        """Bool [positions]."""
        return self.weights > 0

    @property
    def tokens(self) -> int:
        """Number of predicting positions."""
        return int(self.predicting.sum()) + self.sure

    @property
    def total(self) -> float:
        """Σ_i w_i: 1 for a mean, the number of positions for a sum."""
        total = float(self.weights.double().sum())
        return total * self.tokens / max(1, self.tokens - self.sure)


def fit_cross_entropy(known: Derivatives, *, soft: bool) -> Fit | None:
    """Weights of a cross-entropy, with targets that are classes or `soft`; None if the gradient is not that of one."""
    if soft and known.curvature is not None:
        return _fit_curvature(known)
    if soft and known.output.shape[1] < _MIN_SOFT_CLASSES:
        return None
    rows = [_cross_entropy_rows(*chunk, soft=soft) for chunk in known.chunks()]
    weights, targets, losses, size, imbalance, misfit, explained = (torch.cat(each) for each in zip(*rows, strict=True))
    live = size > 0
    clear = live & (explained > 0)  # elsewhere the model is so sure that all other p underflow
    # The label's entry p − 1 is rounded as 1 is, however small the others are.
    rounded = 8 * torch.finfo(torch.float32).eps * weights.abs()
    is_balanced = not bool((imbalance > max(_MIN_BALANCE, known.tolerance) * size + rounded).any())
    fits = float(misfit.sum()) <= known.tolerance**2 * float(explained.sum())
    if not (bool(clear.any()) and is_balanced and fits and bool((weights[clear] > 0).all())):
        return None
    weights = torch.where(clear, weights, torch.where(live, weights[clear].mean(), 0.0))
    snapped = _snap(weights, live, known.tolerance)
    rounding = torch.finfo(known.output.dtype).eps if snapped is None or soft else 0.0
    weights = weights if snapped is None else snapped
    if soft:  # Σ q log p with q = p − g/w, summed up with the weights that were fitted
        return Fit(weights, float(losses[live].double().sum()), 8 * rounding)
    loss = float((weights[live].double() * losses[live].double()).sum())
    return Fit(weights, loss, 8 * rounding, targets, _sure(weights, live))


def _cross_entropy_rows(output: Tensor, gradient: Tensor, *, soft: bool) -> tuple[Tensor, ...]:
    """Weights, targets, losses, Σ|g|, |Σg|, Σ(g − fit)² and Σ(w p)² of some positions [n, V]."""
    log_p = F.log_softmax(output, -1)
    p = log_p.exp()
    outstanding = _outstanding(p, gradient) if soft else gradient.topk(1, largest=False).indices
    others = torch.ones_like(p).scatter_(1, outstanding, 0.0)
    count = others.sum(1)
    if soft:  # q is constant at the other classes: fit g = w p − constant
        centre_p, centre_g = (p * others).sum(1) / count, (gradient * others).sum(1) / count
        deviation_p, deviation_g = (p - centre_p[:, None]) * others, (gradient - centre_g[:, None]) * others
    else:  # q is 0 there: fit g = w p
        deviation_p, deviation_g = p * others, gradient * others
    # Scaled, since the squares of small probabilities underflow.
    scale = deviation_p.abs().amax(1, keepdim=True)
    unit = deviation_p / scale.where(scale > 0, 1.0)
    weights = (unit * deviation_g).sum(1) / unit.square().sum(1) / scale[:, 0].where(scale[:, 0] > 0, 1.0)
    weights = weights.nan_to_num(0.0)
    fitted = weights[:, None] * deviation_p
    if soft:
        mixed = weights[:, None] * p - gradient  # w q
        losses = -torch.where(mixed == 0, 0.0, mixed * log_p).sum(1)
    else:
        losses = -log_p.gather(1, outstanding)[:, 0]
    return (
        weights,
        outstanding[:, 0],
        losses,
        gradient.abs().sum(1),
        gradient.sum(1).abs(),
        (deviation_g - fitted).double().square().sum(1),
        fitted.double().square().sum(1),
    )


def _outstanding(p: Tensor, gradient: Tensor) -> Tensor:
    """The classes of the target, [n, 2]: those with the largest q = p − g/w, by a robust slope w of g over p.

    The slope is the median over pairs of likely and unlikely classes (Theil 1950): a constant of q drops out of each,
    and few pairs have a class of the target.
    """
    count = min(_SLOPES, p.shape[1] // 2)
    high, low = p.topk(count), p.topk(count, largest=False)
    rise = gradient.gather(1, high.indices) - gradient.gather(1, low.indices)
    slope = (rise / (high.values - low.values)).nanmedian(1, keepdim=True).values
    return (slope * p - gradient).topk(_SOFT_CLASSES).indices


def curves_alike(known: Derivatives, weights: Tensor) -> bool:
    """Whether ∂²L/∂z² is that of a cross-entropy with weights [positions], by one product with random signs.

    A term whose gradient is zero shows in it, as a divergence from the model's own present outputs. True where there is
    no second derivative.
    """
    image = _product(known, signs := _random_signs(known.output))
    if image is None:
        return True
    misfit, explained = 0.0, 0.0
    pieces = (torch.split(each, known.chunk) for each in (known.output, signs, image, weights))
    for output, sign, product, weight in zip(*pieces, strict=True):
        p = output.float().softmax(-1)
        expected = weight[:, None] * _curved(p, sign)
        misfit += float((product - expected).double().square().sum())
        explained += float(expected.double().square().sum())
    return misfit <= known.tolerance**2 * explained


def _fit_curvature(known: Derivatives) -> Fit | None:
    """A cross-entropy with any targets, by ∂²L/∂z_i² = w_i (diag p_i − p_i p_iᵀ)."""
    image = _product(known, signs := _random_signs(known.output))
    if image is None:
        return None
    weights, losses = [], []
    misfit, explained = 0.0, 0.0
    pieces = zip(known.chunks(), *(torch.split(each, known.chunk) for each in (signs, image)), strict=True)
    for (output, gradient), sign, product in pieces:
        log_p = F.log_softmax(output, -1)
        p = log_p.exp()
        expected = _curved(p, sign)
        size = expected.square().sum(1)
        found = (expected * product).sum(1) / size.where(size > 0, 1.0)
        misfit += float((product - found[:, None] * expected).double().square().sum())
        explained += float((found[:, None] * expected).double().square().sum())
        mixed = found[:, None] * p - gradient  # w q
        losses.append(-torch.where(mixed == 0, 0.0, mixed * log_p).double().sum())
        weights.append(found)
    weight = torch.cat(weights)
    if not explained > 0 or misfit > known.tolerance**2 * explained or float(weight.min()) < 0:
        return None
    live = weight > known.tolerance * weight.max()
    weight = weight * live
    snapped = _snap(weight, live, known.tolerance)
    rounding = 8 * torch.finfo(known.output.dtype).eps
    return Fit(weight if snapped is None else snapped, float(sum(losses)), rounding)


def _curved(p: Tensor, vector: Tensor) -> Tensor:
    """(diag p_i − p_i p_iᵀ) v_i of each position."""
    return p * vector - p * (p * vector).sum(1, keepdim=True)


def _snap(weights: Tensor, live: Tensor, tolerance: float) -> Tensor | None:
    """Equal weights as the numbers that they are meant to be: 1/N of a mean, 1 of a sum; None if they are not equal."""
    mean = float(weights[live].double().mean())
    if float((weights[live] - mean).abs().max()) > tolerance * mean:
        return None
    count, inverse, error = int(live.sum()), round(1 / mean), tolerance / 4
    if abs(mean * count - 1) <= error:
        mean = 1 / count
    elif count < inverse <= live.numel() and abs(mean * inverse - 1) <= _MIN_BALANCE:
        mean = 1 / inverse
    elif abs(mean - 1) <= error:
        mean = 1.0
    return live.to(weights.dtype) * mean


def _sure(weights: Tensor, live: Tensor) -> int:
    """How many positions a mean counts whose gradient is zero: those that its weight 1/N leaves over."""
    weight, count = float(weights.max()), int(live.sum())
    positions = round(1 / weight)
    is_mean = count < positions <= live.numel() and abs(weight * positions - 1) <= torch.finfo(torch.float32).eps
    return positions - count if is_mean else 0


def _diagonal(known: Derivatives) -> Tensor | None:
    """The diagonal of ∂²L/∂z² [positions] in float32; None if the matrix is not diagonal, or negative."""
    diagonal, image = _product(known, torch.ones_like(known.output)), None
    if diagonal is not None:
        image = _product(known, signs := _random_signs(known.output))
    if diagonal is None or image is None:
        return None
    size = float(torch.linalg.vector_norm(diagonal))
    misfit = float(torch.linalg.vector_norm(image - diagonal * signs))
    if not size > 0 or misfit > known.tolerance * size or float(diagonal.min()) < -known.tolerance * size:
        return None
    return diagonal.clamp_(min=0)


def _product(known: Derivatives, vector: Tensor) -> Tensor | None:
    """(∂²L/∂z²) v in float32; None if there is no second derivative."""
    if known.curvature is None:
        return None
    try:
        return known.curvature(vector).float() / known.scale
    except RuntimeError as error:
        if not any(words in str(error) for words in NO_SECOND_DERIVATIVE):
            raise
        return None


def _random_signs(like: Tensor) -> Tensor:
    """A fixed random pattern: a matrix that is not of the expected form gives another product."""
    source = torch.Generator(device="cpu").manual_seed(0)
    return torch.randint(0, 2, like.shape, generator=source, device="cpu").to(like) * 2 - 1


def fit_squares(known: Derivatives) -> Fit | None:
    """Weights of L = Σ w_i (z_i − y_i)², by the second derivative; None if it is not that of one."""
    diagonal = _diagonal(known)
    if diagonal is None:
        return None
    gradient, live = known.gradient.float() / known.scale, diagonal > 0
    if bool((gradient[~live] != 0).any()):
        return None
    weights = diagonal / 2
    snapped = _snap(weights, live, known.tolerance)
    weights = weights if snapped is None else snapped
    # L = Σ w (z − y)² and g = 2 w (z − y).
    loss = float((gradient[live].double().square() / (4 * weights[live].double())).sum())
    return Fit(weights, loss, 8 * torch.finfo(known.output.dtype).eps)


def fit_binary(known: Derivatives) -> Fit | None:
    """Weights of a binary cross-entropy, by the second derivative; None if it is not that of one."""
    diagonal = _diagonal(known)
    if diagonal is None:
        return None
    output, gradient = known.output.float(), known.gradient.float() / known.scale
    p = torch.sigmoid(output)
    variance = p * torch.sigmoid(-output)
    live, clear = diagonal > 0, (diagonal > 0) & (variance > _MIN_VARIANCE)
    if not clear.any():
        return None
    weights = torch.where(clear, diagonal / variance.clamp(min=_MIN_VARIANCE), 0.0)
    weights = torch.where(live & ~clear, weights[clear].mean(), weights)
    snapped = _snap(weights, live, known.tolerance)
    weights = weights if snapped is None else snapped
    target = p[live] - gradient[live] / weights[live]
    if float(target.min()) < -known.tolerance or float(target.max()) > 1 + known.tolerance:
        return None
    losses = F.softplus(output[live]) - target * output[live]
    loss = float((weights[live].double() * losses.double()).sum())
    return Fit(weights, loss, 8 * torch.finfo(known.output.dtype).eps)


def fit_log_likelihood(known: Derivatives) -> Fit | None:
    """Weights of L = −Σ w_i z_i[t_i] with log-probabilities z = log p; None if the gradient is not that of one.

    The model's own softmax drops any multiple of p from the gradient, so that of the cross-entropy of z does as well.
    """
    weights, targets, losses = [], [], []
    for output, gradient in known.chunks():
        least = gradient.min(1)
        single = (gradient != 0).sum(1) <= 1
        normal = output.logsumexp(1).abs() <= known.tolerance
        if not bool((single & (normal | (least.values == 0))).all()):
            return None
        weights.append(-least.values)
        targets.append(least.indices)
        losses.append(-output.gather(1, least.indices[:, None])[:, 0])
    weight = torch.cat(weights)
    live = weight > 0
    if not bool(live.any()) or bool((weight < 0).any()):
        return None
    snapped = _snap(weight, live, known.tolerance)
    weight = weight if snapped is None else snapped
    loss = float((weight[live].double() * torch.cat(losses)[live].double()).sum())
    return Fit(weight, loss, 8 * torch.finfo(known.output.dtype).eps, torch.cat(targets))
