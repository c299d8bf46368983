"""What enforced actions make of faults and of healthy runs: python -m benchmarks.faults.act FOLDER [--seeds 30 31].

Each run trains under a real daemon that enforces the policies of examples/sharpwatch.yaml, from its first step to 1,000
steps after the onset, with a checkpoint every 50 steps. Beside it stand the same run without an agent, and the healthy
twin with the same seed and batches. A run's line is kept in FOLDER, and not made again.

A rate fault stays to the end of the run; a ramp ends at ×30. What happens once does not happen again after a rollback.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
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
from benchmarks.faults.kinds import KINDS, Kind
from benchmarks.faults.training import MODELS, PEAK_RATE, Disturbance, Step, Training, loss_of
from sharpwatch.v1 import operator_pb2 as pb
from sharpwatch.v1.operator_pb2_grpc import OperatorServiceStub

ROOT = Path(__file__).parents[2]
AFTER = 1000  # steps from the onset on
NEWEST = 20  # steps whose mean loss is compared
WITHIN = 0.1  # of the healthy twin's loss
RATE_WITHIN = 0.2  # of the healthy twin's rate
CHECKPOINT_EVERY = 50
MOST = 30.0  # times the rate that a ramp ends at
RATES = ("rate-x3", "rate-x10", "rate-x30", "rate-ramp-1", "rate-ramp-2", "no-warm-up")
ONCE = ("weight-300", "flip-30", "damaged-row", "moments-zeroed", "optimizer-reset", "beta2-wrong", "weight-decay-x100")
WELL = ("plain", "domain-shifts", "batch-x4", "batch-third", "other-data")


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
    first: int | None  # steps from the onset to the first action that was applied
    decisions: tuple[str, ...]

    @property
    def is_near(self) -> bool:
        """Whether it ends where the twin does."""
        return self.acted - self.twin < WITHIN and abs(self.rate - 1) <= RATE_WITHIN

    @property
    def harms(self) -> bool:
        """Whether without an action it does not."""
        return not self.alone - self.twin < WITHIN


@contextmanager
def daemon(folder: Path) -> Iterator[str]:
    """A daemon that enforces the shipped policies; its address."""
    config = folder / "sharpwatch.yaml"
    shipped = (ROOT / "examples/sharpwatch.yaml").read_text(encoding="utf-8")
    policies = shipped[shipped.index("policies:") :].replace("mode: advise", "mode: enforce")
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
                yield json.loads(line)["grpc"]
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

    def restore(self, request: sharpwatch.RollbackRequest) -> None:
        """Go back; the batches are others from there on, and what has happened once does not happen again."""
        data = self.training.data.get_state()
        self.training.restore(self.saved[request.step])
        self.training.data.set_state(data)
        self.disturbance = replace(self.disturbance, begin=None)

    def run(self, address: str, run: str) -> float:
        """Train to the end; the net rate there."""
        training, until = self.training, self.kind.onset + AFTER
        watch = sharpwatch.attach(
            training.model,
            training.optimizer,
            training_job="act",
            run=run,
            address=address,
            seed=training.seed,
            loss_fn=loss_of,
            on_rollback=self.restore,
            lr_bounds=(0.001, 10.0),
        )
        with watch:
            while training.number < until:
                loss = training.step(self.disturbance, self.kind.onset, watch)
                self.losses[training.number] = loss
                if training.number % CHECKPOINT_EVERY == 0 and training.number not in self.saved:
                    self.saved[training.number] = training.state()
                    watch.saved_checkpoint(training.number, f"memory:{run}:{training.number}")
            # Of each layer block alike, unless an action is about some alone.
            multipliers = watch.status.multipliers
        own = training.optimizer.param_groups[0]["lr"]
        return float(own * fmean(multipliers.values()) / PEAK_RATE)


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


def _alone(training: Training, disturbance: Disturbance, onset: int) -> float:
    losses = [training.step(disturbance, onset) for _ in range(onset + AFTER)]
    return fmean(losses[-NEWEST:])


def outcomes(folder: Path, model: str, seed: int, kinds: Sequence[str]) -> Iterator[Outcome]:
    """The runs of a model and a seed."""
    torch.set_num_threads(1)
    twins: dict[int, float] = {}
    for name in kinds:
        path = folder / f"{model}-{seed}-{name}.json"
        if not path.exists():
            kind = KINDS[name]
            if kind.onset not in twins:
                twins[kind.onset] = _alone(Training(model, seed), Disturbance(), kind.onset)
            path.write_text(json.dumps(asdict(_outcome(folder, model, seed, kind, twins[kind.onset]))), "utf-8")
        yield Outcome(**json.loads(path.read_text("utf-8")))


def _outcome(folder: Path, model: str, seed: int, kind: Kind, twin: float) -> Outcome:
    training = _training(model, seed, kind)
    alone = twin if kind.name == "plain" else _alone(training, _disturbance(training, kind), kind.onset)
    acted = Acted(_training(model, seed, kind), kind)
    scratch = folder / "daemon" / f"{model}-{seed}-{kind.name}"
    scratch.mkdir(parents=True, exist_ok=True)
    with daemon(scratch) as address:
        rate = acted.run(address, "run")
        with grpc.insecure_channel(address) as channel:
            response = OperatorServiceStub(channel).ListDecisions(pb.ListDecisionsRequest(run="run"))
    decisions = sorted(response.decisions, key=lambda each: each.made_at_unix_ns)
    applied = [each.applied_step for each in decisions if each.HasField("applied_step")]
    return Outcome(
        model,
        seed,
        kind.name,
        fmean([acted.losses[step] for step in sorted(acted.losses)[-NEWEST:]]),
        alone,
        twin,
        rate,
        min((step - kind.onset for step in applied if step >= kind.onset), default=None),
        tuple(
            f"{each.step} {each.alert_name} {each.action}: {each.outcome}"
            + (f" ({each.guard})" if each.outcome == "refused" else "")
            for each in decisions
        ),
    )


def main(arguments: Sequence[str]) -> int:
    """Print a line for each run, then a table by kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[30, 31])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*RATES, *ONCE, *WELL])
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    found: list[Outcome] = []
    for seed in given.seeds:
        for model in given.models:
            for one in outcomes(given.folder, model, seed, given.kinds):
                found.append(one)
                apart, alone = one.acted - one.twin, one.alone - one.twin
                print(
                    f"{model} {seed} {one.kind}: {apart:+.3f} above its twin, {alone:+.3f} alone, ×{one.rate:.3g}, "
                    f"acted at {one.first}: {'; '.join(one.decisions)}",
                    flush=True,
                )
    print("| kind | harmful without | of these near the twin with | runs with an action |\n|---|---|---|---|")
    for kind in given.kinds:
        of = [one for one in found if one.kind == kind]
        harmful = [one for one in of if one.harms]
        near, acted = sum(one.is_near for one in harmful), sum(one.first is not None for one in of)
        print(f"| {kind} | {len(harmful)} of {len(of)} | {near} | {acted} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
