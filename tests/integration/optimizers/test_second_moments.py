"""The tap's update RMS is that of the optimizer's own second moment, or there is none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from small_llama import ELEMENTWISE, RATE, SCHEDULE_FREE, backward, imported, llama, matrices_and_rest, torchs

import sharpwatch

FLOOR_SHARE = 0.1  # v̂ counts as no less than this share of its mean, in one parameter at the step before
STEPS = 5


@pytest.fixture(autouse=True)
def _eager():
    """torchao compiles a step for each shape; the arithmetic is the same without."""
    with torch.compiler.set_stance("force_eager"):
        yield


def taps(transports, model, optimizers, steps=STEPS):
    """[steps, layer blocks] of update RMS, and each step's gradients by name."""
    watch = sharpwatch.attach(model, optimizers, training_job="moments", transport=transports.new(), probes=())
    gradients = []
    for number in range(1, steps + 1):
        backward(model, number)
        gradients.append({name: p.grad.double().clone() for name, p in model.named_parameters()})
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.step()
    watch.close()
    read = [
        np.frombuffer(sample.tap.update_rms.data, "<f4") for sample in transports[-1].samples if sample.HasField("tap")
    ]
    assert len(read) == steps
    return np.array(read), gradients


def by_hand(model, gradients, moments):
    """[steps, layer blocks] of √mean(g²/max(v̂, floor)); `moments(name)` yields v̂ after 1, 2, ... steps."""
    block_map = sharpwatch.classify(model)
    place = {(block.layer, block.type): i for i, block in enumerate(block_map.layer_blocks)}
    sums, counts = np.full((len(gradients), len(place)), 0.0), np.zeros(len(place))
    sums[0] = math.nan
    for row in block_map.rows:
        column = place[row.layer, row.type]
        counts[column] += row.numel
        seconds = moments([step[row.parameter] for step in gradients])
        floor = None
        for number in range(1, len(gradients)):
            second = seconds[number - 1]
            least = FLOOR_SHARE * (floor or second.mean().item())
            squares = gradients[number][row.parameter].square()
            sums[number, column] += (squares / second.clamp_min(least)).sum().item()
            floor = second.mean().item()
    return np.sqrt(sums / counts)


def adams(beta, *, largest=False):
    """v̂ of gradients after each step: their exponential mean, corrected for its start."""

    def moments(gradients):
        value, top, corrected = torch.zeros_like(gradients[0]), torch.zeros_like(gradients[0]), []
        for count, gradient in enumerate(gradients, 1):
            value = beta * value + (1 - beta) * gradient.square()
            top = torch.maximum(top, value) if largest else value
            corrected.append(top / (1 - beta**count))
        return corrected

    return moments


def rmsprops(beta):
    def moments(gradients):
        return [mean * (1 - beta**count) for count, mean in enumerate(adams(beta)(gradients), 1)]

    return moments


KNOWN = {
    "adamw": (torchs("AdamW", betas=(0.9, 0.95)), adams(0.95)),
    "adam amsgrad": (torchs("Adam", betas=(0.9, 0.9), amsgrad=True), adams(0.9, largest=True)),
    "adamw fused": (torchs("AdamW", fused=True), adams(0.999)),
    "rmsprop": (torchs("RMSprop", alpha=0.9, lr=1e-3), rmsprops(0.9)),
    "schedule-free adamw": (SCHEDULE_FREE["adamw"], adams(0.999)),
    "schedule-free radam": (SCHEDULE_FREE["radam"], adams(0.999)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_update_rms_is_that_of_the_definition(transports, name):
    make, moments = KNOWN[name]
    model = llama()
    optimizer = make(model.parameters())
    if "schedule-free" in name:
        optimizer.train()
    read, gradients = taps(transports, model, optimizer)
    # float32 against float64: a moment is rounded three times a step, by 2^-24 of it each; the rest is smaller.
    np.testing.assert_allclose(read, by_hand(model, gradients, moments), rtol=3 * STEPS * 2**-24)


def adam_mini(model):
    kind = imported("adam_mini", "Adam_mini")
    return kind(model.named_parameters(), lr=RATE, dim=64, n_heads=2, n_kv_heads=1, verbose=False)


def muon_and_adamw(model):
    matrices, rest = matrices_and_rest(model)
    return [torchs("Muon")(matrices), torchs("AdamW")(rest)]


NONE = {
    "lion": lambda model: ELEMENTWISE["lion"](model.parameters()),
    "adafactor": lambda model: ELEMENTWISE["adafactor"](model.parameters()),
    "transformers' adafactor": lambda model: ELEMENTWISE["transformers' adafactor"](model.parameters()),
    "bitsandbytes 8 bit": lambda model: ELEMENTWISE["bitsandbytes 8 bit"](model.parameters()),
    "adam mini": adam_mini,
    "prodigy": lambda model: imported("prodigyopt", "Prodigy")(model.parameters()),
    "sgd": lambda model: ELEMENTWISE["sgd nesterov"](model.parameters()),
}


@pytest.mark.parametrize("name", NONE)
def test_where_no_moment_is_the_gradients_own_nothing_is_reported(transports, name):
    model = llama()
    read, _ = taps(transports, model, NONE[name](model))
    assert np.isnan(read).all()


def test_beside_muon_what_adamw_holds_has_its_own_moment(transports):
    model = llama()
    read, _ = taps(transports, model, muon_and_adamw(model))
    known = {block.block for block, value in zip(transports[0].hello.layer_blocks, read[-1], strict=True) if value > 0}
    assert known == {"emb", "norm", "head"}


def test_a_quantised_moment_is_not_read(transports):
    model = llama()
    optimizer = ELEMENTWISE["torchao 8 bit"](model.parameters())
    read, _ = taps(transports, model, optimizer)
    assert type(optimizer.state[model.model.layers[0].mlp.up_proj.weight]["exp_avg_sq"]) is not torch.Tensor
    # What torchao leaves in float32, for it is small: the embedding and the head have 2048 entries, a norm has 64. Of
    # qk and vo it leaves a part, which does not speak for the block.
    known = {block.block for block, value in zip(transports[0].hello.layer_blocks, read[-1], strict=True) if value > 0}
    assert known == {"emb", "norm", "head"}
