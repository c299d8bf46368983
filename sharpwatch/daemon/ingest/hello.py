"""What an attempt says of itself once: a checked Hello, by which its samples are read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np

from sharpwatch import wire
from sharpwatch.blocks import BLOCKS
from sharpwatch.daemon.ingest.limits import (
    MAX_LAYER_BLOCKS,
    MAX_NAME,
    MAX_STEP,
    Ints,
    checked_name,
    checked_text,
    few,
    require,
)
from sharpwatch.v1 import agent_pb2

Control = Literal["none", "lr", "rollback"]


@dataclass(frozen=True, slots=True, eq=False)
class RunHello:
    """A checked Hello. L layer blocks, B blocks."""

    training_job: str
    run: str
    attempt: str
    layer_blocks: tuple[tuple[str, str], ...]  # (block, layer), L of them
    parameters: Ints  # [L]
    block_of: Ints  # [L], index into blocks
    blocks: tuple[str, ...]
    optimizer: str
    control: Control
    can_roll_back: bool
    lr_bounds: tuple[float, float]
    initial_step: int
    seed: int
    sketch_size: int
    host: str
    agent_version: str
    probes: tuple[str, ...] = ()

    @property
    def block_parameters(self) -> Ints:
        """Parameters by block, [B]."""
        return np.bincount(self.block_of, weights=self.parameters, minlength=len(self.blocks)).astype(np.int64)

    def same_blocks(self, other: RunHello) -> bool:
        """Whether what `other`'s arrays are of is what this one's are of, row by row."""
        of = (self.blocks, self.layer_blocks)
        return of == (other.blocks, other.layer_blocks) and np.array_equal(self.parameters, other.parameters)

    def same_projection(self, other: RunHello) -> bool:
        """Whether sketches of both are of one projection, where they are of the same blocks."""
        return (self.seed, self.sketch_size) == (other.seed, other.sketch_size)


def read_hello(hello: agent_pb2.Hello) -> RunHello:
    """Check a Hello."""
    require(hello.protocol == wire.PROTOCOL, f"protocol {hello.protocol}, this daemon speaks {wire.PROTOCOL}")
    blocks = tuple(hello.blocks)
    require(0 < len(blocks) == len(set(blocks)), "blocks: empty or with a name twice")
    unknown = sorted(set(blocks) - set(BLOCKS))
    require(not unknown, f"blocks: {unknown} unknown, allowed are {list(BLOCKS)}")
    rows = hello.layer_blocks
    require(0 < len(rows) <= MAX_LAYER_BLOCKS, f"layer_blocks: {len(rows)} rows, expected 1 to {MAX_LAYER_BLOCKS}")
    pairs = tuple((row.block, row.layer) for row in rows)
    require(len(set(pairs)) == len(pairs), "layer_blocks: a block of a layer twice")
    require({block for block, _ in pairs} == set(blocks), "layer_blocks: not the blocks of `blocks`")
    require(all(len(layer) <= MAX_NAME for _, layer in pairs), f"layer_blocks: a layer above {MAX_NAME} characters")
    require(all(0 < row.parameters < 2**53 for row in rows), "layer_blocks: parameters must be 1 to 2**53")
    require(hello.control in get_args(Control), f"control: {hello.control!r}, expected one of {get_args(Control)}")
    low, high = hello.min_multiplier, hello.max_multiplier
    require(0 < low <= 1 <= high < math.inf, f"multiplier bounds ({low}, {high}): expected 0 < min <= 1 <= max")
    require(0 <= hello.initial_step <= MAX_STEP, f"initial_step: {hello.initial_step}")
    few(hello.probes, "probes")
    require(0 <= hello.sketch_size <= 2**16, f"sketch_size: {hello.sketch_size}")
    return RunHello(
        training_job=checked_name(hello.training_job, "training_job"),
        run=checked_name(hello.run, "run"),
        attempt=checked_name(hello.attempt, "attempt"),
        layer_blocks=pairs,
        parameters=np.array([row.parameters for row in rows], dtype=np.int64),
        block_of=np.array([blocks.index(block) for block, _ in pairs], dtype=np.int64),
        blocks=blocks,
        optimizer=checked_text(hello.optimizer, "optimizer"),
        control=cast("Control", hello.control),
        can_roll_back=hello.can_roll_back,
        lr_bounds=(low, high),
        initial_step=hello.initial_step,
        seed=hello.seed,
        sketch_size=hello.sketch_size,
        host=checked_text(hello.host, "host"),
        agent_version=checked_text(hello.agent_version, "agent_version"),
        probes=tuple(checked_text(probe, "probes", MAX_NAME) for probe in hello.probes),
    )
