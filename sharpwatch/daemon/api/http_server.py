"""The daemon's HTTP side: metrics, health, and alerts of other systems."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from aiohttp import web
from aiohttp.typedefs import Handler
from aiohttp.web_protocol import RequestHandler

from sharpwatch.daemon.api.foreign_alerts import MAX_BYTES, ForeignAlerts
from sharpwatch.daemon.api.limits import IDLE_SECONDS
from sharpwatch.daemon.exporter.metrics import Exposition
from sharpwatch.errors import SharpwatchError


class HttpServer:
    """Serves `/metrics`, which `exporter.metrics` renders, `/-/healthy`, `/-/ready`, and takes alerts of other systems.

    Args:
        exposition: Renders the metrics.
        alerts: Takes in the alerts.
        unready: Returns why the daemon is not ready, or an empty string if it is.
        most: The connections that it has at a time.
    """

    def __init__(self, exposition: Exposition, alerts: ForeignAlerts, unready: Callable[[], str], *, most: int) -> None:
        self._exposition = exposition
        self._unready = unready
        self._most = most
        self._answering: set[asyncio.BaseProtocol] = set()
        self._unasked: dict[asyncio.BaseProtocol, asyncio.TimerHandle] = {}  # have sent no whole request so far
        app = web.Application(client_max_size=MAX_BYTES, middlewares=[self._noting])
        app.router.add_post("/api/v1/alerts", alerts.post)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/-/healthy", self._healthy)
        app.router.add_get("/-/ready", self._ready)
        self._runner = web.AppRunner(app, access_log=None, keepalive_timeout=IDLE_SECONDS)
        self._listening: asyncio.Server | None = None

    async def start(self, address: str) -> str:
        """Starts to serve.

        Args:
            address: HOST:PORT; port 0 takes any free one.

        Returns:
            The address that is bound.

        Raises:
            SharpwatchError: The address can't be bound.
        """
        host, _, port = address.rpartition(":")
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        try:
            # Not `web.TCPSite`, which takes in any number of connections.
            self._listening = await loop.create_server(self._accept, host.strip("[]"), int(port), reuse_address=True)
        except OSError as error:
            await self._runner.cleanup()
            raise SharpwatchError(f"http {address}: {error.strerror}") from error
        for listener in self._listening.sockets:
            _end_slow_readers(listener)
        bound = self._listening.sockets[0].getsockname()
        return f"[{bound[0]}]:{bound[1]}" if ":" in bound[0] else f"{bound[0]}:{bound[1]}"

    async def stop(self) -> None:
        """Finishes the requests in progress and stops."""
        if self._listening is not None:
            self._listening.close()
        await self._runner.cleanup()

    def _accept(self) -> asyncio.Protocol:
        """The protocol of a new connection; where there are too many, the oldest without a whole request are closed."""
        server = self._runner.server
        if server is None:
            raise SharpwatchError("the HTTP server has been stopped")
        live = [each for each in server.connections if each.transport is not None and not each.transport.is_closing()]
        live.sort(key=self._answering.__contains__)  # stable: among equals the oldest is first
        for each in live[: max(0, len(live) - self._most + 1)]:
            _abort(each.transport)
        accepted = server()
        # The option `keepalive_timeout` is for later requests; only the newest aiohttp has it for the first one too.
        timer = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._end_unasked, accepted)
        self._unasked[accepted] = timer
        return accepted

    def _end_unasked(self, connection: RequestHandler) -> None:
        del self._unasked[connection]
        _abort(connection.transport)

    @web.middleware
    async def _noting(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Notes which connections have sent a whole request, and not had its answer."""
        timer = self._unasked.pop(request.protocol, None)
        if timer is not None:
            timer.cancel()
        self._answering.add(request.protocol)
        try:
            return await handler(request)
        finally:
            self._answering.discard(request.protocol)

    async def _metrics(self, request: web.Request) -> web.Response:
        # On a thread, because with many runs this takes a while; the collector reads immutable snapshots.
        accept = request.headers.get("Accept", "")
        body, content_type = await asyncio.to_thread(self._exposition.render, accept)
        response = web.Response(body=body, headers={"Content-Type": content_type})
        response.enable_compression()
        return response

    async def _healthy(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _ready(self, _: web.Request) -> web.Response:
        reason = self._unready()
        return web.Response(text=f"{reason or 'ready'}\n", status=503 if reason else 200)


def _abort(transport: asyncio.BaseTransport | None) -> None:
    # Not closed: that waits for a client which may read nothing of what is still to be sent.
    if isinstance(transport, asyncio.Transport):
        transport.abort()


def _end_slow_readers(listener: socket.socket) -> None:
    """Has the kernel end connections whose client takes nothing of an answer for so long; they inherit the option."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(IDLE_SECONDS * 1000))
