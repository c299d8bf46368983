"""The loops of examples/ run as they are written, and roll back on command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"

# What stands before the lines in a user's script. Steps are slow enough for an operator, and end when he is done.
COMMON = """
import json, sys, threading, time, torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel
over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()

def print_step(optimizer, *_):
    weights = float(sum(p.double().abs().sum() for group in optimizer.param_groups for p in group["params"]))
    rate, best = optimizer.param_groups[0]["lr"], globals().get("best_val_loss")
    print(json.dumps({"step": checkpoints.step, "weights": weights, "rate": rate, "best": best}), flush=True)
    over.wait(0.02)

torch.manual_seed(0)
gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0,
    eos_token_id=0))
rows = torch.randint(64, (4000, 16))
"""

PLAIN = """
model = gpt2
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
optimizer.register_step_post_hook(print_step)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.999**step)
loader = DataLoader([{"input_ids": row, "labels": row} for row in rows], 4, shuffle=True)
"""

# A loop of its shape, with the places where the lines go.
NANOGPT = """
from contextlib import nullcontext

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer = gpt2
    def forward(self, idx, targets):
        output = self.transformer(input_ids=idx, labels=targets)
        return output.logits, output.loss

def get_batch(split):
    ids = rows[torch.randint(len(rows), (4,))]
    return ids, ids

@torch.no_grad()
def estimate_loss():
    model.eval()
    model(*get_batch("val"))
    model.train()
    return {"val": 1.0 + iter_num}  # the first is the best

model, out_dir, init_from, iter_num, best_val_loss = Model(), FOLDER, START, 0, 1e9
gradient_accumulation_steps, eval_interval, ddp = 2, 10, False
optimizer = torch.optim.AdamW(model.parameters())
optimizer.register_step_post_hook(print_step)
scaler = torch.amp.GradScaler("cpu", enabled=False)

# training loop
X, Y = get_batch('train') # fetch the very first batch
t0 = time.time()
local_iter_num = 0
while True:

    optimizer.param_groups[0]["lr"] = 1e-3 * 0.999**iter_num
    if iter_num % eval_interval == 0:
        best_val_loss = min(best_val_loss, estimate_loss()["val"])
    for micro_step in range(gradient_accumulation_steps):
        loss = model(X, Y)[1] / gradient_accumulation_steps
        # immediately async prefetch next batch while model is doing the forward pass on the GPU
        X, Y = get_batch('train')
        # backward pass, with gradient scaling if training in fp16
        scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)

    iter_num += 1
    local_iter_num += 1

    if over.is_set():
        break

if ddp:
    raise AssertionError
"""


def section(file, name):
    """The part of an example that the documentation shows."""
    text = (EXAMPLES / file).read_text(encoding="utf-8")
    return text.partition(f"# --8<-- [start:{name}]\n")[2].partition(f"# --8<-- [end:{name}]")[0]


def patched(source, diff):
    """`source` after a unified diff, whose line numbers are another file's."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]:
        old, new = ("".join(re.findall(rf"^(?:[ {sign}]|(?=\n))(.*\n)", hunk, re.MULTILINE)) for sign in "-+")
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


def plain(folder):
    code = section("plain_loop.py", "import") + section("plain_loop.py", "loop")
    code = code.replace('"runs/gpt2-owt"', repr(folder)).replace("% 100", "% 10")
    return COMMON + PLAIN + ending(code, "        checkpoints.save()  # as the last thing of a step\n")


def nanogpt(folder, init_from="scratch"):
    source = NANOGPT.replace("FOLDER", repr(folder)).replace("START", repr(init_from))
    return COMMON + patched(source, (EXAMPLES / "nanogpt.patch").read_text(encoding="utf-8"))


def ending(code, last):
    """`code` with a way out of its loop after the lines of `last`."""
    assert last in code
    return code.replace(last, f"{last}    if over.is_set():\n        break\n")


@pytest.mark.parametrize("loop", [plain, nanogpt])
def test_the_lines_run_and_go_back(daemon, stepping, tmp_path, loop):
    trainer = stepping(loop(str(tmp_path / "runs")))
    seen = trainer.until(lambda entry: entry["step"] == 35)
    run = daemon.cli("jobs")["runs"][0]["run"]
    done = daemon.cli("rollback", run, "--to-step", "32", "--reason", "try again")
    assert (done["outcome"], done["rollback"]["checkpoint"]["step"]) == ("applied", 30)
    trainer.until(lambda entry: entry["step"] == 30)
    again = trainer.until(lambda entry: entry["step"] == 34)
    assert again == seen[-5:-1]  # weights and rates alike


def test_nanogpt_resumed_is_the_same_run(daemon, stepping, tmp_path):
    first = stepping(nanogpt(str(tmp_path / "runs")))
    seen = first.until(lambda entry: entry["step"] == 35)
    assert first.stop() == 0
    again = stepping(nanogpt(str(tmp_path / "runs"), init_from="resume")).until(lambda entry: entry["step"] == 34)
    assert again == seen[-6:-1]
    assert len(daemon.cli("jobs")["runs"]) == 1
