"""On several ranks a rollback ends, on each, where a run ends that never took the data."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from stand_ins import Net, Wire

import sharpwatch
from sharpwatch.agent import attach as attach_module
from sharpwatch.errors import CheckpointError
from sharpwatch.v1 import types_pb2

STEPS = 24  # of twelve batches an epoch


class Loop:
    """A training loop with dropout, each rank on its share of the data."""

    def __init__(self, sharding):
        torch.manual_seed(3)
        self.net = Net()
        self.drop = nn.Dropout(0.2)
        self.model = nn.parallel.DistributedDataParallel(self.net) if sharding == "ddp" else fully_shard(self.net)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 5, gamma=0.7)
        tokens = torch.randint(11, (96, 5), generator=torch.Generator().manual_seed(1))
        data = TensorDataset(tokens)
        self.loader = DataLoader(data, 4, sampler=DistributedSampler(data, seed=2))
        torch.manual_seed(100 + dist.get_rank())

    def step(self, tokens):
        logits, _ = self.model(tokens)
        nn.functional.cross_entropy(self.drop(logits).flatten(0, 1), tokens.roll(1).flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

    @property
    def weights(self):
        values = [value.detach() for value in self.net.parameters()]
        return [value.to_local().clone() if hasattr(value, "to_local") else value.clone() for value in values]


def by_hand(sharding, skip):
    loop, found = Loop(sharding), []
    batches = (batch for epoch in range(4) if not loop.loader.sampler.set_epoch(epoch) for batch in loop.loader)
    for number, (tokens,) in enumerate(batches, 1):
        if number not in skip:
            loop.step(tokens)
            found.append(loop.weights)
        if len(found) == STEPS:
            return found
    raise AssertionError("out of data")


def watched(sharding, folder):
    """The weights after each step, of a run that is rolled back to step 8 when it has come to step 14."""
    loop, wires = Loop(sharding), []
    attach_module.CourierPipe = lambda hello, **options: wires.append(Wire(hello, **options)) or wires[-1]
    watch = sharpwatch.attach(loop.model, loop.optimizer, training_job="back", control="rollback")
    checkpoints = sharpwatch.Checkpoints(
        folder, loop.model, loop.optimizer, watch=watch, data=loop.loader, scheduler=loop.schedule
    )
    found, uri, back = {}, "", []
    for (tokens,) in checkpoints.batches():
        loop.step(tokens)
        if checkpoints.step in found and not back:
            back.append(checkpoints.step)
        found[checkpoints.step] = loop.weights
        if checkpoints.step == 8 and not uri:
            uri = str(checkpoints.save())
        if checkpoints.step == 10 and not back and wires:
            checkpoint = types_pb2.Checkpoint(step=8, uri=uri)
            target = types_pb2.Rollback(checkpoint=checkpoint, skip_from_step=10, skip_to_step=12)
            wires[0].order(id="back", rollback=target, reason="bad shard")
        if checkpoints.step == STEPS:
            break
    told = [result.outcome for wire in wires for result in wire.results]
    watch.close()
    return [found[step] for step in range(1, STEPS + 1)], back, told


def taken_up(sharding, folder):
    """The run that was rolled back, taken up with a model, an optimizer and a loader that are new."""
    loop = Loop(sharding)
    attach_module.CourierPipe = Wire
    watch = sharpwatch.attach(loop.model, loop.optimizer, training_job="back", control="rollback")
    checkpoints = sharpwatch.Checkpoints(
        folder, loop.model, loop.optimizer, watch=watch, data=loop.loader, scheduler=loop.schedule
    )
    found = [checkpoints.resume()]
    for (tokens,) in checkpoints.batches():
        loop.step(tokens)
        found.append(loop.weights)
        if checkpoints.step == STEPS:
            break
    watch.close()
    return found


def three_ways(sharding, folder):
    return by_hand(sharding, [10, 11]), watched(sharding, folder), taken_up(sharding, folder)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_a_rollback_leaves_a_range_of_data_out_on_every_rank(ranks, tmp_path, sharding):
    for rank, (plain, rolled_back, resumed) in enumerate(ranks(three_ways, 2, sharding, str(tmp_path))):
        found, back, told = rolled_back
        assert back == [9]
        assert told == ([types_pb2.COMMAND_OUTCOME_APPLIED] if rank == 0 else [])
        torch.testing.assert_close(found, plain, rtol=0, atol=0)
        step, *found = resumed
        assert step == 8
        torch.testing.assert_close(found, plain[8:], rtol=0, atol=0)


def failing(folder):
    loop = Loop("ddp")
    attach_module.CourierPipe = Wire
    watch = sharpwatch.attach(loop.model, loop.optimizer, training_job="back", control="rollback")
    checkpoints = sharpwatch.Checkpoints(folder, loop.model, loop.optimizer, watch=watch)
    first = checkpoints.save()
    if dist.get_rank() == 1:  # one rank can't make its part
        checkpoints._others["broken"] = nn.Module()
        checkpoints._others["broken"].state_dict = lambda: 1 / 0
    with pytest.raises(CheckpointError, match="rank 1: ZeroDivisionError"):
        checkpoints.save()
    watch.close()
    return first.name, sorted(path.name for path in Path(folder).iterdir() if not path.name.startswith("."))


def test_where_one_rank_cannot_save_no_rank_has_and_what_stood_still_stands(ranks, tmp_path):
    for name, there in ranks(failing, 2, str(tmp_path)):
        assert there == ["head.json", name]
