"""The locks by which one daemon has a whole journal on PostgreSQL, or several daemons have a shard of its runs each.

All are advisory locks of the connection that writes: nothing is written without them, and they go with a daemon that
dies. One daemon for all runs has the lock of the schema alone. Daemons of shards share that one, so that their number
can't change while any of them runs, and each has a lock for every shard that it holds: its own, and those of daemons
that died. The table `shards` says who holds which, and where agents reach it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Connection, delete, func, insert, select, update

from sharpwatch.common.shards import Shard
from sharpwatch.daemon.storage.sqlite_file import APPLICATION_ID
from sharpwatch.daemon.storage.tables import commits, shards
from sharpwatch.errors import JournalInUseError, ShardLostError

_LOCK_SECONDS = 2.0  # to wait for the lock of a daemon that was killed or has just ended
_CLAIM_SECONDS = 30.0  # to wait for one's own shard, which another daemon has to hand over
_WANTED_EVERY = 2.0  # seconds; whoever takes a shard forgets that somebody wanted it
_TRY_EVERY = 0.05  # seconds
# By the schema, since one database may have several journals. Earlier versions take the same lock.
_SCHEMA = f"{APPLICATION_ID}, hashtext(current_schema())"
_SHARD = f"hashtextextended(current_schema() || '/' || {{}}, {APPLICATION_ID})"
_of = shards.c


@dataclass(frozen=True, slots=True)
class ShardRow:
    """What the database says of a shard.

    Attributes:
        shard: Its number.
        holder: The process that holds it; empty for none.
        address: Where agents reach that.
        beats: How often it has shown that it lives.
        wanted: The process of its own daemon, which waits for it; empty for none.
    """

    shard: int
    holder: str
    address: str
    beats: int
    wanted: str


class ShardLocks:
    """The locks of one daemon.

    Args:
        name: The journal's, for errors.
        own: The daemon's own shard; `WHOLE` for all runs.

    Attributes:
        held: The shards that it holds; empty where it has all runs by the schema's lock.
    """

    def __init__(self, name: str, own: Shard) -> None:
        self.own = own
        self.held: set[int] = set()
        self._name = name
        self._holder = secrets.token_hex(8)
        self._alone = False

    def enter(self, connection: Connection) -> bool:
        """Takes the schema's lock, for this daemon alone if no other one is there.

        Returns:
            Whether this daemon is alone, and may change the tables.

        Raises:
            JournalInUseError: Another daemon has it, and does not share it.
        """

        def taken() -> bool:
            self._alone = _lock(connection, _SCHEMA)
            return self._alone or (self.own.count > 1 and _lock(connection, _SCHEMA, shared=True))

        if not _within(_LOCK_SECONDS, connection, taken):
            raise JournalInUseError(f"journal {self._name}: another daemon is using it")
        return self._alone

    def claim(self, connection: Connection) -> None:
        """Takes this daemon's own shard, which another daemon may have to hand over first.

        Raises:
            JournalInUseError: The journal has another number of shards, or the shard is not handed over.
        """
        if self.own.count == 1:
            return
        self._agree(connection)
        this, wanted_at = _of.shard == self.own.index, time.monotonic()

        def taken() -> bool:
            nonlocal wanted_at
            if _lock(connection, _SHARD.format(self.own.index)):
                return True
            if time.monotonic() >= wanted_at:
                connection.execute(update(shards).where(this).values(wanted=self._holder))
                wanted_at = time.monotonic() + _WANTED_EVERY
            return False

        if not _within(_CLAIM_SECONDS, connection, taken):
            holder = connection.execute(select(_of.address).where(this)).scalar_one()
            raise JournalInUseError(
                f"journal {self._name}: shard {self.own} is held by {holder}, which has not handed it over; "
                "does another daemon serve the same shard?"
            )
        connection.execute(update(shards).where(this).values(holder=self._holder, wanted=""))
        self.held.add(self.own.index)
        if not connection.execute(select(commits).where(commits.c.shard == self.own.index)).first():
            journal = connection.execute(select(commits.c.journal).limit(1)).scalar_one()
            connection.execute(insert(commits).values(journal=journal, number=0, shard=self.own.index))

    def resume(self, connection: Connection) -> None:
        """Takes all locks again on a new connection, after the last one was lost.

        Raises:
            ShardLostError: Another daemon has held one of the shards meanwhile.
            JournalInUseError: One of the locks is not free.
        """
        if self.own.count == 1:
            self.enter(connection)
            return
        self._resume(connection, _SCHEMA, shared=True)
        for shard in sorted(self.held):
            self._resume(connection, _SHARD.format(shard))
        self._check_holders(connection)

    def look(self, connection: Connection, address: str) -> list[ShardRow]:
        """Shows that this daemon lives, and where; returns what the database says of all shards."""
        mine = update(shards).where(_of.shard.in_(self.held))
        connection.execute(mine.values(address=address, beats=_of.beats + 1))
        rows = connection.execute(select(_of.shard, _of.holder, _of.address, _of.beats, _of.wanted).order_by(_of.shard))
        return [ShardRow(*row) for row in rows]

    def take(self, connection: Connection, shard: int, address: str) -> bool:
        """Takes a shard whose daemon is gone; returns whether it was free."""
        if not _lock(connection, _SHARD.format(shard)):
            return False
        values = {"holder": self._holder, "address": address, "wanted": ""}
        connection.execute(update(shards).where(_of.shard == shard).values(**values))
        return True

    def give(self, connection: Connection, shard: int) -> None:
        """Releases a shard, all of whose records must be written."""
        connection.execute(update(shards).where(_of.shard == shard).values(holder="", address=""))
        connection.exec_driver_sql(f"SELECT pg_advisory_unlock({_SHARD.format(shard)})")

    def _agree(self, connection: Connection) -> None:
        """Has the journal's number of shards be this daemon's, if no other daemon is there; else checks it."""
        count = connection.execute(select(func.count()).select_from(shards)).scalar_one()
        if self._alone:
            if count != self.own.count:
                connection.execute(delete(shards))
                empty = {"holder": "", "address": "", "beats": 0, "wanted": ""}
                connection.execute(insert(shards), [{"shard": shard, **empty} for shard in range(self.own.count)])
            _lock(connection, _SCHEMA, shared=True)
            connection.exec_driver_sql(f"SELECT pg_advisory_unlock({_SCHEMA})")
        elif count != self.own.count:
            raise JournalInUseError(
                f"journal {self._name}: it is shared by daemons of {count} shards, this one is shard {self.own}; "
                "to change the number, stop all of them first"
            )

    def _resume(self, connection: Connection, key: str, *, shared: bool = False) -> None:
        self._check_holders(connection)  # first: the lock of a shard that is lost is another daemon's for long
        if not _within(_LOCK_SECONDS, connection, lambda: _lock(connection, key, shared=shared)):
            raise JournalInUseError(f"journal {self._name}: another daemon is using it")

    def _check_holders(self, connection: Connection) -> None:
        held = select(_of.shard).where(_of.shard.in_(self.held), _of.holder == self._holder)
        lost = self.held - set(connection.execute(held).scalars())
        if lost:
            names = ", ".join(map(str, sorted(lost)))
            raise ShardLostError(f"journal {self._name}: another daemon has held shard {names} meanwhile")


def _lock(connection: Connection, key: str, *, shared: bool = False) -> bool:
    name = "pg_try_advisory_lock_shared" if shared else "pg_try_advisory_lock"
    return bool(connection.exec_driver_sql(f"SELECT {name}({key})").scalar_one())


def _within(seconds: float, connection: Connection, taken: Callable[[], bool]) -> bool:
    """Tries until `taken` or `seconds` have passed, each time in a transaction of its own."""
    # The server may not have noticed yet that the daemon that had it is gone.
    until = time.monotonic() + seconds
    while True:
        found = taken()
        connection.commit()
        if found or time.monotonic() >= until:
            return found
        time.sleep(_TRY_EVERY)
