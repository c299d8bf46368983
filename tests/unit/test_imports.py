"""Imports run strictly downwards, by one table: blocks <- curvature <- {agent, daemon} <- cli; no gRPC in a trainer."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(importlib.util.find_spec("sharpwatch").origin).parent
# Every module may import these.
BASE = {"errors", "wire", "_version", "v1"}
# What each room may import beside itself and BASE; a room stands below all that may import it. A module is in the room
# with the longest name that begins its own. "agent" as a target allows all of its rooms; "" is the package itself.
ALLOWED = {
    "errors": {"curvature.measure"},  # the annotation of PrecisionError alone, under TYPE_CHECKING
    "_version": set(),
    "v1": set(),
    "wire": {"errors", "v1"},
    "common": set(),
    "blocks": {"common"},
    "curvature.state": {"common"},
    "curvature.statistics": {"blocks"},
    "curvature.parameters": {"blocks", "curvature.statistics"},
    "curvature.objective": {"common", "blocks", "curvature.state", "curvature.statistics", "curvature.parameters"},
    "curvature.estimators": {
        *("blocks", "curvature.state", "curvature.statistics", "curvature.parameters", "curvature.objective")
    },
    "curvature.measure": {
        *("blocks", "curvature.state", "curvature.statistics", "curvature.parameters", "curvature.objective"),
        "curvature.estimators",
    },
    "agent.safety": {"common"},
    "agent.transport": {"common", "agent.safety"},
    "agent.control": {"blocks", "agent.safety"},
    "agent.optimizers": {"common", "blocks", "curvature", "agent.safety", "agent.control"},
    "agent.statistics": {"blocks", "curvature", "agent.safety", "agent.optimizers"},
    "agent.hooks": {"curvature", "agent.safety", "agent.control", "agent.optimizers", "agent.statistics"},
    "agent.calls": {"curvature", "agent.hooks"},
    "agent.probes": {
        *("common", "blocks", "curvature", "agent.safety", "agent.control", "agent.hooks"),
        *("agent.optimizers", "agent.statistics", "agent.calls"),
    },
    "agent.options": {
        "common",
        "blocks",
        "curvature",
        "agent.safety",
        "agent.transport",
        "agent.control",
        "agent.hooks",
        "agent.optimizers",
        "agent.statistics",
        "agent.probes",
    },
    "agent.losses": {"curvature", "agent.safety", "agent.hooks", "agent.statistics"},
    "agent.checkpoint_log": set(),
    "agent.reporting": {
        *("common", "blocks", "curvature", "agent.safety", "agent.control", "agent.statistics", "agent.probes"),
        *("agent.transport", "agent.optimizers", "agent.options", "agent.losses", "agent.checkpoint_log"),
    },
    "agent.distributed": {
        *("common", "blocks", "curvature", "agent.safety", "agent.control", "agent.optimizers", "agent.statistics"),
        *("agent.probes", "agent.options", "agent.losses", "agent.reporting", "agent.transport"),
    },
    "agent": {"common", "blocks", "curvature", "agent"},  # attach and what it puts together
    "checkpointing": {"common", "curvature", "agent"},
    "integrations": {"common", "agent", "checkpointing"},
    "testing": {"agent"},
    "daemon.records": {"common", "blocks", "curvature.statistics"},
    "daemon.config": {"common", "blocks", "daemon.records"},
    "daemon.detection": {"blocks", "curvature.statistics", "daemon.records", "daemon.config"},
    "daemon.storage": {"common", "curvature.statistics", "daemon.records"},
    "daemon.decisions": {"curvature.statistics", "daemon.records", "daemon.config", "daemon.detection"},
    "daemon.ingest": {"blocks", "curvature.statistics", "daemon.records", "daemon.config"},
    "daemon.estimation": {"blocks", "curvature.statistics", "daemon.records", "daemon.config", "daemon.ingest"},
    "daemon.runs": {
        *("blocks", "curvature.statistics", "daemon.records", "daemon.config", "daemon.storage", "daemon.detection"),
        *("daemon.decisions", "daemon.ingest", "daemon.estimation"),
    },
    "daemon.exporter": {
        *("blocks", "curvature.statistics", "daemon.records", "daemon.detection", "daemon.ingest"),
        *("daemon.estimation", "daemon.runs"),
    },
    "daemon.pipeline": {
        *("blocks", "curvature.statistics", "daemon.records", "daemon.config", "daemon.storage", "daemon.detection"),
        *("daemon.decisions", "daemon.ingest", "daemon.estimation", "daemon.runs", "daemon.exporter"),
    },
    "daemon.rules": {
        *("blocks", "curvature.statistics", "daemon.records", "daemon.config", "daemon.storage", "daemon.detection"),
        *("daemon.decisions", "daemon.ingest", "daemon.estimation", "daemon.runs"),
    },
    "daemon.held_shards": {"common"},
    "daemon.run_loader": {
        *("blocks", "curvature.statistics", "daemon.records", "daemon.config", "daemon.storage", "daemon.detection"),
        *("daemon.decisions", "daemon.ingest", "daemon.estimation", "daemon.runs", "daemon.exporter"),
        *("daemon.held_shards", "daemon.pipeline"),
    },
    "daemon.api": {
        *("common", "blocks", "curvature.statistics", "daemon.records", "daemon.config", "daemon.storage"),
        *("daemon.detection", "daemon.decisions", "daemon.ingest", "daemon.estimation", "daemon.runs"),
        *("daemon.exporter", "daemon.held_shards", "daemon.pipeline", "daemon.run_loader"),
    },
    "daemon": {"common", "blocks", "curvature.statistics", "daemon"},
    "replay": {
        *("blocks", "curvature.statistics", "daemon.records", "daemon.config", "daemon.detection", "daemon.decisions"),
        *("daemon.storage", "daemon.ingest", "daemon.estimation", "daemon.runs"),
    },
    "demo": {""},  # as any user's script does
    "cli.extras": set(),
    "cli.options": {"common", "cli.extras"},
    "cli.output": {"common"},
    "cli.shards": {"common"},
    "cli.client": {"common", "cli.options", "cli.output", "cli.shards"},
    "cli.dry_run": {"cli.options", "cli.output", "cli.client"},
    "cli.measure": {"common", "blocks", "curvature", "cli.extras", "cli.options", "cli.output"},
    "cli.commands": {
        *(
            "common",
            "blocks",
            "daemon",
            "replay",
            "demo",
            "cli.extras",
            "cli.options",
            "cli.output",
            "cli.client",
            "cli.dry_run",
            "cli.measure",
        ),
    },
    "cli.report": {
        *("common", "blocks", "daemon", "replay", "cli.extras", "cli.options", "cli.output", "cli.client"),
        *("cli.measure", "cli.commands"),
    },
    "cli": {"common", "cli"},
    "__main__": {"cli"},
    "": {"blocks", "curvature", "agent", "checkpointing"},  # the package's own public names
}
# Modules through which a program reaches files, processes, threads' or the network's outside.
IO = {"os", "io", "pathlib", "socket", "ssl", "select", "selectors", "subprocess", "multiprocessing", "threading"}
IO |= {"asyncio", "signal", "shutil", "tempfile", "http", "urllib", "sqlite3", "logging", "time", "yaml", "pickle"}
IO |= {"grpc", "aiohttp", "structlog", "prometheus_client", "rich", "transformers", "sqlalchemy"}


def parsed():
    """(dotted name, whether it is a package, syntax tree) of every module of the package that is written by hand."""
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


def room_of(dotted):
    """The room that a dotted name is in: "" for the package's public names, None outside the package."""
    root, *rest = dotted.split(".")
    if root != "sharpwatch":
        return None
    names = (".".join(rest[:length]) for length in range(len(rest), 0, -1))
    return next((name for name in names if name in ALLOWED), "")


@cache  # read by the first test, not by every process that collects this file
def modules():
    """What each module imports."""
    return {name: set(imported(name, is_package, tree)) for name, is_package, tree in parsed()}


def roots(name):
    return {dotted.partition(".")[0] for dotted in modules()[name]}


def within(*parts):
    return sorted(name for name in modules() if any(is_in(name, part) for part in parts))


def is_in(name, part):
    return f"{name}.".startswith(f"sharpwatch.{part}.")


def is_allowed(name, dotted):
    own, target = room_of(name), room_of(dotted)
    if target in {own, None} or (target in BASE and own not in BASE):
        return True
    return any(target == room or (room and target.startswith(f"{room}.")) for room in ALLOWED[own])


def test_imports_run_downwards():
    wrong = [
        f"{name} -> {dotted}" for name, found in modules().items() for dotted in found if not is_allowed(name, dotted)
    ]
    assert not wrong, "\n".join(["not in ALLOWED:", *sorted(wrong)])


def test_the_table_itself_points_downwards():
    rows = list(ALLOWED)
    for room, targets in ALLOWED.items():
        below = {".".join(above.split(".")[:length]) for above in rows[: rows.index(room)] for length in (1, 2)}
        assert room == "errors" or targets <= below | {"", room}, room


def test_every_room_has_its_row():
    rooms = {".".join(name.split(".")[1:]) for name in modules() if (PACKAGE / Path(*name.split(".")[1:])).is_dir()}
    rooms = {room for room in rooms if room.count(".") < 2} - {"curvature"}  # which has nothing beside its rooms
    assert rooms <= set(ALLOWED)
    assert {name.split(".")[1] for name in modules() if "." in name} <= {room.split(".")[0] for room in ALLOWED}


@pytest.mark.parametrize("part", ["blocks", "curvature", "agent", "daemon", "cli"])
def test_every_part_is_looked_at(part):
    assert within(part)


def test_curvature_does_no_io():
    assert not {name: found for name in within("curvature") if (found := roots(name) & IO)}


def test_in_the_agent_only_the_courier_imports_grpc():
    beside = [name for name in within("agent") if name != "sharpwatch.agent.transport.courier"]
    assert len(beside) == len(within("agent")) - 1
    assert not [name for name in beside if roots(name) & {"grpc", "grpc_health", "grpc_reflection"}]
    dotted = [(name, each) for name in beside for each in modules()[name]]
    assert not [pair for pair in dotted if "_pb2_grpc" in pair[1]]
    assert not [pair for pair in dotted if pair[1].startswith("sharpwatch.agent.transport.courier.")]


def test_the_agent_needs_no_extra():
    extras = {
        "aiohttp",
        "click",
        "platformdirs",
        "pydantic",
        "structlog",
        "sqlalchemy",
        "alembic",
        "psycopg",
        "prometheus_client",
        "rich",
        "transformers",
        "tokenizers",
    }
    assert not {name: found for name in within("agent", "curvature", "blocks") if (found := roots(name) & extras)}


# The modules that a statement brings to a process which has torch, and in which another statement has been run before.
AFTER_TORCH = """
import json, os, sys
import torch
for before, statement in json.loads(sys.argv[1]):
    if os.fork() == 0:
        exec(before)
        known = set(sys.modules)
        exec(statement)
        print(json.dumps(sorted(set(sys.modules) - known)), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def output_of(*program):
    done = subprocess.run([sys.executable, "-c", *program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_trainer_is_left_without_grpc():
    cases = [
        ("", "import sharpwatch.agent.watch"),
        ("", "import sharpwatch.blocks"),
        ("", "import sharpwatch; sharpwatch.attach"),
        # What is installed beside these may bring the same modules: transformers imports datasets, and that aiohttp.
        ("from transformers import Trainer", "import sharpwatch.integrations.huggingface"),
        ("import lightning.pytorch", "import sharpwatch.integrations.lightning"),
    ]
    printed = output_of(AFTER_TORCH, json.dumps(cases)).splitlines()
    found = [json.loads(line) for line in printed if line.startswith("[")]
    for (_, statement), loaded in zip(cases, found, strict=True):
        assert "sharpwatch" in loaded, statement
        assert not {name.partition(".")[0] for name in loaded} & {"grpc", "aiohttp", "structlog"}, statement
        assert not {name for name in loaded if name.startswith("sharpwatch.daemon")}, statement


def test_block_names_and_rules_come_without_torch():
    loaded = output_of("import sys\nimport sharpwatch.blocks\nprint('\\n'.join(sys.modules))").split()
    assert "sharpwatch.blocks" in loaded
    assert "torch" not in loaded
