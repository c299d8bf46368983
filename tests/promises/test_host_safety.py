"""Promise 2: after `attach` nothing raises into the loop; every swallowed error is counted and logged once."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from stand_ins import Net
from torch import nn

import sharpwatch
from sharpwatch.agent.control.controller import Controller
from sharpwatch.agent.control.lr_multipliers import ParamGroupOverride
from sharpwatch.agent.probes.context import ProbedStep
from sharpwatch.agent.probes.gnb import Gnb
from sharpwatch.agent.probes.runner import ProbeRunner
from sharpwatch.agent.probes.scheduler import OverheadBudget
from sharpwatch.agent.statistics.tap import Tap
from sharpwatch.testing import InMemoryTransport


def run(transports, steps=6, **options):
    torch.manual_seed(3)
    model = Net().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    watch = sharpwatch.attach(
        model, optimizer, training_job="promise", transport=transports.new(), probe_every=2, **options
    )
    for _ in range(steps):
        tokens = torch.randint(11, (8, 5))
        _, loss = model(tokens, tokens)
        loss.backward()
        watch.observe(loss=loss)
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    return model.state_dict()


def broken(*_, **__):
    raise ZeroDivisionError("on purpose")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Tap, "start"),
        (Tap, "read"),
        (Tap, "resolve"),
        (OverheadBudget, "record"),
        (OverheadBudget, "plan"),
        (Controller, "begin"),
        (Controller, "end"),
        (Controller, "take_results"),
        (ParamGroupOverride, "apply"),
        (ParamGroupOverride, "restore"),
        (ParamGroupOverride, "unwrap_step"),
        (ProbeRunner, "run"),
        (ProbeRunner, "forward"),
        (ProbedStep, "keep_weights"),
        (Gnb, "before_step"),
        (Gnb, "run"),
        (InMemoryTransport, "send"),
        (InMemoryTransport, "receive"),
        (InMemoryTransport, "close"),
    ],
)
def test_whatever_breaks_inside_the_weights_are_those_of_a_healthy_run(owner, name, transports, monkeypatch, caplog):
    healthy = run(transports)
    if (owner, name) == (OverheadBudget, "plan"):  # attach itself asks once: that may still raise
        original, calls = OverheadBudget.plan, []
        monkeypatch.setattr(
            OverheadBudget, "plan", lambda self: broken() if calls else (calls.append(1), original(self))[1]
        )
    else:
        monkeypatch.setattr(owner, name, broken)
    with caplog.at_level(logging.WARNING, "sharpwatch"):
        torch.testing.assert_close(run(transports), healthy, rtol=0, atol=0)
    if (owner, name) == (Gnb, "run"):
        failure = transports[-1].samples[-1].health.probe_failures[0]
        assert (failure.count, failure.disabled) == (3, True)
        assert failure.reason == "ZeroDivisionError: on purpose"
        return
    said = [record for record in caplog.records if "on purpose" in record.getMessage()]
    assert said
    assert len({(record.args[0], record.exc_info[2].tb_lineno) for record in said}) == len(said)  # each once


def test_swallowed_errors_are_counted_in_the_next_sample(transports, monkeypatch):
    monkeypatch.setattr(ProbeRunner, "forward", broken)
    run(transports, steps=6)
    assert transports[-1].samples[-1].health.swallowed_errors == 3  # a capture for each of the three planned probes


def test_an_override_that_cannot_be_guarded_is_still_applied_and_restored(transports, monkeypatch, caplog):
    monkeypatch.setattr(ParamGroupOverride, "wrap_step", broken)
    model = Net().train()
    optimizer = torch.optim.AdamW(model.parameters())
    watch = sharpwatch.attach(model, optimizer, training_job="promise", transport=transports.new(), probes=())
    transports[-1].set_multipliers({"emb": 0.5})
    group_counts = []
    with caplog.at_level(logging.WARNING, "sharpwatch"):
        for _ in range(2):
            model(torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.long))[1].backward()
            handle = optimizer.register_step_pre_hook(lambda opt, *_: group_counts.append(len(opt.param_groups)))
            optimizer.step()
            handle.remove()
    assert group_counts == [1, 2]
    assert len(optimizer.param_groups) == 1
    assert "on purpose" in caplog.text
    watch.close()


class Odd(Net):
    """Gives neither logits nor a loss."""

    def forward(self, idx):
        return {"hidden": self.ln_f(self.wte(idx))}


def test_a_model_that_probes_cannot_read_is_still_tapped(transports):
    model = Odd().train()
    optimizer = torch.optim.AdamW(model.parameters())
    watch = sharpwatch.attach(model, optimizer, training_job="promise", transport=transports.new(), probe_every=1)
    for _ in range(5):
        loss = model(torch.arange(12).view(4, 3) % 5)["hidden"].abs().sum()
        loss.backward()
        watch.observe(loss=loss)  # without it, what the loss is stays undecided, and the next probe tries again
        optimizer.step()
    watch.close()
    last = transports[-1].samples[-2]
    assert last.HasField("tap")
    assert {failure.probe for failure in last.health.probe_failures} == {"gnb", "direction"}
    assert all(failure.disabled and failure.count == 3 for failure in last.health.probe_failures)
    assert all(len(failure.reason) > 10 for failure in last.health.probe_failures)


def test_a_tap_that_fails_shows_no_zeros(transports, monkeypatch):
    monkeypatch.setattr(Tap, "read", broken)
    run(transports, steps=3)
    steps = [sample for sample in transports[-1].samples if not sample.closing]
    assert [sample.step for sample in steps] == [1, 2, 3]
    assert not any(sample.HasField("tap") for sample in steps)
    assert all(sample.HasField("loss") for sample in steps)


def test_without_room_for_a_copy_of_the_weights_the_direction_probe_is_given_up(transports, monkeypatch):
    monkeypatch.setattr(ProbedStep, "keep_weights", broken)
    run(transports, steps=10, probes=("direction",))
    last = transports[-1].samples[-2]
    assert [(f.count, f.disabled) for f in last.health.probe_failures] == [(3, True)]
    assert last.HasField("tap")


def test_rows_without_a_label_do_not_end_the_probes(transports):
    class Ignoring(Net):
        def forward(self, idx, targets):
            logits, _ = super().forward(idx)
            return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)

    torch.manual_seed(3)
    model = Ignoring().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with sharpwatch.attach(
        model, optimizer, training_job="promise", transport=transports.new(), probe_every=1
    ) as watch:
        for step in range(8):
            tokens = torch.randint(11, (8, 5))
            targets = torch.full_like(tokens, -100) if step < 6 else tokens
            targets[-1, -1] = 1  # the loss stays finite; rarely among a probe's rows
            model(tokens, targets)[1].backward()
            optimizer.step()
            optimizer.zero_grad()
        failures = watch._watched.scheduler.runner.failures
    assert {failure.probe for failure in failures} == {"gnb", "direction"}
    assert not any(failure.disabled for failure in failures)
    (transport,) = transports
    for sample in [sample for sample in transport.samples if sample.step > 6 and not sample.closing]:
        assert sample.HasField("gnb")
        assert sample.HasField("direction")


def test_an_optimizer_that_takes_one_group_alone_gets_one_rate(transports):
    torch.manual_seed(3)
    model = Net().train()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
    tokens = torch.randint(11, (8, 5))

    def closure():
        optimizer.zero_grad()
        loss = model(tokens, tokens)[1]
        loss.backward()
        return loss

    with sharpwatch.attach(model, optimizer, training_job="promise", transport=transports.new()) as watch:
        optimizer.step(closure)
        transports[0].set_multipliers({"emb": 0.5})
        optimizer.step(closure)
        optimizer.step(closure)
        assert watch.step == 3
    (third,) = [sample for sample in transports[0].samples if sample.step == 3 and not sample.closing]
    assert np.frombuffer(third.tap.lr_multiplier.data, "<f4").tolist() == [0.5] * len(transports[0].hello.layer_blocks)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1]
