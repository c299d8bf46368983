"""Runs the `gnb` probe in training: traces and sketches of all blocks at once, and the sketch of the step's gradient.

The estimator is `curvature.estimators.gnb`, or `gnb_sharded` where no rank holds whole parameters.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sharpwatch.agent.hooks import backward_is_compiled
from sharpwatch.agent.optimizers.support import layout_of
from sharpwatch.agent.probes.context import Probe, ProbeContext, ProbedStep, ProbeSpec, ShardReduction
from sharpwatch.agent.probes.seen_outputs import OutputListener
from sharpwatch.curvature.estimators.gnb import GnbSample, gnb_probe
from sharpwatch.curvature.estimators.gnb_sharded import sharded_gnb_probe
from sharpwatch.curvature.objective.batch import Batch, LossCall, LossFn
from sharpwatch.curvature.objective.outputs import loss_in
from sharpwatch.curvature.objective.samples import SeenForward, equal, require_alike, seen_loss
from sharpwatch.curvature.objective.seen import SeenLoss, SeenRows
from sharpwatch.curvature.objective.verification import (
    ObjectiveInUse,
    OutputLoss,
    assume,
    output_loss,
    scale_in_words,
    verify,
)
from sharpwatch.curvature.parameters.shards import Shard, local_gradient_summand, sketch_shards
from sharpwatch.errors import ObjectiveError, UndecidedError
from sharpwatch.v1 import agent_pb2
from sharpwatch.wire import encode

_DRAWS = 4
_EQUAL = 0.02  # relative difference below which two total weights are the same
_WEIGHED_TOKENS = 64  # of a probe where they have different weights: the sum of these then errs by some per cent


@dataclass(frozen=True, slots=True)
class GnbReport:
    """A `gnb` probe, and the sketch [B, k] of the gradient that was stepped on; None where it could not be taken."""

    sample: GnbSample
    gradient_sketch: Tensor | None


class _GnbProbe(Probe):
    """Sketches the gradient before the step, on its device and without waiting for it.

    It listens to the gradients of what the model returned: they show which loss is trained on.

    Attributes:
        objective: The loss that the newest probe measured, or why it measured none; None before the first.
    """

    objective: ObjectiveInUse | None = None
    _known: SeenLoss | None = None
    _gradient_sketch: Tensor | None = None

    def __init__(self, context: ProbeContext) -> None:
        super().__init__(context)
        self._listener = OutputListener(context.barrier, context.model)
        self._with_parameters = layout_of(context.optimizers).gradients_in_place

    def before_step(self, step: ProbedStep) -> None:
        """Sketches the gradient as it stands, whatever has been done to its scale."""
        del step
        # What a step that never ended has left must not be taken for this step's.
        self._gradient_sketch = None
        if self._with_parameters:
            self._gradient_sketch = self._sketch()

    def discard(self) -> None:
        """Forgets the gradient."""
        self._gradient_sketch = None
        self._listener.remove()

    def output(self, batch: Batch, output: Any) -> None:
        """Listens to the gradients of what the model returned."""
        del batch
        if self.context.logits_fn is None:
            self._listener.returned(output)

    def backward_from_another_loss(self, step: ProbedStep) -> None:
        """The outputs' gradients show from which."""
        step.own_loss = False

    def _heard(self, step: ProbedStep) -> list[SeenForward]:
        """What the outputs' gradients showed in the step."""
        forwards, seconds = self._listener.take(), self._listener.seconds
        self._listener.seconds = 0.0
        step.seconds["gnb"] = step.seconds.get("gnb", 0.0) + seconds
        return forwards

    def _seen(self, step: ProbedStep, forwards: Sequence[SeenForward]) -> SeenRows | None:
        """The loss that the step's backward showed, for the rows of the probe; None if it showed none."""
        found = seen_loss(forwards, step.losses(), self._known)
        if found is None or step.rows is None:
            return None
        self._known = found
        return SeenRows(found, step.rows, step.batch_rows, step.layout.interleaved)

    @contextmanager
    def _saying_why_not(self) -> Iterator[None]:
        """Records why nothing is measured."""
        try:
            yield
        except ObjectiveError as error:
            self.objective = ObjectiveInUse(str(error), "undecided" if isinstance(error, UndecidedError) else "refused")
            raise

    @abstractmethod
    def _sketch(self) -> Tensor:
        """Float32 [B, k]."""

    def _take(self) -> Tensor | None:
        """The sketch of the gradient that was stepped on, on its device; it is kept no longer."""
        taken, self._gradient_sketch = self._gradient_sketch, None
        return taken


class Gnb(_GnbProbe):
    """Probes every block at once."""

    _summed: bool | None = None  # whether a loss that is no mean grows with the number of rows; None: not known yet

    def run(self, rows: AbstractContextManager[Batch], step: ProbedStep) -> GnbReport:
        """As `Probe.run`."""
        context, gradient, forwards = self.context, self._take(), self._heard(step)
        with self._saying_why_not(), rows as batch:
            sample = gnb_probe(
                context.model,
                context.block_map,
                batch,
                draws=_DRAWS,
                generator=context.source,
                sketcher=context.sketcher,
                find=self._find(step, forwards),
            )
        self.objective = sample.objective
        return GnbReport(sample, None if gradient is None else gradient.cpu())

    @property
    def _loss_fn(self) -> LossFn | None:
        """The user's."""
        return None if self.context.finds_loss else self.context.loss_fn

    def _find(self, step: ProbedStep, forwards: Sequence[SeenForward]) -> Callable[[Any, nn.Module, Batch], OutputLoss]:
        """How the loss is found as a function of the outputs of the probe's own forward."""
        context = self.context
        if context.logits_fn is not None or self._loss_fn is not None:

            def known(call: Any, model: nn.Module, batch: Batch) -> OutputLoss:
                return output_loss(call, model, batch, loss_fn=self._loss_fn, logits_fn=context.logits_fn)

            return self._of_batch(known, step, forwards)
        beyond = [each.name for forward in forwards if forward.has_loss for each in forward.beyond_own_loss]
        has_loss = bool(forwards) and all(forward.has_loss or not forward.reached for forward in forwards)
        has_loss = has_loss and forwards[-1].has_loss

        def own(call: Any, model: nn.Module, batch: Batch) -> OutputLoss:
            output = context.call(call, batch)
            loss = loss_in(output) if step.own_loss else None
            return assume(output, model, batch) if loss is None else verify(LossCall(loss, batch, output), model)

        if step.own_loss and has_loss and not beyond:
            require_alike(forwards)
            return self._of_batch(own, step, forwards)
        try:
            seen = self._seen(step, forwards)
        except ObjectiveError as error:
            if not (step.own_loss and beyond):
                raise
            terms = f"the loop adds a term of {', '.join(dict.fromkeys(beyond))} to the loss that the model returns"
            raise type(error)(f"{terms}; {error}") from error
        if seen is not None:
            return lambda call, _, batch: seen.loss(context.call(call, batch))
        if not step.own_loss:
            raise ObjectiveError("the loop's loss is not of what the model returns: pass loss_fn")
        if any(forward.samples for forward in forwards) and not backward_is_compiled():
            raise UndecidedError(
                "no backward reached what the model returned, as where it is changed in place: pass loss_fn"
            )
        return self._of_batch(own, step, forwards)

    def _of_batch(
        self,
        find: Callable[[Any, nn.Module, Batch], OutputLoss],
        step: ProbedStep,
        forwards: Sequence[SeenForward],
    ) -> Callable[[Any, nn.Module, Batch], OutputLoss]:
        """As `find`, the loss of the whole batch by that of some rows: a mean is the same, a sum many times as large.

        Whether a loss that is no mean grows with the rows is found once, by another forward on half of the rows.
        """

        def of_batch(call: Any, model: nn.Module, batch: Batch) -> OutputLoss:
            found = find(call, model, batch)
            if found.objective.state != "verified":
                return found
            if (
                batch.rows < step.batch_rows
                and found.tokens < _WEIGHED_TOKENS
                and not (found.equal and equal(forwards))
            ):
                # A weighted mean over a few positions is not what they are of that over the batch: of one it has none.
                self.least_rows = max(self.least_rows, math.ceil(_WEIGHED_TOKENS / found.tokens * batch.rows))
                raise UndecidedError(
                    f"the positions of {found.terms[0].name} have different weights; the next probe has more of them"
                )
            if scale_in_words(found.total, found.tokens) == "mean":
                return found
            if self._summed is None:
                self.least_rows = max(self.least_rows, 2)
                if batch.rows < 2 and step.batch_rows > 1:
                    raise UndecidedError(f"whether the {found.objective.text} grows with the rows shows on two rows")
                half = batch.slice(torch.arange((batch.rows + 1) // 2, device="cpu"))
                self._summed = _is_summed(found, find(call, model, half)) if batch.rows > 1 else False
            return found.scaled(step.batch_rows / batch.rows) if self._summed else found

        return of_batch

    def _sketch(self) -> Tensor:
        given = {name: parameter.grad for name, parameter in self.context.model.named_parameters()}
        # The sketch goes by an entry's place in the whole parameter, which a sparse gradient lacks.
        gradients = {name: g.to_dense() if g.is_sparse else g for name, g in given.items() if g is not None}
        return self.context.sketcher.sketch(gradients)


class ShardedGnb(_GnbProbe):
    """Probes every block at once, by all ranks together, where no rank holds whole parameters."""

    def run(self, rows: AbstractContextManager[Batch], step: ProbedStep) -> GnbReport:
        """As `Probe.run`; a failure of one rank is raised on all."""
        context, shards, own, forwards = self.context, self._shards, self._take(), self._heard(step)
        with self._saying_why_not():
            sample = sharded_gnb_probe(
                context.model,
                context.block_map,
                rows,
                draws=_DRAWS,
                generator=context.source,
                add=shards.add,
                weights=shards.weights,
                sketcher=context.sketcher,
                logits_fn=context.logits_fn,
                loss_fn=context.loss_fn,
                # No backward of a part of the model, as `verify` makes: it would leave FSDP's hooks half done.
                seen=partial(self._seen, step, forwards),
            )
        found = sample.objective
        if found is not None:  # a trial would be one more forward of all ranks, of which any may fail alone
            self.objective = replace(found, text=f"{found.text}, rows assumed in the first dimension")
        if own is None:  # the sum over ranks is then NaN, so that all of them leave it out
            shape = len(context.block_map.blocks), context.sketcher.size
            own = torch.full(shape, math.nan, dtype=torch.float32, device="cpu")
        gradient = shards.add(own.cpu().double()).float()
        return GnbReport(sample, gradient if gradient.isfinite().all() else None)

    @property
    def _shards(self) -> ShardReduction:
        shards = self.context.shards
        if shards is None:
            raise RuntimeError("a sharded probe needs to know how ranks add up their results")
        return shards

    def _sketch(self) -> Tensor:
        """This rank's summand."""
        parameters = dict(self.context.model.named_parameters())
        shards = {name: Shard.of(parameter) for name, parameter in parameters.items()}
        summands = {name: local_gradient_summand(parameter) for name, parameter in parameters.items()}
        found = {name: gradient for name, (gradient, _) in summands.items() if gradient is not None}
        weights = {name: self._shards.weights[name] * ranks for name, (_, ranks) in summands.items()}
        return sketch_shards(self.context.sketcher, found, shards, weights)


def _is_summed(whole: OutputLoss, part: OutputLoss) -> bool:
    ratio, tokens = whole.total / part.total, whole.tokens / part.tokens
    if abs(ratio - 1) < _EQUAL:
        return False
    if abs(ratio - tokens) < _EQUAL * tokens:
        return True
    raise ObjectiveError(
        f"the loss of {whole.tokens} positions weighs {ratio:.3g} times that of {part.tokens}: neither a mean nor a sum"
    )


def _encode(report: GnbReport, seconds: float) -> agent_pb2.GnbProbe:
    sample, gradient = report.sample, report.gradient_sketch
    return agent_pb2.GnbProbe(
        tokens=sample.tokens,
        rows=sample.rows,
        traces=encode(sample.traces.cpu().numpy(), "float64"),
        sketches=None if sample.sketches is None else encode(sample.sketches.cpu().numpy(), "float32"),
        gradient_sketch=None if gradient is None else encode(gradient.numpy(), "float32"),
        seconds=seconds,
    )


GNB = ProbeSpec(name="gnb", runner=Gnb, sharded_runner=ShardedGnb, encode=_encode)
