"""What the journal has not taken yet: records in their newest form, and every transition of a decision."""

from __future__ import annotations

from dataclasses import replace

from sharpwatch.daemon.decisions.decision_log import Changes
from sharpwatch.daemon.pipeline import PendingWrites
from sharpwatch.daemon.records import Decision

PROPOSED = Decision("d1", "run", 1.0, 7, "notify", "advise", "proposed")


def changed(made: Decision) -> Changes:
    return Changes(decisions=(made,), transitions=(made,))


def test_a_failing_journal_loses_no_transition():
    failed, meanwhile = PendingWrites(), PendingWrites()
    failed.take_up("run", changed(PROPOSED))
    failed.take_up("run", changed(replace(PROPOSED, outcome="approved", author="ann", reason="go on")))
    meanwhile.take_up("run", changed(replace(PROPOSED, outcome="expired")))
    failed.under(meanwhile)
    batch = failed.batch()
    assert [made.outcome for made in batch.decisions] == ["expired"]
    assert [(row.decision, row.outcome, row.author) for row in batch.transitions] == [
        ("d1", "proposed", ""),
        ("d1", "approved", "ann"),
        ("d1", "expired", ""),
    ]
    times = [row.at for row in batch.transitions]
    assert times == sorted(times)
