"""The trial of a model before its first probe: that a forward changes nothing, and where the rows of the batch are."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sharpwatch.agent.probes.context import ProbeContext
from sharpwatch.agent.probes.out_of_memory import require_room_for_copies
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.objective.hooked_weights import require_hooked_weights
from sharpwatch.curvature.objective.rows import RowLayout, find_rows, precision_of
from sharpwatch.curvature.state.isolation import Functional, isolated
from sharpwatch.errors import ProbeError

_COLLECTIVES = frozenset({"c10d", "_c10d_functional", "c10d_functional", "_c10d_functional_autograd"})


class UnfitError(ProbeError):
    """Raised when a probe must not run the model's forward: it would change the run, or wait for other ranks."""


class _NoCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses operations that other ranks have to take part in."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`."""
        del types
        if func.namespace in _COLLECTIVES:
            raise UnfitError(f"the model's forward talks to other ranks ({func}): no probe of one rank may run it")
        return func(*args, **(kwargs or {}))


class Trial:
    """Tries what a loop calls on a few rows of each kind of batch."""

    def __init__(self) -> None:
        self._tried = False
        self._layouts: dict[object, RowLayout] = {}  # by the structure of the call

    def layout_of(self, batch: Batch, context: ProbeContext) -> RowLayout:
        """Where the rows of a batch are: found by a trial of the model, once for each structure of its calls.

        Raises:
            UnfitError: The forward writes into the weights, or needs other ranks.
            ObjectiveError: The model treats no dimension of the batch row by row.
            ProbeError: There is no memory for the copies, or hooks that probes bypass make weights.
        """
        structure = batch.observed, *((name, tensor.dim(), tensor.dtype) for tensor, name in batch.named_tensors())
        layout = self._layouts.get(structure, RowLayout(certain=False))
        # FSDP needs a backward for each forward. With one row there is nothing more to find.
        if layout.certain or context.shards is not None or _is_fsdp(context) or (self._tried and batch.rows == 1):
            return layout
        if self._tried:
            with isolated(context.model) as live, torch.no_grad():
                layout = _find_rows(live, batch, context)
        else:
            layout = _try_forward(batch, context)
            self._tried = True
        self._layouts[structure] = layout
        return layout


def _is_fsdp(context: ProbeContext) -> bool:
    return any(type(module).__module__.startswith("torch.distributed.fsdp") for module in context.model.modules())


def _try_forward(batch: Batch, context: ProbeContext) -> RowLayout:
    """Run forwards of one and two rows on copies of the weights."""
    model, weights = context.model, context.weights
    require_room_for_copies(weights)
    with isolated(model) as live, torch.no_grad(), _NoCollectives():  # type: ignore[no-untyped-call]
        # On copies, because version counters do not show what is written through `.data`.
        copies = {name: weight.clone() for name, weight in weights.items()}
        for name, copy in copies.items():
            live.set_parameter(name, copy)
        layout = _find_rows(live, batch, context)
    for name, copy in copies.items():
        if not torch.allclose(copy, weights[name], rtol=0, atol=0, equal_nan=True):
            raise UnfitError(f"the model's forward writes into {name}: no probe may run it")
    del copies
    row = replace(batch, axes=layout.axes).slice(torch.zeros(1, dtype=torch.int64, device="cpu"))
    with _NoCollectives():  # type: ignore[no-untyped-call]
        require_hooked_weights(model, partial(_output, row, context))
    return layout


def _find_rows(live: Functional, batch: Batch, context: ProbeContext) -> RowLayout:
    return find_rows(lambda rows: _output(rows, context, live), batch, precision_of(context.model))


def _output(batch: Batch, context: ProbeContext, live: Functional) -> Any:
    """What the model returns for some rows; None if the user's function does not call it once."""
    rows = batch.prepared()
    function = None if context.finds_loss else context.loss_fn
    if rows.observed:
        function = function or context.logits_fn
    if function is None:
        return context.call(live, rows)
    outputs: list[Any] = []
    handle = live.inner.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        function(live, rows.passed)
    finally:
        handle.remove()
    return outputs[0] if len(outputs) == 1 else None
