"""The gradient noise of a watched loop, against the covariance of its micro-batches' own gradients."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from stand_ins import Net

import sharpwatch
from sharpwatch.agent.probes import gradient_noise
from sharpwatch.agent.probes.gradient_noise import GradientListener
from sharpwatch.agent.safety import ExceptionBarrier
from sharpwatch.blocks import classify
from sharpwatch.testing import InMemoryTransport
from sharpwatch.wire import decode

MICRO_BATCHES = 4
# Norms are float32 sums, and the noise a difference of squared ones not much smaller than they are.
CLOSE = 1e-4


def tokens(seed):
    return torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(seed))


class Training:
    """A loop of one model, watched by a transport that keeps what it would send."""

    def __init__(self, *, compiled=False):
        torch.manual_seed(3)
        self.model = Net().train()
        if compiled:
            self.model = torch.compile(self.model, backend="aot_eager", fullgraph=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.transport = InMemoryTransport()
        self.watch = sharpwatch.attach(
            self.model,
            self.optimizer,
            training_job="noise",
            transport=self.transport,
            probe_every=1,
            probes=("gradient_noise",),
        )
        self.block_map = classify(self.model)

    def loss(self, seed):
        batch = tokens(seed)
        return self.model(batch, batch.roll(1))[1] / MICRO_BATCHES

    def accumulate(self, scale=1.0):
        for seed in range(MICRO_BATCHES):
            (self.loss(seed) * scale).backward()

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def covariance(self):
        """Tr Cov of the sum of the micro-batches' gradients, by layer block: n times their sample variance."""
        parameters = dict(self.model.named_parameters())
        total = np.zeros(len(self.block_map.layer_blocks))
        self.model.eval()  # nobody listens
        gradients = [torch.autograd.grad(self.loss(seed), parameters.values()) for seed in range(MICRO_BATCHES)]
        self.model.train()
        for i, name in enumerate(parameters):
            scatter = torch.stack([each[i] for each in gradients]).double().var(0).sum() * MICRO_BATCHES
            (part,) = (part for part in self.block_map.parts if part.parameter == name)
            total[self.block_map.layer_block_of[self.block_map.parts.index(part)]] += float(scatter)
        return total

    def noises(self):
        """Of each sample that has a probe; None where that has no noise."""
        self.watch.close()
        assert self.watch._watched is None or self.watch._watched.barrier.swallowed == 0
        probes = [sample.gradient_noise for sample in self.transport.samples if sample.HasField("gradient_noise")]
        shape = (len(self.block_map.layer_blocks),)
        return [
            decode(each.noise, name="noise", dtype="float32", shape=shape) if each.HasField("noise") else None
            for each in probes
        ]


@pytest.fixture
def training():
    return Training()


def test_it_is_the_trace_of_the_covariance_of_the_accumulated_gradient(training):
    expected = training.covariance()
    training.accumulate()
    training.step()
    (noise,) = training.noises()
    np.testing.assert_allclose(noise, expected, rtol=CLOSE)
    assert (expected > 0).all()


def test_clipping_takes_the_noise_along(training):
    expected = training.covariance()
    training.accumulate()
    norm = torch.nn.utils.clip_grad_norm_(training.model.parameters(), 0.01)
    training.step()
    (noise,) = training.noises()
    assert norm > 0.02
    np.testing.assert_allclose(noise, expected * (0.01 / float(norm)) ** 2, rtol=CLOSE)


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scale_is_no_part_of_it(training, fused):
    expected = training.covariance()
    if fused:  # it then unscales by itself
        training.optimizer.param_groups[0]["fused"] = True
        training.optimizer._step_supports_amp_scaling = True
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for seed in range(MICRO_BATCHES):
        scaler.scale(training.loss(seed)).backward()
    scaler.step(training.optimizer)
    scaler.update()
    (noise,) = training.noises()
    np.testing.assert_allclose(noise, expected, rtol=CLOSE)


def test_each_step_has_its_own(training):
    expected = []
    for _ in range(3):
        expected.append(training.covariance())
        training.accumulate()
        training.step()
    np.testing.assert_allclose(training.noises(), expected, rtol=CLOSE)


def left_over(training):
    training.model.zero_grad()
    torch.autograd.backward(
        list(training.model.parameters()), [torch.ones_like(p) for p in training.model.parameters()]
    )
    training.accumulate()


def thrown_away(training):
    training.accumulate()
    training.optimizer.zero_grad()
    training.accumulate()


def zeroed(training):
    training.accumulate()
    training.optimizer.zero_grad(set_to_none=False)
    training.accumulate()


def single(training):
    training.loss(0).backward()


def summed(training):
    (training.loss(0) + training.loss(1)).backward()
    training.loss(2).backward()


def twice(training):
    loss = training.loss(0)
    loss.backward(retain_graph=True)
    loss.backward()


def overflown(training):
    training.accumulate(scale=float("inf"))


def broken(training):
    def fail(_):
        raise RuntimeError("the user's own")

    training.accumulate()
    loss = training.loss(0)
    handle = training.model.wte.weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="the user's own"):
        loss.backward()
    handle.remove()
    training.accumulate()


@pytest.mark.parametrize(
    "accumulate",
    [left_over, thrown_away, zeroed, single, summed, twice, overflown, broken],
    ids=lambda each: each.__name__,
)
def test_it_is_absent_where_the_gradient_is_not_the_sum_of_the_recorded_backwards(training, accumulate):
    accumulate(training)
    training.step()
    assert training.noises() == [None]


def test_no_hook_outlives_the_step_or_the_watch(training):
    noise = training.watch._watched.scheduler.runner._probes["gradient_noise"]._listener
    training.accumulate()
    assert len(noise._handles) == len(list(training.model.parameters()))
    training.step()
    assert not noise._handles
    training.loss(0)
    assert noise._handles
    training.watch.close()
    assert not noise._handles


def test_where_it_is_not_asked_for_no_hook_is_installed(training, monkeypatch):
    training.watch.close()

    def installed(*_):
        raise AssertionError("a hook of the gradient noise")

    monkeypatch.setattr(gradient_noise, "get_gradient_edge", installed)
    monkeypatch.setattr(gradient_noise.GradientListener, "__init__", installed)
    transport = InMemoryTransport()
    watch = sharpwatch.attach(
        training.model, training.optimizer, training_job="noise", transport=transport, probe_every=1
    )
    training.accumulate()
    training.step()
    watch.close()
    assert watch._watched is None or watch._watched.barrier.swallowed == 0
    (sample, _) = transport.samples
    assert sample.HasField("gnb")
    assert not sample.gnb.HasField("gradient_noise")
    assert not sample.HasField("gradient_noise")


def test_a_removed_listener_hears_nothing_and_is_freed(training):
    training.watch.close()
    noise = GradientListener(training.block_map, training.model, ExceptionBarrier(), ranks=1)
    noise.forward()
    training.loss(0).backward()
    assert noise._readings.backwards == 1
    noise.remove()
    training.loss(0).backward()
    assert noise._readings.backwards == 1
    gone = weakref.ref(noise)
    del noise
    gc.collect()
    assert gone() is None


def test_where_averaging_is_not_known_it_never_listens(training):
    noise = GradientListener(training.block_map, training.model, ExceptionBarrier(), ranks=0)
    noise.forward()
    training.accumulate()
    assert noise.take() is None


def test_compiled_code_is_recorded_and_compiled_once():
    torch._dynamo.reset()
    training = Training(compiled=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            training.accumulate()
            training.step()
    torch._dynamo.reset()
    noises = training.noises()
    assert len(noises) == 3
    assert all(np.isfinite(noise).all() for noise in noises)
