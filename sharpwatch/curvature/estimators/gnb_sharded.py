"""The Gauss-Newton-Bartlett probe for a model whose parameters are sharded over ranks.

A sharded model cannot run on stand-ins for its weights: FSDP2 gathers them in hooks and leaves gradients in `.grad`. So
each draw is an ordinary forward and backward through the model itself, on all ranks, and its side effects are undone
afterwards.

Each rank gets its shard of the gradient, averaged over the D data-parallel ranks. With N predicting positions in total,
the backward of D/√N times the summed cross-entropy leaves √N ∇L̂, whose squares add up over the shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.estimators.gnb import GnbSample
from sharpwatch.curvature.objective.batch import Batch, LogitsFn, LossFn, call_loss_fn, predict
from sharpwatch.curvature.objective.candidates import CROSS_ENTROPY, Candidate
from sharpwatch.curvature.objective.seen import SeenRows
from sharpwatch.curvature.objective.verification import ObjectiveInUse
from sharpwatch.curvature.parameters import fsdp
from sharpwatch.curvature.parameters.shards import (
    Shard,
    is_dtensor,
    local_gradient,
    sketch_shards,
    squared_norms,
    sum_by_index,
)
from sharpwatch.curvature.state.hooks import is_computing
from sharpwatch.curvature.state.isolation import restore, unwrap
from sharpwatch.curvature.statistics.sketch import CountSketch
from sharpwatch.errors import DesyncError, EmptyBatchError, ObjectiveError, ProbeError, UndecidedError

_REASON_BYTES = 256  # of a failure's reason, as sent to the other ranks
_OUT_OF_STEP_HINT = (
    "The gnb probe failed within the model's own collectives, so ranks are out of step: training on would mix one "
    "rank's step with another's probe. Restart from the last checkpoint; attach(probes=()) disables all probes"
)

# Of failures, the narrowest first; the last stands for all others too.
_KINDS = (UndecidedError, ObjectiveError, ProbeError)

AllReduce = Callable[[Tensor], Tensor]  # sums a float64 CPU tensor over all ranks; blocks until all have called it


def sharded_gnb_probe(  # noqa: PLR0913 - settings are keyword-only
    model: nn.Module,
    block_map: BlockMap,
    batch: AbstractContextManager[Batch],
    *,
    draws: int,
    generator: torch.Generator,
    add: AllReduce,
    weights: Mapping[str, float],
    sketcher: CountSketch | None = None,
    logits_fn: LogitsFn | None = None,
    loss_fn: LossFn | None = None,
    seen: Callable[[], SeenRows | None] = lambda: None,
) -> GnbSample:
    """Draw the trace of G for each layer block, on all ranks together; leaves `model` unchanged.

    It takes one forward and one backward for each draw. All ranks must call it, and all get the same sample.

    Args:
        model: The model, the same on all ranks.
        block_map: The division of its parameters into blocks.
        batch: Gives this rank's rows, and is the context in which the probe runs.
        draws: Number of draws.
        generator: Random generator on the device of the logits, made for this probe. Ranks with the same `DataRank`
            must have the same rows and the same generator state, other ranks different ones.
        add: Sums a tensor over all ranks.
        weights: This rank's `shard_weights`.
        sketcher: Sketches each draw's gradient; None for traces alone.
        logits_fn: Computes logits and mask; None to find them.
        loss_fn: Calls the model on a batch that the loop observed, see `predict`.
        seen: Tells which loss this rank's backward has shown, for these rows. Where it was none, or `logits_fn` is
            given, it is the mean cross-entropy of the positions with labels, see `predict`.

    Returns:
        The draws. Frozen and unused parameters count as zero.

    Raises:
        ProbeError: On every rank: one rank failed outside of the model's own collectives (no rows, no logits, no memory
            for labels or sums), or all failed alike within them.
        DesyncError: This rank failed within the model's collectives while others went on, or it cannot reach the
            others.
    """
    ranks = _RankSums(add)
    with ExitStack() as stack:
        with ranks.recording_failure():
            probe = _RankProbe(model, block_map, stack.enter_context(batch), weights, sketcher, logits_fn, loss_fn)
            probe.seen = None if logits_fn is not None else seen()
            stack.enter_context(restore(model))
            stack.enter_context(fsdp.ordinary_backward(model))
            stack.enter_context(_gradients_cleared(list(model.parameters())))
        ranks.enter_collectives()
        counts = torch.zeros(3, dtype=torch.float64, device="cpu")
        with ranks.recording_failure():
            found = probe.forward()
            counts = torch.tensor(
                [int(found.mask.sum()), probe.batch.rows, found.summed], dtype=torch.float64, device="cpu"
            )
        # Ranks that split layers by tensor parallelism have the same rows, so the sum over ranks counts these
        # repeatedly.
        tokens, rows, summed = (
            round(count * probe.data_rank.count / ranks.size) for count in ranks.total(counts).tolist()
        )
        if tokens == 0:
            raise EmptyBatchError("every label is ignored on every rank: no position predicts")
        # A sum over the whole batch is as many times the mean as it has positions.
        weight = probe.data_rank.count**2 * (summed or 1) / tokens
        total = torch.zeros(draws, probe.width, dtype=torch.float64, device="cpu")
        for draw in range(draws):
            local_sums = torch.zeros_like(total[draw])
            with ranks.recording_failure():
                if draw:
                    found = probe.forward()
                logits = found.logits
                # A rank that fails to make its output gradient runs the backward on zeros: the others wait for it in
                # there.
                output_gradient = logits.detach().new_zeros(()).expand(logits.shape)  # used if the next line fails
                with ranks.recording_failure():
                    output_gradient = draw_gradient(found, weight, generator)
                gradients = probe.gradients(logits, output_gradient)
                del logits, output_gradient, found
                local_sums = probe.sums(gradients)
                del gradients
            total[draw] = ranks.total(local_sums)
    traces, sketches = total[:, : len(block_map.parts)], total[:, len(block_map.parts) :]
    by_layer = sum_by_index(traces, block_map.layer_block_of, len(block_map.layer_blocks))
    shape = draws, len(block_map.blocks), -1
    sketch = None if sketcher is None else sketches.float().view(shape)
    return GnbSample(tokens, rows, by_layer, sketch, probe.objective)


@dataclass(slots=True, eq=False)
class _RankLogits:
    """One forward's output, the form of the loss, the predicting positions, and how many a sum counts (0: a mean).

    `share` is that of positions with a gradient among those that a mean counts.
    """

    logits: Tensor
    candidate: Candidate
    mask: Tensor
    summed: int = 0
    share: float = 1.0


def draw_gradient(found: _RankLogits, weight: float, generator: torch.Generator) -> Tensor:
    """One random vector at the output of a forward, in which each predicting position weighs `weight`."""
    weights = found.mask.reshape(-1) * (weight * found.share)
    return found.candidate.draw(found.logits.detach(), weights, 1, generator)[0]


class _RankProbe:
    """One rank's part of the probe: its shard of √N ∇L̂, with its squared norms and sketch."""

    def __init__(  # noqa: PLR0913, PLR0917 - the arguments of the probe
        self,
        model: nn.Module,
        block_map: BlockMap,
        batch: Batch,
        weights: Mapping[str, float],
        sketcher: CountSketch | None,
        logits_fn: LogitsFn | None,
        loss_fn: LossFn | None,
    ) -> None:
        self.data_rank = fsdp.DataRank.of(model)
        self.width = len(block_map.parts) + (len(block_map.blocks) * sketcher.size if sketcher else 0)
        self._call = unwrap(model)
        self._block_map = block_map
        self.batch = batch.prepared()
        self._sketcher = sketcher
        self._logits_fn = logits_fn
        self._loss_fn = loss_fn
        self.seen: SeenRows | None = None
        self._buffers = [(module, dict(vars(module)["_buffers"])) for module in model.modules()]
        self._parameters = dict(model.named_parameters())
        self._shards = {name: Shard.of(parameter) for name, parameter in self._parameters.items()}
        self._weights = weights
        # FSDP does not average parameters it ignores. Labels are independent, so E‖Σ_r g_r‖² is Σ_r E‖g_r‖².
        averaged_parameters = fsdp.averaged_parameters(model)
        unaveraged = {name for name, parameter in self._parameters.items() if id(parameter) not in averaged_parameters}
        self._part_weights = torch.tensor(
            [
                weights.get(part.parameter, 0.0) / (self.data_rank.count if part.parameter in unaveraged else 1)
                for part in block_map.parts
            ],
            dtype=torch.float64,
            device="cpu",
        )

    @property
    def objective(self) -> ObjectiveInUse:
        """The loss, in words."""
        if self.seen is not None:
            return self.seen.seen.objective
        return ObjectiveInUse("mean cross-entropy of logits", "assumed" if self._logits_fn is None else "given")

    def forward(self) -> _RankLogits:
        """Run a forward on copies of the buffers."""
        # `restore` puts the registries back, but not what a forward writes into the buffers: it gets copies.
        for module, buffers in self._buffers:
            vars(module)["_buffers"] = {name: None if one is None else one.clone() for name, one in buffers.items()}
        logits: Any
        if self.seen is not None:
            logits, mask = self.seen.cut(self._output())
            seen = self.seen.seen
            return _RankLogits(logits, seen.candidate, mask, seen.tokens if seen.summed else 0, seen.share)
        logits, mask = predict(self._call, self._call, self.batch, self._logits_fn, self._loss_fn)
        return _RankLogits(logits.full_tensor() if is_dtensor(logits) else logits, CROSS_ENTROPY, mask)

    def _output(self) -> Any:
        if self.batch.observed:
            return call_loss_fn(self._call, self._call, self.batch, self._loss_fn).output
        return self._call(*self.batch.args, **self.batch.kwargs)

    def gradients(self, logits: Tensor, output_gradient: Tensor) -> dict[str, Tensor]:
        """This rank's shards of the gradients by parameter name."""
        torch.autograd.backward(logits, output_gradient)
        found = {name: local_gradient(parameter) for name, parameter in self._parameters.items()}
        for parameter in self._parameters.values():
            parameter.grad = None
        return {name: g for name, g in found.items() if g is not None}

    @torch.no_grad()
    def sums(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """This rank's summands of a draw's squared norms by part, and of its sketch; float64 [width] on the CPU."""
        by_part = squared_norms(self._block_map, gradients, self._shards).cpu() * self._part_weights
        if self._sketcher is None:
            return by_part
        sketched = sketch_shards(self._sketcher, gradients, self._shards, self._weights)
        return torch.cat([by_part, sketched.flatten().cpu().double()])


class _RankSums:
    """Sums over all ranks that every rank gets, or none: a rank that failed reports it with its next summand."""

    def __init__(self, add: AllReduce) -> None:
        self.size = 0  # ranks
        self._add = add
        self._reason = ""
        self._kind: type[Exception] = ProbeError  # of the failure
        self._inside = False  # the model's own collectives, or on the way there
        self._launched = 0

    @contextmanager
    def recording_failure(self) -> Iterator[None]:
        """Record a failure of the body, which may happen on this rank alone.

        The rank goes on, since the others wait for it in the sums that follow.
        """
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised by `total`, on all ranks
            message = str(error) if isinstance(error, ProbeError) else f"{type(error).__name__}: {error}"
            self._kind = self._kind if self._reason else type(error)
            self._reason = self._reason or message

    def enter_collectives(self) -> None:
        """Enter the model's own collectives: all ranks do, or none does."""
        nothing = torch.zeros(0, device="cpu")
        with self.recording_failure():
            self._launched = launched_collectives()
        self.total(nothing)
        # If a rank timed out in the first sum, the others notice it in this one, before they wait within the model.
        self._inside = True
        self.total(nothing)

    def total(self, values: Tensor) -> Tensor:
        """Sum `values` over all ranks.

        If a rank failed within the model's collectives, the ranks are still in step only if all of them launched the
        same number of collectives.

        Args:
            values: This rank's float64 values.

        Returns:
            The sums.

        Raises:
            ProbeError: A rank failed; raised on all of them. An `UndecidedError` or `ObjectiveError` if all are.
            DesyncError: A rank failed, and the ranks are out of step.
        """
        launched = launched_collectives() - self._launched if self._inside else 0
        failed = self._reason != ""
        kinds = [failed and (kind is _KINDS[-1] or issubclass(self._kind, kind)) for kind in _KINDS]
        own = [1, *kinds, launched, launched**2]
        head = torch.tensor(own, dtype=torch.float64, device="cpu")
        summed = self._sum(torch.cat([head, values.flatten()]))
        self.size, *counts, launched, squared = (round(value) for value in summed[: len(own)].tolist())
        failures = counts[-1]
        if failures:
            reason = self._share_reason() if failures == 1 else self._reason
            message = f"failed on {failures} of the ranks: {reason or 'see their logs'}"
            # (Σx)² = n Σx² only if all x are equal, so two sums are enough to compare the counts of all ranks.
            if launched**2 != self.size * squared:
                raise DesyncError(f"{message}. {_OUT_OF_STEP_HINT}")
            raise next(kind for kind, count in zip(_KINDS, counts, strict=True) if count == failures)(message)
        return summed[len(own) :].view_as(values)

    def _share_reason(self) -> str:
        """Send the reason of the one rank that failed to all ranks."""
        encoded = self._reason.encode()[:_REASON_BYTES].ljust(_REASON_BYTES)
        if not self._reason:
            encoded = bytes(_REASON_BYTES)
        # The other ranks add zeros, so the sum is the text.
        summed = self._sum(torch.tensor(list(encoded), dtype=torch.float64, device="cpu"))
        return bytes(summed.round().to(torch.uint8).tolist()).decode(errors="replace").strip()

    def _sum(self, values: Tensor) -> Tensor:
        try:
            return self._add(values)
        except Exception as error:
            if not self._inside:
                raise
            message = f"failed on this rank: {self._reason}" if self._reason else f"lost the other ranks: {error}"
            raise DesyncError(f"{message}. {_OUT_OF_STEP_HINT}") from error


def launched_collectives() -> int:
    """Number of collectives that this process launched on all its groups.

    Raises:
        RuntimeError: A backend does not count them.
    """
    groups: Iterable[Any] = dist.distributed_c10d._world.pg_map  # noqa: SLF001 - there is no public way to ask for all
    real = (group for group in groups if dist.get_backend(group) != "fake")  # of mesh dimensions of size 1
    return sum(group._get_sequence_number_for_group() for group in real)  # noqa: SLF001 - nor for what each did


@contextmanager
def _gradients_cleared(parameters: list[nn.Parameter]) -> Iterator[None]:
    """A context without gradients, and without the user's hooks on parameters; both are restored."""
    with ExitStack() as stack:
        for parameter in parameters:
            stack.callback(setattr, parameter, "grad", parameter.grad)
            parameter.grad = None
            for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
                hooks = getattr(parameter, name, None)
                if hooks:  # changed in place, since autograd holds a reference to the dict
                    stack.callback(hooks.update, dict(hooks))
                    stack.callback(hooks.clear)
                    for key in [key for key, hook in hooks.items() if not is_computing(hook)]:
                        del hooks[key]
        yield
