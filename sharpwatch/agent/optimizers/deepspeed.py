"""DeepSpeed's optimizers in the place of torch's: their steps, and the fragments of parameters that ZeRO steps here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sharpwatch.agent.optimizers.step_tensors import Layout, LocalEntries, StepTensors
from sharpwatch.blocks import Part
from sharpwatch.curvature.parameters.shards import Shard


@dataclass(frozen=True, slots=True, eq=False)
class Fragment:
    """The entries of a parameter that ZeRO steps on this rank: `numel` of its flat entries, from `start` on.

    Their weights, gradients and moments are in DeepSpeed's flat partitions until its `step()`; `optimizer` is the inner
    one, whose parameters are the partitions. Each is read anew every time, as DeepSpeed's public `safe_get_full_grad`
    does, but without its sum over ranks.
    """

    parameter: Any
    optimizer: Optimizer
    start: int
    numel: int

    @classmethod
    def of(cls, parameter: Any, optimizer: Optimizer) -> Fragment:
        """The fragment of `parameter` on this rank; without entries where other ranks step all of them."""
        mapping = parameter._hp_mapping  # noqa: SLF001 - DeepSpeed's own, public by functions that sum over ranks alone
        address = None if mapping is None else mapping.lp_fragment_address
        return cls(parameter, optimizer, *((0, 0) if address is None else (address.start, address.numel)))

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the parameter."""
        return bool(self.numel == self.parameter.numel())

    @property
    def tensors(self) -> StepTensors:
        """The tensors that the inner optimizer steps on, flat; the gradient averaged over ranks, but not clipped."""
        weight: Tensor = self._mapping.hp_fragment.detach()
        group = self.optimizer.param_groups[self._mapping.param_group_index]
        return StepTensors(weight, self._gradient, group, self._state(group), weight)

    @property
    def _gradient(self) -> Tensor:
        index = self.parameter._index_in_param_group  # noqa: SLF001 - as above
        gradient: Tensor = self._mapping.get_lp_grad_fragment(index).detach().reshape(-1)
        # Beside bf16 weights each rank can have all of it, in float32.
        return gradient if gradient.numel() == self.numel else gradient.narrow(0, self.start, self.numel)

    def _state(self, group: Mapping[str, Any]) -> dict[str, Any]:
        address = self._mapping.hp_fragment_address
        (partition,) = group["params"]
        return {
            key: value.narrow(0, address.start, address.numel) if _is_like(value, partition) else value
            for key, value in self.optimizer.state.get(partition, {}).items()
        }

    def views(self, part: Part, held: Tensor) -> Sequence[Tensor]:
        """Views of `held`, one of this fragment's tensors, that have each entry of `part` once."""
        if not self.numel:
            return ()
        return (held,) if part.dim is None else tuple(self._slices(part, held))

    def _slices(self, part: Part, held: Tensor) -> Iterator[Tensor]:
        at = 0
        for box in _boxes(tuple(self.parameter.shape), self.start, self.start + self.numel):
            yield from box.views(part, held.narrow(0, at, box.numel).view(box.size))
            at += box.numel

    @property
    def _mapping(self) -> Any:
        return self.parameter._hp_mapping  # noqa: SLF001 - as above


class DeepSpeedOptimizer(Optimizer):
    """An optimizer of DeepSpeed's with torch's hooks around its `step()`, over the model's parameters in its groups.

    The instance's `step` is wrapped when the first hook is registered, and stays so; without hooks it only passes on.
    """

    def __init__(self, driver: Any, model: nn.Module) -> None:
        super().__init__(_groups(driver, model), {"lr": None})
        # The original step, taken before it is wrapped: `step` below would otherwise call itself.
        self._driver, self._step = driver, driver.step
        self.unreadable = _unreadable(driver)  # why its gradients can't be read; empty where they can
        super().register_step_pre_hook(DeepSpeedOptimizer._prepare)  # before the tap's hook, which reads what it sets

    @property
    def fragments(self) -> Mapping[int, Fragment]:
        """By parameter id; empty where gradients stay with the parameters until the step, or can't be read."""
        if self.unreadable:
            return {}
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        mapped = (parameter for parameter in parameters if hasattr(parameter, "_hp_mapping"))
        return {id(parameter): Fragment.of(parameter, self._driver.optimizer) for parameter in mapped}

    @property
    def grad_scale(self) -> float | Tensor | None:
        """The factor on its gradients until it steps."""
        return getattr(self._driver, "loss_scale", None)

    @property
    def clip_norm(self) -> float:
        """The norm to which it clips all its gradients together in `step()`, each divided by norm / this + ε."""
        return float(getattr(self._driver, "clip_grad", 0.0)) or math.inf

    def register_step_pre_hook(self, hook: Any) -> RemovableHandle:
        """As torch's."""
        self._driver.step = self._drive
        return super().register_step_pre_hook(hook)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Call the driver's own step; raises `_SkippedStep` where it only found that the loss was scaled too far."""
        scaled = getattr(self._driver, "loss_scale", 1.0) != 1.0
        result = self._step(*args, **kwargs)
        # DeepSpeed returns normally from a skipped step; only an exception keeps torch from running its post-hooks.
        if scaled and getattr(self._driver, "overflow", False):
            raise _SkippedStep(result)
        return result

    def _drive(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.step(*args, **kwargs)
        except _SkippedStep as skipped:  # it has passed torch's post-hooks by on its way here
            return skipped.result

    def _prepare(self, *_: object) -> None:
        """Copy its learning rates, and wait for gradients on their way to the host, as its own step does."""
        theirs = self._driver.param_groups
        # Their groups hold flat partitions, so only their rates are copied, and only where the groups correspond.
        if len(theirs) == len(self.param_groups):
            for group, of in zip(self.param_groups, theirs, strict=True):
                group["lr"] = of.get("lr")
        if getattr(self._driver, "cpu_offload", False) and torch.accelerator.is_available():
            torch.accelerator.synchronize()


class _SkippedStep(Exception):  # noqa: N818 - no error
    """A `step()` that changed no weight."""

    def __init__(self, result: Any) -> None:
        self.result = result


class DeepSpeedLayout(Layout):
    """The layout of a run with an optimizer of DeepSpeed's: fragments under ZeRO 1 and 2, else as torch's own."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._driven = {i: each for i, each in enumerate(optimizers) if isinstance(each, DeepSpeedOptimizer)}
        self._fragments = {key: one for each in self._driven.values() for key, one in each.fragments.items()}
        self.unreadable = "; ".join(each.unreadable for each in self._driven.values() if each.unreadable)
        self.fragmented = bool(self._fragments)
        self.gradients_in_place = not (self.fragmented or self.unreadable)

    def local_entries(self, parameters: Mapping[str, Tensor]) -> dict[str, LocalEntries]:
        """As `Layout.local_entries`."""
        others = {name: each for name, each in parameters.items() if id(each) not in self._fragments}
        whole = super().local_entries(others)
        return {name: whole[name] if name in whole else self._fragments[id(each)] for name, each in parameters.items()}

    def tensors(self, parameter: Tensor, optimizer: Optimizer, group: int | None) -> StepTensors | None:
        """As `Layout.tensors`."""
        fragment = self._fragments.get(id(parameter))
        if fragment is None:
            return super().tensors(parameter, optimizer, group)
        return fragment.tensors if fragment.numel else None

    def is_hidden(self, which: int) -> bool:
        """As `Layout.is_hidden`."""
        return which in self._driven and bool(self._driven[which].unreadable)

    def clip_norms(self) -> Mapping[int, float]:
        """As `Layout.clip_norms`."""
        return {which: each.clip_norm for which, each in self._driven.items()}


def _groups(driver: Any, model: nn.Module) -> list[dict[str, Any]]:
    """The model's parameters as `driver` divides them."""
    names = ("bit16_groups", "bf16_groups", "fp16_groups")
    groups = next((getattr(driver, name) for name in names if hasattr(driver, name)), [list(model.parameters())])
    return [{"params": list(group)} for group in groups]


def _unreadable(driver: Any) -> str:
    """The options of ZeRO under which its gradients can't be read; empty where they can."""
    if not hasattr(driver, "averaged_gradients"):
        return ""  # not ZeRO's
    options = {
        "ZenFlow": getattr(driver, "zenflow", False),
        "round_robin_gradients": getattr(driver, "round_robin_gradients", False),
        "Muon": "muon" in type(driver.optimizer).__name__.lower(),
        "torch_autocast in fp16": getattr(driver, "torch_autocast_gradscaler", None) is not None,
    }
    return next((f"DeepSpeed's ZeRO with {name}" for name, is_set in options.items() if is_set), "")


def _boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Shard]:
    """The flat entries from `start` to `stop` of a tensor of `shape`, in their order, as boxes."""
    for runs in _runs(shape, start, stop):
        yield Shard(shape, tuple(map(len, runs)), tuple((run,) for run in runs))


def _runs(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[range, ...]]:
    if not shape:
        yield ()
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner) * inner, stop // inner * inner  # between them rows are whole
    for low, high in pairwise([start, first, last, stop] if first <= last else [start, stop]):
        row, offset = divmod(low, inner)
        if low == high:
            continue
        if offset or high - low < inner:
            for runs in _runs(shape[1:], offset, offset + high - low):
                yield range(row, row + 1), *runs
        else:
            yield range(row, high // inner), *map(range, shape[1:])


def _is_like(value: object, partition: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == partition.shape
