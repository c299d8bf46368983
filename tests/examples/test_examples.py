"""Every file of examples/ runs as it is written, and the daemon shows what it trained.

nanogpt.patch and torchtitan_trainer.py are for another project's loop: tests/integration/integrations runs them.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import forked
import pytest
from missing import missing

from sharpwatch.blocks import load_rules

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
# tiny.py is what the others train, spike.py is of a tutorial (test_operating_doc.py).
RUN_ELSEWHERE = {"tiny.py", "spike.py", "nanogpt.patch", "torchtitan_trainer.py"}


@dataclass(frozen=True)
class Example:
    """What an example trains, and what the daemon must then know of it."""

    file: str
    training_job: str
    steps: int
    estimators: frozenset[str] = frozenset({"gnb"})
    checkpoints: bool = False
    ranks: int = 1
    needs: tuple[str, ...] = ()
    slow: bool = True

    @property
    def parameters(self):
        return pytest.param(self, id=self.file, marks=[pytest.mark.slow] if self.slow else [])


TRAINERS = (
    Example("quickstart.py", "quickstart", 300, frozenset({"gnb", "direction"}), slow=False),
    Example("plain_loop.py", "gpt2-owt", 300, frozenset(), checkpoints=True),
    Example("huggingface_trainer.py", "gpt2-trainer", 60, checkpoints=True),
    Example("accelerate_loop.py", "gpt2-accelerate", 100, checkpoints=True),
    Example("trl_lora.py", "llama-lora", 40, checkpoints=True, needs=("trl", "peft")),
    Example("lightning_fit.py", "gpt2-lightning", 60, checkpoints=True),
    Example("ddp.py", "gpt2-ddp", 100, checkpoints=True, ranks=2),
    Example("fsdp2.py", "gpt2-fsdp2", 100, checkpoints=True, ranks=2),
    Example("classifier.py", "classifier", 100, frozenset({"gnb", "direction"}), slow=False),
    Example("diffusion_transformer.py", "dit", 60, frozenset({"direction", "hutchinson"}), needs=("diffusers",)),
    Example("timm_vit.py", "vit-tiny", 60, frozenset({"gnb", "direction"}), needs=("timm",)),
)


def run(file: str, folder: Path, *, ranks: int = 1, **environment: str) -> str:
    """Run an example in `folder`; returns what it printed."""
    offline = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    options = {"path": EXAMPLES / file, "env": {**os.environ, **offline, **environment}, "cwd": folder}
    if ranks > 1:
        arguments = ("--standalone", f"--nproc-per-node={ranks}", str(options.pop("path")))
        options |= {"code": forked.TORCHRUN, "arguments": arguments}
    status, output, errors = forked.run(**options, timeout=240)
    assert status == 0, output + errors
    return output


@pytest.mark.parametrize("example", [each.parameters for each in TRAINERS])
def test_a_training_example_runs_and_is_seen(daemon, tmp_path, example):
    for module in example.needs:
        if importlib.util.find_spec(module) is None:
            if module in {"timm", "diffusers"}:
                pytest.skip(f"{module} is not installed; timm needs a torchvision that fits torch's build")
            missing(module)
    run(example.file, tmp_path, ranks=example.ranks, SHARPWATCH_ADDRESS=daemon.grpc)
    (seen,) = daemon.cli("jobs")["runs"]
    assert (seen["training_job"], seen["step"]) == (example.training_job, example.steps)
    shown = daemon.cli("show", seen["run"])
    assert shown["probe_failures"] == []
    found = {estimate["estimator"] for block in shown["blocks"] for estimate in block["estimates"]}
    assert example.estimators <= found
    assert bool(shown["checkpoints"]) is example.checkpoints


@pytest.mark.slow
def test_the_measured_checkpoint_is_reported(tmp_path):
    printed = run("measure_checkpoint.py", tmp_path)
    assert {"emb", "qk", "vo", "ffn", "norm", "whole"} <= set(re.findall(r"^ *(\w+) ", printed, re.MULTILINE))


def test_the_quickstart_of_the_readme_is_the_example():
    (lines,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert lines.strip() == (EXAMPLES / "quickstart.py").read_text().partition('"""\n\n')[2].strip()


def test_every_example_is_run():
    tested = {example.file for example in TRAINERS} | {"measure_checkpoint.py"} | RUN_ELSEWHERE
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix in {".py", ".patch"}} == tested


def test_every_example_is_in_the_documentation():
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md"))
    for path in EXAMPLES.iterdir():
        if path.is_file():
            assert f"examples/{path.name}" in pages, path.name


def test_pages_include_what_they_name():
    """A mark that is not exactly this would be shown as text."""
    for page in (ROOT / "docs").rglob("*.md"):
        for line in page.read_text().splitlines():
            if re.match(r"\s*--\s*8\s*<", line):
                mark = re.fullmatch(r'\s*--8<-- "([^":]+)(?::(\w+))?:?"', line)
                assert mark is not None, f"{page}: {line}"
                text = (ROOT / mark[1]).read_text()
                assert not mark[2] or mark[2].isdigit() or f"--8<-- [start:{mark[2]}]" in text, f"{page}: {line}"


def test_configurations_and_rules_are_read():
    check = ("-m", "sharpwatch", "check-config", str(EXAMPLES / "sharpwatch.yaml"))
    subprocess.run([sys.executable, *check], check=True, capture_output=True, timeout=60)
    for path in EXAMPLES.glob("*-rules.yaml"):
        assert load_rules(path)
