"""Schedulers and averaging see the groups that they made, and never a multiplier."""

from __future__ import annotations

import copy

import pytest
import torch
from small_llama import MULTIPLIERS, RATE, backward, llama, order
from stand_ins import in_each_step
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import SWALR, AveragedModel

import sharpwatch

STEPS = 12


def chained(optimizer):
    return schedules.ChainedScheduler([schedules.StepLR(optimizer, 4), schedules.ExponentialLR(optimizer, 0.9)])


def in_sequence(optimizer):
    parts = [schedules.LinearLR(optimizer, 0.1, total_iters=4), schedules.CosineAnnealingLR(optimizer, 8)]
    return schedules.SequentialLR(optimizer, parts, milestones=[4])


KINDS = {
    "lambda": lambda optimizer: schedules.LambdaLR(optimizer, lambda step: 0.9**step),
    "multiplicative": lambda optimizer: schedules.MultiplicativeLR(optimizer, lambda _: 0.9),
    "step": lambda optimizer: schedules.StepLR(optimizer, 2, 0.5),
    "multistep": lambda optimizer: schedules.MultiStepLR(optimizer, [3, 7], 0.5),
    "exponential": lambda optimizer: schedules.ExponentialLR(optimizer, 0.9),
    "polynomial": lambda optimizer: schedules.PolynomialLR(optimizer, STEPS),
    "cosine": lambda optimizer: schedules.CosineAnnealingLR(optimizer, STEPS),
    "warm restarts": lambda optimizer: schedules.CosineAnnealingWarmRestarts(optimizer, 4),
    "one cycle": lambda optimizer: schedules.OneCycleLR(optimizer, RATE, total_steps=STEPS + 1),
    "cyclic": lambda optimizer: schedules.CyclicLR(optimizer, RATE / 10, RATE, step_size_up=3),
    "plateau": lambda optimizer: schedules.ReduceLROnPlateau(optimizer, patience=1),
    "sequence": in_sequence,
    "chained": chained,
    "swa": lambda optimizer: SWALR(optimizer, RATE / 10, anneal_epochs=4),
}
OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=RATE),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=RATE, momentum=0.9),
    "tensor rate": lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(RATE), foreach=False),
}


def seen(kind, make, transports=None):
    """What the scheduler and the groups hold after each step, and the rate each step was really taken at."""
    model = llama()
    optimizer = make(model.parameters())
    watch = None
    if transports is not None:
        watch = sharpwatch.attach(model, optimizer, training_job="schedule", transport=transports.new(), probes=())
    scheduler = KINDS[kind](optimizer)
    if watch:
        order(transports[-1], MULTIPLIERS, at=3)
    history, group_counts = [], []
    in_each_step(optimizer, lambda taken: group_counts.append(len(taken.param_groups)))
    for number in range(STEPS):
        backward(model, number)
        optimizer.step()
        scheduler.step(*([1.0] if kind == "plateau" else []))
        state = {key: value for key, value in scheduler.state_dict().items() if "schedulers" not in key}
        history.append(copy.deepcopy((scheduler.get_last_lr(), state, optimizer.state_dict()["param_groups"])))
    if watch:
        watch.close()
    return history, group_counts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_scheduler_sees_what_it_sees_without_multipliers(transports, kind, optimizer):
    watched, group_counts = seen(kind, OPTIMIZERS[optimizer], transports)
    plain, _ = seen(kind, OPTIMIZERS[optimizer])
    assert watched == plain
    assert group_counts == [1, 1] + [len({*MULTIPLIERS.values(), 1.0})] * (STEPS - 2)


def test_averages_are_of_the_weights_under_multipliers(transports):
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    watch = sharpwatch.attach(model, optimizer, training_job="average", transport=transports.new(), probes=())
    order(transports[0], MULTIPLIERS, at=2)
    averaged = AveragedModel(model)
    weights = []
    for number in range(4):
        backward(model, number)
        optimizer.step()
        averaged.update_parameters(model)
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    watch.close()
    assert watch.step == 4
    assert transports[0].results[0].step == 2
    for mean, *each in zip(averaged.module.parameters(), *weights, strict=True):
        # A running mean of four values in float32: each update rounds twice, at most 2^-24 of the value each.
        torch.testing.assert_close(mean, torch.stack(each).mean(0), rtol=2**-20, atol=2**-24)
