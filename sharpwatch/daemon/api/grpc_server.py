"""The daemon's gRPC side: the services of agents and operators, health and reflection, on one address."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from sharpwatch import wire
from sharpwatch.daemon.api.agent_service import AgentService
from sharpwatch.daemon.api.call_guard import CallGuard
from sharpwatch.daemon.api.limits import IDLE_SECONDS
from sharpwatch.daemon.api.operator_service import OperatorService
from sharpwatch.daemon.api.server_tls import ServerTls
from sharpwatch.errors import SharpwatchError
from sharpwatch.v1.operator_pb2_grpc import add_OperatorServiceServicer_to_server

_MAX_CALLS = 8_192  # at a time: sessions of 1,000 runs, their replaced attempts, and whoever watches
_SERVICES = ("sharpwatch.v1.AgentService", "sharpwatch.v1.OperatorService")
# gRPC cuts off messages above this. Between the limit and this, the daemon refuses with a reason, and counts.
_OPTIONS = (
    ("grpc.max_receive_message_length", 2 * wire.MAX_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", 64),  # of one connection; an agent has one stream
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", int(IDLE_SECONDS * 1000)),
    ("grpc.so_reuseport", 0),  # a second daemon on the same port must fail
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # The courier pings every 10 s. gRPC by default closes a connection that pings more often than every 5 min.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)


class GrpcServer:
    """Serves gRPC.

    Args:
        guard: Guards every call.
        tls: What it shows; None to serve without TLS.
        most: The connections that it has at a time.
    """

    def __init__(self, guard: CallGuard, tls: ServerTls | None, *, most: int) -> None:
        self._tls = tls
        self._server = grpc.aio.server(
            interceptors=(guard,),
            options=(*_OPTIONS, ("grpc.max_allowed_incoming_connections", most)),
            maximum_concurrent_rpcs=_MAX_CALLS,
        )
        self._health = HealthServicer()

    async def start(self, address: str, agents: AgentService, operators: OperatorService, *, reflects: bool) -> str:
        """Starts to serve, and tells those who ask for its health that it is not ready.

        Args:
            address: HOST:PORT or unix:PATH; port 0 takes any free one.
            agents: The service of agents.
            operators: The service of operators.
            reflects: Whether clients may ask which services there are.

        Returns:
            The address that is bound.

        Raises:
            SharpwatchError: The address can't be bound.
        """
        self._server.add_generic_rpc_handlers((agents.handlers(),))
        add_OperatorServiceServicer_to_server(operators, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        if reflects:
            health = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
            reflection.enable_server_reflection((*_SERVICES, health, reflection.SERVICE_NAME), self._server)
        bound = self._bind(address)
        await self._server.start()
        return bound

    async def be_ready(self) -> None:
        """Tells those who ask for its health that all is there."""
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def leave(self) -> None:
        """Tells those who ask for its health that it is about to stop."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace: float) -> None:
        """Stops; calls in progress have `grace` seconds to end."""
        await self._server.stop(grace)

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        # The empty name is the whole server, in the protocol of gRPC health checks.
        for service in ("", *_SERVICES):
            await self._health.set(service, status)

    def _bind(self, address: str) -> str:
        """Listens. A unix socket has mode 0600 from its first moment, because whoever connects to it is an operator."""
        before = os.umask(0o177)
        try:
            if self._tls is None or address.startswith("unix:"):
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._tls.grpc_credentials())
        except RuntimeError as error:
            raise SharpwatchError(f"grpc {address}: cannot listen there; is another daemon running?") from error
        finally:
            os.umask(before)
        if address.startswith("unix:"):
            mode = stat.S_IMODE(Path(address.removeprefix("unix:")).stat().st_mode)
            if mode & 0o077:
                raise SharpwatchError(f"grpc {address}: the socket must have mode 0600, got {mode:04o}")
            return address
        return f"{address.rpartition(':')[0]}:{port}"
