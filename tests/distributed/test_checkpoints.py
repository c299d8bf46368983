"""On several ranks a rollback ends, on each, where a run ends that never took the data."""

from __future__ import annotations

import logging
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from stand_ins import Net

import sharpwatch
from sharpwatch.errors import CheckpointError
from sharpwatch.testing import InMemoryTransport
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
    loop, transport = Loop(sharding), InMemoryTransport()
    watch = sharpwatch.attach(loop.model, loop.optimizer, training_job="back", transport=transport, control="rollback")
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
        if checkpoints.step == 10 and not back and transport.hello:
            checkpoint = types_pb2.Checkpoint(step=8, uri=uri)
            target = types_pb2.Rollback(checkpoint=checkpoint, skip_from_step=10, skip_to_step=12)
            transport.command(id="back", rollback=target, reason="bad shard")
        if checkpoints.step == STEPS:
            break
    outcomes = [result.outcome for result in transport.results]
    watch.close()
    return [found[step] for step in range(1, STEPS + 1)], back, outcomes


def taken_up(sharding, folder):
    """The run that was rolled back, taken up with a model, an optimizer and a loader that are new."""
    loop = Loop(sharding)
    transport = InMemoryTransport()
    watch = sharpwatch.attach(loop.model, loop.optimizer, training_job="back", transport=transport, control="rollback")
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
        found, back, outcomes = rolled_back
        assert back == [9]
        assert outcomes == (["applied"] if rank == 0 else [])
        torch.testing.assert_close(found, plain, rtol=0, atol=0)
        step, *found = resumed
        assert step == 8
        torch.testing.assert_close(found, plain[8:], rtol=0, atol=0)


def failing(folder):
    loop = Loop("ddp")
    transport = InMemoryTransport()
    watch = sharpwatch.attach(loop.model, loop.optimizer, training_job="back", transport=transport, control="rollback")
    checkpoints = sharpwatch.Checkpoints(folder, loop.model, loop.optimizer, watch=watch)
    first = checkpoints.save()
    if dist.get_rank() == 1:  # one rank can't make its part
        checkpoints._extras["broken"] = nn.Module()
        checkpoints._extras["broken"].state_dict = lambda: 1 / 0
    with pytest.raises(CheckpointError, match="rank 1: ZeroDivisionError"):
        checkpoints.save()
    watch.close()
    return first.name, sorted(path.name for path in Path(folder).iterdir() if not path.name.startswith("."))


def test_where_one_rank_cannot_save_no_rank_has_and_what_stood_still_stands(ranks, tmp_path):
    for name, there in ranks(failing, 2, str(tmp_path)):
        assert there == ["head.json", name]


def rows(tokens):
    return [tuple(row) for row in tokens.tolist()]


def whole(loop):
    values = [value.detach() for value in loop.net.parameters()]
    return [(value.full_tensor() if hasattr(value, "full_tensor") else value).clone() for value in values]


def begun(sharding, folder, steps, alike):
    """A run of `steps` steps that ends with a checkpoint: the rows that this rank saw, and the weights."""
    loop, seen = quiet(sharding, alike), []
    checkpoints = checkpointed(loop, folder)
    for (tokens,) in checkpoints.batches():
        loop.step(tokens)
        seen += rows(tokens)
        if checkpoints.step == steps:
            break
    checkpoints.save()
    return seen, whole(loop), torch.get_rng_state()


def taken_over(sharding, folder, epochs, alike):
    """The run that was begun on other ranks, up to the end of `epochs`."""
    loop, log = quiet(sharding, alike), []
    logging.getLogger("sharpwatch").addFilter(lambda record: log.append(record.getMessage()) or True)
    checkpoints = checkpointed(loop, folder)
    step, start, random = checkpoints.resume(), whole(loop), torch.get_rng_state()
    seen = [[] for _ in range(epochs)]
    for (tokens,) in checkpoints.batches(epochs):
        seen[checkpoints.data.epoch] += rows(tokens)
        loop.step(tokens)
    return step, start, random, seen, whole(loop), log


def taken_over_by_hand(sharding, folder, step, skip, steps):
    """`steps` steps by PyTorch's own means from the checkpoint of `step`, the batches in `skip` passed over."""
    loop = quiet(sharding, alike=False)
    model, optimizer = get_state_dict(loop.model, [loop.optimizer])
    path = Path(folder) / f"step-{step}"
    dcp.load({"model": model, "optimizers": optimizer}, checkpoint_id=path)
    set_state_dict(loop.model, [loop.optimizer], model_state_dict=model, optim_state_dict=optimizer)
    loop.schedule.load_state_dict(torch.load(path / "rank-0.pt")["others"]["scheduler-0"])
    batches = (batch for epoch in range(3) if not loop.loader.sampler.set_epoch(epoch) for batch in loop.loader)
    kept = ((tokens,) for number, (tokens,) in enumerate(batches) if number not in skip)
    for (tokens,) in islice(kept, steps):
        loop.step(tokens)
    return whole(loop)


def quiet(sharding, alike):
    loop = Loop(sharding)
    loop.drop.p = 0.0  # else numbers count that a rank has not drawn before
    torch.manual_seed(7 if alike else 100 + dist.get_rank())
    return loop


def checkpointed(loop, folder):
    transport = InMemoryTransport()
    watch = sharpwatch.attach(loop.model, loop.optimizer, training_job="back", transport=transport, control="rollback")
    return sharpwatch.Checkpoints(
        folder, loop.model, loop.optimizer, watch=watch, data=loop.loader, scheduler=loop.schedule
    )


@pytest.mark.parametrize(
    "change", ["ddp 2 to 1", "ddp 1 to 2", "ddp 1 to 2 seeded alike", "fsdp2 2 to 1", "fsdp2 1 to 2"]
)
def test_another_number_of_ranks_goes_on_with_the_rest_of_the_epoch(ranks, tmp_path, change):
    sharding, was, _, now, *alike = change.split()
    was, now, alike = int(was), int(now), bool(alike)
    steps = 16 // was  # 16 of the epoch's 24 batches
    before = ranks(begun, was, sharding, str(tmp_path), steps, alike)
    after = ranks(taken_over, now, sharding, str(tmp_path), 2, alike)
    taken, epoch = 16 // now, 24 // now
    by_hand = ranks(taken_over_by_hand, now, sharding, str(tmp_path), steps, range(taken), 2 * epoch - taken)
    every = sorted(rows(torch.randint(11, (96, 5), generator=torch.Generator().manual_seed(1))))
    seen = [row for rows_seen, *_ in before for row in rows_seen]
    assert sorted(seen + [row for _, _, _, (rest, _), *_ in after for row in rest]) == every
    assert sorted(row for _, _, _, (_, again), *_ in after for row in again) == every
    for rank, (step, start, random, _, weights, log) in enumerate(after):
        assert step == steps
        torch.testing.assert_close(start, before[0][1], rtol=0, atol=0)
        torch.testing.assert_close(weights, by_hand[rank], rtol=0, atol=0)
        drawn_as_before = rank < was or alike
        assert torch.equal(random, before[min(rank, was - 1)][2]) == drawn_as_before
        assert any(f"by {was} ranks and is resumed by {now}" in line for line in log) == (rank == 0)


def test_what_a_rollback_of_two_ranks_left_out_stays_so_on_one(ranks, tmp_path):
    ranks(watched, 2, "ddp", str(tmp_path))  # saved at step 8, gone back there, and ended without another checkpoint
    ((step, *_, weights, _),) = ranks(taken_over, 1, "ddp", str(tmp_path), 2, False)
    skip = {*range(16), *range(18, 22)}  # two batches of each rank's, after the ninth
    assert step == 8
    (by_hand,) = ranks(taken_over_by_hand, 1, "ddp", str(tmp_path), 8, skip, 32)
    torch.testing.assert_close(weights, by_hand, rtol=0, atol=0)
