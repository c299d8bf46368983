"""Optimizers in the manner of DeepSpeed's, none of torch's: watched through their `step()`, and left to themselves.

DeepSpeed itself is under tests/distributed.
"""

from __future__ import annotations

import pytest
import torch
from small_llama import RATE, backward, llama, order, same

import sharpwatch
from sharpwatch.agent.optimizers.support import stepping_optimizer
from sharpwatch.errors import AttachError

REASON = "DeepSpeed keeps gradients, master weights and their groups to itself"


class DeepSpeedOptimizer:
    """DeepSpeed's base class."""


class Zero(DeepSpeedOptimizer):
    """Steps copies of the weights once for each group, as ZeRO does, and copies them back."""

    def __init__(self, model, rates=(RATE, RATE)):
        parameters = list(model.parameters())
        self.pairs = [(p, p.detach().clone().requires_grad_()) for p in parameters]
        masters = [master for _, master in self.pairs]
        groups = [{"params": masters[:4], "lr": rates[0]}, {"params": masters[4:], "lr": rates[1]}]
        self.optimizer = torch.optim.SGD(groups)
        self.bit16_groups = [parameters[:4], parameters[4:]]

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, *_):
        for parameter, master in self.pairs:
            master.grad, parameter.grad = parameter.grad, None
        whole = self.optimizer.param_groups
        for group in whole:
            self.optimizer.param_groups = [group]
            self.optimizer.step()
        self.optimizer.param_groups = whole
        with torch.no_grad():
            for parameter, master in self.pairs:
                parameter.copy_(master)


def trained(model, optimizer, steps=4):
    for number in range(1, steps + 1):
        backward(model, number)
        optimizer.step()


def test_a_step_is_one_however_often_torchs_optimizer_inside_steps(transports):
    ours, theirs = llama(), llama()
    optimizer = Zero(ours)
    with sharpwatch.attach(ours, optimizer, training_job="zero", transport=transports.new(), probes=()) as watch:
        order(transports[0], {"ffn": 0.5}, at=2)
        trained(ours, optimizer)
        assert watch.step == 4
        with pytest.raises(AttachError, match="watched already"):
            sharpwatch.attach(ours, optimizer, training_job="zero", transport=transports.new())
    trained(theirs, Zero(theirs))
    assert same(ours, theirs) == []
    assert transports[0].hello.optimizer == "Zero"
    assert [result.detail for result in transports[0].results] == [f"learning rates can't be changed: Zero: {REASON}"]


def test_its_rates_are_those_of_its_groups():
    model = llama()
    driven = stepping_optimizer(Zero(model, (RATE, 3e-3)), model)
    driven.register_step_pre_hook(lambda *_: None)
    trained(model, driven, steps=1)
    assert [group["lr"] for group in driven.param_groups] == [RATE, 3e-3]


def test_of_groups_that_are_not_known_no_rate_is_shown():
    model = llama()
    optimizer = Zero(model)
    del optimizer.bit16_groups
    driven = stepping_optimizer(optimizer, model)
    driven.register_step_pre_hook(lambda *_: None)
    trained(model, driven, steps=1)
    assert [group["lr"] for group in driven.param_groups] == [None]


class Overflowing(Zero):
    """Finds every other step's loss scaled too far, and doesn't take it."""

    loss_scale, overflow, steps = 2.0**16, False, 0

    def step(self, *_):
        self.steps += 1
        self.overflow = self.steps % 2 == 1
        if not self.overflow:
            super().step()
        return self.overflow


def test_a_step_that_only_finds_the_loss_scaled_too_far_is_none(transports):
    ours, theirs = llama(), llama()
    with sharpwatch.attach(
        ours, optimizer := Overflowing(ours), training_job="scaled", transport=transports.new(), probes=()
    ) as watch:
        trained(ours, optimizer)
        assert watch.step == 2
        assert optimizer.step() is True  # what it returns stays what it is
    trained(theirs, Overflowing(theirs))
    assert same(ours, theirs) == []
    assert [sample.step for sample in transports[0].samples if sample.HasField("tap")] == [1, 2]
    assert transports[0].samples[-1].health.swallowed_errors == 0


def test_once_the_watch_is_closed_its_step_is_its_own_again_in_effect(transports):
    ours, theirs = llama(), llama()
    optimizer = Zero(ours)
    sharpwatch.attach(ours, optimizer, training_job="zero", transport=transports.new(), probes=()).close()
    trained(ours, optimizer)
    trained(theirs, Zero(theirs))
    assert same(ours, theirs) == []


def test_disabled_it_is_not_touched(monkeypatch):
    monkeypatch.setenv("SHARPWATCH_DISABLED", "1")
    model = llama()
    optimizer = Zero(model)
    sharpwatch.attach(model, optimizer, training_job="zero").close()
    assert "step" not in vars(optimizer)
