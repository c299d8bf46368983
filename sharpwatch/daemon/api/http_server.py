"""The daemon's HTTP side: metrics, health, and alerts of other systems."""

from __future__ import annotations

import asyncio
import gzip
import logging
import socket
from collections.abc import Callable
from contextlib import suppress

import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler
from aiohttp.web_protocol import RequestHandler

from sharpwatch.daemon.api.auth import Authorizer
from sharpwatch.daemon.api.foreign_alerts import MAX_BYTES, ForeignAlerts
from sharpwatch.daemon.api.limits import IDLE_SECONDS
from sharpwatch.daemon.api.server_tls import ServerTls
from sharpwatch.daemon.exporter.metrics import Exposition
from sharpwatch.errors import SharpwatchError

log = structlog.get_logger(__name__)

_BACKLOG = 128  # connections that the kernel holds until they are accepted
_GZIP_LEVEL = 6
_PAUSE_SECONDS = 1.0  # after one could not be accepted
# Not aiohttp's own, which logs a traceback of each request that is no HTTP: whoever can connect could fill the log.
_NO_HTTP = (HttpProcessingError, web.RequestPayloadError)
_logger = logging.getLogger("aiohttp.server.sharpwatch")
_logger.addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], _NO_HTTP)))


class HttpServer:
    """Serves `/metrics`, which `exporter.metrics` renders, `/-/healthy`, `/-/ready`, and takes alerts of other systems.

    Args:
        exposition: Renders the metrics.
        alerts: Takes in the alerts.
        unready: Returns why the daemon is not ready, or an empty string if it is.
        reader: Tells who may read metrics; None for anyone.
        tls: What it shows; None to serve without TLS.
        most: The connections that it has at a time.
    """

    def __init__(  # noqa: PLR0913  the parts that it connects
        self,
        exposition: Exposition,
        alerts: ForeignAlerts,
        unready: Callable[[], str],
        *,
        reader: Authorizer | None,
        tls: ServerTls | None,
        most: int,
    ) -> None:
        self._reader = reader
        self._tls = tls
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
        self._rendering = asyncio.Lock()
        # Renderings that have not begun, by the header Accept and whether they are compressed.
        self._asked: dict[tuple[str, bool], asyncio.Task[tuple[bytes, str]]] = {}
        self._runner = web.AppRunner(app, access_log=None, logger=_logger, keepalive_timeout=IDLE_SECONDS)
        self._connecting: dict[socket.socket, asyncio.Task[None]] = {}  # in their handshake, oldest first
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None

    async def start(self, address: str) -> str:
        """Starts to serve.

        Args:
            address: HOST:PORT; port 0 takes any free one.

        Returns:
            The address that is bound.

        Raises:
            SharpwatchError: The address can't be bound.
        """
        await self._runner.setup()
        try:
            self._listener = await asyncio.to_thread(_listen, address)
        except OSError as error:
            await self._runner.cleanup()
            raise SharpwatchError(f"http {address}: {error.strerror}") from error
        # Not `web.TCPSite`, which takes in any number of connections.
        self._accepting = asyncio.create_task(self._accept(self._listener), name="http")
        bound = self._listener.getsockname()
        return f"[{bound[0]}]:{bound[1]}" if ":" in bound[0] else f"{bound[0]}:{bound[1]}"

    async def stop(self) -> None:
        """Finishes the requests in progress and stops."""
        if self._listener is not None and self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait((self._accepting,))
            self._listener.close()
        await self._runner.cleanup()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(listener)
            except OSError as error:  # no descriptor, or no memory, is left
                log.warning("not_accepting", reason=error.strerror)
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            self._make_room()
            self._connecting[accepted] = loop.create_task(self._connect(accepted))
            # While others wait to be accepted, `sock_accept` returns without a turn of the loop.
            await asyncio.sleep(0)

    async def _connect(self, accepted: socket.socket) -> None:
        tls = None
        if self._tls is not None:
            self._tls.refresh()
            tls = self._tls.http
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                self._protocol,
                accepted,
                ssl=tls,
                ssl_handshake_timeout=None if tls is None else IDLE_SECONDS,
            )
        except OSError as error:  # SSL's errors too
            log.debug("not_connected", reason=str(error))
        finally:
            del self._connecting[accepted]

    def _make_room(self) -> None:
        """Closes the oldest connections, if there are too many: first those that have sent no whole request."""
        server = self._runner.server
        connections = [] if server is None else server.connections
        live = [each for each in connections if each.transport is not None and not each.transport.is_closing()]
        too_many = len(live) + len(self._connecting) - self._most + 1
        idle = [each for each in live if each not in self._answering]
        for each in idle[: max(0, too_many)]:
            _abort(each.transport)
        too_many -= len(idle)
        for accepted in list(self._connecting)[: max(0, too_many)]:
            # In its handshake, which has no transport that could be asked: it ends by this.
            with suppress(OSError):
                accepted.shutdown(socket.SHUT_RDWR)
        too_many -= len(self._connecting)
        busy = [each for each in live if each in self._answering]
        for each in busy[: max(0, too_many)]:
            _abort(each.transport)

    def _protocol(self) -> asyncio.Protocol:
        server = self._runner.server
        if server is None:
            raise SharpwatchError("the HTTP server has been stopped")
        connected = server()
        # The option `keepalive_timeout` is for later requests; only the newest aiohttp has it for the first one too.
        timer = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._end_unasked, connected)
        self._unasked[connected] = timer
        return connected

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
        if self._reader is not None:
            shown = request.headers.get("Authorization", "").encode(errors="surrogateescape")
            caller = self._reader.caller("http", shown)
            if not caller.may("viewer"):
                text = f"metrics need the operator's token, or one of role viewer: {caller.why or caller.role}\n"
                return web.Response(text=text, status=401, headers={"WWW-Authenticate": "Bearer"})
        compressed = "gzip" in request.headers.get("Accept-Encoding", "").lower()
        body, content_type = await self._rendered(request.headers.get("Accept", ""), compressed=compressed)
        encoding = {"Content-Encoding": "gzip"} if compressed else {}
        return web.Response(body=body, headers={"Content-Type": content_type, "Vary": "Accept-Encoding", **encoding})

    async def _rendered(self, accept: str, *, compressed: bool) -> tuple[bytes, str]:
        """Renders the metrics: one after the other, and once for all who ask while another rendering is under way."""
        key = accept, compressed
        asked = self._asked.get(key)
        if asked is None:
            asked = self._asked[key] = asyncio.create_task(self._render(key), name="render")
        return await asyncio.shield(asked)

    async def _render(self, key: tuple[str, bool]) -> tuple[bytes, str]:
        async with self._rendering:
            del self._asked[key]  # who asks from now on wants what is not in this one
            # On a thread, because with many runs this takes a while; the collector reads immutable snapshots.
            return await asyncio.to_thread(self._body, *key)

    def _body(self, accept: str, compressed: bool) -> tuple[bytes, str]:
        body, content_type = self._exposition.render(accept)
        return gzip.compress(body, _GZIP_LEVEL) if compressed else body, content_type

    async def _healthy(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _ready(self, _: web.Request) -> web.Response:
        reason = self._unready()
        return web.Response(text=f"{reason or 'ready'}\n", status=503 if reason else 200)


def _abort(transport: asyncio.BaseTransport | None) -> None:
    # Not closed: that waits for a client which may read nothing of what is still to be sent.
    if isinstance(transport, asyncio.Transport):
        transport.abort()


def _listen(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    # Of localhost the one of IPv4, which every client tries.
    family, _, _, _, where = min(found, key=lambda each: each[0] != socket.AF_INET)
    listener = socket.create_server(where[:2], family=family, backlog=_BACKLOG)
    listener.setblocking(False)
    # The kernel ends connections whose client takes nothing of an answer for so long; they inherit the option.
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(IDLE_SECONDS * 1000))
    return listener
