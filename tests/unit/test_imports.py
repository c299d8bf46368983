"""Imports run one way: blocks <- curvature <- {agent, daemon} <- cli; no gRPC in the trainer."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(importlib.util.find_spec("sharpwatch").origin).parent
BASE = {"errors", "wire", "_version", "v1"}
# What each part of the package may import of the others; errors, wire, _version and v1 stand below all.
ALLOWED = {
    "errors": set(),
    "_version": set(),
    "v1": set(),
    "wire": {"errors", "v1"},
    "common": set(),
    "blocks": {"common"},
    "curvature": {"common", "blocks"},
    "agent": {"common", "blocks", "curvature"},
    "checkpointing": {"common", "curvature", "agent"},
    "integrations": {"common", "agent", "checkpointing"},
    "testing": {"agent"},
    "daemon": {"common", "blocks", "curvature"},
    "cli": {"common", "blocks", "curvature", "agent", "daemon", "demo"},
    "demo": {""},  # as any user's script does
    "__main__": {"cli"},
    "": {"blocks", "curvature", "agent", "checkpointing"},  # the package's own public names
}
# Modules through which a program reaches files, processes, threads' or the network's outside.
IO = {"os", "io", "pathlib", "socket", "ssl", "select", "selectors", "subprocess", "multiprocessing", "threading"}
IO |= {"asyncio", "signal", "shutil", "tempfile", "http", "urllib", "sqlite3", "logging", "time", "yaml", "pickle"}
IO |= {"grpc", "aiohttp", "structlog", "prometheus_client", "rich", "transformers"}


def modules():
    """(dotted name, syntax tree) of every module of the package that is written by hand."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] != "v1":
            name = ".".join(("sharpwatch", *(part for part in parts if part != "__init__")))
            yield name, path.name == "__init__.py", ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(name, is_package, tree):
    """Every dotted name that the module imports, anywhere in it; `from a import b` counts as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                home = name.split(".")[: None if is_package else -1]
                home = home[: len(home) - (node.level - 1)]
                base = ".".join([*home, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def part_of(dotted):
    """The part of the package that a dotted name is in: "" for its public names, None outside."""
    root, *rest = dotted.split(".")
    if root != "sharpwatch":
        return None
    return rest[0] if rest and rest[0] in ALLOWED else ""


MODULES = {name: set(imported(name, is_package, tree)) for name, is_package, tree in modules()}


def roots(name):
    return {dotted.partition(".")[0] for dotted in MODULES[name]}


def within(part):
    return sorted(name for name in MODULES if part_of(name) == part and name != "sharpwatch")


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_one_way(name):
    own = part_of(name)
    below = ALLOWED[own] if own in BASE else ALLOWED[own] | BASE
    wrong = {dotted for dotted in MODULES[name] if part_of(dotted) not in below | {own, None}}
    assert not wrong, f"{name} may not import {sorted(wrong)}"


@pytest.mark.parametrize("part", ["blocks", "curvature", "agent", "daemon", "cli"])
def test_every_part_is_looked_at(part):
    assert within(part)


def test_every_part_has_its_rule():
    assert {name.split(".")[1] for name in MODULES if "." in name} <= set(ALLOWED)


@pytest.mark.parametrize("name", within("curvature"))
def test_curvature_does_no_io(name):
    assert not roots(name) & IO


@pytest.mark.parametrize("name", within("agent"))
def test_in_the_agent_only_the_courier_imports_grpc(name):
    if name != "sharpwatch.agent.transport.courier":
        assert not roots(name) & {"grpc", "grpc_health", "grpc_reflection"}
        assert not {dotted for dotted in MODULES[name] if "_pb2_grpc" in dotted}
        assert not {dotted for dotted in MODULES[name] if dotted.startswith("sharpwatch.agent.transport.courier.")}


@pytest.mark.parametrize("name", [*within("agent"), *within("curvature"), *within("blocks")])
def test_the_agent_needs_no_extra(name):
    assert not roots(name) & {"aiohttp", "structlog", "prometheus_client", "rich", "transformers", "tokenizers"}


def loaded_after(statement):
    """The modules in `sys.modules` of a fresh interpreter after `statement`."""
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "framework"),
    [
        ("import sharpwatch.agent.watch", ""),
        ("import sharpwatch.blocks", ""),
        ("import sharpwatch; sharpwatch.attach", ""),
        # What is installed beside these may bring the same modules: transformers imports datasets, and that aiohttp.
        ("import sharpwatch.integrations.huggingface", "from transformers import Trainer"),
        ("import sharpwatch.integrations.lightning", "import lightning.pytorch"),
    ],
)
def test_the_trainer_is_left_without_grpc(statement, framework):
    loaded = loaded_after(statement)
    assert "sharpwatch" in loaded
    ours = {name.partition(".")[0] for name in loaded - loaded_after(framework)}
    assert not ours & {"grpc", "aiohttp", "structlog"}
    assert not {name for name in loaded if name.startswith("sharpwatch.daemon")}


def test_block_names_and_rules_come_without_torch():
    assert "torch" not in loaded_after("import sharpwatch.blocks")
