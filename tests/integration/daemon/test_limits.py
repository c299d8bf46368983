"""What a daemon stands: connections that send nothing, requests that never end, and too many of either."""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc
import pytest
from forked import COMMAND_LINE
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from sharpwatch.daemon.api import call_guard, http_server
from sharpwatch.daemon.api.limits import RESERVED, ConnectionLimits
from sharpwatch.daemon.exporter import metrics
from sharpwatch.v1 import operator_pb2 as pb

HALF_A_REQUEST = b"GET /metrics HTTP/1.1\r\nHost: daemon\r\n"  # a line is missing
DESCRIPTORS = 1024  # the usual limit of a user
SESSION = "/sharpwatch.v1.AgentService/Session"
GET_DAEMON = "/sharpwatch.v1.OperatorService/GetDaemon"


def connect(address: str, count: int, stack: ExitStack, sent: bytes = b"") -> list[socket.socket]:
    """Open connections that send so much and no more."""
    host, _, port = address.rpartition(":")
    opened = []
    for _ in range(count):
        opened.append(stack.enter_context(socket.create_connection((host, int(port)), timeout=30)))
        if sent:
            opened[-1].send(sent)
    return opened


async def closed(connection: socket.socket) -> None:
    """Until the daemon has closed it."""
    connection.settimeout(30)
    with suppress(ConnectionResetError):
        assert await asyncio.to_thread(connection.recv, 1) == b""


def count_descriptors(process: int) -> int:
    return len(list(Path(f"/proc/{process}/fd").iterdir()))


def channels(address: str, count: int, stack: list[grpc.aio.Channel]) -> list[grpc.aio.Channel]:
    own = [("grpc.use_local_subchannel_pool", 1)]  # else all of a process share one connection
    made = [grpc.aio.insecure_channel(address, options=own) for _ in range(count)]
    stack += made
    return made


@pytest.mark.parametrize("descriptors", [300, 1024, 20_000, 10**6])
def test_descriptors_are_kept_for_the_daemon_itself(descriptors):
    limits = ConnectionLimits.of(descriptors)
    assert limits.http >= 8
    assert limits.grpc >= 24
    assert limits.http + limits.grpc <= descriptors - RESERVED


async def test_floods_leave_sessions_and_metrics_working(start, build):
    flooded = await start(
        code=f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024)); {COMMAND_LINE}"
    )
    daemon, opened = flooded.client, []
    trainers = [await daemon.train(f"run{n}", f"a{n}") for n in range(20)]

    async def all_work(sequence: int) -> None:
        for trainer in trainers:
            await trainer.send(build.sample(sequence))
        for trainer in trainers:
            await trainer.acknowledged(sequence)
        assert (await daemon.get("/metrics"))[0] == 200
        assert (
            count_descriptors(flooded.process.pid) < DESCRIPTORS - 100
        )  # of which 100 are for the journal and all else

    with ExitStack() as stack:
        connect(daemon.http, 1_100, stack, HALF_A_REQUEST)
        await all_work(1)
        connect(daemon.grpc, 1_100, stack)
        await all_work(2)
    calls = [channel.stream_stream(SESSION)() for channel in channels(daemon.grpc, 20, opened) for _ in range(60)]
    ended = asyncio.as_completed([call.code() for call in calls])
    async with asyncio.timeout(60):
        for code in [next(ended) for _ in range(len(calls) - call_guard.MAX_WAITING)]:
            assert await code in {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED}
    await all_work(3)
    late = await daemon.train("late", "late")
    for each in (*trainers, late):
        each.call.cancel()
    for channel in opened:
        await channel.close()


async def test_a_half_open_request_is_closed_in_time(running, monkeypatch):
    monkeypatch.setattr(http_server, "IDLE_SECONDS", 0.2)
    async with running() as daemon:
        with ExitStack() as stack:
            (half,) = connect(daemon.http, 1, stack, HALF_A_REQUEST)
            (silent,) = connect(daemon.http, 1, stack)
            await closed(half)
            await closed(silent)


async def test_a_full_daemon_closes_the_oldest_half_open_request_not_the_newest(running, monkeypatch):
    monkeypatch.setattr(ConnectionLimits, "of", classmethod(lambda cls, _: cls(http=4, grpc=64)))
    async with running() as daemon:
        with ExitStack() as stack:
            first, second, third = connect(daemon.http, 3, stack, HALF_A_REQUEST)
            assert (await daemon.get("/-/healthy"))[0] == 200  # over a fourth one, which stays open
            connect(daemon.http, 1, stack, HALF_A_REQUEST)
            await closed(first)
            connect(daemon.http, 1, stack, HALF_A_REQUEST)
            await closed(second)
            third.send(b"\r\n")
            assert (await asyncio.to_thread(third.recv, 15)) == b"HTTP/1.1 200 OK"


async def test_a_full_daemon_takes_in_no_further_grpc_connection(running, monkeypatch):
    monkeypatch.setattr(ConnectionLimits, "of", classmethod(lambda cls, _: cls(http=4, grpc=2)))
    async with running() as daemon:
        trainer = await daemon.train()
        with ExitStack() as stack:
            for connection in connect(daemon.grpc, 3, stack)[1:]:
                await closed(connection)
        trainer.call.cancel()


async def test_a_call_that_sends_nothing_is_ended(running, build, monkeypatch):
    monkeypatch.setattr(call_guard, "FIRST_MESSAGE_SECONDS", 0.2)
    async with running() as daemon:
        trainer = await daemon.train()
        mute = [
            daemon.channel.stream_stream(SESSION)(),
            daemon.channel.stream_unary(GET_DAEMON)(metadata=daemon.credentials),
        ]
        for call in mute:
            assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert await call.details() == "the first message must come within 0.2 s"
        assert await daemon.metric('sharpwatch_calls_ended_total{reason="mute"}') == 2
        await trainer.send(build.sample(1))  # the deadline is for the first message alone
        await trainer.acknowledged(1)
        trainer.call.cancel()


async def test_among_many_mute_calls_the_oldest_are_ended(running, monkeypatch):
    monkeypatch.setattr(call_guard, "MAX_WAITING", 4)
    async with running() as daemon:
        mute = [daemon.channel.stream_stream(SESSION)() for _ in range(10)]
        async with asyncio.timeout(30):
            ended = asyncio.as_completed([call.code() for call in mute])
            for code in [next(ended) for _ in range(6)]:
                assert await code is grpc.StatusCode.RESOURCE_EXHAUSTED
        (await daemon.train()).call.cancel()
        assert sum(call.done() for call in mute) <= 7  # the newest one made room for the trainer's own
        for call in mute:
            call.cancel()


async def test_calls_that_are_refused_are_no_streams_any_more(daemon):
    """Else a connection would be full after so many, and every call of it be refused."""
    for _ in range(80):  # more than a connection may have at a time
        for call in (
            daemon.operator.GetRun(pb.GetRunRequest(run="none")),
            daemon.operator.WatchRun(pb.WatchRunRequest(run="none")).read(),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_sessions_that_are_refused_are_no_streams_any_more(daemon, build):
    trainer = await daemon.train()
    for number in range(80):
        other = daemon.connect()
        await other.send(build.hello(attempt=f"a{number + 2}"))
        assert (await other.ended())[0] is grpc.StatusCode.ALREADY_EXISTS
    await trainer.send(build.sample(1))
    await trainer.acknowledged(1)
    trainer.call.cancel()


async def test_calls_that_are_about_to_end_make_room_too(running, monkeypatch):
    monkeypatch.setattr(call_guard, "MAX_WAITING", 2)
    monkeypatch.setattr(call_guard, "FIRST_MESSAGE_SECONDS", 0.0)
    async with running() as daemon:
        ended = [
            await each
            for each in [call.code() for call in [daemon.channel.stream_stream(SESSION)() for _ in range(60)]]
        ]
        assert set(ended) <= {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED}


async def test_health_may_be_watched_by_few(running, monkeypatch):
    monkeypatch.setattr(call_guard, "MAX_HEALTH_WATCHES", 2)
    async with running() as daemon:
        stub = health_pb2_grpc.HealthStub(daemon.channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
        assert [(await call.read()).status for call in watches] == [health_pb2.HealthCheckResponse.SERVING] * 2
        assert await stub.Watch(health_pb2.HealthCheckRequest()).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        watches.pop().cancel()
        async with asyncio.timeout(30):  # until the daemon has seen that
            while await (again := stub.Watch(health_pb2.HealthCheckRequest())).read() is grpc.aio.EOF:
                pass
        for call in (*watches, again):
            call.cancel()


async def test_what_is_no_request_of_its_method_is_refused_and_not_logged(daemon, caplog):
    with capture_logs() as logs:
        for _ in range(80):  # more than a connection may have at a time
            for call in (
                daemon.channel.unary_unary(GET_DAEMON)(b"\xff", metadata=daemon.credentials),
                daemon.channel.unary_stream("/sharpwatch.v1.OperatorService/WatchRun")(
                    b"\xff", metadata=daemon.credentials
                ),
                daemon.channel.unary_unary("/grpc.health.v1.Health/Check")(b"\xff"),
            ):
                assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert (await call.details()).startswith("the request can't be parsed: ")
    assert not logs
    assert not caplog.records


async def test_what_is_no_http_is_refused_and_not_logged(daemon, caplog):
    def ask(request: bytes) -> bytes:
        with ExitStack() as stack:
            (connection,) = connect(daemon.http, 1, stack, request)
            return connection.recv(12)

    gzip = b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnone"
    for request in (
        b"GET /metrics HOTTP\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: a\r\nX: " + 10_000 * b"x" + b"\r\n\r\n",
    ):
        assert (await asyncio.to_thread(ask, request)).endswith(b" 400")
    await asyncio.to_thread(ask, b"GET /-/healthy HTTP/1.1\r\nHost: a\r\n" + gzip)
    assert (await daemon.get("/-/healthy"))[0] == 200
    assert not caplog.records


async def test_refused_samples_are_logged_once_for_each_code(daemon, build):
    trainer = await daemon.train()
    with capture_logs() as logs:
        for sequence in range(1, 51):
            await trainer.send(build.sample(sequence, deleted_checkpoints=["x" * 5_000]))
        for _ in range(50):
            assert (await trainer.next("refusal")).code == "malformed"
    assert [each["code"] for each in logs if each["event"] == "sample_refused"] == ["malformed"]
    assert await daemon.metric('sharpwatch_samples_refused_total{code="malformed"}') == 50
    trainer.call.cancel()


async def test_scrapes_that_come_while_one_is_rendered_share_the_next(running, monkeypatch):
    begun, release, rendered = threading.Event(), threading.Event(), []

    def held(self, accept):
        rendered.append(accept)
        begun.set()
        release.wait(30)
        return render(self, accept)

    render = metrics.Exposition.render
    monkeypatch.setattr(metrics.Exposition, "render", held)
    async with running() as daemon:
        first = asyncio.create_task(daemon.get("/metrics"))
        await asyncio.to_thread(begun.wait, 30)
        rest = [asyncio.create_task(daemon.get("/metrics")) for _ in range(20)]
        assert (await daemon.get("/-/healthy"))[0] == 200  # of a later request than those
        release.set()
        answers = await asyncio.gather(first, *rest)
        assert {status for status, _ in answers} == {200}
        assert len(rendered) < len(answers)


async def test_connections_that_come_at_once_leave_turns_to_all_else(daemon, monkeypatch):
    """As long as some wait to be accepted, accepting takes no turn of the loop by itself."""
    turns, all_came = [], asyncio.Event()
    loop = asyncio.get_running_loop()
    accept = type(loop).sock_accept

    async def accepted(self, listener):
        found = await accept(self, listener)
        loop.call_soon(turns.append, "all else")
        turns.append("accepted")
        if turns.count("accepted") == 50:
            all_came.set()
        return found

    monkeypatch.setattr(type(loop), "sock_accept", accepted)
    assert (await daemon.get("/-/healthy"))[0] == 200  # the first call of the patched method
    turns.clear()
    with ExitStack() as stack:
        connect(daemon.http, 50, stack)  # all while the loop waits for this
        async with asyncio.timeout(30):
            await all_came.wait()
    assert ("accepted", "accepted") not in itertools.pairwise(turns)
