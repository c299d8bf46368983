"""Builds the whole daemon, serves gRPC and HTTP until a signal stops it, and drains."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import structlog
from prometheus_client import CollectorRegistry

from sharpwatch._version import __version__
from sharpwatch.common.endpoint import without_password
from sharpwatch.daemon.api.agent_service import AgentService, Sessions
from sharpwatch.daemon.api.auth import Authorizer
from sharpwatch.daemon.api.call_guard import CallGuard
from sharpwatch.daemon.api.foreign_alerts import ForeignAlerts
from sharpwatch.daemon.api.grpc_server import GrpcServer
from sharpwatch.daemon.api.http_server import HttpServer
from sharpwatch.daemon.api.limits import ConnectionLimits, raise_descriptor_limit
from sharpwatch.daemon.api.operator_service import DaemonInfo, OperatorService
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
from sharpwatch.daemon.ingest.hello import RunHello
from sharpwatch.daemon.ingest.samples import SampleQueue
from sharpwatch.daemon.logs import configure_logs
from sharpwatch.daemon.notifier import Notifier
from sharpwatch.daemon.pipeline import Pipeline
from sharpwatch.daemon.runs.restore import REPLAYED_SAMPLES, restore_run
from sharpwatch.daemon.runs.run import Runs
from sharpwatch.daemon.storage.journal import Store
from sharpwatch.errors import SharpwatchError

log = structlog.get_logger(__name__)

DRAIN_SECONDS = 2.0
RETRY_AFTER_SECONDS = 1.0
_REQUESTS = 1_000  # of a run since its last sample, among which a release is looked for
# A second bound beside the number of samples: one sample may have 16 MiB, and 4096 of those would be 64 GiB. A run's
# share is what its courier holds.
QUEUE_BYTES, RUN_QUEUE_BYTES = 256 * 2**20, 64 * 2**20


def run(config: Config) -> int:
    """Serves until SIGTERM or SIGINT.

    Args:
        config: The checked configuration.

    Returns:
        The exit status: 0 after a signal, 1 if the daemon could not start or failed.
    """
    configure_logs(config.daemon.log_level)
    try:
        return asyncio.run(_main(config))
    except SharpwatchError as error:
        log.error("not_serving", reason=str(error))  # noqa: TRY400  the message is the reason
        return 1


async def _main(config: Config) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    # Through the loop: a handler of `signal` runs between any two bytecodes, and must not call into asyncio.
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with serving(config) as daemon:
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((stopping, daemon.worker), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        # Without its worker the daemon would take samples that nobody journals, so it ends and a supervisor sees it.
        if daemon.worker.done():
            log.critical("worker_failed", exc_info=daemon.worker.exception())
            return 1
        log.info("stopping")
    log.info("stopped")
    return 0


@dataclass(frozen=True, slots=True, eq=False)
class Daemon:
    """A running daemon: the addresses that it serves, and the task of its pipeline."""

    grpc: str
    http: str
    worker: asyncio.Task[None]


@asynccontextmanager
async def serving(config: Config) -> AsyncIterator[Daemon]:
    """Runs a daemon for the length of a `with`, and drains it at the end.

    Args:
        config: The checked configuration.

    Raises:
        SharpwatchError: It can't start.
    """
    settings = config.daemon
    # Before anything is opened: an address that must not be served leaves no journal and no token file behind.
    authorizer = Authorizer.of(settings)
    tls = None if settings.tls is None else ServerTls(settings.tls)
    registry = CollectorRegistry()
    silences = Silences()
    gate = Gate(lambda made: asking.ask(made))  # noqa: PLW0108  defined below
    let_pass = gate.judge if config.gate.webhook else no_gate
    runs = Runs(
        lambda hello, earlier: _controller(config, silences, let_pass, hello, earlier),
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
        )
        stack.push_async_callback(store.close)
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
        # Before HTTP and gRPC are served: an agent that reconnects must find its cursor, and a scrape its runs.
        silences.restore(await store.silences())
        await _restore(runs, store, pipeline, notifier)
        alerts = ForeignAlerts(
            names=config.foreign_alerts, runs=runs, pipeline=pipeline, authorizer=authorizer, metrics=metrics
        )
        limits = ConnectionLimits.of(raise_descriptor_limit())
        http_server = HttpServer(
            exposition,
            alerts,
            unready=lambda: pipeline.store_error,
            reader=authorizer if settings.metrics_auth == "token" else None,
            tls=tls,
            most=limits.http,
        )
        http = await http_server.start(settings.http)
        stack.push_async_callback(http_server.stop)
        guard = CallGuard(authorizer, metrics)
        agents = AgentService(
            runs=runs,
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
            tuple(policy.name for policy in config.policies),
            tuple(config.foreign_alerts),
            config.detection,
        )
        operators = OperatorService(
            runs=runs,
            silences=silences,
            pipeline=pipeline,
            store=store,
            authorizer=authorizer,
            release=agents.release,
            info=info,
        )
        server = GrpcServer(guard, tls, most=limits.grpc)
        address = await server.start(settings.grpc, agents, operators, reflects=settings.reflection)
        # Only once every address is bound, so that a start which fails has no worker to stop.
        worker = asyncio.create_task(pipeline.run(), name="pipeline")
        beside = (
            asyncio.create_task(pipeline.watch_stalls(config.detection), name="stalls"),
            asyncio.create_task(sessions.end_revoked(authorizer), name="revoked"),
            asyncio.create_task(notifier.run(), name="notifications"),
            asyncio.create_task(asking.run(gate), name="gate"),
        )
        log.info(
            "serving",
            grpc=address,
            http=http,
            device=estimator.device,
            store=store.name,
            runs=len(runs),
            version=__version__,
        )
        try:
            yield Daemon(address, http, worker)
        finally:
            # No new session, then an unhealthy state, then the worker, whose last write still acknowledges to open
            # sessions. Those are drained after that, so that agents send again only samples that are not journalled.
            agents.draining = True
            for task in beside:
                task.cancel()
            await server.leave()
            pipeline.stop()
            # Not `await worker`: its own error is logged in `_main`, and must not keep the rest from being stopped.
            await asyncio.wait((worker,))
            await notifier.keep()  # of the worker's last write, too
            # A watch waits for a change of its run, which no longer comes, and would hold up `server.stop`.
            operators.drain()
            sessions.drain("the daemon is stopping", RETRY_AFTER_SECONDS)
            await server.stop(DRAIN_SECONDS)


async def _restore(runs: Runs, store: Store, pipeline: Pipeline, notifier: Notifier) -> None:
    for name in await store.runs():
        stored = await store.load(name, samples=REPLAYED_SAMPLES)
        changes = restore_run(runs, stored)
        run = runs.get(name)
        if run is not None:
            await pipeline.restored(run, changes)
            asked = await store.requests(name, stored.attempts[-1].seen_at, _REQUESTS)
            run.attempt.released = any(row.action == "release" and row.outcome == "released" for row in asked)
    # Once all are there: a run may be held against one that comes after it.
    pipeline.restored_all()
    notifier.restore(
        await store.notifications(),
        (each for run in runs for each in run.controller.incidents),
        (made for run in runs for made in run.controller.decisions),
    )


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
