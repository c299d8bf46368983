"""The gate: no raise is sent before it is let pass, no cut waits, and no answer is used twice or for another raise."""

from __future__ import annotations

from dataclasses import replace

import pytest
from controlled_run import BLOCKS, CUT, GUARD, Trainer, restored, trained

from sharpwatch.daemon.config.settings import ActionConfig, MatchConfig, PolicyConfig
from sharpwatch.daemon.decisions.gate import ASK_AGAIN, Gate
from sharpwatch.daemon.records import Decision, ForeignAlert

RAISE = PolicyConfig(
    "raise", MatchConfig(foreign="Idle"), "enforce", ActionConfig("scale_lr", factor=2.0, ttl_steps=500), GUARD
)
MADE = Decision("d1", "run", 1e9, 100, "ramp_back", "enforce", "draft", "cut", "i1", multipliers={"qk": 1.0})


class Asked:
    """A gate whose questions are kept; `answer` tells it the answer to the newest."""

    def __init__(self) -> None:
        self.questions: list[Decision] = []
        self.gate = Gate(self.questions.append)

    def answer(self, *, passed: bool) -> None:
        self.gate.answer(self.questions[-1].id, "HTTP 204" if passed else "HTTP 403", passed=passed)


@pytest.fixture
def asked():
    return Asked()


def cut(asked: Asked, **changes) -> Trainer:
    """A run whose cut, at step 121, is due to be ramped back."""
    trainer = trained((replace(CUT, **changes),), gate=asked.gate.judge)
    trainer.heat["ffn"] = 1000.0
    trainer.run(3)
    trainer.heat["ffn"] = 0.0
    assert trainer.multipliers["ffn"] == 0.5
    assert asked.questions == []  # a cut never waits
    trainer.run(90)
    return trainer


def newest(trainer: Trainer) -> tuple[str, str, str]:
    made = trainer.controller.decisions[-1]
    return made.action, made.outcome, made.guard


def test_a_stage_of_the_ramp_back_is_sent_once_it_is_let_pass_under_the_id_that_was_asked_about(asked):
    trainer = cut(asked)
    (question,) = asked.questions  # one, though it is due at every step
    assert (question.action, question.multipliers["ffn"]) == ("ramp_back", 1.0)
    assert trainer.multipliers["ffn"] == 0.5
    asked.answer(passed=True)
    assert trainer.multipliers["ffn"] == 0.5  # at a later sample
    trainer.run(2)
    made = trainer.controller.decisions[-1]
    assert (made.id, made.action, made.outcome) == (question.id, "ramp_back", "applied")
    assert made.detail.endswith("ffn back to 1; the gate let it pass: HTTP 204")
    trainer.run(200)
    assert len(asked.questions) == 1
    assert [one.action for one in trainer.controller.decisions].count("ramp_back") == 1


def test_what_is_held_is_shown_and_asked_again(asked):
    trainer = cut(asked)
    asked.answer(passed=False)
    trainer.run(5)
    assert newest(trainer) == ("ramp_back", "refused", "gate: HTTP 403")
    assert trainer.controller.decisions[-1].id == asked.questions[0].id
    trainer.run(int(10 * ASK_AGAIN))  # steps of 0.1 s
    assert len(asked.questions) == 2
    assert newest(trainer) == ("ramp_back", "refused", "gate: HTTP 403")
    asked.answer(passed=True)
    trainer.run(2)
    assert newest(trainer) == ("ramp_back", "applied", "ok")
    assert trainer.multipliers["ffn"] == 1.0


def test_a_no_that_takes_longer_than_it_holds_is_shown_before_it_is_asked_again(asked):
    assert asked.gate.judge(MADE, 50) is None
    late = replace(MADE, id="d2", made_at=MADE.made_at + 2 * ASK_AGAIN)
    asked.answer(passed=False)
    assert asked.gate.judge(late, 50) == replace(late, id="d1", guard="gate: HTTP 403")
    assert len(asked.questions) == 1
    assert asked.gate.judge(replace(late, made_at=late.made_at + ASK_AGAIN), 50) is None
    assert len(asked.questions) == 2


def test_without_an_answer_nothing_is_raised(asked):
    trainer = cut(asked)
    trainer.run(500)
    assert trainer.multipliers["ffn"] == 0.5
    assert len(asked.questions) == 1


def test_trouble_that_comes_before_the_answer_comes_first(asked):
    trainer = cut(asked)
    trainer.heat["ffn"] = 1000.0
    trainer.run(1)
    asked.answer(passed=True)
    trainer.run(20)
    assert "ramp_back" not in {one.action for one in trainer.controller.decisions}
    assert trainer.multipliers["ffn"] < 0.5


@pytest.mark.parametrize("mode", ["observe", "advise"])
def test_only_what_would_be_sent_is_asked_about(asked, mode):
    trainer = cut(asked)
    asked.questions.clear()
    trainer.controller.set_mode(mode)
    asked.gate.answer(trainer.controller.decisions[-1].id, "", passed=True)
    trainer.run(100)
    assert trainer.multipliers["ffn"] == 0.5
    assert asked.questions == []


def test_a_restarted_daemon_asks_once_more_and_sends_once(asked):
    trainer = cut(asked)
    again = Asked()
    trainer.options["gate"] = again.gate.judge
    trainer.controller = restored(trainer)
    trainer.run(5)
    (question,) = again.questions
    again.answer(passed=True)
    asked.answer(passed=True)
    trainer.run(200)
    made = [one for one in trainer.controller.decisions if one.action == "ramp_back"]
    assert [(one.id, one.outcome) for one in made] == [(question.id, "recovered")]


def test_a_policy_that_raises_is_asked_about(asked):
    trainer = trained((RAISE,), gate=asked.gate.judge)
    trainer.controller.foreign_alert("f1", ForeignAlert("Idle", "f", 1.0), "warning", "idle")
    trainer.run(10)
    assert len(asked.questions) == 1
    assert trainer.controller.decisions == ()
    asked.answer(passed=True)
    trainer.run(2)
    assert newest(trainer) == ("scale_lr", "applied", "ok")
    assert trainer.multipliers == dict.fromkeys(BLOCKS, 2.0)


def test_an_operator_is_not_held_up(asked):
    trainer = cut(asked)
    trainer.take(trainer.controller.undo(0, "ann", "", trainer.now))
    trainer.run(2)
    assert trainer.multipliers["ffn"] == 1.0


def test_an_answer_is_for_one_raise_and_for_some_steps(asked):
    gate = asked.gate
    assert gate.judge(MADE, 10) is None
    asked.answer(passed=True)
    other = replace(MADE, id="d2", multipliers={"qk": 2.0})
    assert gate.judge(other, 10) is None
    gate.answer("d1", "late", passed=True)
    assert gate.judge(replace(other, id="d3"), 10) is None
    asked.answer(passed=True)
    assert gate.judge(replace(other, id="d4", step=111), 10) is None  # it is too old
    asked.answer(passed=True)
    assert gate.judge(replace(other, id="d5", step=110), 10) is None  # the run went back
    asked.answer(passed=True)
    passed = gate.judge(replace(other, id="d6", step=120), 10)
    assert (passed.id, passed.guard) == ("d5", "ok")
    assert gate.judge(replace(other, id="d7", step=121), 10) is None  # it was used
    assert [one.id for one in asked.questions] == ["d1", "d2", "d4", "d5", "d7"]


def test_questions_of_runs_that_are_gone_are_forgotten(asked):
    for number in range(100):
        asked.gate.judge(replace(MADE, run=f"run-{number}", made_at=1e9 + 100 * number), 10)
    assert len(asked.gate._asked) == 37
