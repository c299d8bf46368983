"""Access to FSDP2's state: data-parallel ranks, and a backward pass that the training loop does not notice.

FSDP2 has no public way to read its settings, only to set them. All access to its private attributes is in this module.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from sharpwatch.errors import ProbeError

# Settings as in the last backward of a step: gradients are averaged over ranks, weights are resharded.
_LAST_BACKWARD_SETTINGS = {
    "reduce_grads": True,
    "all_reduce_grads": True,
    "reshard_after_backward": True,
    "gradient_divide_factor": None,
    "_partial_reduce_output": None,
}
# Attributes through which users can replace the communication of weights and gradients.
_COMMUNICATION_HOOKS = ("_all_gather_comm", "_reduce_scatter_comm", "_all_reduce_hook")


@dataclass(frozen=True, slots=True)
class DataRank:
    """The data-parallel rank of this process: it computes on share `number` of `count` shares of each batch.

    Ranks that split layers among them by tensor parallelism have the same number.
    """

    number: int
    count: int

    @classmethod
    def of(cls, model: nn.Module) -> DataRank:
        """Read the data-parallel rank from the meshes of `fully_shard`.

        Args:
            model: The model. If it is not sharded by FSDP2, for example under tensor parallelism alone, there is one
                share.

        Raises:
            ProbeError: Modules have meshes of different sizes.
        """
        meshes = [group.mesh_info.mesh for state in _states(model) for group in _groups(state)]
        if not meshes:
            return cls(0, 1)
        if len({mesh.size() for mesh in meshes}) > 1:
            raise ProbeError("probes need all modules sharded over the same number of ranks")
        # Under HSDP the mesh has two dimensions, and both divide the batch.
        index = 0
        for coordinate, size in zip(meshes[0].get_coordinate(), meshes[0].shape, strict=True):
            index = index * size + coordinate
        return cls(index, math.prod(meshes[0].shape))


def averaged_parameters(model: nn.Module) -> set[int]:
    """The ids of the parameters whose gradients FSDP2 averages over ranks."""
    return {id(one.sharded_param) for state in _states(model) for group in _groups(state) for one in group.fsdp_params}


@contextmanager
def ordinary_backward(model: nn.Module) -> Iterator[None]:
    """A context in which a backward through `model` averages its gradients and ends like the last one of a step.

    The user's settings, the gradients that accumulation has left for later, and unfinished passes are set aside.
    Afterwards the weights are sharded, also after an error.

    Args:
        model: The model, sharded by FSDP2 or not.

    Raises:
        ProbeError: Weights or gradients pass through the user's own communication hooks, which may keep state.
    """
    states = _states(model)
    for group in (group for state in states for group in _groups(state)):
        # Compression that feeds its error back keeps a remainder for the next step, which a probe must not change.
        for name in _COMMUNICATION_HOOKS:
            if not _is_torch_communication(getattr(group, name, None)):
                raise ProbeError(f"the model has a custom {name.strip('_')}, which a probe must not call")
    # Unwound from the end: first an unfinished pass, then the weights, and the user's settings last.
    with ExitStack() as stack:
        for context in {id(state._state_ctx): state._state_ctx for state in states}.values():  # noqa: SLF001 - as the head says
            _override(stack, context, "is_last_backward", value=True)
        for group in (group for state in states for group in _groups(state)):
            for name, value in _LAST_BACKWARD_SETTINGS.items():
                _override(stack, group, name, value=value)
            for one in group.fsdp_params:
                _override(stack, one, "unsharded_accumulated_grad", value=None)
                _override(stack, getattr(one, "_unsharded_param", None), "grad", value=None)
        for module in _modules(model):
            stack.callback(module.reshard)
        stack.push(lambda kind, *_: _reset_unfinished_pass(model) if kind else None)
        yield


def _is_torch_communication(communication: object) -> bool:
    return communication is None or type(communication).__module__.startswith("torch.distributed.")


def _override(stack: ExitStack, place: Any, name: str, *, value: object) -> None:
    """Set an attribute, if this version of torch has it, until `stack` unwinds."""
    if hasattr(place, name):
        stack.callback(setattr, place, name, getattr(place, name))
        setattr(place, name, value)


def _reset_unfinished_pass(model: nn.Module) -> None:
    """Reset the state of a forward or backward that did not finish."""
    for module in _modules(model):
        state = module._get_fsdp_state()  # noqa: SLF001 - as the head says
        if state._is_root and hasattr(module, "reset_iter_state"):  # noqa: SLF001 - as above
            module.reset_iter_state()


def _modules(model: nn.Module) -> list[Any]:
    # Not imported: a program without FSDP need not load it.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [module for module in model.modules() if fsdp is not None and isinstance(module, fsdp.FSDPModule)]


def _states(model: nn.Module) -> list[Any]:
    found = [module._get_fsdp_state() for module in _modules(model)]  # noqa: SLF001 - as the head says
    return list({id(state): state for state in found}.values())


def _groups(state: Any) -> Sequence[Any]:
    """The parameter groups that communicate together; before torch 2.13 a state had at most one."""
    if hasattr(state, "_fsdp_param_groups"):
        groups: Sequence[Any] = state._fsdp_param_groups  # noqa: SLF001 - as the head says
        return groups
    return [state._fsdp_param_group] if state._fsdp_param_group else []  # noqa: SLF001 - as above
