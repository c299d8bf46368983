"""Which loss `gnb` measures in training, and that nothing is measured where it can't be told."""

from __future__ import annotations

import copy
import importlib
import weakref
from typing import ClassVar

import layouts
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import sharpwatch
from sharpwatch.agent.probes import gnb
from sharpwatch.agent.probes.gnb import Gnb
from sharpwatch.testing import InMemoryTransport


class Run:
    """A training run that stands still, watched at every step."""

    def __init__(self, model, probes=("gnb",), **options):
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), 0.0)
        self.transport = InMemoryTransport()
        options = {"probe_every": 1, "transport": self.transport, "training_job": "test"} | options
        self.watch = sharpwatch.attach(model, self.optimizer, probes=probes, **options)

    def step(self, loss, *, observed=False):
        if observed:
            self.watch.observe(loss=loss)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def close(self):
        self.watch.close()
        return self

    @property
    def samples(self):
        return [sample.gnb for sample in self.transport.samples if sample.HasField("gnb")]

    @property
    def traces(self):
        """Every draw of Tr G of the whole model."""
        rows = [np.frombuffer(s.traces.data).reshape(s.traces.shape).sum(1) for s in self.samples]
        return torch.from_numpy(np.concatenate(rows))

    def trace_of(self, block):
        """The mean trace of one block."""
        index = [each.block for each in self.transport.hello.layer_blocks].index(block)
        return float(np.mean([np.frombuffer(s.traces.data).reshape(s.traces.shape)[:, index] for s in self.samples]))

    @property
    def reasons(self):
        return {each.probe: each.reason for sample in self.transport.samples for each in sample.health.probe_failures}

    def agrees(self, exact):
        traces = self.traces
        stderr = float(traces.std()) / len(traces) ** 0.5
        assert stderr < 0.15 * exact
        assert abs(float(traces.mean()) - exact) < 4 * stderr


@pytest.fixture(autouse=True)
def _small_sketches(monkeypatch):
    """Nothing here looks at sketches, which take more time than all else in a model as small."""
    monkeypatch.setattr(importlib.import_module("sharpwatch.agent.attach"), "SKETCH_SIZE", 64)


PROBES = 10


@pytest.fixture
def whole_batch(monkeypatch):
    """Every probe has all rows, so that it is of the very loss that is compared with.

    Then all draws are alike, whichever probe they are of: `PROBES` with 16 draws give as many as 40 with the usual 4.
    """
    monkeypatch.setattr(Gnb, "share", 1)
    monkeypatch.setattr(gnb, "_DRAWS", 16)


def exact(model, batch):
    return layouts.exact_trace(model, lambda z: model.loss(z, batch["targets"]), model(batch["x"]))


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("task", layouts.TASKS)
@pytest.mark.parametrize("own_loss", [True, False], ids=["the model's", "the loop's"])
@pytest.mark.usefixtures("whole_batch")
def test_the_loss_that_is_stepped_on_is_measured(layout, task, own_loss):
    model = layouts.Net(layout, task, own_loss=own_loss)
    batch = layouts.batch_of(model)
    run = Run(model)
    for _ in range(PROBES):
        if own_loss:
            run.step(model(**batch)["loss"])
        else:
            run.step(model.loss(model(batch["x"]), batch["targets"]), observed=True)
    assert run.watch.status.objective.startswith("mean square" if task == "regression" else "mean cross-entropy")
    assert run.watch.status.objective.endswith("(verified)")
    assert "objective " in str(run.watch.status)
    run.close().agrees(exact(model, batch))
    assert run.transport.samples[-1].health.objective_state == "verified"
    assert run.transport.samples[-1].health.objective in str(run.watch.status)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_rows_are_cut_along_the_batch(layout):
    """With one row in eight, the mean over probes is that of the rows of the whole batch."""
    model = layouts.Net(layout, "masked" if layout == "flattened" else "shifted", own_loss=False)
    batch = layouts.batch_of(model, rows=8)
    if model.task == "masked":
        batch["targets"][:] = 1  # as many positions in every row
    run = Run(model)
    for _ in range(120):
        run.step(model.loss(model(batch["x"]), batch["targets"]))
    run.close().agrees(exact(model, batch))
    assert {sample.rows for sample in run.samples} == {1}


@pytest.mark.parametrize("share", [1, 4])
@pytest.mark.parametrize("own_loss", [True, False])
def test_a_sum_is_that_of_the_whole_batch(share, own_loss, monkeypatch):
    monkeypatch.setattr(Gnb, "share", share)
    model = layouts.Net("batch first", "masked", own_loss=own_loss)
    mean = model.loss
    batch = layouts.batch_of(model)
    batch["targets"] = batch["targets"].clamp(min=0)
    model.loss = lambda outputs, targets: targets.numel() * mean(outputs, targets)
    run = Run(model)
    for _ in range(60):
        run.step(model(**batch)["loss"] if own_loss else model.loss(model(batch["x"]), batch["targets"]))
    run.close().agrees(exact(model, batch))
    assert run.watch.status.objective.startswith("summed cross-entropy")


@pytest.mark.usefixtures("whole_batch")
def test_a_factor_of_accumulation_is_shown_and_left_out():
    model = layouts.Net("batch first", "shifted", own_loss=False)
    batch = layouts.batch_of(model)
    run = Run(model)
    for _ in range(PROBES):
        (model.loss(model(batch["x"]), batch["targets"]) / 4).backward()
        run.step(model.loss(model(batch["x"]), batch["targets"]) / 4)
    run.close().agrees(exact(model, batch))
    assert run.watch.status.objective == "0.25 x mean cross-entropy of output (verified)"


def test_an_image_is_measured_by_its_squares_or_not_at_all():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("emb", nn.Conv2d(3, 4, 3, padding=1))
    model.add_module("head", nn.Conv2d(4, 3, 1))
    x = torch.randn(8, 3, 8, 8)
    silent = Run(copy.deepcopy(model))
    for _ in range(5):
        silent.step((silent.model(x) - x).square().mean())
    assert not silent.close().samples
    assert "watch.observe(loss=...) before the step is enough" in silent.reasons["gnb"]
    assert not silent.transport.samples[-1].health.probe_failures[0].disabled  # the loss may come yet
    assert silent.watch.status.objective.endswith("(undecided)")
    run = Run(model)
    for _ in range(5):
        run.step((model(x) - x).square().mean(), observed=True)
    assert len(run.close().samples) == 5
    assert run.watch.status.objective == "mean square of output (verified)"


def test_other_losses_are_given_up_and_told():
    model = layouts.Net("batch first", "regression")
    model.loss = functional.l1_loss
    batch = layouts.batch_of(model)
    run = Run(model, probes=("gnb", "hutchinson"))
    for _ in range(5):
        run.step(model(**batch)["loss"])
    run.close()
    assert not run.samples
    assert any(sample.HasField("hutchinson") for sample in run.transport.samples)
    assert "the loss is none that gnb knows" in run.reasons["gnb"]
    health = run.transport.samples[-1].health
    assert (health.objective_state, health.objective) == ("refused", run.reasons["gnb"])


def test_outputs_that_depend_on_other_rows_are_not_cut():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.head = nn.Embedding(9, 4), nn.Linear(4, 5)

        def forward(self, x):
            hidden = self.emb(x)
            return self.head(hidden - hidden.mean((0, 1)))

    model = Mixing()
    run = Run(model, probes=("gnb", "hutchinson"))
    for _ in range(4):
        x = torch.randint(9, (8, 6))
        run.step(functional.cross_entropy(model(x).flatten(0, 1), x.flatten() % 5))
    assert not run.close().samples
    assert "depend on the other rows" in run.reasons["gnb"]
    assert "depend on the other rows" in run.reasons["hutchinson"]


def test_targets_that_hold_several_entries_a_row_can_not_be_cut():
    model = layouts.Net("batch first", "shifted")
    model.loss = lambda outputs, targets: functional.cross_entropy(outputs.flatten(0, 1), targets)
    run = Run(model)
    for _ in range(4):
        batch = layouts.batch_of(model)
        run.step(model(batch["x"], batch["targets"].flatten())["loss"])
    assert not run.close().samples
    assert "batch_size" in run.reasons["gnb"]


def test_a_head_of_zeros_is_undecided_until_it_has_trained():
    model = layouts.Net("time first", "shifted", own_loss=False)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.zero_()
    batch = layouts.batch_of(model)
    run = Run(model)
    for _ in range(4):
        run.step(model.loss(model(batch["x"]), batch["targets"]))
    assert not run.samples
    assert "undecided" in run.watch.status.objective or "undecided" in str(run.watch.status)
    with torch.no_grad():
        model.head.weight.normal_()
    run.step(model.loss(model(batch["x"]), batch["targets"]))
    assert run.close().samples
    assert "verified" in run.watch.status.objective


class Seq2SeqDecoder(nn.Module):
    """A language model whose batch is the second dimension, as PyTorch's own examples have it; positions matter."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(16, 16)
        self.pos = nn.Parameter(torch.randn(64, 16) * 0.5)
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0)
        self.enc = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 16)

    def forward(self, src):
        length = src.shape[0]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.head(self.enc(self.emb(src) + self.pos[:length, None], mask))


def copying(steps: int, rows: int = 20):
    """Sequences that repeat themselves after five tokens, time first."""
    for _ in range(steps):
        tokens = torch.randint(0, 16, (36, rows))
        for t in range(5, 36):
            tokens[t] = tokens[t - 5]
        yield tokens


def test_a_time_major_batch_is_not_cut_along_time():
    torch.manual_seed(1)
    model = Seq2SeqDecoder()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)

    def loss_of(tokens):
        return functional.cross_entropy(model(tokens[:-1]).reshape(-1, 16), tokens[1:].reshape(-1))

    for tokens in copying(200):
        loss_of(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    run = Run(model)
    for tokens in copying(12):
        run.step(loss_of(tokens))
    whole = sharpwatch.measure(model, [{"src": tokens[:-1]}], estimators=("gnb",), draws=32)
    true = sum(block.trace.value for block in whole.blocks.values())
    assert float(run.close().traces[-32:].mean()) == pytest.approx(true, rel=0.6)


class Denoiser(nn.Module):
    """A transformer that returns an image, [B, 3, 16, 16]."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Linear(16, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 16)

    def forward(self, x):
        return self.head(self.layers(self.patch_embed(x.flatten(1, 2)))).view_as(x)


def test_an_image_is_not_taken_for_logits():
    torch.manual_seed(0)
    model = Denoiser()
    run = Run(model)
    for _ in range(10):
        x = torch.randn(8, 3, 16, 16)
        run.step((model(x + torch.randn_like(x)) - x).square().mean(), observed=True)
    run.close()
    images, names = model(x + torch.randn_like(x)), [name for name, _ in model.named_parameters()]
    true = 0.0  # of `head`: 2/M E‖Jᵀv‖² over random signs v, M entries of the image
    for _ in range(32):
        signs = torch.randint(0, 2, images.shape) * 2.0 - 1
        gradients = torch.autograd.grad(images, list(model.parameters()), signs, retain_graph=True)
        squares = [g.square().sum() for name, g in zip(names, gradients, strict=True) if name.startswith("head")]
        true += float(sum(squares)) * 2 / images.numel() / 32
    assert run.trace_of("head") == pytest.approx(true, rel=0.5)


def trained(*, watched):
    torch.manual_seed(5)
    model = nn.Sequential()
    model.add_module("wte", nn.Embedding(20, 8))
    model.add_module("drop", nn.Dropout(0.3))
    model.add_module("lm_head", nn.Linear(8, 20))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    if watched:
        options = {"transport": InMemoryTransport(), "training_job": "test", "probe_every": 1}
        watch = sharpwatch.attach(model, optimizer, probes=("gnb",), **options)
    for _ in range(6):
        x = torch.randint(20, (8, 5))
        logits = model(x)
        (functional.cross_entropy(logits.flatten(0, 1), x.flatten()) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    if watched:
        watch.close()
        assert len([s for s in options["transport"].samples if s.HasField("gnb")]) == 6
    return [*(each.detach() for each in model.parameters()), torch.rand(3)]


def test_listening_to_outputs_changes_no_bit():
    assert all(
        torch.equal(one, other) for one, other in zip(trained(watched=False), trained(watched=True), strict=True)
    )


class Token:
    pass


class Graph(torch.autograd.Function):
    """Its context has a token, which lives as long as the graph."""

    tokens: ClassVar = weakref.WeakSet()

    @staticmethod
    def forward(ctx, x):
        ctx.token = Token()
        Graph.tokens.add(ctx.token)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        del ctx
        return gradient


def test_a_forward_without_backward_keeps_no_graph():
    model = layouts.Net("batch first", "shifted", own_loss=False)
    model.laid_out = Graph.apply
    run = Run(model)
    output = model(layouts.batch_of(model)["x"])
    assert len(Graph.tokens) == 1
    del output
    assert not Graph.tokens
    run.close()
