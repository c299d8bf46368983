"""A hostile client in a process of its own: python -m benchmarks.load.floods KIND GRPC HTTP --seconds N.

Run by `benchmarks.load hostile`. It says when it begins, floods a daemon in one way, as fast as it can, and prints a
line of JSON that counts what it did. `$FLOOD_TOKEN` is the token that it shows; it shows none where that is empty.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, suppress

import grpc
import numpy as np

from benchmarks.load.messages import body, hello, request
from sharpwatch import wire
from sharpwatch.daemon.api.limits import raise_descriptor_limit
from sharpwatch.v1 import agent_pb2, operator_pb2, types_pb2

_SESSION = "/sharpwatch.v1.AgentService/Session"
_OPERATOR = "/sharpwatch.v1.OperatorService/"
_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", -1),
)
_BLOCKS = ("emb", "qk", "ffn", "vo", "norm")
_CONNECTIONS = 16
_WINDOW = 32  # messages without an answer
HONEST = "honest-0"  # the run that is asked for


class Hostile:
    """Where a client floods, what it shows, and what it has done so far."""

    def __init__(self, grpc_address: str, http_address: str, token: str) -> None:
        self._grpc = grpc_address
        self.http = http_address
        self.done: Counter[str] = Counter()
        self.metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self.header = f"Authorization: Bearer {token}\r\n" if token else ""

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Host and port, of gRPC and of HTTP."""
        parts = (each.rpartition(":") for each in (self._grpc, self.http))
        return [(host, int(port)) for host, _, port in parts]

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[grpc.aio.Channel]:
        """A connection of its own."""
        async with grpc.aio.insecure_channel(self._grpc, options=_OPTIONS) as channel:
            yield channel

    async def again(self, attack: Callable[[], Awaitable[None]]) -> None:
        """Attacks for ever; how an attack fails is counted."""
        while True:
            try:
                await attack()
            except grpc.RpcError as error:
                self.done[error.code().name] += 1  # type: ignore[attr-defined]  # AioRpcError has it
            except (OSError, asyncio.IncompleteReadError, asyncio.InvalidStateError) as error:
                self.done[type(error).__name__] += 1
            await asyncio.sleep(0)

    async def pour(
        self, channel: grpc.aio.Channel, first: bytes, messages: Iterable[bytes], *, reads: bool = True
    ) -> None:
        """Opens a session and sends all messages as fast as answers come; where it reads none, as gRPC takes them."""
        call = channel.stream_stream(_SESSION)(metadata=self.metadata)
        await call.write(first)
        if reads and await call.read() is grpc.aio.EOF:
            self.done[(await call.code()).name] += 1
            return
        room = asyncio.Semaphore(_WINDOW)
        reading = asyncio.create_task(_count_down(call, room)) if reads else None
        try:
            for message in messages:
                if reads and room.locked():
                    with suppress(TimeoutError):  # an acknowledgement can be of several
                        await asyncio.wait_for(room.acquire(), 0.05)
                await call.write(message)
                self.done["messages"] += 1
        finally:
            if reading is not None:
                reading.cancel()
            call.cancel()


async def _count_down(call: grpc.aio.StreamStreamCall[bytes, bytes], room: asyncio.Semaphore) -> None:
    while await call.read() is not grpc.aio.EOF:
        room.release()


async def _together(attacks: Iterable[Awaitable[None]]) -> None:
    await asyncio.gather(*attacks)


# Messages


def _hello(run: str, layers: int) -> bytes:
    rows = [
        types_pb2.LayerBlock(block=block, layer=f"layers.{number}", parameters=64)
        for number in range(layers)
        for block in _BLOCKS
    ]
    message = agent_pb2.Hello(protocol=wire.PROTOCOL, training_job="flood", run=run, attempt=f"{run}-1", host=run)
    message.MergeFrom(agent_pb2.Hello(blocks=_BLOCKS, layer_blocks=rows, optimizer="AdamW", control="lr"))
    message.MergeFrom(agent_pb2.Hello(min_multiplier=0.1, max_multiplier=10.0, sketch_size=wire.SKETCH_SIZE))
    return agent_pb2.SessionRequest(hello=message).SerializeToString()


def _samples(rest: Iterable[agent_pb2.Sample]) -> Iterator[bytes]:
    for sequence, sample in enumerate(itertools.cycle([each.SerializeToString() for each in rest]), 1):
        yield request(sequence, 0, sample)


def _gnb(draws: int, layers: int) -> agent_pb2.GnbProbe:
    generator = np.random.default_rng(draws)
    return agent_pb2.GnbProbe(
        tokens=256,
        rows=4,
        traces=wire.encode(generator.chisquare(4, (draws, 5 * layers)), "float64"),
        sketches=wire.encode(generator.standard_normal((draws, 5, wire.SKETCH_SIZE)), "float32"),
    )


def _hutchinson(draws: int, layers: int) -> agent_pb2.HutchinsonProbe:
    traces = np.zeros((draws, 5 * layers))
    traces[:, ::5] = 1.0
    return agent_pb2.HutchinsonProbe(tokens=256, rows=4, block="emb", traces=wire.encode(traces, "float64"))


def _direction(size: float) -> agent_pb2.DirectionProbe:
    ones = np.ones(len(_BLOCKS))
    return agent_pb2.DirectionProbe(
        tokens=256,
        rows=4,
        descent=1.0,
        curvature=size,
        block_descent=wire.encode(ones, "float64"),
        block_curvature=wire.encode(size * ones, "float64"),
        update_ratio=wire.encode(0.01 * ones, "float32"),
    )


# Floods


async def mute(hostile: Hostile) -> None:
    """Streams without a message, as many as a connection may have, and requests without their last line."""

    async def streams() -> None:
        async with hostile.channel() as channel:
            calls = [channel.stream_stream(_SESSION)(metadata=hostile.metadata) for _ in range(64)]
            await asyncio.gather(*(call.code() for call in calls))
            hostile.done["streams"] += len(calls)

    async def half_open() -> None:
        reader, writer = await asyncio.open_connection(*hostile.addresses[1])
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: daemon\r\n")
        await reader.read()
        hostile.done["requests"] += 1
        writer.close()

    await _together(
        [hostile.again(streams) for _ in range(_CONNECTIONS)] + [hostile.again(half_open) for _ in range(300)]
    )


async def connections(hostile: Hostile) -> None:
    """Connections that send nothing, 1,000 at a time, again and again."""

    async def connect(where: tuple[str, int]) -> None:
        loop = asyncio.get_running_loop()
        opened = []
        for _ in range(100):
            opened.append(socket.socket())
            opened[-1].setblocking(False)
            with suppress(TimeoutError):
                await asyncio.wait_for(loop.sock_connect(opened[-1], where), 1.0)
        hostile.done["connections"] += len(opened)
        for each in opened:
            each.close()

    await _together(hostile.again(lambda where=where: connect(where)) for where in hostile.addresses * 5)  # type: ignore[misc]


async def _three_runs(hostile: Hostile, name: str, layers: int, samples: Callable[[], Iterable[bytes]]) -> None:
    async def attack(number: int) -> None:
        async with hostile.channel() as channel:
            await hostile.pour(channel, _hello(f"{name}-{number}", layers), samples())

    await _together(hostile.again(lambda number=number: attack(number)) for number in range(3))  # type: ignore[misc]


async def probes(hostile: Hostile) -> None:
    """Three runs of 500 layer blocks whose samples have probes of up to 64 draws, so that windows are padded."""
    each = [agent_pb2.Sample(gnb=_gnb(n, 100), hutchinson=_hutchinson(n, 100)) for n in (64, 1, 64, 7, 64, 33)]
    await _three_runs(hostile, "probes", 100, lambda: _samples(each))


async def directions(hostile: Hostile) -> None:
    """Three runs whose curvature has no square."""
    each = [agent_pb2.Sample(direction=_direction(size)) for size in (1e200, -1e200, 1.7e308)]
    await _three_runs(hostile, "directions", 2, lambda: _samples(each))


async def large(hostile: Hostile) -> None:
    """Three runs whose messages have 8 MB."""
    each = [agent_pb2.Sample(hutchinson=_hutchinson(64, 3_276))]
    await _three_runs(hostile, "large", 3_276, lambda: _samples(each))


async def settings(hostile: Hostile) -> None:
    """Three runs with 128,000 settings of parameter groups a sample, the most there may be."""
    group = {f"setting{number}": 1.0 for number in range(256)}
    each = agent_pb2.Sample(
        optimizer_groups=[agent_pb2.OptimizerGroup(group=number, settings=group) for number in range(500)]
    )
    await _three_runs(hostile, "settings", 2, lambda: _samples([each]))


async def checkpoints(hostile: Hostile) -> None:
    """Three runs that save 256 checkpoints a sample, and delete as many."""

    def sample(number: int) -> agent_pb2.Sample:
        saved = [types_pb2.Checkpoint(step=number, uri=f"/{number}/{each}") for each in range(256)]
        gone = [f"/{number - 50}/{each}" for each in range(256)] if number > 50 else []
        return agent_pb2.Sample(checkpoints=saved, deleted_checkpoints=gone)

    each = [sample(number) for number in range(200)]
    await _three_runs(hostile, "checkpoints", 2, lambda: _samples(each))


async def samples(hostile: Hostile) -> None:
    """Sixteen runs that send ordinary samples as fast as they can."""
    generator = np.random.default_rng(0)
    rest = [body(generator, gnb=False) for _ in range(64)]

    async def attack(number: int) -> None:
        async with hostile.channel() as channel:
            messages = (request(sequence, 0, rest[sequence % 64]) for sequence in itertools.count(1))
            await hostile.pour(channel, hello(f"fast-{number}", f"fast-{number}"), messages)

    await _together(hostile.again(lambda number=number: attack(number)) for number in range(16))  # type: ignore[misc]


async def names(hostile: Hostile) -> None:
    """New runs, up to 10,000, each with a Hello of 66 layer blocks and a sample."""
    numbers = itertools.count()
    rest = body(np.random.default_rng(0), gnb=False)

    async def attack() -> None:
        async with hostile.channel() as channel:
            for number in itertools.islice(numbers, 50):
                if number >= 10_000:
                    await asyncio.sleep(1.0)
                    return
                hostile.done["names"] += 1
                await hostile.pour(channel, hello(f"name-{number}", f"host-{number // 100}"), [request(1, 0, rest)])

    await _together(hostile.again(attack) for _ in range(_CONNECTIONS))


async def replay(hostile: Hostile) -> None:
    """A run that sends its first sequence numbers again and again."""
    rest = body(np.random.default_rng(0), gnb=True)

    async def attack(number: int) -> None:
        async with hostile.channel() as channel:
            messages = (request(each % 64 + 1, 0, rest) for each in itertools.count())
            await hostile.pour(channel, hello(f"replay-{number}", "replay"), messages, reads=number > 0)

    await _together(hostile.again(lambda number=number: attack(number)) for number in range(4))  # type: ignore[misc]


async def malformed(hostile: Hostile) -> None:
    """Sessions of random bytes, and of samples with bytes changed."""
    generator = random.Random(0)  # noqa: S311  no secret
    good = request(1, 0, body(np.random.default_rng(0), gnb=False))

    def damaged() -> Iterator[bytes]:
        while True:
            yield generator.randbytes(generator.randrange(200))
            cut = bytearray(good)
            cut[generator.randrange(len(cut))] ^= 1 << generator.randrange(8)
            yield bytes(cut)

    async def attack(number: int) -> None:
        async with hostile.channel() as channel:
            await hostile.pour(channel, hello(f"malformed-{number}", "malformed"), damaged())

    await _together(hostile.again(lambda number=number: attack(number)) for number in range(8))  # type: ignore[misc]


async def operator(hostile: Hostile) -> None:
    """All calls that read, hundreds at a time; watches whose answers nobody reads."""
    read = {
        "GetDaemon": operator_pb2.GetDaemonRequest(),
        "ListRuns": operator_pb2.ListRunsRequest(),
        "GetRun": operator_pb2.GetRunRequest(run=HONEST),
        "GetHistory": operator_pb2.GetHistoryRequest(run=HONEST),
        "ListRevisions": operator_pb2.ListRevisionsRequest(run=HONEST),
        "ListDecisions": operator_pb2.ListDecisionsRequest(limit=10_000),
        "ListTransitions": operator_pb2.ListTransitionsRequest(),
        "ListSilences": operator_pb2.ListSilencesRequest(include_ended=True),
    }
    watch = operator_pb2.WatchRunRequest(run=HONEST).SerializeToString()

    async def ask(channel: grpc.aio.Channel, name: str) -> None:
        await channel.unary_unary(_OPERATOR + name)(read[name].SerializeToString(), metadata=hostile.metadata)  # type: ignore[attr-defined]
        hostile.done[name] += 1

    async def watches() -> None:
        async with hostile.channel() as channel:
            calls = [channel.unary_stream(f"{_OPERATOR}WatchRun")(watch, metadata=hostile.metadata) for _ in range(60)]
            hostile.done["watches"] += len(calls)
            await asyncio.gather(*(call.code() for call in calls))

    async with hostile.channel() as one, hostile.channel() as other:
        each = itertools.product((one, other), read, range(4))
        asking = [hostile.again(lambda channel=channel, name=name: ask(channel, name)) for channel, name, _ in each]  # type: ignore[misc]
        await _together(asking + [hostile.again(watches) for _ in range(4)])


async def unread(hostile: Hostile) -> None:
    """Sessions whose many refusals and acknowledgements nobody reads, and scrapes that nobody reads."""
    rest = body(np.random.default_rng(0), gnb=False)

    async def attack(number: int) -> None:
        async with hostile.channel() as channel:
            good = (request(each, 0, rest) for each in itertools.count(1))
            messages = itertools.chain.from_iterable(zip(good, itertools.repeat(b"\xff"), strict=False))
            await hostile.pour(channel, hello(f"unread-{number}", "unread"), messages, reads=False)

    async def scrape() -> None:
        _, writer = await asyncio.open_connection(*hostile.addresses[1], limit=1)
        writer.write(f"GET /metrics HTTP/1.1\r\nHost: daemon\r\n{hostile.header}\r\n".encode())
        await asyncio.sleep(5.0)
        hostile.done["scrapes"] += 1
        writer.transport.abort()

    runs = [hostile.again(lambda number=number: attack(number)) for number in range(4)]  # type: ignore[misc]
    await _together(runs + [hostile.again(scrape) for _ in range(64)])


async def _requests(hostile: Hostile, message: bytes, count: int) -> None:
    """Sends one request again and again, over `count` connections, and reads the answers."""

    async def ask() -> None:
        reader, writer = await asyncio.open_connection(*hostile.addresses[1])
        try:
            while True:
                writer.write(message)
                await writer.drain()
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
                await reader.readexactly(int(length.partition(b":")[2]))
                hostile.done[head[9:12].decode()] += 1
        finally:
            writer.transport.abort()

    await _together(hostile.again(ask) for _ in range(count))


async def metrics(hostile: Hostile) -> None:
    """Scrapes, compressed, over 64 connections at once."""
    head = f"GET /metrics HTTP/1.1\r\nHost: daemon\r\nAccept-Encoding: gzip\r\n{hostile.header}\r\n"
    await _requests(hostile, head.encode(), 64)


async def alerts(hostile: Hostile) -> None:
    """Alerts of 1 MB over 64 connections."""
    content = json.dumps({"version": "4", "alerts": [{"labels": {"run": "x" * 1_000_000}}]})
    head = f"POST /api/v1/alerts HTTP/1.1\r\nHost: daemon\r\nContent-Length: {len(content)}\r\n{hostile.header}\r\n"
    await _requests(hostile, (head + content).encode(), 64)


FLOODS: dict[str, Callable[[Hostile], Awaitable[None]]] = {
    each.__name__: each
    for each in (
        mute,
        connections,
        samples,
        probes,
        directions,
        large,
        settings,
        checkpoints,
        names,
        replay,
        malformed,
        operator,
        unread,
        metrics,
        alerts,
    )
}


async def _main(given: argparse.Namespace) -> None:
    hostile = Hostile(given.grpc, given.http, os.environ.get("FLOOD_TOKEN", ""))
    print("flooding", flush=True)
    with suppress(TimeoutError):
        async with asyncio.timeout(given.seconds):
            await FLOODS[given.kind](hostile)
    print(json.dumps(hostile.done), flush=True)
    os._exit(0)  # without the farewells that gRPC would wait for


def main() -> None:
    """Flood, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=FLOODS)
    parser.add_argument("grpc")
    parser.add_argument("http")
    parser.add_argument("--seconds", type=float, required=True)
    raise_descriptor_limit()
    asyncio.run(_main(parser.parse_args()))


if __name__ == "__main__":
    main()
