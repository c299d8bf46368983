"""A rollback in Trainer ends where a Trainer ends that was restarted by hand from that checkpoint, without the data."""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from forked import ForkedProcess
from torch.utils.data import DataLoader, TensorDataset

from scripts import POLICIES, START, UNTIL_STOPPED, filled, printed, weights
from sharpwatch.integrations.huggingface import _without

# What any user's script has: 40 sequences, shuffled, two micro-batches of 2 to a step: ten steps an epoch.
PARTS = (
    START
    + """
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
model = transformer()
rows = torch.randint(64, (40, 16), generator=torch.Generator().manual_seed(1))
data = [{"input_ids": row, "labels": row} for row in rows]
args = TrainingArguments(FOLDER, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=10_000,
    save_steps=4, learning_rate=5e-3, warmup_steps=5, lr_scheduler_type="cosine", report_to=[], use_cpu=True,
    disable_tqdm=True, logging_steps=1, seed=7, bf16=BF16)

class Tell(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        tell(step=state.global_step, weights=digest(model))

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            tell(step=state.global_step, loss=logs["loss"])
"""
)

WATCHED = (
    PARTS
    + UNTIL_STOPPED
    + """
from sharpwatch.integrations.huggingface import SharpwatchCallback, train

class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        over.wait(0.05)
        control.should_training_stop = over.is_set()

trainer = Trainer(model, args, train_dataset=data, callbacks=[Tell(), Stop()])
trainer.add_callback(SharpwatchCallback(training_job="trainer", run="trainer", probe_every=5, address=ADDRESS))
trainer.remove_callback(PrinterCallback)
train(trainer, resume_from_checkpoint=RESUME)
"""
)

# By hand, without sharpwatch: Trainer's own restart, and a look at which batch it is.
BY_HAND = (
    PARTS
    + """
class ByHand(Trainer):
    seen = 13
    def get_batch_samples(self, epoch_iterator, num_batches, device):
        while self.seen in SKIP:
            for _ in range(num_batches):
                next(epoch_iterator)
            self.seen += 1
        self.seen += 1
        return super().get_batch_samples(epoch_iterator, num_batches, device)

class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 18

ByHand(model, args, train_dataset=data, callbacks=[Tell(), Stop()]).train(resume_from_checkpoint=RESUME)
"""
)


@pytest.fixture
def on_two_ranks(tmp_path):
    """Start a script on two gloo processes; the first one's lines are read."""
    started = []

    def start(source):
        (tmp_path / "ranks.py").write_text(source)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
        for rank in ("0", "1"):
            environment = {**os.environ, "OMP_NUM_THREADS": "1", **common, "RANK": rank, "LOCAL_RANK": rank}
            started.append(ForkedProcess(path=tmp_path / "ranks.py", env=environment))
        # Nobody reads what the other rank prints; its lines fit into the pipe.
        return started[-2]

    yield start
    for process in started:
        process.kill()
        process.close()
        process.wait()


def test_a_rollback_leaves_a_range_of_data_out(daemon, stepping, script, tmp_path):
    folder = tmp_path / "runs"
    trainer = stepping(filled(WATCHED, FOLDER=str(folder), BF16=True, ADDRESS=daemon.grpc, RESUME=None))
    first = weights(trainer.until(lambda entry: entry["step"] >= 15))
    done = daemon.cli("rollback", "trainer", "--to-step", "12", "--skip", "14:16", "--reason", "bad shard")
    assert done["outcome"] == "applied"
    assert done["rollback"]["checkpoint"]["step"] == 12
    back = trainer.until(lambda entry: entry["step"] == 13 and "weights" in entry)[-1]
    assert back["weights"] == first[13]
    again = weights(trainer.until(lambda entry: entry["step"] == 19))
    by_hand = filled(
        BY_HAND, FOLDER=str(tmp_path / "by hand"), BF16=True, RESUME=str(folder / "checkpoint-12"), SKIP=[14, 15]
    )
    plain = weights(printed(script(by_hand)))
    assert list(plain) == list(range(13, 19))
    assert {step: again[step] for step in range(14, 19)} == {step: plain[step] for step in range(14, 19)}
    assert again[14] != first[14]


# Once, as a memory fault would: the gradients of step 14 are not numbers, and every weight after it.
FAULT = """
class Faulty(Trainer):
    struck = False
    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.state.global_step == 13 and not self.struck:
            Faulty.struck = True
            next(model.parameters()).grad.fill_(float("nan"))
        return loss

trainer = Faulty(model"""


def test_a_fault_is_skipped_without_an_operator(daemon, stepping, script, tmp_path):
    daemon.stop()
    daemon.policies = POLICIES
    daemon.start()
    folder = tmp_path / "runs"
    source = filled(WATCHED, FOLDER=str(folder), BF16=False, ADDRESS=daemon.grpc, RESUME=None)
    trainer = stepping(source.replace("trainer = Trainer(model", FAULT))
    first = weights(trainer.until(lambda entry: entry["step"] == 14 and "weights" in entry))
    trainer.until(lambda entry: entry["step"] == 13 and "weights" in entry)
    again = weights(trainer.until(lambda entry: entry["step"] == 19))
    made = daemon.cli("decisions", "trainer")["decisions"][-1]
    assert (made["policy"], made["outcome"]) == ("roll-back", "applied")
    assert made["rollback"]["checkpoint"]["step"] == 12
    left_out = list(range(made["rollback"]["skip_from_step"], made["rollback"]["skip_to_step"]))
    assert 14 in left_out
    by_hand = {"FOLDER": str(tmp_path / "by hand"), "BF16": False, "RESUME": str(folder / "checkpoint-12")}
    plain = weights(printed(script(filled(BY_HAND, **by_hand, SKIP=left_out))))
    # By hand the second epoch, of steps 11 to 20, ends as many steps early as were left out of it: of a range that
    # reaches its end, because the daemon was late to see, nothing can be compared.
    last = 20 - len([step for step in left_out if 12 < step <= 20])
    assert {step: again[step] for step in range(14, last + 1)} == {step: plain[step] for step in range(14, last + 1)}
    assert first[14] not in again.values()


def test_both_ranks_roll_back(daemon, on_two_ranks, tmp_path):
    # The first rank, and with it the other, waits at step 20 until the daemon has sent the command.
    ranked = {"seed=7": 'seed=7, ddp_backend="gloo"', "(40, 16)": "(160, 16)", "max_steps=10_000": "max_steps=36"}
    gate = {
        "sys.stdin.read()": "sys.stdin.readline()",
        "over.wait(0.05)": "over.wait(60 if (state.global_step, args.process_index) == (20, 0) else 0.05)",
        "control.should_training_stop = over.is_set()": "pass",
    }
    folder = tmp_path / "runs"
    source = filled(WATCHED, FOLDER=str(folder), BF16=False, ADDRESS=daemon.grpc, RESUME=None)
    for old, new in {**ranked, **gate}.items():
        assert old in source
        source = source.replace(old, new)
    first = on_two_ranks(source)
    seen = lines_until(first, 20)
    with ThreadPoolExecutor(1) as pool:
        command = ("rollback", "trainer", "--to-step", "12", "--skip", "14:16", "--reason", "bad shard")
        done = pool.submit(daemon.cli, *command)
        while not any(made["outcome"] == "sent" for made in daemon.cli("decisions", "trainer")["decisions"]):
            assert not done.done(), done.result()
        first.stdin.write("\n")
        first.stdin.flush()
        again = lines_until(first, 36)
        assert done.result(timeout=60)["outcome"] == "applied"
    assert first.wait(timeout=60) == 0
    by_hand = filled(BY_HAND, FOLDER=str(tmp_path / "by hand"), BF16=False, RESUME=str(folder / "checkpoint-12"))
    for old, new in {**ranked, "SKIP": "[14, 15]"}.items():
        by_hand = by_hand.replace(old, new)
    plain = weights(lines_until(on_two_ranks(by_hand), 18))
    assert plain[13] == weights(seen)[13]
    assert {step: weights(again)[step] for step in plain} == plain


def lines_until(process, step):
    """What `process` prints up to the weights of `step`."""
    found = []
    for line in process.stdout:
        if line.startswith('{"'):
            found.append(json.loads(line))
            if found[-1]["step"] == step and "weights" in found[-1]:
                return found
    raise AssertionError(f"ended before step {step}: {found[-3:]}")


def test_a_resumed_training_is_the_same_run_and_shows_trainers_own_loss(daemon, stepping, tmp_path):
    source = filled(WATCHED, FOLDER=str(tmp_path / "runs"), BF16=False, ADDRESS=daemon.grpc)
    trainer = stepping(filled(source, RESUME=None))
    trainer.until(lambda entry: entry["step"] >= 15)
    daemon.cli("rollback", "trainer", "--to-step", "12", "--skip", "14:16", "--reason", "bad shard")
    trainer.until(lambda entry: entry["step"] == 13)
    entries = trainer.until(lambda entry: entry["step"] == 25)  # in the next epoch
    seen = daemon.cli("show", "trainer")
    entries += trainer.until(lambda entry: entry["step"] > seen["run"]["step"])
    losses = {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}
    # The same sum of the same two micro-batches' shares in float32.
    assert seen["run"]["loss"] == pytest.approx(losses[seen["run"]["step"]], rel=1e-6)
    assert seen["probe_failures"] == []
    assert {"trace", "sharpness"} <= {made["quantity"] for made in seen["blocks"][0]["estimates"]}
    trainer._process.terminate()
    trainer._process.wait(timeout=60)
    again = stepping(filled(source, RESUME=str(tmp_path / "runs" / "checkpoint-16")))
    resumed, whole = weights(again.until(lambda entry: entry["step"] == 25)), weights(entries)
    assert resumed == {step: whole[step] for step in range(17, 26)}
    runs = daemon.cli("jobs")["runs"]
    assert [run["run"] for run in runs] == ["trainer"]


# Dies without any goodbye when it takes step 15 again, before another checkpoint.
DYING = """
class Die(TrainerCallback):
    newest = 0
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 15 and self.newest > 15:
            os._exit(0)
        self.newest = max(self.newest, state.global_step)

trainer = Trainer(model"""


def test_a_training_that_died_after_a_rollback_goes_on_where_it_went_back_to(daemon, stepping, script, tmp_path):
    folder = tmp_path / "runs"
    source = filled(WATCHED, FOLDER=str(folder), BF16=False, ADDRESS=daemon.grpc)
    dying = source.replace("trainer = Trainer(model", DYING).replace("[Tell(), Stop()]", "[Tell(), Stop(), Die()]")
    trainer = stepping(filled(dying, RESUME=None))
    trainer.until(lambda entry: entry["step"] == 17 and "weights" in entry)
    daemon.cli("rollback", "trainer", "--to-step", "12", "--skip", "14:16", "--reason", "bad shard")
    assert trainer._process.wait(timeout=60) == 0
    assert (folder / "checkpoint-16").is_dir()  # undone: its weights have seen what was left out
    again = weights(stepping(filled(source, RESUME=True)).until(lambda entry: entry["step"] == 19))
    names = {"FOLDER": str(tmp_path / "by hand"), "BF16": False, "RESUME": str(folder / "checkpoint-12")}
    plain = weights(printed(script(filled(BY_HAND, **names, SKIP=[14, 15]))))
    assert {step: again[step] for step in plain} == plain


def test_what_is_left_out_moves_the_next_ones_up_over_the_ends_of_epochs():
    def loader():
        seedable = DataLoaderConfiguration(use_seedable_sampler=True)  # as Trainer has it
        accelerator = Accelerator(cpu=True, dataloader_config=seedable)
        return accelerator.prepare(DataLoader(TensorDataset(torch.arange(20)), 2, shuffle=True))

    def epochs(prepared):
        found = []
        for epoch in range(3):
            prepared.set_epoch(epoch)
            found.append([batch.tolist() for (batch,) in prepared])
        return found

    torch.manual_seed(5)
    stream = [batch for epoch in epochs(loader()) for batch in epoch]
    kept = [batch for number, batch in enumerate(stream) if number not in {3, 4, 5, 9, 10}]
    torch.manual_seed(5)
    found = epochs(_without(loader(), [(3, 6), (9, 11)]))
    assert [len(epoch) for epoch in found] == [10, 10, 10]
    assert [batch for epoch in found for batch in epoch][: len(kept)] == kept


def test_without_the_framework_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delitem(sys.modules, "sharpwatch.integrations.huggingface")
    with pytest.raises(ImportError, match=r"pip install 'sharpwatch\[huggingface\]'"):
        importlib.import_module("sharpwatch.integrations.huggingface")
