"""A rollback in Lightning ends where a training ends that never took the data, and that knows nothing of sharpwatch."""

from __future__ import annotations

import importlib
import json
import sys

import pytest

# 44 sequences, shuffled, in batches of 2, two of them to a step: eleven steps an epoch.
PARTS = """
import hashlib, json, logging, sys, threading, warnings, torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel
warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.manual_seed(0)

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2,
            bos_token_id=0, eos_token_id=0))

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
            weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in module.parameters())).hexdigest()
            print(json.dumps({"step": trainer.global_step, "weights": weights, "loss": sum(module.losses) / 2}),
                flush=True)
            module.losses.clear()

module = Module()
module.losses = []
rows = torch.randint(64, (44, 16), generator=torch.Generator().manual_seed(1))
loader = DataLoader(TensorDataset(rows), batch_size=2, shuffle=True)
options = dict(accelerator="cpu", accumulate_grad_batches=2, gradient_clip_val=1.0, logger=False, precision=PRECISION,
    enable_progress_bar=False, enable_model_summary=False, max_steps=STEPS)
"""

WATCHED = (
    PARTS
    + """
import os, signal
from sharpwatch.integrations.lightning import SharpwatchCallback, fit
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # a death without any goodbye
over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()

class Stop(Callback):
    def on_train_batch_end(self, trainer, *_):
        over.wait(0.02)
        trainer.should_stop = over.is_set()

sharpwatch = SharpwatchCallback(training_job="lightning", run="lightning", probe_every=5, address=ADDRESS)
saving = ModelCheckpoint(FOLDER, filename="{step}", every_n_train_steps=4, save_top_k=-1)
fit(Trainer(**options, callbacks=[Tell(), Stop(), sharpwatch, saving]), module, loader, ckpt_path=RESUME)
"""
)

# By hand, without sharpwatch: the batches of each pass, and a look at which one it is.
BY_HAND = (
    PARTS
    + """
class ByHand:
    taken = 0
    def __iter__(self):
        for batch in loader:
            self.taken += 1
            if self.taken not in SKIP:
                yield batch

Trainer(**options, enable_checkpointing=False, callbacks=[Tell()]).fit(module, ByHand())
"""
)


def filled(source, **names):
    for name, value in names.items():
        source = source.replace(name, repr(value))
    return source


def weights(entries):
    return {entry["step"]: entry["weights"] for entry in entries}


def printed(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"')]


def test_a_rollback_leaves_a_range_of_data_out(daemon, stepping, script, tmp_path):
    parts = filled(WATCHED, FOLDER=str(tmp_path / "runs"), PRECISION="bf16-mixed", STEPS=10_000, RESUME=None)
    trainer = stepping(filled(parts, ADDRESS=daemon.grpc))
    first = weights(trainer.until(lambda entry: entry["step"] >= 18))
    done = daemon.cli("rollback", "lightning", "--to-step", "17", "--skip", "18:20", "--reason", "bad shard")
    assert done["outcome"] == "applied"
    assert done["rollback"]["checkpoint"]["step"] == 16
    back = trainer.until(lambda entry: entry["step"] == 17)[-1]
    assert back["weights"] == first[17]
    again = weights(trainer.until(lambda entry: entry["step"] == 20))
    taken = [number for step in (18, 19) for number in (2 * step - 1, 2 * step)]
    plain = weights(printed(script(filled(BY_HAND, PRECISION="bf16-mixed", STEPS=20, SKIP=taken))))
    assert first == {step: plain[step] for step in first if step < 18} | {18: first[18]}
    assert again == {step: plain[step] for step in range(18, 21)}
    assert again[18] != first[18]


POLICIES = """
policies:
  - name: roll-back
    match: {alert: NonFinite}
    mode: enforce
    action: {kind: rollback, skip_margin: 2}
"""

# Once, as a memory fault would: the loss of step 18 is not a number, and no weight after it.
FAULT = """
        if self.trainer.global_step == 17 and not getattr(self, "struck", False):
            self.struck = True
            loss = loss * float("nan")
        return loss
"""


def test_a_fault_is_gone_round_without_an_operator(daemon, stepping, script, tmp_path):
    daemon.stop()
    daemon.policies = POLICIES
    daemon.start()
    names = {"FOLDER": str(tmp_path / "runs"), "PRECISION": "32-true", "STEPS": 10_000, "ADDRESS": daemon.grpc}
    trainer = stepping(filled(WATCHED, RESUME=None, **names).replace("        return loss\n", FAULT, 1))
    trainer.until(lambda entry: entry["step"] == 18)
    trainer.until(lambda entry: entry["step"] == 17)
    again = weights(trainer.until(lambda entry: entry["step"] == 24))
    made = daemon.cli("decisions", "lightning")["decisions"][-1]
    assert (made["policy"], made["outcome"]) == ("roll-back", "applied")
    assert made["rollback"]["checkpoint"]["step"] == 16
    left_out = range(made["rollback"]["skip_from_step"], made["rollback"]["skip_to_step"])
    assert 18 in left_out
    taken = [number for step in left_out for number in (2 * step - 1, 2 * step)]
    plain = weights(printed(script(filled(BY_HAND, PRECISION="32-true", STEPS=24, SKIP=taken))))
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


def test_without_the_framework_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "sharpwatch.integrations.lightning", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'sharpwatch\[lightning\]'"):
        importlib.import_module("sharpwatch.integrations.lightning")
