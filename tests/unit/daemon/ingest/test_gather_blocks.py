"""Block types against norms of the concatenated tensors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hellos import run_hello
from observations import layer_tap

from sharpwatch.daemon.estimation.gnb import sum_layers
from sharpwatch.daemon.ingest.samples import gather_blocks

SIZES = (5, 3, 7, 2)
NAMES = (("emb", ""), ("qk", "layers.0"), ("qk", "layers.1"), ("norm", "layers.0"))
HELLO = run_hello(dict(zip(NAMES, SIZES, strict=True)))


def test_norms_and_rms_are_those_of_the_layers_put_together():
    random = np.random.default_rng(0)
    parts = [random.normal(size=size) for size in SIZES]
    norms = np.array([np.linalg.norm(part) for part in parts])
    rms = np.array([math.sqrt(np.mean(part**2)) for part in parts])
    tap = gather_blocks(HELLO, layer_tap(4, gradient_norm=norms, update_rms=rms))
    whole = [parts[0], np.concatenate(parts[1:3]), parts[3]]
    assert tap.gradient_norm == pytest.approx([np.linalg.norm(part) for part in whole], rel=1e-12)
    assert tap.update_rms == pytest.approx([math.sqrt(np.mean(part**2)) for part in whole], rel=1e-12)


def test_rows_without_a_second_moment_are_left_out_of_rms():
    tap = gather_blocks(HELLO, layer_tap(4, update_rms=np.array([math.nan, 2.0, math.nan, math.inf])))
    assert math.isnan(tap.update_rms[0])
    assert tap.update_rms[1] == 2.0
    assert math.isinf(tap.update_rms[2])


def test_damage_in_one_block_stays_there():
    tap = gather_blocks(HELLO, layer_tap(4, gradient_norm=np.array([math.nan, 3.0, 4.0, 1.0])))
    assert math.isnan(tap.gradient_norm[0])
    assert tap.gradient_norm[1:].tolist() == [5.0, 1.0]


def test_counts_add_and_rates_are_weighted_by_parameters():
    tap = gather_blocks(
        HELLO,
        layer_tap(4, non_finite=np.array([0, 2, 3, 1]), learning_rate=np.array([1.0, 0.0, 1.0, 3.0])),
    )
    assert tap.non_finite.tolist() == [0, 5, 1]
    assert tap.learning_rate.tolist() == [1.0, 0.7, 3.0]


def test_traces_add_over_layers_for_every_draw():
    assert sum_layers(HELLO, np.array([[1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 1.0, 0.0]])).tolist() == [[1, 5, 4], [0, 2, 0]]
