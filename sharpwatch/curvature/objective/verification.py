"""Finds the loss that is trained on as a function of the model's outputs, and holds it against the loss itself.

The loss is the model's own, or that of a `loss_fn`. One forward gives it with its graph. Its gradient with respect to
each output is compared with those of `CANDIDATES`; the first that fits at all positions and whose value is the loss, to
rounding, is the objective that `gnb` measures.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from sharpwatch.curvature.objective.batch import (
    Batch,
    LogitsFn,
    LossCall,
    LossFn,
    call_loss_fn,
    count_predicting,
    find_labels,
    predict,
)
from sharpwatch.curvature.objective.candidates import (
    CHANNELS_CROSS_ENTROPY,
    CROSS_ENTROPY,
    SQUARES,
    Candidate,
    find_fits,
)
from sharpwatch.curvature.objective.factors import OutputGradients
from sharpwatch.curvature.objective.fits import Fit
from sharpwatch.curvature.objective.outputs import all_outputs, assumed_classes, items, loss_in, named_outputs
from sharpwatch.curvature.objective.targets import TargetSource, find_source
from sharpwatch.errors import EmptyBatchError, ObjectiveError

_CAST = "ToCopyBackward0"  # the graph's node of a cast
_ROUNDINGS = 8  # of a loss in its own format
_LOGIT_ROUNDINGS = 256  # of a position's loss in float32, relative to 1
_MAX_OTHERS = 8  # outputs beside the logits that are tried
_MAX_COMBINATIONS = 64  # of candidates for several outputs
_COEFFICIENT = re.compile("aux|router|coef|loss")  # in the names of a configuration
_EQUAL = 0.02  # relative difference below which a total weight is 1

State = Literal["verified", "assumed", "given", "undecided", "refused"]


@dataclass(frozen=True, slots=True)
class ObjectiveInUse:
    """The loss whose Gauss-Newton matrix `gnb` measures, in words.

    Attributes:
        text: Such as "mean cross-entropy of logits, labels shifted by one"; the reason where there is none.
        state: "verified": it reproduces the loss that is trained on. "assumed": no loss is known. "given": by
            `logits_fn`. "undecided" or "refused": nothing is measured.
    """

    text: str
    state: State

    def __str__(self) -> str:
        return f"{self.text} ({self.state})"


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One part of the loss: a candidate at one output, with its weights.

    Attributes:
        name: The output's name.
        output: The output, with its graph.
        candidate: The form of the loss.
        fit: Its weights.
    """

    name: str
    output: Tensor
    candidate: Candidate
    fit: Fit

    @property
    def text(self) -> str:
        """The term in words."""
        return f"{scale_in_words(self.fit.total, self.fit.tokens)} {self.candidate.name} of {self.name}"

    def gradients(self, draws: int, generator: torch.Generator) -> OutputGradients:
        """Random vectors whose second moment is this term's second derivative."""
        return self.candidate.draw(self.output.detach(), self.fit.weights, draws, generator)


@dataclass(frozen=True, slots=True, eq=False)
class OutputLoss:
    """A loss as a function of the model's outputs.

    Attributes:
        terms: Its parts.
        objective: The loss in words.
        targets: Where the targets of the first part are among the arguments, if they were found.
    """

    terms: Sequence[Term]
    objective: ObjectiveInUse
    targets: TargetSource | None = None

    @property
    def tokens(self) -> int:
        """Number of predicting positions of the first part."""
        return self.terms[0].fit.tokens

    @property
    def equal(self) -> bool:
        """Whether all predicting positions have the same weight."""
        given = [term.fit.weights[term.fit.predicting] for term in self.terms]
        return all(float(weights.max() - weights.min()) <= _EQUAL * float(weights.max()) for weights in given)

    @property
    def share(self) -> float:
        """How much this batch counts beside others: a mean by its positions, a sum by itself."""
        return self.tokens / self.terms[0].fit.total

    @property
    def outputs(self) -> list[Tensor]:
        """The outputs, with their graphs."""
        return [term.output for term in self.terms]

    @property
    def total(self) -> float:
        """The summed weight of all positions."""
        return sum(term.fit.total for term in self.terms)

    def scaled(self, factor: float) -> OutputLoss:
        """This loss times `factor`."""
        fits = [replace(term.fit, weights=term.fit.weights * factor) for term in self.terms]
        terms = [replace(term, fit=fit) for term, fit in zip(self.terms, fits, strict=True)]
        return OutputLoss(terms, self.objective, self.targets)


def scale_in_words(total: float, tokens: int) -> str:
    """The kind of sum in which `tokens` positions weigh `total` together: "mean", "summed" or "0.25 x mean"."""
    if abs(total - 1) < _EQUAL:
        return "mean"
    return "summed" if abs(total - tokens) < _EQUAL * tokens else f"{total:.4g} x mean"


def output_loss(
    call: Callable[..., Any],
    model: nn.Module,
    batch: Batch,
    *,
    loss_fn: LossFn | None = None,
    logits_fn: LogitsFn | None = None,
) -> OutputLoss:
    """Run a forward and find the loss as a function of its outputs.

    Args:
        call: Called in place of `model`.
        model: The model, for its signature and configuration.
        batch: The arguments.
        loss_fn: Computes the loss; None to take that in the model's output.
        logits_fn: Computes logits and a mask; they are taken as they are.

    Returns:
        The loss. Where no loss is known, a mean cross-entropy is assumed.

    Raises:
        ObjectiveError: The loss is none of `CANDIDATES`.
        EmptyBatchError: No position predicts.
        ProbeError: There are no outputs.
    """
    if logits_fn is not None:
        logits, mask = predict(call, model, batch, logits_fn)
        return _mean_cross_entropy(logits, mask, -1, "given")
    if loss_fn is not None:
        return verify(call_loss_fn(call, model, batch, loss_fn), model, curvature=True)
    output = call(*batch.args, **batch.kwargs)
    loss = loss_in(output)
    if loss is not None:
        return verify(LossCall(loss, batch, output), model)
    return assume(output, model, batch)


def assume(output: Any, model: nn.Module, batch: Batch) -> OutputLoss:
    """Take an output for logits, since no loss is known; all positions predict, or those with a label.

    Args:
        output: What the model returned.
        model: The model.
        batch: The arguments.

    Returns:
        The loss.

    Raises:
        ObjectiveError: The output's shape speaks against logits.
        ProbeError: It has no logits.
    """
    labels = find_labels(model, batch)
    logits, mask = predict(lambda *_, **__: output, model, batch, None)
    classes = -1 if labels is not None else assumed_classes(logits, batch)
    if classes == 1:
        mask = torch.ones(logits.movedim(1, -1).shape[:-1], dtype=torch.bool, device=logits.device)
    return _mean_cross_entropy(logits, mask, classes, "assumed")


def verify(call: LossCall, model: nn.Module, *, curvature: bool = False) -> OutputLoss:
    """Find the candidate whose gradient and value are those of a loss.

    Args:
        call: The loss, and the call of the model that it is of.
        model: The model, for its signature and configuration.
        curvature: Whether its second derivative must be the loss's too: a function of the user's may have terms that
            are zero as yet, and flat.

    Returns:
        The loss as a function of the outputs.

    Raises:
        ObjectiveError: No candidate fits.
        EmptyBatchError: No position predicts.
    """
    named, others = named_outputs(call.output), all_outputs(call.output)
    groups = [
        {name: each for name, each in group.items() if each.dim() and each is not call.loss and each.requires_grad}
        for group in (named, {name: each for name, each in others.items() if name not in named})
    ]
    if not any(groups):
        what = "found no logits in the model's output, nor another tensor that the loss is of"
        raise ObjectiveError(f"{what}: pass logits_fn")
    value = float(call.loss.detach().double())
    if not math.isfinite(value):
        return _not_finite(groups[0] or groups[1], value)
    fitting: list[list[Term]] = []
    # A loss is seldom of hidden states that are returned as well: those are tried where the others do not make it up.
    for name, output in itertools.chain(groups[0].items(), itertools.islice(groups[1].items(), _MAX_OTHERS)):
        terms: list[Term] = []
        for term in _terms(call.loss, name, output, curvature=curvature):
            if _reproduces([term], call.loss, value):
                return _described([term], call, model)
            terms.append(term)
        fitting += [terms] if terms else []
    return _verify_several(fitting, call, model, value)


def _verify_several(fitting: Sequence[Sequence[Term]], call: LossCall, model: nn.Module, value: float) -> OutputLoss:
    """Find terms at several outputs, or with other losses of the model, that add up to the loss."""
    if not fitting:
        shapes = ", ".join(f"{name} {tuple(output.shape)}" for name, output in named_outputs(call.output).items())
        raise ObjectiveError(f"the loss is none that gnb knows, such as a cross-entropy or a mean square, of {shapes}")
    combinations = list(itertools.islice(itertools.product(*fitting), _MAX_COMBINATIONS))
    if len(fitting) > 1:
        combinations += [(term,) for terms in fitting for term in terms]
    others = [("", 0.0), *_auxiliaries(call.output, model)]
    for (words, other), terms in itertools.product(others, combinations):
        if _reproduces(terms, call.loss, value - other):
            return _described(terms, call, model, words)
    text = " + ".join(term.text for term in combinations[0])
    found = sum(term.fit.loss for term in combinations[0])
    raise ObjectiveError(f"the loss {value:.6g} has other terms than the {text}, which is {found:.6g}")


def _terms(loss: Tensor, name: str, output: Tensor, *, curvature: bool) -> Iterator[Term]:
    """All candidates that fit the gradient with respect to one output, in order; none if the loss is not of it."""
    # A mean's gradient would underflow in half precision: the loss is multiplied by the number of positions.
    scale = float(max(1, output.numel() // output.shape[-1]))
    at = get_gradient_edge(output)
    gradient = _gradient(loss, at, scale)
    while gradient is None and at.node.name() == _CAST:
        # Accelerate casts what the model returns, when its loss is computed already.
        node, number = at.node.next_functions[0]
        if node is None:
            break
        at = GradientEdge(node, number)
        gradient = _gradient(loss, at, scale)
    if gradient is None or not bool(gradient.any()):
        return
    product = _Curvature(loss, at, scale).product
    for candidate, fit in find_fits(output.detach().to(gradient.dtype), gradient, scale, product, curvature=curvature):
        yield Term(name, output, candidate, fit)


def _gradient(loss: Tensor, at: GradientEdge, scale: float) -> Tensor | None:
    """`scale` times ∂L/∂z with z at an edge; None if the loss is not of it."""
    (gradient,) = torch.autograd.grad(loss, at, loss.new_tensor(scale), retain_graph=True, allow_unused=True)
    return gradient


class _Curvature:
    """Products with `scale` times ∂²L/∂z², with z at an edge; the gradient's graph is made at the first one."""

    def __init__(self, loss: Tensor, at: GradientEdge, scale: float) -> None:
        self._loss, self._at, self._scale = loss, at, scale
        self._gradient: Tensor | None = None

    def product(self, vector: Tensor) -> Tensor:
        """The product with a vector of the output's shape; zero where the gradient is constant."""
        if self._gradient is None:
            scale = self._loss.new_tensor(self._scale)
            (self._gradient,) = torch.autograd.grad(self._loss, self._at, scale, create_graph=True)
        product = None
        if self._gradient.requires_grad:
            (product,) = torch.autograd.grad(self._gradient, self._at, vector, retain_graph=True, allow_unused=True)
        return torch.zeros_like(vector) if product is None else product


def _reproduces(terms: Sequence[Term], loss: Tensor, value: float) -> bool:
    """Whether `terms` add up to `value`, to the rounding of `loss` and of sums over the positions in float32."""
    return abs(sum(term.fit.loss for term in terms) - value) <= sum(_rounding(term, loss) for term in terms)


def _rounding(term: Term, loss: Tensor) -> float:
    own, single = torch.finfo(loss.dtype).eps, torch.finfo(torch.float32).eps
    # Each position's loss is a difference of numbers of the logits' size; a sum of n of them errs by √n at random.
    relative = _ROUNDINGS * own + 4 * single * math.sqrt(term.fit.weights.numel()) + term.fit.rounding
    return relative * abs(term.fit.loss) + _LOGIT_ROUNDINGS * single * term.fit.total


def _auxiliaries(output: Any, model: nn.Module) -> Iterator[tuple[str, float]]:
    """Other losses in the output, times the coefficients of the model's configuration, in words and as numbers."""
    config = getattr(getattr(model, "config", None), "__dict__", {})
    known = [value for name, value in config.items() if isinstance(value, float) and _COEFFICIENT.search(name)]
    for name, value in items(output):
        if isinstance(value, Tensor) and value.numel() == 1 and name != "loss" and "loss" in name:
            for coefficient in dict.fromkeys([*known, 1.0]):
                yield f" + {coefficient:g} x {name}", coefficient * float(value.detach())


def _not_finite(outputs: Mapping[str, Tensor], value: float) -> OutputLoss:
    """What is sampled where the loss is no number: numbers that are not finite either."""
    if all(bool(output.isfinite().all()) for output in outputs.values()):
        raise EmptyBatchError(f"the loss is {value}, as where every label is ignored: no position predicts")
    name, output = next(iter(outputs.items()))
    candidate = CROSS_ENTROPY if CROSS_ENTROPY.takes(output) else SQUARES
    positions = candidate.positions(output.detach()).shape[0]
    weights = output.new_full((positions,), 1 / positions, dtype=torch.float32)
    return OutputLoss([Term(name, output, candidate, Fit(weights, value))], ObjectiveInUse("not finite", "undecided"))


def _described(terms: Sequence[Term], call: LossCall, model: nn.Module, more: str = "") -> OutputLoss:
    text = " + ".join(term.text for term in terms)
    source = find_source(terms[0].candidate.position_shape(terms[0].output), terms[0].fit, model, call.arguments)
    return OutputLoss(terms, ObjectiveInUse(f"{text}{source or ''}{more}", "verified"), source)


def _mean_cross_entropy(logits: Tensor, mask: Tensor, classes: int, state: State) -> OutputLoss:
    """The mean over the positions of `mask`."""
    tokens, candidate = count_predicting(mask), CROSS_ENTROPY if classes == -1 else CHANNELS_CROSS_ENTROPY
    term = Term("logits", logits, candidate, Fit(mask.reshape(-1).float() / tokens, math.nan))
    return OutputLoss([term], ObjectiveInUse(term.text, state))
