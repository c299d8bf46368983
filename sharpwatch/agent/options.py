"""The options of `attach`, and the checks of their values."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from sharpwatch._version import __version__
from sharpwatch.agent.control.commands import RollbackRequest
from sharpwatch.agent.control.controller import CONTROL_MODES
from sharpwatch.agent.hooks import Hook
from sharpwatch.agent.optimizers.support import is_flat, unreadable_parameters
from sharpwatch.agent.probes.builtin import DEFAULT_PROBES, PROBES, sharded_probes
from sharpwatch.agent.transport.base import (
    Transport,
    check_secrecy,
    find_token_file,
    parse_daemon_addresses,
    parse_tls,
    parse_token,
)
from sharpwatch.blocks import RulesLike
from sharpwatch.curvature.parameters.fsdp import DataRank
from sharpwatch.curvature.parameters.shards import is_sharded
from sharpwatch.errors import AttachError, ProbeError
from sharpwatch.wire import MAX_DATA_ORDER, MAX_LABELS, wrong_label

_LOG = logging.getLogger("sharpwatch")
_RULES = "SHARPWATCH_BLOCK_RULES"
_LONGEST_NAME = 253  # the daemon's limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options that `attach` was called with; `optimizers` are those that take the steps, without wrappers."""

    model: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]
    training_job: str
    run: str | None
    address: str
    token: str | None
    tls: Mapping[str, str] | None
    overhead_budget: float
    probe_every: int | None
    early_probes: int
    probes: Sequence[str]
    loss_fn: Callable[..., Any] | None
    logits_fn: Callable[..., Any] | None
    on_rollback: Callable[[RollbackRequest], object] | None
    control: str
    lr_bounds: tuple[float, float]
    initial_step: int
    seed: int
    rules: RulesLike | None
    strict: bool
    data_order: str | None
    labels: Mapping[str, str] | None
    transport: Transport | None

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest learning-rate multiplier, as floats."""
        low, high = self.lr_bounds
        return float(low), float(high)

    @property
    def block_rules(self) -> RulesLike | None:
        """The block rules: those given, else those of the environment."""
        return self.rules if self.rules is not None else os.environ.get(_RULES) or None

    @property
    def rules_source(self) -> str:
        """Where the block rules are from, as error messages name it."""
        return "rules" if self.rules is not None else f"${_RULES}"

    @property
    def equal(self) -> Mapping[str, object]:
        """The options that must be the same on all ranks of a run."""
        # Not those that rank 0 alone uses: where it connects to, and its overhead budget.
        return {
            # First: another version may have other options, and gloo ends ranks whose messages differ in size.
            "sharpwatch": __version__,
            "training_job": self.training_job,
            "run": self.run,
            "probe_every": self.probe_every,
            "early_probes": self.early_probes,
            "probes": self.probes,
            "control": self.control,
            "lr_bounds": self.bounds,
            "initial_step": self.initial_step,
            "seed": self.seed,
            "rules": self.rules,
            "data_order": self.data_order,
            "labels": None if self.labels is None else dict(sorted(self.labels.items())),
            "on_rollback": self.on_rollback is not None,
        }


def check(options: Options) -> None:
    """Check every option.

    Raises:
        AttachError: Names the first option that is wrong, its value, and the rule it breaks.
    """
    _check_training(options.model, options.optimizers)
    _check_numbers(options)
    _check_names(options)
    _check_probes(options.probes, options.optimizers)
    for name in ("loss_fn", "logits_fn", "on_rollback"):
        value = getattr(options, name)
        if value is not None and not callable(value):
            raise AttachError(f"{name} must be a callable or None, got {type(value).__name__}")
    if options.transport is not None and not isinstance(options.transport, Transport):
        raise AttachError(
            "transport must have the members of sharpwatch.agent.transport.base.Transport (send_hello, send, receive, "
            f"close, dropped, connection) or be None, got {type(options.transport).__name__}"
        )
    addresses, tls = parse_daemon_addresses(options.address), parse_tls(options.tls)
    has_token = bool(parse_token(options.token) or find_token_file(options.token))
    # The transport of a program's own has neither.
    if options.transport is None:
        check_secrecy(addresses, has_token=has_token, tls=tls)


def possible(probes: tuple[str, ...], model: nn.Module) -> tuple[str, ...]:
    """The probes that will run on `model`: the default ones as far as they can, or all of those that were asked for.

    Raises:
        AttachError: A probe was asked for that can't run on sharded parameters.
    """
    if any(map(is_flat, model.parameters())):
        _LOG.warning(
            "FSDP1's flat parameters are watched as block 'other', without probes; FSDP2 (fully_shard) shows the blocks"
        )
        return ()  # the forward reads tensors of FSDP's own, not the parameters that a probe replaces
    if not probes or not is_sharded(model):
        return probes
    shardable = sharded_probes()
    if probes != DEFAULT_PROBES and not set(probes) <= set(shardable):
        raise AttachError(
            f"probes must be any of {', '.join(map(repr, shardable))} where parameters are sharded "
            f"(FSDP2, tensor parallel), got {probes!r}"
        )
    try:
        DataRank.of(model)
    except ProbeError as error:
        raise AttachError(f"probes must be () for this model, got {probes!r}: {error}") from error
    # The default probes are narrowed in silence: nobody asked for them by name.
    return tuple(probe for probe in probes if probe in shardable)


def require_placed(idle_rules: Sequence[Mapping[str, str]], source: str) -> None:
    """Raise `AttachError` where a rule of the user's places nothing on any rank; a pipeline's stages share them.

    Args:
        idle_rules: Of each rank, the rules that place nothing there, with the reason; a reason is empty where one does.
        source: Where the rules are from.
    """
    idle = {match: why for each in idle_rules for match, why in each.items()}
    for match, why in idle.items():
        if all(each.get(match, why) for each in idle_rules):
            raise AttachError(f"{source}: rule {match!r} places nothing: {why}")


def _check_training(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    if not isinstance(model, nn.Module):
        raise AttachError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    _check_parameters(model)
    own = {id(parameter) for parameter in model.parameters()}
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise AttachError("model must have a parameter that requires a gradient, got one without")
    if unreadable_parameters(model):
        raise AttachError(f"model: {unreadable_parameters(model)}")
    if not optimizers:
        raise AttachError("optimizer must be one torch.optim.Optimizer or several, got none")
    if len({id(each) for each in optimizers}) < len(optimizers):
        raise AttachError("optimizer must name each optimizer once, got the same one twice")
    for i, each in enumerate(optimizers):
        if not isinstance(each, torch.optim.Optimizer):
            raise AttachError(f"optimizer[{i}] must be a torch.optim.Optimizer, got {type(each).__name__}")
        if not any(id(parameter) in own for group in each.param_groups for parameter in group["params"]):
            raise AttachError(f"optimizer[{i}] must hold a parameter of this model; {type(each).__name__} holds none")
        # The multipliers of two watches would be applied on top of each other.
        if any(isinstance(hook, Hook) for hook in each._optimizer_step_pre_hooks.values()):  # noqa: SLF001 - no public way
            raise AttachError(f"optimizer[{i}]: {type(each).__name__} is watched already; close() that watch first")


def _check_parameters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise AttachError(f"model: {name} has no shape yet; call the model once before attach")
        if parameter.is_meta:
            raise AttachError(f"model: {name} is on the meta device, without values; initialize it before attach")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise AttachError(f"model: {name or 'it'} is a ScriptModule, which probes can't call with other weights")


def _check_numbers(options: Options) -> None:
    budget, probe_every, lr_bounds = options.overhead_budget, options.probe_every, options.lr_bounds
    initial_step, seed = options.initial_step, options.seed
    # Types are checked before values: a comparison with text would raise a TypeError that names no option.
    if not (_is_number(budget) and 0 < budget <= 1):
        raise AttachError(
            f"overhead_budget must satisfy 0 < overhead_budget <= 1 (a share of step time), got {budget!r}"
        )
    if probe_every is not None and not (_is_integer(probe_every) and probe_every >= 1):
        raise AttachError(f"probe_every must be None or a whole number of steps >= 1, got {probe_every!r}")
    if not (_is_integer(options.early_probes) and options.early_probes >= 0):
        raise AttachError(f"early_probes must be a whole number of steps >= 0, got {options.early_probes!r}")
    if not (isinstance(lr_bounds, tuple | list) and len(lr_bounds) == 2 and all(map(_is_number, lr_bounds))):
        raise AttachError(f"lr_bounds must be two numbers (low, high), got {lr_bounds!r}")
    if not 0 < lr_bounds[0] <= 1 <= lr_bounds[1] < math.inf:
        raise AttachError(f"lr_bounds must satisfy 0 < low <= 1 <= high, got {lr_bounds!r}")
    if not (_is_integer(initial_step) and initial_step >= 0):
        raise AttachError(f"initial_step must be a whole number >= 0, got {initial_step!r}")
    if not (_is_integer(seed) and 0 <= seed < 2**63):
        raise AttachError(f"seed must be a whole number, 0 <= seed < 2**63, got {seed!r}")


def _check_names(options: Options) -> None:
    training_job, run, control = options.training_job, options.run, options.control
    if not _is_name(training_job, _LONGEST_NAME - 32):  # a run's name adds up to 32
        raise AttachError(
            f"training_job must have 1 to {_LONGEST_NAME - 32} printable characters, got {training_job!r}"
        )
    if run is not None and not _is_name(run, _LONGEST_NAME):
        raise AttachError(f"run must have 1 to {_LONGEST_NAME} printable characters, or be None, got {run!r}")
    if options.data_order is not None and not _is_name(options.data_order, MAX_DATA_ORDER):
        raise AttachError(
            f"data_order must have 1 to {MAX_DATA_ORDER} printable characters, or be None, got {options.data_order!r}"
        )
    _check_labels(options.labels)
    if control not in CONTROL_MODES:
        raise AttachError(f"control must be one of {', '.join(map(repr, CONTROL_MODES))}, got {control!r}")


def _check_labels(labels: object) -> None:
    if labels is None:
        return
    if not isinstance(labels, Mapping) or len(labels) > MAX_LABELS:
        raise AttachError(f"labels must be a dict of at most {MAX_LABELS}, or None, got {labels!r}")
    for name, value in labels.items():
        wrong = wrong_label(name, value)
        if wrong:
            raise AttachError(f"labels: {wrong}")


def _check_probes(probes: Sequence[str], optimizers: Sequence[torch.optim.Optimizer]) -> None:
    listed = isinstance(probes, Collection) and not isinstance(probes, str) and all(isinstance(p, str) for p in probes)
    if not listed or any(probe not in PROBES for probe in probes) or len(set(probes)) < len(probes):
        raise AttachError(f"probes must be any of {', '.join(map(repr, PROBES))}, each once, got {probes!r}")
    for probe, check_optimizers in ((probe, PROBES[probe].check) for probe in probes):
        try:
            if check_optimizers is not None:
                check_optimizers(optimizers)
        except ProbeError as error:
            raise AttachError(f"probes can't have {probe!r} for these optimizers, got {probes!r}: {error}") from error


def _is_name(value: object, longest: int) -> bool:
    return isinstance(value, str) and 0 < len(value) <= longest and value.isprintable()


def _is_number(value: object) -> bool:
    # True and False are integers in Python, but as an option's value a mistake.
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
