"""On several ranks copies are tried without communication, and the objection of one rank holds for all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import sharding
from stand_ins import LLAMA

import sharpwatch
from sharpwatch.testing import InMemoryTransport
from sharpwatch.v1 import agent_pb2, types_pb2

STEPS = 14


class Own(torch.optim.Optimizer):
    """A project's own optimizer with momentum."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, *_):
        for group in self.param_groups:
            self.prepare(group)
            for p in group["params"]:
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].mul_(0.9).add_(p.grad)
                p.add_(state["momentum"], alpha=-group["lr"])

    def prepare(self, group):
        """Before a group is stepped."""


class Averaging(Own):
    """Averages gradients itself."""

    def prepare(self, group):
        for p in group["params"]:
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()


class Clipping(Own):
    """Clips each gradient, which takes a sum over ranks where it is a DTensor."""

    def prepare(self, group):
        for p in group["params"]:
            p.grad.mul_((1.0 / p.grad.norm()).clamp(max=1.0))


class Stacked(Own):
    """One momentum of a group, for parameters of at least `smallest` entries."""

    smallest = 0

    @torch.no_grad()
    def step(self, *_):
        for group in self.param_groups:
            large = [p for p in group["params"] if p.numel() >= self.smallest]
            for held in [large] if large else []:
                grads = torch.cat([p.grad.flatten() for p in held])
                buffer = self.state[held[0]].setdefault("buffer", torch.zeros_like(grads))
                if buffer.shape != grads.shape:
                    buffer = self.state[held[0]]["buffer"] = torch.zeros_like(grads)
                buffer.mul_(0.9).add_(grads)
                for p, part in zip(held, buffer.split([p.numel() for p in held]), strict=True):
                    p.add_(part.view_as(p), alpha=-group["lr"])
            for p in group["params"]:
                if p.numel() < self.smallest:
                    p.sub_(p.grad, alpha=group["lr"])


class StackedWhenLarge(Stacked):
    """The small copies at attach do not show it."""

    smallest = 300


KINDS = {kind.__name__: kind for kind in (Own, Averaging, Clipping, Stacked, StackedWhenLarge)}


def model_of(how):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)).train()
    if how == "ddp":
        return DistributedDataParallel(model)
    return sharding.by_fsdp(model, init_device_mesh("cpu", (dist.get_world_size(),)))


def train(how, name, *, watched, objecting=None):
    """This rank's weights, what the watch says of learning rates, the results, and how many errors were swallowed."""
    model = model_of(how)
    optimizer = KINDS[name](model.parameters())
    transport, refusal, swallowed = InMemoryTransport(), "", 0
    if watched:
        watch = sharpwatch.attach(model, optimizer, training_job="own", transport=transport, probes=())
        if objecting == dist.get_rank():
            watch._watched.strategy.present_state.refusal = "Own: a reason"
    torch.manual_seed(1 + dist.get_rank())
    for step in range(1, STEPS + 1):
        ids = torch.randint(32, (4, 8))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if transport.hello and step == 4:
            transport.command(id="cut", set_multipliers=types_pb2.MultiplierSet(multipliers={"ffn": 0.5}))
    if watched:
        refusal, swallowed = watch.status.lr_refusal, watch._watched.barrier.swallowed
        watch.close()
    held = [value.to_local() if hasattr(value, "to_local") else value for value in model.parameters()]
    samples = [sample.SerializeToString() for sample in transport.samples]
    return [value.detach().clone() for value in held], refusal, samples, swallowed


def both(how, name, objecting=None):
    return train(how, name, watched=False), train(how, name, watched=True, objecting=objecting)


def results_of(ranks_results):
    samples = [agent_pb2.Sample.FromString(each) for each in ranks_results[0][1][2]]
    return [result for sample in samples for result in sample.results]


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_an_unknown_one_with_state_by_parameter_is_controlled(ranks, how):
    done = ranks(both, 2, how, "Own", timeout=120)
    (result,) = results_of(done)
    assert result.outcome == types_pb2.COMMAND_OUTCOME_APPLIED, result.detail
    for (plain, *_), (commanded, refusal, _, swallowed) in done:
        assert (refusal, swallowed) == ("", 0)
        assert any(not torch.equal(a, b) for a, b in zip(plain, commanded, strict=True))


@pytest.mark.parametrize(
    ("how", "name", "reason"),
    [
        ("ddp", "Stacked", "its steps depend on how parameters are grouped"),
        ("ddp", "Averaging", "its code names 'dist': step() may wait for other ranks"),
        ("fsdp2", "Clipping", "its step() communicates between ranks"),
    ],
)
def test_what_cannot_be_shown_is_refused_at_attach_and_nobody_waits(ranks, how, name, reason):
    done = ranks(both, 2, how, name, timeout=120)
    (result,) = results_of(done)
    assert result.outcome == types_pb2.COMMAND_OUTCOME_REFUSED
    for (plain, *_), (watched, refusal, _, swallowed) in done:
        assert reason in refusal
        assert swallowed == 0
        torch.testing.assert_close(watched, plain, rtol=0, atol=0)


def test_what_a_rank_finds_when_a_command_comes_is_refused_on_all(ranks):
    done = ranks(both, 2, "ddp", "StackedWhenLarge", timeout=120)
    (result,) = results_of(done)
    assert result.outcome == types_pb2.COMMAND_OUTCOME_REFUSED
    assert "StackedWhenLarge: it keeps 'buffer' of several parameters under one of them" in result.detail
    for (plain, *_), (watched, refusal, _, swallowed) in done:
        assert refusal.startswith("StackedWhenLarge: ")
        assert swallowed == 0
        torch.testing.assert_close(watched, plain, rtol=0, atol=0)


@pytest.mark.parametrize("objecting", [0, 1])
def test_the_objection_of_one_rank_holds_for_all(ranks, objecting):
    done = ranks(both, 2, "ddp", "Own", objecting, timeout=120)
    (result,) = results_of(done)
    assert result.outcome == types_pb2.COMMAND_OUTCOME_REFUSED
    assert ("Own: a reason" if objecting == 0 else "the optimizer of another rank") in result.detail
    for (plain, *_), (watched, *_) in done:
        torch.testing.assert_close(watched, plain, rtol=0, atol=0)
