"""Under Accelerate on two processes a run is the same run, resumed and rolled back."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "integration" / "integrations"))
import accelerated

STEPS = 24  # of five a pass, where a step has 2 micro-batches of each rank


def three_ways(folder, options):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": "2"}  # which `accelerate launch` sets
    expected = accelerated.plain(STEPS, **options)
    found = accelerated.watched(folder, STEPS, 8, 12, (9, 9), **options)
    return expected, found, accelerated.resumed(folder, STEPS, **options)


@pytest.mark.parametrize("options", [{}, {"use_seedable_sampler": True}, {"split_batches": True}], ids=str)
def test_a_run_is_the_same_run_on_every_rank(ranks, tmp_path, options):
    for rank, (expected, watched, resumed) in enumerate(ranks(three_ways, 2, str(tmp_path), options)):
        found, results = watched
        assert results == (["applied"] if rank == 0 else [])
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        step, *found = resumed
        assert step == 8
        torch.testing.assert_close(found, expected[8:], rtol=0, atol=0)
