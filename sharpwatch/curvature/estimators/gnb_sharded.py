"""The Gauss-Newton-Bartlett probe of a model whose parameters several ranks hold together.

Here nothing can stand in for the weights: FSDP2 gathers them in hooks, and leaves gradients in `.grad`. So each draw is
an ordinary forward and backward through the model itself, by all ranks together, and what they leave is put back.
Gradients come back averaged over the ranks that compute on different rows, each rank with its shard: with D such ranks
and N predicting positions in all, a backward of D/√N times the sum of cross-entropies leaves √N ∇L̂, whose squares add.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.estimators.gnb import GnbSample, OutputGradients
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.objective.outputs import LogitsFn, predict
from sharpwatch.curvature.parameters import fsdp
from sharpwatch.curvature.parameters.norms import squared_norms, sum_by_index
from sharpwatch.curvature.parameters.shards import Shard, is_dtensor, local_gradient, sketch_shards
from sharpwatch.curvature.state.isolation import is_torch_hook, restore, unwrap
from sharpwatch.curvature.statistics.sketch import CountSketch
from sharpwatch.errors import DesyncError, EmptyBatchError, ProbeError

_REASON_BYTES = 256  # bytes of a failure's reason that the other ranks are told
_OUT_OF_STEP_HINT = (
    "That was in the gnb probe, within the model's own collectives: ranks wait there for each other, and to train on "
    "would mix one rank's step with another's probe. Start again from the last checkpoint; probes=() runs none"
)

AllReduce = Callable[
    [Tensor], Tensor
]  # a float64 tensor on the CPU to the sum of all ranks' such; they wait for each other


def sharded_gnb_probe(  # noqa: PLR0913 - what a probe is of, and how it is taken; each named
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
) -> GnbSample:
    """`draws` forwards and backwards on all ranks' rows, the same sample on each; leaves no trace in `model`.

    All ranks call it together, with their `shares` as `weights`. `batch` gives this rank's rows, and is what the probe
    runs in; `generator`, on the logits' device, is made for this probe: ranks of one `DataRank` number have the same of
    both, others their own. Frozen and unused parameters count as zero.

    Raises `ProbeError` on every rank where one of them fails beside the model's own collectives (its rows can't be had,
    there are no logits, memory is short for labels or sums), or all fail alike within them. Else `DesyncError`: this
    rank failed within them while the others went on, or does not hear of the others.
    """
    ranks = _RankSums(add)
    with ExitStack() as stack:
        with ranks.recording_failure():
            probe = _RankProbe(model, block_map, stack.enter_context(batch), weights, sketcher, logits_fn)
            stack.enter_context(restore(model))
            stack.enter_context(fsdp.ordinary_backward(model))
            stack.enter_context(_gradients_cleared(list(model.parameters())))
        ranks.enter_collectives()
        counts = torch.zeros(2, dtype=torch.float64, device="cpu")
        with ranks.recording_failure():
            logits, mask = probe.forward()
            counts = torch.tensor([int(mask.sum()), probe.batch.rows], dtype=torch.float64, device="cpu")
        positions, rows = ranks.total(counts).tolist()
        tokens, rows = (round(count * probe.data_rank.count / ranks.size) for count in (positions, rows))
        if tokens == 0:
            raise EmptyBatchError("no position of any rank's rows predicts: all labels are ignored")
        scale = probe.data_rank.count / math.sqrt(tokens)
        total = torch.zeros(draws, probe.width, dtype=torch.float64, device="cpu")
        for draw in range(draws):
            local_sums = torch.zeros_like(total[draw])
            with ranks.recording_failure():
                if draw:
                    logits, mask = probe.forward()
                output_gradient = logits.detach().new_zeros(()).expand(logits.shape)  # where this rank has none to give
                with ranks.recording_failure():
                    output_gradient = OutputGradients(logits.detach(), mask, 1, generator, scale=scale)[0]
                gradients = probe.gradients(logits, output_gradient)
                del logits, output_gradient
                local_sums = probe.sums(gradients)
                del gradients
            total[draw] = ranks.total(local_sums)
    traces, sketches = total[:, : len(block_map.parts)], total[:, len(block_map.parts) :]
    by_layer = sum_by_index(traces, block_map.layer_block_of, len(block_map.layer_blocks))
    shape = draws, len(block_map.blocks), -1
    return GnbSample(tokens, rows, by_layer, None if sketcher is None else sketches.float().view(shape))


class _RankProbe:
    """What one rank computes of a probe: its shards of √N ∇L̂, and their squares and sketches."""

    def __init__(  # noqa: PLR0913, PLR0917 - as the probe itself
        self,
        model: nn.Module,
        block_map: BlockMap,
        batch: Batch,
        weights: Mapping[str, float],
        sketcher: CountSketch | None,
        logits_fn: LogitsFn | None,
    ) -> None:
        self.data_rank = fsdp.DataRank.of(model)
        self.width = len(block_map.parts) + (len(block_map.blocks) * sketcher.size if sketcher else 0)
        self._call = unwrap(model)
        self._block_map = block_map
        self.batch = batch.prepared()
        self._sketcher = sketcher
        self._logits_fn = logits_fn
        self._buffers = [(module, dict(vars(module)["_buffers"])) for module in model.modules()]
        self._parameters = dict(model.named_parameters())
        self._shards = {name: Shard.of(parameter) for name, parameter in self._parameters.items()}
        self._weights = weights
        # What FSDP was told to ignore stays apart: with labels that are independent, E‖Σ_r g_r‖² is Σ_r E‖g_r‖².
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

    def forward(self) -> tuple[Tensor, Tensor]:
        """Logits [..., V], whole on each rank, and the positions that predict; on copies of the buffers."""
        for module, buffers in self._buffers:
            vars(module)["_buffers"] = {name: None if one is None else one.clone() for name, one in buffers.items()}
        logits: Any
        logits, mask = predict(self._call, self._call, self.batch, self._logits_fn)
        return logits.full_tensor() if is_dtensor(logits) else logits, mask

    def gradients(self, logits: Tensor, output_gradient: Tensor) -> dict[str, Tensor]:
        """What this rank holds of the gradients, by name."""
        torch.autograd.backward(logits, output_gradient)
        found = {name: local_gradient(parameter) for name, parameter in self._parameters.items()}
        for parameter in self._parameters.values():
            parameter.grad = None
        return {name: g for name, g in found.items() if g is not None}

    @torch.no_grad()
    def sums(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """This rank's summands of a draw's squares by part, and of its sketch; float64 [width] on the CPU."""
        by_part = squared_norms(self._block_map, gradients, self._shards).cpu() * self._part_weights
        if self._sketcher is None:
            return by_part
        sketched = sketch_shards(self._sketcher, gradients, self._shards, self._weights)
        return torch.cat([by_part, sketched.flatten().cpu().double()])


class _RankSums:
    """Sums over all ranks, which all of them get or none: a rank that has failed says so with its next summand."""

    def __init__(self, add: AllReduce) -> None:
        self.size = 0  # ranks
        self._add = add
        self._reason = ""
        self._inside = False  # the model's own collectives, or on the way there
        self._launched = 0

    @contextmanager
    def recording_failure(self) -> Iterator[None]:
        """The body may fail on this rank alone; it goes on, for the others count on its part in what follows."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised by `total`, on all ranks
            said = str(error) if isinstance(error, ProbeError) else f"{type(error).__name__}: {error}"
            self._reason = self._reason or said

    def enter_collectives(self) -> None:
        """Enter the model's own collectives: all ranks, or none."""
        nothing = torch.zeros(0, device="cpu")
        with self.recording_failure():
            self._launched = launched_collectives()
        self.total(nothing)
        # Whoever has given up waiting there for a late rank is missed by that here, before it waits in the model.
        self._inside = True
        self.total(nothing)

    def total(self, values: Tensor) -> Tensor:
        """The sum of all ranks' `own`. Raises `ProbeError` on all of them where one failed.

        Once inside, that needs all to have launched as many collectives: then none waits for another's, nor will.
        """
        launched = launched_collectives() - self._launched if self._inside else 0
        head = torch.tensor([1, self._reason != "", launched, launched**2], dtype=torch.float64, device="cpu")
        summed = self._sum(torch.cat([head, values.flatten()]))
        self.size, failures, launched, squared = (round(value) for value in summed[:4].tolist())
        if failures:
            reason = self._share_reason() if failures == 1 else self._reason
            said = f"failed on {failures} of the ranks: {reason or 'they say why'}"
            if launched**2 != self.size * squared:
                raise DesyncError(f"{said}. {_OUT_OF_STEP_HINT}")
            raise ProbeError(said)
        return summed[4:].view_as(values)

    def _share_reason(self) -> str:
        """The reason of the one rank that failed."""
        encoded = self._reason.encode()[:_REASON_BYTES].ljust(_REASON_BYTES)
        if not self._reason:
            encoded = bytes(_REASON_BYTES)
        summed = self._sum(torch.tensor(list(encoded), dtype=torch.float64, device="cpu"))
        return bytes(summed.round().to(torch.uint8).tolist()).decode(errors="replace").strip()

    def _sum(self, values: Tensor) -> Tensor:
        try:
            return self._add(values)
        except Exception as error:
            if not self._inside:
                raise
            said = f"failed on this rank: {self._reason}" if self._reason else f"the other ranks are gone: {error}"
            raise DesyncError(f"{said}. {_OUT_OF_STEP_HINT}") from error


def launched_collectives() -> int:
    """How many this process has launched, on all its groups. Raises `RuntimeError` where a backend does not count."""
    groups: Iterable[Any] = dist.distributed_c10d._world.pg_map  # noqa: SLF001 - there is no public way to ask for all
    real = (group for group in groups if dist.get_backend(group) != "fake")  # what meshes have where nothing is divided
    return sum(group._get_sequence_number_for_group() for group in real)  # noqa: SLF001 - nor for what each did


@contextmanager
def _gradients_cleared(parameters: list[nn.Parameter]) -> Iterator[None]:
    """A context in which parameters have no gradients and the user's hooks on them rest; both are put back."""
    with ExitStack() as stack:
        for parameter in parameters:
            stack.callback(setattr, parameter, "grad", parameter.grad)
            parameter.grad = None
            for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
                hooks = getattr(parameter, name, None)
                if hooks:  # changed in place: autograd has a reference to it
                    stack.callback(hooks.update, dict(hooks))
                    stack.callback(hooks.clear)
                    for key in [key for key, hook in hooks.items() if not is_torch_hook(hook)]:
                        del hooks[key]
        yield
