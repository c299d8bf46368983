from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from sharpwatch.agent.statistics.reductions import (
    FLOOR_SHARE,
    NON_FINITE,
    SCALED,
    PartTensors,
    Scratch,
    device_sums,
    host_sums,
)
from sharpwatch.agent.statistics.tap import Tap
from sharpwatch.blocks import Rule, Rules, classify


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config)


def backward(net, step=0):
    tokens = torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(step))
    net.zero_grad()
    net(input_ids=tokens, labels=tokens).loss.backward()


def read(net, optimizers, tap=None, multipliers=None):
    tap = tap or Tap(classify(net), dict(net.named_parameters()), optimizers)
    pending = tap.start(multipliers or {})
    for which in range(len(optimizers)):
        tap.read(pending, which)
    return tap.resolve(pending)


def by_layer_block(block_map, values):
    """Sums of a float64 number a part, [L], one part at a time."""
    sums = np.zeros(len(block_map.layer_blocks))
    for part, layer_block in zip(block_map.parts, block_map.layer_block_of, strict=True):
        sums[layer_block] += values(part)
    return sums


def test_norms_are_those_of_the_layer_blocks():
    net = gpt2()
    block_map = classify(net)
    backward(net)
    reading = read(net, [torch.optim.SGD(net.parameters(), lr=0.1)])
    parameters = dict(net.named_parameters())
    weights = by_layer_block(block_map, lambda p: p.view(parameters[p.parameter].detach()).double().square().sum())
    gradients = by_layer_block(block_map, lambda p: p.view(parameters[p.parameter].grad).double().square().sum())
    np.testing.assert_allclose(reading.weight_norm, np.sqrt(weights), rtol=1e-5)
    np.testing.assert_allclose(reading.gradient_norm, np.sqrt(gradients), rtol=1e-5)
    assert (reading.non_finite == 0).all()
    assert np.isnan(reading.update_rms).all()  # SGD has no second moment


def expected_rms(net, optimizer, floors):
    """The definition, entry by entry, in float64. `floors` by part."""
    block_map = classify(net)
    parameters = dict(net.named_parameters())
    beta = optimizer.param_groups[0]["betas"][1]
    numbers = iter(range(len(block_map.parts)))

    def scaled(part):
        parameter = parameters[part.parameter]
        state = optimizer.state[parameter]
        second = part.view(state["exp_avg_sq"]).double() / (1 - beta ** float(state["step"]))
        return (part.view(parameter.grad).double().square() / second.clamp_min(floors[next(numbers)])).sum()

    return np.sqrt(by_layer_block(block_map, scaled) / [block.numel for block in block_map.layer_blocks])


def mean_second_moments(net, optimizer):
    parameters = dict(net.named_parameters())
    beta = optimizer.param_groups[0]["betas"][1]
    return [
        float(part.view(optimizer.state[parameters[part.parameter]]["exp_avg_sq"]).double().mean())
        / (1 - beta ** float(optimizer.state[parameters[part.parameter]]["step"]))
        for part in classify(net).parts
    ]


def test_update_rms_uses_the_second_moment_before_the_step_and_the_last_floor():
    net = gpt2()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, betas=(0.9, 0.95))
    tap = Tap(classify(net), dict(net.named_parameters()), [optimizer])
    backward(net)
    assert np.isnan(read(net, [optimizer], tap).update_rms).all()  # absent at the first step
    optimizer.step()
    backward(net, 1)
    floors = [FLOOR_SHARE * mean for mean in mean_second_moments(net, optimizer)]
    np.testing.assert_allclose(read(net, [optimizer], tap).update_rms, expected_rms(net, optimizer, floors), rtol=1e-4)
    optimizer.step()
    backward(net, 2)  # from now on the floor is that of the read before
    np.testing.assert_allclose(read(net, [optimizer], tap).update_rms, expected_rms(net, optimizer, floors), rtol=1e-4)


def test_the_floor_keeps_a_rare_row_from_ruling_the_mean():
    # 63 rows that Adam knows, with g^2 = v: RMS 1. One that it has never seen, with the same gradient.
    weight = torch.ones(64, 8)
    second = torch.ones(64, 8)
    second[0] = 0.0
    gradient = torch.ones(64, 8)
    part = PartTensors(weight, gradient, second, 1.0, FLOOR_SHARE * float(second.mean()))
    scaled = host_sums([part], Scratch())[0, SCALED] / 512
    assert scaled == pytest.approx((63 + 1 / (FLOOR_SHARE * 63 / 64)) / 64)
    assert scaled < 1.2


def test_non_finite_entries_are_counted_and_the_rest_still_measured():
    net = gpt2()
    block_map = classify(net)
    backward(net)
    gradient = net.transformer.h[1].attn.c_attn.weight.grad  # fused: q, k, v side by side
    optimizer = torch.optim.AdamW(net.parameters())
    before = read(net, [optimizer])
    gradient[3, 2] = math.inf  # in q
    gradient[5, 33] = math.nan  # in v
    gradient[6, 34] = -math.inf
    reading = read(net, [optimizer])
    rows = [(block.layer, block.type) for block in block_map.layer_blocks]
    layer = next(layer for layer, _ in rows if layer and layer.endswith(".1"))
    counts = dict(zip(rows, reading.non_finite.tolist(), strict=True))
    assert counts.pop((layer, "qk")) == 1
    assert counts.pop((layer, "vo")) == 2
    assert set(counts.values()) == {0}
    assert np.isfinite(reading.gradient_norm).all()
    assert (reading.gradient_norm <= before.gradient_norm).all()


class Odd(nn.Module):
    """Parameters of no entries, in the midst and at the end; complex ones; codes of a frozen, quantised weight."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(5, 8)
        self.norms = nn.ParameterList([nn.Parameter(torch.empty(size)) for size in (0, 3)])
        self.phase = nn.Parameter(torch.randn(8, 600, dtype=torch.complex64))
        self.codes = nn.Parameter(torch.arange(16, dtype=torch.uint8), requires_grad=False)
        self.lm_head = nn.Linear(8, 5)
        self.none = nn.Parameter(torch.empty(0, 5))


def test_parameters_that_are_empty_complex_or_codes():
    torch.manual_seed(0)
    net = Odd()
    others = Rules((Rule("*", block="other"),))
    block_map = classify(net, others)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01, foreach=False)
    for parameter in net.parameters():
        if parameter.requires_grad:
            nn.init.ones_(parameter)
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    reading = read(net, [optimizer], Tap(block_map, dict(net.named_parameters()), [optimizer]))
    trained = [p for p in net.parameters() if p.requires_grad]
    squares = [
        sum(float(t.detach().abs().double().square().sum()) for t in of) for of in (trained, [p.grad for p in trained])
    ]
    assert float(reading.weight_norm.sum()) == pytest.approx(math.sqrt(squares[0]), rel=1e-5)
    assert float(reading.gradient_norm.sum()) == pytest.approx(math.sqrt(squares[1]), rel=1e-5)
    assert np.isfinite(reading.update_rms).all()
    assert (reading.non_finite == 0).all()


def test_a_sum_that_overflows_float32_is_no_damage():
    net = nn.Linear(4, 4, bias=False)
    part = PartTensors(net.weight.detach(), torch.full((4, 4), 1e30))
    sums = host_sums([part], Scratch())[0]
    assert sums[0] == pytest.approx(16e60, rel=1e-6)
    assert sums[NON_FINITE] == 0


def test_real_rates_are_parameter_weighted_over_what_an_optimizer_holds():
    net = gpt2()
    block_map = classify(net)
    attention = net.transformer.h[0].attn
    rest = [p for p in net.parameters() if p is not attention.c_proj.weight and p is not net.transformer.wpe.weight]
    optimizers = [
        torch.optim.SGD([{"params": rest}], lr=0.1),
        torch.optim.AdamW([attention.c_proj.weight], lr=0.01),
    ]
    backward(net)
    reading = read(net, optimizers, multipliers={id(attention.c_proj.weight): 0.5})
    at = {(block.layer, block.type): i for i, block in enumerate(block_map.layer_blocks)}
    first = next(layer for layer, _ in at if layer and layer.endswith(".0"))
    d = 16
    vo = at[first, "vo"]
    held = {"v": d * d + d, "o": d * d, "o bias": d}
    rate = (0.1 * (held["v"] + held["o bias"]) + 0.005 * held["o"]) / sum(held.values())
    multiplier = (held["v"] + held["o bias"] + 0.5 * held["o"]) / sum(held.values())
    assert reading.learning_rate[vo] == pytest.approx(rate)
    assert reading.lr_multiplier[vo] == pytest.approx(multiplier)
    assert reading.learning_rate[at[first, "qk"]] == pytest.approx(0.1)
    assert reading.learning_rate[at[None, "other"]] == 0.0  # positions: in no optimizer


def test_a_parameter_without_gradient_counts_as_zero_and_a_frozen_one_too():
    net = gpt2()
    net.transformer.wpe.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
    reading = read(net, [optimizer])
    assert (reading.gradient_norm == 0).all()
    assert (reading.weight_norm[[b.type != "norm" for b in classify(net).layer_blocks]] > 0).all()
    assert np.isnan(reading.update_rms).all()


def test_the_tap_leaves_gradients_state_and_random_source_alone():
    net = gpt2()
    optimizer = torch.optim.AdamW(net.parameters())
    backward(net)
    gradients = [p.grad for p in net.parameters()]
    copies = [g.clone() for g in gradients]
    random = torch.get_rng_state()
    read(net, [optimizer])
    assert not optimizer.state
    assert all(p.grad is g and torch.equal(g, c) for p, g, c in zip(net.parameters(), gradients, copies, strict=True))
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_device_pass_agrees_with_the_host_pass(dtype):
    generator = torch.Generator().manual_seed(0)
    parts = []
    for shape in ((7,), (300, 40), (0,)[:0], (40, 90)):
        weight, gradient, second = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
        parts.append(PartTensors(weight, gradient, second.square(), 0.3, 0.05))
    wide = [tensor.narrow(1, 10, 30) for tensor in (torch.randn(20, 90, generator=generator) for _ in range(3))]
    parts.append(PartTensors(wide[0].to(dtype), wide[1].to(dtype), wide[2].square().to(dtype), 1.0, 0.05))
    parts.append(PartTensors(wide[0].to(dtype), None))
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-4  # foreach rounds a bfloat16 norm to 8 bits
    np.testing.assert_allclose(device_sums(parts).numpy(), host_sums(parts, Scratch()), rtol=tolerance)


def test_the_device_pass_says_that_something_is_not_finite():
    gradient = torch.ones(5)
    gradient[2] = math.nan
    sums = device_sums([PartTensors(torch.ones(5), gradient), PartTensors(torch.ones(5), torch.ones(5))])
    assert sums[:, NON_FINITE].tolist() == [1, 0]


def test_a_sparse_gradient_is_measured_by_its_rows():
    table = nn.Embedding(10, 4, sparse=True)
    table(torch.tensor([1, 1, 3])).sum().backward()
    sums = host_sums([PartTensors(table.weight.detach(), table.weight.grad)], Scratch())[0]
    assert sums[0] == pytest.approx(4 * 2.0**2 + 4)


def test_after_a_reload_the_steps_are_read_again():
    net = gpt2()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, betas=(0.9, 0.95))
    tap = Tap(classify(net), dict(net.named_parameters()), [optimizer])
    states = []
    for step in range(3):
        backward(net, step)
        read(net, [optimizer], tap)
        optimizer.step()
        states.append(optimizer.state_dict())
    other = torch.optim.AdamW(net.parameters(), lr=0.01, betas=(0.9, 0.95))
    other.load_state_dict(states[0])
    optimizer.load_state_dict(other.state_dict())
    backward(net, 9)
    read(net, [optimizer], tap)
    floors = [FLOOR_SHARE * mean for mean in mean_second_moments(net, optimizer)]
    np.testing.assert_allclose(read(net, [optimizer], tap).update_rms, expected_rms(net, optimizer, floors), rtol=1e-4)
