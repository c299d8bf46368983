"""Whatever is observed, asked of a run and answered, the promises hold."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from controlled_run import BLOCKS, CUT, GUARD, ROLLBACK, Trainer, restored
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sharpwatch.daemon.config.settings import EscalateConfig, MatchConfig
from sharpwatch.daemon.decisions.transitions import FINAL
from sharpwatch.daemon.records import Checkpoint, CheckpointReport, Decision
from sharpwatch.errors import OperatorError


class AnyRun(RuleBasedStateMachine):
    """Whatever is observed, asked and answered, the promises hold."""

    @initialize(mode=st.sampled_from([None, "observe", "advise", "enforce"]), low=st.sampled_from([0.05, 0.3, 1.0]))
    def begin(self, mode, low):
        self.bounds = (low, 4.0)
        guard = replace(GUARD, cooldown_steps=1, hold_steps=3, recover_within_steps=4, max_actions_per_hour=50)
        cut = replace(CUT, guard=guard, action=replace(CUT.action, blocks="all"), escalate=EscalateConfig(8, "back"))
        bad = replace(cut, name="bad", match=MatchConfig("WeightJump"), action=replace(cut.action, factor=0.3))
        hold = replace(cut, name="hold", match=MatchConfig(cause="learning-rate"))
        hold = replace(hold, action=replace(cut.action, factor="auto"))
        self.trainer = Trainer((cut, bad, hold, ROLLBACK), mode=mode, lr_bounds=self.bounds)
        self.controller = self.trainer.controller
        self.final: dict[str, Decision] = {}
        self.trainer.run(60)

    @rule(steps=st.integers(1, 30), heat=st.sampled_from([0.0, 5.0, 1e3, math.inf]), block=st.sampled_from(BLOCKS))
    def train(self, steps, heat, block):
        self.trainer.heat[block] = heat
        self.trainer.run(steps)
        self.trainer.heat[block] = 0.0

    @rule(factor=st.sampled_from([0.1, 0.5, 1.0, 1.0, 1.5, 3.0, 30.0]))
    def change_rate(self, factor):
        self.trainer.rate = 1e-3 * factor

    @rule(loss=st.floats(), norm=st.floats(width=32), times=st.integers(1, 3))
    def observe_anything(self, loss, norm, times):
        for _ in range(times):
            self.trainer.step += 1
            self.trainer.observe(loss, gradient_norm=np.float32(norm), weight_norm=np.float32(norm))

    @rule(wanted=st.dictionaries(st.sampled_from((*BLOCKS, "kv")), st.floats(0.01, 8)), ahead=st.integers(-2, 40))
    def ask(self, wanted, ahead):
        at = self.trainer.step + ahead if ahead > 0 else 0
        self.attempt(lambda now: self.controller.set_learning_rates(wanted, 0, at, "ann", "why", now))

    @rule(number=st.integers(0, 8))
    def undo(self, number):
        self.attempt(lambda now: self.controller.undo(number, "ann", "", now))

    @rule(mode=st.sampled_from(["observe", "advise", "enforce"]))
    def set_mode(self, mode):
        self.controller.set_mode(mode)

    @rule(refuses=st.sampled_from(["", "", "no"]), silent=st.sampled_from([False, False, True]))
    def change_temper(self, refuses, silent):
        self.trainer.refuses, self.trainer.silent = refuses, silent

    @rule()
    def save(self):
        self.controller.note_checkpoints(CheckpointReport((Checkpoint(self.trainer.step, "file"),)))

    @rule()
    def delete(self):
        self.controller.note_checkpoints(CheckpointReport(deleted=("file",)))

    @precondition(lambda self: any(made.outcome == "proposed" for made in self.controller.decisions))
    @rule(yes=st.booleans())
    def judge(self, yes):
        made = next(made for made in self.controller.decisions if made.outcome == "proposed")
        say = self.controller.approve if yes else self.controller.reject
        self.attempt(lambda now: say(made.id, "ann", "why", now))

    @rule()
    def restart(self):
        old, new = self.controller, restored(self.trainer)
        assert (new.decisions, new.revisions, new.multipliers) == (old.decisions, old.revisions, old.multipliers)
        assert [a.id for a in new.incidents if a.active] == [a.id for a in old.incidents if a.active]
        self.controller = self.trainer.controller = new

    def attempt(self, call) -> None:
        try:
            self.trainer.take(call(self.trainer.now))
        except OperatorError:
            return

    def teardown(self):
        """No run stays cut without an open incident or an operator's word: left alone, it comes back to 1."""
        if not hasattr(self, "controller"):
            return
        trainer = self.trainer
        trainer.refuses, trainer.silent, trainer.rate = "", False, 1e-3
        self.controller.set_mode("enforce")
        for _ in range(20):
            trainer.run(60)
            if all(trainer.multipliers[block] == 1.0 for block in BLOCKS if block not in self.by_hand()):
                return
        assert any(incident.active for incident in self.controller.incidents), trainer.multipliers

    def by_hand(self) -> set[str]:
        """The blocks that an operator has moved."""
        operators = {made.id for made in self.controller.decisions if not made.policy}
        moved, before = set(), dict.fromkeys(BLOCKS, 1.0)
        for revision in self.controller.revisions:
            if revision.decision_id in operators:
                moved |= {block for block in BLOCKS if revision.multipliers[block] != before[block]}
            before = revision.multipliers
        return moved

    @invariant()
    def promises_hold(self):
        if not hasattr(self, "controller"):
            return  # before `begin`
        low, high = self.bounds
        revisions = self.controller.revisions
        assert all(low <= value <= high for one in revisions for value in one.multipliers.values())
        assert [one.revision for one in revisions] == list(range(1, len(revisions) + 1))
        for made in self.controller.decisions:
            assert self.final.get(made.id, made) == made
            if made.outcome in FINAL:
                self.final[made.id] = made


AnyRun.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None, derandomize=True)
test_any_run = AnyRun.TestCase
