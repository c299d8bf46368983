"""Builds the whole daemon, serves gRPC and HTTP until a signal stops it, and drains."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

import structlog
from prometheus_client import CollectorRegistry

from sharpwatch._version import __version__
from sharpwatch.common.endpoint import without_password
from sharpwatch.common.shards import every_run, parse_shard
from sharpwatch.daemon.api.agent_service import AgentService, Sessions
from sharpwatch.daemon.api.auth import Authorizer
from sharpwatch.daemon.api.call_guard import CallGuard
from sharpwatch.daemon.api.foreign_alerts import ForeignAlerts
from sharpwatch.daemon.api.grpc_server import GrpcServer
from sharpwatch.daemon.api.http_server import HttpServer
from sharpwatch.daemon.api.limits import ConnectionLimits, raise_descriptor_limit
from sharpwatch.daemon.api.operator_service import DaemonInfo, OperatorService, rules_of
from sharpwatch.daemon.api.server_tls import ServerTls
from sharpwatch.daemon.config.settings import Config
from sharpwatch.daemon.decisions.gate import AskGate, Gate, no_gate
from sharpwatch.daemon.decisions.muting import Silences
from sharpwatch.daemon.decisions.run_controller import RunController
from sharpwatch.daemon.detection.thresholds import Budget
from sharpwatch.daemon.estimation.estimator import Estimator
from sharpwatch.daemon.exporter.metrics import Exposition, RunCollector
from sharpwatch.daemon.exporter.own_metrics import OwnMetrics
from sharpwatch.daemon.gate_webhook import GateWebhook
from sharpwatch.daemon.held_shards import HeldShards
from sharpwatch.daemon.ingest.hello import RunHello
from sharpwatch.daemon.ingest.samples import SampleQueue
from sharpwatch.daemon.logs import configure_logs
from sharpwatch.daemon.notifier import Notifier
from sharpwatch.daemon.pipeline import Pipeline
from sharpwatch.daemon.rules import Rules, configure_runs
from sharpwatch.daemon.run_loader import RunLoader
from sharpwatch.daemon.runs.run import Runs
from sharpwatch.daemon.shard_keeper import LOOK_SECONDS, ShardKeeper, run_of
from sharpwatch.daemon.storage import catalog
from sharpwatch.daemon.storage.journal import Store
from sharpwatch.errors import SharpwatchError, StoreError

log = structlog.get_logger(__name__)

DRAIN_SECONDS = 2.0
RETRY_AFTER_SECONDS = 1.0
# A second bound beside the number of samples: one sample may have 16 MiB, and 4096 of those would be 64 GiB. A run's
# share is what its courier holds.
QUEUE_BYTES, RUN_QUEUE_BYTES = 256 * 2**20, 64 * 2**20


def run(config: Config, reload: Callable[[], Config]) -> int:
    """Serves until SIGTERM or SIGINT; at SIGHUP, takes up the rules of the configuration anew.

    Args:
        config: The checked configuration.
        reload: Reads and checks it anew.

    Returns:
        The exit status: 0 after a signal, 1 if the daemon could not start or failed.
    """
    configure_logs(config.daemon.log_level)
    try:
        return asyncio.run(_main(config, reload))
    except SharpwatchError as error:
        log.error("not_serving", reason=str(error))  # noqa: TRY400  the message is the reason
        return 1


async def _main(config: Config, reload: Callable[[], Config]) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    # Through the loop: a handler of `signal` runs between any two bytecodes, and must not call into asyncio.
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    rules = Rules(config, reload)
    loop.add_signal_handler(signal.SIGHUP, rules.reload)
    async with serving(config, rules) as daemon:
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((stopping, *daemon.workers), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        # Without its worker the daemon would take samples that nobody journals, and without its shards it would know
        # what is out of date. So it ends and a supervisor sees it.
        for worker in daemon.workers:
            if worker.done():
                log.critical("worker_failed", exc_info=worker.exception())
                return 1
        log.info("stopping")
    log.info("stopped")
    return 0


@dataclass(frozen=True, slots=True, eq=False)
class Daemon:
    """A running daemon: its addresses, the tasks that must not end before it, and whether its live runs are back."""

    grpc: str
    http: str
    workers: tuple[asyncio.Task[None], ...]
    restored: asyncio.Event


@asynccontextmanager
async def serving(config: Config, rules: Rules | None = None) -> AsyncIterator[Daemon]:  # noqa: PLR0915  the parts of the daemon, one by one
    """Runs a daemon for the length of a `with`, and drains it at the end.

    Args:
        config: The checked configuration.
        rules: Says what of it is in force; None for all of it, for good.

    Raises:
        SharpwatchError: It can't start.
    """
    settings = config.daemon
    rules = Rules(config, lambda: config) if rules is None else rules
    # Before anything is opened: an address that must not be served leaves no journal and no token file behind.
    authorizer = Authorizer.of(settings)
    tls = None if settings.tls is None else ServerTls(settings.tls)
    registry = CollectorRegistry()
    shards = HeldShards(parse_shard(settings.shard))
    is_shared = shards.own.count > 1
    silences = Silences()
    gate = Gate(lambda made: asking.ask(made))  # noqa: PLW0108  defined below
    let_pass = gate.judge if config.gate.webhook else no_gate
    runs = Runs(
        lambda hello, earlier: _controller(rules.config, silences, let_pass, hello, earlier),
        run_window_bytes=settings.run_window_bytes,
        window_bytes=settings.window_bytes,
        on_cut=lambda probe: metrics.cut_readings.labels(probe).inc(),
    )
    async with AsyncExitStack() as stack:
        store = await Store.open(
            settings.store,
            retain_samples=settings.retain_samples,
            retain_days=settings.retain_days,
            retain_bytes=settings.retain_bytes,
            shard=shards.own,
            holds=shards.holds,
        )
        stack.push_async_callback(store.close)
        shards.add(shards.own.index)  # anew: another daemon may have had it until now
        estimator = Estimator(settings.device)
        stack.callback(estimator.close)
        queue = SampleQueue(
            settings.queue_capacity,
            QUEUE_BYTES,
            RUN_QUEUE_BYTES,
            on_evict=lambda entry: sessions.evicted(entry),  # noqa: PLW0108  defined below
        )
        metrics = OwnMetrics(
            registry,
            queue_depth=lambda: queue.depth,
            queue_capacity=queue.capacity,
            certificate_seconds=None if tls is None else lambda: tls.seconds_left,
            shards_held=[partial(shards.is_held, shard) for shard in range(shards.own.count)] if is_shared else (),
        )
        sessions = Sessions(metrics)
        exposition = Exposition(
            registry,
            RunCollector(runs.snapshots, time.time, stale_after=settings.stale_after, layers=settings.layer_metrics),
        )
        notifier = Notifier(config.notifications, metrics, store.keep_notifications)
        asking = GateWebhook(config.gate, metrics)
        pipeline = Pipeline(
            runs=runs,
            queue=queue,
            store=store,
            estimator=estimator,
            metrics=metrics,
            on_journalled=sessions.acknowledge,
            on_command=sessions.command,
            on_records=notifier.tell,
        )
        silences.restore(await store.silences())
        notifier.restore([row for row in await store.notifications() if shards.holds(run_of(row))], (), ())
        loader = RunLoader(runs, store, pipeline, shards)
        stack.push_async_callback(loader.close)
        alerts = ForeignAlerts(
            names=config.foreign_alerts,
            runs=runs,
            loader=loader,
            pipeline=pipeline,
            authorizer=authorizer,
            metrics=metrics,
        )
        restored = asyncio.Event()
        limits = ConnectionLimits.of(raise_descriptor_limit())
        http_server = HttpServer(
            exposition,
            alerts,
            unready=lambda: pipeline.store_error or ("" if restored.is_set() else "restoring"),
            reader=authorizer if settings.metrics_auth == "token" else None,
            tls=tls,
            most=limits.http,
        )
        http = await http_server.start(settings.http)
        stack.push_async_callback(http_server.stop)
        guard = CallGuard(authorizer, metrics)
        agents = AgentService(
            runs=runs,
            loader=loader,
            queue=queue,
            pipeline=pipeline,
            sessions=sessions,
            authorizer=authorizer,
            guard=guard,
            metrics=metrics,
        )
        info = DaemonInfo(
            time.monotonic(),
            estimator.device,
            without_password(settings.store),
            http,
            **rules_of(config),
        )
        operators = OperatorService(
            runs=runs,
            loader=loader,
            silences=silences,
            pipeline=pipeline,
            store=store,
            authorizer=authorizer,
            release=agents.release,
            info=info,
            shards=shards,
        )
        server = GrpcServer(guard, tls, most=limits.grpc)
        address = await server.start(settings.grpc, agents, operators, reflects=settings.reflection)
        shards.address = settings.advertise or address
        for take_up in (partial(configure_runs, runs), alerts.configure, operators.configure):
            rules.follow(take_up)
        # Only once every address is bound, so that a start which fails has no worker to stop.
        worker = asyncio.create_task(pipeline.run(), name="pipeline")
        workers = [worker]
        beside = [
            asyncio.create_task(pipeline.watch_stalls(lambda: rules.config.detection), name="stalls"),
            asyncio.create_task(sessions.end_revoked(authorizer), name="revoked"),
            asyncio.create_task(notifier.run(), name="notifications"),
            asyncio.create_task(asking.run(gate), name="gate"),
        ]
        log.info("serving", grpc=address, http=http, device=estimator.device, store=store.name, version=__version__)
        restore = partial(_restore, loader, runs, store, notifier, pipeline, settings.stale_after)

        async def ready() -> None:
            restored.set()
            await server.be_ready()

        beside.append(asyncio.create_task(restore(every_run, ready), name="restore"))
        if is_shared:
            keeper = ShardKeeper(
                shards=shards,
                store=store,
                runs=runs,
                loader=loader,
                pipeline=pipeline,
                sessions=sessions,
                notifier=notifier,
                silences=silences,
                restore=restore,
            )
            workers.append(asyncio.create_task(keeper.run(), name="shards"))
            beside.append(workers[-1])
        try:
            yield Daemon(address, http, tuple(workers), restored)
        finally:
            for task in beside:
                task.cancel()
            # No new session, then an unhealthy state, then the worker, whose last write still acknowledges to open
            # sessions. Those are drained after that, so that agents send again only samples that are not journalled.
            agents.draining = True
            await server.leave()
            pipeline.stop()
            # Not `await worker`: its own error is logged in `_main`, and must not keep the rest from being stopped.
            await asyncio.wait((worker,))
            await notifier.keep()  # of the worker's last write, too
            # A watch waits for a change of its run, which no longer comes, and would hold up `server.stop`.
            operators.drain()
            sessions.drain("the daemon is stopping", RETRY_AFTER_SECONDS)
            await server.stop(DRAIN_SECONDS)


async def _restore(  # noqa: PLR0913, PLR0917  what comes back, and who is told
    loader: RunLoader,
    runs: Runs,
    store: Store,
    notifier: Notifier,
    pipeline: Pipeline,
    live_for: float,
    of: Callable[[str], bool],
    ready: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Brings back the live runs that this daemon has from now on, while it serves; then those that may be needed.

    Where the journal can't be read, it tries again until it can.

    Args:
        loader: Brings them back.
        runs: Where they are then.
        store: The journal.
        notifier: Goes on with what the journal has of their notifications.
        pipeline: Counts an error of the daemon itself, which leaves them in the journal until they are asked for.
        live_for: Seconds since a run was heard of.
        of: Which of the runs that it holds are meant.
        ready: Called once the live ones are back.
    """
    began = time.monotonic()
    while True:
        try:
            rest = await _restore_live(loader, runs, store, notifier, live_for, of)
            break
        except StoreError as error:
            # Meanwhile each run is asked for again by its trainer, and by whoever names it.
            log.error("not_restored", reason=str(error))  # noqa: TRY400  the message is the reason
            await asyncio.sleep(LOOK_SECONDS)
        except Exception:  # nobody awaits this task, and would hear of it; counted
            pipeline.count_internal_error("restore")
            log.exception("not_restored")
            return
    if ready is not None:
        await ready()
    log.info("ready", runs=sum(of(run.name) for run in runs), seconds=round(time.monotonic() - began, 3))
    await loader.bring_back(rest)


async def _restore_live(  # noqa: PLR0913, PLR0917  as above
    loader: RunLoader, runs: Runs, store: Store, notifier: Notifier, live_for: float, of: Callable[[str], bool]
) -> list[str]:
    """Brings back the live runs with their notifications; returns the names of those that may be needed."""
    rest = await loader.bring_back_live(time.time() - live_for, of)
    rows = [row for row in await store.notifications() if loader.holds(run_of(row)) and of(run_of(row))]
    # Of ended runs, too: the webhook may not know yet how it ended.
    incidents, decisions = await store.ask(partial(catalog.told, ids=[row.fingerprint for row in rows]))
    mine = [run for run in runs if of(run.name)]
    kept = {each.id: each for each in incidents} | {each.id: each for run in mine for each in run.controller.incidents}
    made = {each.id: each for each in decisions} | {each.id: each for run in mine for each in run.controller.decisions}
    notifier.restore((), kept.values(), made.values())
    return rest


def _controller(
    config: Config, silences: Silences, gate: AskGate, hello: RunHello, earlier: RunController | None
) -> RunController:
    """Makes the controller of a new attempt, which takes over all that the run's `earlier` one knows."""
    controller = RunController(
        hello.run,
        layer_blocks=hello.layer_blocks,
        parameters=hello.parameters,
        parameter_names=hello.parameter_names,
        policies=config.policies,
        budget=Budget.of(config.detection.of(hello.all_labels)),
        control=hello.control,
        lr_bounds=hello.lr_bounds,
        can_roll_back=hello.can_roll_back,
        takes_intervals=hello.takes_update_intervals,
        silences=silences.active,
        maintenance=config.maintenance,
        autopilot=config.autopilot,
        gate=gate,
    )
    if earlier is not None:
        controller.take_over(earlier)
    return controller
