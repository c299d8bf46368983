"""What the gradients of a loop's outputs show, and what they do not: other forwards, rare, sure and small outputs."""

from __future__ import annotations

import pytest
import torch
from several_outputs import IDS, LABELS, LENGTH, TEACHER, Model, Run, V, cross_entropy, exact
from torch import nn
from torch.nn import functional


def reverse(output):
    """KL of the teacher from the model, which is no cross-entropy of the logits."""
    p = output["logits"].log_softmax(-1)
    return (p.exp() * (p - TEACHER.log_softmax(-1))).sum(-1).mean()


@pytest.mark.parametrize("own", ["neither", "both", "the newest", "the other"])
@pytest.mark.parametrize("observed", [False, True])
def test_an_earlier_forward_with_another_loss_is_not_overlooked(own, observed, monkeypatch):
    model = Model(own=cross_entropy)

    def step(watch):
        first = model(IDS.flip(0), LABELS if own in {"both", "the other"} else None)
        loss = first.get("loss", 0.0) * (own == "the other") + (0.0 if own == "the other" else 5 * reverse(first))
        second = model(IDS, LABELS if own in {"both", "the newest"} else None)
        other = 5 * reverse(second) if own == "the other" else second.get("loss", None)
        loss = loss + (cross_entropy(second) if other is None else other)
        if observed:
            watch.observe(loss=loss)
        loss.backward()

    run = Run(monkeypatch, model, step)
    assert not run.traces
    assert not run.objective.endswith(("(verified)", "(assumed)"))


def test_a_forward_whose_output_is_a_target_is_not_taken_for_the_one_trained_on(monkeypatch):
    model = Model(own=cross_entropy)

    def step(_):
        loss = model(IDS, LABELS)["loss"]
        model(IDS.flip(0))["logits"].detach()
        loss.backward()

    run = Run(monkeypatch, model, step)
    assert not run.traces
    assert "no backward came through the newest" in run.objective


def test_a_few_heavy_positions_that_no_sample_shows_are_seen(monkeypatch):
    model = Model()
    ids = torch.randint(V, (64, 64), generator=torch.Generator().manual_seed(0))
    weights = torch.ones(ids.numel())
    weights[[7, 900]] = 2000.0

    def step(_):
        losses = functional.cross_entropy(model(ids)["logits"].flatten(0, 1), ids.flatten(), reduction="none")
        (losses @ weights / weights.sum()).backward()

    run = Run(monkeypatch, model, step, draws=1)
    assert not run.traces
    assert "have different weights" in run.objective


@pytest.mark.parametrize("gap", [12.0, 15.0, 25.0, 110.0])
def test_positions_that_the_model_is_sure_of(gap, monkeypatch):
    """Their gradient is almost all rounding, or zero; a mean counts them all the same."""

    class Sure(Model):
        def forward(self, ids, labels=None):
            output = super().forward(ids, labels)
            likely = functional.one_hot(ids, V) * (torch.arange(LENGTH) < 3)[:, None]
            return output | {"logits": output["logits"] + gap * likely}

    def loss(output):
        return cross_entropy(output, IDS)

    model = Sure()
    run = Run(monkeypatch, model, lambda _: loss(model(IDS)).backward())
    assert run.objective == "mean cross-entropy of logits (verified)"
    assert run.trace == pytest.approx(exact(model, loss, "logits"), rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_that_are_all_alike_are_undecided(dtype, monkeypatch):
    """Of small outputs the gradients of a hinge, of a margin and of a cross-entropy are the same."""
    model = Model("value").to(dtype)
    with torch.no_grad():
        for parameter in (*model.head.parameters(), *model.value.parameters()):
            parameter.mul_(1e-3)
    signs = (LABELS % 2 * 2.0 - 1).to(dtype)
    for loss in (
        lambda output: (1 - signs * output["value"]).clamp(min=0).mean(),
        lambda output: -output["value"].mean(),
        lambda output: functional.multi_margin_loss(output["logits"].flatten(0, 1).float(), LABELS.flatten()),
        cross_entropy,
    ):
        run = Run(monkeypatch, model, lambda _, loss=loss: loss(model(IDS)).backward())
        assert not run.traces
        assert run.objective.endswith("(undecided)")


def test_what_is_returned_and_has_no_part_in_the_loss(monkeypatch):
    """Weights, nested and sparse tensors, numbers times zero."""

    class Returning(Model):
        def forward(self, ids, labels=None):
            output = super().forward(ids, labels)
            rows = [self.emb(ids[0]), self.emb(ids[-1, :2])]
            return output | {
                "scale": self.scale,
                "tied": self.emb.weight,
                "rows": torch.nested.as_nested_tensor(rows, layout=torch.jagged),
                "sparse": output["logits"][0].to_sparse(),
            }

    model = Returning("value")
    model.scale = nn.Parameter(torch.tensor(1.0))

    def step(_):
        output = model(IDS)
        (cross_entropy({"logits": output["scale"] * output["logits"]}) + 0 * output["value"].sum()).backward()

    run = Run(monkeypatch, model, step)
    assert run.objective == "mean cross-entropy of logits (verified)"


def test_a_gradient_that_is_asked_for_before_the_backward(monkeypatch):
    model = Model("hidden")

    def step(_):
        output = model(IDS)
        torch.autograd.grad(output["logits"].logsumexp(-1).sum(), output["hidden"], retain_graph=True)
        cross_entropy(output).backward()

    run = Run(monkeypatch, model, step)
    assert run.trace == pytest.approx(exact(model, cross_entropy, "logits"), rel=0.15)


def test_a_loop_that_asks_for_its_gradients(monkeypatch):
    model = Model("hidden")

    def step(_):
        weights = [each for name, each in model.named_parameters() if not name.startswith("value")]
        for weight, gradient in zip(weights, torch.autograd.grad(cross_entropy(model(IDS)), weights), strict=True):
            weight.grad = gradient

    run = Run(monkeypatch, model, step)
    assert run.objective == "mean cross-entropy of logits (verified)"
