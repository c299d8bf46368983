"""`attach`: everything a user can get wrong is found here, before anything starts."""

from __future__ import annotations

import logging
import math
import os
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import torch
from torch import nn

from sharpwatch.agent import messages
from sharpwatch.agent.address import parse_address, parse_tls, parse_token
from sharpwatch.agent.border import Border
from sharpwatch.agent.company import come_together, is_several, stay_away
from sharpwatch.agent.control import CONTROL_MODES, Control, RollbackRequest
from sharpwatch.agent.hooks import Hook
from sharpwatch.agent.kinds import DEFAULT_PROBES, PROBES, SHARDED_PROBES
from sharpwatch.agent.loop import Loop
from sharpwatch.agent.optimizers import is_flat, stepping, uncontrolled, withheld
from sharpwatch.agent.parts import Parts, Pipe, Silence
from sharpwatch.agent.pipe import CourierPipe
from sharpwatch.agent.probes import Probes
from sharpwatch.agent.sampler import Sampler
from sharpwatch.agent.tap import Tap
from sharpwatch.agent.watch import Watch
from sharpwatch.blocks import BlockMap, classify
from sharpwatch.curvature.fsdp import DataRank
from sharpwatch.curvature.shards import is_sharded
from sharpwatch.curvature.step import require_adam
from sharpwatch.errors import AttachError, BlockError, ConfigError, ProbeError
from sharpwatch.wire import SKETCH_SIZE

DEFAULT_ADDRESS = "127.0.0.1:7741"
_LOG = logging.getLogger("sharpwatch")
_LONGEST_NAME = 253  # what the daemon takes


def attach(  # noqa: PLR0913 - the public signature; each has a default that works
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *,
    training_job: str,
    run: str | None = None,
    address: str | None = None,
    token: str | None = None,
    tls: Mapping[str, str] | None = None,
    overhead_budget: float = 0.01,
    probe_every: int | None = None,
    probes: Sequence[str] = DEFAULT_PROBES,
    loss_fn: Callable[..., Any] | None = None,
    logits_fn: Callable[..., Any] | None = None,
    on_rollback: Callable[[RollbackRequest], object] | None = None,
    control: str = "lr",
    lr_bounds: tuple[float, float] = (0.1, 10.0),
    initial_step: int = 0,
    seed: int = 0,
) -> Watch:
    """Watch `model` while `optimizer` (one, or several that step together) trains it.

    `address` defaults to `$SHARPWATCH_ADDRESS`, then 127.0.0.1:7741; `unix:PATH` is a socket. `tls` names PEM files
    ("ca", and "cert" with "key"). `probe_every` fixes the
    probes' cadence and overrides `overhead_budget`. `control`: "none" refuses every command, "lr" takes learning-rate
    changes, and rollbacks where `on_rollback` is given, "rollback" also those for loops that read
    `watch.pending_rollback`. $SHARPWATCH_BLOCK_RULES names a YAML file of rules for `classify`. With
    SHARPWATCH_DISABLED=1 the watch does nothing.

    Raises `AttachError` on what can't be watched; nothing has been started then.
    """
    given = tuple(optimizer) if isinstance(optimizer, Iterable) else (optimizer,)
    optimizers = tuple(stepping(each, model) for each in given)
    disabled = os.environ.get("SHARPWATCH_DISABLED") == "1"
    several = not disabled and isinstance(model, nn.Module) and is_several(model)
    name = run or f"{training_job}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
    try:
        _check_training(model, optimizers)
        _check_numbers(overhead_budget, probe_every, lr_bounds, initial_step, seed)
        _check_words(training_job, run, control)
        _check_probes(probes, optimizers)
        _check_callables({"loss_fn": loss_fn, "logits_fn": logits_fn, "on_rollback": on_rollback})
        where = parse_address(address or os.environ.get("SHARPWATCH_ADDRESS") or DEFAULT_ADDRESS)
        secret, certificates = parse_token(token), parse_tls(tls)
        if disabled:
            return Watch(name, initial_step, None)
        block_map = _classified(model)
        probes = _possible(tuple(probes), model)
    except AttachError as error:
        if several:
            stay_away(str(error))
        raise
    company = None
    if several:
        equal = {
            "training_job": training_job,
            "run": run,
            "probe_every": probe_every,
            "probes": probes,
            "control": control,
            "lr_bounds": tuple(lr_bounds),
            "initial_step": initial_step,
            "seed": seed,
            "on_rollback": on_rollback is not None,
        }
        company = come_together(model, block_map, name, equal)
        name, block_map = company.run, company.block_map
        probes = () if company.staged else probes
    reason = uncontrolled(optimizers, 1 if company is None else company.ranks.size)
    if reason:
        _LOG.warning("learning rates are watched, but can't be changed: %s", reason)
    identity = messages.Identity(
        training_job=training_job,
        run=name,
        attempt=secrets.token_hex(16),
        optimizer="+".join(type(each).__name__ for each in optimizers),
        control=control,
        lr_bounds=(float(lr_bounds[0]), float(lr_bounds[1])),
        initial_step=initial_step,
        seed=seed,
        probes=probes,
        can_roll_back=control == "rollback" or (control == "lr" and on_rollback is not None),
        started_at_unix_ns=time.time_ns(),
    )
    types = _parameter_types(model, block_map, optimizers)
    border = Border()
    tap = Tap(block_map, dict(model.named_parameters()), optimizers, None if company is None else company.shares)
    pipe: Pipe = Silence()
    if company is None or company.ranks.leads:
        pipe = CourierPipe(messages.hello(identity, block_map), address=where, token=secret, tls=certificates)
    parts = Parts(
        identity=identity,
        named=run is not None,
        block_map=block_map,
        model=model,
        optimizers=optimizers,
        parameter_types=types,
        tap=tap,
        probes=Probes(
            probes,
            model,
            block_map,
            optimizers,
            seed=seed,
            sketch_size=SKETCH_SIZE,
            loss_fn=loss_fn,
            logits_fn=logits_fn,
            together=None if company is None else company.together(model),
        ),
        sampler=Sampler(probes, budget=overhead_budget, probe_every=probe_every),
        control=Control(
            next(mode for mode in CONTROL_MODES if mode == control),
            bounds=identity.lr_bounds,
            blocks=block_map.blocks,
            parameter_types=frozenset(types.values()),
            has_callback=on_rollback is not None,
            uncontrolled=f"learning rates can't be changed: {reason}" if reason else "",
        ),
        pipe=pipe,
        border=border,
        on_rollback=on_rollback,
        shared=None if company is None else company.shared(tap, border, next(model.parameters()).device),
    )
    return Watch(name, initial_step, Loop(parts))


def _check_training(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    if not isinstance(model, nn.Module):
        raise AttachError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    own = {id(parameter) for parameter in model.parameters()}
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise AttachError("model: has no trainable parameter")
    if withheld(model):
        raise AttachError(f"model: {withheld(model)}")
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


def _check_numbers(
    budget: float, probe_every: int | None, lr_bounds: tuple[float, float], initial_step: int, seed: int
) -> None:
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


def _check_words(training_job: str, run: str | None, control: str) -> None:
    if not _is_name(training_job, _LONGEST_NAME - 32):  # the rest is for what a run's name adds to it
        raise AttachError(f"training_job={training_job!r}: expected 1 to {_LONGEST_NAME - 32} printable characters")
    if run is not None and not _is_name(run, _LONGEST_NAME):
        raise AttachError(f"run={run!r}: expected 1 to {_LONGEST_NAME} printable characters, or None for a made one")
    if control not in CONTROL_MODES:
        raise AttachError(f"control={control!r}: allowed is {', '.join(map(repr, CONTROL_MODES))}")


def _check_probes(probes: Sequence[str], optimizers: Sequence[torch.optim.Optimizer]) -> None:
    unknown = [probe for probe in probes if probe not in PROBES]
    if isinstance(probes, str) or unknown or len(set(probes)) < len(probes):
        raise AttachError(f"probes={probes!r}: allowed is any of {', '.join(map(repr, PROBES))}, each once")
    if "preconditioned" in probes:
        try:
            require_adam(optimizers)
        except ProbeError as error:
            raise AttachError(f"probes={tuple(probes)!r}: {error}") from error


def _possible(probes: tuple[str, ...], model: nn.Module) -> tuple[str, ...]:
    """The probes that can run on `model`: of the default ones those that can, of others all, or it raises."""
    if any(map(is_flat, model.parameters())):
        _LOG.warning(
            "FSDP's flat parameters are watched as block 'other', without probes; fully_shard (FSDP2) shows the blocks"
        )
        return ()  # the forward reads FSDP's own tensors, not those that a probe puts in their place
    if not probes or not is_sharded(model):
        return probes
    if probes != DEFAULT_PROBES and not set(probes) <= set(SHARDED_PROBES):
        raise AttachError(
            f"probes={probes!r}: where parameters are sharded (FSDP2, tensor parallel) "
            f"allowed is any of {', '.join(map(repr, SHARDED_PROBES))}"
        )
    try:
        DataRank.of(model)
    except ProbeError as error:
        raise AttachError(f"probes={probes!r}: {error}; give probes=()") from error
    return SHARDED_PROBES


def _check_callables(given: Mapping[str, object]) -> None:
    for name, value in given.items():
        if value is not None and not callable(value):
            raise AttachError(f"{name}: expected a callable or None, got {type(value).__name__}")


def _classified(model: nn.Module) -> BlockMap:
    try:
        return classify(model, os.environ.get("SHARPWATCH_BLOCK_RULES"))
    except BlockError as error:
        raise AttachError(f"model: {error}. For attach, $SHARPWATCH_BLOCK_RULES names the file of rules") from error
    except ConfigError as error:
        raise AttachError(f"$SHARPWATCH_BLOCK_RULES: {error}") from error


def _parameter_types(
    model: nn.Module, block_map: BlockMap, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[int, frozenset[str]]:
    """The block types that each parameter shares its learning rate with, by its id."""
    types: dict[str, set[str]] = defaultdict(set)
    for part in block_map.parts:
        types[part.parameter].add(part.type)
    found = {id(parameter): frozenset(types[name]) for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):  # it refuses more than one group
            held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
            every = frozenset().union(*(found.get(key, frozenset()) for key in held))
            found |= dict.fromkeys(held, every)
    return found


def _is_name(value: object, longest: int) -> bool:
    return isinstance(value, str) and 0 < len(value) <= longest and value.isprintable()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
