"""The signals of a run: what each step's observation says against what the run did before.

They are made of observations alone, so that a replay gives the same. A trainer may report any number, and NaN is what
was not measured: callers ignore floating-point errors, once for a whole sample.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.daemon.detection.attention import AttentionScores, AttentionTrend
from sharpwatch.daemon.detection.baselines import Highest, Level, Trend
from sharpwatch.daemon.detection.sharpness import Sharpness
from sharpwatch.daemon.detection.state import Arrays, gathered, put_back
from sharpwatch.daemon.records import LayerTap, Observation, OptimizerGroup
from sharpwatch.wire import Doubles, Floats, Ints

SPANS = (3, 5, 10, 20, 40)  # samples whose mean is judged
ROW = {span: row for row, span in enumerate((1, *SPANS))}  # of scores, by number of samples
EXCURSION = 6.0  # z of a single value that is counted
SETTLE = 20  # samples after a known change of the rates in which norms of gradients and updates find a new level
RISE_ENDED = 20  # samples without a higher rate after which a rise is over
ACCEPTED = 500  # samples that a rate above the highest stands until it is the run's own
_RATE_STEP = 0.1  # change of the log of a rate within a step that gradients answer to
# A rate this far above the highest that it has held. Restarts of a schedule come a little above a peak that the end of
# the warm-up has cut off: by a sixth, where that took a quarter of the first cycle.
RATE_NOTABLE = 1.2
_NEARLY_ENDED = 0.1  # share of the highest rate
_BY_HALF = 0.5  # of a fall from which on it may be a part of a fault that ends
_ABOUT = 1.5  # times what a rate would be, up to which it has come back to it
WARM_UP = 0.5  # of a z while rates rise for the first time
# Smallest spreads taken for real: of the logs of norms, and of the loss as a share of itself.
_NORM_FLOOR, _LOSS_FLOOR = 0.05, 0.003
_LARGEST_LOSS = 1e30
_LOOKED_AT = 2.0  # z of a loss from which on its scatter is asked for
_FEW = 4  # layer blocks below which their median says nothing of what they have in common
_GROWTH_SPAN, _GROWTH_EVERY = 20, 5  # samples
_GROWTH_BLIND = 150  # samples at the start, and after a change of the rates, in which weights may grow as they like
FIRST_STEPS = 10  # of a run, in which Adam's updates do not depend on the size of gradients yet
_STARTED = 1e-3  # root mean square of weights below which they are about zero: biases, adapters that begin with nothing
_WEIGHT_FLOOR = 0.01  # smallest spread taken for real of a norm's change, as a share of the most that a step can do
_WEIGHT_PATIENCE = 5  # changes in a row that are far from the usual: then it is no event but how the weights grow now
_LEAST_RATIO = 0.05  # stability ratios below it, also negative ones, are all alike: no danger
_NEWEST_PROBES = 3
_ROUNDING = 4e-7  # of the logarithm of a norm in single precision


_LAYER_FIELDS = tuple(each.name for each in fields(LayerTap))


_NOTHING: Doubles = np.empty(0)
_nothing = _NOTHING.view


@dataclass(slots=True)
class Scores:
    """One observation, and how its signals stand: z in robust standard deviations, [L] by layer block, NaN if unknown.

    Attributes:
        observation: What was observed.
        groups_before: The optimizer's parameter groups as they were; empty before the first are known.
        groups_at: The step at which they were so.
        loss: By number of samples, from 1 (`ROW`): of the mean loss, from its trend.
        update: The same [rows, L] of the log of the update RMS, less the median over layer blocks.
        gradient: The same of the log of the gradient norm.
        common_gradient: Of the median over layer blocks of the log gradient norms, of this sample alone.
        far: Whether a single value stands out [2 L + 2]: of updates, gradients, what they have in common, and the loss.
        young_loss: Of the newest three losses above all of the 30 before; NaN in a run that is no longer young.
        weight: Of the change of the log weight norm in one step, in units of the most that the step can do.
        weight_change: That change itself.
        taken_back: Whether that change has undone more than half of the one before.
        weight_share: The change over the most that a step of Adam's can do; NaN for other optimizers.
        growth: The change of the log weight norm over the last 20 samples, and over the 20 before them [2, L], each
            without its largest step; empty in most samples.
        rate: The learning rate over the highest that it has held since its first rise ended; NaN before.
        excess: How many times what its schedule had the rate is, where that was ever worth a warning; else 1.
        climb: The number of samples in a row in which it has been above that, and higher than in the sample before.
        moment: Adam's second moment over the least that it can be, given the one before.
        dead: Whether a gradient that was there before is exactly zero.
        more_zeros: Whether more parameters have a gradient of exactly zero than ever before; empty where none has.
        first_change: The part of itself that a step of Adam's changes a layer block by; empty after the first steps.
        settling: Whether the rates have just changed.
        young: Whether the run bends so much yet that lines miss.
        warming_up: Whether the rates rise for the first time: then norms and losses go their own ways, and z is halved.
        stability: Of the log of the directional stability ratio, less its standard error; NaN where not probed.
        block_stability: The same by block type, where it could be measured.
        sharpness: Of the log trace of each layer block, then of each block type [L + B]; empty where not probed.
        attention: Of the scales of attention logits; None without a probe.
    """

    observation: Observation
    groups_before: Mapping[tuple[int, int], OptimizerGroup]
    groups_at: int
    loss: Doubles = field(default_factory=_nothing)
    update: Doubles = field(default_factory=_nothing)
    gradient: Doubles = field(default_factory=_nothing)
    common_gradient: float = math.nan
    far: npt.NDArray[Any] = field(default_factory=_nothing)
    young_loss: float = math.nan
    weight: Doubles = field(default_factory=_nothing)
    weight_change: Doubles = field(default_factory=_nothing)
    taken_back: npt.NDArray[Any] = field(default_factory=_nothing)
    weight_share: Doubles = field(default_factory=_nothing)
    growth: Doubles = field(default_factory=_nothing)
    rate: Doubles = field(default_factory=_nothing)
    excess: Doubles = field(default_factory=_nothing)
    climb: npt.NDArray[Any] = field(default_factory=_nothing)
    moment: Doubles = field(default_factory=_nothing)
    dead: npt.NDArray[Any] = field(default_factory=_nothing)
    more_zeros: npt.NDArray[Any] = field(default_factory=_nothing)
    first_change: Doubles = field(default_factory=_nothing)
    settling: bool = False
    young: bool = False
    warming_up: bool = False
    stability: float = math.nan
    block_stability: Mapping[str, float] = field(default_factory=dict)
    sharpness: Doubles = field(default_factory=_nothing)
    attention: AttentionScores | None = None


class Stability:
    """The stability ratios of a run's probes, of the whole model and of its block types.

    Average sharpness and its ratio have no threshold that suits every run: what counts is a run's own level.

    Args:
        blocks: The block types.
    """

    _BLIND = 10  # probes

    def __init__(self, blocks: Sequence[str]) -> None:
        self._blocks = tuple(blocks)
        # With this floor a z of 4.5 is a factor of 3 at least; healthy ratios scatter by half as much again.
        self._floor = 0.25
        self.levels = Level(len(blocks) + 1, memory=50, spread_memory=50, blind=self._BLIND)

    def see(self, seen: Observation, *, keep_out: bool) -> tuple[float, dict[str, float]]:
        """Take in a probe; returns the z of the model's ratio, and those of the block types that have one."""
        ratios = [seen.stability, *map(seen.block_stability.get, self._blocks)]
        logs = np.array([math.nan if ratio is None else math.log(_surely(ratio)) for ratio in ratios])
        whole, *blocks = self.levels.see(logs, self._floor, keep_out=keep_out)
        return float(whole), {b: float(z) for b, z in zip(self._blocks, blocks, strict=True) if not math.isnan(z)}


def _surely(ratio: Estimate) -> float:
    """What a ratio is at least, by one standard error where that is known; small and negative ones are alike."""
    return max(_LEAST_RATIO, ratio.value - ratio.stderr if math.isfinite(ratio.stderr) else ratio.value)


class Rates:
    """The highest learning rate of each layer block, and how far a rate is above what its schedule would have.

    A rate rises first, by a warm-up or not at all. Only what rises after that is news.

    Args:
        columns: Number of layer blocks.
    """

    STATE = (
        "_highest",
        "_since",
        "_risen",
        "_above",
        "_accepts",
        "_before",
        "_had",
        "_top",
        "climb",
        "excess",
        "raised",
    )

    def __init__(self, columns: int) -> None:
        self._nothing = np.zeros(columns, dtype=np.int64)
        self._ones = np.ones(columns)
        self.climb = self._nothing  # samples in a row that were above it and the one before
        self.excess = self._ones  # how many times what it would be by its schedule a rate is
        self.raised = np.zeros(columns, dtype=bool)  # whether that was ever worth a warning
        self._had = np.zeros(columns)  # what it would be, had no fall by half or more been its schedule's
        self._top = np.zeros(columns)  # the highest since it is above that
        self._before = np.zeros(columns)
        self._highest = np.zeros(columns)
        self._since = np.zeros(columns, dtype=np.int64)  # samples since it was reached
        self._risen = np.zeros(columns, dtype=bool)
        self._above = np.zeros(columns, dtype=np.int64)  # samples in a row that the run has trained at too high a rate
        self._accepts = False  # whether the next rates are no news, however high

    def begin_attempt(self) -> None:
        """Take the next rates as they are, but for those that were too high and still are."""
        self._accepts = True

    def go_back(self) -> None:
        """The next rates are of steps that come again."""
        self.climb = self._nothing

    def see(self, rates: Doubles, multipliers: Floats) -> Doubles:
        """Take in the schedule's own rates [L] and what they are multiplied by.

        Returns:
            The rates over the highest, NaN before the first rise has ended.
        """
        if self._accepts:
            same = self.raised & (np.abs(rates / self._before - 1) < _RATE_STEP)
            self._highest = np.where(same, self._highest, np.fmax(self._highest, rates))
            self.excess, self.raised, self._accepts = np.where(same, self.excess, 1.0), same, False
        ratio: Doubles = rates / self._highest
        rises = rates > self._highest * (1 + 1e-6)
        rising = np.count_nonzero(rises)
        if rising or self.excess is not self._ones:
            self._note_excess(rates, rises)
        if np.count_nonzero(self._risen) == len(rates) and not rising and self.excess is self._ones:
            self._above[:] = 0
            self.climb, self._before = self._nothing, np.where(np.isfinite(rates), rates, self._before)
            return ratio
        ratio[~self._risen] = np.nan
        # A rate that is held down does not become the run's own.
        is_high = self._risen & (rises | (self.excess > 1.0))
        self._above = np.where(is_high & (multipliers >= 1), self._above + 1, 0)
        self.climb = np.where(self._risen & rises & (rates > self._before), self.climb + 1, 0)
        self._before = np.where(np.isfinite(rates), rates, self._before)
        accepted = self._above > ACCEPTED
        self._since = np.where(rises & ~self._risen, 0, self._since + 1)
        self._highest = np.where(rises & (~self._risen | accepted), rates, self._highest)
        self._risen |= (self._since >= RISE_ENDED) & (self._highest > 0)
        if np.count_nonzero(accepted):
            self.excess = np.where(accepted, 1.0, self.excess)
            self.raised &= ~accepted
        return ratio

    def _note_excess(self, rates: Doubles, rises: npt.NDArray[Any]) -> None:
        """Follow how far the rates are above what their schedule would have.

        It begins as a rate rises above all that it has held, and grows as it rises above all since. It ends as a rate
        falls at once to about what it would be. All else is its schedule: what falls little by little, or to something
        else, or comes back up to where it was.
        """
        begins = self._risen & rises & (self.excess == 1.0)
        # Of a schedule that had nearly ended nobody knows what comes next; the highest at least was no harm.
        had = np.where(self._before > _NEARLY_ENDED * self._highest, self._before, self._highest)
        self._had, self._top = np.where(begins, had, self._had), np.where(begins, had, self._top)
        goes_on = begins | (self.excess > 1.0)
        climbs = goes_on & (rates > self._top)
        excess = np.where(climbs, self.excess * rates / np.maximum(self._before, self._top), self.excess)
        excess = np.where(begins, rates / had, excess)
        changed = rates / self._before
        falls = goes_on & (changed < 1 - _RATE_STEP)
        little = goes_on & ~climbs & np.isfinite(changed) & (changed > _BY_HALF)
        self._had = np.where(little, self._had * changed, self._had)
        self._top = np.fmax(self._top, rates)
        self.raised |= (excess > 1.0) & (rates > RATE_NOTABLE * self._highest)
        ends = falls & (_is_about(rates, self._had) | _is_about(rates, self._before / excess))
        ends |= ~self.raised & (rates <= self._highest)
        excess = np.where(ends, 1.0, excess)
        self.raised &= excess > 1.0
        self.excess = excess if np.count_nonzero(excess > 1.0) else self._ones


def _is_about(rates: Doubles, others: Doubles) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = (rates < others * _ABOUT) & (rates * _ABOUT > others)
    return found


class Zeros:
    """How many parameters of each layer block have had a gradient of exactly zero at most.

    Experts that no token comes to have one now and then, and adapters at the start. What comes and goes within two
    samples is how the run is, and so is what stands for `ACCEPTED`.

    Args:
        columns: Number of layer blocks.
    """

    STATE = ("_most", "_last", "_above", "_samples")
    _BLIND = 50  # samples
    _LASTING = 3  # samples in a row from which on it is no chance

    def __init__(self, columns: int) -> None:
        self._nothing = np.zeros(columns, dtype=np.int64)
        self._most = self._nothing
        self._last = self._nothing  # of the sample before
        self._above = self._nothing  # samples in a row that were above the most
        self._samples = 0

    def see(self, counts: Ints) -> npt.NDArray[Any]:
        """Take in the counts [L], empty for none; returns whether they are more than ever before, empty for nowhere."""
        self._samples += 1
        if not counts.size:
            if not np.count_nonzero(self._last):
                return _NOTHING
            counts = self._nothing
        counts = counts.astype(np.int64)  # what is kept is no view of a message, and of the state's type
        ended = (counts <= self._most) & (self._above > 0) & (self._above < self._LASTING)
        self._most = np.where(ended, np.maximum(self._most, self._last), self._most)
        above = counts > self._most
        self._above = np.where(above, self._above + 1, 0)
        accepted = above & ((self._samples <= self._BLIND) | (self._above > ACCEPTED))
        self._most = np.where(accepted, counts, self._most)
        self._last = counts
        return above & ~accepted


class Signals:
    """The baselines of one run of L layer blocks, and its last scores.

    Args:
        parameters: The number [L] of parameters of each layer block.
        types: The block type of each.
    """

    # Beside those of what it is made of.
    STATE = ("_before_step", "_norms", "_row", "_samples", "_was_alive", "_stepped", "_settling")

    def __init__(self, parameters: npt.NDArray[Any], types: Sequence[str]) -> None:
        columns = len(parameters)
        self._types = tuple(types)
        self._roots = np.sqrt(np.asarray(parameters, dtype=np.float64))
        self.recent: deque[Scores] = deque(maxlen=5)  # newest last
        self.probes: deque[Scores] = deque(maxlen=_NEWEST_PROBES)  # those with a stability ratio
        self.sharp_probes: deque[Scores] = deque(maxlen=_NEWEST_PROBES)  # those with a trace
        self.sharpness = Sharpness(parameters, types)
        self._stability = Stability(self.sharpness.blocks)
        self._attention = AttentionTrend(columns)
        # Update RMS and gradient norm of each layer block, what gradients have in common, and the loss.
        floors, shares = np.full(2 * columns + 2, _NORM_FLOOR), np.zeros(2 * columns + 2)
        floors[-1], shares[-1] = 0.0, _LOSS_FLOOR
        self._trend = Trend(floors, shares, SPANS, alike=(slice(0, columns), slice(columns, 2 * columns)))
        self._young_loss = Highest(_LOSS_FLOOR)
        self._weights = Level(columns, memory=10, spread_memory=30, blind=30, patience=_WEIGHT_PATIENCE)
        self.rates = Rates(columns)
        self._zeros = Zeros(columns)
        self._norms, self._row = np.full((2 * _GROWTH_SPAN + 1, columns), np.nan), 0  # of the weights, as a ring
        self._samples = 0
        self._columns = columns
        self._before: LayerTap | None = None
        self._before_step = -1
        self._nowhere = np.zeros(columns, dtype=bool)
        self._was_alive = np.zeros(columns, dtype=bool)
        self._stepped = np.ones(columns, dtype=bool)  # layer blocks that had a rate in the step before
        self._settling = 0
        self.groups: Mapping[tuple[int, int], OptimizerGroup] = {}
        self._groups_at = 0

    def see(self, seen: Observation, *, keep_out: bool = False, settle: bool = True) -> Scores:
        """Score an observation against what came before it, then take it in.

        Args:
            seen: The observation.
            keep_out: Whether it may not become normal, because something is known to be wrong.
            settle: Whether baselines begin anew after a change of the rates. While an incident is open they do not, or
                a cut that does not cure it would hide it.
        """
        if self.recent and seen.step <= self.recent[-1].observation.step:
            self._go_back()
        if seen.restored:
            self._attention.leave()
        scores = Scores(seen, self.groups, self._groups_at)
        if seen.optimizer_groups:
            self.groups, self._groups_at = seen.optimizer_groups, seen.step
        if seen.layers is not None:
            self._see_layers(scores, seen.layers)
            self._before, self._before_step = seen.layers, seen.step
        elif seen.restored:
            self._before = None
        self._see_trend(scores, keep_out=keep_out, settle=settle)
        self._see_probes(scores, keep_out=keep_out)
        self.recent.append(scores)
        return scores

    def state(self) -> Arrays:
        """All that `load_state` needs to go on; but the newest scores, which the next five samples renew."""
        before = {} if self._before is None else gathered(self._before, _LAYER_FIELDS, "before")
        groups = json.dumps([[*key, dict(group.settings), group.steps] for key, group in self.groups.items()])
        return {
            **gathered(self, self.STATE, "signals"),
            **gathered(self.rates, Rates.STATE, "rates"),
            **gathered(self._zeros, Zeros.STATE, "zeros"),
            **self._weights.state("weights"),
            **self._stability.levels.state("stability"),
            **self._attention.state(),
            **self._trend.state(),
            **gathered(self._young_loss, Highest.STATE, "young-loss"),
            **self.sharpness.state(),
            **before,
            "groups": np.array(groups),
            "groups_at": np.array(self._groups_at),
        }

    def load_state(self, arrays: Arrays) -> None:
        """Go on from `state`; raises `ValueError` for one of other layer blocks."""
        put_back(self, self.STATE, arrays, "signals")
        put_back(self.rates, Rates.STATE, arrays, "rates")
        put_back(self._zeros, Zeros.STATE, arrays, "zeros")
        self._weights.load_state(arrays, "weights")
        self._stability.levels.load_state(arrays, "stability")
        self._attention.load_state(arrays)
        self._trend.load_state(arrays)
        put_back(self._young_loss, Highest.STATE, arrays, "young-loss")
        self.sharpness.load_state(arrays)
        before: dict[str, Any] = {name: arrays[key] for name in _LAYER_FIELDS if (key := f"before.{name}") in arrays}
        self._before = LayerTap(**before | {"clip_factor": float(before["clip_factor"])}) if before else None
        self.groups = {
            (optimizer, group): OptimizerGroup(settings, steps)
            for optimizer, group, settings, steps in json.loads(str(arrays["groups"]))
        }
        self._groups_at = int(arrays.get("groups_at", np.array(0)))  # a state of an earlier version has none

    def stability_excess(self) -> float:
        """The median stability ratio of the newest three probes over its usual level; NaN where one is not known."""
        ratios = [each.observation.stability for each in self.probes if each.observation.stability is not None]
        if len(ratios) < _NEWEST_PROBES:
            return math.nan
        return float(np.median([ratio.value for ratio in ratios]) / math.exp(float(self._stability.levels.level[0])))

    def begin_attempt(self) -> None:
        """Another attempt of the run begins: with what settings and rates was somebody's choice."""
        # The steps that its optimizer has seen are no choice: they show a state that was not loaded.
        self.groups = {key: OptimizerGroup({}, group.steps) for key, group in self.groups.items()}
        self.rates.begin_attempt()
        self._attention.leave()

    def _go_back(self) -> None:
        """A rollback: what was last seen belongs to a timeline that was left; the levels before it stand."""
        self.recent.clear()
        self.probes.clear()
        self.sharp_probes.clear()
        self._samples = 0
        self._before = None
        self._settling = SETTLE
        self.rates.go_back()
        self._attention.leave()

    def _see_layers(self, scores: Scores, now: LayerTap) -> None:
        seen = scores.observation
        # Of two samples further apart nobody knows what a single step has done.
        before = self._before if self._before_step == seen.step - 1 and not seen.restored else None
        self._note_rates(now)
        if self._settling == SETTLE:
            self._weights.forget(np.ones(self._columns, dtype=bool))
        scores.settling = self._settling > 0
        own = np.divide(now.learning_rate, now.lr_multiplier, dtype=np.float64)
        scores.rate = self.rates.see(own, now.lr_multiplier)
        scores.climb, scores.excess = self.rates.climb, np.where(self.rates.raised, self.rates.excess, 1.0)
        scores.warming_up = np.count_nonzero(np.isnan(scores.rate)) == self._columns
        if before is None:
            nothing = np.full(self._columns, np.nan)
            scores.weight = scores.weight_change = scores.weight_share = scores.moment = nothing
        else:
            self._see_weights(scores, before, now)
            scores.moment = self._moment(before, now)
        last = self.recent[-1].weight_change if self.recent else _NOTHING
        scores.taken_back = np.abs(last + scores.weight_change) < 0.5 * np.abs(last) if last.size else self._nowhere
        scores.growth = self._growth(now)
        scores.dead = (now.gradient_norm == 0) & self._was_alive
        if np.count_nonzero(scores.dead):
            scores.dead &= ~np.isnan(now.update_rms)
        self._was_alive |= now.gradient_norm > 0
        scores.more_zeros = self._zeros.see(now.zero_gradients)
        if seen.step <= FIRST_STEPS:
            scores.first_change = self._first_change(now)

    def _see_trend(self, scores: Scores, *, keep_out: bool, settle: bool) -> None:
        seen, count = scores.observation, self._columns
        values = np.empty(2 * count + 2)
        if seen.layers is None:
            values.fill(np.nan)
        else:
            _log_about_median(seen.layers.update_rms, values[:count])
            values[-2] = _log_about_median(seen.layers.gradient_norm, values[count:-2])
        # Larger ones are no numbers in single precision.
        values[-1] = math.nan if seen.loss is None or not abs(seen.loss) < _LARGEST_LOSS else seen.loss
        if self._settling and settle:
            self._trend.forget(slice(2 * count + 1))
        z = self._trend.see(seen.step, values, keep_out=keep_out)
        if scores.warming_up:
            z *= WARM_UP
        if np.count_nonzero(np.abs(z[:, -1]) > _LOOKED_AT):
            # In units of its present scatter where that has grown, as after a smaller batch.
            z[1:, -1] /= self._trend.scatter(-1)
        scores.young = self._trend.young
        if scores.young:
            # A young run learns in leaps: that its loss falls faster is no news.
            z[:, -1] = np.maximum(z[:, -1], 0.0)
        scores.update, scores.gradient, scores.loss = z[:, :count], z[:, count:-2], z[:, -1]
        scores.common_gradient, scores.far = float(z[0, -2]), np.abs(z[0]) > EXCURSION
        scores.young_loss = self._young_loss.see(seen.step, float(values[-1]), keep_out=keep_out)

    def _see_probes(self, scores: Scores, *, keep_out: bool) -> None:
        seen = scores.observation
        if seen.stability is not None:
            scores.stability, scores.block_stability = self._stability.see(seen, keep_out=keep_out)
            self.probes.append(scores)
        scores.sharpness = self.sharpness.see(seen, keep_out=keep_out)
        if scores.sharpness.size:
            self.sharp_probes.append(scores)
        if seen.layers is not None:
            self._attention.step(seen.layers.learning_rate)
        if seen.attention is not None:
            attention = self._attention.see(seen.step, seen.attention, keep_out=keep_out)
            # In a young run attention grows in leaps, as the loss falls.
            scores.attention = None if scores.young else attention

    def _note_rates(self, now: LayerTap) -> None:
        """Begin to settle where the rates have just changed."""
        step = 0.0
        if self._before is not None:
            steps = np.abs(np.log(now.learning_rate / self._before.learning_rate))
            step = np.fmax.reduce(steps, initial=0.0)  # passes NaN over
        self._settling = SETTLE if step > _RATE_STEP else max(0, self._settling - 1)

    def _growth(self, now: LayerTap) -> Doubles:
        self._row = (self._row + 1) % len(self._norms)
        self._norms[self._row] = now.weight_norm
        self._samples = 0 if self._settling else self._samples + 1
        # Now and then: what takes 20 samples to come is not missed in between.
        if self._samples < _GROWTH_BLIND or self._samples % _GROWTH_EVERY:
            return _NOTHING
        newest_first = self._norms[(self._row - np.arange(len(self._norms))) % len(self._norms)]
        changes = -np.diff(np.log(newest_first), axis=0).reshape(2, _GROWTH_SPAN, -1)
        # Without the largest: one jump is no growth.
        most, least = changes.max(1), changes.min(1)
        growth: Doubles = changes.sum(1) - np.where(most > -least, most, least)
        return growth

    def _see_weights(self, scores: Scores, before: LayerTap, now: LayerTap) -> None:
        """Score the change of the log weight norms.

        The step before made it, with the rates of that step.

        An update of Adam's has entries of about the learning rate, so that it changes a norm ‖W‖ of n weights by at
        most about rate·√n/‖W‖ of itself. The change is scored in units of that.
        """
        rates = before.learning_rate.astype(np.float64)
        norms = before.weight_norm.astype(np.float64)
        change: Doubles = np.log(now.weight_norm / norms)
        stepped = rates > 0
        stopped = self._stepped != stepped
        if np.count_nonzero(stopped):
            self._weights.forget(stopped)
            self._stepped = stepped
        # Without a rate nothing should change: then the change itself is scored.
        unit = np.where(stepped & (norms > 0), rates * self._roots / norms, 1.0)
        share = scored = change / unit
        unlike_adam = np.isnan(before.second_moment)
        if np.count_nonzero(unlike_adam) or np.count_nonzero(stepped) < len(stepped):
            # A parameter without a gradient is not stepped, and says nothing of how much a step changes it.
            idle = (before.gradient_norm == 0) & unlike_adam & (np.abs(change) < _ROUNDING)
            scored = np.where(idle, np.nan, scored)
            share = np.where(unlike_adam | (rates <= 0), np.nan, share)
        if scores.observation.update_every:
            # Nor does a block that was left out of the step.
            scored = np.where(self._rested(scores.observation) & (np.abs(change) < _ROUNDING), np.nan, scored)
        z = self._weights.see(scored, _WEIGHT_FLOOR * stepped + _ROUNDING / unit)
        scores.weight = WARM_UP * z if scores.warming_up else z
        scores.weight_change = change
        scores.weight_share = share

    def _rested(self, seen: Observation) -> npt.NDArray[np.bool_]:
        """The layer blocks [L] that the step before a sample has left out."""
        return np.array([bool((seen.step - 1) % seen.update_every.get(block, 1)) for block in self._types])

    def _first_change(self, now: LayerTap) -> Doubles:
        """Rate · √n / ‖W‖ where there is a second moment; NaN for weights that are about zero yet."""
        change: Doubles = now.learning_rate * self._roots / now.weight_norm
        started = now.weight_norm > _STARTED * self._roots
        return np.where(started & ~np.isnan(now.second_moment), change, np.nan)

    def _moment(self, before: LayerTap, now: LayerTap) -> Doubles:
        """V over β₂ times the v before: never below 1, since v_t = β₂·v_{t-1} + (1 - β₂)·g²."""
        decays = [group.settings.get("beta2", group.settings.get("alpha", 1.0)) for group in self.groups.values()]
        ratio: Doubles = np.divide(now.second_moment, before.second_moment, dtype=np.float64)
        return ratio / min(decays, default=1.0)


def _log_about_median(norms: Floats, logs: Doubles) -> float:
    """Write the logs of norms less their median into `logs`; returns the median, NaN where there is none."""
    np.log(norms, out=logs, dtype=np.float64)
    finite = np.isfinite(logs)
    known = np.count_nonzero(finite)
    if known < len(logs):
        # A gradient of exactly zero is a value, but no number that a spread could be made of: see `Scores.dead`.
        logs[~finite] = np.nan
    middle = median(logs)
    if known >= _FEW:
        logs -= middle
    return middle


def median(values: Doubles) -> float:
    """The median of the values that are known; NaN where none is. `np.median` takes ten times as long for a few."""
    ordered = np.sort(values)  # NaN last
    count = len(ordered) - np.count_nonzero(np.isnan(ordered))
    return float((ordered[(count - 1) // 2] + ordered[count // 2]) / 2) if count else math.nan
