"""Gradient noise: how far a step's gradient scatters, from the gradients of its micro-batches and their sum."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from sharpwatch.agent.instrumentation.hooks import Hook
from sharpwatch.agent.safety.exception_barrier import ExceptionBarrier
from sharpwatch.blocks import BlockMap, Part
from sharpwatch.curvature.parameters.norms import squared_norm, squared_norms, stack_sums, sum_by_index

_OUTSIDE = -1  # of every backward
# What DDP's communication hooks may be; in half precision the average is rounded, which the noise does not show.
_AVERAGING = {
    ("torch.distributed.algorithms.ddp_comm_hooks.default_hooks", f"{name}_hook")
    for name in ("allreduce", "fp16_compress", "bf16_compress")
}


@dataclass(frozen=True, slots=True)
class MicroBatches:
    """What was read of one accumulated gradient G: `local` are Σ‖h‖² over `count` backwards, `whole` is ‖G‖²; [parts].

    `ranks` processes average their gradients into G. `unbroken`: nothing but these backwards made G.
    """

    local: Tensor
    whole: Tensor
    unbroken: Tensor
    count: int
    ranks: int
    seconds: float

    def noise(self, block_map: BlockMap, stepped: npt.NDArray[np.float64]) -> npt.NDArray[np.float32] | None:
        """Tr Cov(g) [L] of the gradient g that was stepped on, whose squared norms by part are `stepped`.

        Of D ranks with M micro-batches each, n = D·M independent local gradients h with E h = m and Tr Cov(h) = s make
        G = Σh / D. Then E‖h‖² = ‖m‖² + s and E‖G‖² = (n² ‖m‖² + n s) / D², which leaves
        (M² E‖h‖² − E‖G‖²) / (n − 1) = n s / D² = Tr Cov(G), as in McCandlish et al. (2018), An empirical model of
        large-batch training, appendix A. This rank's M local gradients stand for all n: each has the same expectation.
        Clipping and a loss scale come after them; ‖g‖²/‖G‖² of the layer block takes both along.

        Unbiased where ‖g‖ = ‖G‖, so below zero at times if ranks are several; NaN where there is no gradient.
        None where n is 1, or G is not theirs alone.
        """
        spare = self.count * self.ranks - 1
        if spare < 1 or not bool(self.unbroken):
            return None
        rows = torch.stack([self.local, self.whole, torch.from_numpy(stepped).to(self.whole)])
        local, whole, taken = sum_by_index(rows, block_map.layer_block_of, len(block_map.layer_blocks)).numpy()
        ratio = np.divide(taken, whole, out=np.full_like(whole, np.nan), where=whole > 0)
        noise = (self.count * local - whole) / spare * ratio
        return np.where(np.isfinite(noise), noise, np.nan).astype(np.float32)


@dataclass(slots=True)
class _Heard:
    """What was heard since the first forward."""

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    forwards: int = 0
    backwards: int = 0
    under_way: int = _OUTSIDE  # torch's number of a backward
    found: list[list[Tensor]] = field(default_factory=list)  # ‖h‖² of the backward under way, by part
    local: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float32, device="cpu"))
    whole: Tensor | None = None
    unbroken: Tensor = field(default_factory=lambda: torch.tensor(True, device="cpu"))
    lost: bool = False  # whether a backward did not end, or another began within it
    open: int = 0  # calls that did not come through
    seconds: float = 0.0

    @property
    def one_to_one(self) -> bool:
        """Whether each forward had its backward, and each was heard to its end."""
        ended = self.under_way == _OUTSIDE and not self.lost and not self.open
        return ended and self.backwards == self.forwards


class GradientNoise:
    """Listens to a model's gradients as backwards bring them, from the first forward of a step until `take`.

    `ranks`: how many processes' gradients are averaged into each; 0 where that is not known, then it never listens.
    """

    def __init__(self, block_map: BlockMap, model: nn.Module, border: ExceptionBarrier, *, ranks: int) -> None:
        self._block_map = block_map
        self._parts: dict[str, list[tuple[int, Part]]] = defaultdict(list)
        for index, part in enumerate(block_map.parts):
            self._parts[part.parameter].append((index, part))
        self._model = model
        self._border = border
        self._ranks = ranks
        self._handles: list[tuple[Node, RemovableHandle]] = []  # a tensor does not keep its node alive
        self._heard = _Heard()

    def forward(self) -> None:
        """The model is called in training, for a step whose noise is wanted."""
        self._heard.forwards += 1
        if self._ranks and not self._handles and _is_averaged(self._model):
            training = {name: each for name, each in self._model.named_parameters() if each.requires_grad}
            self._heard.parameters = training
            for name, parameter in training.items():
                # Not the tensor's own hook: that would see autograd.grad too, and torch.compile guards on it.
                node = get_gradient_edge(parameter).node
                hook = Hook(partial(self._guarded, self._arrives, name))
                self._handles.append((node, node.register_prehook(hook)))

    def take(self) -> MicroBatches | None:
        """Listen no longer; what was heard, None where backwards and forwards did not go together."""
        self.remove()
        heard, self._heard = self._heard, _Heard()
        if heard.whole is None or not heard.one_to_one:
            return None
        return MicroBatches(heard.local, heard.whole, heard.unbroken, heard.backwards, self._ranks, heard.seconds)

    def remove(self) -> None:
        """Take the hooks away."""
        while self._handles:
            _, handle = self._handles.pop()
            handle.remove()

    def _guarded(self, call: Callable[..., None], *values: object) -> None:
        started, heard = time.perf_counter(), self._heard
        heard.open += 1
        with self._border.guard("reading the gradient noise"), torch.no_grad():
            call(*values)
            heard.open -= 1
        heard.seconds += time.perf_counter() - started

    def _arrives(self, name: str, gradients: tuple[Tensor | None, ...]) -> None:
        """The local gradient of parameter `name`, before it is accumulated and before ranks average theirs."""
        backward = torch._C._current_graph_task_id()  # noqa: SLF001 - as torch.utils.checkpoint asks for it
        if backward != self._heard.under_way:
            self._begin(backward)
        (gradient,) = gradients
        if gradient is None or gradient.is_sparse:
            return
        for index, part in self._parts[name]:
            self._heard.found[index].append(squared_norm(part.view(gradient)))

    def _begin(self, backward: int) -> None:
        """A backward begins: what is accumulated so far must be what the one before has left."""
        heard = self._heard
        heard.lost |= heard.under_way != _OUTSIDE
        heard.under_way = backward
        heard.found = [[] for _ in self._block_map.parts]
        before = self._accumulated()
        heard.unbroken = (
            heard.unbroken.to(before.device) & (before == (0.0 if heard.whole is None else heard.whole)).all()
        )
        # DDP queues its own end until the backward is over: ours comes after it.
        _when_over(partial(_when_over, partial(self._guarded, self._end)))

    def _end(self) -> None:
        heard, local = self._heard, stack_sums(self._heard.found)
        heard.local = heard.local.to(local.device) + local
        heard.whole = self._accumulated()
        heard.under_way = _OUTSIDE
        heard.backwards += 1

    def _accumulated(self) -> Tensor:
        """‖·‖² of the gradients as they stand, [parts] on the model's device."""
        parameters = self._heard.parameters
        given = {name: parameter.grad for name, parameter in parameters.items()}
        dense = {name: gradient for name, gradient in given.items() if gradient is not None and not gradient.is_sparse}
        return squared_norms(self._block_map, dense).to(next(iter(parameters.values())).device)


def averaged_over(model: nn.Module) -> int:
    """How many processes' gradients DDP averages in `model`; 0 where it does not."""
    return max((module.process_group.size() for module in _wrappers(model)), default=0)


def _is_averaged(model: nn.Module) -> bool:
    """Whether DDP's gradients are plain averages; a hook such as PowerSGD's makes something else of them."""
    hooks = (hook for module in _wrappers(model) for hook, _ in module._comm_hooks)  # noqa: SLF001 - there is no public way
    return all((hook.__module__, getattr(hook, "__name__", "")) in _AVERAGING for hook in hooks)


def _wrappers(model: nn.Module) -> Iterator[DistributedDataParallel]:
    return (module for module in model.modules() if isinstance(module, DistributedDataParallel))


def _when_over(call: Callable[[], None]) -> None:
    """Call once the backward under way is over, after all that was queued before."""
    torch.autograd.Variable._execution_engine.queue_callback(call)  # noqa: SLF001 - as torch's own FSDP does
