"""The gradient noise probe: how far the gradient of a step scatters.

It is worked out from the gradients of the step's micro-batches and their sum, so the probe hooks into the backwards of
the step. No detector reads it, and it is off by default.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from sharpwatch.agent.hooks import Hook
from sharpwatch.agent.probes.context import Probe, ProbeContext, ProbedStep, ProbeSpec
from sharpwatch.agent.probes.micro_batch_weights import MicroBatchSize, Shares, listen, only_of, shares_of
from sharpwatch.agent.safety import ExceptionBarrier
from sharpwatch.blocks import BlockMap, Part
from sharpwatch.curvature.objective.batch import IGNORED_LABEL, Batch, find_labels
from sharpwatch.curvature.parameters.shards import squared_norm, squared_norms, stack_sums, sum_by_index
from sharpwatch.curvature.state.isolation import unwrap
from sharpwatch.errors import ProbeError
from sharpwatch.v1 import agent_pb2
from sharpwatch.wire import encode

_NO_BACKWARD = -1
# DDP's communication hooks that average gradients. Those in half precision round the average; the noise ignores that.
_AVERAGING = {
    ("torch.distributed.algorithms.ddp_comm_hooks.default_hooks", f"{name}_hook")
    for name in ("allreduce", "fp16_compress", "bf16_compress")
}


@dataclass(frozen=True, slots=True)
class MicroBatches:
    """Squared norms of one accumulated gradient G and of the gradients h_i that it is the sum of.

    Attributes:
        local: ‖h_i‖² of each backward, [backwards, parts].
        whole: ‖G‖², [parts].
        unbroken: Whether G is made of these backwards alone.
        sizes: What each backward showed at the model's output; None where it showed nothing.
        ranks: How many processes average their gradients into G.
        seconds: How long reading them took.
    """

    local: Tensor
    whole: Tensor
    unbroken: Tensor
    sizes: Sequence[MicroBatchSize | None]
    ranks: int
    seconds: float

    def noise(self, block_map: BlockMap, stepped: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        """Returns Tr Cov(g) [L] of the gradient g that was stepped on.

        On one process G = Σh_i, where h_i has the weight w_i, Σw_i = 1, and n_i tokens whose gradients are independent:
        E h_i = w_i m and Tr Cov(h_i) = w_i² s / n_i, so Tr Cov(G) = s Σw_i²/n_i. In Q = Σ‖h_i‖²/w_i − ‖G‖², which is
        Σw_i‖h_i/w_i − G‖², the mean m drops out, and E Q = s (Σw_i/n_i − Σw_i²/n_i). With equal weights that leaves
        Q / (M − 1), whatever the n_i, as in McCandlish et al. (2018), An empirical model of large-batch training,
        appendix A; with w_i proportional to n_i it is Q / (M − 1) as well.

        D ranks with M micro-batches each average their gradients, and all weigh alike: Q / (D·M − 1), where this rank's
        M gradients stand for all, since each has the same expectation. Clipping and unscaling happen later; the factor
        ‖g‖²/‖G‖² of the layer block accounts for both.

        Args:
            block_map: The blocks of the model.
            stepped: ‖g‖², [parts].

        Returns:
            The noise, unbiased where ‖g‖ = ‖G‖ and therefore sometimes negative with several ranks; NaN for a layer
            block without a gradient.

        Raises:
            ProbeError: There is one micro-batch, G is not the sum of these gradients alone, or the weights are not
                known.
        """
        shares = self._shares()
        weighted = (self.local / shares.weights.to(self.local)[:, None]).nan_to_num(nan=0.0).sum(0)
        rows = torch.stack([weighted, self.whole, torch.from_numpy(stepped).to(self.whole)])
        local, whole, taken = sum_by_index(rows, block_map.layer_block_of, len(block_map.layer_blocks)).numpy()
        ratio = np.divide(taken, whole, out=np.full_like(whole, np.nan), where=whole > 0)
        noise = (local - whole) * shares.noise_in_residual(self.ranks) * ratio
        return np.where(np.isfinite(noise), noise, np.nan).astype(np.float32)

    def _shares(self) -> Shares:
        if len(self.sizes) * self.ranks < 2:
            raise ProbeError("the step had one micro-batch: gradient noise takes two, or ranks under DDP")
        if not bool(self.unbroken):
            raise ProbeError(
                "the gradient was not the sum of the step's backwards: it was zeroed or changed in between"
            )
        shares = shares_of(self.sizes)
        if self.ranks > 1:
            shares.require_even()
        return shares


@dataclass(slots=True)
class _Readings:
    """What was read since the first forward of the step."""

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    forwards: int = 0
    backwards: int = 0
    running: int = _NO_BACKWARD  # torch's number of the backward that is running
    found: list[list[Tensor]] = field(default_factory=list)  # ‖h‖² of the running backward, by part
    at_output: list[tuple[int, MicroBatchSize]] = field(default_factory=list)  # since a backward ended, by backward
    sizes: list[MicroBatchSize | None] = field(default_factory=list)  # of each backward
    local: list[Tensor] = field(default_factory=list)  # ‖h‖² of each backward, [parts]
    whole: Tensor | None = None
    unbroken: Tensor = field(default_factory=lambda: torch.tensor(True, device="cpu"))
    lost: bool = False  # a backward did not end, or another began within it
    open: int = 0  # calls of hooks that have not returned
    seconds: float = 0.0

    @property
    def one_to_one(self) -> bool:
        """Whether each forward had its backward, and each backward was read to its end."""
        ended = self.running == _NO_BACKWARD and not self.lost and not self.open
        return ended and self.backwards == self.forwards


class GradientListener:
    """Reads the gradients of a model in each backward, from the first forward of a step until `take`.

    Args:
        block_map: The blocks of the model.
        model: The model.
        barrier: Ends errors of the hooks.
        ranks: How many processes average their gradients; 0 where that is not known, and nothing is read then.
    """

    def __init__(self, block_map: BlockMap, model: nn.Module, barrier: ExceptionBarrier, *, ranks: int) -> None:
        self._block_map = block_map
        self._parts: dict[str, list[tuple[int, Part]]] = defaultdict(list)
        for index, part in enumerate(block_map.parts):
            self._parts[part.parameter].append((index, part))
        self._model = model
        self._barrier = barrier
        self._ranks = ranks
        self._handles: list[tuple[Node, RemovableHandle]] = []  # a tensor does not keep its node alive
        self._readings = _Readings()

    def forward(self) -> None:
        """The model is called in training: hook into its gradients, unless that is done."""
        self._readings.forwards += 1
        if self._ranks and not self._handles and _is_averaged(self._model):
            training = {name: each for name, each in self._model.named_parameters() if each.requires_grad}
            self._readings.parameters = training
            for name, parameter in training.items():
                # A hook of the tensor itself would also be called by autograd.grad, and torch.compile guards on it.
                node = get_gradient_edge(parameter).node
                hook = Hook(partial(self._guarded, self._arrives, name))
                self._handles.append((node, node.register_prehook(hook)))

    def output(self, batch: Batch, output: Any) -> None:
        """The model returned `output` for `batch`: hook into the gradient there too."""
        if not self._ranks:
            return
        labels = find_labels(unwrap(self._model), batch)
        count = None if labels is None else (labels.aligned() != IGNORED_LABEL).sum()
        is_sum = batch.kwargs.get("num_items_in_batch") is not None
        with torch.no_grad():
            listen(partial(self._guarded, self._at_output), output, labels=count, is_sum=is_sum)

    def _at_output(self, size: MicroBatchSize) -> None:
        self._readings.at_output.append((_backward(), size))

    def take(self) -> MicroBatches | None:
        """Removes the hooks and returns what was read, or None if forwards and backwards were not one to one."""
        self.remove()
        readings, self._readings = self._readings, _Readings()
        if readings.whole is None or not readings.one_to_one:
            return None
        return MicroBatches(
            torch.stack(readings.local),
            readings.whole,
            readings.unbroken,
            readings.sizes,
            self._ranks,
            readings.seconds,
        )

    def remove(self) -> None:
        """Removes the hooks."""
        while self._handles:
            _, handle = self._handles.pop()
            handle.remove()

    def _guarded(self, call: Callable[..., None], *values: object) -> None:
        started, readings = time.perf_counter(), self._readings
        readings.open += 1
        with self._barrier.guard("reading the gradient noise"), torch.no_grad():
            call(*values)
            # Not in a `finally`: a call that failed leaves it above 0, and the step then yields no estimate.
            readings.open -= 1
        readings.seconds += time.perf_counter() - started

    def _arrives(self, name: str, gradients: tuple[Tensor | None, ...]) -> None:
        """The local gradient of parameter `name` is there; it is not yet accumulated, nor averaged over ranks."""
        backward = _backward()
        if backward != self._readings.running:
            self._begin(backward)
        (gradient,) = gradients
        if gradient is None or gradient.is_sparse:
            return
        for index, part in self._parts[name]:
            self._readings.found[index].append(squared_norm(part.view(gradient)))

    def _begin(self, backward: int) -> None:
        """A backward begins: the accumulated gradient must be the one that the backward before has left."""
        readings = self._readings
        readings.lost |= readings.running != _NO_BACKWARD
        readings.running = backward
        readings.found = [[] for _ in self._block_map.parts]
        before = self._accumulated()
        # Kept on the device until the step is over; asking here would make the backward wait.
        readings.unbroken = (
            readings.unbroken.to(before.device) & (before == (0.0 if readings.whole is None else readings.whole)).all()
        )
        # DDP queues its own end of the backward; queueing twice puts ours after it.
        _when_over(partial(_when_over, partial(self._guarded, self._end)))

    def _end(self) -> None:
        readings = self._readings
        readings.local.append(stack_sums(readings.found))
        readings.whole = self._accumulated()
        readings.backwards += 1
        # `torch.autograd.grad` may have come through an output too.
        readings.sizes.append(only_of([size for backward, size in readings.at_output if backward == readings.running]))
        readings.at_output.clear()
        readings.running = _NO_BACKWARD

    def _accumulated(self) -> Tensor:
        """Returns ‖·‖² of the accumulated gradients, [parts], on the model's device."""
        parameters = self._readings.parameters
        given = {name: parameter.grad for name, parameter in parameters.items()}
        dense = {name: gradient for name, gradient in given.items() if gradient is not None and not gradient.is_sparse}
        return squared_norms(self._block_map, dense).to(next(iter(parameters.values())).device)


def averaged_over(model: nn.Module) -> int:
    """Returns how many processes average their gradients by DDP in `model`; 0 without DDP."""
    return max((module.process_group.size() for module in _wrappers(model)), default=0)


def _is_averaged(model: nn.Module) -> bool:
    """Returns whether DDP averages gradients; with a hook such as PowerSGD's it does something else."""
    hooks = (hook for module in _wrappers(model) for hook, _ in module._comm_hooks)  # noqa: SLF001 - there is no public way
    return all((hook.__module__, getattr(hook, "__name__", "")) in _AVERAGING for hook in hooks)


def _wrappers(model: nn.Module) -> Iterator[DistributedDataParallel]:
    return (module for module in model.modules() if isinstance(module, DistributedDataParallel))


def _backward() -> int:
    """The number that torch gives the running backward."""
    return torch._C._current_graph_task_id()  # noqa: SLF001 - as torch.utils.checkpoint asks for it


def _when_over(call: Callable[[], None]) -> None:
    """Has `call` called when the running backward ends, after everything queued before."""
    torch.autograd.Variable._execution_engine.queue_callback(call)  # noqa: SLF001 - as torch's own FSDP does


@dataclass(frozen=True, slots=True)
class GradientNoiseReport:
    """The gradient noise [L] of a step; None if the step yields no estimate."""

    noise: npt.NDArray[np.float32] | None


class GradientNoise(Probe):
    """Reads the gradients of the micro-batches, and compares their norms with that of the gradient stepped on."""

    def __init__(self, context: ProbeContext) -> None:
        super().__init__(context)
        ranks = averaged_over(context.model) if context.several_ranks else 1
        self._listener = GradientListener(context.block_map, context.model, context.barrier, ranks=ranks)
        self._micro_batches: MicroBatches | None = None

    def forward(self) -> None:
        """As `Probe.forward`."""
        self._listener.forward()

    def output(self, batch: Batch, output: Any) -> None:
        """As `Probe.output`."""
        self._listener.output(batch, output)

    def before_step(self, step: ProbedStep) -> None:
        """Stops listening."""
        del step
        self._micro_batches = self._listener.take()

    def discard(self) -> None:
        """As `Probe.discard`."""
        self._listener.take()
        self._micro_batches = None

    def run(self, rows: AbstractContextManager[Batch], step: ProbedStep) -> GradientNoiseReport:
        """As `Probe.run`; the model is not called."""
        del rows
        taken, self._micro_batches = self._micro_batches, None
        self.reason = ""
        try:
            return GradientNoiseReport(self._noise(taken, step))
        except ProbeError as error:
            # Of the step, not of the probe, which goes on.
            self.reason = str(error)
            return GradientNoiseReport(None)

    def _noise(self, taken: MicroBatches | None, step: ProbedStep) -> npt.NDArray[np.float32]:
        if taken is None:
            raise ProbeError("the step's forwards and backwards were not one to one")
        if step.gradient_squares is None:
            raise ProbeError("the gradient that was stepped on could not be read")
        step.seconds["gradient_noise"] = step.seconds.get("gradient_noise", 0.0) + taken.seconds
        return taken.noise(self.context.block_map, step.gradient_squares())


def _encode(report: GradientNoiseReport, seconds: float) -> agent_pb2.GradientNoiseProbe:
    noise = report.noise
    return agent_pb2.GradientNoiseProbe(noise=None if noise is None else encode(noise, "float32"), seconds=seconds)


GRADIENT_NOISE = ProbeSpec(name="gradient_noise", runner=GradientNoise, encode=_encode)
