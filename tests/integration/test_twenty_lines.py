"""The smallest training script shows up in /metrics, and what it shows is true."""

from __future__ import annotations

import json
import math
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np

# A user's script: only `attach` and `optimizer.step()`. Learning rate 0 freezes the weights, so that the exact
# Gauss-Newton diagonal of one model and one batch is the truth for every probe. It prints that truth, computed from
# the definition: for mean cross-entropy over N tokens, Tr G_bb = 1/N sum_n [sum_v p_v |J_v|^2 - |sum_v p_v J_v|^2]
# with J_v the gradient of logit v of token n.
SCRIPT = """
import json, sys, torch, sharpwatch
from transformers import GPT2Config, GPT2LMHeadModel
torch.manual_seed(0)
config = GPT2Config(vocab_size=24, n_positions=8, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
ids = torch.randint(24, (ROWS, 8))
watch = sharpwatch.attach(model, optimizer, training_job="frozen", run="frozen", probe_every=1, probes=("gnb",))
for _ in range(STEPS):
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
watch.close()
model.eval()
logits = model(input_ids=ids).logits[:, :-1].reshape(-1, 24)
share = logits.detach().softmax(-1)
blocks = sharpwatch.classify(model)
names = [row.parameter for row in blocks.rows]
leaves = dict(model.named_parameters())
trace = {}
for n in range(len(logits)):
    rows = [torch.autograd.grad(logits[n, v], list(leaves.values()), retain_graph=True) for v in range(24)]
    for index, name in enumerate(leaves):
        jacobian = torch.stack([row[index] for row in rows]).double()
        p = share[n].double().reshape(-1, *[1] * (jacobian.dim() - 1))
        diagonal = (p * jacobian**2).sum(0) - (p * jacobian).sum(0) ** 2
        parts = [part for part in blocks.parts if part.parameter == name]
        for part in parts:
            view = diagonal if part.dim is None else diagonal.narrow(part.dim, part.start, part.stop - part.start)
            trace[part.type] = trace.get(part.type, 0.0) + view.sum().item() / len(logits)
print(json.dumps(trace))
"""


def exported(text: str, name: str) -> dict[str, float]:
    """Value of `name` by block, for the gnb estimator."""
    pattern = rf'^{name}{{(?=[^}}]*estimator="gnb")[^}}]*block="(\w+)"[^}}]*}} (\S+)$'
    return {block: float(value) for block, value in re.findall(pattern, text, re.MULTILINE)}


def journalled(path: Path, quantity: str) -> dict[str, list[tuple[float, float]]]:
    """Every (value, stderr) of `quantity` the daemon made, by block, oldest first."""
    with closing(sqlite3.connect(path)) as database:
        rows = database.execute(
            "SELECT block, value, stderr FROM estimates WHERE quantity = ? AND estimator = 'gnb' ORDER BY step",
            (quantity,),
        )
        found: dict[str, list[tuple[float, float]]] = {}
        for block, value, stderr in rows:
            found.setdefault(block, []).append((value, stderr))
    return found


def test_frozen_run_agrees_with_the_dense_gauss_newton_diagonal(daemon, script):
    steps = 200
    truth = json.loads(script(SCRIPT.replace("ROWS", "2").replace("STEPS", str(steps)), daemon))
    text = daemon.get("/metrics")
    sharpness = exported(text, "sharpwatch_block_sharpness")
    assert {"emb", "qk", "vo", "ffn", "norm"} <= sharpness.keys()
    assert exported(text, "sharpwatch_block_sharpness_stderr").keys() == sharpness.keys()

    # Every estimate the daemon made, from its journal: a window of 8 probes each, so that every 8th is independent.
    estimates = journalled(daemon.folder / "sharpwatch.db", "trace")
    for block, exact in truth.items():
        values, errors = np.array(estimates[block][7::8]).T
        assert len(values) >= 20, block
        spread = values.std(ddof=1)
        assert abs(values.mean() - exact) <= 4 * spread / math.sqrt(len(values)), block
        # The claimed error: its root mean square is that of the spread; 25 windows know the spread to 14 %.
        claimed = math.sqrt(np.mean(errors**2))
        assert spread / 1.5 <= claimed <= spread * 1.5, block
