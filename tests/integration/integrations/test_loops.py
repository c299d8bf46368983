"""The loops of docs/integrations.md are run as they stand there, and go back when they are told to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCUMENT = (Path(__file__).parents[3] / "docs/integrations.md").read_text(encoding="utf-8")

# What stands before the lines in a user's script. Steps are slow enough for an operator, and end when he is done.
COMMON = """
import json, sys, threading, time, torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel
over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()

def told(optimizer, *_):
    weights = float(sum(p.double().abs().sum() for group in optimizer.param_groups for p in group["params"]))
    rate = optimizer.param_groups[0]["lr"]
    print(json.dumps({"step": checkpoints.step, "weights": weights, "rate": rate}), flush=True)
    over.wait(0.02)

torch.manual_seed(0)
gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0,
    eos_token_id=0))
rows = torch.randint(64, (4000, 16))
"""

PLAIN = """
model = gpt2
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
optimizer.register_step_post_hook(told)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.999**step)
loader = DataLoader([{"input_ids": row, "labels": row} for row in rows], 4, shuffle=True)
"""

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

def get_lr(iteration):
    return 1e-3 * 0.999**iteration

model, out_dir, decay_lr, learning_rate, ctx = Model(), FOLDER, True, 1e-3, nullcontext()
gradient_accumulation_steps, grad_clip, eval_interval, max_iters = 2, 1.0, 10, 1_000_000
optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
optimizer.register_step_post_hook(told)
scaler = torch.amp.GradScaler("cpu", enabled=False)
"""


def lines(title):
    """The code under a title of the document, in one piece."""
    section = DOCUMENT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return "\n".join(re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL))


def plain(folder):
    code = lines("A plain loop").replace('"runs/gpt2-owt"', repr(folder)).replace("% 500", "% 10")
    return COMMON + PLAIN + ending(code, "        checkpoints.save()  # as the last thing of a step\n")


def nanogpt(folder):
    code = lines("nanoGPT")
    return COMMON + NANOGPT.replace("FOLDER", repr(folder)) + ending(code, "        checkpoints.save()\n")


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
