"""A rollback in Lightning ends where a training ends that never took the data, and that knows nothing of sharpwatch."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from stand_ins import Net

from scripts import POLICIES, START, UNTIL_STOPPED, filled, printed, weights
from sharpwatch.integrations.lightning import SharpwatchCallback, fit
from sharpwatch.v1 import types_pb2

# 44 sequences, shuffled, in batches of 2, two of them to a step: eleven steps an epoch.
PARTS = (
    START
    + """
import logging, warnings
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset
warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = transformer()

    def training_step(self, batch, index):
        loss = self.model(input_ids=batch[0], labels=batch[0]).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=5e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.99**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

class Tell(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if len(module.losses) == 2:
            tell(step=trainer.global_step, weights=digest(module), loss=sum(module.losses) / 2)
            module.losses.clear()

module = Module()
module.losses = []
rows = torch.randint(64, (44, 16), generator=torch.Generator().manual_seed(1))
loader = DataLoader(TensorDataset(rows), batch_size=2, shuffle=True)
options = dict(accelerator="cpu", accumulate_grad_batches=2, gradient_clip_val=1.0, logger=False, precision=PRECISION,
    enable_progress_bar=False, enable_model_summary=False, max_steps=STEPS)
"""
)

WATCHED = (
    PARTS
    + UNTIL_STOPPED
    + """
from sharpwatch.integrations.lightning import SharpwatchCallback, fit

class Stop(Callback):
    def on_train_batch_end(self, trainer, *_):
        over.wait(0.02)
        trainer.should_stop = over.is_set()

sharpwatch = SharpwatchCallback(training_job="lightning", run="lightning", probe_every=5, address=ADDRESS)
saving = ModelCheckpoint(FOLDER, filename="{step}", every_n_train_steps=4, save_top_k=-1, save_last=True)
fit(Trainer(**options, callbacks=[Tell(), Stop(), sharpwatch, saving]), module, loader, ckpt_path=RESUME)
"""
)

# By hand, without sharpwatch: Lightning's own restart; all passes as one, and a look at which batch it is. The random
# state is put right where what has been taken ends: Lightning keeps none.
BY_HAND = (
    PARTS
    + """
class ByHand:
    taken = 0
    def __len__(self):
        return 10_000  # else Lightning fetches, and shuffles, ahead

    def __iter__(self):
        while True:
            for batch in loader:
                self.taken += 1
                if self.taken == TAKEN:
                    torch.set_rng_state(self.random)
                if self.taken > TAKEN and self.taken not in SKIP:
                    yield batch

    def state_dict(self):
        return {}

    def load_state_dict(self, place):
        self.random = place["random"]["cpu"]

Trainer(**options, enable_checkpointing=False, callbacks=[Tell()]).fit(module, ByHand(), ckpt_path=RESUME)
"""
)


def batches(*steps):
    """The micro-batches of steps, from 1."""
    return [number for step in steps for number in (2 * step - 1, 2 * step)]


def test_a_rollback_leaves_a_range_of_data_out(daemon, stepping, script, tmp_path):
    parts = filled(WATCHED, FOLDER=str(tmp_path / "runs"), PRECISION="bf16-mixed", STEPS=10_000, RESUME=None)
    trainer = stepping(filled(parts, ADDRESS=daemon.grpc))
    first = weights(trainer.until(lambda entry: entry["step"] >= 17))
    done = daemon.cli("rollback", "lightning", "--to-step", "9", "--skip", "10:12", "--reason", "bad shard")
    assert done["outcome"] == "applied"
    assert done["rollback"]["checkpoint"]["uri"] == str(tmp_path / "runs/step=8.ckpt")
    back = trainer.until(lambda entry: entry["step"] == 9)[-1]
    again = weights([back, *trainer.until(lambda entry: entry["step"] == 20)])
    names = {"PRECISION": "bf16-mixed", "STEPS": 20, "RESUME": done["rollback"]["checkpoint"]["uri"], "TAKEN": 16}
    plain = weights(printed(script(filled(BY_HAND, **names, SKIP=batches(10, 11)))))
    assert again == plain
    assert again[9] == first[9]
    assert again[10] != first[10]


# Once, as a memory fault would: the loss of step 18 is not a number, and no weight after it.
FAULT = """
        if self.trainer.global_step == 17 and not getattr(self, "struck", False):
            self.struck = True
            loss = loss * float("nan")
        return loss
"""


def test_a_fault_is_skipped_without_an_operator(daemon, stepping, script, tmp_path):
    daemon.stop()
    daemon.policies = POLICIES
    daemon.start()
    names = {"FOLDER": str(tmp_path / "runs"), "PRECISION": "32-true", "STEPS": 10_000, "ADDRESS": daemon.grpc}
    trainer = stepping(filled(WATCHED, RESUME=None, **names).replace("        return loss\n", FAULT, 1))
    first = weights(trainer.until(lambda entry: entry["step"] == 18))
    trainer.until(lambda entry: entry["step"] == 17)
    again = weights(trainer.until(lambda entry: entry["step"] == 24))
    made = daemon.cli("decisions", "lightning")["decisions"][-1]
    assert (made["policy"], made["outcome"]) == ("roll-back", "applied")
    assert made["rollback"]["checkpoint"]["step"] == 16
    left_out = range(made["rollback"]["skip_from_step"], made["rollback"]["skip_to_step"])
    assert 18 in left_out
    names = {"PRECISION": "32-true", "STEPS": 24, "RESUME": None, "TAKEN": 0}
    plain = weights(printed(script(filled(BY_HAND, **names, SKIP=batches(*left_out)))))
    assert all(plain[step] == first[step] for step in first if step < min(left_out))
    assert again == {step: plain[step] for step in range(18, 25)}


def test_a_resumed_training_is_the_same_run_and_shows_lightnings_own_loss(daemon, stepping, tmp_path):
    names = {"FOLDER": str(tmp_path / "runs"), "PRECISION": "32-true", "STEPS": 10_000, "ADDRESS": daemon.grpc}
    trainer = stepping(filled(WATCHED, RESUME=None, **names))
    trainer.until(lambda entry: entry["step"] >= 18)
    daemon.cli("rollback", "lightning", "--to-step", "17", "--skip", "18:20", "--reason", "bad shard")
    trainer.until(lambda entry: entry["step"] == 17)
    entries = trainer.until(lambda entry: entry["step"] == 35)  # two ends of epochs away
    seen = daemon.cli("show", "lightning")
    entries += trainer.until(lambda entry: entry["step"] > seen["run"]["step"])
    losses = {entry["step"]: entry["loss"] for entry in entries}
    assert seen["run"]["loss"] == pytest.approx(losses[seen["run"]["step"]], rel=1e-6)  # two float32, added and halved
    assert seen["probe_failures"] == []
    assert {"trace", "sharpness"} <= {made["quantity"] for made in seen["blocks"][0]["estimates"]}
    assert all(block["gradient_norm"] > 0 for block in seen["blocks"])  # read when the closure has run
    trainer._process.terminate()
    trainer._process.wait(timeout=60)
    # The newest: a rollback that came late left one of step 20 from before it, which Lightning names apart.
    checkpoint = max((tmp_path / "runs").glob("step=20*.ckpt"), key=lambda path: path.stat().st_mtime)
    resumed = stepping(filled(WATCHED, RESUME=str(checkpoint), **names)).until(lambda entry: entry["step"] == 35)
    whole = weights(entries)
    assert weights(resumed) == {step: whole[step] for step in range(21, 36)}
    assert [run["run"] for run in daemon.cli("jobs")["runs"]] == ["lightning"]


# Dies without any goodbye when it takes step 11 again, before another checkpoint.
DYING = """
class Die(Callback):
    newest = 0
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 11 and self.newest > 11:
            os._exit(0)
        self.newest = max(self.newest, trainer.global_step)

fit(Trainer(**options, callbacks=[Die(), """


def test_a_training_that_died_after_a_rollback_goes_on_where_it_went_back_to(daemon, stepping, script, tmp_path):
    names = {"FOLDER": str(tmp_path / "runs"), "PRECISION": "32-true", "STEPS": 10_000, "ADDRESS": daemon.grpc}
    dying = WATCHED.replace("fit(Trainer(**options, callbacks=[", DYING)
    trainer = stepping(filled(dying, RESUME=None, **names))
    trainer.until(lambda entry: entry["step"] == 17)
    done = daemon.cli("rollback", "lightning", "--to-step", "9", "--skip", "10:12", "--reason", "bad shard")
    assert trainer._process.wait(timeout=60) == 0
    assert (tmp_path / "runs/last.ckpt").is_file()  # undone: its weights have seen what was left out
    again = weights(stepping(filled(WATCHED, RESUME="last", **names)).until(lambda entry: entry["step"] == 20))
    by_hand = {"PRECISION": "32-true", "STEPS": 20, "RESUME": done["rollback"]["checkpoint"]["uri"], "TAKEN": 16}
    plain = weights(printed(script(filled(BY_HAND, **by_hand, SKIP=batches(10, 11)))))
    assert {step: again[step] for step in plain} == plain


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on a training this small
def test_a_checkpoint_that_was_written_over_is_no_place_to_go_back_to(transports, tmp_path, caplog):
    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, batch, index):
            if index == 6:  # the checkpoint of step 2 is that of step 6 by now
                checkpoint = types_pb2.Checkpoint(step=2, uri=str(tmp_path / "newest.ckpt"))
                transports[0].command(id="back", rollback=types_pb2.Rollback(checkpoint=checkpoint))
            return self.net(batch, batch)[1]

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    saving = ModelCheckpoint(tmp_path, filename="newest", every_n_train_steps=2, save_last=True)
    callbacks = [SharpwatchCallback(training_job="over", transport=transports.new()), saving]
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_steps=9, callbacks=callbacks, **options)
    fit(trainer, Module(), torch.utils.data.DataLoader(torch.randint(11, (40, 4)), 2))
    reported = [
        (checkpoint.step, Path(checkpoint.uri).name) for one in transports[0].samples for checkpoint in one.checkpoints
    ]
    assert reported == [(step, "newest.ckpt") for step in (2, 4, 6, 8)]  # and not "last"
    assert "newest.ckpt was saved again at step 6" in caplog.text
    assert [result.outcome for result in transports[0].results] == ["failed"]
    assert trainer.global_step == 9


def test_without_the_framework_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "sharpwatch.integrations.lightning", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'sharpwatch\[lightning\]'"):
        importlib.import_module("sharpwatch.integrations.lightning")
