"""What the journal has not taken yet: records in their newest form, and every transition of a decision."""

from __future__ import annotations

from dataclasses import replace

from sharpwatch.daemon.records import Changes, Decision, Revision, Silence
from sharpwatch.daemon.storage.schema import AttemptRow, PendingWrites

PROPOSED = Decision("d1", "run", 1.0, 7, "notify", "advise", "proposed")


def changed(made: Decision) -> Changes:
    return Changes(decisions=(made,), transitions=(made,))


def test_a_failing_journal_loses_no_transition():
    failed, meanwhile = PendingWrites(), PendingWrites()
    failed.add("run", changed(PROPOSED))
    failed.add("run", changed(replace(PROPOSED, outcome="approved", author="ann", reason="go on")))
    meanwhile.add("run", changed(replace(PROPOSED, outcome="expired")))
    failed.add_newer(meanwhile)
    assert [made.outcome for made in failed.decisions.values()] == ["expired"]
    assert [(row.decision, row.outcome, row.author) for row in failed.transitions] == [
        ("d1", "proposed", ""),
        ("d1", "approved", "ann"),
        ("d1", "expired", ""),
    ]
    times = [row.at for row in failed.transitions]
    assert times == sorted(times)


def test_what_waits_has_a_size():
    waiting = PendingWrites(attempts={"a1": AttemptRow("run", "a1", bytes(8_000_000), 1.0)})
    assert waiting.nbytes == 8_000_000
    waiting.add("run", changed(PROPOSED))
    assert 8_000_000 < waiting.nbytes < 8_010_000


def test_a_failing_journal_loses_no_silence():
    silence = Silence("s1", "ann", "night", 1.0, 9.0, run="run")
    failed = PendingWrites(silences={"s1": silence, "s2": replace(silence, id="s2")})
    failed.add_newer(PendingWrites(silences={"s1": replace(silence, expired_at=2.0)}))
    assert [(each.id, each.expired_at) for each in failed.silences.values()] == [("s1", 2.0), ("s2", 0.0)]


def test_of_each_checkpoint_the_newest_news_is_written():
    failed, meanwhile = PendingWrites(), PendingWrites()
    failed.add("run", Changes(checkpoints={"a": 1, "b": 2, "c": None}))
    failed.add("else", Changes(checkpoints={"a": 9}))
    meanwhile.add("run", Changes(checkpoints={"b": None, "a": 3}))
    failed.add_newer(meanwhile)
    assert list(failed.checkpoints.items()) == [
        (("run", "c"), None),
        (("else", "a"), 9),
        (("run", "b"), None),
        (("run", "a"), 3),
    ]


def test_the_command_of_a_revision_that_is_refused_is_not_sent():
    first, second = (Revision("run", number, {"qk": 0.5}, "ann", "", 1.0, f"d{number}") for number in (1, 2))
    pending = PendingWrites(revisions={("run", 1): first, ("run", 2): second}, commands={"d1": "run", "d2": "run"})
    pending.refuse("run", 1)
    pending.refuse("else", 2)
    assert (pending.revisions, pending.commands) == ({("run", 2): second}, {"d2": "run"})
