"""A whole daemon in this process, and trainers that speak the wire by hand."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import grpc
import numpy as np
import pytest
from forked import COMMAND_LINE, ForkedProcess
from postgresql import postgresql_server

from sharpwatch import wire
from sharpwatch.daemon.app import serving
from sharpwatch.daemon.config.load import load_config
from sharpwatch.v1 import agent_pb2, types_pb2
from sharpwatch.v1 import operator_pb2 as pb
from sharpwatch.v1.agent_pb2_grpc import AgentServiceStub
from sharpwatch.v1.operator_pb2_grpc import OperatorServiceStub

BLOCKS = ("emb", "qk", "ffn", "vo", "norm")
LAYER_BLOCKS = (("emb", "", 512), *((block, "layers.0", 64) for block in BLOCKS[1:]))
SKETCH = 64
PATIENCE = 30  # seconds until a test is held to hang


def hello(run: str = "run", attempt: str = "a1", **changes) -> agent_pb2.Hello:
    return agent_pb2.Hello(
        **{
            "protocol": wire.PROTOCOL,
            "training_job": "job",
            "run": run,
            "attempt": attempt,
            "layer_blocks": [types_pb2.LayerBlock(block=b, layer=layer, parameters=n) for b, layer, n in LAYER_BLOCKS],
            "blocks": BLOCKS,
            "optimizer": "AdamW",
            "control": "rollback",
            "can_roll_back": True,
            "min_multiplier": 0.1,
            "max_multiplier": 10,
            "sketch_size": SKETCH,
        }
        | changes
    )


def tap(scale: float = 1.0) -> agent_pb2.Tap:
    ones = np.ones(len(LAYER_BLOCKS))
    return agent_pb2.Tap(
        gradient_norm=wire.encode(scale * ones, "float32"),
        weight_norm=wire.encode(ones, "float32"),
        update_rms=wire.encode(scale * ones, "float32"),
        non_finite=wire.encode(0 * ones, "int64"),
        learning_rate=wire.encode(1e-3 * ones, "float32"),
        lr_multiplier=wire.encode(ones, "float32"),
    )


def gnb(seed: int, draws: int = 2, along: float = 1 / SKETCH) -> agent_pb2.GnbProbe:
    """Gradients drawn from a known Gauss-Newton matrix: sketches are they themselves, so traces agree with them.

    `along` is the share of each trace in one direction; the step's gradient lies along that.
    """
    random = np.random.default_rng(seed)
    sizes = np.array([n for _, _, n in LAYER_BLOCKS])
    sharpness = np.array([1e-3, 1e-2, 2e-2, 4e-2, 1.0])
    sharp = np.repeat([along, (1 - along) / (SKETCH - 1)], [1, SKETCH - 1])
    sketches = random.normal(size=(draws, len(BLOCKS), SKETCH)) * np.sqrt(sharpness * sizes)[:, None] * np.sqrt(sharp)
    return agent_pb2.GnbProbe(
        tokens=256,
        rows=4,
        traces=wire.encode(np.square(sketches).sum(-1), "float64"),
        sketches=wire.encode(sketches, "float32"),
        gradient_sketch=wire.encode(np.tile(np.eye(1, SKETCH), (len(BLOCKS), 1)), "float32"),
        seconds=0.01,
    )


def direction(ratio: float = 0.25) -> agent_pb2.DirectionProbe:
    ones = np.ones(len(BLOCKS))
    return agent_pb2.DirectionProbe(
        tokens=256,
        rows=4,
        descent=1.0,
        curvature=2 * ratio,
        block_descent=wire.encode(0.2 * ones, "float64"),
        block_curvature=wire.encode([0.4 * ratio, *[np.nan] * 4], "float64"),
        update_ratio=wire.encode(0.01 * ones, "float32"),
    )


def hessian(turn: int) -> dict[str, agent_pb2.HutchinsonProbe | agent_pb2.LanczosProbe | agent_pb2.LineSearchProbe]:
    """One probe of each kind that looks at the Hessian or the loss, of the block whose `turn` it is."""
    index = turn % len(BLOCKS)
    blocks = np.full(len(BLOCKS), np.nan)
    blocks[index] = 0.5
    traces = np.zeros((2, len(LAYER_BLOCKS)))
    traces[:, index] = 2.0, 3.0 + 0.1 * turn
    seen = {"tokens": 256, "rows": 4, "method": "autograd"}
    ends = {"top": 9.0 + turn, "top_residual": 0.5, "bottom": -3.0, "bottom_residual": 1.0, "products": 6}
    return {
        "hutchinson": agent_pb2.HutchinsonProbe(**seen, block=BLOCKS[index], traces=wire.encode(traces, "float64")),
        "lanczos": agent_pb2.LanczosProbe(**seen, block=(*BLOCKS, "")[turn % (len(BLOCKS) + 1)], **ends),
        "linesearch": agent_pb2.LineSearchProbe(
            tokens=256,
            rows=4,
            sharpness=0.25,
            half_width=0.01,
            block_sharpness=wire.encode(blocks, "float64"),
            block_half_width=wire.encode(0.02 * blocks, "float64"),
        ),
        "preconditioned": agent_pb2.PreconditionedProbe(**seen, ratio=0.75, residual=0.01, products=6),
    }


def sample(sequence: int, step: int | None = None, **parts) -> agent_pb2.Sample:
    """A sample of everything a step may have."""
    step = sequence if step is None else step
    whole = {
        "taken_at_unix_ns": step * 1_000_000_000,
        "loss": 4.0 + 0.01 * (step % 7),
        "tap": tap(1.0 + 0.01 * (step % 5)),
        "health": agent_pb2.AgentHealth(overhead_ratio=0.005, step_seconds=0.2, dropped={"spool": 1}),
    }
    return agent_pb2.Sample(**{"sequence": sequence, "step": step, **whole, **parts})


@dataclass
class Trainer:
    """One session; the daemon's responses are kept in `received`, by kind."""

    call: grpc.aio.StreamStreamCall
    welcome: agent_pb2.Welcome | None = None
    received: dict[str, list] = field(default_factory=dict)

    async def send(self, message: agent_pb2.Hello | agent_pb2.Sample | agent_pb2.Heartbeat) -> None:
        kind = type(message).__name__.lower()
        await self.call.write(agent_pb2.SessionRequest(**{kind: message}))

    async def leave(self) -> None:
        """End as the courier of a trainer that is gone."""
        await self.send(agent_pb2.Heartbeat(last=True))
        await self.call.done_writing()
        assert (await self.ended())[0] is grpc.StatusCode.OK

    async def next(self, kind: str):
        """The next response of `kind`; those of other kinds are kept."""
        while not self.received.get(kind):
            async with asyncio.timeout(PATIENCE):
                response = await self.call.read()
            if response is grpc.aio.EOF:
                raise AssertionError(f"the session ended before a {kind}: {await self.call.code()}")
            self.received.setdefault(response.WhichOneof("message"), []).append(
                getattr(response, response.WhichOneof("message"))
            )
        return self.received[kind].pop(0)

    async def acknowledged(self, sequence: int) -> None:
        """Wait until all up to `sequence` is journalled."""
        while (await self.next("ack")).sequence < sequence:
            pass

    async def ended(self) -> tuple[grpc.StatusCode, str]:
        """Read to the end; how the session ended."""
        try:
            async with asyncio.timeout(PATIENCE):
                while await self.call.read() is not grpc.aio.EOF:
                    pass
        except grpc.aio.AioRpcError:
            pass
        return await self.call.code(), await self.call.details()


@dataclass
class Operator:
    """The operator's service. What only reads shows the operator's token by itself, what changes something does not."""

    stub: OperatorServiceStub
    credentials: tuple[tuple[str, str], ...]

    def __getattr__(self, name: str):
        call = getattr(self.stub, name)
        if not name.startswith(("Get", "List", "Watch")):
            return call
        return lambda request, metadata=self.credentials, **options: call(request, metadata=metadata, **options)


@dataclass
class Client:
    """Everything one can do with a daemon from outside."""

    grpc: str
    http: str
    token: str
    channel: grpc.aio.Channel
    web: aiohttp.ClientSession
    stop: Callable[[], Awaitable[None]]

    @property
    def operator(self) -> Operator:
        return Operator(OperatorServiceStub(self.channel), self.credentials)

    @property
    def credentials(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.token}"),)

    def connect(self, metadata: tuple[tuple[str, str], ...] | None = None) -> Trainer:
        return Trainer(AgentServiceStub(self.channel).Session(metadata=metadata))

    async def train(self, run: str = "run", attempt: str = "a1", metadata=None, **changes) -> Trainer:
        """A session that has been welcomed."""
        trainer = self.connect(metadata)
        await trainer.send(hello(run, attempt, **changes))
        trainer.welcome = await trainer.next("welcome")
        return trainer

    async def shown(self, run: str, when) -> pb.RunDetail:
        """Watch `run` until `when(detail)` holds."""
        call = self.operator.WatchRun(pb.WatchRunRequest(run=run))
        async with asyncio.timeout(PATIENCE):
            async for response in call:
                if when(response.detail):
                    call.cancel()
                    return response.detail
        raise AssertionError("the watch ended")

    async def get(self, path: str) -> tuple[int, str]:
        async with self.web.get(f"http://{self.http}{path}") as response:
            return response.status, await response.text()

    async def metric(self, name: str) -> float | None:
        """The one sample whose name and labels start so."""
        _, text = await self.get("/metrics")
        found = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(name)]
        return float(found[0]) if found else None

    async def metric_reaches(self, name: str, value: float) -> None:
        """Scrape until `metric(name)` is `value`."""
        async with asyncio.timeout(PATIENCE):
            while await self.metric(name) != value:
                pass


def configuration(folder: Path, *, policies: str = "policies: []", detection: dict | None = None, **daemon: str | int):
    settings = {
        "grpc": "127.0.0.1:0",
        "http": "127.0.0.1:0",
        "device": "cpu",
        "store": f"sqlite:///{folder}/journal.db",
        "token_file": f"{folder}/operator.token",
    } | daemon
    path = folder / "sharpwatch.yaml"
    lines = [f"  {key}: {json.dumps(value)}" for key, value in settings.items()]
    path.write_text("\n".join(["daemon:", *lines, policies, f"detection: {json.dumps(detection or {})}"]))
    return load_config(path)


@pytest.fixture(scope="session")
def postgresql():
    """A PostgreSQL server, for each process that runs tests of it."""
    with postgresql_server() as server:
        yield server


@pytest.fixture
def build():
    """Messages made by hand."""
    return SimpleNamespace(
        hello=hello, sample=sample, tap=tap, gnb=gnb, direction=direction, hessian=hessian, blocks=BLOCKS
    )


@pytest.fixture
def configure(tmp_path):
    """Write and load a configuration: `configure(policies=..., grpc=...)`."""
    return lambda **changes: configuration(tmp_path, **changes)


@pytest.fixture
def serving_of(configure):
    """`async with serving_of(...) as daemon`: a daemon's addresses alone."""
    return lambda **changes: serving(configure(**changes))


@pytest.fixture
def running(configure, tmp_path):
    """`async with running(...) as client`: a daemon for the length of the block."""

    @asynccontextmanager
    async def run(*, wait=True, **changes):
        async with AsyncExitStack() as stack:
            serve = AsyncExitStack()
            daemon = await serve.enter_async_context(serving(configure(**changes)))
            stack.push_async_callback(serve.aclose)  # closing twice is closing once
            if wait:
                await daemon.restored.wait()
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(daemon.grpc))
            web = await stack.enter_async_context(aiohttp.ClientSession())
            token = (tmp_path / "operator.token").read_text().strip()
            yield Client(daemon.grpc, daemon.http, token, channel, web, serve.aclose)

    return run


@pytest.fixture
def as_operator(tmp_path, monkeypatch):
    """Commands show the operator's token of the daemon."""
    monkeypatch.setenv("SHARPWATCH_TOKEN_FILE", str(tmp_path / "operator.token"))


@dataclass
class Process:
    """`sharpwatch serve` in a process of its own, its log lines kept as they come."""

    process: ForkedProcess
    client: Client | None = None
    log: list[dict] = field(default_factory=list)

    async def event(self, name: str) -> dict:
        """The next log event of that name."""
        async with asyncio.timeout(PATIENCE):
            while line := await asyncio.to_thread(self.process.stderr.readline):
                self.log.append(json.loads(line))
                if self.log[-1]["event"] == name:
                    return self.log[-1]
        raise AssertionError(f"no {name} in {self.log}")

    async def exit(self, number: int) -> int:
        """Send a signal; the exit status."""
        self.process.send_signal(number)
        async with asyncio.timeout(PATIENCE):
            rest = await asyncio.to_thread(self.process.stderr.read)
            self.log += map(json.loads, rest.splitlines())
            status = await asyncio.to_thread(self.process.wait)
        self.process.close()
        return status


@pytest.fixture
async def start(configure, tmp_path):
    """Start the daemon as a process: `await start(...)`; those still running at the end are killed."""
    async with AsyncExitStack() as stack:

        async def started(code: str = COMMAND_LINE, **changes) -> Process:
            configure(**changes)
            arguments = ("serve", "--config", str(tmp_path / "sharpwatch.yaml"))
            run = Process(ForkedProcess(code, env=os.environ, stderr=subprocess.PIPE, arguments=arguments))
            stack.push_async_callback(ended, run)
            serving = await run.event("serving")
            await run.event("ready")
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(serving["grpc"]))
            web = await stack.enter_async_context(aiohttp.ClientSession())
            token = (tmp_path / "operator.token").read_text().strip()
            run.client = Client(serving["grpc"], serving["http"], token, channel, web, lambda: run.exit(signal.SIGTERM))
            return run

        async def ended(run: Process) -> None:
            if run.process.returncode is None:
                await run.exit(signal.SIGKILL)
            run.process.close()

        yield started


@pytest.fixture
async def daemon(running):
    """A daemon without policies."""
    async with running() as client:
        yield client
