"""Gradient norms on the wire are those before clipping, however the loop clips."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import stand_ins
import torch
from torch import nn
from torch.nn.utils import clip_grad, clip_grad_norm_

import sharpwatch
from sharpwatch.testing import InMemoryTransport

TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 1, 2]])
LIMIT = 0.01


class Loop:
    """One model in training; `norms` are those of all gradients before clipping, by step."""

    def __init__(self, **options) -> None:
        torch.manual_seed(3)
        self.transport = InMemoryTransport()
        self.model = stand_ins.Net().train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.watch = sharpwatch.attach(
            self.model, self.optimizer, training_job="job", transport=self.transport, probes=(), **options
        )
        self.norms: list[float] = []

    def backward(self) -> None:
        self.model(TOKENS, TOKENS)[1].backward()
        squares = [float(p.grad.double().square().sum()) for p in self.model.parameters() if p.grad is not None]
        self.norms.append(math.sqrt(sum(squares)))

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def taps(self):
        self.watch.close()
        return [sample.tap for sample in self.transport.samples if sample.HasField("tap")]


def norm(tap) -> float:
    return math.sqrt(float(np.square(np.frombuffer(tap.gradient_norm.data, "<f4"), dtype=np.float64).sum()))


def clip_by_torch(parameters):
    return clip_grad_norm_(parameters, LIMIT)


def clip_in_two_calls(parameters):
    if not hasattr(nn.utils, "clip_grads_with_norm_"):
        pytest.skip("this torch has no clip_grads_with_norm_")
    total = nn.utils.get_total_norm([p.grad for p in parameters])
    nn.utils.clip_grads_with_norm_((p for p in parameters), LIMIT, total)
    return total


def clip_by_accelerate(parameters):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).clip_grad_norm_(parameters, LIMIT)


@pytest.mark.parametrize("clip", [clip_by_torch, clip_in_two_calls, clip_by_accelerate])
def test_norms_are_those_before_clipping(clip):
    loop = Loop()
    for _ in range(3):
        loop.backward()
        clip(list(loop.model.parameters()))
        loop.step()
    taps = loop.taps()
    assert [norm(tap) for tap in taps] == pytest.approx(loop.norms, rel=1e-5)
    assert [tap.clip_factor for tap in taps] == pytest.approx([LIMIT / n for n in loop.norms], rel=1e-4)


def test_a_step_without_clipping_after_one_with_it_is_taken_as_it_is():
    loop = Loop()
    loop.backward()
    clip_by_torch(loop.model.parameters())
    loop.step()
    loop.backward()
    loop.step()
    first, second = loop.taps()
    assert first.clip_factor < 1
    assert (norm(second), second.clip_factor) == (pytest.approx(loop.norms[1], rel=1e-6), 1.0)


def test_a_loop_that_clips_by_itself_can_tell_the_norm():
    loop = Loop()
    for _ in range(2):
        loop.backward()
        for parameter in loop.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(LIMIT / loop.norms[-1])
        loop.watch.observe(grad_norm=torch.tensor(loop.norms[-1]))
        loop.step()
    taps = loop.taps()
    assert [norm(tap) for tap in taps] == pytest.approx(loop.norms, rel=1e-5)
    assert [tap.clip_factor for tap in taps] == pytest.approx([LIMIT / n for n in loop.norms], rel=1e-5)


def test_what_is_told_of_the_norm_changes_nothing_where_clipping_was_seen():
    loop = Loop()
    loop.backward()
    clip_by_torch(loop.model.parameters())
    loop.watch.observe(grad_norm=123.0)
    loop.step()
    assert norm(loop.taps()[0]) == pytest.approx(loop.norms[0], rel=1e-5)


def test_clipping_of_some_parameters_is_undone_for_these_alone():
    loop = Loop()
    loop.backward()
    names = dict(loop.model.named_parameters())
    clipped = [parameter for parameter in names.values() if parameter.dim() > 1][:1]
    before = float(clipped[0].grad.norm())
    clip_grad_norm_(clipped, before / 4)
    loop.step()
    assert norm(loop.taps()[0]) == pytest.approx(loop.norms[0], rel=1e-5)


def test_only_the_block_whose_gradient_was_not_finite_is_named():
    loop = Loop()
    loop.backward()
    (name, broken), *_ = [(n, p) for n, p in loop.model.named_parameters() if p.grad is not None and p.dim() > 1]
    broken.grad.view(-1)[0] = math.nan
    clip_by_torch(loop.model.parameters())  # spreads it over all of them
    loop.step()
    counts = np.frombuffer(loop.taps()[0].non_finite.data, "<i8")
    blocks = sharpwatch.classify(loop.model)
    (there,) = {row for part, row in zip(blocks.parts, blocks.layer_block_of, strict=True) if part.parameter == name}
    assert [i for i, count in enumerate(counts) if count] == [there]


def test_torch_is_left_as_it_was():
    names = [(clip_grad, "_clip_grads_with_norm_"), (nn.utils, "clip_grads_with_norm_")]
    before = [getattr(module, name, None) for module, name in names]
    first, second = Loop(), Loop()
    first.watch.close()
    second.backward()
    clip_by_torch(second.model.parameters())
    second.step()
    assert norm(second.taps()[0]) == pytest.approx(second.norms[0], rel=1e-5)
    assert [getattr(module, name, None) for module, name in names] == before


def test_clipping_of_another_model_is_none_of_ours():
    loop, other = Loop(), stand_ins.Net().train()
    other(TOKENS, TOKENS)[1].backward()
    loop.backward()
    clip_grad_norm_(other.parameters(), LIMIT)
    loop.step()
    assert loop.taps()[0].clip_factor == 1.0


def test_clipping_is_bit_identical_under_watch():
    def trained(watched: bool) -> list[torch.Tensor]:
        torch.manual_seed(3)
        model = stand_ins.Net().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        watch = SimpleNamespace(close=lambda: None)
        if watched:
            watch = sharpwatch.attach(model, optimizer, training_job="job", transport=InMemoryTransport())
        for _ in range(4):
            model(TOKENS, TOKENS)[1].backward()
            clip_by_torch(model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        watch.close()
        return [parameter.detach().clone() for parameter in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(trained(True), trained(False), strict=True))
