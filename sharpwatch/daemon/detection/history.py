"""What a run remembers of its steps for other runs: its losses, and the steps at which it stood out. Bounded."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from sharpwatch.daemon.detection.state import Arrays, packed, unpacked
from sharpwatch.wire import Doubles, Ints

MAX_LOSSES = 20_000  # of a run; beyond it every second is let go
REMEMBERED = 1_000  # steps that stood out, and stretches of steps that were judged; the newest
FIRST = 8  # losses at the start, by which runs with the same data and the same weights are known
LATER = 10  # steps after which a mean over several samples, too, has shown what began at a step
NEAR = 1  # steps by which two runs may count the same batch apart
SLOW = 40  # steps by which the onsets may differ that two runs tell of the same, where each is estimated from a mean
_COMPARED = 64  # common steps by which it is told whether two runs' losses have parted


class Losses:
    """Losses by step, ascending; a step that comes again replaces all from there on, as a new attempt does.

    Args:
        capacity: How many are kept. Beyond it only every second step is, then every fourth, and so on.
    """

    def __init__(self, capacity: int = MAX_LOSSES) -> None:
        self._capacity = capacity
        self.stride = 1  # only steps that it divides are kept
        self._size = 0
        self._steps: Ints = np.zeros(64, dtype=np.int64)
        self._losses: Doubles = np.zeros(64)

    @classmethod
    def of(cls, steps: npt.ArrayLike, losses: npt.ArrayLike, stride: int = 1) -> Losses:
        """Losses that are known as a whole.

        Args:
            steps: Ascending.
            losses: One for each step.
            stride: By which later steps must be divisible.
        """
        made = cls()
        made._steps, made._losses = np.array(steps, dtype=np.int64), np.array(losses, dtype=np.float64)
        made._size, made.stride = len(made._steps), stride
        made._capacity = max(made._capacity, made._size)
        return made

    @classmethod
    def from_state(cls, state: bytes) -> Losses:
        """The losses that `state` is of; raises `ValueError` for other bytes."""
        arrays = unpacked(state)
        try:
            return cls.of(arrays["steps"], arrays["losses"])
        except KeyError as error:
            raise ValueError(f"the state of the losses has no {error}") from None

    def state(self) -> bytes:
        """All of them, for `from_state`."""
        return packed({"steps": self.steps, "losses": self.losses})

    def __len__(self) -> int:
        return self._size

    @property
    def steps(self) -> Ints:
        """The steps."""
        return self._steps[: self._size]

    @property
    def losses(self) -> Doubles:
        """The loss at each step."""
        return self._losses[: self._size]

    def thinned(self) -> Losses:
        """At most `MAX_LOSSES` of them, evenly chosen."""
        every = max(1, -(-len(self) // MAX_LOSSES))
        return Losses.of(self.steps[::every], self.losses[::every])

    def at(self, step: int) -> float | None:
        """The loss at a step; None where there is none."""
        place = int(np.searchsorted(self.steps, step))
        return float(self._losses[place]) if place < self._size and self._steps[place] == step else None

    def before(self, step: int, count: int) -> dict[int, float]:
        """The newest losses before a step, by step.

        Args:
            step: The step.
            count: How many at most.
        """
        end = int(np.searchsorted(self.steps, step))
        kept = slice(max(0, end - count), end)
        return dict(zip(self.steps[kept].tolist(), self.losses[kept].tolist(), strict=True))

    def since(self, step: int, count: int) -> Doubles:
        """The newest losses, at most `count`, of those at or after a step."""
        begin = max(int(np.searchsorted(self.steps, step)), self._size - count)
        return self.losses[begin:]

    def see(self, step: int, loss: float | None) -> None:
        """Take in the next step; one without a loss that is finite only ends what it replaces."""
        if self._size and step <= self._steps[self._size - 1]:
            self._size = int(np.searchsorted(self.steps, step))
        if loss is None or not math.isfinite(loss) or step % self.stride:
            return
        if self._size == self._capacity:
            self._thin()
            if step % self.stride:
                return
        if self._size == len(self._steps):
            more = max(64, len(self._steps))
            self._steps = np.append(self._steps, np.zeros(more, dtype=np.int64))
            self._losses = np.append(self._losses, np.zeros(more))
        self._steps[self._size], self._losses[self._size] = step, loss
        self._size += 1

    def _thin(self) -> None:
        while self._size == self._capacity:
            self.stride *= 2
            kept = self.steps % self.stride == 0
            steps, losses = self.steps[kept], self.losses[kept]
            self._size = len(steps)
            self._steps[: self._size], self._losses[: self._size] = steps, losses


class StepHistory:
    """The losses of a run, and the steps at which its loss or its gradients stood out."""

    def __init__(self) -> None:
        self.losses = Losses()
        self.first: dict[int, float] = {}  # losses of the first steps
        self.last_step = -1  # the highest
        self._odd: dict[int, None] = {}  # in the order they came, as are the next
        self._found: dict[int, None] = {}  # onsets of the run's own findings
        # Stretches of steps without a gap that could be judged: first and last.
        self._judged: deque[list[int]] = deque(maxlen=REMEMBERED)

    def see(self, step: int, loss: float | None, *, judged: bool, odd: bool) -> None:
        """Take in the next step.

        Args:
            step: Its number.
            loss: Its loss, if known.
            judged: Whether the run was old enough for its loss to be judged.
            odd: Whether its loss or its gradients stood out.
        """
        self.losses.see(step, loss)
        self._see_first(step, loss)
        self.last_step = max(self.last_step, step)
        if judged:
            self._see_judged(step)
        if odd:
            _remember(self._odd, step)

    def mark(self, onset: int) -> None:
        """Note that a finding of the run's own began at a step."""
        _remember(self._odd, onset)
        _remember(self._found, onset)

    def stood_out(self, step: int) -> bool | None:
        """Whether the run stood out at a step or next to it; None where that is not known, or not yet."""
        if not self._odd.keys().isdisjoint(range(step - NEAR, step + NEAR + 1)):
            return True
        # An older one may be forgotten.
        is_kept = len(self._odd) < REMEMBERED or step > next(iter(self._odd))
        if not (is_kept and self.has_passed(step)):
            return None
        return False if any(first <= step <= last for first, last in reversed(self._judged)) else None

    def shows(self, onset: int, *, is_brief: bool) -> bool | None:
        """Whether the run shows what another one's incident tells of; None where that can't be said, or not yet.

        Args:
            onset: The incident's.
            is_brief: Whether its onset is known to a step or two. Otherwise it is an estimate, as are those of this
                run's own findings, and nothing follows from what this run does not show just there.
        """
        seen = self.stood_out(onset)
        if seen or self._found.keys().isdisjoint(range(onset - SLOW, onset + SLOW + 1)):
            return seen if seen or is_brief else None
        return None if is_brief else True

    def has_parted(self, other: StepHistory, step: int) -> bool:
        """Whether this run's losses and another's differ before a step.

        Equal ones are of the same weights: a replica. Runs that have parted don't meet again, but for a restore, so
        the newest common steps tell.
        """
        here, there = (each.losses.before(step, _COMPARED) for each in (self, other))
        return any(there.get(at, loss) != loss for at, loss in here.items())

    def has_passed(self, step: int) -> bool:
        """Whether the run is so far past a step that all which began there has shown."""
        return self.last_step >= step + LATER

    def begins_like(self, other: StepHistory) -> bool:
        """Whether both runs' losses are equal at all the first steps that both have, at three or more.

        Losses that never change say nothing.
        """
        common = self.first.keys() & other.first.keys()
        values = {self.first[step] for step in common}
        return len(common) >= 3 and len(values) > 1 and all(self.first[step] == other.first[step] for step in common)

    def _see_first(self, step: int, loss: float | None) -> None:
        # A new attempt from the first steps on replaces them.
        for later in [each for each in self.first if each >= step]:
            del self.first[later]
        if loss is not None and len(self.first) < FIRST and math.isfinite(loss):
            self.first[step] = loss

    def _see_judged(self, step: int) -> None:
        if self._judged and self._judged[-1][0] <= step <= self._judged[-1][1] + 1:
            self._judged[-1][1] = max(self._judged[-1][1], step)
        else:
            self._judged.append([step, step])

    def state(self) -> Arrays:
        """All that `load_state` needs to go on."""
        return {
            "history.steps": self.losses.steps.copy(),
            "history.losses": self.losses.losses.copy(),
            "history.stride": np.array(self.losses.stride),
            "history.first": np.array(list(self.first.items()), dtype=np.float64).reshape(-1, 2),
            "history.odd": np.array(list(self._odd), dtype=np.int64),
            "history.found": np.array(list(self._found), dtype=np.int64),
            "history.judged": np.array(self._judged, dtype=np.int64).reshape(-1, 2),
            "history.last_step": np.array(self.last_step),
        }

    @classmethod
    def from_state(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> StepHistory:
        """The history that `state` is of; an empty one for a state of an earlier version, which has none."""
        made = cls()
        if "history.steps" in arrays:
            made.losses = Losses.of(arrays["history.steps"], arrays["history.losses"], int(arrays["history.stride"]))
            made.first = {int(step): float(loss) for step, loss in arrays["history.first"]}
            made._odd = dict.fromkeys(arrays["history.odd"].tolist())
            # An earlier version did not keep them apart.
            made._found = dict.fromkeys(arrays.get("history.found", np.zeros(0, dtype=np.int64)).tolist())
            made._judged.extend(arrays["history.judged"].tolist())
            made.last_step = int(arrays["history.last_step"])
        return made


def _remember(steps: dict[int, None], step: int) -> None:
    """Add a step, and forget the one that came first where there are too many."""
    steps.setdefault(step)
    if len(steps) > REMEMBERED:
        del steps[next(iter(steps))]
