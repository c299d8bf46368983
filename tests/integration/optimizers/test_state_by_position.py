"""Optimizers that keep a group's state as a whole are watched and not controlled; others are shown to be safe."""

from __future__ import annotations

import logging

import pytest
import torch
from small_llama import ELEMENTWISE, SCHEDULE_FREE, backward, llama, matrices_and_rest, order, same, torchs

import sharpwatch
from sharpwatch.agent.optimizers import split_check
from sharpwatch.v1 import types_pb2

STEPS = 8


class Stacked(torch.optim.Optimizer):
    """One stacked momentum of a group under its first parameter, as the Muon of nanochat and modded-nanogpt."""

    smallest = 0  # entries of a parameter for which it stacks

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            whole = group["params"][0].numel() >= self.smallest
            for held in [group["params"]] if whole else [[p] for p in group["params"]]:
                self._step_stacked(group, held)

    def _step_stacked(self, group, held):
        grads = torch.stack([p.grad for p in held])
        buffer = self.state[held[0]].setdefault("buffer", torch.zeros_like(grads))
        if buffer.shape != grads.shape:
            buffer = self.state[held[0]]["buffer"] = torch.zeros_like(grads)
        buffer.mul_(0.9).add_(grads)
        for parameter, moved in zip(held, buffer, strict=True):
            parameter.add_(moved / moved.norm(), alpha=-group["lr"])


class StackedWhenLarge(Stacked):
    """The attach-time trial, which is on small matrices, does not see it."""

    smallest = 4096


def made(kind):
    model = llama()
    matrices, rest = matrices_and_rest(model)
    square = [p for p in matrices if p.shape == (64, 64)]
    rest += [p for p in matrices if p.shape != (64, 64)]
    return model, [kind(square, 0.01), torch.optim.AdamW(rest, 1e-3)]


def trained(model, optimizers):
    for number in range(1, STEPS + 1):
        backward(model, number)
        for optimizer in optimizers:
            optimizer.step()


def commanded(transports, kind, **options):
    """A run that is sent a command for rates, beside one without sharpwatch; the results of its commands."""
    (ours, optimizers), (theirs, plain) = made(kind), made(kind)
    watch = sharpwatch.attach(
        ours, optimizers, training_job="stacked", transport=transports.new(), probe_every=2, **options
    )
    order(transports[0], {"qk": 0.5}, at=4)
    place = types_pb2.Checkpoint(step=1, uri="file:///1")
    transports[0].command(id="back", apply_at_step=STEPS, rollback=types_pb2.Rollback(checkpoint=place))
    trained(ours, optimizers)
    watch.close()
    trained(theirs, plain)
    assert same(ours, theirs) == []
    assert len([sample for sample in transports[0].samples if sample.HasField("tap")]) == STEPS
    assert any(sample.HasField("gnb") for sample in transports[0].samples)
    assert transports[0].samples[-1].health.swallowed_errors == 0
    return transports[0].results


def test_a_stacked_momentum_is_refused_at_attach(transports, caplog):
    asked = []
    with caplog.at_level(logging.WARNING, "sharpwatch"):
        rates, back = commanded(transports, Stacked, on_rollback=asked.append)
    reason = "Stacked: its steps depend on how parameters are grouped, as copies showed at attach"
    assert [record.message for record in caplog.records] == [
        f"learning rates are watched, but can't be changed: {reason}"
    ]
    assert rates.outcome == "refused"
    assert rates.detail == f"learning rates can't be changed: {reason}"
    assert back.outcome == "applied"
    assert [request.step for request in asked] == [1]


def test_one_that_only_real_sizes_show_is_refused_when_a_command_comes(transports, caplog):
    with caplog.at_level(logging.WARNING, "sharpwatch"):
        rates, back = commanded(transports, StackedWhenLarge, on_rollback=lambda _: None)
    assert caplog.records == []
    assert rates.outcome == "refused"
    assert rates.detail == (
        "learning rates can't be changed: StackedWhenLarge: it keeps 'buffer' of several parameters under one of them"
    )
    assert back.outcome == "applied"


def test_without_control_no_copy_is_stepped(transports):
    class Untouched(Stacked):
        def step(self):
            raise AssertionError

    model, optimizers = made(Untouched)
    sharpwatch.attach(model, optimizers, training_job="stacked", transport=transports.new(), control="none").close()
    assert transports[0].closed


TESTED = (
    ELEMENTWISE | {f"schedule-free {name}": make for name, make in SCHEDULE_FREE.items()} | {"muon": torchs("Muon")}
)


@pytest.mark.parametrize("name", TESTED)
def test_a_trial_shows_what_the_other_tests_show(monkeypatch, name):
    """Those that sharpwatch takes as tested: a trial would call them safe too."""
    model = llama()
    held = matrices_and_rest(model)[0] if name == "muon" else model.parameters()
    optimizer = TESTED[name](held)
    if hasattr(optimizer, "train"):
        optimizer.train()
    monkeypatch.setattr(split_check, "_is_tested", lambda _: False)
    with torch.compiler.set_stance("force_eager"):  # torchao compiles
        assert split_check.unsafe_to_split(optimizer) == ""
