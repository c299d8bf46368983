"""The loss that is shown is the one that backward ran from, weighted as it was trained on."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import stand_ins
import torch

import sharpwatch

TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 1, 2]])


class Net(stand_ins.Net):
    """In Hugging Face's manner: the tokens are their own labels, and `num_items_in_batch` is taken."""

    def forward(self, idx, num_items_in_batch=None):
        logits, loss = super().forward(idx, idx)
        return {
            "logits": logits,
            "loss": loss if num_items_in_batch is None else loss * idx.numel() / num_items_in_batch,
        }


@pytest.fixture
def loop(transports):
    return Loop(transports.new())


class Loop:
    """One model in training; `step` takes what its body did, and `shown` is what the daemon would see of it."""

    def __init__(self, transport):
        torch.manual_seed(3)
        self.transport = transport
        self.model = Net().train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.watch = sharpwatch.attach(self.model, self.optimizer, training_job="job", transport=transport, probes=())

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def shown(self):
        self.watch.close()
        samples = [sample for sample in self.transport.samples if not sample.closing]
        assert not samples or samples[-1].health.swallowed_errors == 0
        return [sample.loss if sample.HasField("loss") else None for sample in samples]


def test_the_own_loss_of_a_step_is_weighted_as_backward_took_it(loop):
    first, second = loop.model(TOKENS[:1])["loss"], loop.model(TOKENS[1:])["loss"]
    (first / 3).backward()
    (second * 2 / 3).backward()
    loop.step()
    assert loop.shown() == [pytest.approx(first.item() / 3 + second.item() * 2 / 3, rel=1e-6)]


def test_one_backward_of_the_sum_over_micro_batches_counts_each(loop):
    values = [loop.model(tokens[None])["loss"] for tokens in TOKENS]
    (sum(values) / 3).backward()
    loop.step()
    assert loop.shown() == [pytest.approx(sum(value.item() for value in values) / 3, rel=1e-6)]


def test_shares_of_a_steps_mean_add_up(loop):
    shares = [loop.model(tokens[None], num_items_in_batch=TOKENS.numel())["loss"] for tokens in TOKENS]
    for share in shares:
        share.backward()
    loop.step()
    assert loop.shown() == [pytest.approx(sum(share.item() for share in shares), rel=1e-6)]


@pytest.mark.parametrize("scale", [1024.0, 0.25])
def test_the_scale_of_a_grad_scaler_drops_out(loop, scale):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    loss = loop.model(TOKENS)["loss"]
    scaler.scale(loss).backward()
    scaler.step(loop.optimizer)
    assert loop.shown() == [pytest.approx(loss.item(), rel=1e-6)]


def another_of_the_logits(output):
    return output["logits"].square().mean()


def own_without_its_graph(output):
    return output["logits"].mean() + output["loss"].detach()


def own_times_zero(output):
    return output["logits"].mean() + 0 * output["loss"]


@pytest.mark.parametrize("loss", [another_of_the_logits, own_without_its_graph, own_times_zero])
def test_an_own_loss_that_is_not_trained_on_is_not_shown(loop, loss):
    for _ in range(3):
        loss(loop.model(TOKENS)).backward()
        loop.step()
    assert loop.shown() == [None] * 3


def test_the_log_says_once_why_no_loss_is_shown(loop, caplog):
    with caplog.at_level(logging.WARNING, "sharpwatch"):
        for _ in range(5):
            another_of_the_logits(loop.model(TOKENS)).backward()
            loop.step()
    assert sum("does not train on the loss that the model returns" in record.message for record in caplog.records) == 1
    assert loop.watch.status.loss == "none: backward did not run from the model's own"
    assert "loss      none: backward did not run from the model's own" in str(loop.watch.status)


@pytest.mark.parametrize("after", [False, True])
def test_the_log_says_nothing_where_the_loop_observes(loop, caplog, after):
    with caplog.at_level(logging.WARNING, "sharpwatch"):
        for _ in range(5):
            loss = another_of_the_logits(loop.model(TOKENS))
            loss.backward()
            if not after:
                loop.watch.observe(loss=loss)
            loop.step()
            if after:
                loop.watch.observe(loss=loss)
    assert not caplog.records
    assert loop.watch.status.loss == "observed"


def test_only_the_forward_that_was_trained_on_counts(loop):
    """As with a teacher's forward, or one that is only logged."""
    loop.model(TOKENS.flip(0))
    trained = loop.model(TOKENS)["loss"]
    loop.model(TOKENS + 1)
    trained.backward()
    loop.step()
    assert loop.shown() == [pytest.approx(trained.item(), rel=1e-6)]
    assert loop.watch.status.loss == "the model's own"


def test_a_gradient_penalty_on_the_way_does_not_count_twice(loop):
    first, second = loop.model(TOKENS[:1])["loss"], loop.model(TOKENS[1:])["loss"]
    penalty = sum(g.square().sum() for g in torch.autograd.grad(second, loop.model.parameters(), create_graph=True))
    (first + second + penalty).backward()
    loop.step()
    # It is reached once more on the way, so that it weighs more; but it stays a mean of the two.
    low, high = sorted((first.item(), second.item()))
    assert low <= loop.shown()[0] <= high


def test_an_own_loss_divided_in_place_is_shown_as_it_was(loop):
    loss = loop.model(TOKENS)["loss"]
    before = loss.item()
    loss /= 4
    loss.backward()
    loop.step()
    assert loop.shown() == [pytest.approx(before, rel=1e-6)]


def test_several_observed_losses_of_a_step_are_averaged(loop):
    for value in (1.0, torch.tensor(2.0), 6.0):
        loop.model(TOKENS)["loss"].backward()
        loop.watch.observe(loss=value)
    loop.step()
    assert loop.shown() == [3.0]


def test_a_compiled_model_whose_logits_are_trained_on(transports):
    """Loss and logits come from one node of the graph, to which both gradients go."""
    torch.manual_seed(3)
    model = Net().train()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    watch = sharpwatch.attach(compiled, optimizer, training_job="job", transport=transports.new(), probes=())
    expected = []
    for own in (False, True):
        output = compiled(TOKENS)
        (output["loss"] if own else output["logits"].square().mean()).backward()
        optimizer.step()
        expected.append(pytest.approx(output["loss"].item(), rel=1e-6) if own else None)
    watch.close()
    samples = [sample for sample in transports[-1].samples if not sample.closing]
    assert [sample.loss if sample.HasField("loss") else None for sample in samples] == expected


COMPILED = """
import torch, sharpwatch
from sharpwatch.testing import InMemoryTransport
from test_losses import Net, TOKENS
model, transport = Net().train(), InMemoryTransport()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
watch = sharpwatch.attach(model, optimizer, training_job="job", transport=transport, probes=())
for _ in range(3):
    loss = model(TOKENS)["loss"]
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(loss.item())
watch.close()
print(*(sample.loss if sample.HasField("loss") else None for sample in transport.samples if not sample.closing))
"""


@pytest.mark.slow
def test_under_compiled_autograd_the_own_loss_is_taken_for_the_one_trained_on():
    tests = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{tests}:{Path(__file__).parent}"}
    command = [sys.executable, "-c", COMPILED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    *steps, shown = [line.split() for line in done.stdout.splitlines()]
    assert shown[0] == "None"  # at the first backward, nothing tells that it will be compiled
    assert [float(each) for each in shown[1:]] == pytest.approx([float(loss) for (loss,) in steps[1:]], rel=1e-6)
    assert "does not train on" not in done.stderr


def test_training_is_bit_for_bit_as_without(transports):
    def trained(watched):
        torch.manual_seed(3)
        model = Net().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        if watched:
            sharpwatch.attach(model, optimizer, training_job="job", transport=transports.new(), probes=())
        for step in range(4):
            for tokens in (TOKENS, TOKENS.flip(0)):
                output = model(tokens)
                loss = output["loss"] if step % 2 else output["loss"] + output["logits"].square().mean()
                (loss / 2).backward(retain_graph=bool(step % 2))
            optimizer.step()
            optimizer.zero_grad()
        return [parameter.detach() for parameter in model.parameters()]

    assert all(torch.equal(one, other) for one, other in zip(trained(True), trained(False), strict=True))
