"""How well sharpness is known between probes: python -m benchmarks.faults.sharpness [--seeds 2 3].

Each run is probed every 5 steps. Only every 16th probe is told to the estimator, as far apart as the default overhead
budget puts them on these models; the others are the truth, smoothed over 9 of them, as each is of a batch of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

import sharpwatch
from benchmarks.faults.kinds import KINDS
from benchmarks.faults.training import MODELS, Disturbance, Training, loss_of
from sharpwatch.daemon.detection.run_detection import RunDetection
from sharpwatch.daemon.detection.sharpness import EXPONENT, Sharpness
from sharpwatch.daemon.ingest.hello import RunHello, read_hello
from sharpwatch.daemon.ingest.samples import read_sample
from sharpwatch.daemon.records import Observation
from sharpwatch.daemon.runs.run import observation_of
from sharpwatch.testing import InMemoryTransport

STEPS, ONSET, EVERY, TOLD, SMOOTHED = 500, 240, 5, 16, 4
FIRST = 100  # step from which predictions are judged
DISTURBANCES = ("plain", "batch-x4", "rate-x3", "rate-ramp-1")
EXPONENTS = (0.0, EXPONENT, 1.0)


def observe(model: str, seed: int, kind: str) -> tuple[RunHello, list[Observation]]:
    """Train one run under the agent."""
    torch.set_num_threads(1)
    training, transport = Training(model, seed), InMemoryTransport()
    watch = sharpwatch.attach(
        training.model,
        training.optimizer,
        transport=transport,
        training_job="sharpness",
        seed=seed,
        loss_fn=loss_of,
        probe_every=EVERY,
        probes=("gnb",),
    )
    disturbance = Disturbance() if kind == "plain" else KINDS[kind].make("", None)
    while training.number < STEPS:
        training.step(disturbance, ONSET, watch)
    watch.close()
    hello = read_hello(transport.hellos[0])
    readings = [read_sample(hello, sample) for sample in transport.samples if not sample.closing]
    return hello, [observation_of(hello.blocks, reading) for reading in readings]


def truth(hello: RunHello, steps: Sequence[Observation]) -> dict[int, dict[str, float]]:
    """By step and block type the log trace, a mean over the probes around."""
    probed = {step.step: step.traces.astype(np.float64).mean(0) for step in steps if step.traces is not None}
    numbers = hello.block_of
    logs = {
        step: np.log(np.maximum(np.bincount(numbers, traces, len(hello.blocks)), 1e-300))
        for step, traces in probed.items()
    }
    at = list(logs)
    return {
        step: dict(
            zip(
                hello.blocks,
                np.mean([logs[each] for each in at[max(0, i - SMOOTHED) : i + SMOOTHED + 1]], axis=0),
                strict=True,
            )
        )
        for i, step in enumerate(at)
    }


def predictions(hello: RunHello, steps: Sequence[Observation], exponent: float) -> Iterator[tuple[float, float]]:
    """The error of each prediction in logs, and in standard errors."""
    true = truth(hello, steps)
    told = set(list(true)[::TOLD])
    sharpness = Sharpness(hello.parameters, [block for block, _ in hello.layer_blocks], exponent)
    for step in steps:
        sharpness.see(step if step.step in told else replace(step, traces=None), keep_out=False)
        if step.step < FIRST or step.step in told or step.step not in true:
            continue
        for (quantity, block, _), estimate in sharpness.view().estimates().items():
            if quantity == "trace":
                error = float(np.log(estimate.value)) - true[step.step][block]
                yield error, error / (estimate.stderr / estimate.value)


def alerts(hello: RunHello, steps: Sequence[Observation]) -> list[int]:
    """The steps at which incidents with a SharpnessSpike open, with every probe told."""
    detection = RunDetection("run", hello.layer_blocks, hello.parameters, iter(map(str, range(10**6))).__next__)
    return [
        incident.first_step
        for step in steps
        for incident in detection.see(step)[1]
        if incident.name == "SharpnessSpike" and incident.first_step == step.step
    ]


def main(arguments: Sequence[str]) -> int:
    """Print a row for each disturbance and exponent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--kinds", nargs="+", default=list(DISTURBANCES))
    given = parser.parse_args(arguments)
    print("kind        exponent  rms error of log  within 2 standard errors  SharpnessSpike at")
    for kind in given.kinds:
        runs = [observe(model, seed, kind) for model in MODELS for seed in given.seeds]
        opened = [alerts(*run) for run in runs]
        for exponent in EXPONENTS:
            errors = np.array([each for run in runs for each in predictions(*run, exponent)])
            rms, within = np.sqrt(np.mean(errors[:, 0] ** 2)), np.mean(np.abs(errors[:, 1]) < 2)
            print(f"{kind:11} {exponent:8.2f}  {rms:16.3f}  {within:24.3f}  {opened}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
