"""Damaged messages, calls and requests: python -m benchmarks.load.fuzz GRPC HTTP --messages N --seed S, the client.

`benchmarks.load fuzz` runs it beside honest runs, and then holds the daemon against what must be so: it lives, has had
no internal error, has logged no long line, and its journal has the changes that operators made and no other.
The operator's, viewer's and agent's tokens come by `$FLOOD_TOKEN`, separated by commas.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

from benchmarks.load.hostile import (
    FAULTY,
    Window,
    credentials,
    honest_runs,
    hostile_client,
    missing,
    settle,
)
from benchmarks.load.mutations import change_field, damaged, http_request, whole_hello, whole_sample
from benchmarks.load.servers import Server, daemon
from sharpwatch.v1 import agent_pb2, operator_pb2

_SESSION = "/sharpwatch.v1.AgentService/Session"
_OPERATOR = operator_pb2.DESCRIPTOR.services_by_name["OperatorService"]
_ADDED = ("Set", "Undo", "Start", "Promote", "Pause", "Abort", "Request", "Approve", "Reject", "Cancel", "Release")
_CHANGES = (*_ADDED, "Acknowledge", "Add", "Expire", "Forget")
_ANSWER_SECONDS = 5.0
_TARGETS = 3  # runs that operators change
_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))
_SHARES = {"session": 6, "operator": 3, "http": 1}  # of ten messages
_INTERNAL = re.compile(r"^sharpwatch_internal_errors_total\{.*$", re.MULTILINE)


@dataclass
class Fuzzer:
    """A client that sends damaged things to a daemon, and keeps which changes it was allowed."""

    grpc: str
    http: str
    tokens: Mapping[str, str]
    random: random.Random
    generator: np.random.Generator
    left: int
    sent: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    silences: list[str] = field(default_factory=list)  # ids of those that were added

    def shows(self, role: str) -> tuple[tuple[str, str], ...]:
        """The metadata of who has a role; none for a stranger."""
        token = self.tokens.get(role, role and "wrong")
        return (("authorization", f"Bearer {token}"),) if token else ()

    def take(self, kind: str) -> bool:
        """Counts a message; returns whether there was one left."""
        if self.left <= 0:
            return False
        self.left -= 1
        self.sent[kind] += 1
        return True

    async def sessions(self, number: int) -> None:
        """Sessions of damaged Hellos and samples, until no message is left."""
        attempt = 0
        while self.left > 0:
            attempt += 1
            async with grpc.aio.insecure_channel(self.grpc, options=_OPTIONS) as channel:
                for _ in range(20):
                    attempt += 1
                    with suppress(grpc.RpcError, TimeoutError, asyncio.InvalidStateError):
                        await self._session(channel, f"fuzz-{number}-{attempt % 16}", f"f{number}-{attempt}")

    async def _session(self, channel: grpc.aio.Channel, run: str, attempt: str) -> None:
        call = channel.stream_stream(_SESSION)(metadata=self.shows(self.random.choice(("agent", "agent", "agent", ""))))
        try:
            hello = agent_pb2.SessionRequest(hello=whole_hello(run, attempt))
            self.take("hello")
            is_damaged = self.random.random() < 0.3
            await call.write(damaged(hello, self.random) if is_damaged else hello.SerializeToString())
            async with asyncio.timeout(_ANSWER_SECONDS):
                if await call.read() is grpc.aio.EOF:
                    self.answers[(await call.code()).name] += 1
                    return
            reading = asyncio.create_task(self._count(call))
            for sequence in range(1, self.random.choice((5, 50, 150))):
                if call.done() or not self.take("sample"):
                    break
                message = agent_pb2.SessionRequest(sample=whole_sample(sequence, self.generator))
                await call.write(damaged(message, self.random))
                await asyncio.sleep(0)
            await call.write(agent_pb2.SessionRequest(heartbeat=agent_pb2.Heartbeat(last=True)).SerializeToString())
            await call.done_writing()
            await asyncio.wait((reading,), timeout=_ANSWER_SECONDS)
            reading.cancel()
        finally:
            call.cancel()

    async def _count(self, call: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
        with suppress(grpc.RpcError):
            while (payload := await call.read()) is not grpc.aio.EOF:
                response = agent_pb2.SessionResponse.FromString(payload)
                kind = response.WhichOneof("message") or ""
                self.answers[response.refusal.code if kind == "refusal" else kind] += 1

    async def targets(self) -> None:
        """Runs that operators change: a sample a second each, which are not damaged."""
        async with grpc.aio.insecure_channel(self.grpc, options=_OPTIONS) as channel:
            calls = []
            for number in range(_TARGETS):
                calls.append(channel.stream_stream(_SESSION)(metadata=self.shows("agent")))
                hello = whole_hello(f"target-{number}", f"t{number}")
                await calls[-1].write(agent_pb2.SessionRequest(hello=hello).SerializeToString())
                asyncio.create_task(self._count(calls[-1]))  # noqa: RUF006  it ends with its call
            sequence = 0
            while self.left > 0:
                sequence += 1
                sample = agent_pb2.SessionRequest(sample=whole_sample(sequence, self.generator)).SerializeToString()
                for call in calls:
                    if not call.done():  # an operator may have released it
                        with suppress(grpc.RpcError, asyncio.InvalidStateError):
                            await call.write(sample)
                await asyncio.sleep(1.0)

    async def operators(self) -> None:
        """Calls of the operator's service, by who may make them and by who may not."""
        while self.left > 0:
            async with grpc.aio.insecure_channel(self.grpc, options=_OPTIONS) as channel:
                for _ in range(200):
                    if not self.take("operator"):
                        return
                    with suppress(TimeoutError):
                        await self._operate(channel)

    async def _operate(self, channel: grpc.aio.Channel) -> None:
        method = self.random.choice(_OPERATOR.methods)
        role = self.random.choice(("operator", "operator", "viewer", "agent", "stranger", ""))
        request = getattr(operator_pb2, method.input_type.name)()
        self._fill(request, role)
        payload = damaged(request, self.random) if role != "operator" else self._by_field(request)
        try:
            answer = await self._call(channel, method, payload, self.shows(role))
        except grpc.RpcError as error:
            self.answers[error.code().name] += 1  # type: ignore[attr-defined]  # AioRpcError has it
            return
        self.answers["OK"] += 1
        if method.name.startswith(_CHANGES) and role != "operator":
            self.answers["changes that were not refused"] += 1
        if method.name == "AddSilence" and not operator_pb2.AddSilenceRequest.FromString(payload).dry_run:
            self.silences.append(operator_pb2.AddSilenceResponse.FromString(answer).silence.id)

    def _fill(self, request: Message, role: str) -> None:
        """Fills a request with what may be meant; who may not change anything names honest runs, too."""
        fields = request.DESCRIPTOR.fields_by_name
        runs = [f"target-{number}" for number in range(_TARGETS)] + ([] if role == "operator" else ["honest-0"])
        usual: dict[str, Any] = {
            "run": self.random.choice(runs),
            "author": "operator" if role == "operator" else "intruder",
            "reason": "fuzz",
            "mode": self.random.choice(("observe", "advise", "enforce")),
            "duration_seconds": 60.0,
            "alert": "LossSpike",
            "name": "fuzz",
        }
        for name, value in usual.items():
            if name in fields and fields[name].message_type is None:
                with suppress(TypeError):
                    setattr(request, name, value)
        if "multipliers" in fields:
            with suppress(AttributeError, TypeError):
                request.multipliers["ffn"] = self.random.choice((0.5, 0.9, 1.0, 2.0))  # type: ignore[attr-defined]

    def _by_field(self, request: Message) -> bytes:
        """An operator's request: damaged in its fields, not in who asks and of which run."""
        kept = {name: getattr(request, name) for name in ("run", "author") if name in request.DESCRIPTOR.fields_by_name}
        for _ in range(self.random.choice((0, 0, 1, 2))):
            change_field(request, self.random)
        for name, value in kept.items():
            setattr(request, name, value)
        return request.SerializeToString()

    async def _call(
        self, channel: grpc.aio.Channel, method: MethodDescriptor, payload: bytes, metadata: tuple[tuple[str, str], ...]
    ) -> bytes:
        path = f"/{_OPERATOR.full_name}/{method.name}"
        async with asyncio.timeout(_ANSWER_SECONDS):
            if method.name.startswith("Watch"):
                call = channel.unary_stream(path)(payload, metadata=metadata)
                first = await call.read()
                call.cancel()
                return b"" if first is grpc.aio.EOF else first
            return await channel.unary_unary(path)(payload, metadata=metadata)

    async def requests(self) -> None:
        """HTTP requests, each over a connection of its own."""
        host, _, port = self.http.rpartition(":")
        while self.take("http"):
            with suppress(OSError, TimeoutError):
                reader, writer = await asyncio.open_connection(host, int(port))
                try:
                    writer.write(http_request(self.random))
                    async with asyncio.timeout(0.2):
                        self.answers[f"HTTP {(await reader.read(12))[9:].decode(errors='replace')}"] += 1
                finally:
                    writer.transport.abort()

    async def share(self) -> None:
        """Sends all, and says how far it has come."""
        whole, said = self.left, 0
        tasks = [self.sessions(number) for number in range(_SHARES["session"])]
        tasks += [self.operators() for _ in range(_SHARES["operator"])]
        tasks += [self.requests() for _ in range(4 * _SHARES["http"])]
        work = asyncio.gather(*tasks, self.targets())
        while not work.done():
            await asyncio.wait((work,), timeout=0.5)
            if (whole - self.left) * 10 // whole > said:
                said = (whole - self.left) * 10 // whole
                print(json.dumps({"sent": whole - self.left}), flush=True)
        await work


async def fuzz(given: Any) -> dict[str, Any]:
    """Fuzzes a daemon beside honest runs, and returns what became of it and of them."""
    tokens, known = credentials()
    memory = []
    window = Window()
    with daemon(given.checkout, known) as server:
        shown = ",".join((server.token, tokens["viewer"], tokens["hostile"]))
        arguments = (server.grpc, server.http, f"--messages={given.messages}", f"--seed={given.seed}")
        async with honest_runs(server, tokens["honest"]) as agents:
            began, processor = time.monotonic(), server.processor
            client = await hostile_client("benchmarks.load.fuzz", *arguments, token=shown)
            since = {agent.name: len(agent.sent) + 1 for agent in agents}
            for agent in agents:
                agent.load.left = FAULTY
            told: dict[str, Any] = {}
            async for line in client.stdout or ():
                told = json.loads(line)
                memory.append(round(server.memory / 1e6))
            if await client.wait():
                raise RuntimeError("the client failed")
            ended = time.monotonic()
            await settle(agents, ended)
            window.add(agents, began, ended, server.processor - processor)
            missed = await missing(server, agents, since)
        text = await asyncio.to_thread(lambda: server.scrape()[1])
        return {
            "seed": given.seed,
            "messages": sum(told["sent"].values()),
            "sent": told["sent"],
            "answers": told["answers"],
            "seconds": ended - began,
            "internal_errors": _INTERNAL.findall(text),
            "errors": list(server.log.errors.values())[:20],
            "longest_line": server.log.longest,
            "log_mb": server.log.size / 1e6,
            "memory_mb": memory,
            "honest_p99_ms": window.quantiles[1],
            "honest_samples": len(window.seconds),
            "honest_lost": window.lost,
            "alerts_missing": missed,
            "unauthorised": _unauthorised(server, told),
        }


def _unauthorised(server: Server, told: Mapping[str, Any]) -> list[str]:
    """What in the journal nobody who may has asked for."""
    found = [f"{told['answers'].get('changes that were not refused', 0)} changes were not refused"]
    with closing(sqlite3.connect(f"file:{server.store}?mode=ro", uri=True)) as journal:
        columns = journal.execute(
            "SELECT m.name, c.name FROM sqlite_master m, pragma_table_info(m.name) c WHERE m.type = 'table'"
        )
        for table, column in columns.fetchall():
            condition = f"typeof({column}) = 'text' AND {column} LIKE '%intruder%'"
            count = journal.execute(f"SELECT count(*) FROM {table} WHERE {condition}").fetchone()[0]  # noqa: S608
            found.append(f"{count} in {table}.{column}")
        silences = {identity for (identity,) in journal.execute("SELECT id FROM silences")}
    found.append(f"{len(silences ^ set(told['silences']))} silences that nobody, or not the journal, knows of")
    return [each for each in found if not each.startswith("0 ")]


async def _main(given: argparse.Namespace) -> None:
    operator, viewer, agent = os.environ["FLOOD_TOKEN"].split(",")
    tokens = {"operator": operator, "viewer": viewer, "agent": agent}
    generators = random.Random(given.seed), np.random.default_rng(given.seed)  # noqa: S311  no secret
    fuzzer = Fuzzer(given.grpc, given.http, tokens, *generators, given.messages)
    await fuzzer.share()
    print(json.dumps({"sent": fuzzer.sent, "answers": fuzzer.answers, "silences": fuzzer.silences}), flush=True)
    os._exit(0)  # without the farewells that gRPC would wait for


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grpc")
    parser.add_argument("http")
    parser.add_argument("--messages", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    asyncio.run(_main(parser.parse_args()))
