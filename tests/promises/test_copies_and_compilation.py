"""Promises 1 and 2 where something else takes hold of a watched model: copies, checkpoints of it, torch.compile."""

from __future__ import annotations

import copy
import gc
import io
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
        before = watch._watched.losses._forwards
        expected = model(tokens(), tokens())[1]
        assert watch._watched.losses._forwards == before + 1
        assert torch.equal(twin(tokens(), tokens())[1], expected)
        assert watch._watched.losses._forwards == before + 1
        assert b"sharpwatch" not in pickle.dumps(nn.Sequential(model)).replace(Net.__module__.encode(), b"")
        torch.optim.swa_utils.AveragedModel(model).update_parameters(model)
        copy.deepcopy(optimizer)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


DUPLICATES = {
    "copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),  # noqa: S301 - our own
    "save": saved,
    "average": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
}


@pytest.mark.parametrize("name", DUPLICATES)
def test_a_copy_of_what_holds_a_watch_holds_a_closed_one(name, tmp_path):
    model, optimizer = made()
    model.watch = attached(model, optimizer)
    data = torch.utils.data.DataLoader([tokens()[0]] * 16, batch_size=4)
    model.checkpoints = sharpwatch.Checkpoints(tmp_path, model, optimizer, watch=model.watch, data=data)
    steps = 0
    for batch in model.checkpoints.batches(epochs=1):
        twin = DUPLICATES[name](model)
        assert (twin.watch.run, twin.watch.step) == (model.watch.run, steps)
        twin.watch.observe(loss=1.0)
        twin.watch.saved_checkpoint(1, "nowhere")
        assert twin.watch.pending_rollback is None
        assert twin.watch.state_dict() == {}
        twin.watch.close()
        assert twin.checkpoints._watch is twin.watch
        del twin
        gc.collect()
        model(batch, batch)[1].backward()
        optimizer.step()
        steps += 1
        assert model.watch.step == steps
    assert steps == 4
    assert model.watch._watched.barrier.swallowed == 0
    model.watch.close()


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
    assert watch._watched is None or watch._watched.barrier.swallowed == 0
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
