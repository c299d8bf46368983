"""The benchmark of learning rates from curvature: its estimators, and that a cell is trained once."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[2]))  # pytest started by its own name does not look there
from benchmarks.autopilot import stages
from benchmarks.autopilot.__main__ import main
from benchmarks.autopilot.llr import LayerwiseRates, hill
from benchmarks.autopilot.runs import Cell, Result, shape, train
from benchmarks.autopilot.stages import CONSTANT_RATES, CONSTANT_SEEDS, CONSTANT_STEPS, Results, lost_by_rate

UNIFORM = Cell("gpt2", "1M", "uniform", "", 1e-3, 0, 9)


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
    assert [shape(step, 100, 0.1) for step in (1, 10, 100)] == pytest.approx([0.1, 1.0, 0.1])


def test_a_wrong_rate_costs_the_mean_over_the_logarithm_of_the_rate():
    swept = {
        rate: Result(UNIFORM, initial=7.0, loss=loss) for rate, loss in ((1e-4, 5.0), (1e-3, 4.0), (1e-1, math.inf))
    }
    assert lost_by_rate(swept) == pytest.approx((0.5 * 1 + 1.5 * 2) / 3)


def test_the_constant_is_chosen_by_its_better_rate(tmp_path):
    results = Results(tmp_path, "llama", "1M")
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
            results.add(Result(cell, initial=7.0, loss=loss))
    assert results.constant("llr") == "3"
    assert Results(tmp_path, "llama", "1M").constant("llr") == "3"  # as read from the file


@pytest.mark.slow
@pytest.mark.parametrize(
    "contender",
    [("paper", ""), ("llr", "3"), ("share", "4"), ("share-cap", "0.1"), ("share-layers", "4"), ("cap", "0.1")],
)
def test_each_contender_trains(contender):
    found = train(Cell("gpt2", "1M", *contender, 1e-3, 0, 9), "cpu")
    assert found.initial > found.loss > 5
    assert found.probes == (3 if contender[0].startswith(("share", "cap")) else 0)


@pytest.mark.slow
def test_a_stage_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    cells = [Cell("gpt2", "1M", "uniform", "", 1e-3, seed, 2) for seed in (0, 1)]
    monkeypatch.setitem(stages.STAGES, "tune", lambda *_: cells)
    Results(tmp_path, "gpt2", "1M").add(Result(cells[0], initial=7.0, loss=1.5))
    main(["tune", "--model", "gpt2", "--results", str(tmp_path)])
    assert capsys.readouterr().out.startswith("1 of 2 cells")
    results = Results(tmp_path, "gpt2", "1M")
    kept = [one for cell in cells if (one := results.of(cell)) is not None]
    assert kept[0].loss == 1.5
    assert kept[1].initial > kept[1].loss > 5
