"""The parts of a training loop that `Checkpoints` is given, checked when it is made."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn
from torch.optim import Optimizer

from sharpwatch.agent.watch import Watch
from sharpwatch.errors import CheckpointError


@runtime_checkable
class Stateful(Protocol):
    """An object with a state to save, such as a scheduler or a GradScaler."""

    def state_dict(self) -> dict[str, Any]:
        """Its state."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Set its state."""


def checked_folder(folder: Any) -> Path:
    """The folder of the checkpoints; raises `CheckpointError` if it is no path."""
    if not isinstance(folder, str | os.PathLike) or not folder:
        raise CheckpointError(f"folder must be the path of a folder, got {folder!r}")
    return Path(folder).resolve()


def check_loop(model: Any, watch: Any, data: Any, keep: Any) -> None:
    """Check the arguments that are kept as they are.

    Raises:
        CheckpointError: Names the first that is wrong, what it is, and what it must be.
    """
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(watch, Watch):
        raise CheckpointError(f"watch must be what sharpwatch.attach returned, got {type(watch).__name__}")
    if data is not None and (not isinstance(data, Iterable) or isinstance(data, str | bytes)):
        raise CheckpointError(f"data must be a data loader or another iterable of batches, got {type(data).__name__}")
    if not isinstance(keep, int) or isinstance(keep, bool) or keep < 1:
        raise CheckpointError(f"keep must be a whole number >= 1, got {keep!r}")


def checked_optimizers(given: Any, model: nn.Module) -> tuple[Optimizer, ...]:
    """The optimizers whose state is saved, without wrappers that have no state of their own, as Accelerate's.

    Raises:
        CheckpointError: One is no optimizer of torch's, or holds a parameter that the model does not have.
    """
    single = isinstance(given, Optimizer) or not isinstance(given, Iterable) or isinstance(given, str)
    optimizers = tuple(_unwrapped(each) for each in ((given,) if single else given))
    if not optimizers:
        raise CheckpointError("optimizer must be one torch.optim.Optimizer or several, got none")
    own = {id(parameter) for parameter in model.parameters()}
    for i, each in enumerate(optimizers):
        name = "optimizer" if single else f"optimizer[{i}]"
        # A wrapper without hooks of its own, as Accelerate's round DeepSpeed's optimizer, is none either.
        if not isinstance(each, Optimizer) or not hasattr(each, "_optimizer_step_post_hooks"):
            engine = "; DeepSpeed's engine saves its own" if "DeepSpeed" in type(each).__name__ else ""
            raise CheckpointError(f"{name} must be a torch.optim.Optimizer, got {type(each).__name__}{engine}")
        # State is saved by the names that the model has for its parameters.
        if not all(id(parameter) in own for group in each.param_groups for parameter in group["params"]):
            raise CheckpointError(
                f"{name} must hold parameters of model alone, but {type(each).__name__} holds another; under "
                "Accelerate pass model and optimizer as accelerator.prepare returned them"
            )
    return optimizers


def checked_extras(schedulers: Any, scaler: Any) -> dict[str, Stateful]:
    """Schedulers and GradScaler by the name they are saved under.

    Raises:
        CheckpointError: One has no state to save.
    """
    several = () if schedulers is None else schedulers if isinstance(schedulers, Sequence) else (schedulers,)
    extras = {f"scheduler-{i}": one for i, one in enumerate(several)}
    if scaler is not None:
        extras["scaler"] = scaler
    for name, one in extras.items():
        if not isinstance(one, Stateful) or isinstance(one, type):
            raise CheckpointError(
                f"{name.partition('-')[0]} must have state_dict and load_state_dict, got {type(one).__name__}"
            )
    return extras


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer within a wrapper that shows its groups and its state as its own."""
    for held in vars(optimizer).values() if isinstance(optimizer, Optimizer) else ():
        if isinstance(held, Optimizer) and held is not optimizer and _same_state(held, optimizer):
            return _unwrapped(held)
    return optimizer


def _same_state(one: Optimizer, other: Optimizer) -> bool:
    return one.param_groups is other.param_groups and one.state is other.state
