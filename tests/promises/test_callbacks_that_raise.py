"""Promise: what a user's callbacks raise does what it does without sharpwatch, and leaves nothing half done behind."""

from __future__ import annotations

import functools
import logging
import signal

import pytest
import torch
from trainer import Trainer

from sharpwatch.agent.probes.gnb import Gnb
from sharpwatch.agent.probes.runner import ProbeRunner
from sharpwatch.agent.statistics.tap import Tap
from sharpwatch.testing import InMemoryTransport
from sharpwatch.v1 import types_pb2

STEPS = 20


class OwnError(Exception):
    """The user's."""


def broken(*_, **__):
    raise OwnError


def train(steps=STEPS, prepare=lambda _: None, close=True, **options):
    """A loop that skips the batches of steps that fail; how many did, and the trainer."""
    trainer = Trainer(**options)
    prepare(trainer)
    failed = 0
    for _ in range(steps):
        try:
            trainer.step()
        except (OwnError, KeyboardInterrupt):
            failed += 1
            trainer.optimizer.zero_grad()
    if close:
        trainer.watch.close()
    return failed, trainer


def assert_as_plain(prepare, monkeypatch, **options):
    """The watched trainer, which has done what the plain one did."""
    failed, trainer = train(prepare=prepare, **options)
    with monkeypatch.context() as disabled:
        disabled.setenv("SHARPWATCH_DISABLED", "1")
        plain_failed, plain = train(prepare=prepare, **options)
    assert failed == plain_failed
    assert trainer.digest() == plain.digest()
    return failed, trainer


# In probes: the probe is given up and its failure reported, no more.


@pytest.mark.parametrize(("callback", "probes"), [("logits_fn", {"gnb"}), ("loss_fn", {"gnb", "direction"})])
def test_a_callback_of_the_probes(transports, monkeypatch, callback, probes):
    failed, trainer = assert_as_plain(
        lambda _: None, monkeypatch, probe_every=1, transport=transports.new(), **{callback: broken}
    )
    assert failed == trainer.watched.barrier.swallowed == 0
    failures = transports[0].samples[-1].health.probe_failures
    assert {failure.probe for failure in failures} == probes
    assert all((failure.count, failure.disabled) == (3, True) for failure in failures)


# In the loop: each once, at its sixth call.


def raising_at(call):
    count = 0

    def hook(*_):
        nonlocal count
        count += 1
        if count == call:
            raise OwnError

    return hook


HOOKS = {
    "before a forward": lambda trainer: trainer.model.ln_f.register_forward_pre_hook(raising_at(6)),
    "after a forward": lambda trainer: trainer.model.register_forward_hook(raising_at(6)),
    "in a backward": lambda trainer: trainer.model.lm_head.register_full_backward_hook(raising_at(6)),
    "at a gradient": lambda trainer: trainer.model.wte.weight.register_hook(raising_at(6)),
    "before a step": lambda trainer: trainer.optimizer.register_step_pre_hook(raising_at(6)),
    "after a step": lambda trainer: trainer.optimizer.register_step_post_hook(raising_at(6)),
}


@pytest.mark.parametrize("where", HOOKS)
def test_a_users_own_hook(transports, monkeypatch, where):
    failed, trainer = assert_as_plain(HOOKS[where], monkeypatch, transport=transports.new())
    assert failed == 1
    assert trainer.watched.barrier.swallowed == 0
    assert trainer.watch.step == (STEPS if where == "after a step" else STEPS - 1)
    *steps, goodbye = transports[0].samples
    assert [sample.step for sample in steps] == list(range(1, trainer.watch.step + 1))
    assert goodbye.closing
    assert not any(sample.health.probe_failures for sample in transports[0].samples)


# Half-way through step().


class Halting(torch.optim.Optimizer):
    """Gradient descent whose sixth step raises before it moves the last parameter."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})
        self.calls = 0

    @torch.no_grad()
    def step(self):
        self.calls += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if self.calls == 6 and parameter is group["params"][-1]:
                    raise OwnError
                parameter.sub_(group["lr"] * parameter.grad)


def test_a_step_that_raises_half_way(transports, monkeypatch):
    failed, trainer = assert_as_plain(lambda _: None, monkeypatch, optimizer=Halting, transport=transports.new())
    assert failed == 1
    assert trainer.watched.barrier.swallowed == 0


def test_a_step_that_raises_half_way_under_a_multiplier(transports):
    def cut(_):
        transports[0].command(id="cut", set_multipliers=types_pb2.MultiplierSet(multipliers={"ffn": 0.5}))

    failed, trainer = train(steps=6, prepare=cut, close=False, optimizer=Halting, transport=transports.new())
    assert failed == 1
    (group,) = trainer.optimizer.param_groups
    assert all(one is other for one, other in zip(group["params"], trainer.model.parameters(), strict=True))
    assert [group["lr"]] == trainer.schedule.get_last_lr()
    # The next one is as it would have been.
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    gradients = {}
    trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({name: weight.grad.clone() for name, weight in trainer.model.named_parameters()})
    )
    rate = group["lr"]
    trainer.step()
    for name, weight in trainer.model.named_parameters():
        factor = 0.5 if ".linear" in name else 1.0
        assert torch.equal(weight, before[name] - factor * rate * gradients[name]), name
    trainer.watch.close()
    assert trainer.watched.barrier.swallowed == 0


# A signal handler's error may come while our code runs: it is the loop's all the same.


def interrupted(_number, _frame):
    raise OwnError


def once(*_):
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    raise OwnError


class Preemption:
    def __call__(self, _number, _frame):
        raise OwnError


HANDLERS = {
    "function": interrupted,
    "one-shot": once,
    "object": Preemption(),
    "partial": functools.partial(interrupted),
}


@pytest.fixture(params=[*HANDLERS, "Ctrl-C"])
def number(request):
    """A signal whose handler raises."""
    before = signal.signal(signal.SIGUSR1, HANDLERS.get(request.param, signal.SIG_DFL))
    yield signal.SIGINT if request.param == "Ctrl-C" else signal.SIGUSR1
    signal.signal(signal.SIGUSR1, before)


PLACES = {  # at the fifth step, in the midst of our own code: where, at which call of it, and what that is like
    "tap": (Tap, "read", 5, "register_step_pre_hook"),
    "probe": (Gnb, "run", 1, "register_step_post_hook"),
    "pipe": (InMemoryTransport, "send", 5, "register_step_post_hook"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_signal_handler(transports, monkeypatch, number, place):
    owner, name, call, as_if = PLACES[place]
    original, calls = getattr(owner, name), []

    def signalled(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(number)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, signalled)
    failed, trainer = train(transport=transports.new())
    monkeypatch.setenv("SHARPWATCH_DISABLED", "1")
    plain_failed, plain = train(prepare=lambda plain: getattr(plain.optimizer, as_if)(raising_at(5)))
    assert failed == plain_failed == 1
    assert trainer.digest() == plain.digest()
    assert trainer.watched.barrier.swallowed == 0
    assert not transports[0].samples[-1].health.probe_failures


# Where the program's own logging raises.


class Broken(logging.Handler):
    def emit(self, _):
        raise OwnError


def test_a_log_handler(transports, monkeypatch):
    handler = Broken()
    logging.getLogger("sharpwatch").addHandler(handler)
    try:
        monkeypatch.setattr(ProbeRunner, "forward", lambda *_: {}["on purpose"])
        failed, trainer = train(transport=transports.new())
    finally:
        logging.getLogger("sharpwatch").removeHandler(handler)
    monkeypatch.setenv("SHARPWATCH_DISABLED", "1")
    _, plain = train()
    assert failed == 0
    assert trainer.digest() == plain.digest()
    assert transports[0].samples[-1].health.swallowed_errors == trainer.watched.barrier.swallowed == 4
