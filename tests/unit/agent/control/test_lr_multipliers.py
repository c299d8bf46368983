from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sharpwatch.agent.control.lr_multipliers import ParamGroupOverride

MULTIPLIERS = (0.5, 1.0, 4.0)  # of the three layers


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3))


def adamw(groups, lr):
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=0.1)


def sgd(groups, lr):
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=0.01)


def multipliers_of(net, values=MULTIPLIERS):
    return {id(p): value for layer, value in zip(net, values, strict=True) for p in layer.parameters()}


def hooked(optimizer, multipliers):
    """The override as the agent applies it: by hooks, with the step wrapped first."""
    override = ParamGroupOverride(optimizer)
    optimizer.register_step_pre_hook(lambda *_: override.apply(multipliers))
    optimizer.register_step_post_hook(lambda *_: override.restore())
    override.wrap_step(lambda: None)
    return override


def backward(net, step):
    generator = torch.Generator().manual_seed(step)
    net.zero_grad()
    net(torch.randn(16, 6, generator=generator)).square().mean().backward()


@pytest.mark.parametrize("make", [adamw, sgd])
def test_split_groups_step_bit_identically_to_real_ones(make):
    ours, theirs = model(), model()
    optimizer = make(ours.parameters(), 0.01)
    hooked(optimizer, multipliers_of(ours))
    groups = [{"params": list(layer.parameters())} for layer in theirs]
    real = make(groups, 0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    for step in range(50):
        for group, value in zip(real.param_groups, MULTIPLIERS, strict=True):
            group["lr"] = optimizer.param_groups[0]["lr"] * value
        for net, steps in ((ours, optimizer), (theirs, real)):
            backward(net, step)
            steps.step()
        schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_the_optimizers_own_groups_are_the_same_objects_after_a_step():
    net = model()
    optimizer = adamw([{"params": net[0].parameters(), "name": "first"}, {"params": list(net[1:].parameters())}], 0.01)
    groups, dicts = optimizer.param_groups, list(optimizer.param_groups)
    before = copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in groups])
    hooked(optimizer, multipliers_of(net))
    seen = []
    optimizer.register_step_pre_hook(lambda opt, *_: seen.append([group["lr"] for group in opt.param_groups]))
    backward(net, 0)
    optimizer.step()
    assert optimizer.param_groups is groups
    assert all(now is then for now, then in zip(groups, dicts, strict=True))
    assert [{k: v for k, v in group.items() if k != "params"} for group in groups] == before
    assert seen == [[0.005, 0.01, 0.04]]


def test_a_group_that_nothing_splits_stays_itself():
    net = model()
    optimizer = sgd([{"params": net[0].parameters()}, {"params": list(net[1:].parameters())}], 0.01)
    override = ParamGroupOverride(optimizer)
    own = optimizer.param_groups
    override.apply({id(net[0].weight): 0.5})
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1, 4]
    assert optimizer.param_groups[2] is own[1]
    override.restore()
    assert optimizer.param_groups is own


@pytest.mark.parametrize("multipliers", [{}, {1: 1.0}])
def test_with_every_multiplier_at_one_nothing_is_applied(multipliers):
    optimizer = sgd(model().parameters(), 0.01)
    own = optimizer.param_groups
    ParamGroupOverride(optimizer).apply(multipliers)
    assert optimizer.param_groups is own


class Counting(torch.optim.SGD):
    """Keeps a count, and a rate of its own making, in its groups, as schedule-free optimizers do."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group["lr"] = group["lr"] * 0.5
            group["seen"] = group["lr"]
        return super().step(closure)


def test_what_step_changes_in_a_group_is_carried_back():
    net = model()
    optimizer = Counting(net.parameters(), lr=0.01)
    hooked(optimizer, multipliers_of(net))
    for step in range(3):
        backward(net, step)
        optimizer.step()
    (group,) = optimizer.param_groups
    assert group["count"] == 3
    assert group["lr"] == pytest.approx(0.01 / 8)
    assert group["seen"] == pytest.approx(0.01 / 8)  # of the piece whose multiplier is 1
    assert len(group["params"]) == 6


def failing_step(optimizer, net):
    backward(net, 0)
    net[1].weight.grad = net[1].weight.grad.to_sparse()  # AdamW raises on it, half-way
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


@pytest.mark.parametrize("scheduler", ["none", "before", "after"])
def test_the_groups_are_restored_when_step_raises(scheduler):
    net = model()
    optimizer = adamw(net.parameters(), 0.01)
    own = optimizer.param_groups
    if scheduler == "before":
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    hooked(optimizer, multipliers_of(net))
    if scheduler == "after":
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    failing_step(optimizer, net)
    assert optimizer.param_groups is own
    assert [len(group["params"]) for group in own] == [6]


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_scheduler_made_before_or_after_the_wrapper_works_and_warns_of_nothing(order):
    net = model()
    optimizer = sgd(net.parameters(), 0.01)
    made = [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)] if order == "before" else []
    override = hooked(optimizer, multipliers_of(net))
    if order == "after":
        made.append(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
    for step in range(2):  # a warning about the order of step() calls would be an error here
        backward(net, step)
        optimizer.step()
        made[0].step()
    assert optimizer.param_groups[0]["lr"] == 0.0025
    override.unwrap_step()
    override.wrap_step(lambda: None)  # again, over whatever was left
    torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    with pytest.raises(TypeError):
        optimizer.step("no closure")
    assert len(optimizer.param_groups) == 1


def test_unwrap_step_leaves_the_instance_as_it_was():
    optimizer = sgd(model().parameters(), 0.01)
    override = ParamGroupOverride(optimizer)
    override.wrap_step(lambda: None)
    override.wrap_step(lambda: None)
    assert "step" in vars(optimizer)
    override.unwrap_step()
    assert "step" not in vars(optimizer)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    theirs = vars(optimizer)["step"]
    override.wrap_step(lambda: None)
    override.unwrap_step()
    assert vars(optimizer)["step"] is theirs
    override.unwrap_step()


def test_state_dict_and_a_step_under_a_grad_scaler_see_one_group():
    net = model()
    optimizer = adamw(net.parameters(), 0.01)
    hooked(optimizer, multipliers_of(net))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(net(torch.ones(2, 6)).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert len(optimizer.state_dict()["param_groups"]) == 1
    fresh = adamw(model().parameters(), 0.01)
    fresh.load_state_dict(optimizer.state_dict())


def test_a_tensor_rate_is_scaled_without_being_touched():
    net = model()
    rate = torch.tensor(0.01)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
    override = ParamGroupOverride(optimizer)
    override.apply(multipliers_of(net))
    assert [round(float(group["lr"]), 6) for group in optimizer.param_groups] == [0.005, 0.01, 0.04]
    override.restore()
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.01)


class CountingInPlace(torch.optim.SGD):
    """Keeps a count in its groups as a tensor, as fused optimizers do for CUDA graphs."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] += 1
        return super().step(closure)


def test_a_tensor_that_step_raises_in_place_is_raised_once():
    net = model()
    optimizer = CountingInPlace([{"params": net.parameters(), "count": torch.tensor(0)}], lr=0.01)
    hooked(optimizer, multipliers_of(net))
    count = optimizer.param_groups[0]["count"]
    for step in range(3):
        backward(net, step)
        optimizer.step()
    assert optimizer.param_groups[0]["count"] is count
    assert int(count) == 3
