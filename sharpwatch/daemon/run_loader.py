"""Brings runs back from the journal: those that are asked for, and at the start those that are live.

The journal has every run for ever; memory has some. Whatever names a run, such as its trainer's Hello, an operator's
call, another run's reference or an alert of another system, gets it from here, with its revisions, decisions,
incidents, mode, reference and plans, and with how far its samples have come.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import structlog
from sqlalchemy import Connection

from sharpwatch.daemon.held_shards import HeldShards
from sharpwatch.daemon.pipeline import Pipeline
from sharpwatch.daemon.runs.restore import REPLAYED_SAMPLES, read_attempt, restore_run
from sharpwatch.daemon.runs.run import Run, Runs
from sharpwatch.daemon.storage import catalog
from sharpwatch.daemon.storage.journal import Store
from sharpwatch.daemon.storage.schema import RequestRow
from sharpwatch.errors import NoRoomError, NotHeldError, StoreError, WireError

log = structlog.get_logger(__name__)

Result = TypeVar("Result")
_TWINS = 16  # ended runs that are brought back at the start for each data order; more add nothing
_FORGOTTEN = "the run was forgotten"
_NAMED = 10_000  # names and ids that one look-up returns


@dataclass(frozen=True, slots=True)
class RunPage:
    """A page of all runs.

    Attributes:
        held: Those in memory.
        others: What the journal has of the others.
        last: Where the next page begins; 0 for none.
    """

    held: list[Run]
    others: tuple[catalog.RunSummary, ...]
    last: int


class RunLoader:
    """Brings runs back from the journal.

    Args:
        runs: The runs that the daemon holds.
        store: The journal.
        pipeline: Writes what the journal does not have yet, and takes up what was read.
        shards: Says which runs are this daemon's; it gets no others.
    """

    def __init__(self, runs: Runs, store: Store, pipeline: Pipeline, shards: HeldShards) -> None:
        self._runs = runs
        self._store = store
        self._pipeline = pipeline
        self._shards = shards
        self._loading: dict[str, asyncio.Task[Run | None]] = {}
        self._looked_for: set[str] = set()  # data orders and training jobs whose runs were looked for

    async def get(self, name: str) -> Run | None:
        """Returns a run, from memory or else from the journal; None where neither has it.

        Raises:
            NoRoomError: As many runs as can be held are live.
            NotHeldError: It is of a shard that another daemon holds.
            StoreError: The journal can't be read, or has what this version can't read.
        """
        run = self._runs.get(name)
        if run is not None or not name:
            return run
        self._shards.check(name)
        # One for all who ask: a run that is loaded twice would be two.
        loading = self._loading.get(name)
        if loading is None:
            loading = self._loading[name] = asyncio.create_task(self._load(name), name=f"load {name}")
            loading.add_done_callback(lambda _: self._loading.pop(name, None))
        return await asyncio.shield(loading)

    def check(self, name: str) -> None:
        """Refuses a run of a shard that this daemon does not hold.

        Raises:
            NotHeldError: It is of such.
        """
        self._shards.check(name)

    async def find_attempt(self, run: str, identity: str) -> None:
        """Has an attempt of a run remembered that the journal has, so that it goes on where its samples have come to.

        Raises:
            StoreError: The journal can't be read.
            WireError: The attempt is of another run.
        """
        if self._runs.owner(identity) is not None:
            return
        found = await self.ask(partial(catalog.attempt, identity=identity))
        if found is None or self._runs.owner(identity) is not None:
            return
        owner, row = found
        if owner != run:
            raise WireError("wrong_run", f"attempt {identity} belongs to run {owner}")
        attempt = read_attempt(row)
        if attempt is None:
            return
        attempt.released = row.seen_at <= await self.ask(partial(catalog.released_at, run=run))
        if self._runs.get(run) is not None:
            self._runs.remember(attempt)

    async def ask(self, question: Callable[[Connection], Result]) -> Result:
        """Returns what the journal answers to a question of `catalog`."""
        return await self._store.ask(question)

    async def size(self, name: str) -> catalog.RunSize | None:
        """Returns how much the journal has of a run; None for nothing.

        Raises:
            NotHeldError: It is of a shard that another daemon holds.
            StoreError: The journal can't be read.
        """
        self._shards.check(name)
        return await self.ask(partial(catalog.size, run=name))

    async def names(self, prefix: str) -> list[str]:
        """Returns the names of all runs that begin with `prefix`, sorted."""
        found = await self._page(prefix, 0, _NAMED)
        held = (run.name for run in self._runs if run.name.startswith(prefix))
        return sorted({*held, *(name for name, _ in found)})

    async def page(self, prefix: str, before: int, limit: int) -> RunPage:
        """Returns runs in the order of their newest attempts, that which began last first.

        Args:
            prefix: How their names begin.
            before: `RunPage.last` of the page before; 0 for the first page.
            limit: How many at most.
        """
        found = await self._page(prefix, before, limit)
        names = dict(found)
        # A new run may not be written yet.
        held = [run for run in self._runs if run.name in names or (not before and self._pipeline.awaits_write(run))]
        others = names.keys() - {run.name for run in held}
        rest = await self.ask(partial(catalog.summaries, runs=others))
        return RunPage(held, rest, min(names.values()) if len(found) == limit else 0)

    async def _page(self, prefix: str, before: int, limit: int) -> list[tuple[str, int]]:
        """As `catalog.page`, of the runs whose shards this daemon holds."""
        at_once = limit * self._shards.own.count
        found: list[tuple[str, int]] = []
        while True:
            rows = await self.ask(partial(catalog.page, prefix=prefix, before=before, limit=at_once))
            found += (row for row in rows if self._shards.holds(row[0]))
            if len(found) >= limit or len(rows) < at_once:
                return found[:limit]
            before = rows[-1][1]

    async def decisions(self, prefix: str) -> list[tuple[str, str]]:
        """Returns the run and the id of each decision whose id begins with `prefix`; only that one if an id equals it.

        Args:
            prefix: The beginning.
        """
        held = [(run.name, made.id) for run in self._runs for made in run.controller.decisions]
        found = await self.ask(partial(catalog.decisions_that_begin, prefix=prefix, limit=_NAMED))
        return _chosen([*(each for each in held if each[1].startswith(prefix)), *found], prefix)

    async def incidents(self, prefix: str) -> list[tuple[str, str]]:
        """As `decisions`, of incidents."""
        held = [(run.name, each.id) for run in self._runs for each in run.controller.incidents]
        found = await self.ask(partial(catalog.incidents_that_begin, prefix=prefix, limit=_NAMED))
        return _chosen([*(each for each in held if each[1].startswith(prefix)), *found], prefix)

    def holds(self, name: str) -> bool:
        """Whether a run is of a shard that this daemon holds."""
        return self._shards.holds(name)

    async def bring_back_live(self, since: float, of: Callable[[str], bool]) -> list[str]:
        """Brings back the live runs, when the daemon begins to hold them; others stay in the journal until asked for.

        Live is a run that was not closed, and was heard of after unix seconds `since` or has an open critical incident
        that nobody has acknowledged.

        Args:
            since: Unix seconds.
            of: Which of the runs that it holds are meant.

        Returns:
            The names of runs to be brought back when there is time: they may be twins of a live one, or were closed
            after `since`.
        """
        outlines = await self.ask(partial(catalog.outlines, of=lambda name: self.holds(name) and of(name)))
        unseen = await self.ask(catalog.with_unseen_incidents)
        known = {each.run: each for each in sorted(outlines, key=lambda one: -one.seen_at)}
        recent = {name for name, one in known.items() if one.seen_at >= since}
        live = [name for name, one in known.items() if not one.closed and (name in recent or name in unseen)]
        await self.bring_back(live)
        twins = {name for run in self._runs for name in await self._may_be_twins(run)}
        later = twins | {name for name in recent if known[name].closed}
        return [name for name in known if name in later and name not in live]

    async def bring_back(self, names: Iterable[str]) -> None:
        """Brings runs back one after the other; one that can't be is logged and counted, and not in the others' way."""
        for name in names:
            try:
                await self.get(name)
            except (NoRoomError, NotHeldError, StoreError) as error:
                log.error("run_not_restored", run=name, reason=str(error))  # noqa: TRY400  the message is the reason
            except Exception:  # an error in one run must not stop the others; counted
                self._pipeline.count_internal_error("restore")
                log.exception("run_not_restored", run=name)

    async def forget(self, request: RequestRow) -> None:
        """Deletes all that there is of an ended run, in memory and in the journal.

        Args:
            request: The operator's request, which names the run and is kept.

        Raises:
            StoreError: The journal fails, and has it still.
        """
        loading = self._loading.get(request.run)
        if loading is not None:
            await asyncio.wait((loading,))
        open_ones = await self.ask(partial(catalog.open_incidents, run=request.run))
        await self._pipeline.forget(request, [replace(each, active=False, closed=_FORGOTTEN) for each in open_ones])

    async def settled(self, holds: Callable[[str], bool]) -> None:
        """Waits until none of some runs is being brought back any more."""
        if loading := [task for name, task in self._loading.items() if holds(name)]:
            await asyncio.wait(loading)

    async def close(self) -> None:
        """Ends what is being brought back."""
        for loading in list(self._loading.values()):
            loading.cancel()
            await asyncio.wait((loading,))

    async def _may_be_twins(self, run: Run) -> tuple[str, ...]:
        """The newest runs whose Hello has the same data order, or training job where it tells no order."""
        hello = run.attempt.hello
        shared = hello.data_order or hello.training_job
        if shared not in self._looked_for:
            self._looked_for.add(shared)
            found = await self.ask(partial(catalog.names_in_hellos, word=shared, limit=_TWINS))
            return tuple(filter(self._shards.holds, found))
        return ()

    async def _load(self, name: str) -> Run | None:
        await self._pipeline.flush(name)
        stored = await self._store.load(name, samples=REPLAYED_SAMPLES)
        if not stored.attempts:
            return None
        # On a thread, as many samples take long to fold; and apart, so that nobody meets a run that is half there.
        apart = self._runs.apart()
        changes = await asyncio.to_thread(restore_run, apart, stored)
        restored = apart.get(name)
        if restored is None:
            # Anew it would begin with revision 0, and its next decision would replace one that is kept.
            raise StoreError(f"run {name}: this version can't read what the journal has of it")
        reference = restored.reference
        # What it is held against comes before it, since coming later it could take its place in memory again. One that
        # is on its way is not awaited: it may be held against this one in turn, and they find each other once both
        # are there.
        if reference is not None and not reference.losses and reference.name not in self._loading:
            await self.bring_back((reference.name,))
        since = self._shards.check(name)  # it may have been handed over meanwhile
        run = self._runs.adopt(apart, name, time.time())
        if run is None:
            raise NoRoomError("the daemon holds as many live runs as it can")
        released_at = await self.ask(partial(catalog.released_at, run=name))
        seen_at = {row.attempt: row.seen_at for row in stored.attempts}
        for attempt in self._runs.attempts(name):
            attempt.released = seen_at[attempt.hello.attempt] <= released_at
        if stored.attempts[-1].seen_at < since.unix and run.phase == "silent":
            run.attempt.presence.await_return(since.monotonic)  # its trainer has noticed the restart
        await self._pipeline.restored(run, changes)
        if self._runs.get(name) is run:
            self._pipeline.take_up(run)
        return run


def _chosen(found: list[tuple[str, str]], given: str) -> list[tuple[str, str]]:
    # A whole id wins, else it could not be named where a longer id begins with it.
    return [one for one in dict.fromkeys(found) if one[1] == given][:1] or list(dict.fromkeys(found))
