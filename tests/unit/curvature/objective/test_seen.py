"""What a backward shows of a loss that is computed outside of the model."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from sharpwatch.curvature.objective.samples import OutputSample, SeenForward, seen_loss
from sharpwatch.curvature.objective.seen import SeenRows
from sharpwatch.errors import EmptyBatchError, ObjectiveError, UndecidedError

B, T, V = 6, 5, 12
LABELS = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))


def sampled(loss, *, shape=(B, T, V), dtype=torch.float32, known=None, value=None, normal=False):
    """What the backward of `loss`, a function of one output, shows."""
    output = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 2).to(dtype)
    output = (output.log_softmax(-1) if normal else output).requires_grad_()
    sample = OutputSample("logits", output, torch.Generator().manual_seed(2))
    output.register_hook(sample.take)
    found = loss(output)
    found.backward()
    losses = [float(found.detach())] if value == "known" else [value] if value is not None else []
    return seen_loss([SeenForward([sample])], losses, known)


def cross_entropy(z, labels=LABELS, **options):
    return functional.cross_entropy(z.flatten(0, 1).float(), labels.flatten(), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mean_cross_entropy_and_its_positions(dtype):
    labels = LABELS.masked_fill(LABELS < 3, -100)
    seen = sampled(lambda z: cross_entropy(z, labels), dtype=dtype)
    assert torch.equal(seen.live, labels >= 0)
    assert str(seen.objective) == "mean cross-entropy of logits (verified)"
    assert seen.total == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize(
    ("loss", "text", "known"),
    [
        (lambda z: cross_entropy(z, reduction="sum"), "summed cross-entropy", False),
        (lambda z: cross_entropy(z) / 4, "0.25 x mean cross-entropy", False),
        (lambda z: cross_entropy(z) * 2**16, "6.554e+04 x mean cross-entropy", False),
        (lambda z: cross_entropy(z, label_smoothing=0.1), "mean cross-entropy with soft targets", False),
        (lambda z: functional.nll_loss(z.flatten(0, 1), LABELS.flatten()), "mean negative log-likelihood", False),
        (lambda z: z.sigmoid().log().mean().neg(), "mean binary cross-entropy", False),
        (lambda z: (z - 1).square().mean(), "mean square", True),
        (lambda z: (z - 1).square().sum(), "summed square", True),
        (lambda z: (z - 1).square().mean() / 2, "0.5 x mean square", True),
    ],
)
def test_other_losses_are_named(loss, text, known):
    seen = sampled(loss, value="known" if known else None, normal="likelihood" in text)
    assert seen.objective.text == f"{text} of logits"


def test_classes_in_the_second_dimension():
    seen = sampled(lambda z: functional.cross_entropy(z, LABELS), shape=(B, V, T))
    assert seen.candidate.classes == 1
    assert seen.live.shape == (B, T)


def test_a_mean_square_needs_its_value():
    with pytest.raises(UndecidedError, match=r"watch\.observe\(loss=\.\.\.\) before the step"):
        sampled(lambda z: (z - 1).square().mean())
    with pytest.raises(ObjectiveError, match="nor of a mean square"):
        sampled(lambda z: (z - 1).abs().mean(), value="known")
    with pytest.raises(ObjectiveError, match="nor of a mean square"):
        sampled(lambda z: (z - 1).square().mean(), value=3.0)  # a scaled loss beside one that is not


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: (z.mean(1) - 1).square().mean(),
        lambda z: (z.mean(-1) - 1).square().mean(),
        lambda z: ((z - 1) * (LABELS < 6).unsqueeze(-1)).square().sum(),
        lambda z: (z[..., 0] - 1).square().sum(),
        lambda z: (z.gather(2, LABELS.clamp(max=1).unsqueeze(-1)) - 1).square().sum(),
    ],
    ids=["mean over positions", "mean over outputs", "masked sum", "one column", "one column for each position"],
)
def test_squares_of_some_entries_or_of_means_are_no_mean_square(loss):
    """Their gradients' norms are those of a mean square of all entries, or of a sum of their squares."""
    with pytest.raises(ObjectiveError, match="nor of a mean square"):
        sampled(loss, value="known")


def test_a_loss_that_changes_is_not_taken_for_the_earlier_one():
    known = sampled(cross_entropy)
    for other in (lambda z: (z - 1).abs().mean(), lambda z: cross_entropy(z) + (z - 1).square().mean()):
        with pytest.raises(UndecidedError):
            sampled(other, known=known)


def test_unequal_weights_are_refused():
    with pytest.raises(ObjectiveError, match="different weights"):
        sampled(lambda z: cross_entropy(z, weight=torch.linspace(0.1, 1, V)))


def test_no_gradient_and_no_position():
    sample = OutputSample("logits", torch.randn(B, V), torch.Generator())
    assert seen_loss([SeenForward([sample])]) is None
    assert seen_loss([]) is None
    with pytest.raises(EmptyBatchError):
        sampled(lambda z: cross_entropy(z, torch.full_like(LABELS, -100), reduction="sum"))


def test_positions_that_no_sample_shows_are_taken_from_what_is_known():
    labels = torch.full((400, 40), -100)
    labels[7, 3] = 1
    known = sampled(cross_entropy)

    def loss(z):
        return cross_entropy(z, labels)

    with pytest.raises(UndecidedError, match="none of the positions"):
        sampled(loss, shape=(400, 40, V))
    seen = sampled(loss, shape=(400, 40, V), known=known)
    assert seen.live.nonzero().tolist() == [[7, 3]]
    assert seen.total == pytest.approx(1)


def test_two_gradients_and_two_outputs_are_refused():
    output = torch.randn(B, V, requires_grad=True)
    sample = OutputSample("logits", output, torch.Generator())
    output.register_hook(sample.take)
    for _ in range(2):
        functional.cross_entropy(output, LABELS[:, 0]).backward()
    with pytest.raises(ObjectiveError, match="several gradients"):
        seen_loss([SeenForward([sample])])
    with pytest.raises(ObjectiveError, match="several outputs of the model, logits, logits"):
        seen_loss([SeenForward([sample, sample])])


@pytest.mark.parametrize(("summed", "scale"), [(False, 1), (True, 19)])
def test_rows_have_their_part_of_it(summed, scale):
    labels = LABELS.masked_fill(LABELS < 3, -100)
    assert int((labels >= 0).sum()) == 19
    seen = sampled(lambda z: cross_entropy(z, labels, reduction="sum" if summed else "mean"))
    rows = torch.tensor([1, 4])
    loss = SeenRows(seen, rows, B, interleaved=False).loss({"logits": torch.randn(2, T, V)})
    expected = (labels[rows] >= 0).float()
    assert torch.allclose(loss.terms[0].fit.weights, (expected / expected.sum() * scale).flatten())
    assert loss.tokens == int(expected.sum())
