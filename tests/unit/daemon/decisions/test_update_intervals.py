"""Update intervals: a part of the set that an operator puts in force, which nothing else changes."""

from __future__ import annotations

import pytest
from controlled_run import Trainer, trained

from sharpwatch.daemon.api.conversions import command_message
from sharpwatch.errors import OperatorError


def set_every(trainer: Trainer, every: dict[str, int], multipliers: dict[str, float] | None = None) -> None:
    trainer.take(trainer.controller.set_learning_rates(multipliers or {}, 0, 0, "ann", "", trainer.now, every))


def sent(trainer: Trainer) -> dict[str, int]:
    """What the newest command tells the trainer."""
    return dict(command_message(trainer.controller.decisions[-1]).set_multipliers.update_every)


def test_blocks_that_are_not_named_keep_theirs_and_one_is_every_step():
    trainer = trained()
    set_every(trainer, {"emb": 4, "vo": 2})
    assert sent(trainer) == {"emb": 4, "vo": 2}
    trainer.run(1)
    set_every(trainer, {"vo": 1, "ffn": 3}, {"qk": 0.5})
    assert sent(trainer) == {"emb": 4, "ffn": 3}
    trainer.run(1)
    assert trainer.multipliers["qk"] == 0.5
    assert [dict(one.update_every) for one in trainer.controller.revisions] == [
        {"emb": 4, "vo": 2},
        {"emb": 4, "ffn": 3},
    ]


def test_undo_puts_them_back():
    trainer = trained()
    set_every(trainer, {"emb": 4})
    trainer.run(1)
    set_every(trainer, {"emb": 2})
    trainer.run(1)
    trainer.take(trainer.controller.undo(0, "ann", "", trainer.now))
    assert sent(trainer) == {"emb": 4}
    trainer.run(1)
    trainer.take(trainer.controller.undo(1, "ann", "", trainer.now))
    assert sent(trainer) == {}


def test_what_a_policy_does_leaves_them_as_they_are():
    trainer = trained()
    set_every(trainer, {"emb": 4})
    trainer.run(1)
    trainer.heat["ffn"] = 20.0
    trainer.run(2)
    cut = next(made for made in trainer.controller.decisions if made.policy)
    assert (cut.multipliers["ffn"], cut.update_every) == (0.5, {"emb": 4})
    trainer.heat["ffn"] = 0.0
    trainer.run(300)
    assert trainer.multipliers["ffn"] == 1.0
    assert sent(trainer) == {"emb": 4}


def test_a_new_attempt_is_given_them():
    trainer = trained()
    set_every(trainer, {"emb": 4})
    trainer.run(1)
    trainer.controller.begin_anew()
    trainer.run(2)
    assert (trainer.controller.decisions[-1].author, sent(trainer)) == ("sharpwatch", {"emb": 4})


def test_what_can_not_be_is_refused():
    trainer = trained()
    for every, why in (
        ({"attention": 2}, "no block 'attention'"),
        ({"emb": 0}, "emb every 0 steps; allowed: 1 to 1000"),
        ({"emb": 1001}, "emb every 1001 steps"),
    ):
        with pytest.raises(OperatorError, match=why):
            set_every(trainer, every)
    with pytest.raises(OperatorError, match="takes no update intervals: it has an older sharpwatch, or"):
        set_every(trained(takes_intervals=False), {"emb": 2})
    with pytest.raises(OperatorError, match='control="none"'):
        set_every(trained(control="none"), {"emb": 2})
    with pytest.raises(OperatorError, match="no block is named"):
        set_every(trainer, {})


def test_they_end_no_ramp_and_leave_a_ramp_back_guarded():
    trainer = trained()
    trainer.heat["ffn"] = 20.0
    trainer.run(2)
    trainer.heat["ffn"] = 0.0
    trainer.run(70)
    set_every(trainer, {"emb": 4})
    stage, own = trainer.controller.decisions[-2:]
    assert stage.action == "ramp_back"
    assert own.ramp_steps == stage.applied_step + stage.ramp_steps - trainer.step > 0
    trainer.run(2)
    trainer.heat["ffn"] = 20.0
    trainer.run(3)
    assert next(made for made in trainer.controller.decisions if made.id == stage.id).outcome == "worse"
    newest = trainer.controller.revisions[-1]
    assert (trainer.multipliers["ffn"], newest.update_every) == (0.5, {"emb": 4})
