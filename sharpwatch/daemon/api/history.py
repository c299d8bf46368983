"""A run's history in a few numbers a step, from the samples as the journal has them."""

from __future__ import annotations

import math

import numpy as np
from google.protobuf.message import DecodeError

from sharpwatch import wire
from sharpwatch.daemon.api.conversions import estimate_message
from sharpwatch.daemon.storage.schema import StoredHistory
from sharpwatch.errors import WireError
from sharpwatch.v1 import agent_pb2
from sharpwatch.v1 import operator_pb2 as pb
from sharpwatch.v1.types_pb2 import Array
from sharpwatch.wire import Floats


def history_message(found: StoredHistory) -> pb.GetHistoryResponse:
    """Returns a history as a message; samples without a measurement are left out."""
    points = (_point(attempt, payload) for attempt, payload in found.samples)
    return pb.GetHistoryResponse(
        points=[point for point in points if point is not None],
        estimates=[estimate_message(row.quantity, row.block, row.estimate) for row in found.estimates],
    )


def _point(attempt: int, payload: bytes) -> pb.HistoryPoint | None:
    try:
        sample = agent_pb2.SessionRequest.FromString(payload).sample
        point = pb.HistoryPoint(step=sample.step, taken_at_unix_ns=sample.taken_at_unix_ns, attempt=attempt)
        if sample.HasField("tap"):
            _add_tap(point, sample.tap)
    except (DecodeError, WireError):
        return None  # of a version whose samples were otherwise
    if sample.HasField("loss"):
        point.loss = sample.loss
    elif not sample.HasField("tap"):
        return None  # answers or checkpoints alone
    if sample.HasField("health"):
        point.overhead_ratio = sample.health.overhead_ratio
        point.step_seconds = sample.health.step_seconds
    return point


def _add_tap(point: pb.HistoryPoint, tap: agent_pb2.Tap) -> None:
    norms = _values(tap.gradient_norm, "gradient_norm").astype(np.float64)
    squares = float(norms @ norms)
    if math.isnan(squares):  # where a layer block was not read
        known = norms[~np.isnan(norms)]
        squares = float(known @ known) if len(known) else math.nan
    found = {
        "gradient_norm": math.sqrt(squares),
        # These leave NaN out where there is another value.
        "update_rms": float(np.fmax.reduce(_values(tap.update_rms, "update_rms"))),
        "learning_rate": float(np.fmax.reduce(_values(tap.learning_rate, "learning_rate"))),
        "lr_multiplier": float(np.fmin.reduce(_values(tap.lr_multiplier, "lr_multiplier"))),
    }
    for name, value in found.items():
        if not math.isnan(value):
            setattr(point, name, value)


def _values(array: Array, name: str) -> Floats:
    return wire.decode(array, name=name, dtype="float32", shape=(None,))
