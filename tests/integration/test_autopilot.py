"""The autopilot of a real daemon raises the rates of a real trainer by what its probes measured."""

from __future__ import annotations

import re

import pytest

AUTOPILOT = """policies: []
autopilot:
  mode: enforce
  curvature_share: {max: 3}
"""
BLOCKS = {"emb", "qk", "vo", "ffn", "norm", "head"}

# Trains until told to stop, printing the multipliers after each step.
SCRIPT = """
import json, sys, threading, torch, sharpwatch
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_num_threads(1)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16, bos_token_id=0, eos_token_id=0))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
watch = sharpwatch.attach(model, optimizer, training_job="pilot", run="pilot", probe_every=20, early_probes=62)
over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), over.set()), daemon=True).start()
while not over.is_set():
    ids = torch.randint(64, (8, 16)).cummax(1).values  # rising numbers: there is something to learn
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(json.dumps({"step": watch.step, "multipliers": dict(watch.status.multipliers)}), flush=True)
    over.wait(0.02)
watch.close()
"""


@pytest.fixture
def daemon(make_daemon):
    """A daemon with the autopilot, which `stepping` trains beside."""
    return make_daemon(AUTOPILOT)


def test_multipliers_follow_shares_that_are_exported(daemon, stepping):
    trainer = stepping(SCRIPT)
    seen = trainer.until(lambda entry: max(entry["multipliers"].values()) > 1.1)[-1]
    revisions = daemon.cli("lr", "history", "pilot")["revisions"]
    assert {one["author"] for one in revisions} == {"autopilot"}
    assert revisions[0]["multipliers"].keys() == BLOCKS
    made = daemon.cli("decisions", "pilot")["decisions"]
    assert {(one["action"], one["mode"]) for one in made} == {("set_lr", "enforce")}
    assert "curvature shares" in made[0]["detail"]
    assert 1 <= max(seen["multipliers"].values()) <= 3
    trainer.until(lambda entry: entry["step"] >= 80)
    pattern = r'^sharpwatch_block_curvature_share\{block="(\w+)".*\} (\S+)$'
    shares = re.findall(pattern, daemon.get("/metrics"), re.MULTILINE)
    assert {block for block, _ in shares} == BLOCKS
    assert sum(float(share) for _, share in shares) == pytest.approx(1.0)
    shown = daemon.command("show", "pilot").stdout
    assert "curvature share" in shown
