"""How the ranks of a run meet at attach: first in the store of the process group, then in a group of their own.

Making a group takes all ranks, so they wait for each other in the store before it: nobody has to answer there, and a
rank that can't be watched, or is disabled, says so and goes on at once.
"""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d

from sharpwatch.agent.distributed.commit import Arbiter
from sharpwatch.curvature.parameters.shards import is_sharded
from sharpwatch.errors import AttachError

_CALLS = itertools.count(1)  # of attach, by this process: all ranks make the same
_DEFAULT_TIMEOUT = timedelta(minutes=30)  # of a process group that names none
_LOADING = timedelta(minutes=1)  # between ranks that load the same checkpoint
_NOTICE_SECONDS = 30.0  # after which a rank logs that it waits
_IDLE: list[Any] = []  # groups that no watch uses any more
_LOG = logging.getLogger("sharpwatch")


class Rendezvous(Protocol):
    """One call of `attach`, on every process of the run."""

    alone: bool  # whether there is one process

    @contextmanager
    def attending(self) -> Iterator[None]:
        """The body is this rank's part of `attach`; what it raises is an `AttachError` on the other ranks."""

    def refuse(self, reason: str) -> None:
        """Tell the other ranks that this one can't be watched, and so none; waits for nobody."""

    def wait_for_all(self, place: str) -> None:
        """Wait until all ranks have come to `place`.

        Raises `AttachError` on each of them where one refuses, or does not come within the timeout of the loop's own
        collectives.
        """

    def agree(self, proposal: str) -> bool:
        """Whether all ranks propose the same: True on all of them or on none. An empty proposal is a veto.

        Only the first proposal of a rank counts. Waits for the others' at most a minute, unless it is empty.
        """


class SoleProcess:
    """The rendezvous of a run in one process: nobody to wait for."""

    alone = True

    @contextmanager
    def attending(self) -> Iterator[None]:
        """As `Rendezvous.attending`."""
        yield

    def refuse(self, reason: str) -> None:
        """As `Rendezvous.refuse`."""

    def wait_for_all(self, place: str) -> None:
        """As `Rendezvous.wait_for_all`."""

    def agree(self, proposal: str) -> bool:
        """As `Rendezvous.agree`."""
        return bool(proposal)


class StoreRendezvous:
    """A rendezvous of several processes, in the store of their process group."""

    alone = False

    def __init__(self) -> None:
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        store = distributed_c10d._get_default_store()  # noqa: SLF001 - torch gives it nowhere else
        self._store = distributed_c10d.PrefixStore(f"sharpwatch/attach {next(_CALLS)}", store)

    @contextmanager
    def attending(self) -> Iterator[None]:
        """As `Rendezvous.attending`."""
        try:
            yield
        # Also Ctrl-C and SystemExit: the other ranks wait for this one, whatever ended it.
        except BaseException as error:
            self.refuse(str(error) or type(error).__name__)
            raise

    def refuse(self, reason: str) -> None:
        """As `Rendezvous.refuse`."""
        with suppress(RuntimeError):  # without its store the loop's own group is lost too
            # The first reason stays: those that follow are mostly its consequences.
            self._store.compare_set("refused", "", f"rank {self._rank}: {reason}")

    def wait_for_all(self, place: str) -> None:
        """As `Rendezvous.wait_for_all`."""
        try:
            self._wait_for_all(place, collective_timeout().total_seconds())
        except RuntimeError as error:
            raise AttachError(f"the store of the process group is gone: {error}") from error

    def agree(self, proposal: str) -> bool:
        """As `Rendezvous.agree`."""
        if not proposal or self._store.compare_set("proposal", "", proposal).decode() != proposal:
            # Said for those that wait: a veto must not cost them their minute.
            self._decided("no")
            return False
        # Counted rather than gathered: a collective would hang where one rank never calls this.
        if self._store.add("proposing", 1) == self._size:
            return self._decided("yes")
        self._set_within("agreed", min(collective_timeout(), _LOADING).total_seconds())
        return self._decided("no")  # unless another rank has decided otherwise

    def _decided(self, answer: str) -> bool:
        return bool(self._store.compare_set("agreed", "", answer).decode() == "yes")

    def _wait_for_all(self, place: str, seconds: float) -> None:
        if self._store.add(f"at {place}", 1) == self._size:
            self._store.set(place, "all")
        if not self._set_within(place, min(seconds, _NOTICE_SECONDS)):
            _LOG.warning("rank %d waits in attach, which all %d ranks must call", self._rank, self._size)
            if not self._set_within(place, seconds - _NOTICE_SECONDS):
                self.refuse(f"not all {self._size} ranks called attach within {seconds:.0f} s (all must, not one)")
        if self._store.check(["refused"]):
            raise AttachError(self._store.get("refused").decode())

    def _set_within(self, key: str, seconds: float) -> bool:
        """Whether `key` is set within `seconds`, or a rank refuses."""
        deadline, pause = time.monotonic() + seconds, 0.001
        while not (self._store.check([key]) or self._store.check(["refused"])):
            if time.monotonic() >= deadline:
                return False
            time.sleep(pause)  # the store's own wait() would keep torch's threads from it
            pause = min(2 * pause, 0.2)
        return True


def rendezvous_for(model: object) -> Rendezvous:
    """The rendezvous of this process with those that train `model` too, or could hold a part of it."""
    if isinstance(model, nn.Module) and dist.is_available() and dist.is_initialized():
        return StoreRendezvous() if dist.get_world_size() > 1 or is_sharded(model) else SoleProcess()
    return SoleProcess()


def check_initialized() -> None:
    """Raise `AttachError` where the program will train in several processes, but has no process group yet."""
    ranks, rank = os.environ.get("WORLD_SIZE", ""), os.environ.get("RANK", "")
    if dist.is_available() and not dist.is_initialized() and ranks.isdecimal() and rank.isdecimal() and int(ranks) > 1:
        raise AttachError(
            f"WORLD_SIZE={ranks}, but there is no process group yet: call attach after init_process_group; "
            "take RANK and WORLD_SIZE out of the environment where each process trains a model of its own"
        )


def collective_timeout() -> timedelta:
    """The timeout of the loop's own collectives."""
    group = distributed_c10d._get_default_group()  # noqa: SLF001 - torch gives it nowhere else
    # Private to torch and different between backends; a version without it only has the usual timeout.
    with suppress(RuntimeError, AttributeError):
        timeout = group._get_backend(group._device_types[0]).options._timeout  # noqa: SLF001
        if isinstance(timeout, timedelta):
            return timeout
    return _DEFAULT_TIMEOUT


@dataclass(frozen=True, slots=True)
class Channel:
    """The gloo group that ranks talk over, and the arbiter that gives all of them the same answer to a question."""

    group: Any
    arbiter: Arbiter


@dataclass(frozen=True, slots=True)
class AttachMessage:
    """What a rank sends at attach: an `error`, or the options that must be `equal` on all, and its `own` report."""

    error: str = ""
    equal: Mapping[str, object] = field(default_factory=dict)
    own: object = None


def join(mine: AttachMessage) -> tuple[Channel, list[AttachMessage]]:
    """Open a channel between all ranks of the run; the channel, and every rank's message.

    Raises `AttachError` on every rank where one of them failed, has other options, or did not call this within the
    timeout of the loop's own collectives.
    """
    size, wait = dist.get_world_size(), collective_timeout()
    try:
        # gloo also where the loop uses NCCL: the messages are on the host, and must not queue on the device.
        group = dist.new_group(backend="gloo", timeout=wait)
        gathered: list[Any] = [None] * size
        dist.all_gather_object(gathered, (secrets.token_hex(8), mine), group=group)
    except (RuntimeError, ValueError) as error:
        seconds = int(wait.total_seconds())
        raise AttachError(
            f"not all {size} ranks called attach within {seconds} s (all must, not rank 0 alone): {error}"
        ) from error
    # Only here, where all ranks have met and none can still be using a group of an earlier watch.
    _free_idle()
    messages = [each for _, each in gathered]
    try:
        _compare(messages)
    except AttachError:
        retire(group)
        raise
    return Channel(group, _store_arbiter(gathered[0][0])), messages


def _store_arbiter(watch: str) -> Arbiter:
    """An arbiter in the store of the process group, on rank 0's host; it raises `RuntimeError` where that is gone."""
    store = dist.distributed_c10d._get_default_store()  # noqa: SLF001 - torch gives it nowhere else

    def decide(question: str, proposed: str) -> str:
        # compare_set is atomic on the store's host: whoever asks second gets the first one's answer.
        return str(store.compare_set(f"sharpwatch/{watch}/{question}", "", proposed).decode())

    return decide


def _compare(messages: Sequence[AttachMessage]) -> None:
    """Raises `AttachError` where a rank has failed, or has other options."""
    for rank, each in enumerate(messages):
        if each.error:
            raise AttachError(f"rank {rank}: {each.error}")
        for name, value in each.equal.items():
            if value != messages[0].equal[name]:
                raise AttachError(f"{name}: rank 0 has {messages[0].equal[name]!r}, rank {rank} {value!r}")


def retire(group: Any) -> None:
    """Have `group` freed when all ranks have met again, and so have left it."""
    _IDLE.append(group)


def _free_idle() -> None:
    """Free the groups of watches that have ended."""
    while _IDLE:
        with suppress(RuntimeError, ValueError, AssertionError):  # the loop has destroyed all groups itself
            dist.destroy_process_group(_IDLE.pop())
