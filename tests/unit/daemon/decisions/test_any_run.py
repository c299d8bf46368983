"""Whatever is observed, asked of a run and answered, the promises hold.

`make test` drives a few sequences, always the same. SEQUENCES=100000 drives as many others, of which one that fails is
kept and tried again first; it takes hours.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace

import numpy as np
from controlled_run import BLOCKS, CUT, GUARD, ROLLBACK, Trainer, restored
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sharpwatch.daemon.config.settings import (
    AutopilotConfig,
    CurvatureShareConfig,
    EscalateConfig,
    MaintenanceConfig,
    MatchConfig,
    StabilityCapConfig,
)
from sharpwatch.daemon.decisions.lr_plan import PlanRequest
from sharpwatch.daemon.decisions.plan_rollout import PlanRollout
from sharpwatch.daemon.decisions.transitions import FINAL, UNDER_WAY
from sharpwatch.daemon.records import Checkpoint, CheckpointReport, Decision, ForeignAlert, Silence
from sharpwatch.errors import OperatorError

SEQUENCES = int(os.environ.get("SEQUENCES", "0"))
HOUR = 3600.0
AUTOPILOT = AutopilotConfig(
    "enforce", CurvatureShareConfig(), StabilityCapConfig(0.3), ramp_steps=0, least_change=1.05, ttl_steps=40
)
# 1e9 seconds, when runs begin, are 01:46 UTC on a Sunday.
NIGHT = MaintenanceConfig("03:00", "05:00")


class AnyRun(RuleBasedStateMachine):
    """Whatever is observed, asked and answered, the promises hold."""

    @initialize(
        mode=st.sampled_from([None, "observe", "advise", "enforce", "enforce"]),
        low=st.sampled_from([0.05, 0.3, 1.0]),
        autopilot=st.sampled_from([False, False, True]),
        maintenance=st.booleans(),
    )
    def begin(self, mode, low, autopilot, maintenance):
        self.bounds = (low, 4.0)
        guard = replace(GUARD, cooldown_steps=1, hold_steps=3, recover_within_steps=4, max_actions_per_hour=50)
        cut = replace(CUT, guard=guard, action=replace(CUT.action, blocks="all"), escalate=EscalateConfig(8, "back"))
        bad = replace(cut, name="bad", match=MatchConfig("WeightJump"), action=replace(cut.action, factor=0.3))
        far = replace(cut, name="far", match=MatchConfig(foreign="DiskFull"), escalate=None)
        hold = replace(cut, name="hold", match=MatchConfig(cause="learning-rate"))
        hold = replace(hold, action=replace(cut.action, factor="auto"))
        self.silences: list[Silence] = []
        self.has_autopilot = autopilot
        self.trainer = Trainer(
            (cut, bad, far, hold, ROLLBACK),
            mode=mode,
            lr_bounds=self.bounds,
            silences=lambda now: [each for each in self.silences if each.is_active(now)],
            maintenance=(NIGHT,) if maintenance else (),
            autopilot=AUTOPILOT if autopilot else AutopilotConfig(),
        )
        self.controller = self.trainer.controller
        if autopilot:
            self.trainer.parts = {"emb": 1.0, "qk": 8.0, "vo": 2.0, "ffn": 4.0, "norm": 0.5}
        self.final: dict[str, Decision] = {}
        self.known: set[str] = set()
        self.trainer.run(25)

    @rule(steps=st.integers(1, 12), heat=st.sampled_from([0.0, 5.0, 1e3, math.inf]), block=st.sampled_from(BLOCKS))
    def train(self, steps, heat, block):
        self.trainer.heat[block] = heat
        self.trainer.run(steps)
        self.trainer.heat[block] = 0.0

    @rule(factor=st.sampled_from([0.1, 0.5, 1.0, 1.0, 1.5, 3.0, 30.0]))
    def change_rate(self, factor):
        self.trainer.rate = 1e-3 * factor

    @rule(ratio=st.sampled_from([0.1, 0.9, 3.0]))
    def change_curvature(self, ratio):
        self.trainer.ratio = ratio

    @rule(loss=st.floats(), norm=st.floats(width=32), times=st.integers(1, 3))
    def observe_anything(self, loss, norm, times):
        for _ in range(times):
            self.trainer.step += 1
            self.trainer.observe(loss, gradient_norm=np.float32(norm), weight_norm=np.float32(norm))

    @rule(seconds=st.sampled_from([-1e6, -HOUR, 2 * HOUR, 1e6]))
    def set_clock(self, seconds):
        self.trainer.clock += seconds

    @rule(
        wanted=st.dictionaries(st.sampled_from((*BLOCKS, "kv")), st.floats(0.01, 8)),
        every=st.dictionaries(st.sampled_from(BLOCKS), st.integers(0, 4)),
        ahead=st.integers(-2, 40),
    )
    def ask(self, wanted, every, ahead):
        at = self.trainer.step + ahead if ahead > 0 else 0
        self.attempt(lambda now: self.controller.set_learning_rates(wanted, 0, at, "ann", "why", now, every))

    @rule(number=st.integers(0, 8))
    def undo(self, number):
        self.attempt(lambda now: self.controller.undo(number, "ann", "", now))

    @rule(
        wanted=st.dictionaries(st.sampled_from(BLOCKS), st.floats(0.2, 4), min_size=1),
        ramp=st.integers(0, 5),
        automatic=st.booleans(),
    )
    def plan(self, wanted, ramp, automatic):
        request = PlanRequest("own", wanted, (), ramp, automatic)
        self.change_plan(lambda rollout, operator: rollout.start(request, {}, operator))

    @precondition(lambda self: bool(self.controller.plans))
    @rule(change=st.sampled_from([PlanRollout.promote, PlanRollout.pause, PlanRollout.abort]))
    def go_on_with_plan(self, change):
        self.change_plan(change)

    @rule(mode=st.sampled_from(["observe", "advise", "enforce"]))
    def set_mode(self, mode):
        self.trainer.take(self.controller.set_mode(mode, "ann", "", self.trainer.now))

    @rule(refuses=st.sampled_from(["", "", "no"]), silent=st.sampled_from([False, False, True]))
    def change_temper(self, refuses, silent):
        self.trainer.refuses, self.trainer.silent = refuses, silent

    @precondition(lambda self: bool(self.trainer.results))
    @rule(back=st.integers(1, 4))
    def repeat_results(self, back):
        before = self.trainer.multipliers.copy()
        for result in self.trainer.results[-back:]:
            self.trainer.take(self.controller.command_result(result, self.trainer.now))
        assert self.trainer.multipliers == before

    @rule(number=st.integers(0, 2), ends=st.booleans())
    def alert_elsewhere(self, number, ends):
        alert = ForeignAlert("DiskFull", f"f{number}", 1e9)
        at = self.trainer.now if ends else None
        self.attempt(lambda _: self.controller.foreign_alert(f"far{number}", alert, "warning", "full", at))

    @rule(policy=st.sampled_from(["", "cut", "hold"]), seconds=st.sampled_from([1.0, 5 * HOUR]))
    def silence(self, policy, seconds):
        now = self.trainer.now
        self.silences.append(Silence(f"s{len(self.silences)}", "ann", "", now, now + seconds, policy=policy))

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

    @precondition(lambda self: any(made.outcome in UNDER_WAY for made in self.controller.decisions))
    @rule()
    def cancel(self):
        made = next(made for made in self.controller.decisions if made.outcome in UNDER_WAY)
        self.attempt(lambda now: self.controller.cancel(made.id, "ann", "why", now))

    @rule()
    def restart(self):
        old, new = self.controller, restored(self.trainer)
        assert (new.decisions, new.revisions, new.multipliers) == (old.decisions, old.revisions, old.multipliers)
        assert [a.id for a in new.incidents if a.active] == [a.id for a in old.incidents if a.active]
        self.controller = self.trainer.controller = new

    @rule(saved=st.dictionaries(st.sampled_from(BLOCKS), st.sampled_from([0.5, 0.9, 1.0])))
    def begin_anew(self, saved):
        """A new attempt; its checkpoint may have multipliers of some time."""
        self.trainer.begin_anew()
        if self.controller.newest_revision:  # else nobody knows whose they are
            self.trainer.multipliers |= {block: max(value, self.bounds[0]) for block, value in saved.items()}
        self.controller = self.trainer.controller
        self.controller.begin_anew()

    def change_plan(self, change) -> None:
        self.attempt(lambda now: self.controller.change_plan(change, "ann", "", now))

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
        trainer.refuses, trainer.silent, trainer.rate, trainer.ratio = "", False, 1e-3, 0.1
        self.silences.clear()
        for number in range(3):
            self.alert_elsewhere(number, ends=True)
        self.set_mode("enforce")
        if self.controller.plans and self.controller.plans[-1].is_active:
            self.change_plan(PlanRollout.abort)
        trainer.clock -= trainer.now - 1e9  # out of any maintenance
        for _ in range(20):
            trainer.run(60)
            free = [trainer.multipliers[block] for block in BLOCKS if block not in self.by_hand()]
            if all(value == 1.0 or (value > 1 and self.has_autopilot) for value in free):
                return
        assert any(incident.active for incident in self.controller.incidents), trainer.multipliers

    def by_hand(self) -> set[str]:
        """The blocks that an operator has moved."""
        operators = {made.id for made in self.controller.decisions if made.mode == "operator"}
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
        assert all(low <= value <= high for value in self.trainer.multipliers.values() if value != 1)
        assert [one.revision for one in revisions] == list(range(1, len(revisions) + 1))
        for made in self.controller.decisions:
            assert self.final.get(made.id, made) == made
            if made.outcome in FINAL:
                self.final[made.id] = made
            if made.id not in self.known and self.controller.own_mode == "observe":
                assert made.mode in ("observe", "operator") or made.is_renewal, made  # nothing is done by itself
            self.known.add(made.id)


AnyRun.TestCase.settings = settings(
    max_examples=SEQUENCES or 25,
    stateful_step_count=30,
    deadline=None,
    derandomize=not SEQUENCES,
    suppress_health_check=list(HealthCheck) if SEQUENCES else (),
)
test_any_run = AnyRun.TestCase
