"""Honest runs beside a hostile client: what each kind of flood costs them.

Honest agents are in this process: each sends a sample a second, with a `gnb` probe at every tenth, and has a fault in
every flood, of which an alert must come. The client that floods is a process of its own at the lowest priority, so that
what it takes of the processor is not taken for the daemon's. Quiet and flooded times alternate.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from array import array
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np

from benchmarks.load.agents import Agent, Load, Measured
from benchmarks.load.messages import LAYER_BLOCKS, body
from benchmarks.load.servers import ROOT, Server, daemon
from sharpwatch import wire
from sharpwatch.common.credentials import Credential, make_credential
from sharpwatch.v1 import agent_pb2, operator_pb2
from sharpwatch.v1.operator_pb2_grpc import OperatorServiceStub

RUNS = 20
_WARM = 150  # samples at once, so that windows are full
_POOL = 64
FAULTY = 5  # samples that a fault lasts
_SETTLE = 5.0  # seconds after a flood that do not count
_PATIENCE = 30.0  # seconds within which what is sent must be acknowledged, and an alert be there


@dataclass(slots=True)
class FaultyLoad(Load):
    """What an honest run sends: healthy samples, and faulty ones when it is asked for."""

    faulty: Sequence[bytes] = ()
    left: int = 0  # faulty samples that are still to be sent

    def message(self, sequence: int) -> bytes:
        """The next sample."""
        if not self.left:
            return super(FaultyLoad, self).message(sequence)
        self.left -= 1
        own = Load(self.interval, self.window, 0, self.faulty, self.faulty)
        return own.message(sequence)


class Honest(Agent):
    """An honest run, which keeps when each sample was sent, and how long its acknowledgement took."""

    def __init__(self, address: str, number: int, load: FaultyLoad, token: str) -> None:
        super().__init__(address, f"honest-{number}", "honest", load, Measured(), token)
        self.name = f"honest-{number}"
        self.load = load
        self.number = number
        self.sent: list[float] = []  # of each sample, by its sequence
        self.seconds: dict[int, float] = {}  # by sequence
        self.refused = 0

    async def warm(self) -> None:
        """Sends what makes the run old enough to be judged."""
        for _ in range(_WARM):
            await self._fewer_than(8)
            await self._send()

    async def live(self) -> None:
        """Sends a sample every interval, for ever."""
        due = time.monotonic() + self.number / RUNS * self.load.interval
        while True:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            due += self.load.interval
            await self._send()

    def receive(self) -> asyncio.Task[None]:
        """Takes acknowledgements, until the session ends."""
        return asyncio.create_task(self._read())

    async def _send(self) -> None:
        self.sent.append(time.monotonic())
        sequence = len(self.sent)
        payload = self.load.message(sequence)
        self._sent.append((sequence, self.sent[-1], len(payload)))
        await self._call.write(payload)

    def _acknowledged(self, sequence: int) -> None:
        now = time.monotonic()
        while self._sent and self._sent[0][0] <= sequence:
            number, at, _ = self._sent.popleft()
            self.seconds[number] = now - at

    def within(self, began: float, ended: float) -> list[int]:
        """The sequences of samples that were sent in that time."""
        return [number for number, at in enumerate(self.sent, 1) if began <= at < ended]


@dataclass(slots=True)
class Window:
    """Some seconds, quiet or flooded: what honest runs saw of the daemon, and what it took."""

    seconds: array[float] = field(default_factory=lambda: array("d"))
    lost: int = 0
    passed: float = 0.0
    processor: float = 0.0

    def add(self, agents: Sequence[Honest], began: float, ended: float, processor: float) -> None:
        """Adds the samples that were sent in that time."""
        for agent in agents:
            for number in agent.within(began, ended):
                if number in agent.seconds:
                    self.seconds.append(agent.seconds[number])
                else:
                    self.lost += 1
        self.passed += ended - began
        self.processor += processor

    @property
    def quantiles(self) -> tuple[float, float]:
        """The median and the 99th percentile, in milliseconds."""
        found = np.quantile(self.seconds, (0.5, 0.99)) if self.seconds else (np.nan, np.nan)
        return 1e3 * float(found[0]), 1e3 * float(found[1])


def credentials() -> tuple[dict[str, str], list[Credential]]:
    """Tokens by the name of who holds them, and what the daemon knows of these."""
    made = {name: make_credential(name, "agent") for name in ("honest", "hostile")}
    made["viewer"] = make_credential("viewer", "viewer")
    return {name: token for name, (token, _) in made.items()}, [each for _, each in made.values()]


def _faults(taps: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """Samples with gradients that are not finite, and with a loss that is not, in turn.

    Both are told at once, however often they have come before.
    """
    broken, lost = [], []
    counts = np.zeros(len(LAYER_BLOCKS), np.int64)
    counts[5] = 7
    for tap in taps:
        sample = agent_pb2.Sample.FromString(tap)
        sample.tap.non_finite.CopyFrom(wire.encode(counts, "int64"))
        broken.append(sample.SerializeToString())
        sample = agent_pb2.Sample.FromString(tap)
        sample.loss = np.nan
        lost.append(sample.SerializeToString())
    while True:
        yield broken
        yield lost


@asynccontextmanager
async def honest_runs(server: Server, token: str) -> AsyncIterator[list[Honest]]:
    """Honest runs that are old enough to be judged, and live until the end of the `with`."""
    random = np.random.default_rng(0)
    taps, probed = ([body(random, gnb=gnb) for _ in range(_POOL)] for gnb in (False, True))
    faults = _faults(taps)
    agents = [
        Honest(server.grpc, number, FaultyLoad(1.0, 0, 10, taps, probed, next(faults)), token) for number in range(RUNS)
    ]
    await asyncio.gather(*(agent.open() for agent in agents))
    tasks = [agent.receive() for agent in agents]
    await asyncio.gather(*(agent.warm() for agent in agents))
    tasks += [asyncio.create_task(agent.live()) for agent in agents]
    try:
        yield agents
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:  # a session that was ended is among what is lost
            with suppress(asyncio.CancelledError, grpc.RpcError, asyncio.InvalidStateError):
                await task


async def settle(agents: Sequence[Honest], until: float) -> None:
    """Waits until all that was sent before `until` is acknowledged, for a while."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        if all(not agent._sent or agent._sent[0][1] >= until for agent in agents):  # noqa: SLF001  its subclass's own
            return
        await asyncio.sleep(0.1)


async def missing(server: Server, agents: Sequence[Honest], since: Mapping[str, int]) -> int:
    """How many runs have no alert of a step from `since` on, after a while."""
    metadata = (("authorization", f"Bearer {server.token}"),)
    left = {agent.name for agent in agents}
    deadline = time.monotonic() + _PATIENCE
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        stub = OperatorServiceStub(channel)
        while left and time.monotonic() < deadline:
            for name in list(left):
                answer = await stub.GetRun(operator_pb2.GetRunRequest(run=name), metadata=metadata)
                if any(alert.first_step >= since[name] for alert in answer.detail.alerts):
                    left.discard(name)
            await asyncio.sleep(0.2)
    return len(left)


async def hostile_client(module: str, *arguments: str, token: str) -> asyncio.subprocess.Process:
    """Starts a module as the hostile client, which shows a token, or none where that is empty."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "FLOOD_TOKEN": token, "OMP_NUM_THREADS": "1"}
    command = ["nice", "-n", "19", sys.executable, "-m", module, *arguments]
    return await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environment, stdout=asyncio.subprocess.PIPE)


async def _welcomed(server: Server, name: str, token: str) -> float:
    """Seconds until a new honest agent is welcomed; infinite if it is not, for a while."""
    newcomer = Agent(server.grpc, name, "honest", Load(1.0, 0, 0, (), ()), Measured(), token)
    began = time.monotonic()
    try:
        await asyncio.wait_for(newcomer.open(), _PATIENCE)
    except (TimeoutError, grpc.RpcError, AssertionError):
        return float("inf")
    passed = time.monotonic() - began
    await newcomer.close()
    return passed


async def flood(  # noqa: PLR0913, PLR0917  one row of the table
    server: Server, agents: Sequence[Honest], kind: str, tokens: Mapping[str, str], shows: str, given: Any
) -> dict[str, Any]:
    """Floods the daemon in one way, after a quiet time each, and returns the figures."""
    quiet, flooded = Window(), Window()
    before, log = server.memory, server.log.size
    missed, hello, done = 0, 0.0, {}
    for number in range(given.rounds):
        began, processor = time.monotonic(), server.processor
        await asyncio.sleep(given.quiet)
        ended, processor = time.monotonic(), server.processor - processor
        await settle(agents, ended)
        quiet.add(agents, began, ended, processor)
        arguments = (kind, server.grpc, server.http, f"--seconds={given.seconds}")
        client = await hostile_client("benchmarks.load.floods", *arguments, token=tokens.get(shows, ""))
        await client.stdout.readline()  # type: ignore[union-attr]  # it begins
        began, processor = time.monotonic(), server.processor
        await asyncio.sleep(given.seconds / 3)
        since = {agent.name: len(agent.sent) + 1 for agent in agents}
        for agent in agents:
            agent.load.left = FAULTY
        hello = max(hello, await _welcomed(server, f"late-{kind}-{shows}-{number}", tokens["honest"]))
        told, _ = await client.communicate()
        ended, processor = time.monotonic(), server.processor - processor
        done = json.loads(told or b"{}")
        await settle(agents, ended)
        flooded.add(agents, began, ended, processor)
        missed += await missing(server, agents, since)
        await asyncio.sleep(_SETTLE)
    return {
        "flood": kind,
        "shows": shows,
        "quiet_p50_ms": quiet.quantiles[0],
        "quiet_p99_ms": quiet.quantiles[1],
        "flood_p50_ms": flooded.quantiles[0],
        "flood_p99_ms": flooded.quantiles[1],
        "worst_ms": 1e3 * max(flooded.seconds, default=float("nan")),
        "cost_ms": flooded.quantiles[1] - quiet.quantiles[1],
        "samples": len(flooded.seconds),
        "lost": quiet.lost + flooded.lost,
        "missing": missed,
        "hello_ms": 1e3 * hello,
        "quiet_cpu": quiet.processor / quiet.passed,
        "flood_cpu": flooded.processor / flooded.passed,
        "memory_mb": (server.memory - before) / 1e6,
        "log_kb": (server.log.size - log) / 1e3,
        "done": done,
    }


async def hostile(given: Any, keep: Callable[[Mapping[str, Any]], None]) -> list[dict[str, Any]]:
    """Floods a daemon in each way, without a token and with one; `keep` is called with the figures of each."""
    tokens, known = credentials()
    found = []
    with daemon(given.checkout, known) as server:
        async with honest_runs(server, tokens["honest"]) as agents:
            for kind, shows in itertools.product(given.kinds, given.shows):
                holder = {"none": "none", "token": "viewer" if kind == "operator" else "hostile"}[shows]
                found.append(await flood(server, agents, kind, tokens, holder, given))
                keep(found[-1])
        if server.log.errors:
            print(*server.log.errors.values(), sep="", file=sys.stderr)
    return found
