"""A run under control, without a wire: a trainer by hand, and its controller."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from observations import layer_tap

from sharpwatch.daemon.config.settings import ActionConfig, EscalateConfig, GuardConfig, MatchConfig, PolicyConfig
from sharpwatch.daemon.decisions.run_controller import RunController
from sharpwatch.daemon.records import (
    Changes,
    Checkpoint,
    CheckpointReport,
    Decision,
    Observation,
    ProbedStep,
    ReportedResult,
)

BLOCKS = ("emb", "qk", "vo", "ffn", "norm")
GUARD = GuardConfig(
    min_multiplier=0.1,
    cooldown_steps=10,
    max_actions_per_hour=10,
    hold_steps=60,
    recover_within_steps=10,
    max_no_effect=10,
)
CUT = PolicyConfig(
    "cut", MatchConfig("NonFinite"), "enforce", ActionConfig("scale_lr", "alert", factor=0.5, ttl_steps=500), GUARD
)
ROLLBACK = PolicyConfig("back", action=ActionConfig("rollback"), mode="enforce")
CHAIN = (replace(CUT, escalate=EscalateConfig(30, "back")), ROLLBACK)


class Trainer:
    """A run with its controller: the trainer applies each command at the step after the one it came with.

    A block whose rate is `heat` times what it should be, times its multiplier, shows it: in a gradient that is not
    finite, which is found at once whatever came before; or, if its trouble is to `swell`, in its update RMS, which is
    found once it lasts.
    """

    def __init__(
        self, policies: Iterable[PolicyConfig] = (CUT,), *, swell: bool = False, control: str = "rollback", **options
    ) -> None:
        counter = itertools.count(1)
        self.options = {
            "layer_blocks": [(block, "layers.0") for block in BLOCKS],
            "parameters": np.full(len(BLOCKS), 1000),
            "policies": tuple(policies),
            "control": control,
            "can_roll_back": True,
            **options,
        }
        self.new_id = lambda: f"d{next(counter)}"
        self.controller = RunController("run", new_id=self.new_id, **self.options)
        self.noise = np.random.default_rng(0)
        self.multipliers = dict.fromkeys(BLOCKS, 1.0)
        self.heat = dict.fromkeys(BLOCKS, 0.0)
        self.swell = swell
        self.rate, self.loss = 1e-3, 3.0  # of its schedule; and of its steps
        self.step = 0
        self.waiting: list[Decision] = []
        self.seen: list[Observation] = []
        self.parts: dict[str, float] = {}  # of the curvature at a multiplier of 1, of the probes if there are any
        self.resting: tuple[str, ...] = ()  # blocks without a part
        self.cut_by_hand: tuple[str, ...] = ()  # blocks whose multiplier is no part of a cut of all
        self.ratio = 0.1  # the stability ratio, at multipliers of 1
        self.silent = False
        self.refuses = ""
        self.clock = 0.0  # seconds by which somebody has set the daemon's clock
        self.results: list[ReportedResult] = []  # that the controller was told, oldest first

    def take(self, changes: Changes) -> Changes:
        self.waiting += changes.commands
        return changes

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            waiting, self.waiting = self.waiting, []
            cancelled = {made.id for made in waiting if made.cancelled_by}
            for made in [] if self.silent else waiting:
                if made.cancelled_by:
                    self.tell(ReportedResult(made.id, "cancelled", self.step))
                elif made.id not in cancelled:
                    self.answer(made) if made.apply_at_step <= self.step else self.waiting.append(made)
            self.observe()

    def observe(self, loss: float | None = None, **layers: np.floating) -> None:
        """Have the controller see a step; `layers` are statistics that differ from those of the run as it stands."""
        multipliers = np.array([self.multipliers[block] for block in BLOCKS], np.float32)
        heat = np.maximum(1.0, [self.heat[block] * self.multipliers[block] for block in BLOCKS])
        noise = np.exp(0.1 * self.noise.standard_normal(len(BLOCKS)))
        statistics = {
            "update_rms": noise * (heat if self.swell else 1.0),
            "non_finite": np.int64(0) if self.swell else (heat > 1).astype(np.int64),
            "learning_rate": np.float32(self.rate) * multipliers,
            "lr_multiplier": multipliers,
        }
        seen = Observation(
            self.step,
            self.now,
            loss=self.loss if loss is None else loss,
            layers=layer_tap(len(BLOCKS), **statistics | layers),
            multipliers=dict(self.multipliers),
            probed=self.probe() if self.parts else None,
        )
        self.seen.append(seen)
        self.take(self.controller.observe(seen, self.now))

    def probe(self) -> ProbedStep:
        parts = {block: part * self.multipliers[block] for block, part in self.parts.items()}
        parts = {block: part for block, part in parts.items() if block not in self.resting}
        # The whole curvature goes with the square of a multiplier of all, the descent with it.
        scale = min((value for block, value in self.multipliers.items() if block not in self.cut_by_hand), default=1.0)
        curvature = sum(parts.values()) * scale
        descent = curvature / (2 * self.ratio * scale)
        return ProbedStep(parts, curvature, descent, dict(self.multipliers))

    def answer(self, made: Decision) -> None:
        if self.refuses:
            self.tell(ReportedResult(made.id, "refused", self.step, self.refuses))
            return
        if made.rollback is not None:
            self.step = made.rollback.checkpoint.step + 1
            self.heat = dict.fromkeys(BLOCKS, 0.0)  # the batch that did it is left out
        else:
            self.multipliers = dict.fromkeys(BLOCKS, 1.0) | dict(made.multipliers)
        self.tell(ReportedResult(made.id, "applied", self.step))

    def tell(self, result: ReportedResult) -> None:
        self.results.append(result)
        self.take(self.controller.command_result(result, self.now))

    def begin_anew(self) -> None:
        """A new attempt of the run, from the step it stands at: every multiplier is 1, and no command has come."""
        old, self.controller = self.controller, RunController("run", new_id=self.new_id, **self.options)
        self.controller.take_over(old)
        self.multipliers, self.waiting = dict.fromkeys(BLOCKS, 1.0), []

    @property
    def now(self) -> float:
        return 1e9 + self.clock + len(self.seen) * 0.1

    def actions(self) -> list[tuple[str, str]]:
        return [(made.action, made.outcome) for made in self.controller.decisions]


def trained(*args, steps: int = 120, **options) -> Trainer:
    """A trainer of a run that has gone well so far."""
    trainer = Trainer(*args, **options)
    trainer.run(steps)
    assert trainer.controller.incidents == ()
    return trainer


def restored(trainer: Trainer) -> RunController:
    """What a restarted daemon makes of the journal."""
    old = trainer.controller
    new = RunController("run", new_id=trainer.new_id, **trainer.options)
    new.restore(old.incidents, old.decisions, old.revisions, old.checkpoints, old.own_mode, old.plans)
    for seen in trainer.seen:
        new.replay(seen)
    return new


def saved(trainer: Trainer, *steps: int) -> dict[int, Checkpoint]:
    """Checkpoints that the trainer saves after these steps."""
    made = {step: Checkpoint(step, f"file:{step}") for step in steps}
    trainer.controller.note_checkpoints(CheckpointReport(tuple(made.values())))
    return made
