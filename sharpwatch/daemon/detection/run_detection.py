"""Detection for one run: from each observation to findings and incidents."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sharpwatch.daemon.detection.detectors import findings
from sharpwatch.daemon.detection.history import Losses, StepHistory
from sharpwatch.daemon.detection.incidents import BY_BATCH, IncidentLog
from sharpwatch.daemon.detection.judged import Judged
from sharpwatch.daemon.detection.ranks import RankLosses
from sharpwatch.daemon.detection.reference import ReferenceTest
from sharpwatch.daemon.detection.sharpness import Sharpness
from sharpwatch.daemon.detection.signals import EXCURSION, Scores, Signals
from sharpwatch.daemon.detection.state import Arrays, packed, unpacked
from sharpwatch.daemon.detection.thresholds import USUAL, Budget, Limits, statistics
from sharpwatch.daemon.records import AlertName, Finding, Incident, Observation
from sharpwatch.wire import Floats

# z of the loss, or of what all gradients have in common, that counts where a run with the same data stood out: less
# than for an excursion, since it is looked at for three steps and not for all of them.
ALSO = 4.0


def layer_block_name(block: str, layer: str) -> str:
    """The name of a layer block: "layers.3.qk", or "emb" for one outside of the layers."""
    return f"{layer}.{block}" if layer else block


def _probed(seen: Observation) -> list[AlertName]:
    """The alerts that come with probes alone and that the probes of a sample could have given."""
    read: dict[AlertName, object] = {
        "StabilityLimit": seen.stability,
        "SharpnessSpike": seen.traces,
        "AttentionGrowth": seen.attention,
    }
    return [name for name, reading in read.items() if reading is not None]


class RunDetection:
    """The signals, detectors and incidents of one run; deterministic but for the ids.

    Args:
        run: The run's name.
        layer_blocks: Block type and layer of each of its layer blocks.
        parameters: The number of parameters of each.
        new_id: Makes the ids of incidents.
        budget: Of false alarms.
        parameter_names: The names of the parameters of each layer block; empty where they are not known.
    """

    def __init__(  # noqa: PLR0913 - what a run is, and how it is judged
        self,
        run: str,
        layer_blocks: Sequence[tuple[str, str]],
        parameters: npt.NDArray[Any],
        new_id: Callable[[], str],
        budget: Budget = USUAL,
        *,
        parameter_names: Sequence[Sequence[str]] = (),
    ) -> None:
        self.names = tuple(layer_block_name(*each) for each in layer_blocks)
        self.incidents = IncidentLog(run, new_id)
        # Samples in which a single value stood out but was no finding; by signal, and block type or "" for the loss.
        self.excursions: Counter[tuple[str, str]] = Counter()
        # For other runs, which are held against this one.
        self.history = StepHistory()
        self.reference: ReferenceTest | None = None
        self._types = np.array([block for block, _ in layer_blocks])
        self._parameter_names = parameter_names
        self._ranks: RankLosses | None = None  # made with the first losses of ranks, which say how many there are
        self._make = (parameters, tuple(block for block, _ in layer_blocks), budget)
        self._signals, self._limits = self._made()

    def _made(self) -> tuple[Signals, Limits]:
        parameters, types, budget = self._make
        return Signals(parameters, types), Limits(budget, len(parameters))

    def judge_by(self, budget: Budget) -> None:
        """Goes by another budget of false alarms from now on; what it knows of the run stays."""
        parameters, types, _ = self._make
        self._make = (parameters, types, budget)
        limits = Limits(budget, len(parameters))
        limits.load_state(self._limits.state())
        self._limits = limits
        if self._ranks is not None:
            self._ranks = RankLosses.from_state(self._ranks.state(), budget)
        if self.reference is not None:
            self.reference.judge_by(budget)

    def see(self, observation: Observation) -> tuple[list[Finding], tuple[Incident, ...]]:
        """Take in the next step; returns its findings, and the incidents that changed."""
        found = self._judge(observation)
        if not found:
            self._count_excursions()
        self._note_step(found)
        if self.reference is not None:
            self.reference.see(observation.step)
            found += self._silent(observation.step)
        if not (found or self.incidents.opened):
            return found, ()
        return found, self.incidents.see(found, probed=_probed(observation))

    def see_stall(self, step: int, seconds: float) -> tuple[list[Finding], tuple[Incident, ...]]:
        """Take in that no step has come for so long after `step`; returns the finding, and a new incident."""
        evidence = f"no step for {seconds:.0f} s after step {step}, though the agent is connected"
        finding = Finding("RunStalled", "critical", evidence, step, step)
        _, changed = self.incidents.add([finding])
        return [finding], tuple(changed.values())

    @property
    def sharpness(self) -> Sharpness:
        """What is known of the sharpness of the run's blocks."""
        return self._signals.sharpness

    @property
    def rate_excess(self) -> dict[str, float]:
        """By block type how many times the learning rate is what it was, by the schedule, before it rose; 1 usually."""
        excess = self._signals.rates.excess
        return {block: float(excess[self._types == block].max()) for block in dict.fromkeys(self._types.tolist())}

    @property
    def first_change(self) -> float:
        """The largest part of itself that this step changes a layer block by, in the first steps; NaN later."""
        change = self._signals.recent[-1].first_change if self._signals.recent else np.empty(0)
        return float(np.fmax.reduce(change, initial=math.nan))

    @property
    def stability_excess(self) -> float:
        """How many times its usual level the stability ratio has in the newest probes; NaN where that is not known."""
        return self._signals.stability_excess()

    def set_reference(self, name: str, losses: Losses) -> None:
        """Hold the run against a reference, also its steps so far.

        Args:
            name: The reference's.
            losses: Its losses; they are read as they grow.
        """
        self.reference = ReferenceTest(name, self.history.losses, losses, self._make[2])

    def judge_reference(self) -> tuple[Incident, ...]:
        """Tell what the reference says of the run so far; returns incidents that changed."""
        _, changed = self.incidents.add(self._silent(self.history.last_step))
        return tuple(changed.values())

    def reference_came(self, step: int) -> tuple[Incident, ...]:
        """The reference has come to a step that this run may have come to before; returns incidents that changed."""
        if self.reference is None or step > self.history.last_step:
            return ()
        self.reference.see(step)
        return self.judge_reference()

    def _silent(self, step: int) -> list[Finding]:
        finding = None if self.reference is None else self.reference.finding(step)
        return [] if finding is None else [finding]

    def _note_step(self, found: Sequence[Finding]) -> None:
        """Remember the newest step, and whether its loss, its gradients or its updates stood out."""
        now = self._signals.recent[-1]
        seen, loss = now.observation, float(now.loss[0])
        odd = abs(loss) > ALSO or abs(now.common_gradient) > ALSO or bool(np.count_nonzero(now.far[:-2]))
        self.history.see(seen.step, seen.loss, judged=not math.isnan(loss), odd=odd)
        for finding in found:
            if finding.name in BY_BATCH:
                self.history.mark(finding.onset)

    @property
    def recent(self) -> tuple[Scores, ...]:
        """The scores of the newest steps, the newest last."""
        return tuple(self._signals.recent)

    def _count_excursions(self) -> None:
        """Count single values that stand out, of this sample and, of weights, of the one before."""
        now, then = self._signals.recent[-1], self._signals.recent[-2 if len(self._signals.recent) > 1 else -1]
        weight = np.abs(then.weight[: now.weight.size]) > EXCURSION
        if not (np.count_nonzero(now.far) or np.count_nonzero(weight)):
            return
        if weight.size:
            weight &= now.taken_back  # what stays is a finding, or how weights grow now
        update, gradient = np.split(now.far[:-2], 2)
        for signal, where in (("update", update), ("gradient", gradient), ("weight", weight)):
            self.excursions.update((signal, block) for block in set(self._types[: len(where)][where].tolist()))
        self.excursions.update([("loss", "")] * int(now.far[-1]))

    @np.errstate(all="ignore")  # a trainer may report any number, and NaN is what was not measured
    def _judge(self, observation: Observation) -> list[Finding]:
        # After a restart the samples of before an incident are folded while it is open.
        opened = [
            entry.incident
            for entry in self.incidents.opened.values()
            # A silent failure is within the run's own band: what happens in it is normal.
            if entry.incident.first_step < observation.step
            and entry.incident.name != "SilentFailure"
            and not entry.incident.contained_step  # the run is well: what happens is normal again
        ]
        # What happens in an incident must not become normal; a warning may be a false one.
        wrong = any(incident.severity == "critical" for incident in opened)
        signals = self._signals
        now = signals.see(observation, keep_out=wrong, settle=not opened)
        found = statistics(signals.recent)
        # A run that goes wrong jumps as it does not when it is well.
        explained = any(each.severity == "critical" and each.name != "WeightJump" for each in opened)
        exceeded, limits = self._limits.see(found, keep_out=bool(opened), explained=explained)
        made = findings(
            Judged(
                now,
                observation.step,
                tuple(signals.recent),
                signals.probes,
                signals.sharp_probes,
                self.names,
                signals.sharpness.blocks,
                found,
                limits,
                exceeded,
                self._parameter_names,
            )
        )
        if observation.rank_losses is not None:
            made += self._judge_ranks(observation, observation.rank_losses, keep_out=wrong)
        return made

    def _judge_ranks(self, observation: Observation, losses: Floats, *, keep_out: bool) -> list[Finding]:
        if self._ranks is None or self._ranks.ranks != len(losses):
            self._ranks = RankLosses(len(losses), self._make[2])
        return self._ranks.see(observation.step, losses, keep_out=keep_out)

    def replay(self, observation: Observation) -> None:
        """Take in a journalled step: baselines and open incidents move on, and none opens or closes."""
        found = self._judge(observation)
        if not found:
            self._count_excursions()
        self._note_step(found)
        self.incidents.replay(found, probed=_probed(observation))

    def state(self) -> bytes:
        """The baselines, thresholds and history, from which another daemon goes on with `load_state`."""
        return packed(self.arrays())

    def arrays(self) -> Arrays:
        """`state` as arrays."""
        ranks = {} if self._ranks is None else self._ranks.state()
        return self._signals.state() | self._limits.state() | self.history.state() | ranks

    def progress(self) -> Arrays:
        """What `state` leaves out as it is no baseline: excursions so far, and how quiet open incidents have been."""
        names = ["\n".join(key) for key in self.excursions]
        quiet = {identity: (entry.quiet, entry.recorded) for identity, entry in self.incidents.opened.items()}
        return {
            "progress.excursions": np.array(names, dtype=np.str_),
            "progress.counts": np.array(list(self.excursions.values()), dtype=np.int64),
            "progress.open": np.array(list(quiet), dtype=np.str_),
            "progress.quiet": np.array(list(quiet.values()), dtype=np.float64).reshape(-1, 2),
        }

    def load_progress(self, arrays: Arrays) -> None:
        """Go on from `progress`, with the incidents of the journal."""
        if "progress.open" not in arrays:  # of an earlier version
            return
        counts = zip(arrays["progress.excursions"].tolist(), arrays["progress.counts"].tolist(), strict=True)
        self.excursions = Counter({(name.partition("\n")[0], name.partition("\n")[2]): n for name, n in counts})
        for identity, (quiet, recorded) in zip(
            arrays["progress.open"].tolist(), arrays["progress.quiet"].tolist(), strict=True
        ):
            if identity in self.incidents.opened:
                self.incidents.opened[identity].quiet = quiet
                self.incidents.opened[identity].recorded = int(recorded)

    def load_state(self, state: bytes) -> None:
        """Go on from `state`; raises `ValueError`, and begins anew, where it is damaged or of other layer blocks."""
        self.load_arrays(unpacked(state))

    def load_arrays(self, arrays: Arrays) -> None:
        """As `load_state`."""
        try:
            self._signals.load_state(arrays)
            self._limits.load_state(arrays)
            self.history = StepHistory.from_state(arrays)
            self._ranks = RankLosses.from_state(arrays, self._make[2])
        except (ValueError, KeyError, TypeError) as error:
            self._signals, self._limits = self._made()
            raise ValueError(f"the state of the baselines can't be used: {error}") from error

    def take_over(self, earlier: RunDetection) -> None:
        """Carry on for a new attempt of the run: with its baselines where its layer blocks are the same."""
        self.history, self.reference, self.excursions = earlier.history, earlier.reference, earlier.excursions
        if earlier.names == self.names:
            self._signals, self._limits = earlier._signals, earlier._limits
        self.begin_attempt()

    def begin_attempt(self) -> None:
        """The next step is of another attempt, with rates and settings that somebody chose.

        The baselines of its ranks begin anew: another process may be a rank now, with other data.
        """
        self._signals.begin_attempt()
        self._ranks = None
