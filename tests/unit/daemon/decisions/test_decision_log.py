"""A ledger tells every form that a decision took, and each once."""

from __future__ import annotations

from sharpwatch.daemon.decisions.decision_log import DecisionLog
from sharpwatch.daemon.records import Decision

PROPOSED = Decision("d1", "run", 1.0, 7, "scale_lr", "advise", "proposed", policy="p", multipliers={"qk": 0.5})


def test_every_transition_is_told_though_the_record_holds_the_last_alone():
    ledger = DecisionLog("run", ("qk",))
    ledger.add(PROPOSED)
    ledger.update(PROPOSED, outcome="approved", author="ann", reason="go on")
    ledger.revise(PROPOSED, author="ann", reason="go on", now=2.0)  # a number, and no new outcome
    ledger.update(PROPOSED, outcome="failed", detail="too late")
    ledger.update(PROPOSED, outcome="applied")  # final is final
    changes = ledger.take()
    assert [(made.outcome, made.author, made.detail) for made in changes.transitions] == [
        ("proposed", "", ""),
        ("approved", "ann", ""),
        ("failed", "ann", "too late"),
    ]
    assert [made.outcome for made in changes.decisions] == ["failed"]
    assert ledger.take().transitions == ()
