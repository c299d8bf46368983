"""A daemon's journal with runs of one's own making, for tests of what reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from sharpwatch import wire
from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.daemon.storage.journal import Journal
from sharpwatch.daemon.storage.schema import AttemptRow, EstimateRow, PendingWrites, SampleRow
from sharpwatch.v1 import agent_pb2
from sharpwatch.v1.types_pb2 import LayerBlock

BLOCKS = ("emb", "qk", "ffn", "vo", "norm")
_TAP = {"gradient_norm": 3.0, "weight_norm": 1.0, "update_rms": 1.0, "learning_rate": 0.5, "lr_multiplier": 1.0}


@dataclass(frozen=True)
class JournalledAttempt:
    """What an attempt sends: losses by step, estimates (step, block, value, stderr, estimator), and noise by step."""

    losses: Iterable[tuple[int, float]]
    sharpness: Iterable[tuple[int, str, float, float, str]] = ()
    noise: Mapping[int, float] = field(default_factory=dict)  # of every layer block


def write_journal(path, runs):
    """Write a journal; `runs` has the attempts of each run by its name. Returns its URL."""
    url = f"sqlite:///{path}"
    with closing(Journal(url, retain_samples=100_000)) as journal:
        for run, attempts in runs.items():
            for number, attempt in enumerate(attempts):
                journal.write(_records(run, f"{run}-{number}", attempt), _samples(run, f"{run}-{number}", attempt))
    return url


def _records(run, name, attempt):
    hello = agent_pb2.Hello(
        protocol=wire.PROTOCOL,
        training_job="job",
        run=run,
        attempt=name,
        layer_blocks=[LayerBlock(block=block, layer="layers.0", parameters=64) for block in BLOCKS],
        blocks=BLOCKS,
        probes=["gradient_noise"],
        optimizer="AdamW",
        control="none",
        min_multiplier=0.1,
        max_multiplier=10.0,
    )
    records = PendingWrites(attempts={name: AttemptRow(run, name, hello.SerializeToString(), 0.0)})
    for step, block, value, stderr, estimator in attempt.sharpness:
        records.estimates.append(EstimateRow(run, "sharpness", block, Estimate(value, stderr, 8, estimator, step)))
        records.estimates.append(EstimateRow(run, "trace", block, Estimate(64 * value, stderr, 8, estimator, step)))
    return records


def _samples(run, name, attempt):
    return [
        SampleRow(run, name, number, step, _payload(number, step, loss, attempt.noise.get(step)), 0.0)
        for number, (step, loss) in enumerate(attempt.losses, 1)
    ]


def _payload(number, step, loss, noise):
    tap = agent_pb2.Tap()
    for field_name, value in _TAP.items():
        getattr(tap, field_name).CopyFrom(wire.encode(np.full(len(BLOCKS), value), "float32"))
    tap.non_finite.CopyFrom(wire.encode(np.zeros(len(BLOCKS)), "int64"))
    sample = agent_pb2.Sample(sequence=number, step=step, loss=loss, tap=tap)
    if noise is not None:
        sample.gradient_noise.noise.CopyFrom(wire.encode(np.full(len(BLOCKS), noise), "float32"))
    return agent_pb2.SessionRequest(sample=sample).SerializeToString()
