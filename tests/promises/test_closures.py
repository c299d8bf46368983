"""Promise 1 for `step(closure)`: losses and weights are bit-identical, though the agent stands between the two."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import sharpwatch
from sharpwatch.agent.probes.builtin import PROBES
from sharpwatch.agent.transport.courier_handle import CourierHandle

STEPS = 25
ABSENT = "127.0.0.1:9"  # discard: nothing listens there


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters, lr=0.1, max_iter=3, history_size=5)


def lbfgs_with_line_search(parameters):
    return torch.optim.LBFGS(parameters, max_iter=3, line_search_fn="strong_wolfe")


@pytest.fixture
def sent(monkeypatch):
    """What is sent to the real courier."""
    messages = []
    monkeypatch.setattr(CourierHandle, "send", lambda _, request: messages.append(request.sample))
    return messages


def train(make, **options):
    """Dropout draws anew at each evaluation."""
    torch.manual_seed(7)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2)).train()
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * STEPS)
    watch = sharpwatch.attach(model, optimizer, training_job="promise", address=ABSENT, **options)
    losses = []
    for _ in range(STEPS):
        tokens = torch.randint(64, (8, 16))

        def closure(tokens=tokens):
            optimizer.zero_grad()
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            losses.append(loss.item())
            return loss

        losses.append(optimizer.step(closure).item())
        schedule.step()
    watch.close()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    return losses, weights, optimizer.state_dict()["state"], schedule.get_last_lr(), torch.get_rng_state()


@pytest.mark.parametrize("make", [adamw, sgd, lbfgs, lbfgs_with_line_search])
def test_watched_and_plain_runs_are_bit_identical(make, sent, monkeypatch):
    probes = PROBES if make is adamw else [*PROBES][:-1]  # the last is for Adam alone
    watched = train(make, probe_every=5, probes=probes)
    monkeypatch.setenv("SHARPWATCH_DISABLED", "1")
    torch.testing.assert_close(watched, train(make), rtol=0, atol=0, equal_nan=True)
    steps = [sample for sample in sent if not sample.closing]
    assert [sample.step for sample in steps if all(map(sample.HasField, probes))] == list(range(5, STEPS + 1, 5))
    assert all(sample.HasField("tap") for sample in steps)
    assert not any(sample.health.swallowed_errors for sample in steps)
    # A step of one micro-batch has no gradient noise, and says so.
    assert {failure.probe for sample in steps for failure in sample.health.probe_failures} <= {"gradient_noise"}
