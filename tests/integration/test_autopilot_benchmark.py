"""The benchmark of learning rates from curvature: its estimators, and that a cell is trained once."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[2]))  # pytest started by its own name does not look there
from benchmarks.autopilot.llr import LayerwiseRates, hill
from benchmarks.autopilot.runs import Cell, Result, result, shape
from benchmarks.autopilot.stages import CONSTANT_RATES, CONSTANT_SEEDS, CONSTANT_STEPS, Results, lost_by_rate


def test_hills_estimator_knows_the_exponent_of_a_power_law():
    # Quantiles of a Pareto law with density λ^-2.5, as eigenvalues of WᵀW.
    quantiles = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    eigenvalues = (1 - quantiles) ** (-1 / 1.5)
    assert hill(torch.diag(eigenvalues.sqrt())) == pytest.approx(2.5, rel=0.02)


def test_layerwise_rates_move_to_the_lightest_tail():
    torch.manual_seed(0)
    matrices = {
        "light": nn.Parameter(torch.eye(32) + 0.01 * torch.randn(32, 32)),
        "heavy": nn.Parameter(torch.diag(torch.arange(1.0, 33.0) ** 3)),
    }
    parameters = {**matrices, "emb": nn.Parameter(torch.zeros(8, 4)), "norm": nn.Parameter(torch.ones(4))}
    rates = LayerwiseRates(parameters, frozenset({"emb"}), 3.0)
    seen = [rates.at(step) for step in range(1, 61)]
    assert seen[38] == dict.fromkeys(parameters, 1.0)
    assert seen[49]["light"] == pytest.approx(2.0)  # half the way
    assert seen[59] == pytest.approx({"light": 3.0, "heavy": 1.0, "emb": 3.0, "norm": 1.0})


def test_the_schedule_warms_up_and_ends_at_a_tenth():
    assert [shape(step, 100) for step in (1, 10, 100)] == pytest.approx([0.1, 1.0, 0.1])


def test_a_wrong_rate_costs_the_mean_over_the_logarithm_of_the_rate():
    swept = {rate: Result({}, initial=7.0, loss=loss) for rate, loss in ((1e-4, 5.0), (1e-3, 4.0), (1e-1, math.inf))}
    assert lost_by_rate(swept) == pytest.approx((0.5 * 1 + 1.5 * 2) / 3)


def test_the_constant_is_chosen_by_its_better_rate(tmp_path):
    results = Results(tmp_path, "llama", "1M")
    (tmp_path / "cells").mkdir()
    losses = {
        ("3", CONSTANT_RATES[0]): 5.0,
        ("3", CONSTANT_RATES[1]): 4.0,
        ("5", CONSTANT_RATES[0]): 4.5,
        ("5", CONSTANT_RATES[1]): 9.0,
    }
    assert results.constant("llr") is None
    for (constant, rate), loss in losses.items():
        for seed in CONSTANT_SEEDS:
            cell = results.cell("llr", constant, rate, seed, CONSTANT_STEPS)
            (tmp_path / "cells" / cell.name).write_text(json.dumps({"cell": {}, "initial": 7.0, "loss": loss}))
    assert results.constant("llr") == "3"


@pytest.mark.slow
@pytest.mark.parametrize(
    "contender", [("uniform", ""), ("paper", ""), ("llr", "3"), ("share", "4"), ("share-cap", "0.1")]
)
def test_each_contender_trains_and_a_cell_is_trained_once(tmp_path, contender):
    cell = Cell("gpt2", "1M", *contender, 1e-3, 0, 9)
    found = result(tmp_path, cell, "cpu")
    assert found.initial > found.loss > 5
    assert found.probes == (3 if contender[0].startswith("share") else 0)
    path = tmp_path / "cells" / cell.name
    path.write_text(path.read_text().replace(str(found.loss), "1.5"))
    assert result(tmp_path, cell, "cpu").loss == 1.5
