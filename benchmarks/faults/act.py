"""What enforced actions make of faults and of healthy runs: python -m benchmarks.faults.act [--seeds 31].

Each run trains under a real daemon that enforces the policies of examples/sharpwatch.yaml, from its first step to 1,000
steps after the onset, with a checkpoint before the first and every 50. Beside it stand the same run without an agent,
and the healthy twin with the same seed and batches. A run is a line in benchmarks/faults/acted.jsonl, and is not made
again.

A rate fault stays to the end of the run; a ramp ends at ×30. What happens once does not happen again after a rollback.
A run in which nothing is decided must have the same losses as without an agent, bit by bit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import grpc
import torch

import sharpwatch
from benchmarks.faults.kinds import HEALTHY, KINDS, Kind
from benchmarks.faults.training import MODELS, PEAK_RATE, Disturbance, Step, Training, loss_of
from sharpwatch.v1 import operator_pb2 as pb
from sharpwatch.v1.operator_pb2_grpc import OperatorServiceStub

ROOT = Path(__file__).parents[2]
KEPT = Path(__file__).parent / "acted.jsonl"
AFTER = 1000  # steps from the onset on
NEWEST = 20  # steps whose mean loss is compared
WITHIN = 0.1  # of the healthy twin's loss
RATE_WITHIN = 0.2  # of the healthy twin's rate
CHECKPOINT_EVERY = 50
MOST = 30.0  # times the rate that a ramp ends at
RATES = ("rate-x3", "rate-x10", "rate-x30", "rate-ramp-1", "rate-ramp-2", "no-warm-up")
ONCE = ("weight-300", "flip-30", "damaged-row", "moments-zeroed", "optimizer-reset", "beta2-wrong", "weight-decay-x100")
WELL = tuple(kind.name for kind in HEALTHY)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a run: its mean loss at the end, with its actions and without, and the healthy twin's."""

    model: str
    seed: int
    kind: str
    acted: float
    alone: float
    twin: float
    rate: float  # the net rate at the end over the twin's
    steps: int  # of the run, the lost ones of rollbacks included
    actions: tuple[int, ...]  # the steps, from the onset on, at which a decision was applied
    same: bool  # all losses are those of the run without an agent
    decisions: tuple[str, ...]

    @property
    def is_near(self) -> bool:
        """Whether it ends where the twin does."""
        return self.acted - self.twin < WITHIN and abs(self.rate - 1) <= RATE_WITHIN

    @property
    def harms(self) -> bool:
        """Whether without an action it does not."""
        return not self.alone - self.twin < WITHIN


def shipped_policies() -> str:
    """Those of the example, each of which enforces."""
    shipped = (ROOT / "examples/sharpwatch.yaml").read_text(encoding="utf-8")
    return shipped[shipped.index("policies:") :].replace("mode: advise", "mode: enforce")


@contextmanager
def daemon(folder: Path, policies: str) -> Iterator[dict[str, str]]:
    """A daemon with these policies; what it says that it serves, `grpc` and `http`."""
    config = folder / "sharpwatch.yaml"
    config.write_text(
        f'daemon: {{grpc: "unix:{folder}/grpc.sock", http: "127.0.0.1:0", store: "sqlite:///{folder}/journal.db", '
        f'token_file: "{folder}/operator.token"}}\n{policies}',
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "sharpwatch", "serve", "--config", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if '"serving"' in line:
                threading.Thread(target=process.stderr.read, daemon=True).start()
                yield json.loads(line)
                break
        else:
            raise RuntimeError("the daemon did not start")
    finally:
        process.terminate()
        process.wait()


class Acted:
    """A training of a kind under the daemon, which goes back to its checkpoints when it is told to."""

    def __init__(self, training: Training, kind: Kind) -> None:
        self.training, self.kind = training, kind
        self.disturbance = _disturbance(training, kind)
        self.saved: dict[int, dict[str, Any]] = {}
        self.losses: dict[int, float] = {}
        self.steps = 0

    def restore(self, request: sharpwatch.RollbackRequest) -> None:
        """Go back; the batches are others from there on, and what has happened once does not happen again."""
        data = self.training.data.get_state()
        self.training.restore(self.saved[request.step])
        self.training.data.set_state(data)
        self.disturbance = replace(self.disturbance, begin=None)

    def run(self, address: str, run: str, until: int) -> float:
        """Train up to a step; the net rate there."""
        training = self.training
        while training.number < self.kind.attached:
            self._step(None)
        watch = self._attach(address, run)
        self._save(watch, run)
        while training.number < until:
            self._step(watch)
            self.after_step(watch)
            if training.number % CHECKPOINT_EVERY == 0 and training.number not in self.saved:
                self._save(watch, run)
            if self.kind.name == "resume" and training.number == self.kind.onset + 20:
                state = watch.state_dict()
                watch.close()
                watch = self._attach(address, run)
                watch.load_state_dict(state)
        # Of each layer block alike, unless an action is about some alone.
        multipliers = watch.status.multipliers
        watch.close()
        own = training.optimizer.param_groups[0]["lr"]
        return float(own * fmean(multipliers.values()) / PEAK_RATE)

    def after_step(self, watch: Any) -> None:
        """What else happens, after each step that is watched."""

    def _save(self, watch: Any, run: str) -> None:
        number = self.training.number
        self.saved[number] = self.training.state()
        watch.saved_checkpoint(number, f"memory:{run}:{number}")

    def _step(self, watch: Any) -> None:
        loss = self.training.step(self.disturbance, self.kind.onset, watch)
        self.losses[self.training.number] = loss
        self.steps += 1

    def _attach(self, address: str, run: str) -> Any:
        return sharpwatch.attach(
            self.training.model,
            self.training.optimizer,
            training_job="act",
            run=run,
            address=address,
            seed=self.training.seed,
            initial_step=self.training.number,
            loss_fn=loss_of,
            on_rollback=self.restore,
            lr_bounds=(0.001, 10.0),
        )


def _disturbance(training: Training, kind: Kind) -> Disturbance:
    made = kind.make(*kind.place(training.name, training.seed))
    plan = made.plan
    if plan is None:
        return made

    def bounded(training: Training, step: Step) -> None:
        plan(training, step)
        step.factor = min(step.factor, MOST)

    return replace(made, plan=bounded)


def _training(model: str, seed: int, kind: Kind) -> Training:
    return Training(model, seed) if kind.schedule is None else Training(model, seed, schedule=kind.schedule)


def _alone(training: Training, disturbance: Disturbance, onset: int) -> list[float]:
    return [training.step(disturbance, onset) for _ in range(onset + AFTER)]


def outcomes(kept: Path, model: str, seed: int, kinds: Sequence[str]) -> Iterator[Outcome]:
    """The runs of a model and a seed; those that are not in the file are made and added."""
    torch.set_num_threads(1)
    known = {(one.model, one.seed, one.kind): one for one in read(kept)}
    twins: dict[int, list[float]] = {}
    for name in kinds:
        found = known.get((model, seed, name))
        if found is None:
            kind = KINDS[name]
            if kind.onset not in twins:
                twins[kind.onset] = _alone(Training(model, seed), Disturbance(), kind.onset)
            found = _outcome(model, seed, kind, twins[kind.onset])
            with kept.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(asdict(found)) + "\n")
        yield found


def read(kept: Path) -> list[Outcome]:
    """What is known from earlier runs of the benchmark."""
    if not kept.exists():
        return []
    rows = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    return [
        Outcome(**{key: tuple(value) if isinstance(value, list) else value for key, value in row.items()})
        for row in rows
    ]


def _outcome(model: str, seed: int, kind: Kind, twin: list[float]) -> Outcome:
    training = _training(model, seed, kind)
    alone = twin if kind.name == "plain" else _alone(training, _disturbance(training, kind), kind.onset)
    acted = Acted(_training(model, seed, kind), kind)
    with tempfile.TemporaryDirectory() as scratch, daemon(Path(scratch), shipped_policies()) as served:
        rate = acted.run(served["grpc"], "run", kind.onset + AFTER)
        with grpc.insecure_channel(served["grpc"]) as channel:
            response = OperatorServiceStub(channel).ListDecisions(pb.ListDecisionsRequest(run="run"))
    decisions = sorted(response.decisions, key=lambda each: each.made_at_unix_ns)
    applied = [each.applied_step for each in decisions if each.HasField("applied_step")]
    losses = [acted.losses[step] for step in sorted(acted.losses)]
    return Outcome(
        model,
        seed,
        kind.name,
        _last(losses),
        _last(alone),
        _last(twin),
        rate,
        acted.steps,
        tuple(step - kind.onset for step in applied if step >= kind.onset),
        losses == alone,
        tuple(
            f"{each.step} {each.alert_name} {each.action}: {each.outcome}"
            + (f" ({each.guard})" if each.outcome == "refused" else "")
            for each in decisions
        ),
    )


def _last(losses: Sequence[float]) -> float:
    return round(fmean(losses[-NEWEST:]), 5)


def main(arguments: Sequence[str]) -> int:
    """Print a line for each run, then a table by kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", type=Path, default=KEPT, help="file of the results")
    parser.add_argument("--seeds", nargs="+", type=int, default=[30, 31])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*RATES, *ONCE, *WELL])
    given = parser.parse_args(arguments)
    found: list[Outcome] = []
    for seed in given.seeds:
        for model in given.models:
            for one in outcomes(given.kept, model, seed, given.kinds):
                found.append(one)
                apart, alone = one.acted - one.twin, one.alone - one.twin
                print(
                    f"{model} {seed} {one.kind}: {apart:+.3f} above its twin, {alone:+.3f} alone, ×{one.rate:.3g}, "
                    f"acted at {one.actions}: {'; '.join(one.decisions)}",
                    flush=True,
                )
    print("\n".join(tables(found)))
    return 0


def tables(found: Sequence[Outcome]) -> Iterator[str]:
    """Of faults how many end near the healthy twin, and of healthy runs how many were changed."""
    yield "| kind | harmful alone | of these near the twin | above the twin alone | acted | net rate | first after |"
    yield "|---|---|---|---|---|---|---|"
    for name, of in _by_kind(found, (*RATES, *ONCE)):
        harmful = [one for one in of if one.harms]
        alone, acted = ([getattr(one, key) - one.twin for one in harmful] for key in ("alone", "acted"))
        rates = [one.rate for one in harmful]
        first = [one.actions[0] for one in harmful if one.actions]
        spans = (_span(each, form) for each, form in ((alone, "+.3f"), (acted, "+.3f"), (rates, ".3g"), (first, "d")))
        yield f"| {name} | {len(harmful)} of {len(of)} | {sum(one.is_near for one in harmful)} | {' | '.join(spans)} |"
    well = [one for _, of in _by_kind(found, WELL) for one in of]
    acted = [one for one in well if one.actions]
    yield ""
    steps, actions = sum(one.steps for one in well), sum(len(one.actions) for one in acted)
    same = sum(one.same for one in well if not one.actions)
    yield f"healthy: {actions} actions in {steps} steps, in {len(acted)} of {len(well)} runs; of the others {same} have"
    yield "the losses of the run without an agent, bit by bit"


def _by_kind(found: Sequence[Outcome], kinds: Sequence[str]) -> Iterator[tuple[str, list[Outcome]]]:
    for kind in kinds:
        of = [one for one in found if one.kind == kind]
        if of:
            yield kind, of


def _span(values: Sequence[float], form: str) -> str:
    return f"{min(values):{form}} to {max(values):{form}}" if values else "–"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
