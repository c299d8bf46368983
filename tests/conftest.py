"""What every test stands on."""

from __future__ import annotations

import gc
import os

# Read when numpy and torch are loaded, here and in every process that tests start: threads of BLAS wait for each other
# by spinning, which on cores that other tests use as well takes many times the work.
os.environ["OMP_NUM_THREADS"] = "1"

import shutil
import signal
import sys
from collections.abc import Generator
from functools import cache
from pathlib import Path

import pytest
import structlog
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for the modules that several folders of tests share
import stand_ins
from daemons import Daemon, ScriptedDaemon
from forked import preload_frameworks
from missing import missing
from wire_trainer import WireTrainer

os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed tells whoever imports it, on stdout, that it found no GPU


# What `make test` leaves to `make test-all`: folders and files that train on several ranks, drive other projects'
# trainers, start many processes or wait for many deaths, or measure every block of six models.
# tests/distributed/test_smoke.py stands for the ranks.
SLOW = (
    "distributed",
    "integration/integrations",
    "integration/optimizers",
    "integration/test_bit_identity.py",
    "integration/test_cli_daemon.py",
    "integration/test_crossings.py",
    "integration/test_dashboard.py",
    "integration/test_demo.py",
    "integration/test_measure_cli.py",
    "integration/test_probes.py",
    "integration/test_resume.py",
    "integration/test_runs.py",
    "integration/test_whose_run.py",
    "integration/test_setups.py",
    "integration/test_twenty_lines.py",
    "open_faults",
    "promises/test_clock_jumps.py",
    "promises/test_daemon_killed.py",
    "promises/test_daemon_lying.py",
    "promises/test_data_loader_workers.py",
    "promises/test_memory.py",
    "promises/test_no_python.py",
    "promises/test_out_of_memory.py",
    "unit/agent/probes/test_objective.py",
    "unit/blocks/test_zoo.py",
    "unit/curvature/measure/test_measure.py",
    "unit/curvature/measure/test_measure_use.py",
    "unit/curvature/measure/test_which_loss.py",
    "unit/curvature/objective/test_transformers_losses.py",
    "unit/curvature/objective/test_verification.py",
    "unit/curvature/statistics/test_gnb_eigenvalues_of_a_model.py",
)
NOT_SLOW = ("distributed/test_smoke.py",)
# Run first: what takes long by itself, and would leave one of two processes idle at the end.
FIRST = (
    "integration/test_demo.py",
    "distributed/test_matrix.py",
    "integration/integrations/test_torchtitan.py",
    "promises/test_daemon_killed.py",
    "integration/test_bit_identity.py",
    "promises/test_bit_identity.py",
    "promises/test_interpreter_exit.py",
    "integration/test_courier.py",
)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None]:
    """Nothing that collection imports is garbage: walking through it takes as long as all the rest of it."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow, and put the longest first, by the tables."""
    for item in items:
        if _place(item.path).startswith(SLOW) and not _place(item.path).startswith(NOT_SLOW):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: _order(item.path))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Where many processes train with other projects' trainers, these are imported once for all."""
    folders = ("distributed", "examples", "integration/integrations", "integration/optimizers")
    if any(_place(item.path).startswith(folders) and item.get_closest_marker("slow") for item in session.items):
        preload_frameworks()


@cache
def _place(path: Path) -> str:
    return path.relative_to(Path(__file__).parent).as_posix()


@cache
def _order(path: Path) -> int:
    return next((i for i, first in enumerate(FIRST) if _place(path).startswith(first)), len(FIRST))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Small tensors on few cores: threads cost more than they bring, and sums keep one order."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _plain_tracebacks() -> None:
    """What the daemon's parts log in this process: rich would lay out each traceback for most of a second."""
    plain = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[*structlog.get_config()["processors"][:-1], plain])


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    """A shell starts background jobs with SIGINT ignored, and programs under test would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def transports():
    """Makes transports for `attach`, by `transports.new()`, and has those it made in their order."""
    return stand_ins.Transports()


@pytest.fixture(scope="session")
def program():
    """The path of an external program; without it the test fails in CI and is skipped elsewhere."""

    def find(name: str) -> str:
        path = shutil.which(name)
        return missing(name) if path is None else path

    return find


@pytest.fixture
def serve():
    """Start daemons that answer by scripts."""
    daemons = []

    def start(*scripts, **options):
        daemons.append(ScriptedDaemon(*scripts, **options))
        return daemons[-1]

    yield start
    for daemon in daemons:
        daemon.stop()


@pytest.fixture
def train():
    """Connect trainers that speak the wire by hand: `train(daemon, run="run")`."""
    connected = []

    def connect(to: Daemon, **hello) -> WireTrainer:
        connected.append(WireTrainer(to.grpc, **hello))
        return connected[-1]

    yield connect
    for trainer in connected:
        trainer.stop()
