from __future__ import annotations

import numpy as np
import torch

from sharpwatch.agent.control.commands import CommandResult, RollBack, SetMultipliers
from sharpwatch.agent.probes.builtin import PROBES, DirectionReport
from sharpwatch.agent.probes.failures import ProbeFailure
from sharpwatch.agent.probes.gnb import GnbReport
from sharpwatch.agent.probes.gradient_noise import GradientNoiseReport
from sharpwatch.agent.probes.runner import ProbeRun
from sharpwatch.agent.reporting import Health, SampleValues, read_command, sample_message
from sharpwatch.agent.statistics.group_settings import GroupSettings
from sharpwatch.agent.statistics.tap import TapReading
from sharpwatch.curvature.estimators.directional import DirectionSample, LineSearchSample
from sharpwatch.curvature.estimators.gnb import GnbSample
from sharpwatch.curvature.estimators.hutchinson import HutchinsonSample
from sharpwatch.curvature.estimators.lanczos import LanczosSample
from sharpwatch.curvature.estimators.preconditioned import PreconditionedSample
from sharpwatch.daemon.ingest.hello import read_hello
from sharpwatch.daemon.ingest.probes import LanczosReading, PreconditionedReading
from sharpwatch.daemon.ingest.samples import read_sample
from sharpwatch.v1 import agent_pb2, types_pb2
from sharpwatch.wire import PROTOCOL, decode

NOISE = np.array([0.5, np.nan], dtype=np.float32)
HEALTH = Health(
    overhead_ratio=0.01,
    step_seconds=0.5,
    dropped={"spool_full": 3},
    swallowed_errors=2,
    probe_failures=(ProbeFailure("direction", "x" * 9000, 2, disabled=True),),
    lr_revision=4,
    multipliers={"qk": 0.5, "emb": 1.0},
    update_every={"emb": 4},
)


def test_a_full_sample_carries_every_number():
    tap = TapReading(
        gradient_norm=np.array([1.0, 2.0]),
        weight_norm=np.array([3.0, 4.0]),
        update_rms=np.array([np.nan, 5.0]),
        non_finite=np.array([0, 2**40]),
        learning_rate=np.array([0.1, 0.2]),
        lr_multiplier=np.array([1.0, 0.5]),
        second_moment=np.array([np.nan, 1e-5]),
        changed_parameter=np.array([-1, 3]),
        non_finite_parameter=np.array([0, -1]),
        zero_gradients=np.array([1, 2]),
        zero_parameter=np.array([4, -1]),
        clip_factor=0.25,
    )
    traces = torch.arange(8, dtype=torch.float64).view(4, 2)
    sketches = torch.arange(4 * 3 * 256, dtype=torch.float32).view(4, 3, 256)
    along = torch.tensor([1.0, float("nan"), 3.0], dtype=torch.float64)
    direction = DirectionSample(
        31,
        2,
        0.25,
        0.5,
        torch.ones(3, dtype=torch.float64),
        along,
        "autograd",
        torch.tensor([0.125, 0.375], dtype=torch.float64),
    )
    message = sample_message(
        SampleValues(
            sequence=7,
            step=5,
            taken_at_unix_ns=11,
            health=HEALTH,
            loss=2.5,
            rank_losses=np.array([2.0, np.nan, np.inf]),
            tap=tap,
            groups=[GroupSettings(1, 2, {"beta2": 0.99, "eps": 1e-8}, 4.0)],
            probes=ProbeRun(
                {
                    "gnb": GnbReport(GnbSample(30, 1, traces, sketches), sketches[0] + 1),
                    "direction": DirectionReport(direction, np.array([0.1, 0.2, 0.3], dtype=np.float32)),
                    "gradient_noise": GradientNoiseReport(NOISE),
                },
                {"gnb": 0.125, "direction": 0.25, "gradient_noise": 0.5},
            ),
            results=[CommandResult("c", "expired", 5, "late", ("qk",))],
            checkpoints=[(4, "file:///c")],
            deleted_checkpoints=["file:///b"],
        )
    )
    message = type(message).FromString(message.SerializeToString())
    assert (message.sequence, message.step, message.taken_at_unix_ns, message.loss) == (7, 5, 11, 2.5)
    assert message.tap.clip_factor == 0.25
    (group,) = message.optimizer_groups
    assert (group.optimizer, group.group, group.steps, dict(group.settings)) == (1, 2, 4, {"beta2": 0.99, "eps": 1e-8})
    for name in ("gradient_norm", "weight_norm", "update_rms", "learning_rate", "lr_multiplier", "second_moment"):
        got = decode(getattr(message.tap, name), name=name, dtype="float32", shape=(2,))
        np.testing.assert_array_equal(got, getattr(tap, name).astype(np.float32))
    assert decode(message.tap.non_finite, name="n", dtype="int64", shape=(2,)).tolist() == [0, 2**40]
    assert decode(message.tap.changed_parameter, name="c", dtype="int32", shape=(2,)).tolist() == [-1, 3]
    assert decode(message.tap.non_finite_parameter, name="n", dtype="int32", shape=(2,)).tolist() == [0, -1]
    assert decode(message.tap.zero_gradients, name="z", dtype="int32", shape=(2,)).tolist() == [1, 2]
    assert decode(message.tap.zero_parameter, name="z", dtype="int32", shape=(2,)).tolist() == [4, -1]
    ranks = decode(message.rank_losses, name="r", dtype="float32", shape=(3,))
    np.testing.assert_array_equal(ranks, np.array([2.0, np.nan, np.inf], dtype=np.float32))
    np.testing.assert_array_equal(decode(message.gnb.traces, name="t", dtype="float64", shape=(4, 2)), traces)
    np.testing.assert_array_equal(decode(message.gnb.sketches, name="s", dtype="float32", shape=(4, 3, 256)), sketches)
    got = decode(message.gnb.gradient_sketch, name="g", dtype="float32", shape=(3, 256))
    np.testing.assert_array_equal(got, sketches[0] + 1)
    noise = decode(message.gradient_noise.noise, name="n", dtype="float32", shape=(2,))
    np.testing.assert_array_equal(noise, NOISE)
    assert message.gradient_noise.seconds == 0.5
    assert not message.gnb.HasField("gradient_noise")
    assert (message.gnb.tokens, message.gnb.rows, message.gnb.seconds) == (30, 1, 0.125)
    assert (message.direction.descent, message.direction.curvature, message.direction.tokens) == (0.25, 0.5, 31)
    np.testing.assert_array_equal(
        decode(message.direction.block_curvature, name="b", dtype="float64", shape=(3,)), along
    )
    assert message.direction.method == "autograd"
    parts = decode(message.direction.curvature_parts, name="p", dtype="float64", shape=(2,))
    assert parts.tolist() == [0.125, 0.375]
    assert decode(message.direction.update_ratio, name="u", dtype="float32", shape=(3,))[2] == np.float32(0.3)
    (result,) = message.results
    assert (result.command_id, result.outcome) == ("c", types_pb2.COMMAND_OUTCOME_EXPIRED)
    assert (result.step, result.detail, list(result.unchanged_blocks)) == (5, "late", ["qk"])
    assert [(c.step, c.uri) for c in message.checkpoints] == [(4, "file:///c")]
    assert list(message.deleted_checkpoints) == ["file:///b"]
    assert not message.closing


def test_what_hessian_probes_found_comes_in_as_it_went_out():
    nan = float("nan")
    reports = {
        "hutchinson": HutchinsonSample("qk", 30, 1, torch.tensor([[0.0, 1.5, -2.0]], dtype=torch.float64), "autograd"),
        "lanczos": LanczosSample("", 31, 2, 9.0, 0.5, -3.0, 1.0, 6, "gradient differences", torch.ones(2, 4)),
        "linesearch": LineSearchSample(
            32, 3, 0.5, 0.01, *torch.tensor([[nan, 0.25], [nan, 0.125]], dtype=torch.float64)
        ),
        "preconditioned": PreconditionedSample(33, 4, 0.75, 0.01, 5, "autograd", torch.ones(4)),
    }
    seconds = dict.fromkeys(reports, 0.25)
    values = SampleValues(sequence=1, step=2, taken_at_unix_ns=0, health=HEALTH, probes=ProbeRun(reports, seconds))
    message = agent_pb2.Sample.FromString(sample_message(values).SerializeToString())
    assert [getattr(message, probe).seconds for probe in reports] == [0.25] * 4
    assert [getattr(message, probe).rows for probe in reports] == [1, 2, 3, 4]
    assert (message.lanczos.products, message.preconditioned.products) == (6, 5)
    layer_blocks = [("emb", ""), ("qk", "0"), ("qk", "1")]
    hello = agent_pb2.Hello(
        protocol=PROTOCOL,
        training_job="job",
        run="run",
        attempt="a",
        layer_blocks=[types_pb2.LayerBlock(block=block, layer=layer, parameters=8) for block, layer in layer_blocks],
        blocks=["emb", "qk"],
        control="none",
        min_multiplier=1,
        max_multiplier=1,
    )
    reading = read_sample(read_hello(hello), message)
    assert tuple(reading.probes) == tuple(reports)
    assert (reading.probes["hutchinson"].block, reading.probes["hutchinson"].traces.tolist()) == (
        "qk",
        [-0.5],  # summed over layers
    )
    assert reading.probes["lanczos"] == LanczosReading(31, "", 9.0, 0.5, -3.0, 1.0, "gradient differences")
    assert (reading.probes["linesearch"].sharpness, reading.probes["linesearch"].half_width) == (0.5, 0.01)
    np.testing.assert_array_equal(reading.probes["linesearch"].block_sharpness, [nan, 0.25])
    np.testing.assert_array_equal(reading.probes["linesearch"].block_half_width, [nan, 0.125])
    assert reading.probes["preconditioned"] == PreconditionedReading(33, 0.75, 0.01, "autograd")


def test_health_is_sent_and_long_reasons_are_cut_to_what_the_daemon_takes():
    health = sample_message(SampleValues(sequence=1, step=0, taken_at_unix_ns=0, health=HEALTH)).health
    assert (health.overhead_ratio, health.step_seconds, health.swallowed_errors) == (0.01, 0.5, 2)
    assert dict(health.dropped) == {"spool_full": 3}
    assert dict(health.multipliers) == {"qk": 0.5, "emb": 1.0}
    (failure,) = health.probe_failures
    assert (failure.probe, failure.count, failure.disabled) == ("direction", 2, True)
    assert len(failure.reason) <= 4096


def test_what_was_not_measured_is_absent():
    message = sample_message(SampleValues(sequence=1, step=0, taken_at_unix_ns=0, health=HEALTH, closing=True))
    assert not any(message.HasField(name) for name in ("loss", "tap", *PROBES))
    assert message.closing


def test_commands_become_values():
    multipliers = types_pb2.MultiplierSet(multipliers={"qk": 0.5}, revision=3, ramp_steps=20, ttl_steps=500)
    message = types_pb2.Command(
        id="a", apply_at_step=5, expires_at_step=9, expires_at_unix_ns=10, reason="why", set_multipliers=multipliers
    )
    command = read_command(message)
    assert command.action == SetMultipliers({"qk": 0.5}, 3, 20, 500)
    assert (command.id, command.apply_at_step, command.expires_at_step) == ("a", 5, 9)
    assert (command.expires_at_unix_ns, command.reason) == (10, "why")
    back = types_pb2.Rollback(
        checkpoint=types_pb2.Checkpoint(step=4, uri="file:///c"), skip_from_step=5, skip_to_step=8
    )
    assert read_command(types_pb2.Command(id="b", rollback=back)).action == RollBack(4, "file:///c", (5, 8))
    assert read_command(types_pb2.Command(id="c")).action is None
