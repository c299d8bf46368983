"""Schedule-free optimizers keep averages in their groups, weighed by rates: those stay the schedule's."""

from __future__ import annotations

import pytest
import torch
from small_llama import MULTIPLIERS, SCHEDULE_FREE, backward, blocks, imported, llama, order, per_parameter, same, saved

import sharpwatch
from sharpwatch.agent.control.lr_multipliers import ParamGroupOverride

EXACT = {"emb": 0.5, "qk": 0.25, "ffn": 4.0, "norm": 2.0}  # powers of two: products with them round nothing
NONE_AT_ONE = dict.fromkeys(("emb", "qk", "vo", "ffn", "norm", "head"), 3.0) | {"ffn": 0.3}


def overridden(model, optimizer, multipliers):
    """`optimizer` under multipliers from its first step on."""
    kinds = blocks(model)
    each = {id(parameter): multipliers.get(kinds[name], 1.0) for name, parameter in model.named_parameters()}
    override = ParamGroupOverride(optimizer)
    optimizer.register_step_pre_hook(lambda *_: override.apply(each))
    optimizer.register_step_post_hook(lambda *_: override.restore())


def trained(model, optimizer, steps=8):
    optimizer.train()
    for number in range(steps):
        backward(model, number)
        optimizer.step()
    optimizer.eval()
    return optimizer


def counters(optimizer):
    (group,) = optimizer.param_groups
    return {key: group[key] for key in ("k", "weight_sum", "lr_max", "scheduled_lr", "lr", "train_mode")}


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_weights_and_averages_are_those_of_real_groups(name):
    ours, theirs = llama(), llama()
    optimizer = SCHEDULE_FREE[name](ours.parameters())
    overridden(ours, optimizer, EXACT)
    real = SCHEDULE_FREE[name](per_parameter(theirs))
    for group in real.param_groups:
        group["lr"] *= EXACT.get(group["block"], 1.0)
    trained(ours, optimizer)
    trained(theirs, real)
    assert same(ours, theirs) == []


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_what_its_group_counts_is_what_a_plain_one_counts(name):
    ours, theirs = llama(), llama()
    optimizer, plain = SCHEDULE_FREE[name](ours.parameters()), SCHEDULE_FREE[name](theirs.parameters())
    overridden(ours, optimizer, EXACT)
    assert counters(trained(ours, optimizer)) == counters(trained(theirs, plain))


def test_where_no_block_is_left_at_one_counters_differ_by_rounding_alone():
    ours, theirs = llama(), llama()
    optimizer, plain = SCHEDULE_FREE["adamw"](ours.parameters()), SCHEDULE_FREE["adamw"](theirs.parameters())
    overridden(ours, optimizer, NONE_AT_ONE)
    # A value goes through two roundings a step, each of at most 2^-53 of it; 8 steps.
    assert counters(trained(ours, optimizer)) == pytest.approx(counters(trained(theirs, plain)), rel=2**-48)


def test_a_watched_one_goes_on_from_its_state_dict_as_a_plain_one(transports):
    make = SCHEDULE_FREE["adamw"]
    model, fresh = llama(), llama()
    optimizer, plain = make(model.parameters()), make(fresh.parameters())
    watch = sharpwatch.attach(model, optimizer, training_job="groups", transport=transports.new(), probes=())
    order(transports[0], MULTIPLIERS, at=3)
    order(transports[0], {}, at=6)
    trained(model, optimizer)
    watch.close()
    assert [result.step for result in transports[0].results] == [3, 6]
    fresh.load_state_dict(model.state_dict())
    plain.load_state_dict(saved(optimizer.state_dict()))
    trained(model, optimizer)
    trained(fresh, plain)
    assert same(model, fresh) == []
    assert optimizer.param_groups[0]["k"] == 16


def test_the_base_inside_the_wrapper_is_what_is_watched(transports):
    kind = imported("schedulefree", "ScheduleFreeWrapper")
    ours, theirs = llama(), llama()
    wrapped = kind(torch.optim.SGD(ours.parameters(), lr=0.01), momentum=0.9)
    real = kind(torch.optim.SGD(per_parameter(theirs), lr=0.01), momentum=0.9)
    watch = sharpwatch.attach(ours, wrapped, training_job="groups", transport=transports.new(), probes=())
    order(transports[0], EXACT, at=3)
    wrapped.train()
    real.train()
    for number in range(1, 7):
        if number == 3:  # the wrapper's averages take the unscaled rate, so it is scaled for the base alone
            real.base.register_step_pre_hook(lambda *_: scale(real.base, EXACT))
            real.base.register_step_post_hook(lambda *_: scale(real.base, {k: 1 / v for k, v in EXACT.items()}))
        for model, optimizer in ((ours, wrapped), (theirs, real)):
            backward(model, number)
            optimizer.step()
    watch.close()
    assert transports[0].results[0].step == 3
    assert same(ours, theirs) == []


def scale(optimizer, multipliers):
    for group in optimizer.param_groups:
        group["lr"] *= multipliers.get(group["block"], 1.0)
