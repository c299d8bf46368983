"""What `attach` is given, and what of it can be wrong."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from sharpwatch.agent.control.commands import RollbackRequest
from sharpwatch.agent.control.controller import CONTROL_MODES
from sharpwatch.agent.instrumentation.hooks import Hook
from sharpwatch.agent.optimizers.support import is_flat, unreadable_parameters
from sharpwatch.agent.probes.builtin import DEFAULT_PROBES, PROBES, sharded_probes
from sharpwatch.agent.transport.base import Transport
from sharpwatch.agent.transport.destination import parse_daemon_address, parse_tls, parse_token
from sharpwatch.curvature.parameters.fsdp import DataRank
from sharpwatch.curvature.parameters.shards import is_sharded
from sharpwatch.errors import AttachError, ProbeError

_LOG = logging.getLogger("sharpwatch")
_LONGEST_NAME = 253  # what the daemon takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `attach` was given; `optimizers` are those that take the steps."""

    model: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]
    training_job: str
    run: str | None
    address: str
    token: str | None
    tls: Mapping[str, str] | None
    overhead_budget: float
    probe_every: int | None
    probes: Sequence[str]
    loss_fn: Callable[..., Any] | None
    logits_fn: Callable[..., Any] | None
    on_rollback: Callable[[RollbackRequest], object] | None
    control: str
    lr_bounds: tuple[float, float]
    initial_step: int
    seed: int
    transport: Transport | None

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest multiplier."""
        low, high = self.lr_bounds
        return float(low), float(high)

    @property
    def equal(self) -> Mapping[str, object]:
        """What all ranks of a run must give alike."""
        return {
            "training_job": self.training_job,
            "run": self.run,
            "probe_every": self.probe_every,
            "probes": self.probes,
            "control": self.control,
            "lr_bounds": self.bounds,
            "initial_step": self.initial_step,
            "seed": self.seed,
            "on_rollback": self.on_rollback is not None,
        }


def check(options: Options) -> None:
    """Raise `AttachError` on what a user got wrong."""
    _check_training(options.model, options.optimizers)
    _check_numbers(options)
    _check_words(options)
    _check_probes(options.probes, options.optimizers)
    for name in ("loss_fn", "logits_fn", "on_rollback"):
        value = getattr(options, name)
        if value is not None and not callable(value):
            raise AttachError(f"{name}: expected a callable or None, got {type(value).__name__}")
    if options.transport is not None and not isinstance(options.transport, Transport):
        raise AttachError(
            "transport must have the members of sharpwatch.agent.transport.base.Transport (greet, send, receive, "
            f"close, dropped, connection) or be None, got {type(options.transport).__name__}"
        )
    parse_daemon_address(options.address)
    parse_token(options.token)
    parse_tls(options.tls)


def possible(probes: tuple[str, ...], model: nn.Module) -> tuple[str, ...]:
    """The probes that can run on `model`: of the default ones those that can, of others all, or it raises."""
    if any(map(is_flat, model.parameters())):
        _LOG.warning(
            "FSDP's flat parameters are watched as block 'other', without probes; fully_shard (FSDP2) shows the blocks"
        )
        return ()  # the forward reads FSDP's own tensors, not those that a probe puts in their place
    if not probes or not is_sharded(model):
        return probes
    shardable = sharded_probes()
    if probes != DEFAULT_PROBES and not set(probes) <= set(shardable):
        raise AttachError(
            f"probes={probes!r}: where parameters are sharded (FSDP2, tensor parallel) "
            f"allowed is any of {', '.join(map(repr, shardable))}"
        )
    try:
        DataRank.of(model)
    except ProbeError as error:
        raise AttachError(f"probes={probes!r}: {error}; give probes=()") from error
    return tuple(probe for probe in probes if probe in shardable)


def _check_training(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    if not isinstance(model, nn.Module):
        raise AttachError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    _check_material(model)
    own = {id(parameter) for parameter in model.parameters()}
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise AttachError("model: has no trainable parameter")
    if unreadable_parameters(model):
        raise AttachError(f"model: {unreadable_parameters(model)}")
    if not optimizers:
        raise AttachError("optimizer: expected one torch.optim.Optimizer or several, got none")
    if len({id(each) for each in optimizers}) < len(optimizers):
        raise AttachError("optimizer: the same optimizer is given twice")
    for i, each in enumerate(optimizers):
        if not isinstance(each, torch.optim.Optimizer):
            raise AttachError(f"optimizer[{i}]: expected a torch.optim.Optimizer, got {type(each).__name__}")
        if not any(id(parameter) in own for group in each.param_groups for parameter in group["params"]):
            raise AttachError(f"optimizer[{i}]: {type(each).__name__} holds no parameter of this model")
        # Two watches would lay their learning rates over each other's.
        if any(isinstance(hook, Hook) for hook in each._optimizer_step_pre_hooks.values()):  # noqa: SLF001 - no public way
            raise AttachError(f"optimizer[{i}]: {type(each).__name__} is watched already; close() that watch first")


def _check_material(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise AttachError(f"model: {name} has no shape yet; call the model once before attach")
        if parameter.is_meta:
            raise AttachError(f"model: {name} is on the meta device, without values; give it some before attach")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise AttachError(f"model: {name or 'it'} is a ScriptModule, which probes can't call with other weights")


def _check_numbers(options: Options) -> None:
    budget, probe_every, lr_bounds = options.overhead_budget, options.probe_every, options.lr_bounds
    initial_step, seed = options.initial_step, options.seed
    if not (_is_number(budget) and 0 < budget <= 1):
        raise AttachError(f"overhead_budget={budget!r}: allowed is a share of step time above 0, up to 1")
    if probe_every is not None and not (_is_integer(probe_every) and probe_every >= 1):
        raise AttachError(f"probe_every={probe_every!r}: allowed is None or a whole number of steps from 1")
    if not (isinstance(lr_bounds, tuple | list) and len(lr_bounds) == 2 and all(map(_is_number, lr_bounds))):
        raise AttachError(f"lr_bounds={lr_bounds!r}: expected two numbers, (smallest, largest)")
    if not 0 < lr_bounds[0] <= 1 <= lr_bounds[1] < math.inf:
        raise AttachError(f"lr_bounds={lr_bounds!r}: allowed is 0 < smallest <= 1 <= largest")
    if not (_is_integer(initial_step) and initial_step >= 0):
        raise AttachError(f"initial_step={initial_step!r}: allowed is a whole number from 0")
    if not (_is_integer(seed) and 0 <= seed < 2**63):
        raise AttachError(f"seed={seed!r}: allowed is a whole number from 0 below 2**63")


def _check_words(options: Options) -> None:
    training_job, run, control = options.training_job, options.run, options.control
    if not _is_name(training_job, _LONGEST_NAME - 32):  # the rest is for what a run's name adds to it
        raise AttachError(f"training_job={training_job!r}: expected 1 to {_LONGEST_NAME - 32} printable characters")
    if run is not None and not _is_name(run, _LONGEST_NAME):
        raise AttachError(f"run={run!r}: expected 1 to {_LONGEST_NAME} printable characters, or None for a made one")
    if control not in CONTROL_MODES:
        raise AttachError(f"control={control!r}: allowed is {', '.join(map(repr, CONTROL_MODES))}")


def _check_probes(probes: Sequence[str], optimizers: Sequence[torch.optim.Optimizer]) -> None:
    listed = isinstance(probes, Collection) and not isinstance(probes, str)
    if not listed or any(probe not in PROBES for probe in probes) or len(set(probes)) < len(probes):
        raise AttachError(f"probes={probes!r}: allowed is any of {', '.join(map(repr, PROBES))}, each once")
    for check_optimizers in filter(None, (PROBES[probe].check for probe in probes)):
        try:
            check_optimizers(optimizers)
        except ProbeError as error:
            raise AttachError(f"probes={tuple(probes)!r}: {error}") from error


def _is_name(value: object, longest: int) -> bool:
    return isinstance(value, str) and 0 < len(value) <= longest and value.isprintable()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
