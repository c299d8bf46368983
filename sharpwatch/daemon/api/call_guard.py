"""Bounds gRPC calls that have sent nothing yet: each must send its first message soon, and few may wait for theirs.

gRPC has no deadline on a server's side. A call that never sends a message would hold memory until its connection ends,
also a unary one, whose method is not even called before its request has come.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeAlias, cast

import grpc

from sharpwatch.daemon.exporter.own_metrics import OwnMetrics

FIRST_MESSAGE_SECONDS = 10.0
MAX_WAITING = 256  # calls that have not sent their first message
MAX_HEALTH_WATCHES = 64  # which anyone may open, and which last
_HEALTH_WATCH = "/grpc.health.v1.Health/Watch"
Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic in the stubs, not at run time
Details = grpc.HandlerCallDetails


class CallGuard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs, not at run time
    """Guards every call of a server.

    Args:
        metrics: Where it counts the calls that it ends.
    """

    def __init__(self, metrics: OwnMetrics) -> None:
        self._metrics = metrics
        self._waiting: dict[asyncio.Timeout, None] = {}  # the deadlines of calls that wait, oldest first
        self._health_watches = 0

    async def intercept_service(
        self, continuation: Callable[[Details], Awaitable[Handler]], handler_call_details: Details
    ) -> Handler:
        """Returns the handler of a call, guarded."""
        handler = await continuation(handler_call_details)
        # None for a method that there is none of, whatever the stubs say.
        if handler is None:
            return handler  # type: ignore[unreachable]
        return self._guarded(str(handler_call_details.method), handler)

    def _guarded(self, method: str, handler: Handler) -> Handler:
        # All as handlers of streams, on which a method is called before the first message: the wire is the same.
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._stream(method, handler), handler.request_deserializer, handler.response_serializer
            )
        return grpc.stream_unary_rpc_method_handler(
            self._unary(handler), handler.request_deserializer, handler.response_serializer
        )

    def _unary(self, handler: Handler) -> Callable[[AsyncIterator[Any], Context], Awaitable[Any]]:
        async def call(requests: AsyncIterator[Any], context: Context) -> Any:
            first = await self._first(requests, context)
            if handler.request_streaming:
                return await cast("Any", handler.stream_unary)(_chained(first, requests), context)
            return await cast("Any", handler.unary_unary)(await _only(first, context), context)

        return call

    def _stream(
        self, method: str, handler: Handler
    ) -> Callable[[AsyncIterator[Any], Context], AsyncGenerator[Any, None]]:
        async def call(requests: AsyncIterator[Any], context: Context) -> AsyncGenerator[Any, None]:
            first = await self._first(requests, context)
            if handler.request_streaming:
                answers = cast("Any", handler.stream_stream)(_chained(first, requests), context)
            else:
                answers = cast("Any", handler.unary_stream)(await _only(first, context), context)
            if method == _HEALTH_WATCH:  # a coroutine that writes by itself
                await self._watch_health(answers, context)
                return
            async with aclosing(answers):
                async for answer in answers:
                    yield answer

        return call

    async def _first(self, requests: AsyncIterator[Any], context: Context) -> list[Any]:
        """The first message of a call, none if it ends without one; ends a call that does not send it in time."""
        deadline = asyncio.timeout(FIRST_MESSAGE_SECONDS)
        try:
            async with deadline:
                self._waiting[deadline] = None
                self._make_room()
                return [message] if (message := await anext(requests, None)) is not None else []
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


async def _chained(first: list[Any], rest: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
    for message in first:
        yield message
    if first:
        async for message in rest:
            yield message


async def _only(first: list[Any], context: Context) -> Any:
    if not first:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the request is missing")
    return first[0]
