"""A loader whose position is part of a checkpoint, and that leaves batches out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.data import DataLoader

from sharpwatch.checkpointing.data_position import DataPosition, holds, paced, union
from sharpwatch.checkpointing.rng_state import random_state, set_random_state
from sharpwatch.errors import CheckpointError


@runtime_checkable
class _Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]:
        """Where it stands."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Stand there again."""


class Batches:
    """The batches of `loader`, from wherever the run stands in it.

    A loader with `state_dict` and `load_state_dict` (torchdata's `StatefulDataLoader`, or one of your own) says itself
    where it stands. Any other must bring the same batches again when it is iterated from the same random state and
    epoch, as a `DataLoader` does; it is found again by passing over what has been taken.

    An epoch of a loader that has a length has always as many batches: what is left out moves the next ones up.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader: Any = loader
        self.epoch = 0
        self.taken = 0  # batches of all passes, those that were left out too
        self.left_out: list[tuple[int, int]] = []
        self._trail = DataPosition()
        self._given = 0  # batches of this epoch
        self._pass = 0  # times that the loader was begun
        self._index = 0  # batches taken of this pass
        self._start: dict[str, Any] = {}  # the random states in which the pass was begun
        self._under_way: Iterator[Any] | None = None
        self._resume: Mapping[str, Any] | None = None  # where to begin the iterator

    def __len__(self) -> int:
        """Batches of an epoch; raises TypeError where the loader has no length."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """The rest of the epoch that was restored; else a new one, from its first batch.

        A new pass is begun now and not with its first batch: the loader may draw from what all draw from.
        """
        length = self.length()
        if self._given == length or (self._given and self._resume is None):  # the last iterator was left
            self._end_epoch()
            if self._pass < self.epoch:
                self._end_pass()
        if self._resume is None and (self._under_way is None or not self._index):
            self._begin()
        return self._rest(length)

    def _rest(self, length: int | None) -> Iterator[Any]:
        """What is left of this epoch, of `length` batches."""
        while length is None or self._given < length:
            try:
                batch = self._next()
            except StopIteration:
                break
            self._given += 1
            yield batch
        self._end_epoch()
        if self._under_way is not None and self._index == Batches.length(self):
            next(self._under_way, None)  # as a loop asks once more, and a sampler draws once more
            self._end_pass()

    def mark(self, step: int, taken: int | None = None) -> None:
        """Optimizer step `step` was done with the batches taken so far, or with `taken` of them."""
        self._trail.mark(step, self.taken if taken is None else taken)

    def taken_by(self, first: int, last: int) -> tuple[int, int]:
        """The batches of steps [first, last), as a range of all."""
        return (self._trail.batches(first - 1), self._trail.batches(last - 1)) if first < last else (0, 0)

    def leave_out(self, *ranges: tuple[int, int]) -> None:
        """Leave out the batches in `ranges`; what has been taken stays taken."""
        self.left_out = union([*self.left_out, *((max(first, self.taken), last) for first, last in ranges)])

    def state_dict(self) -> dict[str, Any]:
        """The position, and the random states that go with it."""
        return {
            **self.place(),
            "left_out": [list(one) for one in self.left_out],
            "trail": [list(corner) for corner in self._trail.corners],
            "length": self.length(),
            "random": random_state(),
        }

    def place(self) -> dict[str, Any]:
        """Where this stands among the batches, as a part of its state."""
        return {
            "epoch": self.epoch,
            "taken": self.taken,
            "given": self._given,
            "pass": self._pass,
            "index": self._index,
            "start": self._start,
            # Not before the first batch: StatefulDataLoader would begin its iterator for it.
            "loader": self.loader.state_dict() if self.taken and isinstance(self.loader, _Stateful) else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand there again, in the random states of then."""
        self.epoch, self.taken, self._given = state["epoch"], state["taken"], state["given"]
        self.left_out = union(state["left_out"])
        self._trail = DataPosition(state["trail"])
        self._pass, self._index, self._start = state["pass"], state["index"], state["start"]
        if self._given == self.length():
            self._end_epoch()
        self._under_way, self._resume = None, state
        set_random_state(state["random"])

    def length(self) -> int | None:
        """Batches of an epoch, None where the loader has no length."""
        try:
            return len(self)
        except TypeError:
            return None

    def pace(self, length: int | None, was: int, now: int) -> Fraction:
        """Batches that one of `now` ranks takes for each that one of `was` ranks took, whose epoch had `length`."""
        if was == now:
            return Fraction(1)
        mine = self.length()
        return Fraction(mine, length) if mine and length else Fraction(was, now)

    def taken_over(self, state: Mapping[str, Any], was: int, now: int) -> dict[str, Any]:
        """`state` of one of `was` ranks, as it is for one of `now`: as far through its epoch.

        Raises `CheckpointError` where only the loader could tell.
        """
        if state["loader"] and not isinstance(self.loader, DataLoader):
            raise CheckpointError(f"the data's own state is that of a rank of {was}, and can't be taken up by {now}")
        pace = self.pace(state["length"], was, now)
        return {
            **state,
            **{name: int(state[name] * pace) for name in ("taken", "given", "index")},
            "trail": [(step, int(batches * pace)) for step, batches in state["trail"]],
            "left_out": paced(state["left_out"], pace),
            "loader": None if state["loader"] else state["loader"],  # passed over, as any DataLoader
        }

    def __getstate__(self) -> dict[str, Any]:
        """A copy stands where this stands; the iterator, which can't be copied, it begins anew."""
        resume = self._resume if self._under_way is None else self.state_dict()
        return {**self.__dict__, "_under_way": None, "_resume": resume}

    def _end_epoch(self) -> None:
        self._given = 0
        self.epoch += 1

    def _end_pass(self) -> None:
        self._under_way = self._resume = None
        self._index = 0
        self._pass += 1

    def _next(self) -> Any:
        """The next batch that is not left out; raises StopIteration at the end of a loader without a length."""
        while True:
            iterator = self._begin() if self._under_way is None else self._under_way
            if not self._index:
                self._start["first"] = random_state()  # others may have drawn since: a second loader, the user's hooks
            try:
                batch = next(iterator)
            except StopIteration:
                if self._index == 0:
                    raise  # an empty loader
                self._end_pass()
                if self.length() is None:
                    raise
                continue
            self.taken += 1
            self._index += 1
            if not holds(self.left_out, self.taken - 1):
                return batch

    def _begin(self) -> Iterator[Any]:
        """The iterator of a new pass, or again of the pass that was restored."""
        state, self._resume = self._resume, None
        if state is not None and state["loader"] is not None:
            self.loader.load_state_dict(state["loader"])
        passing_over = self._index if state is not None and state["loader"] is None else 0
        self._set_epoch()
        if state is not None:
            set_random_state(state["random"])
        if passing_over:
            self._set_start()
        elif state is None or not self._index:
            self._start = {"random": random_state(), "generators": [one.get_state() for one in self._generators()]}
        iterator: Iterator[Any] = iter(self.loader)
        self._under_way = iterator
        if passing_over and "first" in self._start:
            set_random_state(self._start["first"])
        for _ in range(passing_over):
            next(iterator)
        if state is not None and self._index:  # else the pass begins here, and draws from them
            set_random_state(state["random"])
        return iterator

    def _set_epoch(self) -> None:
        """Tell whatever shuffles by the number of the pass."""
        places: list[Any] = [self.loader, *(getattr(self.loader, name, None) for name in ("sampler", "batch_sampler"))]
        for place in places:
            if hasattr(place, "set_epoch"):
                place.set_epoch(self._pass)

    def _set_start(self) -> None:
        set_random_state(self._start["random"])
        for generator, state in zip(self._generators(), self._start["generators"], strict=True):
            generator.set_state(state)

    def _generators(self) -> list[torch.Generator]:
        """The loader's own generators, which a pass draws from."""
        sampler, batch_sampler = (getattr(self.loader, name, None) for name in ("sampler", "batch_sampler"))
        places = (self.loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
        found = [getattr(place, "generator", None) for place in places]
        return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())
