"""What is told of parameter groups: their settings, and the steps that the optimizer's state has seen."""

from __future__ import annotations

import stand_ins
import torch

import sharpwatch
from sharpwatch.agent.statistics.group_settings import ChangedSettings, GroupSettings, group_settings
from sharpwatch.testing import InMemoryTransport

TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 1, 2]])


def adamw(model, **options) -> torch.optim.AdamW:
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), **options)


def train(model, optimizer, steps: int) -> None:
    for _ in range(steps):
        model(TOKENS, TOKENS)[1].backward()
        optimizer.step()
        optimizer.zero_grad()


def test_settings_are_those_of_each_group():
    model = stand_ins.Net()
    optimizer = adamw(model)
    train(model, optimizer, 3)
    first, second = (group_settings(optimizer, 0, group) for group in range(2))
    assert first.settings == {"weight_decay": 0.1, "eps": 1e-8, "beta1": 0.9, "beta2": 0.95}
    assert second.settings["weight_decay"] == 0.0
    assert first.steps == 3


def test_sgd_has_a_momentum_and_no_count():
    model = stand_ins.Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 2)
    read = group_settings(optimizer, 0, 0)
    assert read.settings == {"weight_decay": 0.0, "momentum": 0.9}
    assert read.steps != read.steps  # NaN


def test_news_is_what_changes_otherwise_than_by_counting():
    told = ChangedSettings()

    def news(step: int, steps: float, decay: float = 0.1) -> bool:
        return bool(told.news(step, [GroupSettings(0, 0, {"weight_decay": decay}, steps)]))

    assert news(1, float("nan"))
    assert news(2, 1.0)  # there is a state now
    assert not any(news(step, step - 1.0) for step in range(3, 10))
    assert news(10, 9.0, decay=10.0)
    assert not news(11, 10.0, decay=10.0)
    assert news(12, 0.0, decay=10.0)  # the state begins anew
    assert not news(13, 1.0, decay=10.0)
    assert news(13 + told.REPEAT, 1.0 + told.REPEAT, decay=10.0)  # a sample may have been lost


def test_a_change_is_in_the_sample_of_its_step():
    model = stand_ins.Net().train()
    optimizer = adamw(model)
    transport = InMemoryTransport()
    watch = sharpwatch.attach(model, optimizer, training_job="job", transport=transport, probes=())
    train(model, optimizer, 5)
    optimizer.param_groups[0]["betas"] = (0.9, 0.5)
    train(model, optimizer, 3)
    for state in optimizer.state.values():
        state["step"].zero_()
    train(model, optimizer, 2)
    watch.close()
    told = {
        sample.step: [(group.settings["beta2"], group.steps if group.HasField("steps") else None) for group in groups]
        for sample in transport.samples
        if (groups := sample.optimizer_groups)
    }
    assert told == {
        1: [(0.95, None), (0.95, None)],
        2: [(0.95, 1), (0.95, 1)],
        6: [(0.5, 5), (0.95, 5)],
        9: [(0.5, 0), (0.95, 0)],
    }
