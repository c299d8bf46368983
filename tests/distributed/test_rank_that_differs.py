"""One rank of a DDP run trains on shuffled labels: the daemon names it, and none in a healthy twin."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[1]))
from observations import Ids
from stand_ins import Net

import sharpwatch
from sharpwatch.daemon.detection.run_detection import RunDetection
from sharpwatch.daemon.ingest.hello import read_hello
from sharpwatch.daemon.ingest.samples import read_sample
from sharpwatch.daemon.runs.run import observation_of
from sharpwatch.testing import InMemoryTransport
from sharpwatch.v1 import agent_pb2
from sharpwatch.wire import decode

RANKS, STEPS, AT, WRONG = 4, 220, 181, 2  # the rank WRONG has wrong labels from step AT on
TOKENS = 11


def trained(wrong, broken_at=0):
    """The run's Hello and samples, of rank 0, and the losses of this rank."""
    torch.manual_seed(3)
    model = nn.parallel.DistributedDataParallel(Net().train())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    transport = InMemoryTransport()
    watch = sharpwatch.attach(model, optimizer, training_job="ranks", transport=transport, probes=())
    rank = dist.get_rank()
    source, losses = torch.Generator().manual_seed(100 + rank), []
    for step in range(1, STEPS + 1):
        tokens = torch.randint(TOKENS, (8, 16), generator=source)
        noisy = torch.rand(tokens.shape, generator=source) < 0.2  # so that no loss goes to 0
        labels = torch.where(noisy, torch.randint(TOKENS, tokens.shape, generator=source), (3 * tokens + 1) % TOKENS)
        if wrong and rank == WRONG and step >= AT:
            labels = labels.flatten()[torch.randperm(labels.numel(), generator=source)].view_as(labels)
        loss = nn.functional.cross_entropy(model(tokens)[0].flatten(0, 1), labels.flatten())
        loss.backward()
        losses.append(float(loss.detach()))
        watch.observe(loss=math.nan if rank == WRONG and step == broken_at else loss)
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    hello = transport.hello.SerializeToString() if transport.hello else b""
    return hello, [sample.SerializeToString() for sample in transport.samples], losses


def incidents_of(hello, samples):
    read = read_hello(agent_pb2.Hello.FromString(hello))
    found = RunDetection("run", read.layer_blocks, read.parameters, Ids(), parameter_names=read.parameter_names)
    for each in samples:
        reading = read_sample(read, agent_pb2.Sample.FromString(each))
        if not reading.closing:
            found.see(observation_of(read.blocks, reading))
    return found.incidents.all


def test_the_rank_with_wrong_labels_is_named(ranks):
    results = ranks(trained, RANKS, True, timeout=120)
    found = [each for each in incidents_of(*results[0][:2]) if each.first_step >= AT]
    (named,) = [each for each in found if "RankDiffers" in each.names]
    assert (named.name, named.rank, named.cause, named.severity) == ("RankDiffers", WRONG, "data", "critical")
    assert AT <= named.onset <= named.first_step <= AT + 5
    assert any(f"rank {WRONG} of {RANKS} differs" in evidence for evidence in named.evidence)


def test_no_rank_of_a_healthy_twin_is_named_and_rank_0_knows_all_losses(ranks):
    results = ranks(trained, RANKS, False, timeout=120)
    assert [each for each in incidents_of(*results[0][:2]) if each.rank is not None] == []
    sent = [agent_pb2.Sample.FromString(each) for each in results[0][1]]
    rows = [decode(each.rank_losses, name="", dtype="float32", shape=(RANKS,)) for each in sent if not each.closing]
    own = np.array([losses for _, _, losses in results], dtype=np.float32).T
    np.testing.assert_array_equal(np.array(rows), own)
    assert all(not samples for _, samples, _ in results[1:])


def test_a_loss_that_is_not_finite_on_one_rank_names_it(ranks):
    results = ranks(trained, RANKS, False, 20, timeout=120)
    (found,) = [each for each in incidents_of(*results[0][:2]) if each.name == "NonFinite"]
    assert (found.rank, found.onset) == (WRONG, 20)
    assert found.evidence == (f"loss is nan, from rank {WRONG} of {RANKS} alone",)


def one_without_a_loss():
    """Only rank 1 observes a loss."""
    torch.manual_seed(3)
    model = nn.parallel.DistributedDataParallel(Net().train())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    transport = InMemoryTransport()
    watch = sharpwatch.attach(model, optimizer, training_job="ranks", transport=transport, probes=())
    for _ in range(4):
        loss = model(torch.randint(TOKENS, (2, 5)))[0].square().mean()
        loss.backward()
        if dist.get_rank() == 1:
            watch.observe(loss=loss)
        optimizer.step()
    watch.close()
    return [sample.SerializeToString() for sample in transport.samples if not sample.closing]


def test_a_rank_without_a_loss_is_told_apart(ranks):
    sent = [agent_pb2.Sample.FromString(each) for each in ranks(one_without_a_loss, 2)[0]]
    rows = [decode(each.rank_losses, name="", dtype="float32", shape=(2,)) for each in sent]
    assert [np.isnan(row).tolist() for row in rows] == [[True, False]] * 4
    assert [row[1] for row in rows] == pytest.approx([each.loss for each in sent])


def alone():
    """A sharded model on one rank: the run's Hello and samples."""
    torch.manual_seed(3)
    model = fully_shard(Net().train())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    transport = InMemoryTransport()
    watch = sharpwatch.attach(model, optimizer, training_job="alone", transport=transport, probes=())
    for _ in range(4):
        tokens = torch.randint(TOKENS, (8, 16))
        loss = nn.functional.cross_entropy(model(tokens)[0].flatten(0, 1), tokens.flatten())
        loss.backward()
        watch.observe(loss=loss)
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    return transport.hello.SerializeToString(), [sample.SerializeToString() for sample in transport.samples]


def test_one_rank_alone_is_a_run_without_ranks(ranks):
    ((hello, samples),) = ranks(alone, 1, timeout=120)
    read = read_hello(agent_pb2.Hello.FromString(hello))
    readings = [read_sample(read, agent_pb2.Sample.FromString(each)) for each in samples]
    assert [each.step for each in readings if each.loss is not None] == [1, 2, 3, 4]
    assert [each.rank_losses for each in readings] == [None] * len(readings)
