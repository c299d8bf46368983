"""Messages that are damaged: by bits, by bytes, and by fields that hold what no correct client sends."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from sharpwatch import wire
from sharpwatch.v1 import agent_pb2, types_pb2

BLOCKS = ("emb", "qk", "ffn", "vo", "norm")
LAYERS = 2
_SKETCH = 16
_WHOLE = (0, 1, -1, 2, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1)
_REAL = (0.0, -0.0, 1.0, -1.0, 1e200, -1e200, 1.7e308, 5e-324, math.nan, math.inf, -math.inf)
_TEXTS = (
    "",
    "x",
    "x" * 300,
    "x" * 5_000,
    "a\x00b",
    "a\nb",
    "\u202eemarf",
    "\U0001f600",
    "../..",
    "honest-0",
    "{}",
    "NaN",
)


def whole_hello(run: str, attempt: str) -> agent_pb2.Hello:
    """A Hello that a daemon takes."""
    rows = [
        types_pb2.LayerBlock(block=block, layer=f"layers.{layer}", parameters=64, parameter_names=["a", "b"])
        for layer in range(LAYERS)
        for block in BLOCKS
    ]
    return agent_pb2.Hello(
        protocol=wire.PROTOCOL,
        training_job="fuzz",
        run=run,
        attempt=attempt,
        host="fuzz",
        blocks=BLOCKS,
        layer_blocks=rows,
        optimizer="AdamW",
        control="rollback",
        can_roll_back=True,
        takes_update_intervals=True,
        min_multiplier=0.1,
        max_multiplier=10.0,
        sketch_size=_SKETCH,
        labels={"team": "fuzz"},
        probes=["gnb", "direction"],
    )


def whole_sample(sequence: int, generator: np.random.Generator) -> agent_pb2.Sample:
    """A sample of everything that there can be in one."""
    rows, count = LAYERS * len(BLOCKS), len(BLOCKS)
    ones = np.exp(0.1 * generator.standard_normal(rows))
    tap = {name: wire.encode(ones, "float32") for name in ("gradient_norm", "weight_norm", "update_rms")}
    tap |= {name: wire.encode(ones, "float32") for name in ("learning_rate", "lr_multiplier", "second_moment")}
    named = ("changed_parameter", "non_finite_parameter", "zero_gradients", "zero_parameter")
    tap |= {name: wire.encode(0 * ones, "int32") for name in named} | {"non_finite": wire.encode(0 * ones, "int64")}
    by_block, partly = wire.encode(ones[:count], "float64"), wire.encode([1.0, *[math.nan] * (count - 1)], "float64")
    seen: dict[str, Any] = {"tokens": 256, "rows": 4}
    traces = np.zeros((2, rows))
    traces[:, ::count] = 1.0
    block = BLOCKS[sequence % count]
    ends = {"top": 9.0, "top_residual": 0.5, "bottom": -3.0, "bottom_residual": 1.0}
    return agent_pb2.Sample(
        sequence=sequence,
        step=sequence,
        taken_at_unix_ns=sequence,
        loss=float(ones[0]),
        tap=agent_pb2.Tap(**tap, clip_factor=1.0),
        gnb=agent_pb2.GnbProbe(
            **seen,
            traces=wire.encode(generator.chisquare(4, (2, rows)), "float64"),
            sketches=wire.encode(generator.standard_normal((2, count, _SKETCH)), "float32"),
            gradient_sketch=wire.encode(generator.standard_normal((count, _SKETCH)), "float32"),
        ),
        direction=agent_pb2.DirectionProbe(
            **seen,
            descent=1.0,
            curvature=0.5,
            block_descent=by_block,
            block_curvature=partly,
            update_ratio=wire.encode(ones[:count], "float32"),
            curvature_parts=wire.encode(ones, "float64"),
        ),
        hutchinson=agent_pb2.HutchinsonProbe(**seen, block="emb", traces=wire.encode(traces, "float64")),
        lanczos=agent_pb2.LanczosProbe(**seen, block=block, **ends),
        linesearch=agent_pb2.LineSearchProbe(
            **seen, sharpness=0.2, half_width=0.01, block_sharpness=partly, block_half_width=partly
        ),
        preconditioned=agent_pb2.PreconditionedProbe(**seen, ratio=0.7, residual=0.01),
        gradient_noise=agent_pb2.GradientNoiseProbe(noise=wire.encode(ones, "float32")),
        rank_losses=wire.encode(ones, "float32"),
        health=agent_pb2.AgentHealth(
            overhead_ratio=0.01,
            step_seconds=0.5,
            dropped={"spool": 1},
            multipliers=dict.fromkeys(BLOCKS, 1.0),
            probe_failures=[agent_pb2.ProbeFailure(probe="gnb", reason="none", count=1)],
        ),
        results=[types_pb2.CommandResult(command_id=f"c{sequence}", outcome=types_pb2.COMMAND_OUTCOME_REFUSED)],
        checkpoints=[types_pb2.Checkpoint(step=sequence, uri=f"/{sequence}")],
        deleted_checkpoints=[f"/{sequence - 20}"],
        optimizer_groups=[agent_pb2.OptimizerGroup(settings={"beta1": 0.9, "eps": 1e-8}, steps=sequence)],
    )


def damaged(message: Message, generator: random.Random) -> bytes:
    """A message with some of its fields, bytes or bits changed; now and then as it is."""
    for _ in range(generator.choice((0, 1, 1, 1, 2, 5))):
        change_field(message, generator)
    data = bytearray(message.SerializeToString())
    for _ in range(generator.choice((0, 0, 0, 1, 1, 4, 30))):
        generator.choice(_OF_BYTES)(data, generator)
    return bytes(data)


def change_field(message: Message, generator: random.Random) -> None:
    """Changes one field, or one of a message within; those that are set are more likely."""
    fields = [field for field, _ in message.ListFields()] * 3 + list(message.DESCRIPTOR.fields)
    if not fields:
        return
    field = generator.choice(fields)
    if _is_map(field):
        _change_map(message, field, generator)
    elif field.is_repeated:
        _change_repeated(message, field, generator)
    elif field.message_type is None:
        setattr(message, field.name, _value(field, generator))
    elif generator.random() < 0.1:
        message.ClearField(field.name)
    else:
        inner = getattr(message, field.name)
        inner.SetInParent()
        change_field(inner, generator)


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _change_map(message: Message, field: FieldDescriptor, generator: random.Random) -> None:
    entry = field.message_type.fields_by_name
    if entry["value"].message_type is None:
        for _ in range(generator.choice((1, 1, 300))):
            getattr(message, field.name)[_value(entry["key"], generator)] = _value(entry["value"], generator)


def _change_repeated(message: Message, field: FieldDescriptor, generator: random.Random) -> None:
    items = getattr(message, field.name)
    count = generator.choice((1, 1, 1, 300))
    if items and generator.random() < 0.3:
        del items[generator.randrange(len(items)) :]
    elif field.message_type is None:
        items.extend(_value(field, generator) for _ in range(count))
    elif items and generator.random() < 0.5:
        change_field(generator.choice(items), generator)
    else:
        for _ in range(count):
            change_field(items.add(), generator)


def _value(field: FieldDescriptor, generator: random.Random) -> Any:
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        if field.type == FieldDescriptor.TYPE_BYTES:
            return generator.randbytes(generator.choice((0, 1, 8, 100, 4_000)))
        return generator.choice((*_TEXTS, str(generator.random())))
    if field.cpp_type in {FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT}:
        return generator.choice((*_REAL, generator.gauss(0, 10)))
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return generator.random() < 0.5
    return generator.choice([value for value in _WHOLE if _fits(value, field)])


def _fits(value: int, field: FieldDescriptor) -> bool:
    unsigned = field.cpp_type in {FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64}
    bits = 64 if field.cpp_type in {FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64} else 32
    return 0 <= value < 2**bits if unsigned else -(2 ** (bits - 1)) <= value < 2 ** (bits - 1)


def _flip(data: bytearray, generator: random.Random) -> None:
    if data:
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)


def _cut(data: bytearray, generator: random.Random) -> None:
    del data[generator.randrange(len(data) + 1) :]


def _insert(data: bytearray, generator: random.Random) -> None:
    at = generator.randrange(len(data) + 1)
    data[at:at] = generator.randbytes(generator.choice((1, 4, 40)))


def _repeat(data: bytearray, generator: random.Random) -> None:
    first, last = sorted(generator.randrange(len(data) + 1) for _ in range(2))
    data += data[first:last]


def _overwrite(data: bytearray, generator: random.Random) -> None:
    at = generator.randrange(len(data) + 1)
    data[at : at + 8] = generator.choice((b"\xff" * 8, b"\x00" * 8, b"\x80" * 8))


_OF_BYTES: Sequence[Callable[[bytearray, random.Random], None]] = (_flip, _flip, _cut, _insert, _repeat, _overwrite)

# HTTP


def http_request(generator: random.Random) -> bytes:
    """A request, mostly an odd one."""
    paths = (
        "/metrics",
        "/api/v1/alerts",
        "/-/healthy",
        "/-/ready",
        "/",
        "/%00",
        "/../../etc/passwd",
        "/metrics?" + "x" * 9_000,
    )
    methods = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "CONNECT", "TRACE", "get", "\x00", "X" * 100)
    lines = [f"{generator.choice(methods)} {generator.choice(paths)} {generator.choice(_VERSIONS)}", "Host: daemon"]
    lines += generator.choices(_HEADERS, k=generator.randrange(5))
    content = generator.choice(
        (b"", b"{}", b"[" * 1_000, _ALERT, generator.randbytes(1_000), b"5\r\nhello\r\n0\r\n\r\n")
    )
    if generator.random() < 0.7:
        lines.append(f"Content-Length: {generator.choice((len(content), len(content), 0, -1, 10**9))}")
    data = bytearray("\r\n".join((*lines, "", "")).encode("latin-1") + content)
    for _ in range(generator.choice((0, 0, 0, 1, 5))):
        generator.choice(_OF_BYTES)(data, generator)
    return bytes(data)


_VERSIONS = ("HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/9", "")
_HEADERS = (
    "Accept: application/openmetrics-text; version=1.0.0",
    "Accept: application/openmetrics-text; version=1.0.0; escaping=allow-utf-8",
    "Accept: text/plain; version=1.0.0; escaping=dots",
    "Accept: " + "*/*," * 1_000,
    "Accept-Encoding: gzip",
    "Accept-Encoding: br;q=nan, gzip;q=-1",
    "Authorization: Bearer wrong",
    "Authorization: \xff\xfe",
    "Authorization: Basic " + "A" * 5_000,
    "Transfer-Encoding: chunked",
    "Connection: Upgrade",
    "Upgrade: h2c",
    "Expect: 100-continue",
    "Content-Encoding: gzip",
    "Content-Type: application/json; charset=utf-9",
    *itertools.repeat("X: y", 3),
)
_ALERT = (
    b'{"version": "4", "alerts": [{"status": "firing", "labels": {"alertname": "A", "run": "honest-0"}, '
    b'"startsAt": "2026-01-01T00:00:00Z", "endsAt": "0001-01-01T00:00:00Z", "fingerprint": "f"}]}'
)
