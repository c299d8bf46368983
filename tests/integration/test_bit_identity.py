"""Losses and weights are bit-identical to a run without sharpwatch, whatever becomes of the daemon."""

from __future__ import annotations

import json
import os

import pytest
from forked import ForkedProcess

STEPS = 200

# Trains with dropout and prints each step's loss and a digest of the final weights. WATCH attaches the agent, with
# every probe on at every tenth step; after half of the steps the script says so and waits for a line before it goes on.
SCRIPT = """
import hashlib, json, os, sys, torch
from transformers import GPT2Config, GPT2LMHeadModel
torch.manual_seed(0)
config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config)
optimizer = {
    "adamw": lambda: torch.optim.AdamW(model.parameters(), lr=3e-3),
    "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
}[sys.argv[1]]()
if "WATCH" in os.environ:
    import sharpwatch
    probes = ["gnb", "direction", "hutchinson", "lanczos", "linesearch"]
    probes += ["preconditioned"] * (sys.argv[1] == "adamw")
    watch = sharpwatch.attach(model, optimizer, training_job="identity", run="identity", probe_every=10, probes=probes)
data = torch.Generator().manual_seed(1)
losses = []
for step in range(STEPS):
    ids = torch.randint(64, (4, 16), generator=data)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if step == STEPS // 2:
        print("half-way", flush=True)
        sys.stdin.readline()
if "WATCH" in os.environ:
    watch.close()
digest = hashlib.sha256()
for value in model.state_dict().values():
    digest.update(value.contiguous().numpy().tobytes())
print(json.dumps({"weights": digest.hexdigest(), "losses": losses}))
""".replace("STEPS", str(STEPS))


def train(tmp_path, optimizer: str, half_way=lambda: None, **environment: str) -> dict:
    path = tmp_path / "identity.py"
    path.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    process = ForkedProcess(path=path, arguments=[optimizer], env=environment)
    assert process.stdout.readline() == "half-way\n"
    half_way()
    process.stdin.write("go on\n")
    process.stdin.close()
    out = process.stdout.read()
    assert process.wait(timeout=200) == 0
    process.close()
    return json.loads(out)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_with_the_daemon_up_killed_half_way_and_never_there(make_daemon, tmp_path, optimizer):
    plain = train(tmp_path, optimizer)
    daemon = make_daemon()

    up = train(tmp_path, optimizer, WATCH="1", SHARPWATCH_ADDRESS=daemon.grpc)
    assert up == plain
    shown = daemon.cli("show", "identity")
    assert shown["run"]["step"] == STEPS
    # The probes did run.
    seen = {one["estimator"] for block in shown["blocks"] for one in block.get("estimates", ())}
    assert seen >= {"direction", "hutchinson", "lanczos", "linesearch"}

    killed = train(tmp_path, optimizer, daemon.kill, WATCH="1", SHARPWATCH_ADDRESS=daemon.grpc)
    assert killed == plain

    absent = train(tmp_path, optimizer, WATCH="1", SHARPWATCH_ADDRESS=daemon.grpc)  # nobody listens there any more
    assert absent == plain
