"""`step(closure)` on several ranks: what is watched is what is watched where gradients were there before."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from stand_ins import LLAMA

import sharpwatch
from sharpwatch.testing import InMemoryTransport
from sharpwatch.v1 import agent_pb2, types_pb2

STEPS = 26


def train(kind, by_closure):
    """The run's weights on this rank, and what rank 0 sent of its steps but for what was measured in seconds."""
    transport = InMemoryTransport()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)).train()
    model = fully_shard(model) if kind == "fsdp" else DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    watch = sharpwatch.attach(
        model, optimizer, training_job="closures", transport=transport, probes=("gnb",), probe_every=4
    )
    torch.manual_seed(10 + torch.distributed.get_rank())
    for step in range(1, STEPS + 1):
        ids = torch.randint(32, (8, 8))

        def closure(ids=ids):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()

        if by_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        if transport.hello and step == 3:
            # Later than the ranks need to agree, whose messages are read a step or two after they are sent.
            transport.set_multipliers({"emb": 0.5, "ffn": 0.25}, apply_at_step=24)
    assert watch._watched.barrier.swallowed == 0
    watch.close()
    samples = [sample for sample in transport.samples if not sample.closing]
    for sample in samples:
        sample.ClearField("health")
        sample.taken_at_unix_ns = 0
        sample.gnb.seconds = 0.0
    weights = [value.to_local() if hasattr(value, "to_local") else value for value in model.state_dict().values()]
    return [weight.clone() for weight in weights], [sample.SerializeToString() for sample in samples]


def both(kind):
    return [train(kind, by_closure) for by_closure in (False, True)]


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_ranks_tap_and_probe_steps_with_closures(kind, ranks):
    before, within = ranks(both, 2, kind, timeout=120)[0]
    torch.testing.assert_close(within[0], before[0], rtol=0, atol=0)
    assert within[1] == before[1]
    samples = [agent_pb2.Sample.FromString(each) for each in within[1]]
    assert [sample.step for sample in samples] == list(range(1, STEPS + 1))
    assert all(sample.HasField("tap") for sample in samples)
    assert sum(bool(sample.gnb.traces.data) for sample in samples) >= 2
    assert any(result.outcome == types_pb2.COMMAND_OUTCOME_APPLIED for sample in samples for result in sample.results)
