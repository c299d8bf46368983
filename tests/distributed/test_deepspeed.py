"""DeepSpeed's own optimizers under watch: what is shown is what the definitions make of all ranks' batches."""

from __future__ import annotations

import importlib.util
import logging
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.append(str(Path(__file__).parents[1]))
from missing import missing

import sharpwatch
from sharpwatch.agent.statistics.reductions import FLOOR_SHARE
from sharpwatch.errors import AttachError
from sharpwatch.testing import InMemoryTransport
from sharpwatch.v1 import types_pb2
from sharpwatch.wire import decode

RATES, DECAY = {True: 1e-3, False: 2e-3}, 0.1  # of matrices, and of all else
BETA, CLIP = 0.95, 0.5
STEPS = 8
PROBES = ("gnb", "direction", "gradient_noise")
BF16, FP16 = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True, "initial_scale_power": 21, "hysteresis": 1}}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "float16"}}


def zero(stage, **options):
    return {"zero_optimization": {"stage": stage, **options}}


# What stands in the configuration beside what is common to all.
CONFIGS = {
    "zero 0": {"gradient_accumulation_steps": 2},
    "zero 0 ordered": {},
    "zero 0 bf16": BF16,
    "zero 1": zero(1) | {"gradient_accumulation_steps": 2},
    "zero 1 bf16": zero(1) | BF16 | {"data_types": {"grad_accum_dtype": "fp32"}},
    "zero 2": zero(2),
    "zero 2 fp16": zero(2) | FP16,
    "zero 2 offloaded": zero(2, offload_optimizer={"device": "cpu", "pin_memory": False}) | BF16,
    "zero 2 round robin": zero(2, round_robin_gradients=True),
    "zero 1 autocast to fp16": zero(1) | AUTOCAST | {"gradient_clipping": 0.0},
    "zero 1 autocast to fp16, clipped": zero(1) | AUTOCAST,
    "zero 2 muon": zero(2) | {"optimizer": {"type": "Muon", "params": {"lr": 1e-3, "torch_adam": True}}},
    "zero 3": zero(3),
}
WATCHED = [name for name in CONFIGS if name not in {"zero 0 ordered", "zero 3"}]
# An entry in half precision is rounded a few times, by 2^-9 of it at most (fp16: 2^-11, but near 0); in float32 it is
# the order of sums that differs.
HALF, SINGLE = 1e-2, 1e-5


def gpt2():
    torch.manual_seed(0)
    size = {"vocab_size": 32, "n_positions": 8, "n_embd": 12, "n_layer": 1, "n_head": 2}
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**size, **drop, bos_token_id=0, eos_token_id=0))


def rate_of(parameter):
    return RATES[parameter.ndim == 2]


def made(config):
    import deepspeed  # noqa: PLC0415 - on ranks alone

    deepspeed.ops.__compatible_ops__.clear()  # else it compiles an all-reduce of its own for this machine
    # Every CPU does fp16; DeepSpeed takes it from those alone that have instructions for it.
    deepspeed.get_accelerator().is_fp16_supported = lambda: True
    model = gpt2()
    groups = [
        {"params": [p for p in model.parameters() if rate_of(p) == rate], "lr": rate, "weight_decay": DECAY * matrices}
        for matrices, rate in RATES.items()
    ]
    common = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": CLIP,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": (0.9, BETA), "torch_adam": True}},
    }
    engine, optimizer, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=common | config)
    return engine, optimizer


def loss_of(model, turn, micro, rank):
    tokens = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(1000 * turn + 10 * micro + rank))
    return model(input_ids=tokens, labels=tokens).loss


class Reference:
    """What a step on all ranks' batches is made of, in float64 but for forward and backward."""

    def __init__(self, model, micro_batches, clip, *, summed):
        self.clip = clip or math.inf
        self.model = gpt2().to(next(model.parameters()).dtype)
        self.map = sharpwatch.classify(self.model)
        self.batches = [(micro, rank) for micro in range(micro_batches) for rank in range(dist.get_world_size())]
        # A reading sets the floors of the next; on several ranks a step later, and where they add it up, after it has
        # gone round.
        self.behind = 1 if dist.get_world_size() == 1 else 4 if summed else 2
        self.moments = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in self.model.named_parameters()}
        self.floors = []  # by step, then by part
        self.steps = []

    def by_layer(self, of):
        sums = np.zeros(len(self.map.layer_blocks))
        for part, layer in zip(self.map.parts, self.map.layer_block_of, strict=True):
            sums[layer] += of(part)
        return sums

    def clipped(self, model, turn):
        """The gradient of `turn` at the weights of `model`, which are looked at from here on."""
        self.model.load_state_dict(model.state_dict())
        parameters = dict(self.model.named_parameters())
        losses = (loss_of(self.model, turn, *batch) for batch in self.batches)
        found = [torch.autograd.grad(loss, list(parameters.values())) for loss in losses]
        means = [torch.stack([g.double() for g in each]).mean(0) for each in zip(*found, strict=True)]
        norm = math.sqrt(sum(mean.square().sum() for mean in means))
        return {name: mean * min(1.0, self.clip / norm) for name, mean in zip(parameters, means, strict=True)}

    def step(self, gradients):
        """Note norms, RMS_t and rates by layer block of a step with `gradients`."""
        parameters = dict(self.model.named_parameters())
        correction = 1 - BETA ** len(self.steps)
        means = {part: part.view(self.moments[part.parameter]).mean() for part in self.map.parts}
        self.floors.append(
            {part: FLOOR_SHARE * mean / correction for part, mean in means.items()} if correction else {}
        )
        floors = self.floors[max(0, len(self.steps) - self.behind)]

        def scaled(part):
            second = part.view(self.moments[part.parameter]) / correction
            return (part.view(gradients[part.parameter]).square() / second.clamp_min(floors[part])).sum()

        numel = self.by_layer(lambda part: part.numel)
        self.steps.append(
            {
                "gradient_norm": np.sqrt(self.by_layer(lambda p: p.view(gradients[p.parameter]).square().sum())),
                "weight_norm": np.sqrt(
                    self.by_layer(lambda p: p.view(parameters[p.parameter].detach()).double().square().sum())
                ),
                "update_rms": np.sqrt(self.by_layer(scaled) / numel) if floors else None,
                "learning_rate": self.by_layer(lambda p: p.numel * rate_of(parameters[p.parameter])) / numel,
            }
        )
        for name, gradient in gradients.items():
            self.moments[name] = BETA * self.moments[name] + (1 - BETA) * gradient.square()


def watched():
    """By configuration, what this rank logged and sampled, and what it should have been."""
    with torch.compiler.set_stance("force_eager"):  # Muon's update is compiled, which takes longer than all the rest
        return {name: trained(config, ordered=name != "zero 0") for name, config in CONFIGS.items()}


def trained(config, *, ordered):
    transport, logged = InMemoryTransport(), []
    listener = logging.Handler()
    listener.emit = lambda record: logged.append(record.getMessage())
    logging.getLogger("sharpwatch").addHandler(listener)
    (ours, optimizer), (theirs, _) = made(config), made(config)
    try:
        watch = sharpwatch.attach(
            ours.module, optimizer, training_job="deepspeed", transport=transport, probe_every=3, probes=PROBES
        )
    except AttachError as error:
        return {"refused": str(error)}
    if transport.hello and ordered:
        chosen = types_pb2.MultiplierSet(multipliers={"ffn": 0.5}, revision=1)
        transport.command(id="cut", apply_at_step=2, set_multipliers=chosen)
    micro_batches, clip = config.get("gradient_accumulation_steps", 1), config.get("gradient_clipping", CLIP)
    reference = Reference(ours.module, micro_batches, clip, summed=ordered)
    turn = 0
    while len(reference.steps) < STEPS:
        gradients, void = reference.clipped(ours.module, turn), ours.skipped_steps
        for micro in range(micro_batches):
            for engine in (ours, theirs):
                engine.backward(loss_of(engine, turn, micro, dist.get_rank()))
                engine.step()
        if ours.skipped_steps == void:
            reference.step(gradients)
        turn += 1
    taken = watch.step
    watch.close()
    logging.getLogger("sharpwatch").removeHandler(listener)
    found = {
        "logged": logged,
        "steps": taken,
        "void": turn - STEPS,
        "same": all(map(torch.equal, ours.module.parameters(), theirs.module.parameters())),
    }
    for engine in (ours, theirs):
        engine.destroy()
    if not transport.hello:
        return found
    samples = transport.samples
    shape = (len(reference.map.layer_blocks),)
    names = ("gradient_norm", "weight_norm", "update_rms", "learning_rate", "lr_multiplier")
    taps = [sample.tap for sample in samples if sample.HasField("tap")]
    probes = [sample.gnb for sample in samples if sample.HasField("gnb")]

    def reading(tap):
        found = {name: decode(getattr(tap, name), name=name, dtype="float32", shape=shape).copy() for name in names}
        found["gradient_norm"] *= tap.clip_factor if tap.HasField("clip_factor") else 1.0  # as it was stepped on
        return found

    return found | {
        "optimizer": transport.hello.optimizer,
        "results": [result.detail for result in transport.results],
        "taps": list(map(reading, taps)),
        "non_finite": [decode(tap.non_finite, name="n", dtype="int64", shape=shape).sum().item() for tap in taps],
        "truth": reference.steps,
        "probes": len(probes),
        "sketches": sum(probe.HasField("gradient_sketch") for probe in probes),
        "noises": [
            np.frombuffer(sample.gradient_noise.noise.data, "<f4") for sample in samples if sample.HasField("gnb")
        ],
        "swallowed": samples[-1].health.swallowed_errors,
    }


@pytest.fixture(scope="module", params=[1, 2])
def run(request, ranks):
    """What each rank found, of one and of two."""
    if importlib.util.find_spec("deepspeed") is None:
        missing("deepspeed")
    return ranks(watched, request.param, timeout=240)


@pytest.fixture
def leading(run):
    """What the rank found that speaks for all."""
    return run[0]


UNREADABLE = {
    "zero 2 round robin": "round_robin_gradients",
    "zero 1 autocast to fp16": "torch_autocast in fp16",
    "zero 1 autocast to fp16, clipped": "torch_autocast in fp16",
    "zero 2 muon": "Muon",
}


def rms_is_known(name):
    return name != "zero 0 bf16" and name not in UNREADABLE


@pytest.mark.parametrize("name", WATCHED)
def test_norms_rates_and_rms_are_those_of_the_whole_step(leading, name):
    found = leading[name]
    half = any(word in name for word in ("bf16", "fp16", "offloaded"))
    compared = ["weight_norm", "learning_rate", *([] if name in UNREADABLE else ["gradient_norm"])]
    for tap, truth in zip(found["taps"], found["truth"], strict=True):
        for quantity in compared:
            np.testing.assert_allclose(tap[quantity], truth[quantity], rtol=HALF if half else SINGLE)
        if rms_is_known(name) and truth["update_rms"] is not None:
            np.testing.assert_allclose(tap["update_rms"], truth["update_rms"], rtol=HALF if half else SINGLE)
    assert sum(found["non_finite"]) == 0


@pytest.mark.parametrize("name", WATCHED)
def test_what_cannot_be_read_is_not_shown_and_logged_at_attach(run, leading, name):
    logged_at_attach = (
        [f"gradient norms are not readable: DeepSpeed's ZeRO with {UNREADABLE[name]}"] if name in UNREADABLE else []
    )
    for each in run:
        logged = [line for line in each[name]["logged"] if line.startswith("gradient norms")]
        assert logged == logged_at_attach
    for tap in leading[name]["taps"]:
        assert np.isnan(tap["gradient_norm"]).all() == (name in UNREADABLE)
        assert np.isnan(tap["update_rms"]).all() or rms_is_known(name)


@pytest.mark.parametrize("name", WATCHED)
def test_a_watched_run_is_the_same_to_the_bit(run, leading, name):
    assert all(each[name]["same"] for each in run)
    assert leading[name]["swallowed"] == 0
    assert leading[name]["probes"] > 0


def test_steps_that_find_the_loss_scaled_too_far_do_not_count(run):
    for each in run:
        assert each["zero 2 fp16"]["void"] > 0
        assert {name: each[name]["steps"] for name in WATCHED} == dict.fromkeys(WATCHED, STEPS)


def test_rates_are_changed_in_torchs_own_optimizer_alone(run, leading):
    for name in ("zero 1", "zero 2", "zero 0 bf16", "zero 1 bf16"):
        (detail,) = leading[name]["results"]
        assert detail.endswith("DeepSpeed keeps gradients, master weights and their groups to itself")
        assert any(detail.removeprefix("learning rates can't be changed: ") in line for line in leading[name]["logged"])
    ordered = leading["zero 0 ordered"]
    assert ordered["results"] == [""]
    assert sorted(set(ordered["taps"][-1]["lr_multiplier"])) == [0.5, 1.0]
    assert not any(each["zero 0 ordered"]["same"] for each in run)


def test_gradients_are_only_sketched_where_they_stand_with_the_parameters(leading):
    assert {name for name in WATCHED if leading[name]["sketches"]} == {"zero 0", "zero 0 bf16"}


def test_the_noise_of_one_process_is_that_of_torchs_own_optimizer(run, leading):
    finite = {name: [noise for noise in leading[name]["noises"] if np.isfinite(noise).any()] for name in WATCHED}
    if len(run) > 1:
        assert not any(finite.values())
        return
    assert {name for name, noises in finite.items() if noises} == {"zero 0", "zero 1"}  # of two micro-batches
    # Rounded differently, weights part: by their rate where a gradient of 0 is rounded to both sides of it.
    np.testing.assert_allclose(finite["zero 1"], finite["zero 0"], rtol=1e-3)


def test_zero_3_is_refused_on_every_rank(run):
    for each in run:
        assert "partitioned by DeepSpeed's ZeRO-3" in each["zero 3"]["refused"]
