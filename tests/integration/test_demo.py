"""The demo, as a user runs it: a fault, an alert, a decision, a recovery."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all demos, as a user has it: the first tokenises the text for those that follow."""
    return tmp_path_factory.mktemp("demo")


def demo(folder: Path, **options: object) -> dict:
    result = folder / "result.json"
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "sharpwatch", "demo", "--json", str(result), "--folder", str(folder), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=550,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(result.read_text())


def test_enforce_brings_the_loss_back_and_observe_does_not(folder):
    observed = demo(folder, model="llama", fault="lr-jump", mode="observe", steps=240)
    enforced = demo(folder, model="llama", fault="lr-jump", mode="enforce", steps=240)
    # A healthy run falls by half a nat in the second half; one whose rate stays at ×30 does not get on.
    assert enforced["loss"]["end"] < enforced["loss"]["before_fault"] - 0.2
    assert observed["loss"]["end"] > observed["loss"]["before_fault"] - 0.2
    assert {decision["outcome"] for decision in observed["decisions"]} == {"observed"}
    applied = [decision for decision in enforced["decisions"] if decision["applied_step"] is not None]
    assert applied
    assert applied[0]["applied_step"] >= enforced["alerts"][0]["step"]
    assert enforced["dropped"] == 0
    for block in ("emb", "qk", "vo", "ffn", "norm", "head"):
        values = enforced["blocks"][block]
        assert values["sharpness"] > values["stderr"] > 0
        assert values["sharpness"] == pytest.approx(values["trace"] / values["parameters"])


def test_a_corrupted_weight_is_named_before_the_loss_moves(folder):
    result = demo(folder, model="llama", fault="weight-corruption", mode="observe", steps=200)
    at = result["fault"]["step"]
    # The first optimizer step whose gradient saw the corrupted weight is at + 1.
    alert = next(alert for alert in result["alerts"] if alert["step"] > at)
    assert alert["step"] <= at + 2
    assert alert["blocks"][0] == "ffn"
    losses = dict(json.loads((folder / result["run"] / "losses.json").read_text()))
    window = [losses[step] for step in range(at - 99, at + 1)]
    # Robust sigmas of what the loss does around its own trend, which is steep this early.
    middle = statistics.median(window[-50:])
    sigma = 1.4826 * statistics.median(abs(value - middle) for value in window[-50:])
    assert abs(losses[alert["step"]] - middle) < 3 * sigma
