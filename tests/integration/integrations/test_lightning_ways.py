"""What users do with Lightning: `fit` brings the same batches and weights, also after it has gone back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from stand_ins import Net
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from sharpwatch.integrations.lightning import SharpwatchCallback, fit
from sharpwatch.v1 import types_pb2

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on trainings this small
ROWS = torch.randint(11, (48, 4), generator=torch.Generator().manual_seed(1))
APPLIED, FAILED, REFUSED = "applied", "failed", "refused"


class Stream(IterableDataset):
    def __iter__(self):
        yield from ROWS


class Module(LightningModule):
    """Orders a rollback in the step of each plan; keeps what each step, the newest, took and made."""

    def __init__(self, transports, folder, plans):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.drop = Net(), nn.Dropout(0.1)
        self.transports, self.folder, self.plans = transports, folder, list(plans)
        self.taken, self.weights = {}, {}

    def training_step(self, batch, _index):
        step = self.trainer.global_step + 1
        if self.plans and self.plans[0][0] == step:
            _, to, skip = self.plans.pop(0)
            checkpoint = types_pb2.Checkpoint(step=to, uri=str(self.folder / f"step={to}.ckpt"))
            target = types_pb2.Rollback(checkpoint=checkpoint, skip_from_step=skip[0], skip_to_step=skip[1])
            self.transports[-1].command(id=f"back-{to}", rollback=target)
        parts = [part for part in (batch if isinstance(batch, list) else [batch]) if part is not None]
        self.taken[step] = [part.tolist() for part in parts]
        return sum(self.loss(part) for part in parts)

    def loss(self, part):
        return nn.functional.cross_entropy(self.drop(self.net(part)[0]).flatten(0, 1), part.flatten())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def on_train_batch_end(self, *_):
        self.weights[self.trainer.global_step] = [value.detach().clone() for value in self.parameters()]


class DrawsAsEpochsBegin(Callback):
    def on_train_epoch_start(self, *_):
        torch.randn(3)


class RaisesOnceBack(Callback):
    begun = 0

    def on_train_start(self, *_):
        self.begun += 1
        if self.begun > 1:
            raise RuntimeError("a user's own")


def loader(rows=ROWS, **options):
    return DataLoader(rows, 2, shuffle=True, **options)


def several(mode):
    return lambda: CombinedLoader([loader(), loader(ROWS[:14])], mode)


WAYS = {
    "one loader": (loader, {}),
    "workers that stay": (lambda: loader(num_workers=1, persistent_workers=True), {}),
    "a stream": (lambda: DataLoader(Stream(), 2), {}),
    "the shorter again": (several("max_size_cycle"), {}),
    "the shorter once": (several("max_size"), {}),
    "the shortest": (several("min_size"), {}),
    "a loader for each epoch": (loader, {"reload_dataloaders_every_n_epochs": 1}),
    "a part of each epoch": (loader, {"limit_train_batches": 7}),
    "draws between epochs": (loader, {"callbacks": [DrawsAsEpochsBegin()]}),
}


@pytest.fixture
def made(tmp_path, transports):
    """Make a Trainer, a module and a loader, of 30 steps."""
    runs = iter(range(100))

    def make(*plans, watched=True, way="one loader", callbacks=(), **options):
        make_loader, own = WAYS[way]
        folder = tmp_path / str(next(runs))
        callbacks = [*callbacks, *own.get("callbacks", ())]
        if watched:
            callbacks.append(SharpwatchCallback(training_job="ways", transport=transports.new(), **options))
        callbacks.append(ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1))
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(accelerator="cpu", max_steps=30, **{**quiet, **own, "callbacks": callbacks})
        module, data = Module(transports, folder, plans), make_loader()
        torch.manual_seed(5)
        return trainer, module, data

    return make


def outcomes(transports):
    return [result.outcome for transport in transports for result in transport.results]


@pytest.mark.parametrize("way", WAYS)
def test_the_same_batches_come_and_come_again(made, transports, way):
    trainer, plain, data = made(watched=False, way=way)
    trainer.fit(plain, data)
    # Lightning itself begins the shorter loader anew where it goes on in an epoch in which that has ended.
    plans = [] if way == "the shorter once" else [(14, 12, (0, 0)), (30, 20, (0, 0))]
    trainer, watched, data = made(*plans, way=way)
    fit(trainer, watched, data)
    assert watched.taken == plain.taken
    torch.testing.assert_close(watched.weights, plain.weights, rtol=0, atol=0)
    assert outcomes(transports) == [APPLIED] * len(plans)


def test_of_a_stream_the_steps_own_batches_are_left_out(made):
    trainer, plain, data = made(watched=False, way="a stream")
    trainer.fit(plain, data)
    trainer, watched, data = made((14, 12, (13, 15)), way="a stream")
    fit(trainer, watched, data)
    stream = [plain.taken[step] for step in plain.taken if step not in {13, 14}]
    assert [watched.taken[step] for step in range(1, 29)] == stream


def test_a_loader_made_for_each_epoch_is_not_skipped_in(made, transports, caplog):
    trainer, module, data = made((14, 12, (13, 15)), way="a loader for each epoch")
    fit(trainer, module, data)
    assert outcomes(transports) == [REFUSED]  # and not failed: the checkpoint is good
    assert "reload_dataloaders_every_n_epochs" in caplog.text


def test_an_error_on_the_way_back_is_raised_and_reported(made, transports):
    trainer, module, data = made((6, 4, (5, 6)), callbacks=[RaisesOnceBack()])
    with pytest.raises(RuntimeError, match="a user's own"):
        fit(trainer, module, data)
    (result,) = transports[0].results
    assert (result.outcome, result.detail) == (FAILED, "RuntimeError: a user's own")
    assert transports[0].closed
    assert not any(sample.closing for sample in transports[0].samples)  # no goodbye: it did not end in order


def test_the_last_is_not_one_that_was_undone_where_no_folder_is_named(tmp_path, transports):
    class Dies(Callback):
        times = 0

        def on_train_batch_end(self, trainer, *_):
            self.times += trainer.global_step == 9
            if self.times == 2:
                raise SystemExit

    def trained(resume, plans, *callbacks):
        saving = ModelCheckpoint(filename="{step}", every_n_train_steps=4, save_top_k=-1, save_last=True)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        callbacks = [*callbacks, SharpwatchCallback(training_job="ways", transport=transports.new()), saving]
        trainer = Trainer(accelerator="cpu", max_steps=16, default_root_dir=tmp_path, callbacks=callbacks, **quiet)
        module = Module(transports, tmp_path / "checkpoints", plans)
        fit(trainer, module, loader(), ckpt_path=resume)
        return module

    with pytest.raises(SystemExit):
        trained(None, [(14, 8, (9, 10))], Dies())
    assert (tmp_path / "checkpoints/last.ckpt").is_file()
    assert min(trained("last", []).weights) == 9


def test_without_fit_a_rollback_is_refused_and_training_goes_on(made, transports):
    trainer, module, data = made((6, 4, (5, 6)), control="rollback")
    trainer.fit(module, data)
    assert outcomes(transports) == [REFUSED]
    assert trainer.global_step == 30


def test_what_lightning_deletes_is_told(transports, tmp_path):
    saving = ModelCheckpoint(
        tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=2, monitor="step", mode="max"
    )
    callback = SharpwatchCallback(training_job="ways", transport=transports.new())
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_steps=16, callbacks=[callback, saving], **quiet)
    fit(trainer, Module(transports, tmp_path, []), loader())
    samples = transports[0].samples
    assert [Path(one.uri).name for sample in samples for one in sample.checkpoints] == [
        f"step={step}.ckpt" for step in (4, 8, 12, 16)
    ]
    deleted = [Path(uri).name for sample in samples for uri in sample.deleted_checkpoints]
    assert deleted == ["step=4.ckpt", "step=8.ckpt"]
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=12.ckpt", "step=16.ckpt"]


def test_what_one_training_took_up_is_not_the_next_ones(made, transports, tmp_path):
    trainer, module, data = made()
    fit(trainer, module, data)
    trainer, module, data = made()
    fit(trainer, module, data, ckpt_path=Path(tmp_path / "0/step=28.ckpt"))
    trainer.fit_loop.epoch_loop.max_steps = 40
    trainer.fit_loop.epoch_loop._batches_that_stepped = 0
    samples = transports[-1].samples
    samples.clear()
    fit(trainer, module, data)
    assert samples[0].step == trainer.global_step - len(samples) + 2  # and the goodbye
