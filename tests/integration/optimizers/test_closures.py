"""Optimizers of every kind, given a closure: steps and samples are those of a loop that computes gradients before."""

from __future__ import annotations

import pytest
import torch
from small_llama import ELEMENTWISE, FIRST, LAST, MULTIPLIERS, SCHEDULE_FREE, backward, llama, order, same

import sharpwatch

STEPS = 8
MAKES = ELEMENTWISE | {f"schedule-free {name}": make for name, make in SCHEDULE_FREE.items()}
del MAKES["torchao 8 bit"]  # to compile it anew takes as long as all others together


def train(transports, make, step):
    """The model, and what was said of its steps but for what was measured in seconds."""
    model = llama()
    optimizer = make(model.parameters())
    if hasattr(optimizer, "train"):
        optimizer.train()
    watch = sharpwatch.attach(
        model,
        optimizer,
        training_job="closures",
        transport=transports.new(),
        probes=("gnb", "direction"),
        probe_every=4,
    )
    order(transports[-1], MULTIPLIERS, at=FIRST)
    order(transports[-1], {}, at=LAST + 1)
    for number in range(1, STEPS + 1):
        step(model, optimizer, number)
    assert watch._watched.barrier.swallowed == 0
    assert watch._watched.scheduler.runner.failures == ()
    watch.close()
    samples = [sample for sample in transports[-1].samples if not sample.closing]
    for sample in samples:
        sample.ClearField("health")
        sample.taken_at_unix_ns = 0
        sample.gnb.seconds = sample.direction.seconds = 0.0
    return model, samples


def before(model, optimizer, number):
    backward(model, number)
    optimizer.step()


def within(model, optimizer, number):
    @torch.enable_grad()  # transformers' Adafactor leaves that to the closure
    def closure():
        backward(model, number)

    optimizer.step(closure)


@pytest.mark.parametrize("name", MAKES)
def test_a_closure_changes_nothing(transports, name):
    theirs, expected = train(transports, MAKES[name], before)
    ours, samples = train(transports, MAKES[name], within)
    assert same(ours, theirs) == []
    assert samples == expected
    assert len(samples) == STEPS
