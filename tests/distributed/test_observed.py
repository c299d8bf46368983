"""Each rank observes its own batch: DDP is probed on rank 0's, a sharded model on all of them."""

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
from sharpwatch.v1 import agent_pb2

STEPS, EVERY, ROWS = 12, 4, 16


def loss_fn(model, batch):
    """A classifier of rows by their last token, whose labels the model never sees."""
    logits = model(input_ids=batch["ids"]).logits[:, -1]
    return torch.nn.functional.cross_entropy(logits, batch["labels"])


def logits_fn(model, batch):
    logits = model(input_ids=batch["ids"]).logits[:, -1]
    return logits, torch.ones_like(batch["labels"], dtype=torch.bool)


def train(kind, probes, *, late=False):
    """The weights held by this rank, and the samples and the loss of each step."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)).train()
    sharded = kind == "fsdp2"
    model = (
        sharding.by_fsdp(model, init_device_mesh("cpu", (dist.get_world_size(),)))
        if sharded
        else DistributedDataParallel(model)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    options = {"loss_fn": loss_fn, "logits_fn": logits_fn, "probe_every": EVERY, "probes": probes}
    transport, losses = InMemoryTransport(), []
    watch = sharpwatch.attach(model, optimizer, training_job="job", transport=transport, **options)
    torch.manual_seed(1 + dist.get_rank())
    for _ in range(STEPS):
        batch = {"ids": torch.randint(32, (ROWS, 8)), "labels": torch.randint(32, (ROWS,))}
        loss = loss_fn(model, batch)
        loss.backward()
        if not late:
            watch.observe(loss=loss, batch=batch)
        optimizer.step()
        optimizer.zero_grad()
        if late:
            watch.observe(loss=loss, batch=batch)
        losses.append(loss.item())
    watch.close()
    held = [value.to_local() if sharded else value for value in model.parameters()]
    return [value.detach().clone() for value in held], [each.SerializeToString() for each in transport.samples], losses


def both(kind, probes):
    """A watched run without probes, and one with them."""
    return train(kind, ()), train(kind, probes)


@pytest.mark.parametrize(("kind", "probes"), [("ddp", ("gnb", "direction", "gradient_noise")), ("fsdp2", ("gnb",))])
def test_observed_batches_of_all_ranks(ranks, kind, probes):
    results = ranks(both, 2, kind, probes, timeout=120)
    for (plain, _, _), (probed, _, _) in results:
        torch.testing.assert_close(probed, plain, rtol=0, atol=0)
    samples = [agent_pb2.Sample.FromString(each) for each in results[0][1][1]]
    assert not samples[-1].health.probe_failures
    assert not samples[-1].health.swallowed_errors
    for probe in probes:
        assert sum(sample.HasField(probe) for sample in samples) >= 2, probe
    rows = {sample.gnb.rows for sample in samples if sample.HasField("gnb")}
    assert rows == {ROWS // 8 * (2 if kind == "fsdp2" else 1)}  # of both ranks, where both compute
    means = [sum(pair) / 2 for pair in zip(results[0][1][2], results[1][1][2], strict=True)]
    assert [sample.loss for sample in samples if not sample.closing] == pytest.approx(means, rel=1e-5)


def late(kind):
    return train(kind, ("gnb",), late=True)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_batch_observed_too_late_is_refused_on_all_ranks_and_stops_none(ranks, kind):
    results = ranks(late, 2, kind, timeout=120)
    samples = [agent_pb2.Sample.FromString(each) for each in results[0][1]]
    (failure,) = samples[-1].health.probe_failures
    assert "came after optimizer.step()" in failure.reason
    assert [sample.step for sample in samples if not sample.closing] == list(range(1, STEPS + 1))
