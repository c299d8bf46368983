"""A checkpoint is complete or not there, and old ones go, but never one that a rollback needs."""

from __future__ import annotations

import os
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from stand_ins import Net
from torch.utils.data import DataLoader, TensorDataset

import sharpwatch
from sharpwatch.errors import CheckpointError
from sharpwatch.v1 import types_pb2


@pytest.fixture
def make(tmp_path, transports):
    """Make a model in training, with its checkpoints."""

    def made(initial_step=0, **options):
        torch.manual_seed(1)
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        watch = sharpwatch.attach(
            model,
            optimizer,
            training_job="plain",
            transport=transports.new(),
            control="rollback",
            initial_step=initial_step,
        )
        loader = DataLoader(TensorDataset(torch.randint(11, (40, 4))), 2, shuffle=True)
        checkpoints = sharpwatch.Checkpoints(tmp_path, model, optimizer, watch=watch, data=loader, **options)
        return model, optimizer, checkpoints

    return made


def steps(model, optimizer, checkpoints, until):
    for (tokens,) in checkpoints.batches():
        model(tokens, tokens)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
        if checkpoints.step == until:
            return


def saved(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def deleted(transport):
    return [Path(uri).name for sample in transport.samples for uri in sample.deleted_checkpoints]


def test_old_ones_go_but_not_one_that_a_pending_rollback_names(make, transports, tmp_path):
    model, optimizer, checkpoints = make(keep=2)
    for step in (1, 2, 3):
        steps(model, optimizer, checkpoints, step)
        checkpoints.save()
    assert saved(tmp_path) == ["step-2", "step-3"]
    target = types_pb2.Rollback(checkpoint=types_pb2.Checkpoint(step=2, uri=str(tmp_path / "step-2")))
    transports[0].command(id="back", rollback=target)
    for (tokens,) in checkpoints.batches():
        model(tokens, tokens)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
        if checkpoints.step == 4:
            checkpoints.save()  # while the rollback is pending, which is done when the next batch is asked for
            assert saved(tmp_path) == ["step-2", "step-3", "step-4"]
        if checkpoints.step == 3:
            break
    steps(model, optimizer, checkpoints, 4)
    assert checkpoints.save().name == "step-4-2"
    assert [result.outcome for result in transports[0].results] == ["applied"]
    told = [Path(checkpoint.uri).name for sample in transports[0].samples for checkpoint in sample.checkpoints]
    assert told == ["step-1", "step-2", "step-3"]  # the rollback has left "step-4" behind
    assert deleted(transports[0]) == ["step-1", "step-4"]


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_rollback_to_one_that_was_deleted_or_damaged_by_hand_fails_with_the_reason(
    make, transports, tmp_path, damage
):
    model, optimizer, checkpoints = make()
    for step in (1, 2):
        steps(model, optimizer, checkpoints, step)
        checkpoints.save()
    transports[0].roll_back(1, str(tmp_path / "step-1"))
    if damage == "gone":
        shutil.rmtree(tmp_path / "step-1")
    else:
        (tmp_path / "step-1" / "checkpoint.json").unlink()
    steps(model, optimizer, checkpoints, 4)
    (result,) = transports[0].results
    assert result.outcome == "failed"
    assert f"{tmp_path}/step-1" in result.detail
    assert ("does not exist any more" if damage == "gone" else "missing or damaged: checkpoint.json") in result.detail
    assert checkpoints.step == 4


ARGUMENTS = {
    "folder": ([None, 3, "", b"x"], "folder must be the path of a folder, got "),
    "model": ([None, "gpt2", {}], "model must be a torch.nn.Module, got "),
    "optimizer": ([None, "adam", 3, torch.optim.AdamW], "optimizer must be a torch.optim.Optimizer, got "),
    "watch": ([None, "run"], "watch must be what sharpwatch.attach returned, got "),
    "data": (["text", 3, b""], "data must be a data loader or another iterable of batches, got "),
    "scheduler": (["cosine", 3, torch.optim.lr_scheduler.StepLR], "scheduler must have state_dict and load_state_dict"),
    "scaler": ([True, "fp16"], "scaler must have state_dict and load_state_dict, got "),
    "keep": ([0, "3", None, True, 2.0], "keep must be a whole number >= 1, got "),
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [(name, value, message) for name, (values, message) in ARGUMENTS.items() for value in values],
)
def test_a_wrong_argument_is_named_before_anything_is_made(transports, tmp_path, name, value, message):
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    watch = sharpwatch.attach(model, optimizer, training_job="plain", transport=transports.new())
    given = {"folder": tmp_path / "new", "model": model, "optimizer": optimizer, "watch": watch, name: value}
    with pytest.raises(CheckpointError, match=re.escape(message)):
        sharpwatch.Checkpoints(**given)
    assert not (tmp_path / "new").exists()
    assert not optimizer._optimizer_step_post_hooks.keys() - {watch._watched._hooks._post[0].id}


@pytest.mark.parametrize(
    ("optimizers", "message"),
    [
        (lambda _: [], "optimizer must be one torch.optim.Optimizer or several, got none"),
        (
            lambda model: [torch.optim.SGD(model.parameters()), "adam"],
            "optimizer[1] must be a torch.optim.Optimizer, got str",
        ),
        (
            lambda model: torch.optim.SGD([*model.parameters(), torch.zeros(1, requires_grad=True)]),
            "optimizer must hold parameters of model alone, but SGD holds another",
        ),
    ],
)
def test_an_optimizer_that_cannot_be_saved_is_refused(transports, tmp_path, optimizers, message):
    model = Net()
    watch = sharpwatch.attach(
        model, torch.optim.SGD(model.parameters()), training_job="plain", transport=transports.new()
    )
    with pytest.raises(CheckpointError, match=re.escape(message)):
        sharpwatch.Checkpoints(tmp_path, model, optimizers(model), watch=watch)


def test_no_scheduler_is_none(make):
    make(scheduler=None)


def test_a_save_that_was_cut_off_leaves_the_last_good_one(make, tmp_path):
    model, optimizer, checkpoints = make()
    steps(model, optimizer, checkpoints, 2)
    checkpoints.save()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    steps(model, optimizer, checkpoints, 3)
    draft = tmp_path / ".step-3"  # what a process that is killed in save() leaves
    draft.mkdir()
    (draft / "rank-0.pt").write_bytes(b"half a file")
    model, optimizer, checkpoints = make()
    assert checkpoints.resume() == 2
    torch.testing.assert_close(dict(model.state_dict()), kept, rtol=0, atol=0)
    steps(model, optimizer, checkpoints, 4)
    checkpoints.save()
    assert not draft.exists()


@pytest.mark.parametrize("damage", ["cut", "gone", "flipped"])
def test_a_damaged_one_is_refused_before_anything_changes(make, tmp_path, damage):
    model, optimizer, checkpoints = make()
    steps(model, optimizer, checkpoints, 2)
    checkpoints.save()
    file = max((tmp_path / "step-2").glob("*.distcp"), key=lambda path: path.stat().st_size)
    if damage == "cut":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "gone":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[-100] ^= 4
        file.write_bytes(content)
    model, _, checkpoints = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    with pytest.raises(CheckpointError, match=f"missing or damaged: {file.name}"):
        checkpoints.resume()
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)


def test_restoring_writes_into_the_tensors_that_are_there(make):
    model, optimizer, checkpoints = make()
    steps(model, optimizer, checkpoints, 2)
    checkpoints.save()
    model, optimizer, checkpoints = make()
    places = {name: value.data_ptr() for name, value in model.state_dict().items()}
    stepped = []
    optimizer.register_step_post_hook(lambda *_: stepped.append(1))
    checkpoints.resume()
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == places
    assert stepped == []  # the step() by which DCP makes an optimizer's state is nobody's
    assert checkpoints.step == 2


def test_schedulers_and_the_scaler_come_back(make):
    def parts():
        toy = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedulers = [torch.optim.lr_scheduler.MultiStepLR(toy, [1]), torch.optim.lr_scheduler.StepLR(toy, 2)]
        toy.step()
        return schedulers, torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)

    schedulers, scaler = parts()
    model, optimizer, checkpoints = make(scheduler=schedulers, scaler=scaler)
    for (tokens,) in checkpoints.batches():
        scaler.scale(model(tokens, tokens)[1]).backward()
        scaler.step(optimizer)
        scaler.update()
        for scheduler in schedulers:
            scheduler.step()
        if checkpoints.step == 3:
            break
    checkpoints.save()
    again, fresh = parts()
    make(scheduler=again, scaler=fresh)[2].resume()
    assert [one.state_dict() for one in again] == [one.state_dict() for one in schedulers]
    assert fresh.get_scale() == scaler.get_scale() == 32.0


def test_what_cannot_be_read_back_is_found_when_it_is_saved(make):
    class Custom:
        def state_dict(self):
            return {"not plain": Custom()}

        def load_state_dict(self, state):
            pass

    model, optimizer, checkpoints = make(scheduler=Custom())
    steps(model, optimizer, checkpoints, 1)
    with pytest.raises(CheckpointError, match="Custom"):
        checkpoints.save()
    assert checkpoints.resume() == 0


def test_what_a_kill_leaves_of_an_old_one_goes_with_the_next(make, tmp_path, monkeypatch):
    def killed(folder, **_):
        (folder / "checkpoint.json").unlink()
        raise KeyboardInterrupt

    model, optimizer, checkpoints = make(keep=1)
    steps(model, optimizer, checkpoints, 1)
    checkpoints.save()
    steps(model, optimizer, checkpoints, 2)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save()
    steps(model, optimizer, checkpoints, 3)
    checkpoints.save()
    assert saved(tmp_path) == ["step-3"]


def test_a_full_disk_is_one_error_and_leaves_what_stood(make):
    model, optimizer, checkpoints = make()
    steps(model, optimizer, checkpoints, 1)
    checkpoints.save()
    steps(model, optimizer, checkpoints, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            checkpoints.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert make()[2].resume() == 1


def test_steps_that_were_undone_go_first(make, transports, tmp_path):
    model, optimizer, checkpoints = make(keep=3)
    for step in (1, 2, 3):
        steps(model, optimizer, checkpoints, step)
        checkpoints.save()
    target = types_pb2.Rollback(checkpoint=types_pb2.Checkpoint(step=1, uri=str(tmp_path / "step-1")))
    transports[0].command(id="back", rollback=target)
    steps(model, optimizer, checkpoints, 2)
    checkpoints.save()
    assert saved(tmp_path) == ["step-1", "step-2-2", "step-3"]


def test_a_run_that_had_steps_before_goes_on_counting_them(make, transports, tmp_path):
    model, optimizer, checkpoints = make(initial_step=60)
    steps(model, optimizer, checkpoints, 61)
    path = checkpoints.save()
    assert path.name == "step-61"
    checkpoint = types_pb2.Checkpoint(step=61, uri=str(tmp_path / "step-61"))
    target = types_pb2.Rollback(checkpoint=checkpoint, skip_from_step=63, skip_to_step=64)
    steps(model, optimizer, checkpoints, 63)
    transports[0].command(id="back", rollback=target)
    steps(model, optimizer, checkpoints, 64)
    steps(model, optimizer, checkpoints, 62)
    assert checkpoints.data.left_out == [(2, 3)]  # the third batch of those that were taken under this watch


def test_an_optimizer_without_state_is_not_stepped_for_a_checkpoint(make, transports, tmp_path):
    model, _, _ = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stepped = []
    optimizer.register_step_post_hook(lambda *_: stepped.append(1))
    watch = sharpwatch.attach(model, optimizer, training_job="plain", transport=transports.new())
    checkpoints = sharpwatch.Checkpoints(tmp_path, model, optimizer, watch=watch)
    checkpoints.save()
    checkpoints.resume()
    assert (stepped, checkpoints.step, watch.step) == ([], 0, 0)
