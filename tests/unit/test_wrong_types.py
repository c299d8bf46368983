"""Whatever is passed to a public argument, one of sharpwatch's own errors names it before anything starts."""

from __future__ import annotations

import inspect

import pytest
import torch
from stand_ins import Net
from torch import nn

import sharpwatch
from sharpwatch.errors import SharpwatchError
from sharpwatch.testing import InMemoryTransport

WRONG = [
    *(None, "text", "", 3, -1, 2.5, float("nan"), True, b"x", object(), torch.float32, nn.Linear, torch.ones(2)),
    *([], ["x"], [None], [[1]], (1, 2, 3), {"a": 1}, {1: 2}, {"x"}, iter([1])),
]
IDS = [f"{type(value).__name__}-{number}" for number, value in enumerate(WRONG)]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, input_ids, labels=None):
        logits, loss = self.net(input_ids, labels)
        return {"logits": logits, "loss": loss}


def arguments(function):
    return list(inspect.signature(function).parameters)


def is_right_or_refused(call):
    try:
        return call()
    except SharpwatchError:
        return None


@pytest.mark.parametrize("value", WRONG, ids=IDS)
def test_attach(monkeypatch, value):
    monkeypatch.delenv("SHARPWATCH_ADDRESS", raising=False)
    for name in arguments(sharpwatch.attach):
        if name in {"rules", "strict"}:
            continue  # of the blocks
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters())
        right = {"model": model, "optimizer": optimizer, "training_job": "job", "probes": ()}
        given = {**right, "transport": InMemoryTransport(), name: value}
        watch = is_right_or_refused(lambda given=given: sharpwatch.attach(**given))
        if watch is not None:
            watch.close()
        assert not model._forward_hooks
        assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("value", WRONG, ids=IDS)
def test_measure(value):
    ids = torch.randint(11, (2, 4))
    for name in arguments(sharpwatch.measure):
        if name == "rules" or (name in {"loss_fn", "logits_fn"} and callable(value)):
            continue  # of the blocks; what a function does is its own
        right = {"model": Model(), "batches": [{"input_ids": ids, "labels": ids}], "estimators": ("gnb",), "draws": 2}
        is_right_or_refused(lambda given={**right, name: value}: sharpwatch.measure(**given))
    for batches in ([value], [{"input_ids": ids, "labels": ids}, value]):
        is_right_or_refused(lambda batches=batches: sharpwatch.measure(Model(), batches, estimators=("gnb",), draws=2))


@pytest.mark.parametrize("value", WRONG, ids=IDS)
def test_checkpoints(tmp_path, value):
    for name in arguments(sharpwatch.Checkpoints.__init__)[1:]:
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters())
        watch = sharpwatch.attach(model, optimizer, training_job="job", transport=InMemoryTransport(), probes=())
        right = {"folder": tmp_path, "model": model, "optimizer": optimizer, "watch": watch}
        is_right_or_refused(lambda given={**right, name: value}: sharpwatch.Checkpoints(**given))
        watch.close()


@pytest.mark.parametrize("value", WRONG, ids=IDS)
def test_classify(value):
    if not isinstance(value, nn.Module):
        with pytest.raises(SharpwatchError, match=r"model must be a torch\.nn\.Module, got "):
            sharpwatch.classify(value)
