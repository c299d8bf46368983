"""Which object takes the optimizer steps of a model, and which models and optimizers can't be read or controlled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.optim import LBFGS, Optimizer

from sharpwatch.agent.optimizers.deepspeed import DeepSpeedLayout, DeepSpeedOptimizer
from sharpwatch.agent.optimizers.split_check import unsafe_to_split
from sharpwatch.agent.optimizers.step_tensors import Layout


def stepping_optimizer(optimizer: Any, model: nn.Module) -> Any:
    """Find the optimizer that takes the steps of `model`.

    Some optimizers wrap another one and show its groups as their own: Accelerate's, SAM, Lookahead, the schedule-free
    wrapper. An optimizer of DeepSpeed's gets a `DeepSpeedOptimizer`, always the same one.

    Args:
        optimizer: What the user passed to `attach`.
        model: The model that it trains.

    Returns:
        The inner optimizer; `optimizer` itself if it wraps none.
    """
    if _is_deepspeed_driver(optimizer):
        known = getattr(optimizer.step, "__self__", None)
        # A class of the driver's own name, because messages and the Hello name an optimizer by its class.
        name = type(optimizer).__name__
        return (
            known if isinstance(known, DeepSpeedOptimizer) else type(name, (DeepSpeedOptimizer,), {})(optimizer, model)
        )
    groups = getattr(optimizer, "param_groups", None)
    # The very same list: an optimizer that only holds another one, with other groups, is no wrapper of it.
    inner = next((held for held in _held(optimizer) if held.param_groups is groups), None)
    return optimizer if inner is None else stepping_optimizer(inner, model)


def layout_of(optimizers: Sequence[Optimizer]) -> Layout:
    """Where `optimizers` keep the tensors that they step on."""
    driven = any(isinstance(each, DeepSpeedOptimizer) for each in optimizers)
    return DeepSpeedLayout(optimizers) if driven else Layout()


def lr_refusal(optimizers: Sequence[Optimizer], ranks: int = 1, *, check_split: bool = True) -> str:
    """Say why the learning rates of a run can't be changed by block.

    Args:
        optimizers: All optimizers of the run.
        ranks: The number of its processes.
        check_split: Whether an unknown optimizer's groups must be shown to be safe to split, which steps a copy of it.

    Returns:
        The reasons, each with the optimizer's name; empty where the rates can be changed.
    """
    reasons = [
        (type(each).__name__, _reason(each, ranks) or (unsafe_to_split(each) if check_split else ""))
        for each in optimizers
    ]
    return "; ".join(f"{name}: {reason}" for name, reason in reasons if reason)


def interval_refusal(optimizers: Sequence[Optimizer]) -> str:
    """Say why no block can be left out of a step, where rates can be changed; empty if it can."""
    whole = [type(each).__name__ for each in optimizers if isinstance(each, LBFGS)]
    return f"{', '.join(whole)} steps all parameters as one" if whole else ""


def is_flat(parameter: object) -> bool:
    """Whether FSDP1, without use_orig_params, has concatenated several parameters into this one."""
    return getattr(parameter, "_is_flat_param", False)  # FlatParameter sets it; importing that class takes 0.6 s


def unreadable_parameters(model: nn.Module) -> str:
    """Say why the parameters of `model` can't be read between steps; empty if they can."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "parameters partitioned by DeepSpeed's ZeRO-3 can't be read; use stage 1 or 2"
    handles = (getattr(module, "_handle", None) for module in model.modules())
    if any(
        getattr(each, "uses_sharded_strategy", False) and getattr(each, "_use_orig_params", False) for each in handles
    ):
        return "parameters sharded by FSDP1 with use_orig_params=True can't be read; use FSDP2 (fully_shard)"
    return ""


def _reason(optimizer: Optimizer, ranks: int) -> str:
    return next((reason for reason, holds in _REASONS.items() if holds(optimizer, ranks)), "")


def _is_flat(optimizer: Optimizer, _: int) -> bool:
    return any(is_flat(parameter) for group in optimizer.param_groups for parameter in group["params"])


def _wraps_another(optimizer: Optimizer, _: int) -> bool:
    # Also several, in a list or by name.
    values = vars(optimizer).values()
    listed = [
        *(each for each in values if isinstance(each, (list, tuple))),
        *(each.values() for each in values if isinstance(each, dict)),
    ]
    return any(_held(optimizer)) or any(_is_optimizer(each) for several in listed for each in several)


# Such as torchao's CPUOffloadOptimizer; groups that are set in place of them never reach its step().
def _computes_groups(optimizer: Optimizer, _: int) -> bool:
    return "param_groups" not in vars(optimizer)


def _is_deepspeeds(optimizer: Optimizer, _: int) -> bool:
    return isinstance(optimizer, DeepSpeedOptimizer)


# Such as Adafactor with relative steps.
def _has_no_lr(optimizer: Optimizer, _: int) -> bool:
    return any(group.get("lr") is None for group in optimizer.param_groups)


# By the class's name, so that the packages that define them need not be installed.
def _needs_equal_lrs(optimizer: Optimizer, _: int) -> bool:
    return any(kind.__name__.startswith(("DAdapt", "Prodigy")) for kind in type(optimizer).__mro__)


def _reads_lr_once(optimizer: Optimizer, _: int) -> bool:
    return any(kind.__name__ == "Rprop" for kind in type(optimizer).__mro__)


# Such as AdaBound, which raises where a group is split.
def _keeps_lrs(optimizer: Optimizer, _: int) -> bool:
    return hasattr(optimizer, "base_lrs")


def _distributes_parameters(optimizer: Optimizer, ranks: int) -> bool:
    kind = type(optimizer)
    return ranks > 1 and kind.__name__ in {"Muon", "MuonWithAuxAdam"} and not kind.__module__.startswith("torch.")


def _overrides_by_position(optimizer: Optimizer, _: int) -> bool:
    manager = getattr(optimizer, "mng", None)
    return any(getattr(manager, name, None) for name in ("index2config", "module_weight_config_triple"))


_REASONS: dict[str, Callable[[Optimizer, int], bool]] = {
    "its parameters are flat parameters of FSDP1, each of several blocks": _is_flat,
    "DeepSpeed keeps gradients, master weights and their groups to itself": _is_deepspeeds,
    "it passes its groups to another optimizer by their position": _wraps_another,
    "its param_groups are not an attribute that can be replaced": _computes_groups,
    "it computes its own learning rate": _has_no_lr,
    "it estimates one learning rate for all groups, and raises if they differ": _needs_equal_lrs,
    "it uses the learning rate in its first step only": _reads_lr_once,
    "it keeps learning rates by the position of the group": _keeps_lrs,
    "each rank keeps the momentum of every n-th parameter of a group": _distributes_parameters,
    "bitsandbytes finds its overrides by a parameter's position in its group": _overrides_by_position,
}


def _held(optimizer: object) -> Iterator[Any]:
    """The other optimizers among the attributes of `optimizer`."""
    for value in getattr(optimizer, "__dict__", {}).values():
        if value is not optimizer and _is_optimizer(value):
            yield value


def _is_optimizer(value: object) -> bool:
    return isinstance(value, Optimizer) or _is_deepspeed_driver(value)


def _is_deepspeed_driver(value: object) -> bool:
    """Whether `value` is an optimizer of DeepSpeed's own, for ZeRO or mixed precision, and none of torch's."""
    names = {kind.__name__ for kind in type(value).__mro__}
    return "DeepSpeedOptimizer" in names and not isinstance(value, Optimizer)
