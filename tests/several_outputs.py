"""A model with several outputs, losses of them, and a short training whose `gnb` probes are looked at."""

from __future__ import annotations

import importlib

import layouts
import numpy as np
import torch
from torch import nn
from torch.nn import functional

import sharpwatch
from sharpwatch.agent.probes import gnb
from sharpwatch.agent.probes.gnb import Gnb
from sharpwatch.testing import InMemoryTransport

V, ROWS, LENGTH = 12, 6, 5
IDS = torch.randint(V, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(V, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
TEACHER = torch.randn(ROWS, LENGTH, V, generator=torch.Generator().manual_seed(2))
VALUES = torch.randn(ROWS, LENGTH, generator=torch.Generator().manual_seed(3))


class Model(nn.Module):
    """Returns logits, and what `outputs` names beside them."""

    def __init__(self, *outputs, own=None):
        super().__init__()
        torch.manual_seed(4)
        self.emb, self.head, self.value = nn.Embedding(V, 8), nn.Linear(8, V), nn.Linear(8, 1)
        self.outputs, self.own = outputs, own

    def forward(self, ids, labels=None, **given):
        hidden = self.emb(ids).tanh().cumsum(1)
        found = {"logits": self.head(hidden), "value": self.value(hidden)[..., 0], "hidden": hidden}
        found |= {"states": (hidden, [hidden * 2]), "aux": 0.1 * hidden.square().mean()}
        loss = {} if self.own is None or labels is None else {"loss": self.own(found, labels, **given)}
        return loss | {"logits": found["logits"]} | {name: found[name] for name in self.outputs}


def cross_entropy(output, labels=LABELS, **options):
    return functional.cross_entropy(output["logits"].flatten(0, 1), labels.flatten(), **options)


def value_loss(output, values=VALUES):
    return (output["value"] - values).square().mean()


def z_loss(output):
    return 0.1 * output["logits"].logsumexp(-1).square().mean()


def distilled(output):
    return functional.kl_div(output["logits"].log_softmax(-1), TEACHER.softmax(-1), reduction="sum") / (ROWS * LENGTH)


class Run:
    """Three optimizer steps of zero rate; `steps` makes the backward passes of one."""

    def __init__(self, monkeypatch, model, steps, *, share=1, draws=96):
        monkeypatch.setattr(importlib.import_module("sharpwatch.agent.attach"), "SKETCH_SIZE", 64)
        monkeypatch.setattr(Gnb, "share", share)
        monkeypatch.setattr(gnb, "_DRAWS", draws)
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        transport = InMemoryTransport()
        self.watch = sharpwatch.attach(
            model, optimizer, probes=("gnb",), probe_every=1, transport=transport, training_job="job"
        )
        for _ in range(3):
            steps(self.watch)
            optimizer.step()
            optimizer.zero_grad()
        self.objective = str(self.watch.status.objective)
        self.watch.close()
        assert transport.samples[-1].health.swallowed_errors == 0
        found = [sample.gnb for sample in transport.samples if sample.HasField("gnb")]
        self.traces = [np.frombuffer(each.traces.data).reshape(each.traces.shape).sum(1) for each in found]

    @property
    def trace(self):
        return float(np.concatenate(self.traces).mean())


def exact(model, loss, *names):
    """Tr G of a loss that is a function of the outputs `names`."""
    output = model(IDS)
    return layouts.exact_trace(model, lambda *z: loss(dict(zip(names, z, strict=True))), *(output[n] for n in names))
