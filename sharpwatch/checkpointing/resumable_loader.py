"""A data loader whose position can be saved in a checkpoint, and that can leave batches out."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from math import ceil, floor, gcd
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.data import DataLoader

from sharpwatch.common.rng_state import random_state, set_random_state
from sharpwatch.errors import CheckpointError

Range = tuple[int, int]  # batches [first, last), counted from 0 in the order in which the data yields them


@runtime_checkable
class _StatefulLoader(Protocol):
    def state_dict(self) -> dict[str, Any]:
        """Its position."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Continue from that position."""


class ResumableLoader:
    """Iterates over the batches of `loader`, from the position where the run is.

    A loader with `state_dict` and `load_state_dict`, such as torchdata's `StatefulDataLoader`, restores its own
    position. Any other is iterated again from the same random state and epoch, and the batches already taken are
    passed over; it must yield the same ones, as a `DataLoader` does.

    If the loader has a length, every epoch has that many batches: the next ones take the place of those left out. An
    epoch of the run may then be shorter or longer than a pass, which is one iteration over the loader.

    Args:
        loader: The training loader, or any other iterable of batches.

    Attributes:
        epoch: The number of completed epochs.
        taken: The number of batches taken in all passes, with those left out.
        left_out: Ranges of batches to leave out, counted as `taken`.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader: Any = loader
        self.epoch = 0
        self.taken = 0
        self.left_out: list[tuple[int, int]] = []
        self._steps = DataPosition()
        self._yielded = 0  # batches of this epoch
        self._pass = 0  # completed passes
        self._index = 0  # batches taken in this pass
        self._start: dict[str, Any] = {}  # the random states at the start of the pass
        # A loader of Accelerate's fetches a batch ahead, whose draws are made before the step in between.
        self._fetches_ahead = hasattr(loader, "base_dataloader")
        self._before: dict[str, Any] | None = None  # of such a one, the random states before the newest batch
        self._after: dict[str, Any] | None = None  # those to set after the next one
        self._batches: Iterator[Any] | None = None  # the iterator of the pass
        self._resume: Mapping[str, Any] | None = None  # the state to start the next iterator from

    def __len__(self) -> int:
        """The number of batches of an epoch.

        Raises:
            TypeError: The loader has no length.
        """
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the rest of the epoch that was restored, otherwise over a new epoch.

        The pass is started at once and not with its first batch, because starting it may draw random numbers.
        """
        length = self.length()
        if self._yielded == length or (self._yielded and self._resume is None):  # the last iterator was abandoned
            self._end_epoch()
            if self._pass < self.epoch:
                self._end_pass()
        if self._resume is None and (self._batches is None or not self._index):
            self._start_pass()
        return self._rest_of_epoch(length)

    def _rest_of_epoch(self, length: int | None) -> Iterator[Any]:
        while length is None or self._yielded < length:
            try:
                batch = self._next()
            except StopIteration:
                break
            self._yielded += 1
            yield batch
        self._end_epoch()
        # The loader's own length: a subclass may limit its epochs, and the pass then goes on.
        if self._batches is not None and self._index == ResumableLoader.length(self):
            next(self._batches, None)  # a loop would call next() once more, for which a sampler may draw
            self._end_pass()

    def mark(self, step: int, taken: int | None = None) -> None:
        """Note that optimizer step `step` is done, with all batches taken so far or with `taken` of them."""
        self._steps.mark(step, self.taken if taken is None else taken)

    def batches_of(self, first: int, last: int) -> tuple[int, int]:
        """The range of batches that the steps [first, last) took."""
        return (self._steps.batches(first - 1), self._steps.batches(last - 1)) if first < last else (0, 0)

    def leave_out(self, *ranges: tuple[int, int]) -> None:
        """Leave out the batches in `ranges` that have not been taken yet."""
        self.left_out = union([*self.left_out, *((max(first, self.taken), last) for first, last in ranges)])

    def state_dict(self) -> dict[str, Any]:
        """The position, and the random states at it."""
        return {
            **self.position(),
            "left_out": [list(one) for one in self.left_out],
            "trail": [list(corner) for corner in self._steps.corners],
            "length": self.length(),
            "random": random_state(),
        }

    def position(self) -> dict[str, Any]:
        """The part of the state that says which batch is next."""
        return {
            "epoch": self.epoch,
            "taken": self.taken,
            "given": self._yielded,
            "pass": self._pass,
            "index": self._index,
            "start": self._start,
            # Not before the first batch: StatefulDataLoader would start its iterator for it.
            "loader": self.loader.state_dict() if self.taken and _keeps_position(self.loader) else None,
            "before": self._before,
            "generators": [one.get_state() for one in self._generators()] if self._fetches_ahead else [],
            "seeds": [one.initial_seed for one in self._seeded_samplers()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the position of `state`, with its random states."""
        self.epoch, self.taken, self._yielded = state["epoch"], state["taken"], state["given"]
        self.left_out = union(state["left_out"])
        self._steps = DataPosition(state["trail"])
        self._pass, self._index, self._start = state["pass"], state["index"], state["start"]
        for sampler, seed in zip(self._seeded_samplers(), state.get("seeds", ()), strict=False):
            sampler.initial_seed = seed
        if self._yielded == self.length():
            self._end_epoch()
        self._batches, self._resume, self._after = None, state, None
        if self._fetches_ahead and (state["loader"] or {}).get("_iterator_finished"):
            self._skip_to_next_pass(state)
        set_random_state(state["random"])

    def _skip_to_next_pass(self, state: Mapping[str, Any]) -> None:
        """Go to the next pass: a loader of Accelerate's whose pass has ended would begin it by itself, uncounted."""
        self.loader.load_state_dict(state["loader"])
        iter(self.loader.base_dataloader)  # takes the state; the next pass then starts as any
        for generator, now in zip(self._generators(), state["generators"], strict=False):
            generator.set_state(now)
        self._end_pass()
        if self.length() is None:
            self._end_epoch()

    def length(self) -> int | None:
        """The number of batches of an epoch; None if the loader has no length."""
        try:
            return len(self)
        except TypeError:
            return None

    def batch_ratio(self, old_length: int | None, old_ranks: int, ranks: int) -> Fraction:
        """The number of batches that a rank takes now for each that one took before.

        Args:
            old_length: The number of batches of an epoch before, None if unknown.
            old_ranks: The number of ranks before.
            ranks: The number of ranks now.
        """
        if old_ranks == ranks:
            return Fraction(1)
        length = self.length()
        return Fraction(length, old_length) if length and old_length else Fraction(old_ranks, ranks)

    def adapted_state(self, state: Mapping[str, Any], old_ranks: int, ranks: int) -> dict[str, Any]:
        """Convert the state of one of `old_ranks` ranks for one of `ranks`, at the same share of the epoch.

        Raises:
            CheckpointError: The loader keeps its own state, which only the loader could convert.
        """
        if state["loader"] and not isinstance(self.loader, DataLoader):
            raise CheckpointError(
                f"the state of the data was saved by one of {old_ranks} ranks and can't be converted for {ranks}: "
                f"{type(self.loader).__name__} keeps its own state"
            )
        ratio = self.batch_ratio(state["length"], old_ranks, ranks)
        return {
            **state,
            **{name: int(state[name] * ratio) for name in ("taken", "given", "index")},
            "trail": [(step, int(batches * ratio)) for step, batches in state["trail"]],
            "left_out": rescaled(state["left_out"], ratio),
            "loader": None if state["loader"] else state["loader"],  # None: passed over, as with any DataLoader
        }

    def __getstate__(self) -> dict[str, Any]:
        """A copy is at the same position; it starts an iterator of its own, because iterators can't be copied."""
        resume = self._resume if self._batches is None else self.state_dict()
        return {**self.__dict__, "_batches": None, "_resume": resume}

    def _end_epoch(self) -> None:
        self._yielded = 0
        self.epoch += 1

    def _end_pass(self) -> None:
        self._batches = self._resume = None
        self._index = 0
        self._pass += 1

    def _next(self) -> Any:
        """The next batch that is not left out; raises StopIteration at the end of a loader without a length."""
        while True:
            batches = self._start_pass() if self._batches is None else self._batches
            if not self._index:
                self._start["first"] = random_state()  # a second loader or the user's hooks may have drawn since
            if self._fetches_ahead:
                self._before = random_state()
            try:
                batch = next(batches)
            except StopIteration:
                if self._index == 0:
                    raise  # an empty loader
                self._end_pass()
                if self.length() is None:
                    raise
                continue
            if self._after is not None:
                set_random_state(self._after)
                self._after = None
            self.taken += 1
            self._index += 1
            if not holds(self.left_out, self.taken - 1):
                return batch

    def _start_pass(self) -> Iterator[Any]:
        """Start the iterator of a new pass, or of the pass that was restored."""
        state, self._resume = self._resume, None
        if state is not None and state["loader"] is not None:
            self.loader.load_state_dict(state["loader"])
        passing_over = self._index if state is not None and state["loader"] is None else 0
        self._set_epoch()
        if state is not None:
            set_random_state(state["random"])
        # One of Accelerate's that restores its own position starts its samplers anew for it, which draw.
        starts_again = bool(passing_over or (self._fetches_ahead and state is not None and self._index))
        if starts_again:
            self._restore_start()
        elif state is None or not self._index:
            self._start = {"random": random_state(), "generators": [one.get_state() for one in self._generators()]}
        batches: Iterator[Any] = iter(self.loader)
        self._batches = batches
        if starts_again and "first" in self._start:
            set_random_state(self._start["first"])
        for number in range(1, passing_over + 1):
            if number == passing_over and state is not None and state.get("before") is not None:
                set_random_state(state["before"])
            next(batches)
        if state is not None and starts_again and not passing_over:
            self._after = state["random"]  # it starts with its first batch
        elif state is not None and self._index:  # otherwise the pass starts here, and its draws count
            set_random_state(state["random"])
        return batches

    def _set_epoch(self) -> None:
        """Call `set_epoch` of the loader and its samplers, which may shuffle by it."""
        for owner in self._owners():
            if hasattr(owner, "set_epoch"):
                owner.set_epoch(self._pass)

    def _restore_start(self) -> None:
        """Set all random states to those at the start of the pass."""
        set_random_state(self._start["random"])
        for generator, state in zip(self._generators(), self._start["generators"], strict=False):
            generator.set_state(state)

    def _generators(self) -> list[torch.Generator]:
        """The loader's own generators, from which a pass draws."""
        found = [getattr(owner, "generator", None) for owner in self._owners() if not _is_seeded(owner)]
        # By id: a DataLoader hands its own generator to its sampler.
        return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())

    def _seeded_samplers(self) -> list[Any]:
        """Samplers that draw by a seed and the epoch alone, as Accelerate's."""
        return [owner for owner in self._owners() if _is_seeded(owner)]

    def _owners(self) -> list[Any]:
        """The loader, its samplers, and those that they wrap, as Accelerate's do, in a fixed order."""
        owners = [self.loader]
        for owner in owners:  # which grows
            inner = (getattr(owner, name, None) for name in ("sampler", "batch_sampler"))
            owners += [one for one in inner if one is not None and all(one is not known for known in owners)]
        return owners


def _keeps_position(loader: Any) -> bool:
    """Whether a loader restores its own position. One of Accelerate's does so if the loader that it wraps does."""
    return isinstance(getattr(loader, "base_dataloader", loader), _StatefulLoader)


def _is_seeded(sampler: Any) -> bool:
    return isinstance(getattr(sampler, "initial_seed", None), int) and hasattr(sampler, "set_epoch")


class DataPosition:
    """The number of batches taken when each step was done.

    It is a piecewise linear function, kept as its corners (step, batches). If every step takes the same number of
    batches, these are only its two ends.
    """

    def __init__(self, corners: Iterable[Sequence[int]] = ((0, 0),)) -> None:
        self.corners = [(step, batches) for step, batches in corners]

    def mark(self, step: int, batches: int) -> None:
        """Note that `batches` had been taken when `step` was done; only the first call for a step counts."""
        last = self.corners[-1]
        if step <= last[0]:
            return
        if len(self.corners) > 1 and _slope(self.corners[-2], last) == _slope(last, (step, batches)):
            self.corners.pop()
        self.corners.append((step, batches))

    def batches(self, step: int) -> int:
        """The number of batches taken when `step` was done; extrapolated past the newest step."""
        if len(self.corners) == 1:
            return self.corners[0][1] + step - self.corners[0][0]
        right = bisect_right(self.corners, step, key=lambda corner: corner[0])
        right = min(max(right, 1), len(self.corners) - 1)
        start, slope = self.corners[right - 1], _slope(self.corners[right - 1], self.corners[right])
        return start[1] + slope[0] * (step - start[0]) // slope[1]


def union(ranges: Iterable[Sequence[int]]) -> list[Range]:
    """The same batches as disjoint ranges in ascending order."""
    merged: list[Range] = []
    for first, last in sorted((first, last) for first, last in ranges if first < last):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged


def rescaled(ranges: Iterable[Sequence[int]], ratio: Fraction) -> list[Range]:
    """`ranges` in batches of which there are `ratio` for each old one; rounded so that they cover all of the data."""
    return union((floor(first * ratio), ceil(last * ratio)) for first, last in ranges)


def holds(ranges: Sequence[Range], batch: int) -> bool:
    """Whether `batch` is in one of `ranges`, which must be disjoint and in ascending order."""
    before = bisect_right(ranges, batch, key=lambda one: one[0])
    return before > 0 and batch < ranges[before - 1][1]


def nth_kept(ranges: Sequence[Range], number: int) -> int:
    """Batch `number`, from 0, of those outside `ranges`, which must be disjoint and in ascending order."""
    for first, last in ranges:
        if number < first:
            break
        number += last - first
    return number


def _slope(start: Range, end: Range) -> tuple[int, int]:
    """Batches for each step between two corners, as a reduced fraction."""
    batches, steps = end[1] - start[1], end[0] - start[0]
    # In whole numbers, so that equal slopes are equal and a steady run stays two corners.
    divisor = gcd(batches, steps)
    return batches // divisor, steps // divisor
