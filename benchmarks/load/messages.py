"""The messages of a simulated agent, by the agent's own encoders.

The model has 66 layer blocks: four in each of 16 layers, the embedding and the head. Its numbers are those of a healthy
run, so that what is measured is no run in trouble. Numbers are drawn once: `request` puts the sequence, the step and
the time before the rest of a sample, which is where an agent has them.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from sharpwatch.agent.probes.gnb import GnbReport
from sharpwatch.agent.probes.runner import ProbeRun
from sharpwatch.agent.reporting import Health, Identity, SampleValues, hello_message, sample_message
from sharpwatch.agent.statistics.tap import TapReading
from sharpwatch.blocks import LayerBlock
from sharpwatch.curvature.estimators.gnb import GnbSample
from sharpwatch.v1 import agent_pb2
from sharpwatch.wire import SKETCH_SIZE

BLOCKS = ("emb", "qk", "vo", "ffn", "norm", "head")
LAYER_BLOCKS = (
    LayerBlock("emb", None, 2**25),
    *(LayerBlock(block, f"model.layers.{layer}", 2**22) for layer in range(16) for block in BLOCKS[1:5]),
    LayerBlock("head", None, 2**25),
)
_NAMES = {
    "qk": ("self_attn.q_proj.weight", "self_attn.k_proj.weight"),
    "vo": ("self_attn.v_proj.weight", "self_attn.o_proj.weight"),
    "ffn": ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"),
    "norm": ("input_layernorm.weight", "post_attention_layernorm.weight"),
    "emb": ("embed_tokens.weight",),
    "head": ("lm_head.weight",),
}
_HEALTH = Health(0.004, 1.0, {}, 0, (), 0, dict.fromkeys(BLOCKS, 1.0), {})
DRAWS = 4


def hello(run: str, host: str) -> bytes:
    """The first message of a run."""
    names = [tuple(f"{each.layer or 'model'}.{name}" for name in _NAMES[each.type]) for each in LAYER_BLOCKS]
    identity = Identity(
        training_job="load",
        run=run,
        attempt=f"{run}-1",
        optimizer="AdamW",
        control="lr",
        lr_bounds=(0.1, 10.0),
        initial_step=0,
        seed=0,
        probes=("gnb",),
        can_roll_back=False,
        started_at_unix_ns=0,
    )
    blocks = SimpleNamespace(layer_blocks=LAYER_BLOCKS, blocks=BLOCKS, parameter_names=names)
    message = hello_message(identity, blocks)  # type: ignore[arg-type]  all that it reads of a BlockMap
    message.host = host  # a client may have 256 runs
    return agent_pb2.SessionRequest(hello=message).SerializeToString()


def body(random: np.random.Generator, *, gnb: bool) -> bytes:
    """A sample without its sequence, step and time, with or without a `gnb` probe of four draws."""
    sample = SampleValues(0, 0, 0, _HEALTH, loss=float(3.0 + 0.02 * random.standard_normal()), tap=_tap(random))
    message = sample_message(sample)
    if gnb:
        probes = ProbeRun({"gnb": _gnb(random)}, {"gnb": 0.1})
        message.MergeFrom(sample_message(SampleValues(0, 0, 0, _HEALTH, probes=probes)))
    return message.SerializeToString()


def request(sequence: int, taken_at_unix_ns: int, rest: bytes) -> bytes:
    """A sample as it is sent."""
    head = agent_pb2.Sample(sequence=sequence, step=sequence, taken_at_unix_ns=taken_at_unix_ns).SerializeToString()
    return b"\x12" + _varint(len(head) + len(rest)) + head + rest  # field 2 of a SessionRequest


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*parts, value))


def _around(random: np.random.Generator, value: float, dtype: str = "float32") -> np.ndarray:
    return (value * np.exp(0.05 * random.standard_normal(len(LAYER_BLOCKS)))).astype(dtype)


def _tap(random: np.random.Generator) -> TapReading:
    count = len(LAYER_BLOCKS)
    rates = np.full(count, 1e-3, np.float32)
    return TapReading(
        gradient_norm=_around(random, 0.1),
        weight_norm=np.full(count, 50.0, np.float32),
        update_rms=_around(random, 1.0),
        non_finite=np.zeros(count, np.int64),
        learning_rate=rates,
        lr_multiplier=np.ones(count, np.float32),
        second_moment=_around(random, 1e-6),
        changed_parameter=np.full(count, -1, np.int32),
        non_finite_parameter=None,
        zero_gradients=None,
        zero_parameter=None,
        clip_factor=1.0,
    )


def _gnb(random: np.random.Generator) -> GnbReport:
    traces = np.stack([_around(random, 100.0, "float64") for _ in range(DRAWS)])
    sketches = random.standard_normal((DRAWS, len(BLOCKS), SKETCH_SIZE), dtype=np.float32)
    gradient = random.standard_normal((len(BLOCKS), SKETCH_SIZE), dtype=np.float32)
    sample = GnbSample(
        tokens=4096,
        rows=8,
        traces=torch.from_numpy(traces),
        sketches=torch.from_numpy(sketches),
    )
    return GnbReport(sample, torch.from_numpy(gradient))
