"""Which loss is measured: layouts, tasks and losses against the definition of the Gauss-Newton matrix."""

from __future__ import annotations

from types import SimpleNamespace

import layouts
import pytest
import torch
from torch import nn
from torch.nn import functional

import sharpwatch
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.objective.candidates import CANDIDATES
from sharpwatch.curvature.objective.verification import output_loss
from sharpwatch.errors import EmptyBatchError, ObjectiveError, ProbeError

V = layouts.CLASSES


def measured(model, batches, **options):
    return sharpwatch.measure(model, batches, estimators=("gnb",), draws=options.pop("draws", 400), **options)


def agrees(report, exact):
    trace = report.whole.estimates["gnb"]
    assert trace.stderr < 0.1 * exact  # or 4 of them would hold nothing
    assert abs(trace.value - exact) < 4 * trace.stderr


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("task", layouts.TASKS)
@pytest.mark.parametrize("by", ["the model", "loss_fn"])
def test_every_layout_and_task_is_that_of_its_own_loss(layout, task, by):
    model = layouts.Net(layout, task, own_loss=by == "the model")
    batch = layouts.batch_of(model)
    options = {}
    if by == "loss_fn":
        options["loss_fn"] = lambda called, rows: model.loss(called(rows.kwargs["x"]), rows.kwargs["targets"])
    report = measured(model, [batch], **options)
    agrees(report, layouts.exact_trace(model, lambda z: model.loss(z, batch["targets"]), model(batch["x"])))
    assert report.objective.endswith("(verified)")
    kind = "mean square" if task == "regression" else "mean cross-entropy"
    assert report.objective.startswith(kind)
    if by == "the model" and task != "regression":
        shifted = task == "shifted" and layout != "rows"
        assert ("targets shifted by one" if shifted else "targets as they stand") in report.objective


class Head(nn.Module):
    """Logits [B, T, V] of a nonlinear model, and a loss of them."""

    def __init__(self, loss):
        super().__init__()
        torch.manual_seed(3)
        self.emb, self.head = nn.Embedding(12, 8), nn.Linear(8, 12)
        self.loss = loss

    def forward(self, x, labels):
        logits = self.head(self.emb(x).tanh()) * 2
        return {"loss": self.loss(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def one_hot(labels):
    return functional.one_hot(labels, 12).float()


def mixed(z, y):
    soft = 0.7 * one_hot(y) + 0.3 * one_hot(y.roll(1))
    return -(soft * z.log_softmax(-1)).sum(-1).mean()


LOSSES = {
    "mean cross-entropy": functional.cross_entropy,
    "summed cross-entropy": lambda z, y: functional.cross_entropy(z, y, reduction="sum"),
    "0.25 x mean cross-entropy": lambda z, y: functional.cross_entropy(z, y) / 4,
    "mean cross-entropy ": lambda z, y: functional.cross_entropy(z, y, ignore_index=3),
    "mean cross-entropy  ": lambda z, y: functional.cross_entropy(z, y, weight=torch.linspace(0.1, 2, 12)),
    "mean cross-entropy with soft targets": lambda z, y: functional.cross_entropy(z, y, label_smoothing=0.1),
    "mean cross-entropy with soft targets ": mixed,
    "mean square": lambda z, y: functional.mse_loss(z, one_hot(y)),
    "summed square": lambda z, y: functional.mse_loss(z, one_hot(y), reduction="sum"),
    "12 x mean square": lambda z, y: (z - one_hot(y)).square().sum(-1).mean(),
    "mean binary cross-entropy": lambda z, y: functional.binary_cross_entropy_with_logits(z, one_hot(y)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_form_of_loss_is_found_and_named(name):
    model = Head(LOSSES[name])
    x = torch.randint(12, (4, 5), generator=torch.Generator().manual_seed(0))
    batch = {"x": x, "labels": x.flip(1)}
    report = measured(model, [batch])
    assert report.objective.startswith(f"{name.strip()} of logits")
    labels = batch["labels"].flatten()
    exact = layouts.exact_trace(model, lambda z: model.loss(z.flatten(0, 1), labels), model(**batch)["logits"])
    agrees(report, exact)


@pytest.mark.parametrize("dimension", [-1, 1])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_likelihood_of_log_probabilities_is_the_cross_entropy_of_what_they_are_of(dimension, reduction):
    class LogHead(Head):
        def forward(self, x, labels):
            logits = self.logits(x)
            found = logits.log_softmax(-1).movedim(-1, dimension)
            return {"loss": functional.nll_loss(found.movedim(dimension, 1), labels, reduction=reduction), "out": found}

        def logits(self, x):
            return super().forward(x, x)["logits"]

    model = LogHead(functional.cross_entropy)
    x = torch.randint(12, (4, 5), generator=torch.Generator().manual_seed(0))
    batch = {"x": x, "labels": x.flip(1)}
    report = measured(model, [batch])
    kind = "mean" if reduction == "mean" else "summed"
    assert report.objective == f"{kind} negative log-likelihood of out, labels as they stand (verified)"
    labels = batch["labels"].flatten()
    agrees(
        report,
        layouts.exact_trace(
            model, lambda z: functional.cross_entropy(z.flatten(0, 1), labels, reduction=reduction), model.logits(x)
        ),
    )


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: functional.cross_entropy(z, y) + 0.01 * z.square().mean(),
        lambda z, y: functional.cross_entropy(z / 1.5, y),
        lambda z, y: functional.l1_loss(z, one_hot(y)),
        functional.multi_margin_loss,
        lambda z, y: functional.cross_entropy(z, y) + 0.1,
        lambda z, y: functional.cross_entropy(z, y) ** 2,
    ],
    ids=["z-loss", "temperature", "absolute error", "margin", "another term", "its square"],
)
def test_other_losses_are_refused_and_measured_by_themselves(loss):
    model = Head(loss)
    x = torch.randint(12, (4, 5))
    batch = {"x": x, "labels": x.flip(1)}
    with pytest.raises(ObjectiveError):
        measured(model, [batch])
    report = sharpwatch.measure(model, [batch], estimators=("hutchinson",), draws=2)
    assert report.loss == pytest.approx(float(model(**batch)["loss"].detach()), rel=1e-5)


def test_bfloat16_is_told_apart_too():
    """At initialization all losses are about ln V, and a loss in bfloat16 has three digits; gradients still differ."""
    torch.manual_seed(0)
    model = layouts.Net("batch first", "shifted")
    with torch.no_grad():
        model.head.weight.mul_(0.02)
        model.head.bias.zero_()
    batch = layouts.batch_of(model)
    exact = layouts.exact_trace(model, lambda z: model.loss(z, batch["targets"]), model(batch["x"]))
    report = measured(model.bfloat16(), [batch])
    assert "targets shifted by one (verified)" in report.objective
    assert report.whole.estimates["gnb"].value == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: (
            functional.cross_entropy(z, y)
            + functional.kl_div(z.log_softmax(-1), z.detach().softmax(-1), reduction="batchmean")
        ),
        lambda z, y: functional.cross_entropy(z, y) + (z - z.detach()).square().mean(),
        lambda z, y: (
            -(z.log_softmax(-1).gather(1, y[:, None]) - z.detach().log_softmax(-1).gather(1, y[:, None])).exp().mean()
        ),
        lambda z, y: functional.cross_entropy(z, y).square(),
    ],
    ids=["divergence from itself", "squares of nothing", "a policy's ratio", "a square"],
)
def test_what_a_gradient_does_not_show_is_refused_in_a_loss_fn(loss):
    model = Head(functional.cross_entropy)
    x = torch.randint(12, (4, 5), generator=torch.Generator().manual_seed(0))
    options = {
        "loss_fn": lambda called, rows: loss(
            called(**rows.kwargs)["logits"].flatten(0, 1), rows.kwargs["labels"].flatten()
        )
    }
    with pytest.raises(ProbeError, match=r"none that gnb knows|other terms"):
        measured(model, [{"x": x, "labels": x.flip(1)}], **options)


@pytest.mark.parametrize("name", ["mean cross-entropy", "mean square", "mean binary cross-entropy"])
def test_outputs_that_are_cast_after_the_loss(name):
    """As Accelerate's mixed precision does with what the model returns."""

    class Cast(Head):
        def forward(self, x, labels):
            output = super().forward(x, labels)
            return output | {"logits": output["logits"].float()}

    model = Cast(LOSSES[name])
    x = torch.randint(12, (4, 5), generator=torch.Generator().manual_seed(0))
    batch = {"x": x, "labels": x.flip(1)}
    logits = Head.forward(model, **batch)["logits"]
    exact = layouts.exact_trace(model, lambda z: model.loss(z.flatten(0, 1), batch["labels"].flatten()), logits)
    report = measured(model.bfloat16(), [batch], draws=1000)
    assert report.objective.startswith(f"{name} of logits")
    trace = report.whole.estimates["gnb"]
    assert abs(trace.value - exact) < 4 * trace.stderr + 0.02 * exact  # weights have three digits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_long_mean_in_half_precision_does_not_underflow(dtype):
    torch.manual_seed(0)
    logits = (torch.randn(4096, 64) * 2).to(dtype).requires_grad_()
    labels = torch.randint(64, (4096,))
    labels[::3] = -100
    loss = functional.cross_entropy(logits.float(), labels)
    found = output_loss(lambda **_: {"loss": loss, "logits": logits}, nn.Module(), Batch((), {"x": labels}))
    assert found.tokens == int((labels >= 0).sum())
    assert found.total == pytest.approx(1, rel=1e-3)
    assert found.objective.text.startswith("mean cross-entropy of logits")


def test_smoothing_shows_at_constant_outputs_too():
    """With a head of zeros, a smoothed label has the gradient of a smaller weight; the loss tells them apart."""
    logits = torch.zeros(10, 12, requires_grad=True)
    loss = functional.cross_entropy(logits, torch.arange(10), label_smoothing=0.1)
    found = output_loss(lambda **_: {"loss": loss, "logits": logits}, nn.Module(), Batch((), {"x": torch.zeros(10)}))
    assert found.objective.text == "mean cross-entropy with soft targets of logits"
    assert found.total == pytest.approx(1)


def test_positions_that_the_model_is_sure_of_count_in_the_mean():
    logits = torch.zeros(8, 4)
    logits[:3, 0] = 200.0  # softmax is 1 there, and the gradient 0
    logits = (logits + torch.randn(8, 4) * (torch.arange(8) >= 3)[:, None]).requires_grad_()
    loss = functional.cross_entropy(logits, torch.zeros(8, dtype=torch.int64))
    found = output_loss(lambda **_: (loss, logits), nn.Module(), Batch((), {"x": torch.zeros(8)}))
    assert found.objective.text.startswith("mean cross-entropy")
    assert found.terms[0].fit.weights.max() == pytest.approx(1 / 8)


def test_auxiliary_losses_of_routers_are_named():
    logits = torch.randn(6, 9, requires_grad=True)
    auxiliary = torch.tensor(1.7)
    model = nn.Module()
    model.config = SimpleNamespace(router_aux_loss_coef=0.02)
    loss = functional.cross_entropy(logits, torch.arange(6)) + 0.02 * auxiliary
    output = {"loss": loss, "aux_loss": auxiliary, "logits": logits}
    found = output_loss(lambda **_: output, model, Batch((), {"labels": torch.arange(6)}))
    assert found.objective.text == "mean cross-entropy of logits, labels as they stand + 0.02 x aux_loss"
    model.config.router_aux_loss_coef = 0.03
    with pytest.raises(ObjectiveError, match="has other terms than the mean cross-entropy of logits"):
        output_loss(lambda **_: output, model, Batch((), {"labels": torch.arange(6)}))


def test_two_outputs_each_with_a_loss():
    start, end = torch.randn(3, 7, requires_grad=True), torch.randn(3, 7, requires_grad=True)
    places = torch.tensor([1, 2, 3])
    loss = (functional.cross_entropy(start, places) + functional.cross_entropy(end, places + 1)) / 2
    output = {"loss": loss, "start_logits": start, "end_logits": end}
    found = output_loss(lambda **_: output, nn.Module(), Batch((), {"x": torch.zeros(3, 7)}))
    assert [term.name for term in found.terms] == ["start_logits", "end_logits"]
    assert found.objective.text == "0.5 x mean cross-entropy of start_logits + 0.5 x mean cross-entropy of end_logits"
    assert found.tokens == 3


def test_ignored_batches_and_losses_without_outputs_say_so():
    logits = torch.randn(2, 5, requires_grad=True)
    ignored = functional.cross_entropy(logits, torch.tensor([-100, -100]))
    with pytest.raises(EmptyBatchError, match="no position predicts"):
        output_loss(lambda **_: (ignored, logits), nn.Module(), Batch((), {"x": logits}))
    with pytest.raises(ObjectiveError, match="found no logits"):
        output_loss(lambda **_: {"loss": logits.sum()}, nn.Module(), Batch((), {"x": logits}))


@pytest.mark.parametrize(
    ("arguments", "shape", "classes"),
    [
        ([torch.zeros(2, 6, dtype=torch.int64)], (2, 6, 9), -1),
        ([torch.zeros(6, 2, dtype=torch.int64)], (6, 2, 9), -1),
        ([torch.zeros(2, 6, dtype=torch.int64)], (2, 9, 6), 1),
        ([torch.zeros(2, 6, dtype=torch.int64)], (12, 9), -1),
        ([torch.zeros(2, 3, 8, 8)], (2, 10), -1),
        ([torch.zeros(2, 6, 4)], (2, 6, 9), -1),
        ([torch.zeros(2, 3, 8, 8)], (2, 3, 8, 8), None),
        ([torch.zeros(2, 3, 8, 8)], (2, 10, 8, 8), None),
        ([torch.zeros(2, 4)], (2, 1), None),
        ([torch.zeros(2, 4)], (2, 4), None),
        ([torch.zeros(2, 6, dtype=torch.int64)], (2, 5, 7), None),
    ],
)
def test_without_a_loss_classes_are_told_by_shapes_or_refused(arguments, shape, classes):
    logits = torch.randn(shape, requires_grad=True)

    class Model(nn.Module):
        def forward(self, x):
            del x
            return logits

    model = Model()
    if classes is None:
        with pytest.raises(ProbeError, match="pass loss_fn"):
            output_loss(model, model, Batch(tuple(arguments)))
    else:
        found = output_loss(model, model, Batch(tuple(arguments)))
        assert found.objective.state == "assumed"
        assert found.terms[0].candidate.classes == classes


def test_random_vectors_have_the_second_moment_of_each_candidate():
    torch.manual_seed(0)
    losses = {
        "cross-entropy": lambda z, w: (w * functional.cross_entropy(z, torch.zeros(3).long(), reduction="none")).sum(),
        "square": lambda z, w: (w * z.square().flatten()).sum(),
        "binary cross-entropy": lambda z, w: (w * functional.softplus(z).flatten()).sum(),
    }
    for candidate in CANDIDATES:
        if candidate.name not in losses or candidate.classes == 1:
            continue
        z = torch.randn(3, 4)
        weights = torch.rand(3 if candidate.classes == -1 else 12)
        truth = torch.autograd.functional.hessian(lambda x, c=candidate, w=weights: losses[c.name](x, w), z).view(
            12, 12
        )
        drawn = candidate.draw(z, weights, 40_000, torch.Generator().manual_seed(1))
        vectors = torch.stack([drawn[index].flatten().clone() for index in range(40_000)])
        assert torch.allclose(vectors.T @ vectors / len(vectors), truth, atol=0.02)
