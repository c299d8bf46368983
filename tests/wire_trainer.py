"""A trainer that speaks the wire by hand: one sample a step, every number chosen by the test."""

from __future__ import annotations

import queue
import threading
import time

import grpc
import numpy as np
from daemons import PATIENCE

from sharpwatch.v1 import agent_pb2, types_pb2
from sharpwatch.v1.agent_pb2_grpc import AgentServiceStub

BLOCKS = ("emb", "qk", "vo", "ffn", "norm", "head")
PARAMETERS = 64  # of each block
SKETCH = 16


def array(values, dtype: str) -> types_pb2.Array:
    """`values` as an array on the wire."""
    packed = np.ascontiguousarray(values, dtype)
    return types_pb2.Array(dtype=dtype, shape=packed.shape, data=packed.tobytes())


def gnb(trace: float = 1.0, draws: int = 4) -> agent_pb2.GnbProbe:
    """A probe that found `trace` in every block, in every draw."""
    sketches = np.zeros((draws, len(BLOCKS), SKETCH))
    sketches[:, :, 0] = trace**0.5
    return agent_pb2.GnbProbe(
        tokens=256,
        rows=4,
        traces=array(np.full((draws, len(BLOCKS)), trace), "float64"),
        sketches=array(sketches, "float32"),
        seconds=0.01,
    )


def direction(ratio: float) -> agent_pb2.DirectionProbe:
    """A probe that found the stability ratio `ratio`."""
    return agent_pb2.DirectionProbe(
        tokens=256,
        rows=4,
        descent=1.0,
        curvature=2.0 * ratio,
        block_descent=array(np.full(len(BLOCKS), 1 / len(BLOCKS)), "float64"),
        block_curvature=array(np.full(len(BLOCKS), np.nan), "float64"),
        update_ratio=array(np.full(len(BLOCKS), 0.01), "float32"),
        seconds=0.01,
        method="autograd",
    )


def whole_hello(run: str, attempt: str, **changes) -> agent_pb2.Hello:
    """A Hello that a daemon takes."""
    layer_blocks = [types_pb2.LayerBlock(block=block, layer="", parameters=PARAMETERS) for block in BLOCKS]
    fields = {"protocol": 1, "training_job": "job", "run": run, "attempt": attempt, "optimizer": "AdamW"}
    fields |= {"control": "lr", "min_multiplier": 0.01, "max_multiplier": 10.0, "sketch_size": SKETCH}
    return agent_pb2.Hello(**fields | changes, blocks=BLOCKS, layer_blocks=layer_blocks)


class WireTrainer:
    """One session of one attempt. It applies each command at the step after the one it came with."""

    def __init__(self, address: str, *, run: str = "run", attempt: str = "first", **hello) -> None:
        self.multipliers = dict.fromkeys(BLOCKS, 1.0)
        self.lowest = 1.0  # of all multipliers so far
        self.step_taken = 0
        self.commands: list[types_pb2.Command] = []
        self.acknowledged = 0
        self.welcomed = False
        self.end: Exception | None = None  # how the stream ended, where it was not by us
        self._random = np.random.default_rng(0)
        self._sent = 0
        self._applied: list[types_pb2.CommandResult] = []
        self._changed = threading.Condition()
        self._outgoing: queue.Queue = queue.Queue()
        self._channel = grpc.insecure_channel(address)
        self._call = AgentServiceStub(self._channel).Session(iter(self._outgoing.get, None))
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self._outgoing.put(agent_pb2.SessionRequest(hello=whole_hello(run, attempt, **hello)))
        self.wait(lambda: self.welcomed or self.end is not None)

    def step(self, *, update_rms=(), weight_norm=(), non_finite=(), **parts) -> None:
        """Take one step and wait for its acknowledgement; the readings of named blocks are as given."""
        self._take_commands()
        self.step_taken += 1
        self._sent += 1
        sample = agent_pb2.Sample(
            sequence=self._sent,
            step=self.step_taken,
            taken_at_unix_ns=time.time_ns(),
            **{"loss": 3.0 * self._noise()[0] ** 0.2} | parts,
            tap=self._tap(dict(update_rms), dict(weight_norm), dict(non_finite)),
            results=self._applied,
        )
        self._applied = []
        self._outgoing.put(agent_pb2.SessionRequest(sample=sample))
        self.wait(lambda: self.acknowledged >= self._sent or self.end is not None)
        if self.end is not None:
            raise ConnectionError(f"the daemon ended the session: {self.end}")

    def steps(self, count: int, **readings) -> None:
        for _ in range(count):
            self.step(**readings)

    def wait(self, condition) -> None:
        """Until `condition()`, asked again whenever the daemon sent something."""
        with self._changed:
            if not self._changed.wait_for(condition, PATIENCE):
                raise TimeoutError(f"in vain, at step {self.step_taken}")

    def stop(self) -> None:
        self._outgoing.put(None)
        self._call.cancel()
        self._reader.join(PATIENCE)
        self._channel.close()

    def _read(self) -> None:
        try:
            for response in self._call:
                with self._changed:
                    self._take(response)
                    self._changed.notify_all()
        except grpc.RpcError as error:
            with self._changed:
                self.end = error
                self._changed.notify_all()

    def _take(self, response: agent_pb2.SessionResponse) -> None:
        match response.WhichOneof("message"):
            case "welcome":
                self.welcomed = True
            case "ack":
                self.acknowledged = response.ack.sequence
            case "command":
                self.commands.append(response.command)
            case "refusal":
                self.end = ConnectionError(f"refused: {response.refusal.code}: {response.refusal.reason}")

    def _take_commands(self) -> None:
        with self._changed:
            commands, self.commands = self.commands, []
        for command in commands:
            self.multipliers = dict.fromkeys(BLOCKS, 1.0) | dict(command.set_multipliers.multipliers)
            self.lowest = min(self.lowest, *self.multipliers.values())
            self._applied.append(
                types_pb2.CommandResult(
                    command_id=command.id, outcome=types_pb2.COMMAND_OUTCOME_APPLIED, step=self.step_taken + 1
                )
            )

    def _noise(self) -> np.ndarray:
        """A healthy reading of every block, around 1."""
        return np.exp(0.05 * self._random.standard_normal(len(BLOCKS)))

    def _tap(self, update_rms, weight_norm, non_finite) -> agent_pb2.Tap:
        def readings(usual, changes, dtype="float32"):
            return array([changes.get(block, value) for block, value in zip(BLOCKS, usual, strict=True)], dtype)

        multipliers = np.array([self.multipliers[block] for block in BLOCKS])
        return agent_pb2.Tap(
            gradient_norm=readings(self._noise(), {}),
            weight_norm=readings(np.full(len(BLOCKS), 10.0), weight_norm),
            update_rms=readings(self._noise(), update_rms),
            non_finite=readings(np.zeros(len(BLOCKS)), non_finite, "int64"),
            learning_rate=readings(1e-3 * multipliers, {}),
            lr_multiplier=readings(multipliers, {}),
        )
