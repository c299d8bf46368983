"""The tables of the journal as they are now, for the statements on them; `migrations` brings a database to them.

Rows that must come back in the order in which they were written are sorted by `id`, or by `rowid` where the key is a
text: the clock may go back. SQLite has a rowid in each table, in PostgreSQL it is a column like others.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData()
# SQLite numbers rows by itself only where the type is INTEGER; that has 64 bits there, too.
_Whole = BigInteger().with_variant(Integer(), "sqlite")


def _id() -> Column[int]:
    return Column("id", _Whole, primary_key=True)


def _rowid() -> Column[int]:
    return Column("rowid", BigInteger, system=True)


def _text(name: str, *, key: bool = False) -> Column[str]:
    return Column(name, Text, primary_key=key, nullable=False)


def _whole(name: str) -> Column[int]:
    return Column(name, _Whole, nullable=False)


def _real(name: str) -> Column[float]:
    return Column(name, Double, nullable=False)


def _bytes(name: str) -> Column[bytes]:
    return Column(name, LargeBinary, nullable=False)


attempts = Table(
    "attempts",
    metadata,
    _id(),
    _text("run"),
    Column("attempt", Text, nullable=False, unique=True),
    _bytes("hello"),
    Column("acknowledged", _Whole, nullable=False, server_default="0"),
    _real("seen_at"),
    Column("closed", _Whole, nullable=False, server_default="0"),
    Index("attempts_by_run", "run", "id"),
)
samples = Table(
    "samples",
    metadata,
    _id(),
    _text("run"),
    _text("attempt"),
    _whole("sequence"),
    _whole("step"),
    _bytes("payload"),
    UniqueConstraint("attempt", "sequence"),
    Index("samples_by_run", "run", "id"),
)
alerts = Table(
    "alerts",
    metadata,
    _text("id", key=True),
    _text("run"),
    _whole("first_step"),
    _text("record"),
    _rowid(),
    Index("alerts_by_run", "run"),
)
decisions = Table(
    "decisions",
    metadata,
    _text("id", key=True),
    _text("run"),
    _real("made_at"),
    _text("outcome"),
    _text("record"),
    _rowid(),
    Index("decisions_by_run", "run", "made_at"),
)
revisions = Table(
    "revisions",
    metadata,
    _text("run"),
    _whole("revision"),
    _text("record"),
    PrimaryKeyConstraint("run", "revision"),
)
checkpoints = Table(
    "checkpoints",
    metadata,
    _text("run"),
    _whole("step"),
    _text("uri"),
    _rowid(),
    PrimaryKeyConstraint("run", "step", "uri"),
)
modes = Table(
    "modes",
    metadata,
    _id(),
    _text("run"),
    _text("mode"),
    _text("author"),
    _text("reason"),
    _real("made_at"),
)
estimates = Table(
    "estimates",
    metadata,
    _id(),
    _text("run"),
    _text("quantity"),
    _text("block"),
    _text("estimator"),
    _whole("step"),
    Column("value", Double),
    Column("stderr", Double),
    _whole("draws"),
    Column("residual", Double),
    Column("method", Text, nullable=False, server_default=""),
    Index("estimates_by_run", "run", "id"),
)
transitions = Table(
    "transitions",
    metadata,
    _id(),
    _text("run"),
    _text("decision"),
    _real("at"),
    _text("outcome"),
    _text("detail"),
    _text("author"),
    _text("reason"),
    Index("transitions_by_decision", "decision", "id"),
)
baselines = Table(
    "baselines",
    metadata,
    _text("run", key=True),
    _text("attempt"),
    _whole("sequence"),
    _bytes("state"),
)
run_references = Table(
    "run_references",
    metadata,
    _id(),
    _text("run"),
    _text("name"),
    Column("losses", LargeBinary),
    _text("author"),
    _text("reason"),
    _real("made_at"),
    Index("run_references_by_run", "run", "id"),
)
silences = Table("silences", metadata, _text("id", key=True), _real("made_at"), _text("record"), _rowid())
plans = Table(
    "plans",
    metadata,
    _text("id", key=True),
    _text("run"),
    _real("made_at"),
    _text("record"),
    _rowid(),
    Index("plans_by_run", "run"),
)
notifications = Table(
    "notifications", metadata, _text("fingerprint", key=True), _text("alert"), _whole("waits"), _rowid()
)
requests = Table(
    "requests",
    metadata,
    _id(),
    _text("run"),
    _real("at"),
    _text("action"),
    _text("subject"),
    _text("outcome"),
    _text("detail"),
    _text("author"),
    _text("reason"),
    Index("requests_by_run", "run", "at"),
)
# The runs that the present transaction deletes: only from these do the constraints let it delete.
forgetting = Table("forgetting", metadata, _text("run", key=True))
# Which journal this is, and how many commits it has: a row for each shard whose own daemon has written to it.
commits = Table(
    "commits", metadata, _text("journal"), _whole("number"), Column("shard", _Whole, nullable=False, server_default="0")
)
# The shards of a journal on PostgreSQL that several daemons share; none where one daemon has it all. `storage.shards`
# says what the columns mean.
shards = Table(
    "shards",
    metadata,
    Column("shard", _Whole, primary_key=True, autoincrement=False),
    _text("holder"),
    _text("address"),
    _whole("beats"),
    _text("wanted"),
)
# Samples of a run that came one after the other: up to which id, when the newest came, and how many bytes they have.
segments = Table(
    "segments",
    metadata,
    _text("run"),
    Column("last_id", BigInteger, nullable=False),
    _real("received_at"),
    Column("samples", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    PrimaryKeyConstraint("run", "last_id"),
    Index("segments_by_time", "received_at"),
)
