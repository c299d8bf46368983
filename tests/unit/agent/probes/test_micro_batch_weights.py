"""The weights of micro-batches, and the noise that follows from them, against what is known of synthetic gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stand_ins import Net
from torch.nn import functional

from sharpwatch.agent.probes.gradient_noise import MicroBatches
from sharpwatch.agent.probes.micro_batch_weights import MicroBatchSize, Shares, listen, shares_of
from sharpwatch.blocks import classify
from sharpwatch.errors import ProbeError

VOCABULARY = 11


def relative_weights(sizes):
    return shares_of(sizes).raw.tolist()


def size(positions, weight, misfit=0.0, **kinds):
    return MicroBatchSize(torch.tensor(positions), torch.tensor(weight), torch.tensor(misfit), **kinds)


def noise_of(gradients, sizes, ranks=1):
    """What one step's micro-batch gradients [M, entries] say, with all entries in one part of a model."""
    block_map = classify(Net())
    local = torch.zeros(len(gradients), len(block_map.parts), dtype=torch.float64)
    local[:, 0] = gradients.square().sum(1)
    whole = torch.zeros(len(block_map.parts), dtype=torch.float64)
    whole[0] = gradients.sum(0).square().sum()
    taken = MicroBatches(local, whole, torch.tensor(True), sizes, ranks, 0.0)
    return taken.noise(block_map, whole.numpy())[block_map.layer_block_of[0]]


BY_TOKEN = {"tokens": lambda n: n, "means": lambda _: 1.0, "something between": lambda n: n**0.5}


@pytest.mark.parametrize("counts", [(20, 20), (36, 4), (1, 2, 3, 50), (7, 7, 7, 1)])
@pytest.mark.parametrize("weighing", BY_TOKEN)
@pytest.mark.parametrize("signal", [0.05, 1.0])
def test_the_noise_is_that_of_gaussian_token_gradients(counts, weighing, signal):
    """Tokens' gradients are drawn as N(m, S): the covariance of a step's gradient is Σ w_i² S / n_i."""
    generator, entries, steps = torch.Generator().manual_seed(0), 400, 300
    mean = torch.randn(entries, generator=generator) * signal
    scales = torch.rand(entries, generator=generator) + 0.5
    total = sum(map(BY_TOKEN[weighing], counts))
    weights = [BY_TOKEN[weighing](count) / total for count in counts]
    true = sum(weight**2 / count for weight, count in zip(weights, counts, strict=True)) * float(scales.square().sum())
    sizes = [size(count, weight / count) for count, weight in zip(counts, weights, strict=True)]
    found = []
    for _ in range(steps):
        means = [mean + scales * torch.randn(entries, generator=generator) / count**0.5 for count in counts]
        gradients = torch.stack([weight * each for weight, each in zip(weights, means, strict=True)])
        found.append(noise_of(gradients, sizes))
    stderr = np.std(found) / steps**0.5
    assert abs(np.mean(found) - true) < 4 * stderr
    assert stderr < 0.01 * true


def test_micro_batches_without_a_label_are_left_out():
    gradients = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    gradients[1] = 0.0
    empty = size(0, float("nan"), float("inf"))
    with_empty = noise_of(gradients, [size(5, 0.1), empty, size(7, 0.1)])
    assert with_empty == pytest.approx(noise_of(gradients[::2], [size(5, 0.1), size(7, 0.1)]))
    with pytest.raises(ProbeError, match="fewer than two have a gradient"):
        noise_of(gradients[:2], [size(5, 0.1), empty])


def reading(logits, loss):
    """What a backward from `loss(logits)` shows at the logits."""
    found = []
    output = logits * 1.0
    listen(found.append, {"logits": output}, labels=None, is_sum=False)
    loss(output).backward()
    return found[0]


def logits_and_labels(rows, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(rows)
    logits = (torch.randn(rows, VOCABULARY, generator=generator) * scale).to(dtype).requires_grad_()
    return logits, torch.randint(VOCABULARY, (rows,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
def test_the_weight_of_a_token_is_read_from_the_logits(dtype, scale):
    weights = {}
    for rows in (64, 512):
        logits, labels = logits_and_labels(rows, dtype, scale)
        labels[::4] = -100
        found = reading(
            logits, lambda z, labels=labels: functional.cross_entropy(z.float(), labels, reduction="sum") / 1000
        )
        weights[rows] = relative_weights([found])[0]
        assert int(found.positions) == int((labels >= 0).sum())
        assert weights[rows] == pytest.approx(rows * 0.75 / 1000, rel=0.01)
        mean = reading(logits, lambda z, labels=labels: functional.cross_entropy(z.float(), labels) / 2)
        assert relative_weights([mean])[0] == pytest.approx(0.5, rel=0.01)


OTHERS = {
    "squared": lambda z, _: z.square().mean(),
    "label smoothing": lambda z, labels: functional.cross_entropy(z * 4, labels, label_smoothing=0.2),
    "temperature": lambda z, labels: functional.cross_entropy(z * 4, labels),
    "class weights": lambda z, labels: functional.cross_entropy(z, labels, weight=torch.arange(VOCABULARY) + 1.0),
    "pairs": lambda z, labels: (
        functional.cross_entropy(z[::2], labels[::2]) - functional.cross_entropy(z[1::2], labels[1::2])
    ),
}


@pytest.mark.parametrize("loss", OTHERS)
def test_of_another_loss_equal_sizes_are_taken_and_unequal_ones_refused(loss):
    readings = {}
    for rows in (8, 32):
        logits, labels = logits_and_labels(rows)
        readings[rows] = reading(logits, lambda z, labels=labels: OTHERS[loss](z, labels))
    assert relative_weights([readings[8], readings[8]]) == [1.0, 1.0]
    with pytest.raises(ProbeError, match="micro-batches of 8, 32 positions: how they weigh"):
        relative_weights([readings[8], readings[32]])


def loss_reading(labels, factor, **kinds):
    found = []
    weight = torch.ones(3, requires_grad=True)
    loss = weight.sum()
    listen(found.append, loss, labels=torch.tensor(labels), **{"is_sum": False} | kinds)
    (loss * factor).backward()
    return found[0]


def test_a_model_that_returns_its_loss_alone_shows_the_weight_of_that():
    assert relative_weights([loss_reading(7, 0.5), loss_reading(7, 0.25)]) == [0.5, 0.25]
    # Hugging Face's models divide a sum by `num_items_in_batch`.
    assert relative_weights([loss_reading(7, 1.0, is_sum=True), loss_reading(2, 1.0, is_sum=True)]) == [7.0, 2.0]
    with pytest.raises(ProbeError, match="7, 2 positions"):
        relative_weights([loss_reading(7, 1.0), loss_reading(2, 1.0)])


def test_weights_past_the_output_are_not_known():
    with pytest.raises(ProbeError, match="does not pass through the model's output"):
        relative_weights([size(7, 0.5), None])


@pytest.mark.parametrize(
    ("weights", "even"),
    [
        *(((0.5, 0.5), True), ((1.0,), True), ((65536.0, 65536.0), True), ((1 / 3,) * 3, True)),
        *(((0.9,), False), ((0.5, 0.6), False), ((4000.0,), False), ((1024 / 6,) * 6, True)),
    ],
)
def test_of_other_ranks_only_even_weights_are_believed(weights, even):
    shares = Shares(torch.tensor(weights), torch.ones(len(weights)))
    if even:
        shares.require_even()
        return
    with pytest.raises(ProbeError, match="those of other ranks"):
        shares.require_even()
