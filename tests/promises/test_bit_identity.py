"""Promise 1: while no command is in force the run is bit-identical to one without sharpwatch."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import sharpwatch
from sharpwatch.agent.probes.builtin import PROBES
from sharpwatch.agent.transport.courier_handle import CourierHandle

STEPS = 200
ABSENT = "127.0.0.1:9"  # discard: nothing listens there


def gpt2():
    # One layer, for speed; tests/integration/test_bit_identity.py has two.
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    assert config.resid_pdrop > 0  # dropout draws from the global random source at every step
    return GPT2LMHeadModel(config).train()


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


@pytest.fixture
def sent(monkeypatch):
    """What is sent to the real courier."""
    messages = []
    send = CourierHandle.send

    def record(client, request):
        messages.append(request.sample)
        send(client, request)

    monkeypatch.setattr(CourierHandle, "send", record)
    return messages


def train(make, *, watched, autocast=False, steps=STEPS, **options):
    torch.manual_seed(7)
    model = gpt2()
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * steps)
    watch = None
    if watched:
        watch = sharpwatch.attach(model, optimizer, training_job="promise", address=ABSENT, **options)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(64, (8, 16))  # from the source that dropout draws from, too
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if watch is not None:
        watch.close()
    return losses, model.state_dict(), optimizer.state_dict(), torch.get_rng_state()


def assert_identical(one, other):
    assert one[0] == other[0]
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])
    for key, state in one[2]["state"].items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(other[2]["state"][key][n])) for n, v in state.items()
        )
    assert one[2]["param_groups"] == other[2]["param_groups"]
    assert torch.equal(one[3], other[3])


@pytest.mark.parametrize(
    ("make", "probes"),
    [(adamw, PROBES), pytest.param(sgd, [*PROBES][:-1], marks=pytest.mark.slow)],  # the last is for Adam alone
)
def test_watched_and_plain_runs_are_bit_identical_without_a_daemon(make, probes, sent, caplog):
    with caplog.at_level(logging.WARNING, "sharpwatch"):
        watched = train(make, watched=True, probe_every=5, probes=probes)
    assert_identical(train(make, watched=False), watched)
    probed = [sample for sample in sent if all(map(sample.HasField, probes))]
    assert [sample.step for sample in probed] == list(range(5, STEPS + 1, 5))
    assert not any(sample.health.swallowed_errors for sample in sent)
    # One micro-batch a step: gradient noise has nothing to compare, and says so.
    assert {failure.probe for sample in sent for failure in sample.health.probe_failures} == {"gradient_noise"}
    assert [sample.sequence for sample in sent] == list(range(1, STEPS + 2))
    assert sent[-1].closing


def test_under_autocast_too(sent):
    assert_identical(
        train(adamw, watched=False, autocast=True, steps=20),
        train(adamw, watched=True, autocast=True, steps=20, probe_every=2, probes=PROBES),
    )
    assert [sum(sample.HasField(probe) for sample in sent) for probe in PROBES] == [10] * len(PROBES)


def test_nothing_of_the_loop_is_touched_by_a_step_with_probes(sent):
    torch.manual_seed(7)
    model = gpt2()
    model.transformer.h[0].eval()  # a mixed setting must come back as it was
    optimizer = adamw(model.parameters())
    user_calls = []
    handle = model.transformer.wte.register_forward_hook(lambda *_: user_calls.append(1))
    watch = sharpwatch.attach(model, optimizer, training_job="promise", address=ABSENT, probe_every=1, probes=PROBES)
    flags = [module.training for module in model.modules()]
    hooks = [list(module._forward_hooks) for module in model.modules()]
    tokens = torch.randint(64, (8, 16))
    model(input_ids=tokens, labels=tokens).loss.backward()
    gradients = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    random = torch.get_rng_state()
    optimizer.step()
    assert all(map(sent[0].HasField, PROBES))
    assert user_calls == [1]
    assert torch.equal(random, torch.get_rng_state())
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert [module.training for module in model.modules()] == flags
    assert [list(module._forward_hooks) for module in model.modules()] == hooks
    assert all(p.grad is gradients[n][0] and torch.equal(*gradients[n]) for n, p in model.named_parameters())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    watch.close()
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert "step" not in vars(optimizer)


def test_disabled_by_the_environment_nothing_is_hooked_or_started(monkeypatch):
    monkeypatch.setenv("SHARPWATCH_DISABLED", "1")
    model = gpt2()
    optimizer = adamw(model.parameters())
    watch = sharpwatch.attach(model, optimizer, training_job="promise", initial_step=4)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks
    watch.observe(loss=1.0)
    watch.saved_checkpoint(4, "x")
    watch.restored(3)
    assert watch.pending_rollback is None
    assert watch.step == 4
    with watch:
        pass
    watch.close()
