"""An operator's learning-rate change is what the optimizer uses, and only the optimizer."""

from __future__ import annotations

import torch

# Trains until told to stop, printing for each step the weight decay each block really got: with a gradient of zero and
# SGD, one step takes weights w to w * (1 - lr * decay), so the ratio of norms is the rate in force, seen from outside.
SCRIPT = """
import json, sys, threading, torch, sharpwatch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16, bos_token_id=0, eos_token_id=0)).double()
optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, weight_decay=0.1)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
watch = sharpwatch.attach(model, optimizer, training_job="rates", run="rates", probe_every=1000)
blocks = {row.parameter: row.type for row in sharpwatch.classify(model).rows}
ids = torch.randint(32, (2, 8))
over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), over.set()), daemon=True).start()
step = 0
while not over.is_set():
    step += 1
    (model(input_ids=ids, labels=ids).loss * 0).backward()
    before = {name: p.detach().norm() for name, p in model.named_parameters()}
    optimizer.step()
    schedule.step()
    rates = {}
    for name, p in model.named_parameters():
        rates.setdefault(blocks[name], ((1 - p.detach().norm() / before[name]) / 0.1).item())
    optimizer.zero_grad()
    print(json.dumps({"step": step, "rates": rates, "schedule": schedule.get_last_lr(),
        "groups": [(group["lr"], len(group["params"])) for group in optimizer.param_groups],
        "saved": [group["lr"] for group in optimizer.state_dict()["param_groups"]]}), flush=True)
    threading.Event().wait(0.02)
watch.close()
"""


def test_set_changes_the_rate_in_use_at_the_named_step_and_undo_puts_it_back(daemon, stepping, monkeypatch):
    monkeypatch.setenv("SHARPWATCH_AUTHOR", "ada")
    trainer = stepping(SCRIPT)
    decision = daemon.cli("lr", "set", "rates", "qk=0.5", "--reason", "too sharp")
    assert decision["outcome"] == "applied"
    applied = decision["applied_step"]
    seen = {entry["step"]: entry for entry in trainer.until(lambda entry: entry["step"] == applied + 3)}
    base = torch.tensor(1e-2, dtype=torch.float64)
    for step, entry in seen.items():
        want = 0.5e-2 if step >= applied else 1e-2
        torch.testing.assert_close(entry["rates"]["qk"], want, rtol=1e-6, atol=0)
        for block in ("emb", "vo", "ffn", "norm", "head"):
            torch.testing.assert_close(entry["rates"][block], base.item(), rtol=1e-6, atol=0)
        # The scheduler, the groups between steps and the checkpoint never see the multiplier.
        assert entry["schedule"] == [1e-2]
        assert entry["saved"] == [1e-2]
        assert [rate for rate, _ in entry["groups"]] == [1e-2]

    undone = daemon.cli("lr", "undo", "rates", "--reason", "was fine")
    assert undone["outcome"] == "applied"
    entry = trainer.until(lambda entry: entry["step"] == undone["applied_step"] + 1)[-1]
    torch.testing.assert_close(entry["rates"]["qk"], 1e-2, rtol=1e-6, atol=0)

    history = daemon.cli("lr", "history", "rates")["revisions"]
    assert [(r["author"], r["reason"]) for r in history[-2:]] == [("ada", "too sharp"), ("ada", "was fine")]
    assert history[-1]["undoes"] == history[-2]["revision"]


def test_out_of_bounds_is_refused_with_what_is_allowed(daemon, stepping):
    stepping(SCRIPT)
    done = daemon.command("lr", "set", "rates", "qk=50")
    assert done.returncode == 1
    assert "0.01" in done.stderr + done.stdout
    assert "10" in done.stderr + done.stdout


def test_a_change_that_was_planned_for_a_later_step_is_cancelled(daemon, stepping):
    trainer = stepping(SCRIPT)
    step = trainer.until(lambda entry: entry["step"] >= 3)[-1]["step"] + 300
    planned = daemon.cli("lr", "set", "rates", "qk=0.5", "--at-step", str(step), "--no-wait")
    done = daemon.cli("cancel", planned["id"], "--reason", "the wrong step")
    assert (done["outcome"], done["reason"]) == ("cancelled", "the wrong step")
    again = daemon.command("cancel", planned["id"])
    assert again.returncode == 1
    assert f"decision {planned['id']} is cancelled by " in again.stderr
    assert daemon.cli("lr", "show", "rates")["newest_revision"] is None
    assert daemon.command("lr", "history", "rates").stdout == "no revision: the multiplier of every block is 1\n"
    entries = trainer.until(lambda entry: entry["step"] == step + 2)
    for entry in entries[-5:]:
        torch.testing.assert_close(entry["rates"]["qk"], 1e-2, rtol=1e-6, atol=0)
    applied = daemon.cli("lr", "set", "rates", "qk=0.5")
    late = daemon.command("cancel", applied["id"])
    assert late.returncode == 1
    assert f"is applied at step {applied['applied_step']}" in late.stderr
    assert "take revision 1 back with lr undo" in late.stderr


def test_a_block_is_updated_at_steps_that_its_interval_divides_until_it_is_set_back(daemon, stepping):
    trainer = stepping(SCRIPT)
    decision = daemon.cli("lr", "set", "rates", "qk=0.5", "--every", "emb=3,ffn=2", "--reason", "flat")
    assert (decision["outcome"], decision["update_every"]) == ("applied", {"emb": 3, "ffn": 2})
    applied = decision["applied_step"]
    seen = trainer.until(lambda entry: entry["step"] == applied + 7)
    for entry in seen[-8:]:
        for block, every in {"emb": 3, "ffn": 2, "vo": 1, "norm": 1, "head": 1}.items():
            want = 0.0 if entry["step"] % every else 1e-2
            torch.testing.assert_close(entry["rates"][block], want, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(entry["rates"]["qk"], 0.5e-2, rtol=1e-6, atol=0)
        assert [count for _, count in entry["groups"]] == [count for _, count in seen[0]["groups"]]
    shown = {block["block"]: block["update_every"] for block in daemon.cli("lr", "show", "rates")["blocks"]}
    assert (shown["emb"], shown["ffn"], shown["vo"]) == (3, 2, 1)
    assert 'sharpwatch_block_update_interval{block="emb",run="rates",training_job="rates"} 3.0' in daemon.get(
        "/metrics"
    )
    assert "emb every 3 steps, ffn every 2 steps" in daemon.command("lr", "history", "rates").stdout
    again = daemon.cli("lr", "set", "rates", "--every", "emb=1,ffn=1")
    entry = trainer.until(lambda entry: entry["step"] == again["applied_step"] + 5)
    assert all(each["rates"]["emb"] > 0.9e-2 for each in entry if each["step"] >= again["applied_step"])
