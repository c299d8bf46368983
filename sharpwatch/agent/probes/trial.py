"""The forward that is tried on copies of the weights before the first probe, to see whether probes may run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sharpwatch.agent.probes.out_of_memory import require_room_for_copies
from sharpwatch.curvature.objective.hooked_weights import require_hooked_weights
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


def try_forward(model: nn.Module, weights: Mapping[str, Tensor], call: Callable[[Functional], object]) -> None:
    """Run a forward on copies of `weights`.

    Args:
        model: The model.
        weights: Its parameters, detached.
        call: Calls the stand-in for the model, and returns the output.

    Raises:
        UnfitError: The forward writes into the weights, or needs other ranks.
        ProbeError: There is no memory for the copies, or hooks that probes bypass make weights.
    """
    if any(type(module).__module__.startswith("torch.distributed.fsdp") for module in model.modules()):
        return  # FSDP needs a backward for each forward
    require_room_for_copies(weights)
    with isolated(model) as live, torch.no_grad(), _NoCollectives():  # type: ignore[no-untyped-call]
        # On copies, because version counters do not show what is written through `.data`.
        copies = {name: weight.clone() for name, weight in weights.items()}
        for name, copy in copies.items():
            live.set_parameter(name, copy)
        call(live)
    for name, copy in copies.items():
        if not torch.allclose(copy, weights[name], rtol=0, atol=0, equal_nan=True):
            raise UnfitError(f"the model's forward writes into {name}: no probe may run it")
    del copies
    with _NoCollectives():  # type: ignore[no-untyped-call]
        require_hooked_weights(model, call)
