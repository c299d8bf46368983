"""What the wire may carry, and what is refused under which code."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sharpwatch import wire
from sharpwatch.daemon.ingest.hello import read_hello
from sharpwatch.daemon.ingest.probes import LanczosReading, PreconditionedReading
from sharpwatch.daemon.ingest.samples import MAX_SETTINGS, read_sample
from sharpwatch.daemon.records import Checkpoint, CheckpointReport
from sharpwatch.errors import WireError
from sharpwatch.v1 import agent_pb2, types_pb2

BLOCKS = ("emb", "qk")
LAYERS = (("emb", "", 40), ("qk", "layers.0", 8), ("qk", "layers.1", 8))


def hello(**changes) -> agent_pb2.Hello:
    message = agent_pb2.Hello(
        protocol=wire.PROTOCOL,
        training_job="job",
        run="run",
        attempt="a1",
        layer_blocks=[types_pb2.LayerBlock(block=b, layer=layer, parameters=n) for b, layer, n in LAYERS],
        blocks=BLOCKS,
        optimizer="AdamW",
        control="lr",
        min_multiplier=0.1,
        max_multiplier=10,
        sketch_size=64,
    )
    for name, value in changes.items():
        if isinstance(value, list):
            message.ClearField(name)
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    return message


def tap(**changes) -> agent_pb2.Tap:
    arrays = {
        "gradient_norm": ([1.0, 2.0, 3.0], "float32"),
        "weight_norm": ([1.0, 1.0, 1.0], "float32"),
        "update_rms": ([math.nan, 1.0, 1.0], "float32"),
        "non_finite": ([0, 0, 2], "int64"),
        "learning_rate": ([0.1, 0.1, 0.1], "float32"),
        "lr_multiplier": ([1.0, 1.0, 1.0], "float32"),
    } | changes
    return agent_pb2.Tap(**{name: wire.encode(values, dtype) for name, (values, dtype) in arrays.items()})


def gnb(
    traces=((1.0, 2.0, 3.0), (1.0, 2.0, 4.0)), sketches=None, gradient=None, noise=(0.5, 0.25, 0.125)
) -> agent_pb2.GnbProbe:
    sketches = np.ones((len(traces), 2, 64)) if sketches is None else sketches
    gradient = np.ones((2, 64)) if gradient is None else gradient
    return agent_pb2.GnbProbe(
        tokens=128,
        rows=4,
        traces=wire.encode(traces, "float64"),
        sketches=wire.encode(sketches, "float32"),
        gradient_sketch=wire.encode(gradient, "float32"),
        gradient_noise=wire.encode(noise, "float32"),
    )


def hutchinson(block="qk", traces=((0.0, 2.0, -3.0), (0.0, 2.0, 4.0)), **changes) -> agent_pb2.HutchinsonProbe:
    whole = {"tokens": 128, "block": block, "traces": wire.encode(traces, "float64"), "method": "autograd"}
    return agent_pb2.HutchinsonProbe(**whole | changes)


def lanczos(**changes) -> agent_pb2.LanczosProbe:
    whole = {"tokens": 128, "block": "qk", "top": 9.0, "top_residual": 0.5, "bottom": -3.0, "bottom_residual": 1.0}
    return agent_pb2.LanczosProbe(**whole | changes)


def linesearch(blocks=(math.nan, 0.25), widths=(math.nan, 0.0), **changes) -> agent_pb2.LineSearchProbe:
    return agent_pb2.LineSearchProbe(
        **{"tokens": 128, "sharpness": 0.5, "half_width": 0.01} | changes,
        block_sharpness=wire.encode(blocks, "float64"),
        block_half_width=wire.encode(widths, "float64"),
    )


def preconditioned(**changes) -> agent_pb2.PreconditionedProbe:
    return agent_pb2.PreconditionedProbe(**{"tokens": 128, "ratio": 0.75, "residual": 0.01} | changes)


def attention(values=(math.nan, 0.5, math.nan), dtype="float32") -> agent_pb2.AttentionReading:
    return agent_pb2.AttentionReading(logit_scale=wire.encode(values, dtype))


def direction(
    descent=1.0, curvature=0.5, block_curvature=(math.nan, 0.25), parts=(0.125, 0.25, 0.125)
) -> agent_pb2.DirectionProbe:
    return agent_pb2.DirectionProbe(
        tokens=128,
        descent=descent,
        curvature=curvature,
        block_descent=wire.encode([0.5, 0.5], "float64"),
        block_curvature=wire.encode(block_curvature, "float64"),
        update_ratio=wire.encode([0.01, 0.01], "float32"),
        curvature_parts=wire.encode(parts, "float64"),
    )


def named(*names) -> list[types_pb2.LayerBlock]:
    rows = zip(LAYERS, [*names, *[()] * 3], strict=False)
    return [
        types_pb2.LayerBlock(block=b, layer=layer, parameters=n, parameter_names=own) for (b, layer, n), own in rows
    ]


HELLO = read_hello(hello())
NAMED = read_hello(hello(layer_blocks=named(["wte"], ["q", "k"], ["q2", "k2"])))


def test_a_hello_is_read():
    assert HELLO.blocks == BLOCKS
    assert HELLO.block_of.tolist() == [0, 1, 1]
    assert HELLO.block_parameters.tolist() == [40, 16]
    assert HELLO.lr_bounds == (0.1, 10)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"protocol": 99}, "got 99"),
        ({"blocks": []}, "blocks"),
        ({"blocks": ["emb", "emb", "qk"]}, "twice"),
        ({"blocks": ["emb", "attention"]}, "'attention'"),
        ({"blocks": ["emb", "qk", "vo"]}, "same blocks as"),
        ({"layer_blocks": []}, "layer_blocks"),
        ({"layer_blocks": [types_pb2.LayerBlock(block="emb", parameters=0)]}, "same blocks as"),
        ({"run": ""}, "run"),
        ({"run": "a\nb"}, "printable"),
        ({"attempt": "x" * 300}, "attempt"),
        ({"control": "everything"}, "control"),
        ({"min_multiplier": 0.0}, "bounds"),
        ({"max_multiplier": math.inf}, "bounds"),
        ({"min_multiplier": math.nan}, "bounds"),
        ({"sketch_size": 2**20}, "sketch_size"),
        ({"initial_step": -1}, "initial_step"),
        ({"layer_blocks": named(["x" * 254])}, "parameter_names"),
        ({"layer_blocks": named([f"{i:0200d}" for i in range(700)])}, "parameter_names must have .* at most .* bytes"),
        ({"layer_blocks": named([""] * 200_000)}, "parameter_names must have 1 to"),
    ],
)
def test_a_hello_that_breaks_the_contract_is_malformed(changes, says):
    with pytest.raises(WireError, match=says) as caught:
        read_hello(hello(**changes))
    assert caught.value.code == "malformed"


def test_parameters_are_named_where_the_agent_tells_them():
    assert NAMED.parameter_names == (("wte",), ("q", "k"), ("q2", "k2"))
    assert HELLO.parameter_names == ()
    assert NAMED.size == HELLO.size == 3
    assert read_hello(hello(layer_blocks=named(["x" * 200] * 2, ["y" * 200], ["z" * 200]))).size == 7
    told = tap(changed_parameter=([0, -1, 1], "int32"), non_finite_parameter=([-1, 1, -1], "int32"))
    layers = read_sample(NAMED, agent_pb2.Sample(sequence=1, tap=told)).layers
    assert layers.changed_parameter.tolist() == [0, -1, 1]
    assert layers.non_finite_parameter.tolist() == [-1, 1, -1]
    nothing = read_sample(NAMED, agent_pb2.Sample(sequence=1, tap=tap())).layers  # an agent of before
    unnamed = read_sample(HELLO, agent_pb2.Sample(sequence=1, tap=told)).layers  # of a model with too long names
    assert [len(each.changed_parameter) for each in (nothing, unnamed)] == [0, 0]


def test_gradients_of_zero_are_counted_also_where_no_names_are_told():
    told = tap(zero_gradients=([1, 0, 2], "int32"), zero_parameter=([0, -1, -1], "int32"))
    for hello_read, which in ((NAMED, [0, -1, -1]), (HELLO, [])):
        layers = read_sample(hello_read, agent_pb2.Sample(sequence=1, tap=told)).layers
        assert (layers.zero_gradients.tolist(), layers.zero_parameter.tolist()) == ([1, 0, 2], which)
    assert read_sample(NAMED, agent_pb2.Sample(sequence=1, tap=tap())).layers.zero_gradients.size == 0


@pytest.mark.parametrize("bad", [([0, -1, 2], "int32"), ([0, 0], "int32"), ([0, 0, 0], "int64")])
def test_counts_of_gradients_that_are_none_are_malformed(bad):
    with pytest.raises(WireError, match=r"tap\.zero_gradients") as caught:
        read_sample(NAMED, agent_pb2.Sample(sequence=1, tap=tap(zero_gradients=bad)))
    assert caught.value.code == "malformed"


@pytest.mark.parametrize("bad", [([0, -1, 2], "int32"), ([0, -2, 0], "int32"), ([0, 0], "int32"), ([0, 0, 0], "int64")])
def test_an_index_of_no_parameter_is_malformed(bad):
    with pytest.raises(WireError, match=r"tap\.changed_parameter") as caught:
        read_sample(NAMED, agent_pb2.Sample(sequence=1, tap=tap(changed_parameter=bad)))
    assert caught.value.code == "malformed"


def test_the_losses_of_ranks_are_read():
    sent = wire.encode([3.0, math.inf, math.nan], "float32")
    read = read_sample(HELLO, agent_pb2.Sample(sequence=1, rank_losses=sent)).rank_losses
    np.testing.assert_array_equal(read, np.array([3.0, math.inf, math.nan], dtype=np.float32))
    assert read_sample(HELLO, agent_pb2.Sample(sequence=1)).rank_losses is None
    for bad in (wire.encode([3.0], "float32"), wire.encode(np.ones(wire.MAX_RANKS + 1), "float32")):
        with pytest.raises(WireError, match="rank_losses must be of 2 to 1024 ranks"):
            read_sample(HELLO, agent_pb2.Sample(sequence=1, rank_losses=bad))


def test_a_nan_of_any_bits_is_a_nan_and_no_warning():
    signalling = b"\x01\x00\x80\x7f"
    sent = tap()
    sent.gradient_norm.data = signalling * 3
    parts = direction()
    parts.curvature_parts.data = b"\x01\x00\x00\x00\x00\x00\xf0\x7f" * 3
    reading = read_sample(HELLO, agent_pb2.Sample(sequence=1, tap=sent, direction=parts))
    assert np.isnan(reading.tap.gradient_norm).all()
    assert reading.dropped_probes == ("direction",)


def test_a_whole_sample_is_read():
    sample = agent_pb2.Sample(
        sequence=3,
        step=7,
        taken_at_unix_ns=2_000_000_000,
        loss=math.nan,  # a loss that is not a number is news, not an error
        tap=tap(),
        gnb=gnb(),
        direction=direction(),
        attention=attention(),
        hutchinson=hutchinson(),
        lanczos=lanczos(block="", method="autograd"),
        linesearch=linesearch(),
        preconditioned=preconditioned(method="gradient differences"),
        health=agent_pb2.AgentHealth(overhead_ratio=math.nan, step_seconds=0.1, dropped={"spool": 2}),
        results=[types_pb2.CommandResult(command_id="c", outcome=types_pb2.COMMAND_OUTCOME_APPLIED, step=7)],
        checkpoints=[types_pb2.Checkpoint(step=5, uri="file:///c")],
        deleted_checkpoints=["file:///b"],
    )
    reading = read_sample(HELLO, sample)
    assert (reading.sequence, reading.step, reading.taken_at) == (3, 7, 2.0)
    assert math.isnan(reading.loss)
    assert reading.tap.non_finite.tolist() == [0, 2]  # [B]
    assert reading.probes["gnb"].traces.shape == (2, 3)
    assert reading.probes["gnb"].sketches.shape == (2, 2, 64)
    assert reading.probes["gnb"].gradient_sketch.tolist() == np.ones((2, 64)).tolist()
    assert reading.probes["gradient_noise"].noise.tolist() == [0.5, 0.375]  # [B]
    assert (reading.probes["hutchinson"].block, reading.probes["hutchinson"].traces.tolist()) == ("qk", [-1.0, 6.0])
    assert reading.probes["lanczos"] == LanczosReading(128, "", 9.0, 0.5, -3.0, 1.0, "autograd")
    assert (reading.probes["linesearch"].sharpness, reading.probes["linesearch"].half_width) == (0.5, 0.01)
    assert reading.probes["linesearch"].block_sharpness[1] == 0.25
    assert reading.probes["preconditioned"] == PreconditionedReading(128, 0.75, 0.01, "gradient differences")
    assert math.isnan(reading.probes["direction"].block_curvature[0])
    assert reading.probes["direction"].curvature_parts.tolist() == [0.125, 0.375]  # [B]
    sample.direction.ClearField("curvature_parts")
    assert read_sample(HELLO, sample).probes["direction"].curvature_parts is None  # of older agents
    np.testing.assert_array_equal(reading.attention, [math.nan, 0.5, math.nan])
    assert reading.health.overhead_ratio is None
    assert reading.health.dropped == {"spool": 2}
    assert reading.results[0].outcome == "applied"
    assert reading.checkpoint_report == CheckpointReport((Checkpoint(5, "file:///c"),), ("file:///b",))
    sample.restored = True
    assert read_sample(HELLO, sample).checkpoint_report.restored_to == 7
    assert reading.dropped_probes == ()


@pytest.mark.parametrize(
    ("sample", "code"),
    [
        ({"sequence": 0}, "malformed"),
        ({"step": -1}, "malformed"),
        ({"step": 2**63 - 1}, "malformed"),
        ({"tap": tap(gradient_norm=([1.0, 2.0], "float32"))}, "malformed"),
        ({"tap": tap(gradient_norm=([1.0, 2.0, 3.0], "float64"))}, "malformed"),
        ({"tap": tap(non_finite=([0, -1, 0], "int64"))}, "malformed"),
        ({"tap": tap(non_finite=([0, 2**62, 0], "int64"))}, "malformed"),  # a sum of such would wrap
        ({"tap": tap(learning_rate=([0.1, math.nan, 0.1], "float32"))}, "non_finite"),
        ({"tap": tap(lr_multiplier=([1.0, math.inf, 1.0], "float32"))}, "non_finite"),
        ({"tap": agent_pb2.Tap()}, "malformed"),
        ({"gnb": gnb(traces=np.ones((wire.MAX_DRAWS + 1, 3)))}, "malformed"),
        ({"gnb": gnb(traces=[[1.0, -1.0, 1.0]])}, "malformed"),
        ({"gnb": gnb(sketches=np.ones((2, 2, 32)))}, "malformed"),
        ({"gnb": agent_pb2.GnbProbe(tokens=0, traces=wire.encode(np.ones((1, 3)), "float64"))}, "malformed"),
        ({"gnb": gnb(gradient=np.ones((2, 32)))}, "malformed"),
        ({"gnb": gnb(noise=np.ones(2))}, "malformed"),
        ({"direction": direction(block_curvature=(1.0, 1.0, 1.0))}, "malformed"),
        ({"direction": direction(parts=(1.0, 1.0))}, "malformed"),
        ({"hutchinson": hutchinson(block="vo")}, "malformed"),
        ({"hutchinson": hutchinson(block="")}, "malformed"),
        ({"hutchinson": hutchinson(block="emb")}, "malformed"),  # its traces are of another block
        ({"hutchinson": hutchinson(traces=np.zeros((wire.MAX_DRAWS + 1, 3)))}, "malformed"),
        ({"hutchinson": hutchinson(traces=np.zeros((0, 3)))}, "malformed"),
        ({"hutchinson": hutchinson(traces=((0.0, 1.0),))}, "malformed"),
        ({"hutchinson": hutchinson(tokens=0)}, "malformed"),
        ({"hutchinson": hutchinson(method="x" * 300)}, "malformed"),
        ({"lanczos": lanczos(block="attention")}, "malformed"),
        ({"lanczos": lanczos(top_residual=-1.0)}, "malformed"),
        ({"lanczos": lanczos(bottom=9.5)}, "malformed"),
        ({"lanczos": lanczos(tokens=2**63)}, "malformed"),
        ({"linesearch": linesearch(blocks=(0.5,))}, "malformed"),
        ({"linesearch": linesearch(blocks=(-0.5, 1.0))}, "malformed"),
        ({"linesearch": linesearch(sharpness=-0.5)}, "malformed"),
        ({"linesearch": linesearch(half_width=-0.5)}, "malformed"),
        ({"preconditioned": preconditioned(residual=-0.5)}, "malformed"),
        ({"preconditioned": preconditioned(tokens=0)}, "malformed"),
        ({"attention": attention(values=(math.nan, 0.5))}, "malformed"),
        ({"attention": attention(dtype="float64")}, "malformed"),
        ({"attention": attention(values=(math.nan, -0.5, 0.5))}, "malformed"),
        ({"attention": attention(values=(0.5, 0.5, 0.5))}, "malformed"),  # the first is no qk
        ({"attention": agent_pb2.AttentionReading()}, "malformed"),
        ({"results": [types_pb2.CommandResult(command_id="c")]}, "malformed"),
        ({"checkpoints": [types_pb2.Checkpoint(step=1, uri="u")] * (wire.MAX_ITEMS + 1)}, "malformed"),
        (
            {"results": [types_pb2.CommandResult(command_id="c", outcome="COMMAND_OUTCOME_APPLIED", step=2**63 - 1)]},
            "malformed",
        ),
        ({"checkpoints": [types_pb2.Checkpoint(step=2**63 - 1, uri="u")]}, "malformed"),
        ({"checkpoints": [types_pb2.Checkpoint(step=1, uri="u" * 5000)]}, "malformed"),
        ({"deleted_checkpoints": ["u"] * (wire.MAX_ITEMS + 1)}, "malformed"),
        ({"deleted_checkpoints": ["u" * 5000]}, "malformed"),
    ],
)
def test_a_sample_that_breaks_the_contract_is_refused(sample, code):
    with pytest.raises(WireError) as caught:
        read_sample(HELLO, agent_pb2.Sample(**{"sequence": 1, "step": 1} | sample))
    assert caught.value.code == code


def test_the_highest_sequence_is_the_highest_that_the_journal_holds():
    assert read_sample(HELLO, agent_pb2.Sample(sequence=2**63 - 1, step=1)).sequence == 2**63 - 1
    with pytest.raises(WireError, match=r"sequence must be 1 to 2\*\*63 - 1, got 9223372036854775808"):
        read_sample(HELLO, agent_pb2.Sample(sequence=2**63, step=1))


def test_claimed_bytes_are_checked_before_anything_is_made_of_them():
    lie = types_pb2.Array(dtype="float64", shape=[2**31, 3], data=b"")
    with pytest.raises(WireError, match="0 bytes, expected"):
        read_sample(HELLO, agent_pb2.Sample(sequence=1, step=1, gnb=agent_pb2.GnbProbe(tokens=1, traces=lie)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_probe_that_is_not_finite_is_dropped_alone(bad):
    sketches = np.ones((2, 2, 64))
    sketches[1, 1, 5] = bad
    sample = agent_pb2.Sample(
        sequence=1, step=1, loss=2.0, tap=tap(), gnb=gnb(sketches=sketches), direction=direction(descent=bad)
    )
    reading = read_sample(HELLO, sample)
    assert not reading.probes
    assert reading.dropped_probes == ("gnb", "direction")
    assert reading.tap is not None


@pytest.mark.parametrize(
    "probe",
    [
        {"gnb": gnb(gradient=np.full((2, 64), math.nan))},
        {"hutchinson": hutchinson(traces=((0.0, math.inf, 1.0),))},
        {"lanczos": lanczos(bottom=math.nan)},
        {"lanczos": lanczos(top_residual=math.inf)},
        {"linesearch": linesearch(sharpness=math.inf)},
        {"linesearch": linesearch(blocks=(math.nan, math.inf))},
        {"preconditioned": preconditioned(ratio=math.nan)},
    ],
)
def test_each_kind_of_probe_is_dropped_where_it_says_nothing(probe):
    (name,) = probe
    reading = read_sample(HELLO, agent_pb2.Sample(sequence=1, step=1, **probe))
    assert name not in reading.probes
    assert reading.dropped_probes == (name,)


@pytest.mark.parametrize("probes", [[], ["gnb"]])
def test_the_gradient_noise_of_an_older_agent_is_read_from_its_gnb_probe(probes):
    greeting = read_hello(hello(probes=probes))
    older = gnb()
    older.ClearField("gradient_noise")
    for probe in (older, gnb(noise=(math.inf, 1.0, 1.0))):
        reading = read_sample(greeting, agent_pb2.Sample(sequence=1, step=1, gnb=probe))
        assert reading.probes["gradient_noise"].noise is None
        assert reading.dropped_probes == ()
    reading = read_sample(greeting, agent_pb2.Sample(sequence=1, step=1, gnb=gnb(noise=(-1.0, math.nan, 1.0))))
    np.testing.assert_array_equal(reading.probes["gradient_noise"].noise, [-1.0, math.nan])


def test_a_gradient_noise_of_its_own_is_read_by_block_and_no_gnb_probe_takes_its_place():
    greeting = read_hello(hello(probes=["gnb", "gradient_noise"]))
    for noise, seen in (([-1.0, math.nan, 1.0], [-1.0, math.nan]), ([0.5, 0.25, 0.125], [0.5, 0.375])):
        own = agent_pb2.GradientNoiseProbe(noise=wire.encode(noise, "float32"))
        reading = read_sample(greeting, agent_pb2.Sample(sequence=1, step=1, gradient_noise=own))
        np.testing.assert_array_equal(reading.probes["gradient_noise"].noise, seen)
    nothing = agent_pb2.Sample(sequence=1, step=1, gradient_noise=agent_pb2.GradientNoiseProbe())
    assert read_sample(greeting, nothing).probes["gradient_noise"].noise is None
    assert set(read_sample(greeting, agent_pb2.Sample(sequence=1, step=1, gnb=gnb())).probes) == {"gnb"}
    infinite = agent_pb2.GradientNoiseProbe(noise=wire.encode([math.inf, 1.0, 1.0], "float32"))
    reading = read_sample(greeting, agent_pb2.Sample(sequence=1, step=1, gradient_noise=infinite))
    assert (dict(reading.probes), reading.dropped_probes) == ({}, ("gradient_noise",))


def test_an_infinite_scale_of_attention_is_left_out_alone():
    sample = agent_pb2.Sample(sequence=1, step=1, gnb=gnb(), attention=attention(values=(math.nan, math.inf, 0.5)))
    reading = read_sample(HELLO, sample)
    assert reading.attention is None
    assert "gnb" in reading.probes


def test_a_scale_that_is_kept_keeps_no_message():
    sample = agent_pb2.Sample(sequence=1, step=1, attention=attention())
    assert read_sample(HELLO, sample).attention.base is None


def test_a_sketch_too_large_to_be_squared_is_dropped_before_it_spoils_what_it_is_estimated_with():
    reading = read_sample(HELLO, agent_pb2.Sample(sequence=1, step=1, gnb=gnb(sketches=np.full((2, 2, 64), 1e20))))
    assert (dict(reading.probes), reading.dropped_probes) == ({}, ("gnb",))


def test_settings_of_all_parameter_groups_together_are_limited():
    def groups(count: int) -> agent_pb2.Sample:
        settings = {f"setting {number}": 1.0 for number in range(250)}
        made = [agent_pb2.OptimizerGroup(group=group, settings=settings) for group in range(count // 250)]
        made.append(
            agent_pb2.OptimizerGroup(group=len(made), settings=dict.fromkeys(map(str, range(count % 250)), 1.0))
        )
        return agent_pb2.Sample(sequence=1, optimizer_groups=made)

    assert len(read_sample(HELLO, groups(MAX_SETTINGS)).optimizer_groups) == MAX_SETTINGS // 250 + 1
    with pytest.raises(WireError, match=f"at most {MAX_SETTINGS} settings in all"):
        read_sample(HELLO, groups(MAX_SETTINGS + 1))


def test_a_reading_of_numbers_whose_sum_is_not_finite_is_dropped():
    large = hutchinson(block="qk", traces=((0.0, 1.7e308, 1.7e308),))
    reading = read_sample(HELLO, agent_pb2.Sample(sequence=1, hutchinson=large))
    assert (dict(reading.probes), reading.dropped_probes) == ({}, ("hutchinson",))
