"""The processes of one run: what they agree on, and what they add up, without one that waits for another.

A step's `Word` is summed over ranks by an asynchronous gloo reduction, launched at the end of step t and read at the
end of step t + `DELAY`. Training itself keeps ranks within a step of each other, so all have launched by then, and only
the transport may be under way. What rank 0 has to say to all (commands) follows by a broadcast, again read `DELAY`
steps after its launch: every rank takes it in at the same named step. A rank that can't read is lost to sharpwatch: it
agrees to nothing any more, and soon neither do those who wait for it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from sharpwatch.errors import AttachError

DELAY = 2  # steps between launching and reading
_PATIENCE = timedelta(seconds=120)  # for all ranks to come to a place where all come, or the run has lost one
_TRANSPORT = timedelta(seconds=10)  # for what all have launched
_LOG = logging.getLogger("sharpwatch")

_Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Word:
    """What the ranks say at the end of a step: rank 0's own numbers, and sums over all.

    `sums` are a tap's, of the step of `losses`, which may be an earlier one than `step`.
    """

    step: int
    clock_unix_ns: float = 0.0  # rank 0's
    kinds: int = 0  # rank 0's: probes that are due at the next step, one bit each
    loss: float = 0.0  # the sum of `losses` losses
    losses: int = 0
    taps: int = 0  # ranks whose tap was read
    swallowed_errors: int = 0
    sums: _Array | None = None
    messages: Sequence[bytes] = ()  # rank 0's, in full on every rank


@dataclass(slots=True)
class _Launched:
    """A reduction, or a broadcast, under way."""

    work: Any
    tensor: Tensor
    step: int = 0


_NUMBERS = 9  # of a word, before its sums: step, its square, clock, kinds, loss, losses, taps, errors, message bytes


class Ranks:
    """This process among `size`, as rank 0 to `size` - 1."""

    def __init__(self, group: Any, entries: int) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.lost = False
        self.patience = _TRANSPORT
        self._entries = entries
        self._words: deque[_Launched] = deque()
        self._broadcasts: deque[tuple[int, _Launched]] = deque()  # with the number of the agreement to read it at
        self._agreements = 0
        self._unsaid: deque[bytes] = deque()  # announced by a word, to be broadcast when that is read

    @property
    def leads(self) -> bool:
        """Whether this process speaks to the daemon."""
        return self.rank == 0

    def agree(self, own: Word) -> Word | None:
        """Launch the word of this step; the one of `DELAY` steps ago, summed: None in the first steps and when lost.

        Every rank calls this once a step. `own.sums` has as many numbers on every rank, at every step.
        """
        if self.lost:
            return None
        try:
            return self._agree(own)
        except (RuntimeError, ValueError) as error:
            self._lose(f"{type(error).__name__}: {error}")
            return None

    def all(self, ready: bool) -> bool:
        """Whether every rank is ready; waits for all, so only for places where all wait for each other anyway."""
        if self.lost:
            return False
        try:
            count = self.add(torch.tensor([float(ready)], dtype=torch.float64, device="cpu"))
        except (RuntimeError, ValueError) as error:
            self._lose(f"{type(error).__name__}: {error}")
            return False
        return int(count.item()) == self.size

    def add(self, tensor: Tensor) -> Tensor:
        """The sum of all ranks' `tensor`, on the CPU; waits as `all` does. Raises `RuntimeError` where one is lost."""
        total = tensor.detach().to("cpu", copy=True)
        dist.all_reduce(total, group=self._group, async_op=True).wait(_PATIENCE)
        return total

    def leave(self) -> None:
        """Agree to nothing more; what is under way is left to itself."""
        # Freed while torch still works on them, a group and its tensors can deadlock the process.
        _LEFT.append(self)
        self.lost = True

    def _agree(self, own: Word) -> Word | None:
        self._agreements += 1
        message = b"".join(len(each).to_bytes(4, "little") + each for each in own.messages)
        if message:
            self._unsaid.append(message)
        heard = self._hear()
        self._words.append(self._launch(own, len(message)))
        if len(self._words) <= DELAY:
            return None
        return self._read(self._words.popleft(), heard)

    def _launch(self, own: Word, message: int) -> _Launched:
        numbers = np.zeros(_NUMBERS + self._entries)
        leads = float(self.leads)
        numbers[:_NUMBERS] = (
            own.step,
            float(own.step) ** 2,
            leads * own.clock_unix_ns,
            leads * own.kinds,
            own.loss,
            own.losses,
            own.taps,
            own.swallowed_errors,
            leads * message,
        )
        if own.sums is not None:
            numbers[_NUMBERS:] = own.sums
        tensor = torch.from_numpy(numbers)
        return _Launched(dist.all_reduce(tensor, group=self._group, async_op=True), tensor, own.step)

    def _read(self, launched: _Launched, heard: Sequence[bytes]) -> Word:
        launched.work.wait(self.patience)
        numbers = launched.tensor.numpy()
        step, squared, clock, kinds, loss, losses, taps, errors, message = numbers[:_NUMBERS].tolist()
        if step != self.size * launched.step or squared != self.size * float(launched.step) ** 2:
            raise ValueError(
                f"ranks take different steps: this one is at {launched.step}, their mean {step / self.size}"
            )
        if message:
            self._broadcast(int(message))
        sums = numbers[_NUMBERS:] if self._entries else None
        return Word(launched.step, clock, int(kinds), loss, int(losses), int(taps), int(errors), sums, heard)

    def _broadcast(self, size: int) -> None:
        tensor = torch.zeros(size, dtype=torch.uint8, device="cpu")
        if self.leads:
            tensor = torch.frombuffer(bytearray(self._unsaid.popleft()), dtype=torch.uint8)
        work = dist.broadcast(tensor, 0, group=self._group, async_op=True)
        self._broadcasts.append((self._agreements + DELAY, _Launched(work, tensor)))

    def _hear(self) -> list[bytes]:
        """The messages whose time has come."""
        heard: list[bytes] = []
        while self._broadcasts and self._broadcasts[0][0] == self._agreements:
            _, launched = self._broadcasts.popleft()
            launched.work.wait(_PATIENCE)  # longer than for a word: rank 0 acts on it without waiting
            data = launched.tensor.numpy().tobytes()
            while data:
                size = int.from_bytes(data[:4], "little")
                heard.append(data[4 : 4 + size])
                data = data[4 + size :]
        return heard

    def _lose(self, reason: str) -> None:
        self.leave()
        _LOG.warning(
            "rank %d of %d has lost the others and agrees to nothing any more: %s", self.rank, self.size, reason
        )


_LEFT: list[Ranks] = []


@dataclass(frozen=True, slots=True)
class Introduction:
    """What a rank says of itself at attach: an `error`, or what must be `equal` on all, and its `own` part."""

    error: str = ""
    equal: Mapping[str, object] = field(default_factory=dict)
    own: object = None


def join(mine: Introduction) -> tuple[Any, list[Introduction]]:
    """A gloo group of all ranks of the run, and what each says of itself.

    Raises `AttachError` on every rank where one of them failed, has other settings, or did not come within two minutes.
    """
    size = dist.get_world_size()
    try:
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        all_of_them: list[Any] = [None] * size
        dist.all_gather_object(all_of_them, mine, group=group)
    except (RuntimeError, ValueError) as error:
        seconds = int(_PATIENCE.total_seconds())
        raise AttachError(
            f"not all {size} ranks called attach within {seconds} s (all must, not rank 0 alone): {error}"
        ) from error
    for rank, each in enumerate(all_of_them):
        if each.error:
            raise AttachError(f"rank {rank}: {each.error}")
        for name, value in each.equal.items():
            if value != all_of_them[0].equal[name]:
                raise AttachError(f"{name}: rank 0 has {all_of_them[0].equal[name]!r}, rank {rank} {value!r}")
    return group, all_of_them
