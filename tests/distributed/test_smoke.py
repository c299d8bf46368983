"""One run on two ranks in each of the three usual ways: DDP, FSDP2 and tensor parallelism.

The other files of this folder go through the details; this one runs with the default tests.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import sharding
from stand_ins import LLAMA

import sharpwatch
from sharpwatch.testing import InMemoryTransport
from sharpwatch.v1 import agent_pb2, types_pb2

STEPS, COMMANDED = 16, 4


def model_of(kind):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)).train()
    if kind == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if kind == "fsdp2":
        return sharding.by_fsdp(model, mesh)
    columns = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
    for layer in model.model.layers:
        parallelize_module(layer.mlp, mesh, columns)
    return model


def train(kind, *, watched, multipliers=None):
    """The weights held by this rank, and the samples that it sent."""
    model = model_of(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    transport = InMemoryTransport()
    watch = (
        sharpwatch.attach(model, optimizer, training_job="smoke", transport=transport, probe_every=4, probes=("gnb",))
        if watched
        else None
    )
    torch.manual_seed(1 if kind == "tp" else 1 + dist.get_rank())
    for step in range(1, STEPS + 1):
        ids = torch.randint(32, (4, 8))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if multipliers and transport.hello and step == COMMANDED:
            chosen = types_pb2.MultiplierSet(multipliers=multipliers, update_every={"emb": 2})
            transport.command(id="cut", set_multipliers=chosen)
    if watch is not None:
        watch.close()
    held = [value.to_local() if hasattr(value, "to_local") else value for value in model.parameters()]
    return [value.detach().clone() for value in held], [sample.SerializeToString() for sample in transport.samples]


def three_runs(kind):
    """A plain run, a watched one, and one that gets a command; last what that one logs of it."""
    plain, _ = train(kind, watched=False)
    watched, samples = train(kind, watched=True)
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("sharpwatch").addHandler(handler)
    commanded, after = train(kind, watched=True, multipliers={"ffn": 0.5})
    return plain, watched, samples, commanded, after, [line for line in lines if "multipliers" in line]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "tp"])
def test_a_run_is_unchanged_until_a_command_that_all_ranks_take(kind, ranks):
    results = ranks(three_runs, 2, kind, timeout=120)
    for plain, watched, _, commanded, _, _ in results:
        torch.testing.assert_close(watched, plain, rtol=0, atol=0)
        assert any(not torch.equal(one, other) for one, other in zip(commanded, plain, strict=True))
    first, second = results
    assert second[2] == second[4] == []  # one rank speaks for all
    if kind == "ddp":
        torch.testing.assert_close(first[3], second[3], rtol=0, atol=0)
    samples = [agent_pb2.Sample.FromString(each) for each in first[2]]
    assert [sample.step for sample in samples if not sample.closing] == list(range(1, STEPS + 1))
    assert any(sample.HasField("gnb") for sample in samples)
    assert all(not sample.health.swallowed_errors and not sample.health.probe_failures for sample in samples)
    results_sent = [result for each in first[4] for result in agent_pb2.Sample.FromString(each).results]
    assert [(result.command_id, result.outcome) for result in results_sent] == [
        ("cut", types_pb2.COMMAND_OUTCOME_APPLIED)
    ]
    (line,) = first[5]
    command = "learning-rate multipliers of revision 0 (ffn x 0.5, emb updated every 2 steps) applied at step "
    assert line.startswith(command)
    assert second[5] == []
