"""Under Accelerate, `Checkpoints` takes what `prepare` returned; a run is the same run, resumed and rolled back."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerated import Fixed, Loop, Stream, plain, resumed, watched

import sharpwatch
from sharpwatch.errors import CheckpointError

STEPS = 28  # of 10 a pass, where a step has 2 micro-batches

WAYS = {
    "by default": {},
    "one by one": {"one_by_one": True},
    "no accumulation": {"accumulation": 1},
    "accumulation that does not divide the pass": {"accumulation": 3},
    "a sampler that draws by a seed": {"use_seedable_sampler": True},
    "split batches": {"split_batches": True},
    "bfloat16": {"precision": "bf16"},
    "workers": {"workers": 2},
    "batches dispatched": {"dispatch_batches": True},
    "a stream": {"data": Stream},
}


@pytest.fixture(autouse=True)
def forgotten():
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.mark.parametrize("way", WAYS)
def test_a_run_is_the_same_run_watched_and_resumed(tmp_path, way):
    expected = plain(STEPS, **WAYS[way])
    found, _ = watched(tmp_path, STEPS, 13, **WAYS[way])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    step, *found = resumed(tmp_path, STEPS, **WAYS[way])
    assert step == 13
    torch.testing.assert_close(found, expected[13:], rtol=0, atol=0)


@pytest.mark.parametrize("save_at", [10, 20])
@pytest.mark.parametrize("way", ["by default", "a sampler that draws by a seed", "a stream"])
def test_a_run_that_was_saved_at_the_end_of_a_pass_is_resumed_as_the_same(tmp_path, way, save_at):
    expected = plain(STEPS, **WAYS[way])
    watched(tmp_path, save_at + 1, save_at, **WAYS[way])
    step, *found = resumed(tmp_path, STEPS, **WAYS[way])
    assert step == save_at
    torch.testing.assert_close(found, expected[save_at:], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*set_vital")  # torchdata calls what torch has deprecated
@pytest.mark.parametrize("save_at", [10, 13])
@pytest.mark.parametrize("data", [Fixed, Stream])
def test_a_loader_of_torchdata_restores_its_own_position(tmp_path, data, save_at):
    way = {"use_stateful_dataloader": True, "data": data}
    expected = plain(STEPS, **way)
    found, _ = watched(tmp_path, STEPS, save_at, **way)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    step, *found = resumed(tmp_path, STEPS, **way)
    assert step == save_at
    torch.testing.assert_close(found, expected[save_at:], rtol=0, atol=0)


@pytest.mark.parametrize(
    "way", ["by default", "no accumulation", "a sampler that draws by a seed", "split batches", "a stream"]
)
def test_a_rollback_leaves_a_range_of_data_out(tmp_path, way):
    accumulation = WAYS[way].get("accumulation", 2)
    skip = range(14 * accumulation, 16 * accumulation)  # of the steps 15 and 16
    expected = plain(STEPS, skip, **WAYS[way])
    found, results = watched(tmp_path, STEPS, 13, 17, (15, 17), **WAYS[way])
    assert results == ["applied"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    step, *found = resumed(tmp_path, STEPS, **WAYS[way])
    assert step == 13
    torch.testing.assert_close(found, expected[13:], rtol=0, atol=0)


def test_what_was_prepared_may_be_mixed_with_what_was_not(tmp_path):
    """The optimizer and the model that `prepare` has wrapped are the same as those inside."""
    loop = Loop()
    watch = sharpwatch.attach(loop.model, loop.optimizer.optimizer, training_job="job", probes=())
    model = loop.accelerator.unwrap_model(loop.model)
    checkpoints = sharpwatch.Checkpoints(tmp_path, model, loop.optimizer.optimizer, watch=watch, data=loop.loader)
    for tokens in checkpoints.batches(1):
        loop.batch(tokens)
    assert checkpoints.step == watch.step == 10
    watch.close()


def test_an_optimizer_of_another_model_is_refused_with_the_remedy(tmp_path):
    loop, other = Loop(), Loop()
    watch = sharpwatch.attach(loop.model, loop.optimizer, training_job="job", probes=())
    with pytest.raises(CheckpointError, match="pass model and optimizer as accelerator"):
        sharpwatch.Checkpoints(tmp_path, loop.model, other.optimizer, watch=watch)
    watch.close()
