"""A run to be replayed: its observations, and what they were read from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sharpwatch.daemon.detection.history import Losses
from sharpwatch.daemon.records import CheckpointReport, LayerTap, Observation
from sharpwatch.daemon.storage.schema import EstimateRow
from sharpwatch.errors import LogError
from sharpwatch.replay.log import Column, Log, Row
from sharpwatch.wire import Floats, Ints

# A log has the norm of the whole gradient: one layer block stands for the model. Detectors name it in their evidence.
WHOLE_MODEL = "the model"
_UNKNOWN_RATE = 1.0  # constant. With a rate of 0 the detectors would take the whole run for a warm-up
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """A run to be replayed.

    Attributes:
        source: The file, as the user named it.
        format: The format of the file, as `--format` takes it.
        layer_blocks: Block type and layer of each layer block.
        parameters: The number of parameters of each.
        observations: One for each step that was logged.
        names: By column its name in the file; empty for sharpwatch's own recordings, which have everything.
        notes: What the reader should know.
        estimates: The daemon's, where a journal has them, in the order they were made.
        gradient_noise: By step and block type, where it was probed.
        parameter_names: Of the parameters of each layer block; empty where they are not known.
        checkpoints: What the trainer told of its checkpoints, each with the index of the observation that follows.
        labels: The run's labels, as `attach` was given them, with its job and name; empty where they are not known.
    """

    source: str
    format: str
    layer_blocks: tuple[tuple[str, str], ...]
    parameters: Ints
    observations: Sequence[Observation]
    names: Mapping[Column, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    estimates: Sequence[EstimateRow] = ()
    gradient_noise: Sequence[tuple[int, Mapping[str, float]]] = ()
    parameter_names: Sequence[Sequence[str]] = ()
    checkpoints: Sequence[tuple[int, CheckpointReport]] = ()
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_own(self) -> bool:
        """Whether sharpwatch's agent recorded it."""
        return not self.names


def reference_losses(run: RecordedRun) -> Losses:
    """The losses of a run that another one is held against, where they are finite; the newest attempt counts.

    Args:
        run: The run.

    Raises:
        LogError: It has none.
    """
    losses = Losses(capacity=max(1, len(run.observations)))
    for observation in run.observations:
        losses.see(observation.step, observation.loss)
    if not len(losses):
        raise LogError("no step has a loss that is finite", run.source)
    return losses


def from_log(log: Log, source: str, format_: str) -> RecordedRun:
    """A run of which there is a log of another trainer.

    Args:
        log: The log.
        source: The file.
        format_: Its format.
    """
    has_layers = bool({"grad-norm", "lr"} & set(log.names))
    rates = _rates(log.rows)
    observations = [
        Observation(
            step=row.step,
            time=0.0,
            loss=row.loss,
            layers=_tap(row.gradient_norm, rate) if has_layers else None,
        )
        for row, rate in zip(log.rows, rates, strict=True)
    ]
    # Nobody knows how many parameters there are; it only weighs what is not in a log.
    parameters = np.ones(1, dtype=np.int64)
    return RecordedRun(source, format_, ((WHOLE_MODEL, ""),), parameters, observations, log.names, log.notes)


def _rates(rows: Sequence[Row]) -> list[float]:
    """The rate at each row: where none was logged that can be, the one before; at the start the first that was."""
    known = [
        rate if rate is not None and abs(rate) < _LARGEST else None for row in rows for rate in [row.learning_rate]
    ]
    newest = next((rate for rate in known if rate is not None), _UNKNOWN_RATE)
    rates = []
    for rate in known:
        newest = newest if rate is None else rate
        rates.append(newest)
    return rates


def _tap(gradient_norm: float | None, rate: float) -> LayerTap:
    """What a log says of the whole model, in the form of one layer block's statistics."""
    is_bad = gradient_norm is not None and not math.isfinite(gradient_norm)
    norm = math.nan if gradient_norm is None or is_bad else gradient_norm
    return LayerTap(
        gradient_norm=_one(norm),
        weight_norm=_one(math.nan),
        update_rms=_one(math.nan),
        non_finite=np.array([int(is_bad)], dtype=np.int64),
        learning_rate=_one(rate),
        lr_multiplier=_one(1.0),
        second_moment=_one(math.nan),
        clip_factor=math.nan,
    )


def _one(value: float) -> Floats:
    with np.errstate(over="ignore"):  # beyond single precision: inf, as in the trainer
        return np.array([value]).astype(np.float32)
