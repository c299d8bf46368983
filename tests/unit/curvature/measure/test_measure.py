"""Measurements against dense Hessians of whole families; the table of all of them is judged together."""

from __future__ import annotations

import math

import dense
import pytest
import torch

from sharpwatch import measure
from sharpwatch.blocks import classify

DRAWS = 24
SEEDS = (0, 1)


class Case:
    """A model of the zoo, its batch, and the truth by block: traces of H and G, eigenvalues of H."""

    def __init__(self, name):
        self.name = name
        self.model = dense.ZOO[name]()
        ids, labels = dense.tokens()
        self.batch = {"input_ids": ids, "labels": labels}
        self.block_map = classify(self.model)
        exact = dense.Exact.of(self.model)
        gradient, hessian = dense.gradient_and_hessian(exact, ids, labels)
        root = dense.gauss_newton_root(exact, ids, labels)
        self.entries = {block: exact.entries(self.block_map, block) for block in self.block_map.blocks}
        self.size = len(gradient)
        self.hessian = {block: hessian[own][:, own] for block, own in self.entries.items()}
        self.gauss_newton = {block: float(root[:, own].square().sum()) for block, own in self.entries.items()}
        self.ends = {block: torch.linalg.eigvalsh(own)[[0, -1]].tolist() for block, own in self.hessian.items()}
        self.whole = dense.ends(hessian) if name in dense.MODELS else None


@pytest.fixture(scope="module")
def zoo():
    """Every case; each dense Hessian takes some seconds, and is made once."""
    cases = {}

    def find(name):
        if name not in cases:
            cases[name] = Case(name)
        return cases[name]

    return find


@pytest.fixture(scope="module")
def reports(zoo):
    """The measurements of a model, by seed; eigenvalues with the first alone."""
    made = {}

    def find(name):
        if name not in made:
            case = zoo(name)
            estimators = ("gnb", "hutchinson", "lanczos"), ("gnb", "hutchinson")
            made[name] = [
                measure(case.model, [case.batch], estimators=which, draws=DRAWS, seed=seed)
                for seed, which in zip(SEEDS, estimators, strict=True)
            ]
        return made[name]

    return find


def deviations(case, report):
    """How many standard errors each trace is off, by (block, estimator)."""
    truth = {"gnb": case.gauss_newton, "hutchinson": {b: float(h.trace()) for b, h in case.hessian.items()}}
    return {
        (block, name): (estimate.value - truth[name][block]) / estimate.stderr
        for block, found in report.blocks.items()
        for name, estimate in found.estimates.items()
    }


@pytest.mark.parametrize("name", dense.ZOO)
def test_every_trace_is_within_four_standard_errors(zoo, reports, name):
    case = zoo(name)
    for report in reports(name):
        off = {key: value for key, value in deviations(case, report).items() if not abs(value) < 4}
        assert not off
        assert set(report.blocks) == set(case.block_map.blocks)


def test_the_error_bars_cover_what_they_say(zoo, reports):
    # t with 23 degrees of freedom is within 2 in 94.3 %: of some 150 cells 90 % is 2.3 deviations away, and 4 standard
    # errors are exceeded by 0.06 %.
    every = [
        value for name in dense.ZOO for report in reports(name) for value in deviations(zoo(name), report).values()
    ]
    assert len(every) > 140
    covered = sum(abs(value) < 2 for value in every) / len(every)
    assert covered >= 0.90
    # Nor are they too wide: t is within 1 in 67 %, ± 4 %.
    assert 0.55 <= sum(abs(value) < 1 for value in every) / len(every) <= 0.79


@pytest.mark.parametrize("name", dense.ZOO)
def test_both_ends_of_every_spectrum(zoo, reports, name):
    case, report = zoo(name), reports(name)[0]
    for block, found in report.blocks.items():
        bottom, top = case.ends[block]
        for truth, estimate in ((top, found.top_eigenvalue), (bottom, found.bottom_eigenvalue)):
            assert abs(estimate.value - truth) <= max(0.01 * abs(truth), estimate.residual), (block, truth, estimate)
            assert estimate.estimator == "lanczos"
            assert estimate.cost.backwards > 0
    if case.whole is not None:
        bottom, top = case.whole
        assert report.whole.top_eigenvalue.value == pytest.approx(top, rel=0.01)
        assert abs(report.whole.bottom_eigenvalue.value - bottom) <= max(
            0.01 * abs(bottom), report.whole.bottom_eigenvalue.residual
        )
        # The largest block's is a lower bound alone.
        assert max(found.top_eigenvalue.value for found in report.blocks.values()) < top


def test_the_top_is_the_largest_where_the_most_negative_is_larger_in_size(zoo):
    case = zoo("llama")
    flipped = measure(
        case.model,
        [case.batch],
        estimators=("lanczos",),
        loss_fn=lambda model, batch: -model(**batch.kwargs).loss,
    )
    lopsided = 0
    for block, found in flipped.blocks.items():
        bottom, top = case.ends[block]
        lopsided += top > 1.2 * abs(bottom)
        estimate = found.top_eigenvalue
        assert abs(estimate.value + bottom) <= max(0.01 * abs(bottom), estimate.residual), block
    assert lopsided >= 2  # blocks for which power iteration would have returned the wrong end


@pytest.mark.parametrize("name", dense.ZOO)
def test_sharpness_is_the_trace_over_the_number_of_parameters(zoo, reports, name):
    case = zoo(name)
    for report in reports(name):
        for block, found in report.blocks.items():
            assert found.parameters == len(case.entries[block])
            assert found.sharpness.value == found.trace.value / found.parameters
            assert found.sharpness.stderr == found.trace.stderr / found.parameters
            assert found.trace is found.estimates["hutchinson"]


@pytest.mark.parametrize("name", dense.ZOO)
def test_traces_are_taken_from_the_loss_where_it_is_smooth(reports, name):
    rough = name in {"mixtral", "t5"}  # experts are chosen; ReLU has a kink
    for found in reports(name)[0].blocks.values():
        assert found.estimates["hutchinson"].method == ("autograd" if rough else "loss differences")


def test_layers_add_up_to_their_block(zoo):
    case = zoo("gpt2")
    report = measure(case.model, [case.batch], estimators=("gnb", "hutchinson"), draws=4, method="autograd")
    for block, found in report.blocks.items():
        own = [layer for name, layer in report.layers.items() if name.split(".")[-1] == block]
        assert sum(layer.parameters for layer in own) == found.parameters
        for estimator in ("gnb", "hutchinson"):
            total = math.fsum(layer.estimates[estimator].value for layer in own)
            assert total == pytest.approx(found.estimates[estimator].value, rel=1e-9, abs=1e-12)
    assert report.whole.parameters == case.size
    assert report.whole.trace.value == pytest.approx(math.fsum(b.trace.value for b in report.blocks.values()))


def test_every_way_of_differentiating_sees_the_same_signs(zoo):
    # The same random signs by products and by differences of gradients. By differences of the loss, up to their third
    # order, which averages out: in a model as strongly curved as this up to a quarter of the draws' own spread
    # (measured), of which 8 draws leave 0.09; 4 of those.
    case = zoo("llama")
    arguments = {"estimators": ("hutchinson",), "draws": 8, "seed": 3}
    exact = measure(case.model, [case.batch], method="autograd", **arguments)
    differences = measure(case.model, [case.batch], method="differences", **arguments)
    losses = measure(case.model, [case.batch], **arguments)
    for block, found in exact.blocks.items():
        spread = found.trace.stderr * math.sqrt(8)
        assert differences.blocks[block].trace.value == pytest.approx(found.trace.value, abs=1e-3 * spread, rel=1e-3)
        assert differences.blocks[block].trace.method == "gradient differences"
        assert losses.blocks[block].trace.value == pytest.approx(found.trace.value, abs=0.35 * spread, rel=0.01)
        assert losses.blocks[block].trace.method == "loss differences"
