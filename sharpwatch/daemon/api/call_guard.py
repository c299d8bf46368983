"""Guards every gRPC call before it begins: who may make it, and how long it may send nothing.

Each call needs a role, by its method; that a change needs the role operator, the methods themselves see to. Each must
send its first message soon, and few may wait for theirs.

gRPC has no deadline on a server's side. A call that never sends a message would hold memory until its connection ends,
also a unary one, whose method is not even called before its request has come.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeAlias, cast

import grpc
import structlog
from google.protobuf.message import DecodeError

from sharpwatch.common.credentials import Role
from sharpwatch.daemon.api.auth import Authorizer, Caller
from sharpwatch.daemon.exporter.own_metrics import OwnMetrics

log = structlog.get_logger(__name__)

FIRST_MESSAGE_SECONDS = 10.0
MAX_WAITING = 256  # calls that have not sent their first message
MAX_ANSWERING = 8  # calls of operators at a time, so that hundreds at once hold up no sample; the others wait
MAX_HEALTH_WATCHES = 64  # which anyone may open, and which last
_LOGGED = 256  # kinds of refused calls that are remembered
_HEALTH, _AGENTS = "/grpc.health.v1.Health/", "/sharpwatch.v1.AgentService/"
SESSION = f"{_AGENTS}Session"
_HEALTH_WATCH = f"{_HEALTH}Watch"
Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic in the stubs, not at run time
Details = grpc.HandlerCallDetails


class CallGuard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs, not at run time
    """Guards every call of a server.

    Args:
        authorizer: Knows who calls.
        metrics: Where it counts the calls that it ends.
    """

    def __init__(self, authorizer: Authorizer, metrics: OwnMetrics) -> None:
        self._authorizer = authorizer
        self._metrics = metrics
        self._logged: set[tuple[str, ...]] = set()
        self._waiting: dict[asyncio.Timeout, None] = {}  # the deadlines of calls that wait, oldest first
        self._health_watches = 0
        self._answering = asyncio.Semaphore(MAX_ANSWERING)

    async def intercept_service(
        self, continuation: Callable[[Details], Awaitable[Handler]], handler_call_details: Details
    ) -> Handler:
        """Returns the handler of a call, guarded."""
        handler = await continuation(handler_call_details)
        # None for a method that there is none of, whatever the stubs say.
        if handler is None:
            return handler  # type: ignore[unreachable]
        if handler_call_details.method == SESSION:
            return handler  # calls `begin` itself, so that its messages and answers take no way round
        return self._guarded(str(handler_call_details.method), handler)

    async def begin(
        self, method: str, requests: AsyncIterator[Any], context: Context, *, streams: bool = True
    ) -> AsyncIterator[Any]:
        """Ends a call that its caller may not make, or that sends nothing.

        Args:
            method: Its method.
            requests: Its messages.
            context: Its context.
            streams: Whether it may have several messages.

        Returns:
            Its messages, the first one too.
        """
        await self._authorize(method, context)
        return _Requests(await self._first(requests, context, streams=streams), requests)

    def _guarded(self, method: str, handler: Handler) -> Handler:
        # All as handlers of streams, on which a method is called before the first message: the wire is the same.
        # A single request is parsed by `_only`, since gRPC logs a traceback of each that does not parse.
        parse = handler.request_deserializer if handler.request_streaming else None
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._stream(method, handler), parse, handler.response_serializer
            )
        return grpc.stream_unary_rpc_method_handler(self._unary(method, handler), parse, handler.response_serializer)

    def _unary(self, method: str, handler: Handler) -> Callable[[AsyncIterator[Any], Context], Awaitable[Any]]:
        async def call(requests: AsyncIterator[Any], context: Context) -> Any:
            began = await self.begin(method, requests, context, streams=handler.request_streaming)
            if handler.request_streaming:
                return await cast("Any", handler.stream_unary)(began, context)
            request = await _only(began, handler, context)
            if method.startswith(_HEALTH):
                return await cast("Any", handler.unary_unary)(request, context)
            async with self._answering:
                return await cast("Any", handler.unary_unary)(request, context)

        return call

    def _stream(
        self, method: str, handler: Handler
    ) -> Callable[[AsyncIterator[Any], Context], AsyncGenerator[Any, None]]:
        async def call(requests: AsyncIterator[Any], context: Context) -> AsyncGenerator[Any, None]:
            began = await self.begin(method, requests, context, streams=handler.request_streaming)
            if handler.request_streaming:
                answers = cast("Any", handler.stream_stream)(began, context)
            else:
                answers = cast("Any", handler.unary_stream)(await _only(began, handler, context), context)
            if method == _HEALTH_WATCH:  # a coroutine that writes by itself
                await self._watch_health(answers, context)
                return
            async with aclosing(answers):
                async for answer in answers:
                    yield answer

        return call

    async def _authorize(self, method: str, context: Context) -> None:
        """Ends a call that its caller may not make."""
        if method.startswith(_HEALTH):  # says nothing but that the daemon is there
            return
        # A method that nobody thought of here is not for everyone.
        role: Role = "agent" if method.startswith(_AGENTS) else "viewer"
        caller = self._authorizer.caller_of(context)
        if not caller.may(role):
            self._metrics.calls_ended.labels("unauthorized").inc()
            self._log_refused(method, context.peer(), caller)
            await self._authorizer.require(role, context)

    def _log_refused(self, method: str, peer: str, caller: Caller) -> None:
        """Logs each kind of refusal once: whoever has no token must not fill the log."""
        host = peer if peer.startswith("unix:") else peer.rpartition(":")[0]
        refused = (method, host, caller.name, caller.why)
        if refused in self._logged:
            return
        if len(self._logged) >= _LOGGED:
            self._logged.clear()
        self._logged.add(refused)
        log.warning("call_refused", method=method, peer=peer, name=caller.name, reason=caller.why or caller.role)

    async def _first(self, requests: AsyncIterator[Any], context: Context, *, streams: bool) -> list[Any]:
        """The first message of a call, none if it ends without one; ends a call that does not send it in time."""
        deadline = asyncio.timeout(FIRST_MESSAGE_SECONDS)
        try:
            async with deadline:
                self._waiting[deadline] = None
                self._make_room()
                message = await anext(requests, None)
                # Read to the end where there is one message: gRPC never lets go of a stream that `abort` ended before
                # its end was read, and refuses all calls of a connection that has as many of these as it may have.
                if message is not None and not streams:
                    await anext(requests, None)
                return [] if message is None else [message]
        except TimeoutError:
            was_evicted = deadline not in self._waiting
            self._metrics.calls_ended.labels("crowded" if was_evicted else "mute").inc()
            if was_evicted:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls wait for their first message")
            await context.abort(
                grpc.StatusCode.DEADLINE_EXCEEDED, f"the first message must come within {FIRST_MESSAGE_SECONDS:g} s"
            )
        finally:
            self._waiting.pop(deadline, None)

    def _make_room(self) -> None:
        # The oldest goes, not the newest: an honest client sends its first message at once.
        while len(self._waiting) > MAX_WAITING:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            if not oldest.expired():  # which it may have, and its call has not noticed yet
                oldest.reschedule(asyncio.get_running_loop().time())

    async def _watch_health(self, watch: Awaitable[None], context: Context) -> None:
        if self._health_watches >= MAX_HEALTH_WATCHES:
            cast("Any", watch).close()
            self._metrics.calls_ended.labels("crowded").inc()
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_HEALTH_WATCHES} watch already")
        self._health_watches += 1
        try:
            await watch
        finally:
            self._health_watches -= 1


class _Requests:
    """The messages of a call whose first one was read already, none if there was none."""

    def __init__(self, first: list[Any], rest: AsyncIterator[Any]) -> None:
        self._first = first
        self._has_more = bool(first)
        self._rest = rest

    def __aiter__(self) -> AsyncIterator[Any]:
        # Once the first is taken the messages come straight from gRPC, thousands of samples of a session.
        return self if self._first or not self._has_more else self._rest

    async def __anext__(self) -> Any:
        if self._first:
            return self._first.pop()
        if not self._has_more:
            raise StopAsyncIteration
        return await anext(self._rest)


async def _only(began: AsyncIterator[bytes], handler: Handler, context: Context) -> Any:
    """The request of a call that has one."""
    if (request := await anext(began, None)) is None:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the request is missing")
    try:
        return cast("Any", handler.request_deserializer)(request)
    except DecodeError as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the request can't be parsed: {error}")
