"""Windows of real probes of a tiny model, their sketches made by shards, against its dense Gauss-Newton matrix."""

from __future__ import annotations

import dense
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import covered

from sharpwatch.blocks import classify
from sharpwatch.curvature.estimators.gnb import gnb_probe
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.statistics.gnb_eigenvalues import (
    alignments,
    drifts,
    effective_ranks,
    sketch_moments,
    top_eigenvalues,
)
from sharpwatch.curvature.statistics.sketch import CountSketch

WINDOWS, PROBES, DRAWS, SIZE = 24, 8, 4, 256


class Kept:
    """Takes the place of a sketch, and keeps what was to be sketched."""

    def __init__(self):
        self.gradients = []

    def sketch(self, gradients):
        self.gradients.append(gradients)
        return torch.zeros(1, 1)


@pytest.fixture(scope="module")
def model():
    """A model's block map, its drawn gradients, the gradient of its loss and the true figures [4, B + 1]."""
    live = dense.gpt2()
    ids, labels = dense.tokens()
    block_map = classify(live)
    exact = dense.Exact.of(live)
    loss = exact.model(input_ids=ids, labels=labels).loss
    gradient = dict(zip(exact.names, torch.autograd.grad(loss, exact.parameters), strict=True))
    flat = torch.cat([gradient[name].flatten() for name in exact.names])
    root = dense.gauss_newton_root(exact, ids, labels)
    entries = [exact.entries(block_map, block) for block in block_map.blocks] + [torch.arange(len(flat))]
    kept, source = Kept(), torch.Generator().manual_seed(0)
    for _ in range(WINDOWS * PROBES):
        gnb_probe(live, block_map, Batch((ids,), {"labels": labels}), draws=DRAWS, generator=source, sketcher=kept)
    truth = [estimates_of(root[:, index], flat[index]) for index in entries]
    return block_map, kept.gradients, {name: value.float() for name, value in gradient.items()}, torch.tensor(truth).T


def estimates_of(root, gradient):
    """Top eigenvalue, effective rank, drift and alignment of G = AᵀA."""
    eigenvalues = torch.linalg.eigvalsh(root @ root.T)
    norm = eigenvalues.norm()
    return (
        float(eigenvalues[-1]),
        float((eigenvalues.sum() / norm) ** 2),
        0.0,
        float((root @ gradient).square().sum() / gradient.square().sum() / norm),
    )


def with_whole(sketches):
    """Sketches [..., B, k] of blocks, and of the whole."""
    return torch.cat([sketches, sketches.sum(-2, keepdim=True)], -2)


def estimated(sketches, along):
    """Values and errors [4, 2, B + 1] of one window, from [P, D, B, k] and the gradient's [B, k]."""
    sketches = with_whole(sketches).permute(2, 0, 1, 3)
    gradients = with_whole(along)[:, None].expand(-1, PROBES, -1)
    mask = torch.ones(sketches.shape[:3], dtype=torch.bool)
    moments = sketch_moments(sketches, mask, gradients)
    top = top_eigenvalues(sketches, mask)
    found = (top, effective_ranks(moments, top.value), drifts(moments), alignments(moments))
    return torch.stack([torch.stack([one.value, one.stderr]) for one in found])


@pytest.fixture(scope="module")
def windows(model):
    """[windows, 4, 2, B + 1], each under a seed of its own."""
    block_map, gradients, gradient, _ = model
    found = []
    for seed in range(WINDOWS):
        some = gradients[seed * PROBES * DRAWS : (seed + 1) * PROBES * DRAWS]
        sketcher = CountSketch(block_map, SIZE, seed)
        sketches = torch.stack([sketcher.sketch(one) for one in some]).unflatten(0, (PROBES, DRAWS))
        found.append(estimated(sketches, sketcher.sketch(gradient)))
    return torch.stack(found)


# Of second order: the rank is an inverse; of a top eigenvalue among near ones the luckiest is taken.
@pytest.mark.parametrize(
    ("row", "bias"), [(0, 0.2), (1, 0.1), (2, 0), (3, 0.05)], ids=["top", "rank", "drift", "alignment"]
)
def test_the_mean_over_windows_is_the_dense_truth(model, windows, row, bias):
    truth = model[3][row]
    value = windows[:, row, 0]
    assert value.isfinite().all()
    allowed = 4 * value.std(0) / WINDOWS**0.5 + bias * truth + 0.04 * (row == 2)
    assert ((value.mean(0) - truth).abs() < allowed).all(), (value.mean(0), truth, value.std(0))


@pytest.mark.parametrize("row", range(4), ids=["top", "rank", "drift", "alignment"])
def test_the_error_covers_the_dense_truth(model, windows, row):
    truth = model[3][row]
    share = covered(windows[:, row, 0], windows[:, row, 1], truth)
    # Student's t of 7 degrees of freedom: 0.914. Blocks share draws, so only windows are counted as independent.
    assert share > 0.914 - 3 * (0.914 * 0.086 / WINDOWS) ** 0.5, share


@settings(deadline=None, derandomize=True, max_examples=5, database=None)
@given(st.integers(0, 2**32), st.integers(2, 4), st.randoms())
def test_shards_give_the_estimates_of_the_whole(model, seed, shards, random):
    """Each rank holds a run of the flat entries of every parameter, and sketches it alone."""
    block_map, gradients, gradient, _ = model
    sketcher = CountSketch(block_map, SIZE, seed)
    cuts = {
        name: [0, *sorted(random.randint(0, value.numel()) for _ in range(shards - 1)), value.numel()]
        for name, value in gradient.items()
    }

    def merged(values):
        parts = [
            sketcher.sketch(
                {name: value.reshape(-1)[cuts[name][rank] : cuts[name][rank + 1]] for name, value in values.items()},
                {name: cuts[name][rank] for name in values},
            )
            for rank in range(shards)
        ]
        random.shuffle(parts)
        return sum(parts)

    some = gradients[: PROBES * DRAWS]
    whole, added = (
        estimated(torch.stack([sketch(one) for one in some]).unflatten(0, (PROBES, DRAWS)), sketch(gradient))
        for sketch in (sketcher.sketch, merged)
    )
    torch.testing.assert_close(added, whole, rtol=1e-5, atol=1e-5)
