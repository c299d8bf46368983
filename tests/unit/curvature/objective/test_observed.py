"""Estimates on a batch as a loop holds it, against dense matrices of the same loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from sharpwatch.blocks import classify
from sharpwatch.curvature.estimators.gnb import gnb_probe
from sharpwatch.curvature.estimators.hutchinson import hutchinson_probe
from sharpwatch.curvature.objective.batch import Batch, call_loss_fn, count_tokens, find_labels
from sharpwatch.errors import ProbeError


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patch_embed = nn.Linear(3, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.patch_embed(x)))


def loss_fn(model, batch):
    return functional.cross_entropy(model(batch["x"]), batch["y"])


@pytest.fixture
def case():
    model = Classifier()
    held = {"x": torch.randn(6, 3), "y": torch.randint(5, (6,))}
    return model, held, Batch((held,), observed=True)


def of_weights(model, function):
    """`function` of the model's output as a function of all weights in one vector, and that vector."""
    names, values = zip(*((name, p.detach().double()) for name, p in model.named_parameters()), strict=True)
    sizes = [value.numel() for value in values]

    def at(theta, x):
        parts = theta.split(sizes)
        named = {name: part.view_as(value) for name, part, value in zip(names, parts, values, strict=True)}
        return function(torch.func.functional_call(model.double(), named, (x.double(),)))

    return at, torch.cat([value.flatten() for value in values])


def blocks_of(model):
    """By block, a mask over the vector of all weights."""
    block_map = classify(model)
    types = {part.parameter: part.type for part in block_map.parts}
    owner = [types[name] for name, p in model.named_parameters() for _ in range(p.numel())]
    return block_map, {block: torch.tensor([each == block for each in owner]) for block in block_map.blocks}


def test_gnb_of_an_observed_batch_is_the_trace_of_the_gauss_newton_matrix(case):
    model, held, batch = case
    block_map, masks = blocks_of(model)
    source, draws = torch.Generator().manual_seed(0), []
    for _ in range(300):
        sample = gnb_probe(model, block_map, batch, draws=4, generator=source, loss_fn=loss_fn)
        draws.append(sample.traces)
    assert (sample.tokens, sample.rows) == (6, 6)
    at, theta = of_weights(model, lambda logits: logits)
    jacobian = torch.autograd.functional.jacobian(lambda vector: at(vector, held["x"]), theta)
    p = torch.softmax(at(theta, held["x"]), -1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    diagonal = torch.einsum("nvi,nvw,nwi->i", jacobian, middle, jacobian) / 6
    traces = torch.cat(draws)
    for i, layer_block in enumerate(block_map.layer_blocks):
        truth = diagonal[masks[layer_block.type]].sum()
        stderr = traces[:, i].std() / len(traces) ** 0.5
        assert abs(traces[:, i].mean() - truth) < 4 * stderr
        assert stderr < 0.1 * truth


def test_hutchinson_of_an_observed_batch_is_the_trace_of_the_hessian(case):
    model, held, batch = case
    block_map, masks = blocks_of(model)
    source = torch.Generator().manual_seed(0)
    at, theta = of_weights(model, lambda logits: functional.cross_entropy(logits, held["y"]))
    hessian = torch.autograd.functional.hessian(lambda vector: at(vector, held["x"]), theta)
    model.float()
    for block, mask in masks.items():
        found = hutchinson_probe(
            model, block_map, batch, block=block, draws=400, generator=source, loss_fn=loss_fn
        ).traces.sum(1)
        truth = hessian.diagonal()[mask].sum()
        assert abs(found.mean() - truth) < 4 * found.std() / len(found) ** 0.5 + 1e-6


def test_the_call_within_loss_fn_is_recorded_with_its_arguments_and_output(case):
    model, held, batch = case
    recorded = call_loss_fn(model, model, batch, loss_fn)
    assert torch.equal(recorded.loss, loss_fn(model, held))
    assert recorded.arguments.args == (held["x"],)
    assert torch.equal(recorded.output, model(held["x"]))
    assert not model._forward_hooks
    with pytest.raises(ProbeError, match=r"observe\(\) needs attach\(loss_fn=...\)"):
        call_loss_fn(model, model, batch, None)
    with pytest.raises(ProbeError, match=r"loss_fn must give a scalar loss"):
        call_loss_fn(model, model, batch, lambda model, rows: model(rows["x"]))
    with pytest.raises(ProbeError, match=r"got 0 calls"):
        call_loss_fn(model, model, batch, lambda model, _: model.head.weight.sum())
    assert not model._forward_hooks


def test_an_observed_batch_has_rows_but_no_labels_that_are_known(case):
    model, held, batch = case
    rows = batch.slice(torch.tensor([4, 1]))
    assert rows.observed
    assert torch.equal(rows.passed["x"], held["x"][[4, 1]])
    assert torch.equal(rows.passed["y"], held["y"][[4, 1]])
    assert find_labels(model, batch) is None
    assert (count_tokens(model, batch), count_tokens(model, rows)) == (6, 2)
    assert rows.prepared().observed
    call = Batch((held["x"],))
    assert call.passed is call
