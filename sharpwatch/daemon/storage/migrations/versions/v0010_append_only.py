"""What was acknowledged can't be overwritten, by a fault of ours neither; counts of commits; segments of samples."""

from __future__ import annotations

from collections.abc import Iterator

from alembic import op

from sharpwatch.daemon.storage.sqlite_file import APPLICATION_ID

revision = "0010"
down_revision = "0009"

# By table the columns that never change once written. Others may: how far an attempt has come, a decision's state.
_FIXED = {
    "attempts": "id, run, attempt, hello",
    "samples": "id, run, attempt, sequence, step, payload",
    "alerts": "id, run, first_step",
    "decisions": "id, run, made_at",
    "revisions": "run, revision",
    "modes": "id, run, mode, author, reason, made_at",
    "estimates": "id, run, quantity, block, estimator, step, value, stderr, draws, residual, method",
    "transitions": "id, run, decision, at, outcome, detail, author, reason",
    "run_references": "id, run, name, author, reason, made_at",
    "silences": "id, made_at",
    "plans": "id, run, made_at",
    "requests": "id, run, at, action, subject, outcome, detail, author, reason",
}
# Tables from which rows are deleted only with all of their run, while its name is in `forgetting`. Retention deletes
# samples and estimates; checkpoints, baselines and notifications are states, whose earlier ones nobody needs.
_KEPT = ("attempts", "alerts", "decisions", "revisions", "modes", "transitions", "run_references", "plans", "requests")
_ALL_KEPT = (*_KEPT, "silences")
_TABLES = """
CREATE TABLE forgetting (run TEXT NOT NULL PRIMARY KEY);
CREATE TABLE commits (journal TEXT NOT NULL, number BIGINT NOT NULL);
CREATE TABLE segments (
    run TEXT NOT NULL, last_id BIGINT NOT NULL, received_at DOUBLE PRECISION NOT NULL, samples BIGINT NOT NULL,
    bytes BIGINT NOT NULL, PRIMARY KEY (run, last_id));
CREATE INDEX segments_by_time ON segments (received_at)
"""


def upgrade() -> None:
    """Make the tables and the triggers that guard the records."""
    connection = op.get_bind()
    is_sqlite = connection.dialect.name == "sqlite"
    for statement in (*_TABLES.split(";"), *(_of_sqlite() if is_sqlite else _of_postgresql())):
        connection.exec_driver_sql(statement)


def _of_sqlite() -> Iterator[str]:
    def guard(table: str, rule: str, event: str, when: str = "") -> str:
        condition = f" WHEN {when}" if when else ""
        refuse = f"SELECT RAISE(ABORT, 'the journal is append-only: {table}')"
        return f"CREATE TRIGGER {table}_{rule} BEFORE {event} ON {table}{condition} BEGIN {refuse}; END"

    run_of = dict.fromkeys(_KEPT, "OLD.run") | {"silences": "json_extract(OLD.record, '$.run')"}
    for table, columns in _FIXED.items():
        yield guard(table, "fixed", f"UPDATE OF {columns}")
    for table, run in run_of.items():
        yield guard(table, "kept", "DELETE", f"{run} NOT IN (SELECT run FROM forgetting)")  # noqa: S608  names of ours
    yield guard("attempts", "acknowledged", "UPDATE OF acknowledged", "NEW.acknowledged < OLD.acknowledged")
    # The losses of a reference are dropped when another one replaces it.
    yield guard("run_references", "losses", "UPDATE OF losses", "NEW.losses IS NOT NULL")
    yield "INSERT INTO commits VALUES (lower(hex(randomblob(16))), 0)"
    yield f"PRAGMA application_id={APPLICATION_ID}"
    yield "PRAGMA user_version=10"


def _of_postgresql() -> Iterator[str]:
    refuse = (
        "RAISE EXCEPTION USING MESSAGE = 'the journal is append-only: ' || TG_TABLE_NAME, "
        "ERRCODE = 'integrity_constraint_violation'"
    )
    run_of = {"kept": "OLD.run", "silence_kept": "OLD.record::json ->> 'run'"}

    def guard(table: str, rule: str, event: str, function: str = "refuse", when: str = "") -> str:
        each = "STATEMENT" if event == "TRUNCATE" else f"ROW{when}"
        return (
            f"CREATE TRIGGER {table}_{rule} BEFORE {event} ON {table} FOR EACH {each} "
            f"EXECUTE FUNCTION sharpwatch_{function}()"
        )

    yield f"CREATE FUNCTION sharpwatch_refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {refuse}; END $$"
    for name, run in run_of.items():
        yield (
            f"CREATE FUNCTION sharpwatch_{name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "  # noqa: S608  as above
            f"IF ({run}) IN (SELECT run FROM forgetting) THEN RETURN OLD; END IF; {refuse}; END $$"
        )
    for table, columns in _FIXED.items():
        yield guard(table, "fixed", f"UPDATE OF {columns}")
    for table in _ALL_KEPT:
        yield guard(table, "kept", "DELETE", "silence_kept" if table == "silences" else "kept")
        yield guard(table, "truncated", "TRUNCATE")
    rises = " WHEN (NEW.acknowledged < OLD.acknowledged)"
    yield guard("attempts", "acknowledged", "UPDATE OF acknowledged", when=rises)
    yield guard("run_references", "losses", "UPDATE OF losses", when=" WHEN (NEW.losses IS NOT NULL)")
    yield "INSERT INTO commits VALUES (md5(random()::text || clock_timestamp()::text), 0)"
