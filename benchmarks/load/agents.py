"""Simulated agents, in a process of their own, on the real protocol: a session a run, samples, acknowledgements.

Run by `benchmarks.load`: `python -m benchmarks.load.agents ADDRESS --runs N ...`. Each agent sends a sample every
`--interval` seconds, or with `--window W` as fast as W samples without an acknowledgement allow. A line of JSON on
standard output says when all runs are welcomed, when measuring begins, and what was measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc
import numpy as np

from benchmarks.load.messages import body, hello, request
from sharpwatch.daemon.api.limits import raise_descriptor_limit
from sharpwatch.v1 import agent_pb2

_METHOD = "/sharpwatch.v1.AgentService/Session"
_POOL = 64  # different samples of a kind
_RUNS_A_HOST = 200  # a client may have 256
_TOGETHER = 50  # sessions that are opened at a time
_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))  # a connection for each agent


@dataclass(slots=True)
class Measured:
    """What all agents have seen while `on`."""

    on: bool = False
    sent: int = 0
    acknowledged: int = 0
    refused: int = 0
    size: int = 0  # bytes of acknowledged samples
    seconds: array[float] = field(default_factory=lambda: array("d"))  # from sending a sample to its acknowledgement


@dataclass(slots=True)
class Load:
    """What each agent sends: `every` is the number of steps between two probes, 0 for none."""

    interval: float
    window: int
    every: int
    taps: Sequence[bytes]
    probed: Sequence[bytes]

    def message(self, sequence: int) -> bytes:
        """The next sample of a run."""
        pool = self.probed if self.every and sequence % self.every == 0 else self.taps
        return request(sequence, time.time_ns(), pool[sequence % _POOL])


class Agent:
    """One run's session."""

    def __init__(  # noqa: PLR0913, PLR0917  who it is, and what it does
        self, address: str, run: str, host: str, load: Load, measured: Measured, token: str = ""
    ) -> None:
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._load = load
        self._measured = measured
        self._hello = hello(run, host)
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._call: grpc.aio.StreamStreamCall[bytes, bytes]
        self._sent: deque[tuple[int, float, int]] = deque()  # sequence, when, bytes
        self._news = asyncio.Event()

    async def open(self) -> None:
        """Sends the Hello and awaits the Welcome."""
        # Not before: the daemon ends the oldest of the calls that wait for their first message where there are many.
        self._call = self._channel.stream_stream(_METHOD, None, None)(metadata=self._metadata)
        await self._call.write(self._hello)
        response = agent_pb2.SessionResponse.FromString(await self._call.read())
        assert response.HasField("welcome"), response

    async def run(self, phase: float, over: asyncio.Event) -> None:
        """Sends samples until `over`, the first after `phase` of an interval; then until all are acknowledged."""
        reading = asyncio.create_task(self._read())
        sequence, due = 0, time.monotonic() + phase * self._load.interval
        while not over.is_set():
            if self._load.window:
                await self._fewer_than(self._load.window)
            else:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                due += self._load.interval
            sequence += 1
            payload = self._load.message(sequence)
            self._sent.append((sequence, time.monotonic(), len(payload)))
            self._measured.sent += self._measured.on
            await self._call.write(payload)
        await self._fewer_than(1)
        await self._leave()
        await reading
        await self._channel.close()

    async def close(self) -> None:
        """Says farewell, and awaits no answer."""
        await self._leave()
        await self._channel.close()

    async def _leave(self) -> None:
        farewell = agent_pb2.SessionRequest(heartbeat=agent_pb2.Heartbeat(last=True))
        await self._call.write(farewell.SerializeToString())
        await self._call.done_writing()

    async def _fewer_than(self, count: int) -> None:
        while len(self._sent) >= count:
            if self._call.done():
                raise ConnectionError(f"the session was ended: {await self._call.details()}")
            self._news.clear()
            await self._news.wait()

    async def _read(self) -> None:
        while (payload := await self._call.read()) is not grpc.aio.EOF:
            response = agent_pb2.SessionResponse.FromString(payload)
            if response.HasField("ack"):
                self._acknowledged(response.ack.sequence)
            elif response.HasField("refusal"):
                self._measured.refused += self._measured.on
                self._sent = deque(each for each in self._sent if each[0] != response.refusal.sequence)
            self._news.set()
        self._news.set()

    def _acknowledged(self, sequence: int) -> None:
        now, measured = time.monotonic(), self._measured
        while self._sent and self._sent[0][0] <= sequence:
            _, at, size = self._sent.popleft()
            if measured.on:
                measured.acknowledged += 1
                measured.size += size
                measured.seconds.append(now - at)


def _tell(event: str, **fields: object) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


async def _main(given: argparse.Namespace) -> None:
    random = np.random.default_rng(0)
    pools = [[body(random, gnb=gnb) for _ in range(_POOL)] for gnb in (False, True)]
    load = Load(given.interval, given.window, given.every, *pools)
    measured, over = Measured(), asyncio.Event()
    agents = [
        Agent(given.address, f"{given.name}-{i}", f"host-{i // _RUNS_A_HOST}", load, measured)
        for i in range(given.runs)
    ]
    for first in range(0, len(agents), _TOGETHER):
        await asyncio.gather(*(agent.open() for agent in agents[first : first + _TOGETHER]))
    _tell("welcomed")
    tasks = [asyncio.create_task(agent.run(i / given.runs, over)) for i, agent in enumerate(agents)]
    await asyncio.sleep(given.warm)
    began, processor = time.monotonic(), time.process_time()
    measured.on = True
    _tell("measuring")
    await asyncio.sleep(given.seconds)
    measured.on = False
    passed = time.monotonic() - began
    quantiles = np.quantile(measured.seconds, (0.5, 0.99)).tolist() if measured.seconds else [float("nan")] * 2
    _tell(
        "measured",
        seconds=passed,
        sent=measured.sent,
        acknowledged=measured.acknowledged,
        refused=measured.refused,
        bytes=measured.size,
        p50=quantiles[0],
        p99=quantiles[1],
        processor=time.process_time() - processor,
    )
    over.set()
    await asyncio.gather(*tasks)


def main() -> None:
    """Send, and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("--name", default="run", help="how the runs' names begin")
    parser.add_argument("--runs", type=int, required=True)
    parser.add_argument("--interval", type=float, default=1.0)
    parser.add_argument("--window", type=int, default=0)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--warm", type=float, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    raise_descriptor_limit()
    asyncio.run(_main(parser.parse_args()))


if __name__ == "__main__":
    main()
