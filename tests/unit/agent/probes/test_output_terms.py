"""Losses of several outputs, of several forwards, or of the model's own loss and more: measured right, or refused."""

from __future__ import annotations

import pytest
import torch
from several_outputs import (
    IDS,
    LABELS,
    LENGTH,
    ROWS,
    VALUES,
    Model,
    Run,
    V,
    cross_entropy,
    distilled,
    exact,
    value_loss,
    z_loss,
)

import sharpwatch
from sharpwatch.testing import InMemoryTransport


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
