"""Where the ranks of a run meet: in the store of the loop's process group, where nobody has to answer.

A group of their own needs all of them, so they make it once all have come; and one that can't be watched, or is
disabled, says so and goes on at once.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d

from sharpwatch.curvature.parameters.shards import is_sharded
from sharpwatch.errors import AttachError

_CALLS = itertools.count(1)  # of attach, by this process: all ranks make the same
_LONGEST = timedelta(minutes=30)  # the patience of a default group that names none
_LOADING = timedelta(minutes=1)  # between ranks that load the same checkpoint
_NOTICE = 30.0  # seconds after which a rank says whom it waits for
_LOG = logging.getLogger("sharpwatch")


class Rendezvous:
    """One call of `attach` on all ranks."""

    def __init__(self) -> None:
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        store = distributed_c10d._get_default_store()  # noqa: SLF001 - torch gives it nowhere else
        self._store = distributed_c10d.PrefixStore(f"sharpwatch/attach {next(_CALLS)}", store)

    @contextmanager
    def attending(self) -> Iterator[None]:
        """The body is this rank's part of `attach`; where it raises, the others hear why."""
        try:
            yield
        except BaseException as error:
            self.stay_away(str(error) or type(error).__name__)
            raise

    def stay_away(self, reason: str) -> None:
        """No rank can be watched; waits for nobody."""
        with suppress(RuntimeError):  # without its store the loop's own group is lost too
            self._store.compare_set("away", "", f"rank {self._rank}: {reason}")

    def all(self, place: str) -> None:
        """Wait until all ranks have come to `place`.

        Raises `AttachError` on each of them where one stays away, or does not come while the loop's own collectives
        would have waited for it.
        """
        try:
            self._all(place, patience().total_seconds())
        except RuntimeError as error:
            raise AttachError(f"the store of the process group is gone: {error}") from error

    def takes(self, proposal: str) -> bool:
        """Whether all ranks propose the same: True on all of them or on none. An empty proposal is against any.

        Only the first proposal of a rank counts. Waits for the others' a minute at most, unless it is empty.
        """
        if not proposal or self._store.compare_set("proposal", "", proposal).decode() != proposal:
            self._settled("no")
            return False
        if self._store.add("proposing", 1) == self._size:
            return self._settled("yes")
        self._came("taken", min(patience(), _LOADING).total_seconds())
        return self._settled("no")  # unless it is settled otherwise

    def _settled(self, answer: str) -> bool:
        return bool(self._store.compare_set("taken", "", answer).decode() == "yes")

    def _all(self, place: str, seconds: float) -> None:
        if self._store.add(f"come to {place}", 1) == self._size:
            self._store.set(place, "all")
        if not self._came(place, min(seconds, _NOTICE)):
            _LOG.warning("rank %d waits in attach, which all %d ranks must call", self._rank, self._size)
            if not self._came(place, seconds - _NOTICE):
                self.stay_away(f"not all {self._size} ranks called attach within {seconds:.0f} s (all must, not one)")
        if self._store.check(["away"]):
            raise AttachError(self._store.get("away").decode())

    def _came(self, place: str, seconds: float) -> bool:
        """Whether within `seconds` all have come to `place`, or one stays away."""
        deadline, pause = time.monotonic() + seconds, 0.001
        while not (self._store.check([place]) or self._store.check(["away"])):
            if time.monotonic() >= deadline:
                return False
            time.sleep(pause)  # no wait() of the store: it keeps torch's own threads from it
            pause = min(2 * pause, 0.2)
        return True


def is_several(model: nn.Module) -> bool:
    """Whether other processes train `model` too, or could hold a part of it."""
    return dist.is_available() and dist.is_initialized() and (dist.get_world_size() > 1 or is_sharded(model))


def check_grouped() -> None:
    """Raise `AttachError` where the program will train in several processes, but they don't know of each other yet."""
    ranks, rank = os.environ.get("WORLD_SIZE", ""), os.environ.get("RANK", "")
    if dist.is_available() and not dist.is_initialized() and ranks.isdecimal() and rank.isdecimal() and int(ranks) > 1:
        raise AttachError(
            f"WORLD_SIZE={ranks}, but there is no process group yet: call attach after init_process_group; "
            "take RANK and WORLD_SIZE out of the environment where each process trains a model of its own"
        )


def patience() -> timedelta:
    """How long the loop's own collectives wait."""
    group = distributed_c10d._get_default_group()  # noqa: SLF001 - torch gives it nowhere else
    with suppress(RuntimeError, AttributeError):
        timeout = group._get_backend(group._device_types[0]).options._timeout  # noqa: SLF001
        if isinstance(timeout, timedelta):
            return timeout
    return _LONGEST
