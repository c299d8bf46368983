"""RankGroup that come apart train on as without sharpwatch: nobody is stopped, and nobody waits for who does not come.

The patience of every wait here, torch's included, is the test's own: one that hangs fails.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[1]))
from stand_ins import Net

import sharpwatch
from sharpwatch.agent.distributed.channel import RankGroup, RankProgress, StepMessage
from sharpwatch.agent.distributed.rendezvous import AttachMessage, join
from sharpwatch.testing import InMemoryTransport
from sharpwatch.v1 import types_pb2

STEPS = 10


class Logits(Net):
    """Whose output carries its loss, as a probe of a sharded model reads it."""

    def forward(self, idx):
        return super().forward(idx, idx.roll(1))[0]


class Loop:
    """A loop on two ranks that train together (`kind` "ddp", "fsdp") or each alone ("local")."""

    def __init__(self, kind, *, watched=True, **options):
        self.transport, self.rank, self.groups = InMemoryTransport(), dist.get_rank(), []
        torch.manual_seed(3)
        self.model = {"ddp": nn.parallel.DistributedDataParallel, "fsdp": fully_shard}.get(kind, lambda net: net)(
            Logits()
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        probes = ("gnb",) if kind == "fsdp" else ()
        options = {"training_job": "apart", "transport": self.transport, "probes": probes, "probe_every": 1} | options
        self.watch = sharpwatch.attach(self.model.train(), self.optimizer, **options) if watched else None
        self.optimizer.register_step_pre_hook(lambda optimizer, *_: self.groups.append(len(optimizer.param_groups)))
        torch.manual_seed(self.rank)
        self.ranks = self.watch._watched.strategy.ranks if watched else None

    def run(self, *, skip=(), after=lambda _: None):
        for step in range(1, STEPS + 1):
            tokens = torch.randint(11, (8, 5))
            logits = self.model(tokens)
            nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
            if step not in skip:
                self.optimizer.step()
            self.optimizer.zero_grad()
            after(step)
        if self.watch:
            self.watch.close()
        held = [p.to_local() if hasattr(p, "to_local") else p for p in self.model.parameters()]
        return [value.detach().clone() for value in held]

    def order(self, **command):
        if self.transport.hello:
            self.transport.command(id="order", **command)

    @property
    def results(self):
        return [result.outcome for result in self.transport.results]


def parted(how):
    plain = Loop("fsdp", watched=False).run(skip=[5] if how == "skips" and dist.get_rank() == 1 else [])
    loop = Loop("fsdp", on_rollback=lambda _: None)
    others = loop.rank == 1

    def after(step):
        if how == "closes" and others and step == 5:
            loop.watch.close()
        if how == "is put back" and others and step == 5:
            loop.watch.restored(2)

    weights = loop.run(after=after, skip=[5] if how == "skips" and others else [])
    return plain, weights


@pytest.mark.parametrize("how", ["closes", "skips", "is put back"])
def test_ranks_train_on_where_one_alone(how, ranks):
    for plain, weights in ranks(parted, 2, how):
        torch.testing.assert_close(weights, plain, rtol=0, atol=0)


def out_of_step():
    """Rank 1 takes its first step when rank 0 has taken its last."""
    loop, store = Loop("local"), dist.distributed_c10d._get_default_store()
    if loop.rank == 1:
        store.wait(["done"])

    def after(step):
        if step == 2:
            loop.order(set_multipliers=types_pb2.MultiplierSet(multipliers={"emb": 0.5}))
        if step == STEPS:
            lost.append(loop.ranks.lost)
            store.set("done" if loop.rank == 0 else "done too", "")
            store.wait(["done", "done too"])

    lost = []
    loop.run(after=after)
    return lost, set(loop.groups), [sample.step for sample in loop.transport.samples if not sample.closing]


def test_ranks_that_do_not_meet_at_each_step_are_not_made_to(ranks):
    (lost, groups, reported), (lost_too, groups_too, _) = ranks(out_of_step, 2)
    assert lost == lost_too == [False]
    assert groups == groups_too == {1}  # no command is taken by ranks so far apart
    assert reported == list(range(1, STEPS + 1))


def deaf():
    """Rank 1 can read no step message any more once it has acknowledged a command."""
    loop = Loop("ddp")
    arrived = RankGroup._arrived

    def broken(self, *given, **named):
        if self.rank == 1 and self.expecting and self._commit._acknowledged_in:
            raise RuntimeError("Connection reset by peer")
        return arrived(self, *given, **named)

    RankGroup._arrived = broken

    def after(step):
        if step == 2:
            loop.order(set_multipliers=types_pb2.MultiplierSet(multipliers={"emb": 0.5}))
        dist.barrier()

    weights = loop.run(after=after)
    return loop.ranks.lost, loop.groups, loop.results, weights


def test_a_command_that_one_rank_can_not_hear_of_is_taken_by_none(ranks):
    (_, groups, results, weights), (lost, groups_too, _, weights_too) = ranks(deaf, 2)
    assert lost
    assert groups == groups_too == [1] * STEPS
    assert "applied" not in results
    torch.testing.assert_close(weights, weights_too, rtol=0, atol=0)


def slow_to_close():
    """Rank 0 closes after rank 1 has."""
    loop, store = Loop("ddp"), dist.distributed_c10d._get_default_store()

    def after(step):
        if step == STEPS - 2:
            loop.order(set_multipliers=types_pb2.MultiplierSet(multipliers={"emb": 0.5}))
        if step == STEPS and loop.rank == 0:
            store.wait(["closed"])

    loop.run(after=after)
    store.set("closed", "")
    return True


def test_closing_does_not_wait_for_who_closes_later(ranks):
    assert ranks(slow_to_close, 2, timeout=30) == [True, True]


def far_on():
    channel, _ = join(AttachMessage())
    group = RankGroup(channel, 0)
    read = []
    for step in range(100_000_002, 100_000_012):
        read += group.exchange(StepMessage(RankProgress(step)))
        dist.barrier()
    return len(read + group.drain(30)), group.sum(torch.ones(0)) if not group.lost else None


def test_steps_are_distinguished_by_whole_numbers_however_large(ranks):
    # The sum of six squares of such steps is none that a float64 can hold.
    assert [count for count, _ in ranks(far_on, 6)] == [10] * 6


def attached_anew():
    left = []
    for _ in range(4):
        loop = Loop("local")
        loop.watch.close()
        del loop
        gc.collect()
        left.append(len(list(Path("/proc/self/fd").iterdir())))
        dist.barrier()
    return left


def test_a_watch_that_has_ended_leaves_one_group_at_most(ranks):
    for left in ranks(attached_anew, 2):
        assert max(left[1:]) <= left[0]
