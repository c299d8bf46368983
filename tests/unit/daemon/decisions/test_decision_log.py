"""The decision log returns every state that a decision had, each once."""

from __future__ import annotations

from sharpwatch.daemon.decisions.decision_log import DecisionLog
from sharpwatch.daemon.records import Decision

DRAFT = Decision("d1", "run", 1.0, 7, "scale_lr", "advise", "draft", policy="p", multipliers={"qk": 0.5})


def test_every_transition_is_returned_though_the_record_holds_the_last_alone():
    log = DecisionLog("run", ("qk",))
    log.add(DRAFT, "propose")
    log.advance(DRAFT, "approve", author="ann", reason="go on")
    log.revise(DRAFT, author="ann", reason="go on", now=2.0)  # a number, and no new outcome
    log.advance(DRAFT, "fail", detail="too late")
    log.advance(DRAFT, "apply")  # final is final
    changes = log.take()
    assert [(made.outcome, made.author, made.detail) for made in changes.transitions] == [
        ("proposed", "", ""),
        ("approved", "ann", ""),
        ("failed", "ann", "too late"),
    ]
    assert [made.outcome for made in changes.decisions] == ["failed"]
    assert log.take().transitions == ()
