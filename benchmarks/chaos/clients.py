"""Simulated agents and an operator, each of which keeps a log of what the daemon acknowledged.

An agent does what a real one with its courier does: it keeps a sample until that is acknowledged, connects again and
sends what it has kept, applies a command of one id once, and tells the result again if the command comes again. Some
commands it answers late. The operator asks each change once, with a reason that no other has.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np

from benchmarks.load.messages import BLOCKS, LAYER_BLOCKS, body, hello
from sharpwatch.v1 import agent_pb2, types_pb2
from sharpwatch.v1 import operator_pb2 as pb
from sharpwatch.v1.operator_pb2_grpc import OperatorServiceStub

STEPS_A_SECOND = 12.0
CHANGES_A_SECOND = 10.0
SILENCE = 3.0  # seconds after which a session that owes an answer is given up
PATIENCE = 60.0  # seconds until what must come is held to be lost
_METHOD = "/sharpwatch.v1.AgentService/Session"
_KEPT = 512  # samples without an acknowledgement, after which an agent makes no step
_PROBE_EVERY = 20  # steps
_RETRY = 0.1  # seconds between sessions
_LATE = 0.3  # share of commands that are answered late
_LATE_STEPS = 40
_AUTHOR = "operator"
Connect = Callable[[], grpc.aio.Channel]


def bodies() -> list[agent_pb2.Sample]:
    """Samples without number, step and time; each `_PROBE_EVERY`-th has a probe."""
    numbers = np.random.default_rng(0)
    return [agent_pb2.Sample.FromString(body(numbers, gnb=number == 0)) for number in range(_PROBE_EVERY)]


@dataclass
class Answer:
    """What an agent says to a command.

    Attributes:
        due: The sample with which it is sent.
        step: From which on the command's multipliers were in force; 0 before.
        told: The samples that carried it.
    """

    command: types_pb2.Command
    due: int
    step: int = 0
    told: list[int] = field(default_factory=list)


@dataclass
class AgentLog:
    """What an agent knows.

    Attributes:
        sums: A checksum of each sample, by sequence.
        acknowledged: The highest sequence that was acknowledged.
        refused: Those that will never be taken.
        answers: By the command's id.
        repeated: Commands that came again in a session that began after their answer had been acknowledged.
        forgotten: Samples that the daemon acknowledged and at a later Welcome did not know.
        sessions: How many were opened.
        longest_wait: Seconds from a sample to its acknowledgement.
    """

    sums: dict[int, int] = field(default_factory=dict)
    acknowledged: int = 0
    refused: set[int] = field(default_factory=set)
    answers: dict[str, Answer] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)
    forgotten: int = 0
    sessions: int = 0
    longest_wait: float = 0.0

    def answered(self, answer: Answer) -> bool:
        """Whether an answer was acknowledged."""
        return any(each <= self.acknowledged and each not in self.refused for each in answer.told)


class Agent:
    """One run, with one attempt.

    Args:
        run: Its name.
        connect: Makes a channel to the daemon.
        samples: Those of `bodies`.
        randomness: When its steps are, and which commands it answers late.
    """

    def __init__(
        self, run: str, connect: Connect, samples: Sequence[agent_pb2.Sample], randomness: random.Random
    ) -> None:
        self.run_name = run
        self.attempt = f"{run}-1"
        self.log = AgentLog()
        self._connect = connect
        self._samples = samples
        self._random = randomness
        self._hello = hello(run, "host")
        self._kept: dict[int, tuple[bytes, float]] = {}  # the message and when it was made, by sequence
        self._sequence = 0
        self._revision = 0
        self._multipliers = dict.fromkeys(BLOCKS, 1.0)
        self._news = asyncio.Event()
        self._settled = asyncio.Event()  # nothing is kept
        self._call: grpc.aio.StreamStreamCall[bytes, bytes] | None = None

    async def train(self, over: asyncio.Event) -> None:
        """Makes steps until `over`, and returns once all samples are acknowledged."""
        async with asyncio.TaskGroup() as tasks:
            talking = tasks.create_task(self._talk())
            while not over.is_set():
                await asyncio.sleep(self._random.expovariate(STEPS_A_SECOND))
                if len(self._kept) < _KEPT:
                    self._step()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._settled.wait(), PATIENCE)
            talking.cancel()

    async def reconnect(self) -> None:
        """Ends the session in order; the next one has a connection of its own."""
        if self._call is not None:
            await self._call.done_writing()

    def _step(self) -> None:
        """Makes a sample, with the answers to commands that are due."""
        self._sequence += 1
        sample = agent_pb2.Sample()
        sample.CopyFrom(self._samples[self._sequence % len(self._samples)])
        sample.sequence = sample.step = self._sequence
        sample.taken_at_unix_ns = time.time_ns()
        for answer in self.log.answers.values():
            if answer.due and answer.due <= self._sequence:
                sample.results.append(self._answer(answer))
        values = np.array([self._multipliers[each.type] for each in LAYER_BLOCKS], np.float32)
        sample.tap.lr_multiplier.data = values.tobytes()
        sample.tap.learning_rate.data = (values * np.float32(1e-3)).tobytes()
        sample.health.lr_revision = self._revision
        sample.health.multipliers.update(self._multipliers)
        message = agent_pb2.SessionRequest(sample=sample).SerializeToString()
        self.log.sums[self._sequence] = zlib.crc32(message)
        self._kept[self._sequence] = message, time.monotonic()
        self._news.set()
        self._settled.clear()

    def _answer(self, answer: Answer) -> types_pb2.CommandResult:
        if not answer.step:
            answer.step = self._sequence
            self._multipliers.update(answer.command.set_multipliers.multipliers)
            self._revision = answer.command.set_multipliers.revision
        answer.due = 0
        answer.told.append(self._sequence)
        return types_pb2.CommandResult(
            command_id=answer.command.id, outcome=types_pb2.COMMAND_OUTCOME_APPLIED, step=answer.step
        )

    async def _talk(self) -> None:
        while True:
            await self._session()
            await asyncio.sleep(_RETRY)

    async def _session(self) -> None:
        async with self._connect() as channel:
            answered = {name for name, answer in self.log.answers.items() if self.log.answered(answer)}
            self._call = channel.stream_stream(_METHOD, None, None)()
            try:
                async with asyncio.timeout(SILENCE):
                    await self._call.write(self._hello)
                    first = await self._call.read()
                if first is grpc.aio.EOF:
                    return
                welcome = agent_pb2.SessionResponse.FromString(first).welcome
                self.log.sessions += 1
                self.log.forgotten += max(0, self.log.acknowledged - welcome.acknowledged_sequence)
                self._acknowledge(welcome.acknowledged_sequence)
                async with asyncio.TaskGroup() as tasks:
                    sending = tasks.create_task(self._send(self._call))
                    await self._read(self._call, answered)
                    sending.cancel()
            except* (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
                pass
            finally:
                self._call.cancel()

    async def _send(self, call: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
        sent = self.log.acknowledged
        while True:
            while sent < self._sequence:
                sent += 1
                if sent in self._kept:
                    await call.write(self._kept[sent][0])
            self._news.clear()
            await self._news.wait()

    async def _read(self, call: grpc.aio.StreamStreamCall[bytes, bytes], answered: set[str]) -> None:
        while True:
            async with asyncio.timeout(SILENCE):
                message = await call.read()
            if message is grpc.aio.EOF:
                return
            response = agent_pb2.SessionResponse.FromString(message)
            if response.HasField("ack"):
                self._acknowledge(response.ack.sequence)
            elif response.HasField("refusal"):
                self.log.refused.add(response.refusal.sequence)
                self._kept.pop(response.refusal.sequence, None)
            elif response.HasField("command"):
                self._take(response.command, answered)

    def _acknowledge(self, sequence: int) -> None:
        self.log.acknowledged = max(self.log.acknowledged, sequence)
        now = time.monotonic()
        for each in [kept for kept in self._kept if kept <= sequence]:
            _, made_at = self._kept.pop(each)
            self.log.longest_wait = max(self.log.longest_wait, now - made_at)
        if not self._kept:
            self._settled.set()

    def _take(self, command: types_pb2.Command, answered: set[str]) -> None:
        known = self.log.answers.get(command.id)
        if known is None:
            steps = self._random.randint(2, _LATE_STEPS) if self._random.random() < _LATE else 1
            # Not before an earlier one: of two sets the later one's must win.
            due = max([self._sequence + steps, *(each.due for each in self.log.answers.values())])
            self.log.answers[command.id] = Answer(command, due)
            return
        if command.id in answered:
            self.log.repeated.append(command.id)
        known.due = known.due or self._sequence + 1


@dataclass
class Asked:
    """A change that the operator asked for.

    Attributes:
        decision: The decision by which the daemon acknowledged it; None for a mode, or where no answer came.
        acknowledged: Whether it did.
    """

    run: str
    decision: pb.Decision | None = None
    acknowledged: bool = False


class Operator:
    """Changes learning rates and modes of runs, one after the other.

    Args:
        connect: Makes a channel to the daemon.
        token: Its operator's token.
        runs: The runs.
        randomness: What it asks for and when.

    Attributes:
        asked: By the reason that it gave.
    """

    def __init__(self, connect: Connect, token: str, runs: Sequence[str], randomness: random.Random) -> None:
        self.asked: dict[str, Asked] = {}
        self._connect = connect
        self._credentials = (("authorization", f"Bearer {token}"),)
        self._runs = runs
        self._random = randomness

    async def work(self, over: asyncio.Event) -> None:
        """Asks until `over`."""
        for number in itertools.count(1):
            await asyncio.sleep(self._random.expovariate(CHANGES_A_SECOND))
            if over.is_set():
                return
            reason = f"change {number}"
            self.asked[reason] = asked = Asked(self._random.choice(self._runs))
            # Without an answer nobody knows whether it was made: it may be there once, and need not.
            with suppress(grpc.aio.AioRpcError):
                async with self._connect() as channel:
                    asked.decision = await self._ask(OperatorServiceStub(channel), asked.run, reason)
                asked.acknowledged = True

    async def under_way(self) -> int:
        """How many of its decisions no agent has answered yet."""
        async with self._connect() as channel:
            request = pb.ListDecisionsRequest(limit=10_000)
            found = await OperatorServiceStub(channel).ListDecisions(
                request, metadata=self._credentials, timeout=PATIENCE
            )
        return sum(each.outcome == "sent" for each in found.decisions)

    async def _ask(self, stub: OperatorServiceStub, run: str, reason: str) -> pb.Decision | None:
        how: dict[str, Any] = {"metadata": self._credentials, "timeout": SILENCE}
        if self._random.random() < 0.2:
            mode = self._random.choice(("observe", "advise"))
            await stub.SetMode(pb.SetModeRequest(run=run, mode=mode, author=_AUTHOR, reason=reason), **how)
            return None
        multipliers = {self._random.choice(BLOCKS): self._random.choice((0.5, 0.8, 1.25, 2.0))}
        request = pb.SetLearningRatesRequest(run=run, multipliers=multipliers, author=_AUTHOR, reason=reason)
        answer: pb.SetLearningRatesResponse = await stub.SetLearningRates(request, **how)
        return answer.decision
