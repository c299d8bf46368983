"""Promises 1 and 2 where something else takes hold of a watched model: copies, checkpoints of it, torch.compile."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from stand_ins import Net
from torch import nn

import sharpwatch

ABSENT = "127.0.0.1:9"  # discard: nothing listens there


def made():
    torch.manual_seed(3)
    model = Net().train()
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def attached(model, optimizer):
    return sharpwatch.attach(model, optimizer, training_job="promise", address=ABSENT, probe_every=2)


def tokens():
    return torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301 - our own
def test_a_copy_of_a_watched_model_works_and_is_not_watched(duplicate):
    model, optimizer = made()
    with attached(model, optimizer) as watch:
        twin = duplicate(model)
        before = watch._loop._losses._forwards
        expected = model(tokens(), tokens())[1]
        assert watch._loop._losses._forwards == before + 1
        assert torch.equal(twin(tokens(), tokens())[1], expected)
        assert watch._loop._losses._forwards == before + 1
        assert b"sharpwatch" not in pickle.dumps(nn.Sequential(model)).replace(Net.__module__.encode(), b"")
        torch.optim.swa_utils.AveragedModel(model).update_parameters(model)
        copy.deepcopy(optimizer)


def compiled_before(model, optimizer):
    model.compile(backend="eager", fullgraph=True)
    return attached(model, optimizer), model, optimizer.step


def compiled_around(model, optimizer):
    call = torch.compile(model, backend="eager", fullgraph=True)
    return attached(call, optimizer), call, optimizer.step


def compiled_after(model, optimizer):
    watch = attached(model, optimizer)
    return watch, torch.compile(model, backend="eager", fullgraph=True), optimizer.step


def compiled_step(model, optimizer):
    return attached(model, optimizer), model, torch.compile(optimizer.step, backend="eager")


def train(how):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # other tests compile too
    model, optimizer = made()
    watch, call, step = how(model, optimizer)
    for _ in range(4):
        call(tokens(), tokens())[1].backward()
        step()
        optimizer.zero_grad()
    assert watch._loop is None or watch._loop.border.swallowed == 0
    watch.close()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return graphs, model.state_dict()


@pytest.mark.filterwarnings("ignore:.*autograd.profiler.record_function")
@pytest.mark.parametrize("how", [compiled_before, compiled_around, compiled_after, compiled_step])
def test_compiled_code_is_what_it_is_without_sharpwatch(how, monkeypatch):
    graphs, weights = train(how)
    monkeypatch.setenv("SHARPWATCH_DISABLED", "1")
    plain_graphs, plain_weights = train(how)
    assert graphs == plain_graphs
    assert all(torch.equal(plain_weights[name], weights[name]) for name in weights)
