"""Watches the steps of an optimizer's copies: keeps them from the run and from other ranks, and sees how they round."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sharpwatch.agent.optimizers.optimizer_copy import NotTriedError, parts_of

# Roundings of the least precise type among a step's results; Newton-Schulz iterations enlarge one about 500 times.
_ROUNDINGS, _LARGEST_TOLERANCE = 2**10, 0.1
_COMMUNICATION = ("c10d", "_c10d", "symm_mem", "dtensor", "_dtensor")  # how namespaces of operators begin
_LAYOUT = {"cat", "stack", "constant_pad_nd"}
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addbmm", "addr", "mv", "addmv", "dot", "vdot", "ger", "matmul", "einsum"}
_SUMS = {"sum", "mean", "norm", "var", "std", "var_mean", "std_mean", "prod", "logsumexp", "cumsum", "nansum"}
_ROUNDED_BY_LAYOUT = _LAYOUT | _PRODUCTS | _SUMS
_LINEAR_ALGEBRA = ("linalg_", "_linalg_", "cholesky", "triangular", "svd", "qr", "geqrf", "orgqr", "ormqr", "inverse")


class TrialGuard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees each operation of a copy's step: keeps it from the run's tensors and from other ranks.

    `tolerance`: of how far a parameter went, by how much rounding alone may change it when groups are split.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        own = [each for group in optimizer.param_groups for each in group["params"]]
        own += [each.grad for each in own if each.grad is not None]
        own += [each for each in tree_leaves(list(optimizer.state.values())) if isinstance(each, Tensor)]
        self._own = set().union(*map(_places, own))
        self._shared = set().union(*map(_places, _shared_tensors(type(optimizer))))
        self._rounds, self._epsilon = False, 0.0

    @property
    def tolerance(self) -> float:
        """0 where all operations are elementwise: those give the same bits however tensors are listed."""
        return min(_ROUNDINGS * self._epsilon, _LARGEST_TOLERANCE) if self._rounds else 0.0

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Before the subclasses' own code runs, which then comes here with what it consists of."""
        given = kwargs or {}
        tensors = list(_tensors((*args, *given.values())))
        if str(getattr(func, "namespace", "")).startswith(_COMMUNICATION):
            raise NotTriedError("its step() communicates between ranks")
        if any(not self._own.isdisjoint(_places(each)) for each in tensors):
            raise NotTriedError("its step() reaches the run's own tensors from a copy")
        if self._shared and any(not self._shared.isdisjoint(_places(each)) for each in _written(func, args, given)):
            raise NotTriedError("its step() changes tensors that it shares with a copy")
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):  # such as DTensor
            return NotImplemented
        result = func(*args, **given)
        self._note(func, result)
        return result

    def _note(self, func: Any, result: object) -> None:
        name = str(getattr(func, "__name__", "")).partition(".")[0].removeprefix("_foreach_").rstrip("_")
        self._rounds |= name in _ROUNDED_BY_LAYOUT or name.startswith(_LINEAR_ALGEBRA)
        for each in _tensors((result,)):
            if each.is_floating_point() or each.is_complex():
                self._epsilon = max(self._epsilon, torch.finfo(each.dtype).eps)


def _tensors(values: Iterable[object]) -> Iterator[Tensor]:
    """The tensors among the arguments or results of an operator, which has them by themselves or in lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (each for each in value if isinstance(each, Tensor))


def _shared_tensors(kind: type) -> Iterator[Tensor]:
    """Tensors of an optimizer's classes, and of the modules that define them, also in lists and dicts there."""
    for base in kind.__mro__[: kind.__mro__.index(Optimizer)]:
        for held in (vars(base), vars(sys.modules.get(base.__module__, object))):
            values = list(held.values())
            yield from _tensors([list(each.values()) if isinstance(each, dict) else each for each in values])


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The arguments that an operator writes to."""
    schema = getattr(func, "_schema", None)
    for number, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            yield from _tensors([value])


def _places(value: object) -> set[int]:
    """What tells a tensor, and others that share its memory, from those that don't."""
    if not isinstance(value, Tensor):
        return set()
    parts = parts_of(value)
    if parts is not None:
        return {id(value)}.union(*map(_places, parts.values()))
    address = 0 if value.device.type == "meta" or value.layout is not torch.strided else _address(value)
    return {id(value), address} if address else {id(value)}


def _address(value: Tensor) -> int:
    try:
        return value.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a subclass without memory of its own
        return 0
