"""`attach`: checks the options, synchronizes with the other ranks, and constructs the `WatchedRun`."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch
from torch import nn

from sharpwatch.agent.control.commands import RollbackRequest
from sharpwatch.agent.control.controller import CONTROL_MODES, Controller
from sharpwatch.agent.control.lr_multipliers import LrMultipliers, own_rates, parameter_types
from sharpwatch.agent.distributed.rendezvous import Rendezvous, check_initialized, rendezvous_for
from sharpwatch.agent.distributed.strategy import Strategy, connect
from sharpwatch.agent.optimizers.support import stepping_optimizer
from sharpwatch.agent.options import Options, check, possible
from sharpwatch.agent.probes.builtin import DEFAULT_PROBES
from sharpwatch.agent.probes.runner import ProbeRunner
from sharpwatch.agent.probes.scheduler import OverheadBudget, ProbeScheduler
from sharpwatch.agent.reporting import Identity, Reporter, hello_message
from sharpwatch.agent.safety import ExceptionBarrier, warn
from sharpwatch.agent.transport import courier_launcher
from sharpwatch.agent.transport.base import NullTransport, Transport
from sharpwatch.agent.transport.courier_handle import CourierHandle
from sharpwatch.agent.watch import Watch
from sharpwatch.agent.watched_run import WatchedRun
from sharpwatch.blocks import BlockMap, RulesLike, classify_reporting_unused, report_unplaced
from sharpwatch.common.endpoint import DEFAULT_ADDRESS
from sharpwatch.curvature.parameters.trained import trained_parameters
from sharpwatch.errors import AttachError, BlockError, ConfigError
from sharpwatch.wire import SKETCH_SIZE

_LOG = logging.getLogger("sharpwatch")


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
    early_probes: int = 0,
    probes: Sequence[str] = DEFAULT_PROBES,
    loss_fn: Callable[..., Any] | None = None,
    logits_fn: Callable[..., Any] | None = None,
    on_rollback: Callable[[RollbackRequest], object] | None = None,
    control: str = "lr",
    lr_bounds: tuple[float, float] = (0.01, 10.0),
    initial_step: int = 0,
    seed: int = 0,
    rules: RulesLike | None = None,
    strict: bool = False,
    data_order: str | None = None,
    labels: Mapping[str, str] | None = None,
    transport: Transport | None = None,
) -> Watch:
    """Watch `model` while `optimizer` trains it.

    Registers hooks on the model and the optimizers; the training loop itself stays as it is. Each step is sampled, and
    probes measure curvature as often as their share of the step time allows. On several ranks call it on all of them,
    with the same options.

    Args:
        model: The model in training. Wrappers (DDP, FSDP2, DeepSpeed, torch.compile) are seen through.
        optimizer: The optimizer that trains it, or several that step together.
        training_job: The name of what is trained; all attempts at it share this name.
        run: The name of this attempt; by default `training_job` with the time and a random suffix.
        address: The daemon's, as "HOST:PORT" or "unix:PATH"; by default `$SHARPWATCH_ADDRESS`, then "127.0.0.1:7741".
            Of several daemons that share the runs, the addresses of all shards in order, with commas between them.
        token: The bearer token of the daemon, where it asks for one; by default the one in the file that
            $SHARPWATCH_TOKEN_FILE names, which may be replaced during the run. It is sent to this machine, or over TLS.
        tls: PEM files by name: "ca", and for mutual TLS "cert" with "key"; by default those that $SHARPWATCH_TLS_CA,
            $SHARPWATCH_TLS_CERT and $SHARPWATCH_TLS_KEY name, if any. Without, it connects without TLS.
        overhead_budget: The share of step time that probes and sampling may take together.
        probe_every: Run every probe each so many steps, and ignore `overhead_budget`.
        early_probes: Up to this step, also run the "direction" probe at every third step, whatever it costs; the
            autopilot needs about 62. The budget is not charged for these.
        probes: Any of "gnb", "direction", "hutchinson", "lanczos", "linesearch", "gradient_noise" and
            "preconditioned".
        loss_fn: `loss_fn(model, batch)` for probes: the mean loss of `model(*batch.args, **batch.kwargs)`. By default
            probes call the model as its last forward did, and take the loss of its output.
        logits_fn: `logits_fn(model, batch)` for the "gnb" probe: the logits, and a mask of the positions that predict.
        on_rollback: Called after the step at which a rollback is due; restores the checkpoint of the request. What it
            raises reaches the training loop.
        control: Which commands are taken. "none": no command. "lr": learning-rate changes within `lr_bounds`, and
            rollbacks if `on_rollback` is given. "rollback": both, for `Checkpoints` and for loops that read
            `watch.pending_rollback`.
        lr_bounds: The smallest and the largest multiplier of a learning rate that is accepted.
        initial_step: Optimizer steps already taken, where training goes on from a checkpoint.
        seed: Seeds what probes draw; the global random state is never used.
        rules: Block rules that take precedence over what is known: a dict by glob, such as `{"*.gizmo": "ffn"}`, a list
            of rules, or the path of a YAML file. By default the file that $SHARPWATCH_BLOCK_RULES names, if any.
        strict: Raise where a parameter's block is not known. By default such a parameter is watched as block "other",
            with one warning that has the rule to write.
        data_order: A name for the order of the data, of at most 200 characters, such as the seed and version of the
            loader. Runs of the same name see the same batch at the same step; where one has an incident, the daemon
            tells by the others whether the data brought it about. By default runs whose first losses are equal.
        labels: The run's own labels, such as `{"team": "nlp"}`: the daemon's configuration can have other thresholds
            for runs that have them.
        transport: Carries samples and commands instead of a courier process, as `sharpwatch.testing.InMemoryTransport`
            does in tests; `address`, `token` and `tls` are then not used. Used on rank 0 alone.

    Returns:
        The watch, which is also a context manager that closes itself.

    Raises:
        AttachError: An option is wrong, or the model or an optimizer can't be watched. Nothing has been started then.

    Environment:
        SHARPWATCH_ADDRESS: The daemon's address where `address` is not given.
        SHARPWATCH_BLOCK_RULES: A YAML file of rules that say which parameter belongs to which block, where `rules` is
            not given.
        SHARPWATCH_TOKEN_FILE: A file with the token, mode 0600, where `token` is not given.
        SHARPWATCH_TLS_CA: As `tls["ca"]`, where `tls` is not given; so SHARPWATCH_TLS_CERT and SHARPWATCH_TLS_KEY.
        SHARPWATCH_DISABLED: With the value 1 nothing is watched, and the watch returned does nothing.
    """
    if courier_launcher.ENVIRONMENT in os.environ:
        # Training here too would overwrite the first program's files, and start a third program in turn.
        raise AttachError(
            "this process was started as the courier of another one: sys.executable there is this program, not Python"
        )
    given = (optimizer,) if isinstance(optimizer, str) or not isinstance(optimizer, Iterable) else tuple(optimizer)
    options = Options(
        model=model,
        optimizers=tuple(stepping_optimizer(each, model) for each in given),
        training_job=training_job,
        run=run,
        address=os.environ.get("SHARPWATCH_ADDRESS") or DEFAULT_ADDRESS
        if address is None or address == ""
        else address,
        token=token,
        tls=tls,
        overhead_budget=overhead_budget,
        probe_every=probe_every,
        early_probes=early_probes,
        probes=probes,
        loss_fn=loss_fn,
        logits_fn=logits_fn,
        on_rollback=on_rollback,
        control=control,
        lr_bounds=lr_bounds,
        initial_step=initial_step,
        seed=seed,
        rules=rules,
        strict=strict,
        data_order=data_order,
        labels=labels,
        transport=transport,
    )
    name = run if run is not None else f"{training_job}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
    disabled = os.environ.get("SHARPWATCH_DISABLED") == "1"
    rendezvous = rendezvous_for(model)
    # The checks run within it: a wrong option on one rank then raises on all, and no rank waits for it.
    with rendezvous.attending():
        check(options)
        if not disabled:
            return Watch(name, initial_step, _watched(options, name, rendezvous))
    # A disabled rank says so and goes on; otherwise the others would wait for it until they time out.
    rendezvous.refuse("sharpwatch is disabled there, and must be on all ranks or none")
    return Watch(name, initial_step, None, disabled=True)


def _classified(options: Options) -> tuple[BlockMap, Mapping[str, str]]:
    """The blocks of what is trained, and the rules that place nothing."""
    try:
        block_map, idle_rules = classify_reporting_unused(options.model, options.block_rules)
    except (BlockError, ConfigError) as error:
        raise AttachError(f"{options.rules_source}: {error}") from error
    block_map = block_map.restricted_to(trained_parameters(options.model))
    if options.strict:
        try:
            report_unplaced(block_map, strict=True)
        except BlockError as error:
            raise AttachError(f"model: {error}") from error
    return block_map, idle_rules


def _watched(options: Options, run: str, rendezvous: Rendezvous) -> WatchedRun:
    """The watched run on this rank, once every rank has made its own."""
    check_initialized()
    blocks = _classified(options)
    options = replace(options, probes=possible(tuple(options.probes), options.model))
    barrier = ExceptionBarrier()
    strategy = connect(rendezvous, options, blocks, run, barrier)
    # A stage of a pipeline can't be called on a batch by itself.
    if not strategy.may_probe:
        options = replace(options, probes=())
    if strategy.is_rank_zero:
        report_unplaced(strategy.block_map, strict=False)
    if strategy.layout.unreadable:
        _LOG.warning("gradient norms are not readable: %s", strategy.layout.unreadable)
    identity = _identity(options, strategy.run, takes_update_intervals=not strategy.interval_refusal)
    types = parameter_types(options.model, strategy.block_map, options.optimizers)
    control = _control(options, strategy, types)
    transport = _transport(options) if strategy.is_rank_zero else NullTransport()
    # The hello starts no courier yet, so nothing is left running if another rank refuses.
    try:
        transport.send_hello(hello_message(identity, strategy.block_map))
        strategy.wait_for_start()
    except AttachError:
        transport.close()
        raise
    scheduler = _scheduler(options, strategy, barrier)
    reporter = Reporter(
        transport,
        tap=strategy.tap,
        control=control,
        budget=scheduler.budget,
        failures=lambda: scheduler.runner.failures,
        swallowed_errors=lambda: strategy.swallowed_errors(barrier.swallowed),
        objective=lambda: scheduler.runner.objective,
    )
    return WatchedRun(
        options,
        identity,
        strategy,
        control=control,
        scheduler=scheduler,
        reporter=reporter,
        rates=LrMultipliers(options.optimizers, types, control),
        transport=transport,
        barrier=barrier,
    )


def _scheduler(options: Options, strategy: Strategy, barrier: ExceptionBarrier) -> ProbeScheduler:
    probes = ProbeRunner(
        options.probes,
        options.model,
        strategy.block_map,
        options.optimizers,
        seed=options.seed,
        sketch_size=SKETCH_SIZE,
        loss_fn=options.loss_fn,
        logits_fn=options.logits_fn,
        barrier=barrier,
        several_ranks=strategy.several_ranks,
        shards=strategy.shard_reduction,
    )
    budget = OverheadBudget(
        options.probes,
        budget=options.overhead_budget,
        probe_every=options.probe_every,
        early_probes=options.early_probes,
    )
    return ProbeScheduler(probes, budget, strategy)


def _transport(options: Options) -> Transport:
    if options.transport is not None:
        return options.transport
    return CourierHandle(address=options.address, token=options.token, tls=options.tls)


def _identity(options: Options, run: str, *, takes_update_intervals: bool) -> Identity:
    return Identity(
        training_job=options.training_job,
        run=run,
        # Tells the attempts at a run apart, also two that begin at the same step.
        attempt=secrets.token_hex(16),
        optimizer="+".join(type(each).__name__ for each in options.optimizers),
        control=options.control,
        lr_bounds=options.bounds,
        initial_step=options.initial_step,
        seed=options.seed,
        probes=tuple(options.probes),
        can_roll_back=options.control == "rollback" or (options.control == "lr" and options.on_rollback is not None),
        started_at_unix_ns=time.time_ns(),
        data_order=options.data_order or "",
        labels=dict(options.labels or {}),
        takes_update_intervals=takes_update_intervals,
    )


def _control(options: Options, strategy: Strategy, types: Mapping[int, frozenset[str]]) -> Controller:
    if strategy.lr_refusal:
        _LOG.warning("learning rates are watched, but can't be changed: %s", strategy.lr_refusal)
    return Controller(
        next(mode for mode in CONTROL_MODES if mode == options.control),
        bounds=options.bounds,
        blocks=strategy.block_map.blocks,
        parameter_types=frozenset(types.values()),
        has_callback=options.on_rollback is not None,
        lr_refusal=strategy.check_lr,
        interval_refusal=strategy.interval_refusal,
        # Every rank comes to the same results, so one of them logs them.
        log=partial(warn, "%s") if strategy.is_rank_zero else lambda _: None,
        own_rates=partial(own_rates, options.optimizers, types),
    )
