"""The daemon as a whole: everything wired, from the first check of the configuration to the last flush."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from sharpwatch import wire
from sharpwatch._version import __version__
from sharpwatch.daemon.api.agent_service import AgentService, Sessions
from sharpwatch.daemon.api.auth import Authorizer, check_grpc_address, load_token
from sharpwatch.daemon.api.http import Web
from sharpwatch.daemon.api.operator_service import Facts, OperatorService
from sharpwatch.daemon.config.config import Config, DaemonConfig
from sharpwatch.daemon.decisions.run_controller import RunController
from sharpwatch.daemon.estimation.estimator import Estimator
from sharpwatch.daemon.exporter.metrics import OwnMetrics, RunCollector
from sharpwatch.daemon.ingest.hello import RunHello
from sharpwatch.daemon.ingest.queue import SampleQueue
from sharpwatch.daemon.logging import configure_logs
from sharpwatch.daemon.pipeline import Pipeline
from sharpwatch.daemon.runs.restore import REPLAYED_SAMPLES, restore_run
from sharpwatch.daemon.runs.runs import Runs
from sharpwatch.daemon.storage.journal import Store
from sharpwatch.errors import SharpwatchError
from sharpwatch.v1.operator_pb2_grpc import add_OperatorServiceServicer_to_server

log = structlog.get_logger(__name__)

DRAIN_SECONDS = 2.0
RETRY_AFTER_SECONDS = 1.0
QUEUE_BYTES = 256 * 2**20
_SERVICES = ("sharpwatch.v1.AgentService", "sharpwatch.v1.OperatorService")
# gRPC itself cuts off what is twice as large; between the two the daemon refuses, with a reason, and counts.
_OPTIONS = (
    ("grpc.max_receive_message_length", 2 * wire.MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a second daemon on the port must fail, not share it
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)


def run(config: Config) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status."""
    configure_logs(config.daemon.log_level)
    try:
        return asyncio.run(_main(config))
    except SharpwatchError as error:
        log.error("not_serving", reason=str(error))  # noqa: TRY400  the reason is the message
        return 1


async def _main(config: Config) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with serving(config) as daemon:
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((stopping, daemon.worker), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if daemon.worker.done():
            log.critical("worker_failed", exc_info=daemon.worker.exception())
            return 1
        log.info("stopping")
    log.info("stopped")
    return 0


@dataclass(frozen=True, slots=True, eq=False)
class Daemon:
    """A daemon that serves: its bound addresses, and the task that does the work."""

    grpc: str
    http: str
    worker: asyncio.Task[None]


@asynccontextmanager
async def serving(config: Config) -> AsyncIterator[Daemon]:
    """A whole daemon for the length of a `with`, drained at its end; raises `SharpwatchError` if it can't start."""
    settings = config.daemon
    check_grpc_address(settings.grpc)
    gate = Authorizer(load_token(settings.token_file))
    started_at = time.monotonic()
    registry = CollectorRegistry()
    runs = Runs(lambda manifest, earlier: _supervisor(config, manifest, earlier))
    async with AsyncExitStack() as stack:
        store = await Store.open(settings.store, retain_samples=settings.retain_samples)
        stack.push_async_callback(store.close)
        estimator = Estimator(settings.device)
        stack.callback(estimator.close)
        intake = SampleQueue(settings.queue_capacity, QUEUE_BYTES, on_evict=lambda entry: sessions.evicted(entry))  # noqa: PLW0108  made below
        metrics = OwnMetrics(registry, queue_depth=lambda: intake.depth, queue_capacity=intake.capacity)
        sessions = Sessions(metrics)
        registry.register(
            RunCollector(runs.views, time.time, stale_after=settings.stale_after, layers=settings.layer_metrics)
        )
        pipeline = Pipeline(
            runs=runs,
            intake=intake,
            store=store,
            estimator=estimator,
            metrics=metrics,
            on_settled=sessions.settled,
            on_command=sessions.command,
        )
        await _restore(runs, store, pipeline)
        web = Web(registry, unready=lambda: pipeline.store_error)
        http = await web.start(settings.http)
        stack.push_async_callback(web.stop)
        agents = AgentService(runs=runs, intake=intake, pipeline=pipeline, sessions=sessions, metrics=metrics)
        facts = Facts(started_at, estimator.device, settings.store, http)
        operators = OperatorService(runs=runs, pipeline=pipeline, gate=gate, facts=facts)
        server, health, address = await _start_grpc(settings, agents, operators)
        worker = asyncio.create_task(pipeline.run(), name="pipeline")
        log.info(
            "serving",
            grpc=address,
            http=http,
            device=estimator.device,
            store=str(store.path),
            runs=len(runs),
            version=__version__,
        )
        try:
            yield Daemon(address, http, worker)
        finally:
            agents.draining = True
            await health.enter_graceful_shutdown()
            pipeline.stop()
            await asyncio.wait((worker,))
            operators.drain()
            sessions.drain("the daemon is stopping", RETRY_AFTER_SECONDS)
            await server.stop(DRAIN_SECONDS)


async def _restore(runs: Runs, store: Store, pipeline: Pipeline) -> None:
    for name in await store.runs():
        stored = await store.load(name, samples=REPLAYED_SAMPLES)
        changes = restore_run(runs, stored)
        run = runs.get(name)
        if run is not None:
            await pipeline.restored(run, changes)


def _supervisor(config: Config, manifest: RunHello, earlier: RunController | None) -> RunController:
    """A supervisor of a new attempt, which knows all that the run's `earlier` one knew."""
    supervisor = RunController(
        manifest.run,
        blocks=manifest.blocks,
        policies=config.policies,
        control=manifest.control,
        lr_bounds=manifest.lr_bounds,
        can_roll_back=manifest.can_roll_back,
    )
    if earlier is not None:
        supervisor.take_over(earlier)
    return supervisor


async def _start_grpc(
    settings: DaemonConfig, agents: AgentService, operators: OperatorService
) -> tuple[grpc.aio.Server, HealthServicer, str]:
    server = grpc.aio.server(options=_OPTIONS)
    server.add_generic_rpc_handlers((agents.handlers(),))
    add_OperatorServiceServicer_to_server(operators, server)
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    for service in ("", *_SERVICES):
        await health.set(service, health_pb2.HealthCheckResponse.SERVING)
    if settings.reflection:
        reflection.enable_server_reflection(
            (*_SERVICES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME), server
        )
    bound = _bind(server, settings.grpc)
    await server.start()
    return server, health, bound


def _bind(server: grpc.aio.Server, address: str) -> str:
    """Listen; a socket is its owner's alone from its first moment, for who connects there may command."""
    before = os.umask(0o177)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise SharpwatchError(f"grpc {address}: can't listen there; is another daemon running?") from error
    finally:
        os.umask(before)
    if address.startswith("unix:"):
        mode = stat.S_IMODE(Path(address.removeprefix("unix:")).stat().st_mode)
        if mode & 0o077:
            raise SharpwatchError(f"grpc {address}: the socket has mode {mode:04o}, others could command the daemon")
        return address
    return f"{address.rpartition(':')[0]}:{port}"
