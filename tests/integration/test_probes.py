"""Every curvature probe inside a real trainer, to the numbers that a real daemon exports; the run is as without."""

from __future__ import annotations

import json
import math
import re
import sqlite3
from collections import defaultdict
from contextlib import closing

import pytest

BLOCKS = {"emb", "qk", "vo", "ffn", "norm", "other"}  # of GPT-2: positions are `other`, the head is tied
STEPS = 200

SCRIPT = """
import hashlib, json, os, torch
from transformers import GPT2Config, GPT2LMHeadModel
torch.set_num_threads(1)
torch.manual_seed(0)
config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config)  # with dropout
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)  # slow: what a window saw is what stands at its end
if "SHARPWATCH_ADDRESS" in os.environ:
    import sharpwatch
    probes = ("gnb", "direction", "hutchinson", "lanczos", "linesearch", "preconditioned")
    watch = sharpwatch.attach(model, optimizer, training_job="probes", run="probes", probe_every=5, probes=probes)
for step in range(STEPS):
    ids = torch.randint(64, (16, 16)).cummax(1).values  # rising numbers: there is something to learn
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
digest = hashlib.sha256()
for value in model.state_dict().values():
    digest.update(value.contiguous().numpy().tobytes())
result = {"weights": digest.hexdigest(), "loss": loss.item()}
if "SHARPWATCH_ADDRESS" in os.environ:
    failures = [str(failure) for failure in watch._watched.scheduler.runner.failures]
    swallowed = watch._watched.barrier.swallowed
    watch.close()
    batches = [{"input_ids": rows, "labels": rows} for rows in ids.split(2)]  # as many rows as a probe sees
    measured = sharpwatch.measure(model, batches, estimators=("hutchinson",), draws=4)
    traces = {name: (block.trace.value, block.trace.stderr) for name, block in measured.blocks.items()}
    result |= {"failures": failures, "swallowed": swallowed, "traces": traces}
print(json.dumps(result))
""".replace("STEPS", str(STEPS))


def exported(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    """By metric, and then by its labels' values but the run's own, in the order of their names."""
    found = defaultdict(dict)
    for name, labels, value in re.findall(r"^sharpwatch_(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        pairs = sorted(re.findall(r'(\w+)="([^"]*)"', labels))
        found[name][tuple(value for key, value in pairs if key not in {"run", "training_job"})] = float(value)
    return found


@pytest.mark.timeout(300)
def test_every_probe_reaches_its_metrics_and_the_run_is_as_without(daemon, script, subtests):
    watched, plain = json.loads(script(SCRIPT, daemon)), json.loads(script(SCRIPT))
    metrics = exported(daemon.get("/metrics"))
    with subtests.test("the weights are bit for bit those of a run without"):
        assert (watched["failures"], watched["swallowed"]) == ([], 0)
        assert (watched["weights"], watched["loss"]) == (plain["weights"], plain["loss"])
    with subtests.test("traces of the Hessian"):
        check_traces(metrics, watched["traces"])
    with subtests.test("ends of the Hessian's spectrum"):
        check_eigenvalues(metrics)
    with subtests.test("every kind of stability ratio"):
        check_stability(metrics)
    with subtests.test("what the sketches say"):
        check_sketches(metrics)
    with subtests.test("the journal and operators have the residuals"):
        check_residuals(daemon)


def check_traces(metrics, measured) -> None:
    traces, errors = metrics["block_hessian_trace"], metrics["block_hessian_trace_stderr"]
    for block in BLOCKS:
        key = (block, "hutchinson")
        assert errors[key] > 0
        assert metrics["block_sharpness"][key] == pytest.approx(traces[key] / metrics["block_parameters"][(block,)])
        value, error = measured[block]
        assert abs(traces[key] - value) < 4 * math.hypot(errors[key], error) + abs(value) / 4, block


def check_eigenvalues(metrics) -> None:
    tops, bottoms = metrics["block_top_eigenvalue"], metrics["block_bottom_eigenvalue"]
    residuals = metrics["block_top_eigenvalue_residual"]
    for block in BLOCKS:
        key = (block, "lanczos")
        assert bottoms[key] < tops[key]
        assert tops[key] > 0
        assert 0 <= residuals[key] < tops[key]
        assert metrics["block_bottom_eigenvalue_residual"][key] >= 0
    assert metrics["top_eigenvalue"][("lanczos",)] > 0 > metrics["bottom_eigenvalue"][("lanczos",)]
    assert metrics["top_eigenvalue_residual"][("lanczos",)] >= 0


def check_stability(metrics) -> None:
    ratios, errors = metrics["stability_ratio"], metrics["stability_ratio_stderr"]
    assert ratios.keys() == errors.keys() == {("directional",), ("linesearch",), ("preconditioned",)}
    for kind, ratio in ratios.items():
        assert -0.1 < ratio < 5, kind
        assert errors[kind] >= 0
    by_block = metrics["block_stability_ratio"]
    assert {block for block, kind in by_block if kind == "linesearch"} == BLOCKS
    assert all(value >= 0 for (_, kind), value in by_block.items() if kind == "linesearch")


def check_sketches(metrics) -> None:
    for name, low, high in (("effective_rank", 1, 1e4), ("drift", -2, 2), ("gradient_alignment", -0.5, 1.5)):
        found = metrics[f"block_{name}"]
        assert found, name  # some blocks' sketches say enough in any case
        for key, value in found.items():
            assert key[1] == "gnb"
            assert low < value < high, (name, key)
            assert metrics[f"block_{name}_stderr"][key] > 0


def check_residuals(daemon) -> None:
    shown = daemon.cli("show", "probes")
    (qk,) = [block for block in shown["blocks"] if block["block"] == "qk"]
    (top,) = [one for one in qk["estimates"] if (one["quantity"], one["estimator"]) == ("top_eigenvalue", "lanczos")]
    assert top["residual"] >= 0
    assert top["method"] == "autograd"
    with closing(sqlite3.connect(daemon.folder / "sharpwatch.db")) as journal:
        rows = journal.execute(
            "SELECT block, count(*), count(DISTINCT step), min(residual) FROM estimates "
            "WHERE quantity = 'top_eigenvalue' AND estimator = 'lanczos' GROUP BY block"
        ).fetchall()
    assert {block for block, *_ in rows} == {*BLOCKS, ""}
    assert sum(count for _, count, *_ in rows) == STEPS // 5  # one a probe: of the block whose turn it was
    assert all(count == steps and residual >= 0 for _, count, steps, residual in rows)
