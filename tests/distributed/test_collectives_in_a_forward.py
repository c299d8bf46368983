"""A model whose forward talks to other ranks is not probed by one alone: its partners would wait for ever."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sharpwatch


class Gathered(nn.Module):
    """As a contrastive loss: scaled by the mean over all ranks' rows."""

    def __init__(self, group):
        super().__init__()
        self.wte = nn.Embedding(11, 8)
        self.lm_head = nn.Linear(8, 11)
        self.group = group

    def forward(self, ids):
        x = self.wte(ids)
        mean = x.detach().mean((0, 1))
        dist.all_reduce(mean, group=self.group)
        logits = self.lm_head(x - mean / dist.get_world_size())
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return {"logits": logits, "loss": loss}


def train(watched, own_group):
    group = dist.new_group() if own_group else None
    torch.manual_seed(0)
    model = DistributedDataParallel(Gathered(group))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    watch = None
    if watched:
        watch = sharpwatch.attach(model, optimizer, training_job="x", address="127.0.0.1:9", probe_every=2)
    torch.manual_seed(dist.get_rank())
    for _ in range(8):
        model(torch.randint(11, (8, 6)))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    failures = []
    if watch:
        failures = [
            (failure.probe, failure.reason, failure.count) for failure in watch._watched.scheduler.runner.failures
        ]
        watch.close()
    return [parameter.detach() for parameter in model.parameters()], failures


@pytest.mark.parametrize("own_group", [False, True])
def test_it_is_not_probed(ranks, own_group):
    plain, watched = ranks(train, 2, False, own_group), ranks(train, 2, True, own_group)
    for (weights, _), (others, _) in zip(plain, watched, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(weights, others, strict=True))
    assert sorted(probe for probe, _, _ in watched[0][1]) == ["direction", "gnb"]
    assert all("talks to other ranks (c10d.allreduce_" in reason for _, reason, _ in watched[0][1])
    assert {count for _, _, count in watched[0][1]} == {1}  # given up at once
