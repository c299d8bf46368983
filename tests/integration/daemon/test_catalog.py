"""What the journal answers about runs that are not in memory, from a file and from PostgreSQL alike."""

from __future__ import annotations

import math
from contextlib import closing
from functools import partial

import pytest
from observations import incident

from sharpwatch.daemon.records import Decision, ForeignAlert, LrPlan, Revision
from sharpwatch.daemon.storage import catalog
from sharpwatch.daemon.storage.journal import Journal
from sharpwatch.daemon.storage.schema import AttemptRow, ModeRow, PendingWrites, RequestRow, SampleRow

FOREIGN = ForeignAlert("DiskSlow", "f1", 1.0)
INCIDENTS = (
    incident("i1", severity="critical"),
    incident("i2", severity="critical", acknowledged="ann"),
    incident("i3", active=False, closed="calm"),
    incident("i4", name="ForeignAlert", cause="foreign", severity="critical", foreign=FOREIGN),
    incident("x_5", run="Run", active=False, closed="calm"),
)
DECISIONS = (
    Decision("d1", "run", 1.0, 7, "set_lr", "operator", "applied", revision=1),
    Decision("d2", "run", 3.0, 8, "notify", "observe", "observed"),
    Decision("d%3", "Run", 2.0, 8, "notify", "observe", "observed"),
)
PLAN = LrPlan("p1", "run", "mine", "ann", "why", 5.0, {"qk": 2.0}, {"qk": 1.0}, (("qk",),), 10, automatic=False)
RELEASES = (("release", "released", 4.0), ("release", "released", 6.0), ("release", "refused", 8.0), ("ack", "", 9.0))


@pytest.fixture(params=["sqlite", "postgresql"])
def ask(request, tmp_path):
    """Asks a journal of two runs, whose names differ by case alone."""
    url = f"sqlite:///{tmp_path}/journal.db"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgresql").url()
    with closing(Journal(url, retain_samples=100)) as journal:
        attempts = (AttemptRow("run", "a1", b"\0order\xff", 1.0), AttemptRow("Run", "a2", b"else", 2.0))
        newest = AttemptRow("run", "a3", b"order%", 3.0)
        for row in (*attempts, newest):
            journal.write(PendingWrites(attempts={row.attempt: row}))
        records = PendingWrites(
            incidents={each.id: each for each in INCIDENTS},
            decisions={made.id: made for made in DECISIONS},
            revisions={("run", 1): Revision("run", 1, {"qk": 0.5}, "ann", "why", 1.5, "d1")},
            plans={PLAN.id: PLAN},
            modes=[ModeRow("run", mode, "ann", "why", 2.0) for mode in ("observe", "enforce")],
            requests=[RequestRow("run", at, action, "", outcome, "", "ann", "") for action, outcome, at in RELEASES],
        )
        sent = [SampleRow("run", "a3", number, number, b"%d" % number, 50.0, number == 12) for number in range(1, 13)]
        journal.write(records, sent)
        yield lambda question, **given: journal.ask(partial(question, **given))


def test_which_runs_there_are(ask):
    found = [(one.run, one.seen_at, one.closed) for one in ask(catalog.outlines)]
    assert found == [("Run", 2.0, False), ("run", 50.0, True)]
    (newest, last), (_, first) = ask(catalog.page, prefix="", before=0, limit=5)
    assert newest == "run"
    assert ask(catalog.page, prefix="", before=last, limit=5) == (("Run", first),)
    assert ask(catalog.page, prefix="r", before=0, limit=5) == (("run", last),)
    assert [ask(catalog.page, prefix=wild, before=0, limit=5) for wild in ("%", "_", "\0")] == [(), (), ()]
    assert ask(catalog.names_in_hellos, word="order", limit=5) == ("run",)
    assert ask(catalog.names_in_hellos, word="order_", limit=5) == ()
    assert ask(catalog.attempt, identity="a2")[0] == "Run"
    assert ask(catalog.attempt, identity="A2") is None


def test_what_a_list_shows_of_one(ask):
    (shown,) = ask(catalog.summaries, runs=["run", "none"])
    assert (shown.attempt.attempt, shown.attempt.closed, shown.attempts) == ("a3", True, 2)
    assert shown.samples == (b"12", b"11", b"10", b"9", b"8", b"7", b"6", b"5")
    assert (shown.mode.mode, shown.open_incidents) == ("enforce", 3)
    assert ([one.id for one in shown.decisions], [one.revision for one in shown.revisions]) == (["d1", "d2"], [1])
    assert ask(catalog.size, run="run") == catalog.RunSize(attempts=2, samples=12, incidents=4, decisions=2)
    assert ask(catalog.size, run="RUN") is None


def test_incidents_decisions_and_plans(ask):
    assert ask(catalog.with_unseen_incidents) == {"run"}
    assert [one.id for one in ask(catalog.open_incidents, run="run")] == ["i1", "i2", "i4"]
    assert ask(catalog.with_foreign_alert, fingerprint="f1") == ("run",)
    assert ask(catalog.with_foreign_alert, fingerprint="f") == ()
    assert ask(catalog.incidents_that_begin, prefix="x_", limit=5) == (("Run", "x_5"),)
    assert ask(catalog.decisions_that_begin, prefix="d%", limit=5) == (("Run", "d%3"),)
    assert [one.id for one in ask(catalog.newest_decisions, run="", limit=2)] == ["d2", "d%3"]
    assert [one.id for one in ask(catalog.newest_decisions, run="run", limit=5)] == ["d2", "d1"]
    assert [ask(catalog.plans, since=since) for since in (5.0, 5.1)] == [(PLAN,), ()]
    incidents, decisions = ask(catalog.told, ids=["d1", "i3", "gone"])
    assert (incidents, decisions) == ((INCIDENTS[2],), (DECISIONS[0],))


def test_when_a_run_was_last_released(ask):
    assert (ask(catalog.released_at, run="run"), ask(catalog.released_at, run="Run")) == (6.0, -math.inf)
