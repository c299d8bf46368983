"""Keeps the daemon's shards: shows the other daemons that it lives, takes over theirs, and hands shards back.

All of it goes by the database. Each daemon looks there every few seconds. A shard whose daemon has left, or no longer
shows that it lives, is taken by whoever gets its lock first; where it still has the lock, it is slow and not dead, and
keeps it. When a shard's own daemon comes back it asks for the shard, and whoever holds it writes out what it knows and
lets go.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from sharpwatch.common.shards import shard_of
from sharpwatch.daemon.api.agent_service import Sessions
from sharpwatch.daemon.decisions.muting import Silences
from sharpwatch.daemon.held_shards import HeldShards
from sharpwatch.daemon.notifier import Notifier
from sharpwatch.daemon.pipeline import Pipeline
from sharpwatch.daemon.run_loader import RunLoader
from sharpwatch.daemon.runs.run import Runs
from sharpwatch.daemon.storage.journal import Store
from sharpwatch.daemon.storage.schema import NotificationRow
from sharpwatch.daemon.storage.shards import ShardRow
from sharpwatch.errors import ShardLostError, StoreError

log = structlog.get_logger(__name__)

LOOK_SECONDS = 2.0
# Without a beat for so long, a daemon is taken for dead. More than a lost connection needs to be made again
# (`pipeline`), so that after a restart of the database each daemon takes its own shards.
SILENT_SECONDS = 8.0
_RETRY_AFTER_SECONDS = 1.0  # its own daemon has the shard by then


class ShardKeeper:
    """Keeps the shards of one daemon.

    Args:
        shards: The shards that it holds.
        store: The journal, which the daemons share.
        runs: The runs that it holds.
        loader: Brings runs back.
        pipeline: Writes out what is known of runs.
        sessions: The agents' sessions.
        notifier: Tells a webhook of what goes on.
        silences: Those of all daemons.
        restore: Brings back the runs of a shard that was taken over, those for which its argument is true.
    """

    def __init__(  # noqa: PLR0913  the parts that a shard is in
        self,
        *,
        shards: HeldShards,
        store: Store,
        runs: Runs,
        loader: RunLoader,
        pipeline: Pipeline,
        sessions: Sessions,
        notifier: Notifier,
        silences: Silences,
        restore: Callable[[Callable[[str], bool]], Coroutine[Any, Any, None]],
    ) -> None:
        self._shards = shards
        self._store = store
        self._runs = runs
        self._loader = loader
        self._pipeline = pipeline
        self._sessions = sessions
        self._notifier = notifier
        self._silences = silences
        self._restore = restore
        self._seen: dict[int, tuple[ShardRow, float]] = {}  # by shard, how it last changed, and when that was seen
        self._restoring: dict[int, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Looks every few seconds, until it is cancelled.

        Raises:
            ShardLostError: Another daemon has held one of the shards meanwhile: what this one knows is out of date.
        """
        try:
            while True:
                await self._look()
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            for task in self._restoring.values():
                task.cancel()

    async def _look(self) -> None:
        try:
            rows = await self._store.look(self._shards.address)
            self._silences.follow(await self._store.silences())
            self._shards.others_are_at({row.shard: row.address for row in rows if row.address != self._shards.address})
            for row in rows:
                if not self._shards.is_held(row.shard):
                    if self._is_free(row):
                        await self._take_over(row)
                elif row.shard != self._shards.own.index and row.wanted:
                    await self._hand_over(row.shard)
        except ShardLostError:
            raise
        except StoreError as error:  # the pipeline, which writes to the same journal, counts that
            log.warning("shards_not_seen", reason=str(error))
            self._seen.clear()  # the others may have had the same trouble

    def _is_free(self, row: ShardRow) -> bool:
        """Whether a shard's daemon has left, or nobody has shown for long that they hold it."""
        now = time.monotonic()
        last, since = self._seen.get(row.shard, (None, now))
        if row != last:
            since = now
        self._seen[row.shard] = row, since
        # Not at the first look, since daemons are started together, nor while its own daemon is about to take it.
        has_left = last is not None and not (row.holder or row.wanted)
        return has_left or now - since >= SILENT_SECONDS

    async def _take_over(self, row: ShardRow) -> None:
        shard = row.shard
        del self._seen[shard]
        told = [row for row in await self._store.notifications() if self._of(shard)(run_of(row))]
        if not await self._store.take(shard, self._shards.address):
            return
        self._notifier.restore(told, (), ())
        self._shards.add(shard)
        log.warning("shard_taken_over", shard=shard, address=row.address)
        self._restoring[shard] = asyncio.create_task(self._restore(self._of(shard)), name=f"restore shard {shard}")

    async def _hand_over(self, shard: int) -> None:
        of = self._of(shard)
        if shard in self._restoring:
            self._restoring.pop(shard).cancel()
        self._shards.remove(shard)  # from here on no session is opened, and no run brought back
        await self._loader.settled(of)
        self._sessions.drain(f"shard {shard} goes back to its own daemon", _RETRY_AFTER_SECONDS, of)
        try:
            await self._pipeline.let_go([run.name for run in self._runs if of(run.name)])
            await self._notifier.leave(row for row in await self._store.notifications() if of(run_of(row)))
        except StoreError:
            self._shards.add(shard)  # until the next look
            raise
        await self._store.give(shard)
        log.info("shard_handed_over", shard=shard)

    def _of(self, shard: int) -> Callable[[str], bool]:
        count = self._shards.own.count
        return lambda run: shard_of(run, count) == shard


def run_of(row: NotificationRow) -> str:
    """The run that a notification is about."""
    return str(json.loads(row.alert)["labels"].get("run", ""))
