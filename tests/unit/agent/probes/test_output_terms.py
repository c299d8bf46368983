"""Losses of several outputs, of several forwards, or of the model's own loss and more: measured right, or refused."""

from __future__ import annotations

import importlib

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

    def __init__(self, monkeypatch, model, steps, *, share=1, draws=256):
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


@pytest.mark.parametrize("beside", [("value",), ("hidden",), ("states",), ("aux",), ("hidden", "states", "value")])
def test_outputs_that_the_loss_is_not_of_change_nothing(beside, monkeypatch):
    model = Model(*beside)
    run = Run(monkeypatch, model, lambda _: cross_entropy(model(IDS)).backward())
    assert run.objective == "mean cross-entropy of logits (verified)"
    assert run.trace == pytest.approx(exact(model, cross_entropy, "logits"), rel=0.15)


@pytest.mark.parametrize(
    ("beside", "term", "named"),
    [
        ("value", value_loss, "logits, value"),
        ("hidden", lambda out: out["hidden"].square().mean(), "logits, hidden"),
        ("states", lambda out: out["states"][1][0].square().mean(), "logits, states[1][0]"),
        ("aux", lambda out: out["aux"], "logits, aux"),
    ],
)
def test_a_loss_of_several_outputs_is_refused(beside, term, named, monkeypatch):
    model = Model(beside)

    def step(_):
        output = model(IDS)
        (cross_entropy(output) + term(output)).backward()

    run = Run(monkeypatch, model, step)
    assert not run.traces
    assert f"depends on several outputs of the model, {named}: pass loss_fn" in run.objective


def test_a_tuple_of_logits_and_features_is_told_apart(monkeypatch):
    class Pair(Model):
        def forward(self, ids):
            found = super().forward(ids)
            return found["logits"], found["hidden"]

    model = Pair("hidden")
    run = Run(monkeypatch, model, lambda _: cross_entropy({"logits": model(IDS)[0]}).backward())
    assert run.objective == "mean cross-entropy of output[0] (verified)"


def test_a_loss_of_a_value_beside_the_logits_is_measured(monkeypatch):
    model = Model("value", "states")

    def step(watch):
        loss = value_loss(model(IDS))
        watch.observe(loss=loss)
        loss.backward()

    run = Run(monkeypatch, model, step)
    assert run.objective == "mean square of value (verified)"
    assert run.trace == pytest.approx(exact(model, value_loss, "value"), rel=0.15)


def test_a_models_own_loss_of_logits_and_value_is_measured(monkeypatch):
    def both(output, labels=LABELS, values=VALUES):
        return cross_entropy(output, labels) + value_loss(output, values)

    model = Model("value", own=both)
    run = Run(monkeypatch, model, lambda _: model(IDS, LABELS, values=VALUES)["loss"].backward())
    assert run.objective == "mean cross-entropy of logits + mean square of value, labels as they stand (verified)"
    assert run.trace == pytest.approx(exact(model, both, "logits", "value"), rel=0.15)


@pytest.mark.parametrize("term", [z_loss, lambda out: out["logits"].abs().mean(), lambda out: out["logits"][0].sum()])
def test_a_term_that_the_loop_adds_to_the_models_own_loss_is_refused(term, monkeypatch):
    model = Model(own=cross_entropy)

    def step(_):
        output = model(IDS, LABELS)
        (output["loss"] + term(output)).backward()

    run = Run(monkeypatch, model, step)
    assert not run.traces
    assert "the loop adds a term of logits to the loss that the model returns; " in run.objective


def test_a_distillation_beside_the_models_own_loss_is_measured_with_it(monkeypatch):
    model = Model(own=lambda output, labels: cross_entropy(output, labels, label_smoothing=0.1))
    smooth = torch.full((V,), 1 / V)

    def step(_):
        output = model(IDS, LABELS)
        other = -(output["logits"].log_softmax(-1) @ smooth).mean()
        (0.5 * output["loss"] + 0.5 * other).backward()

    run = Run(monkeypatch, model, step)
    assert run.objective == "mean cross-entropy with soft targets of logits (verified)"
    assert run.trace == pytest.approx(exact(model, cross_entropy, "logits"), rel=0.15)


def test_a_distillation_whose_targets_can_not_be_told_is_refused(monkeypatch):
    model = Model(own=cross_entropy)

    def step(_):
        output = model(IDS, LABELS)
        (0.5 * output["loss"] + 0.5 * distilled(output)).backward()

    assert not Run(monkeypatch, model, step).traces


def test_numbers_that_the_loop_adds_are_refused(monkeypatch):
    model = Model("aux", own=cross_entropy)

    def step(_):
        output = model(IDS, LABELS)
        (output["loss"] + output["aux"]).backward()

    run = Run(monkeypatch, model, step)
    assert not run.traces
    assert "adds a term of aux" in run.objective


@pytest.mark.parametrize("own", [True, False])
def test_forwards_with_different_losses_are_refused(own, monkeypatch):
    model = Model(own=cross_entropy if own else None)

    def step(_):
        for weight in (3.0, 1.0):
            output = model(IDS, LABELS)
            (weight * (output["loss"] if own else cross_entropy(output))).backward()

    run = Run(monkeypatch, model, step)
    assert not run.traces
    assert "the forwards of a step have different losses, 3 x mean cross-entropy of logits and mean" in run.objective


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("by", ["forwards", "positions"])
def test_micro_batches_are_measured(own, by, monkeypatch):
    model = Model(own=cross_entropy if own else None)
    masked = LABELS.clone()
    masked[:4] = -100

    def step(_):
        for labels in (LABELS, masked):
            output = model(IDS, labels)
            weight = 0.5 if by == "forwards" else float((labels >= 0).sum() / (ROWS + 2) / LENGTH)
            (weight * (output["loss"] if own else cross_entropy(output, labels))).backward()

    run = Run(monkeypatch, model, step)
    assert run.objective.endswith("(verified)")
    newest = exact(model, lambda output: cross_entropy(output, masked), "logits")
    assert run.trace == pytest.approx(newest, rel=0.15)


def test_mean_squares_of_micro_batches_are_measured(monkeypatch):
    model = Model("value")

    def step(watch):
        for _ in range(3):
            loss = value_loss(model(IDS))
            watch.observe(loss=loss)
            (loss / 3).backward()

    run = Run(monkeypatch, model, step)
    assert run.objective.endswith("x mean square of value (verified)")
    assert run.trace == pytest.approx(exact(model, value_loss, "value"), rel=0.15)


def test_a_forward_after_the_backward_is_not_taken_for_the_one_trained_on(monkeypatch):
    model = Model()

    def step(_):
        cross_entropy(model(IDS)).backward()
        model(IDS.flip(0))  # as for a metric

    run = Run(monkeypatch, model, step)
    assert not run.traces
    assert "no backward came through the newest of the forwards" in run.objective
    assert run.objective.endswith("(undecided)")


def test_logits_that_the_loop_changes_in_place_are_not_taken_for_what_was_returned(monkeypatch):
    model = Model()

    def step(_):
        output = model(IDS)
        output["logits"].div_(3.0)
        cross_entropy(output).backward()

    assert not Run(monkeypatch, model, step).traces


def test_a_backward_past_the_output_is_undecided(monkeypatch):
    model = Model()

    def step(_):
        model(IDS)
        model.emb.weight.square().sum().backward()

    run = Run(monkeypatch, model, step)
    assert not run.traces
    assert run.objective.startswith("no backward reached what the model returned")


@pytest.mark.parametrize("share", [1, ROWS])
def test_class_weights_are_those_of_the_batch(share, monkeypatch):
    """A probe of one row, with a label for one position, would find no weights at all."""
    weights = torch.linspace(0.05, 4, V)
    labels = torch.where(torch.arange(LENGTH) == 2, LABELS, -100)

    def weighted(output, labels=labels):
        return cross_entropy(output, labels, weight=weights)

    model = Model(own=weighted)
    run = Run(monkeypatch, model, lambda _: model(IDS, labels)["loss"].backward(), share=share)
    assert len(run.traces) == (3 if share == 1 else 2)  # the first shows that weights differ
    assert run.trace == pytest.approx(exact(model, weighted, "logits"), rel=0.15)


def trained(watched):
    torch.manual_seed(7)
    model = Model("hidden", "states", "value", "aux", own=cross_entropy)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    if watched:
        options = {"transport": InMemoryTransport(), "training_job": "job", "probe_every": 1}
        watch = sharpwatch.attach(model, optimizer, probes=("gnb",), **options)
    for step in range(6):
        for _ in range(2):
            output = model(torch.randint(V, (ROWS, LENGTH)), LABELS)
            terms = [output["loss"], output["states"][1][0].sum(), output["hidden"].mean(), value_loss(output)]
            sum(terms[: 1 + step]).backward()
        optimizer.step()
        optimizer.zero_grad()
    if watched:
        watch.close()
    return [*(each.detach() for each in model.parameters()), torch.rand(3)]


def test_listening_to_several_outputs_changes_no_bit():
    assert all(torch.equal(one, other) for one, other in zip(trained(False), trained(True), strict=True))


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
