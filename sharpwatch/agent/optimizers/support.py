"""Optimizers as the field has them: which one takes the step, and what of a run can't be changed or read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from sharpwatch.agent.optimizers.deepspeed import DeepSpeedOptimizer, is_deepspeeds
from sharpwatch.agent.optimizers.split_check import stacked_state, unsafe_to_split


def stepping(optimizer: Any, model: nn.Module) -> Any:
    """What takes the steps of `model`, also where `optimizer` wraps it and shows its groups as its own.

    Such are Accelerate's, SAM, Lookahead and the schedule-free wrapper. DeepSpeed's become a `DeepSpeedOptimizer`.
    """
    if is_deepspeeds(optimizer):
        known = getattr(optimizer.step, "__self__", None)
        name = type(optimizer).__name__
        return (
            known if isinstance(known, DeepSpeedOptimizer) else type(name, (DeepSpeedOptimizer,), {})(optimizer, model)
        )
    groups = getattr(optimizer, "param_groups", None)
    inner = next((held for held in _held(optimizer) if held.param_groups is groups), None)
    return optimizer if inner is None else stepping(inner, model)


def uncontrolled(optimizers: Sequence[Optimizer], ranks: int = 1, *, check_split: bool = True) -> str:
    """Say why the learning rates of a run can't be changed by block.

    Args:
        optimizers: All optimizers of the run.
        ranks: The number of its processes.
        check_split: Whether an unknown optimizer's groups must be shown to be safe to split, which steps a copy of it.

    Returns:
        The reasons, each with the optimizer's name; empty where the rates can be changed.
    """
    return _named(optimizers, lambda each: _reason(each, ranks) or (unsafe_to_split(each) if check_split else ""))


def uncontrolled_by_state(optimizers: Sequence[Optimizer]) -> str:
    """Say as `uncontrolled` does what the state that `optimizers` hold by now tells, which at attach was empty."""
    return _named(optimizers, stacked_state)


def _named(optimizers: Sequence[Optimizer], why: Callable[[Optimizer], str]) -> str:
    reasons = ((type(optimizer).__name__, why(optimizer)) for optimizer in optimizers)
    return "; ".join(f"{name}: {reason}" for name, reason in reasons if reason)


def is_flat(parameter: object) -> bool:
    """Whether FSDP (the first, without use_orig_params) laid several parameters end to end in this one."""
    return getattr(parameter, "_is_flat_param", False)  # FlatParameter's own mark; to import it takes 0.6 s


def skips_its_step(optimizer: Optimizer) -> bool:
    """Whether the next `step()` changes nothing: GradScaler found an overflow and leaves it to a fused step to skip.

    Reading the flag waits for the device, as GradScaler itself would.
    """
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, Tensor) and bool(found.item())


def withheld(model: nn.Module) -> str:
    """Why the parameters of `model` can't be read between steps; empty where they can."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "DeepSpeed's ZeRO-3 holds its parameters; with stages up to 2 it can be watched"
    handles = (getattr(module, "_handle", None) for module in model.modules())
    if any(
        getattr(each, "uses_sharded_strategy", False) and getattr(each, "_use_orig_params", False) for each in handles
    ):
        return "FSDP1 with use_orig_params=True cuts its parameters to pieces; FSDP2 (fully_shard) does not"
    return ""


def _reason(optimizer: Optimizer, ranks: int) -> str:
    return next((reason for reason, holds in _REASONS.items() if holds(optimizer, ranks)), "")


def _is_flat(optimizer: Optimizer, _: int) -> bool:
    return any(is_flat(parameter) for group in optimizer.param_groups for parameter in group["params"])


def _delegates(optimizer: Optimizer, _: int) -> bool:
    return any(_held(optimizer))


def _is_driven(optimizer: Optimizer, _: int) -> bool:
    return isinstance(optimizer, DeepSpeedOptimizer)


def _has_no_rate(optimizer: Optimizer, _: int) -> bool:
    return any(group.get("lr") is None for group in optimizer.param_groups)


def _has_one_rate(optimizer: Optimizer, _: int) -> bool:
    return any(kind.__name__.startswith(("DAdapt", "Prodigy")) for kind in type(optimizer).__mro__)


def _starts_with_rate(optimizer: Optimizer, _: int) -> bool:
    return any(kind.__name__ == "Rprop" for kind in type(optimizer).__mro__)


def _keeps_rates(optimizer: Optimizer, _: int) -> bool:
    return hasattr(optimizer, "base_lrs")


def _shares_out(optimizer: Optimizer, ranks: int) -> bool:
    kind = type(optimizer)
    return ranks > 1 and kind.__name__ in {"Muon", "MuonWithAuxAdam"} and not kind.__module__.startswith("torch.")


def _overrides(optimizer: Optimizer, _: int) -> bool:
    manager = getattr(optimizer, "mng", None)
    return any(getattr(manager, name, None) for name in ("index2config", "module_weight_config_triple"))


_REASONS: dict[str, Callable[[Optimizer, int], bool]] = {
    "its parameters are FSDP's flat ones, of several blocks each": _is_flat,
    "DeepSpeed keeps gradients, master weights and their groups to itself": _is_driven,
    "it hands its groups to another optimizer, by their position": _delegates,
    "it makes its own learning rate": _has_no_rate,
    "it estimates one learning rate for all groups, and raises where they differ": _has_one_rate,
    "it uses a learning rate at its first step only": _starts_with_rate,
    "it keeps a rate by each group's position": _keeps_rates,
    "each rank keeps the momentum of every n-th parameter of a group": _shares_out,
    "bitsandbytes finds its overrides by a parameter's position in its group": _overrides,
}


def _held(optimizer: object) -> Iterator[Any]:
    """Other optimizers that `optimizer` has among its attributes."""
    for value in getattr(optimizer, "__dict__", {}).values():
        if value is not optimizer and (isinstance(value, Optimizer) or is_deepspeeds(value)):
            yield value
