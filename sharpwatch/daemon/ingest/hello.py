"""An attempt of a run: its Hello, checked, how far its samples have come, and whether its trainer is there."""

from __future__ import annotations

import hmac
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

import numpy as np

from sharpwatch import wire
from sharpwatch.blocks import BLOCKS
from sharpwatch.errors import WireError
from sharpwatch.v1 import agent_pb2
from sharpwatch.wire import (
    MAX_DATA_ORDER,
    MAX_LAYER_BLOCKS,
    MAX_NAME,
    MAX_PARAMETER_NAMES,
    MAX_STEP,
    Ints,
    checked_name,
    checked_text,
    require,
    require_few,
)

Control = Literal["none", "lr", "rollback"]
SILENT_SECONDS = 30.0  # without a message after which an open stream does not keep its run any more
_LAYER_BLOCK = 200  # bytes, roughly
SUMMED = 6  # rows that are summed by block type at most
RECONNECT_SECONDS = 6.0  # a courier is back within 5 s of the end of its stream, or of a restart of the daemon


@dataclass(frozen=True, slots=True, eq=False)
class RunHello:
    """A checked Hello of a model with L layer blocks, which belong to B block types."""

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
    takes_update_intervals: bool
    lr_bounds: tuple[float, float]
    initial_step: int
    seed: int
    sketch_size: int
    host: str
    agent_version: str
    probes: tuple[str, ...] = ()
    data_order: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)  # the user's own
    parameter_names: tuple[tuple[str, ...], ...] = ()  # of each layer block; empty where the agent does not tell them
    block_parameters: Ints = field(init=False)  # [B]
    name_counts: Ints = field(init=False)  # [L], how many parameters of each are named; empty where none are told
    places: Ints = field(init=False)  # [SUMMED, L], where the value of a layer block goes in sums by row and block type
    size: int = field(init=False)  # what it takes of memory, in units of a layer block

    def __post_init__(self) -> None:
        sums = np.bincount(self.block_of, weights=self.parameters, minlength=len(self.blocks))
        object.__setattr__(self, "block_parameters", sums.astype(np.int64))
        counts = np.array([len(own) for own in self.parameter_names], dtype=np.int64)
        object.__setattr__(self, "name_counts", counts)
        places = self.block_of + len(self.blocks) * np.arange(SUMMED)[:, None]
        object.__setattr__(self, "places", places)
        names = sum(len(name) for own in self.parameter_names for name in own)
        object.__setattr__(self, "size", len(self.layer_blocks) + names // _LAYER_BLOCK)

    @property
    def all_labels(self) -> Mapping[str, str]:
        """The user's labels, and those that every run has."""
        return {**self.labels, "training_job": self.training_job, "run": self.run}

    def same_blocks(self, other: RunHello) -> bool:
        """Returns whether arrays of both have the same layer blocks, row by row."""
        of = (self.blocks, self.layer_blocks)
        return of == (other.blocks, other.layer_blocks) and np.array_equal(self.parameters, other.parameters)

    def same_projection(self, other: RunHello) -> bool:
        """Returns whether sketches of both are made with the same projection, given the same blocks."""
        return (self.seed, self.sketch_size) == (other.seed, other.sketch_size)


def read_hello(hello: agent_pb2.Hello) -> RunHello:
    """Checks a Hello.

    Args:
        hello: The message.

    Raises:
        WireError: Code "malformed", with the field and its limit.
    """
    require(
        hello.protocol == wire.PROTOCOL,
        f"protocol must be {wire.PROTOCOL}, got {hello.protocol}",
    )
    blocks = tuple(hello.blocks)
    require(0 < len(blocks) == len(set(blocks)), "blocks must name at least one block, and none twice")
    unknown = sorted(set(blocks) - set(BLOCKS))
    require(not unknown, f"blocks must be of {list(BLOCKS)}, got {unknown}")
    rows = hello.layer_blocks
    require(0 < len(rows) <= MAX_LAYER_BLOCKS, f"layer_blocks must have 1 to {MAX_LAYER_BLOCKS} rows, got {len(rows)}")
    pairs = tuple((row.block, row.layer) for row in rows)
    require(len(set(pairs)) == len(pairs), "layer_blocks must not have a block of a layer twice")
    # A block without a layer block would divide by 0 parameters, and one too many would have no column.
    require({block for block, _ in pairs} == set(blocks), "layer_blocks must have the same blocks as `blocks`")
    require(
        all(len(layer) <= MAX_NAME for _, layer in pairs),
        f"a layer must have at most {MAX_NAME} characters",
    )
    # Sums and means of counts are made in float64, which is exact up to there.
    require(all(0 < row.parameters < 2**53 for row in rows), "layer_blocks must have 1 to 2**53 parameters each")
    require(hello.control in get_args(Control), f"control must be one of {get_args(Control)}, got {hello.control!r}")
    # 1 must be within: it is where every run starts and what a ramp-back returns to.
    low, high = hello.min_multiplier, hello.max_multiplier
    require(0 < low <= 1 <= high < math.inf, f"multiplier bounds must satisfy 0 < min <= 1 <= max, got ({low}, {high})")
    require(0 <= hello.initial_step <= MAX_STEP, f"initial_step must be 0 to 2**53, got {hello.initial_step}")
    require_few(hello.probes, "probes")
    names = [name for row in rows for name in row.parameter_names]
    require(
        all(0 < len(name) <= MAX_NAME for name in names)
        and sum(len(name.encode()) for name in names) <= MAX_PARAMETER_NAMES,
        f"parameter_names must have 1 to {MAX_NAME} characters each and at most {MAX_PARAMETER_NAMES} bytes in all",
    )
    require(0 <= hello.sketch_size <= 2**16, f"sketch_size must be 0 to 2**16, got {hello.sketch_size}")
    require(len(hello.labels) <= wire.MAX_LABELS, f"labels must be at most {wire.MAX_LABELS}, got {len(hello.labels)}")
    wrong = next(filter(None, (wire.wrong_label(name, value) for name, value in hello.labels.items())), "")
    require(not wrong, wrong)
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
        takes_update_intervals=hello.takes_update_intervals,
        lr_bounds=(low, high),
        initial_step=hello.initial_step,
        seed=hello.seed,
        sketch_size=hello.sketch_size,
        host=checked_text(hello.host, "host"),
        agent_version=checked_text(hello.agent_version, "agent_version"),
        probes=tuple(checked_text(probe, "probes", MAX_NAME) for probe in hello.probes),
        data_order=checked_text(hello.data_order, "data_order", MAX_DATA_ORDER),
        labels=dict(hello.labels),
        # Attempts of a run, and runs of one model, have the same names.
        parameter_names=tuple(tuple(map(sys.intern, row.parameter_names)) for row in rows) if names else (),
    )


class Cursor:
    """How far the samples of one attempt have come: the sequences journalled, those in the queue, and the newest step.

    Args:
        journalled: The newest sequence in the journal; 0 before the first.
        step: The step of the newest sample; -1 before the first.
    """

    def __init__(self, journalled: int = 0, step: int = -1) -> None:
        self.journalled = journalled
        self.step = step
        self._waiting: set[int] = set()
        self._highest = journalled

    def place(self, sequence: int, step: int, *, restored: bool) -> Literal["new", "waiting", "journalled"]:
        """Tells a new sample from one that was sent again, and remembers a new one.

        Args:
            sequence: The sample's sequence.
            step: Its step.
            restored: Whether it says that the run was restored. Only then can its step be lower than the last.

        Returns:
            "new"; "waiting" if it is in the queue already; "journalled" if it is in the journal.

        Raises:
            WireError: Code "out_of_order", if its sequence or its step is lower than an earlier sample's.
        """
        if sequence <= self.journalled:
            return "journalled"
        if sequence in self._waiting:
            return "waiting"
        # A gap is valid, because the agent's spool drops its oldest. Filling it later is not: the step would come
        # after newer ones, and detectors see steps in order.
        if sequence < self._highest:
            raise WireError("out_of_order", f"sequence {sequence} after {self._highest}: sequences must rise")
        if step < self.step and not restored:
            raise WireError(
                "out_of_order", f"step {step} after {self.step}: steps must not fall unless the run was restored"
            )
        self.step = step
        self._highest = sequence
        self._waiting.add(sequence)
        return "new"

    @property
    def idle(self) -> bool:
        """Whether no sample waits for the journal."""
        return not self._waiting

    def mark_journalled(self, sequence: int) -> None:
        """Records that `sequence` is journalled, and with it every earlier one that was not dropped."""
        self._waiting.discard(sequence)
        # An acknowledgement covers all earlier sequences. That is safe because a run's samples are journalled in order,
        # and one that was dropped is refused by its own message.
        self.journalled = max(self.journalled, sequence)

    def forget(self, sequence: int) -> None:
        """Records that `sequence` was dropped from the queue and will never be journalled."""
        self._waiting.discard(sequence)


class Presence:
    """Whether the trainer of an attempt is there, so that its run is not given to another one.

    It is while its stream is open and was heard in the last `SILENT_SECONDS`, and for `RECONNECT_SECONDS` after its
    stream broke: then its courier is about to come back. All times are in monotonic seconds.
    """

    def __init__(self) -> None:
        self._open = False
        self._heard_at = self._broke_at = -math.inf
        self.has_left = False  # as its courier has told
        self.is_unread = False  # its messages wait for this daemon, which can't hear it meanwhile

    def heard(self, now: float) -> None:
        """Records a message of its open stream, the Hello included."""
        self._open, self._heard_at, self.has_left = True, now, False

    def broke(self, now: float) -> None:
        """Records that its stream ended; it is awaited, unless the trainer was gone by then."""
        if self._open:
            self.await_return(now)

    def await_return(self, now: float) -> None:
        """Begins to wait for it, as a daemon does that was restarted."""
        self._open, self._broke_at = False, now

    def left(self) -> None:
        """Records that the trainer is gone."""
        self._open, self._broke_at, self.has_left = False, -math.inf, True

    def is_there(self, now: float) -> bool:
        """Returns whether the trainer is there."""
        if self._open:
            return self.is_unread or now - self._heard_at < SILENT_SECONDS
        return now - self._broke_at < RECONNECT_SECONDS


@dataclass(frozen=True, slots=True)
class Claim:
    """By what an attempt holds its run.

    Attributes:
        credential: The name of the credential that it was admitted by; empty for none, and for an operator's.
        secret_sha256: The hash of its trainer's secret; empty for an agent that has none.
    """

    credential: str = ""
    secret_sha256: bytes = b""

    @classmethod
    def of(cls, stored: agent_pb2.Hello) -> Claim:
        """The claim in a Hello as the journal has it."""
        return cls(stored.credential, stored.secret_sha256)

    def is_same_trainer(self, other: Claim) -> bool:
        """Whether both have the same secret."""
        return hmac.compare_digest(self.secret_sha256, other.secret_sha256)


@dataclass(slots=True, eq=False)
class Attempt:
    """One attach of a run: its Hello, the bytes of that for the journal, how far its samples are, and its presence."""

    hello: RunHello
    message: bytes
    cursor: Cursor = field(default_factory=Cursor)
    presence: Presence = field(default_factory=Presence)
    claim: Claim = field(default_factory=Claim)
    released: bool = False  # by an operator: it may not come back, and whoever comes next has the run
    began_at: float = -math.inf  # monotonic seconds; of an attempt before the daemon's start, it is not known
    journalled: bool = False  # whether its Hello is in the journal
    said_farewell: bool = False  # whether its closing sample has come
