"""examples/torchtitan_trainer.py in torchtitan's own loop: a rollback ends where a restart by hand ends."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from daemons import PATIENCE
from missing import missing

from scripts import filled, printed

EXAMPLES = Path(__file__).parents[3] / "examples"
EXAMPLE = (EXAMPLES / "torchtitan_trainer.py").read_text(encoding="utf-8")
LINES = EXAMPLE.partition("# --8<-- [start:class]\n")[2].partition("# --8<-- [end:class]")[0]

# torchtitan asks for an accelerator and for a newer torch; what stands in for them here is all that is not torchtitan.
STAND_INS = """
import sys
from unittest import mock
import torch

# Its device is an accelerator of torch's; the CPU has no names and memory statistics.
accelerator = mock.Mock()
accelerator.device_count.return_value, accelerator.current_device.return_value = 1, 0
accelerator.get_device_name.return_value, accelerator.memory_stats.return_value = "cpu", {}
accelerator.get_device_properties.return_value.total_memory = 1
torch._utils._get_available_device_type = lambda: "cpu"
torch._utils._get_device_module = lambda kind: accelerator

# Kernels in Triton, which torch for the CPU does not bring; only experts use them.
sys.modules["torchtitan.distributed.minimal_async_ep.kernels"] = mock.Mock()

# Not in torch 2.13.
torch.distributed.set_timeout = lambda *_: None

# Flex attention, compiled or not, has no backward on the CPU.
from torch.nn.attention.flex_attention import create_mask
from torchtitan.models.common.attention import FlexAttention

def attention(q, k, v, *, block_mask, scale, enable_gqa, **_):
    mask = create_mask(block_mask.mask_mod, q.shape[0], None, q.shape[2], k.shape[2], device=q.device)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=enable_gqa), None

FlexAttention._compiled_flex_attn = attention
"""

# A tokenizer and a text, for torchtitan's own are not in its wheel. The fault is a document of noise.
DATA = """
import json, os
from pydoc_data.topics import topics
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

def prepare(folder):
    documents = list(topics.values())[2:]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(documents, trainers.BpeTrainer(vocab_size=2048, show_progress=False,
        special_tokens=["<s>", "</s>", "<noise>"]))
    tokenizer.save(f"{folder}/tokenizer.json")
    with open(f"{folder}/tokenizer_config.json", "w") as file:
        json.dump({"bos_token": "<s>", "eos_token": "</s>"}, file)
    os.mkdir(f"{folder}/text")
    halves = [document[: len(document) // 2] for document in documents[:2]]
    with open(f"{folder}/text/train.jsonl", "w") as file:
        for document in (*halves, "<noise>" * 150, *documents[2:]):
            file.write(json.dumps({"text": document}) + "\\n")
"""

# torchtitan's debug model with one of its six layers, in float32: bf16 is slow on a CPU.
TRAINING = """
import hashlib, json, os, threading
from torchtitan.models.llama3.config_registry import llama3_debugmodel

over = threading.Event()

def configured(folder):
    config = llama3_debugmodel()
    del config.model_spec.model.layers[1:]
    config.hf_assets_path, config.dataloader.dataset_path = folder, f"{folder}/text"
    config.dump_folder = f"{folder}/out"
    config.training.seq_len, config.training.local_batch_size, config.training.steps = 64, 2, 1000
    config.training.mixed_precision_param = "float32"
    config.training.disable_cuda_graphs = True
    config.validator.enable = False
    config.checkpoint.enable, config.checkpoint.interval = True, 5
    return config

class Telling:
    done = []

    def batch_generator(self, data):
        for self.batch in super().batch_generator(data):
            yield self.batch

    def train_step(self, data_iterator):
        super().train_step(data_iterator)
        digest = hashlib.sha256()
        for parameter in self.model_parts[0].parameters():
            digest.update(parameter.full_tensor().detach().numpy().tobytes())
        ids = self.batch[0]["input"]
        self.done.append(self.step)
        noise = bool((ids == self.tokenizer.tokenizer.token_to_id("<noise>")).any())
        print(json.dumps({"step": self.step, "weights": digest.hexdigest(), "noise": noise,
            "batch": hashlib.sha256(ids.numpy().tobytes()).hexdigest()}), flush=True)
        if self.done.count(12) == 3:
            os._exit(0)  # after the second rollback, before anything is saved
        over.wait(0.1)  # a command takes longer than a step: it finds fewer taken

    def should_continue_training(self):
        return not over.is_set() and super().should_continue_training()

def train(trainer, folder, **checkpoint):
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    config = configured(folder)
    for name, value in checkpoint.items():
        setattr(config.checkpoint, name, value)
    trainer = trainer(config)
    trainer.train()
    trainer.close()
    torch.distributed.destroy_process_group()
"""

WATCHED = """
class TellingWatched(Telling, Watched):
    pass
"""

# A restart from a checkpoint by hand: torchtitan's trainer as it is, with a loader that passes over some batches.
BY_HAND = """
from torchtitan.trainer import Trainer

class ByHand(Trainer):
    def batch_generator(self, data):
        for number, batch in enumerate(super().batch_generator(data), 1 + STEP):
            if number not in SKIPPED:
                yield batch

class TellingByHand(Telling, ByHand):
    def should_continue_training(self):
        return self.step < LAST
"""

# Each training is a process of its own; what all import is imported once.
IN_TURN = """
for training in (
    lambda: train(TellingWatched, FOLDER),
    lambda: train(TellingWatched, FOLDER),
    lambda: train(TellingByHand, FOLDER, load_step=STEP, load_only=True),
):
    if (child := os.fork()) == 0:
        training()
        break
    print(json.dumps({"ended": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}), flush=True)
"""


class Trainings:
    """Trainings, one after another, which tell of each step."""

    def __init__(self, source, folder, address):
        path = folder / "train.py"
        path.write_text(source)
        torchrun = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        environment = {
            "SHARPWATCH_ADDRESS": address,
            "SHARPWATCH_BLOCK_RULES": str(EXAMPLES / "torchtitan-rules.yaml"),
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",  # the mask is compiled, as attention is
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_OFFLINE": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, **torchrun, **environment},
        )

    def until(self, step):
        """What a training tells up to the first time that it has done `step`."""
        entries = []
        for entry in self.entries():
            assert "ended" not in entry, f"ended before step {step}"
            entries.append(entry)
            if entry["step"] == step:
                return entries
        raise AssertionError(f"none before step {step}")

    def ended(self):
        """Wait for the end of a training."""
        assert next(entry["ended"] for entry in self.entries() if "ended" in entry) == 0

    def entries(self):
        for line in self.process.stdout:
            yield from printed(line)


@pytest.fixture
def trainings(daemon, tmp_path):
    """Start trainings."""
    started = []

    def start(source, **names):
        code = filled(STAND_INS + TRAINING + source, FOLDER=str(tmp_path), **names)
        started.append(Trainings(code, tmp_path, daemon.grpc))
        return started[-1]

    yield start
    for one in started:
        with one.process, contextlib.suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGKILL)


def test_a_rollback_ends_where_a_restart_by_hand_ends(daemon, trainings, tmp_path):
    if importlib.util.find_spec("torchtitan") is None:
        missing("torchtitan")
    subprocess.run([sys.executable, "-c", f"{DATA}\nprepare({str(tmp_path)!r})"], check=True)
    trainer = trainings(LINES + WATCHED + BY_HAND + IN_TURN, STEP=5, SKIPPED={7, 8, 14}, LAST=16)
    noise = [entry["step"] for entry in trainer.until(12) if entry["noise"]]
    assert noise == [7, 8]
    (run,) = [one["run"] for one in daemon.cli("jobs")["runs"]]
    back = ("rollback", run, "--to-step", "7", "--skip", "7:9", "--reason", "noise")
    with away(tmp_path / "out/checkpoint/step-10"):
        # Stopped, or it may take a step in between, and tell that the checkpoint is gone.
        with stopped(trainer.process.pid):
            daemon.cli("rollback", run, "--reason", "to the newest", "--no-wait")
        gone = answered(daemon, run)
    assert "step-10: not there any more" in gone["detail"]
    offered = {one["step"] for one in daemon.cli("show", run)["checkpoints"]}  # the trainer may have saved more since
    assert 5 in offered
    assert 10 not in offered
    done = daemon.cli(*back)
    assert (done["outcome"], done["rollback"]["checkpoint"]["step"]) == ("applied", 5)
    second = [trainer.until(6)[-1], *trainer.until(16)]
    done = daemon.cli("rollback", run, "--to-step", "11", "--skip", "12:13", "--reason", "as an example")
    assert (done["outcome"], done["rollback"]["checkpoint"]["step"]) == ("applied", 10)
    third = [trainer.until(11)[-1], *trainer.until(12)]
    trainer.ended()
    fourth = trainer.until(16)  # of the restarted one
    trainer.process.stdin.close()
    trainer.ended()
    truth = {entry["step"]: entry for entry in trainer.until(16)}  # by hand
    trainer.ended()
    assert trainer.process.wait(60) == 0
    assert second[:6] == [truth[step] for step in range(6, 12)]
    assert third == [truth[step] for step in (11, 12)]
    assert fourth == [truth[step] for step in range(11, 17)]  # not from step 15, which was undone
    assert [one["run"] for one in daemon.cli("jobs")["runs"]] == [run]
    for block in daemon.cli("show", run)["blocks"]:
        assert block["gradient_norm"] > 0
        assert "gnb" in {estimate["estimator"] for estimate in block["estimates"]}  # through the head and the mask


def answered(daemon, run) -> dict:
    """The newest decision on the run, once the trainer has answered it."""
    deadline = time.monotonic() + PATIENCE
    while (made := daemon.cli("decisions", run)["decisions"][0])["outcome"] == "sent":
        assert time.monotonic() < deadline, made
        time.sleep(0.1)  # it can only be asked for
    return made


@contextlib.contextmanager
def stopped(pid):
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def away(path):
    hidden = path.rename(path.with_name("away"))
    yield
    hidden.rename(path)
