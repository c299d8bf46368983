"""Recorded runs: the agent's own messages, as a daemon would get them, in compressed files.

A file has one JSON line about the run, then the Hello and the samples, each after its length (4 bytes, little-endian).
Sketches are left out: they are 99 % of the bytes, and serve only the largest eigenvalue. A branch's file begins at its
onset, and names the trunk that it goes on from.
"""

from __future__ import annotations

import json
import lzma
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from sharpwatch.replay.own_recordings import read_messages
from sharpwatch.v1 import agent_pb2

_DROPPED_BITS = 16  # of the 23 that follow a float's point


@dataclass(frozen=True, slots=True)
class About:
    """What a recorded run is.

    Attributes:
        kind: The name of its kind in `kinds.KINDS`; "trunk" for what branches go on from.
        model, size, seed: Of the training.
        onset: The first step that is disturbed; 0 for none.
        block, layer, parameter: Where, if the kind has a place.
        trunk: The file of the run that it goes on from; "" for none.
        losses: Of its own steps.
        first: The first of its own steps.
    """

    kind: str
    model: str
    size: str
    seed: int
    onset: int
    block: str = ""
    layer: str | None = None
    parameter: str = ""
    trunk: str = ""
    losses: list[float] = field(default_factory=list)
    first: int = 1

    @property
    def name(self) -> str:
        """Unique among recordings."""
        return f"{self.model}-{self.size}-{self.seed}-{self.kind}"


@dataclass(frozen=True, slots=True)
class Recording:
    """A whole run: its trunk's samples, then its own.

    Attributes:
        about: What it is.
        hello: The agent's first message.
        samples: One for each step, in order, numbered through.
    """

    about: About
    hello: agent_pb2.Hello
    samples: list[agent_pb2.Sample]


def path_of(folder: Path, about: About) -> Path:
    """The file of a run."""
    return folder / f"{about.name}.run.xz"


def write(folder: Path, about: About, hello: agent_pb2.Hello | None, samples: Iterable[agent_pb2.Sample]) -> Path:
    """Write a recording; a file that is there is complete."""
    path = path_of(folder, about)
    draft = path.with_suffix(".draft")
    with lzma.open(draft, "wb", preset=6) as file:
        short = replace(about, losses=[round(loss, 5) for loss in about.losses])
        file.write(json.dumps(asdict(short)).encode() + b"\n")
        for message in [] if hello is None else [hello, *map(_slim, samples)]:
            payload = message.SerializeToString()
            file.write(struct.pack("<I", len(payload)) + payload)
    draft.replace(path)
    return path


def read_about(path: Path) -> About:
    """What a file is of."""
    with lzma.open(path, "rb") as file:
        return About(**json.loads(file.readline()))


def read(path: Path) -> Recording:
    """Read a run, with the trunk that it goes on from."""
    about, messages = _read_one(path)
    hello, samples = (
        agent_pb2.Hello.FromString(messages[0]),
        [agent_pb2.Sample.FromString(each) for each in messages[1:]],
    )
    if about.trunk:
        _, before = _read_one(path.parent / about.trunk)
        hello = agent_pb2.Hello.FromString(before[0])
        trunk = [agent_pb2.Sample.FromString(each) for each in before[1:]]
        samples = [sample for sample in trunk if not sample.closing and sample.step < about.first] + samples
    for number, sample in enumerate(samples, 1):
        sample.sequence = number
    return Recording(about, hello, samples)


def read_own(path: Path) -> tuple[agent_pb2.Hello | None, list[agent_pb2.Sample]]:
    """The messages that a file itself has."""
    _, messages = _read_one(path)
    hello = agent_pb2.Hello.FromString(messages[0]) if messages else None
    return hello, [agent_pb2.Sample.FromString(each) for each in messages[1:]]


def _read_one(path: Path) -> tuple[About, list[bytes]]:
    about, messages = read_messages(lzma.decompress(path.read_bytes()), path)
    return About(**about), messages


def _slim(sample: agent_pb2.Sample) -> agent_pb2.Sample:
    slim = agent_pb2.Sample.FromString(sample.SerializeToString())
    if slim.HasField("gnb"):
        slim.gnb.ClearField("sketches")
        slim.gnb.ClearField("gradient_sketch")
    if slim.HasField("health"):
        slim.health.ClearField("overhead_ratio")  # the machine's, not the run's
        slim.health.ClearField("step_seconds")
    if slim.HasField("tap"):
        # Two digits, rounded down, of what scatters by tenths; weight norms keep all, since a step's change counts.
        for array in (slim.tap.gradient_norm, slim.tap.update_rms, slim.tap.second_moment):
            bits = np.frombuffer(array.data, dtype="<u4") & ~np.uint32(2**_DROPPED_BITS - 1)
            array.data = bits.tobytes()
    return slim
