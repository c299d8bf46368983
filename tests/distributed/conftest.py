"""Runs a function on several ranks, each a process of its own."""

from __future__ import annotations

import inspect
import os
import sys
import tempfile
import time
from multiprocessing import connection
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import rank
from forked import FORKS


@pytest.fixture(scope="session")
def ranks():
    """`ranks(function, n, *arguments, timeout=60)`: what `function(*arguments)` returned on each of n ranks.

    The function stands at the top of its file, which each rank loads; it finds a gloo process group. The test fails,
    with what every rank has printed, once one has failed or `timeout` seconds have passed; then all are killed.
    """
    return run


def run(function, n, *arguments, timeout=60):
    with tempfile.TemporaryDirectory() as folder:
        torch.save(arguments, f"{folder}/arguments")
        what = inspect.getfile(function), function.__name__, folder
        processes = [FORKS.Process(target=rank.main, args=(*what, _environment(i, n), timeout)) for i in range(n)]
        try:
            for process in processes:
                process.start()
            succeeded = _await(processes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
        if not succeeded:
            outputs = [f"--- rank {i}: {process.exitcode}\n{_output(folder, i)}" for i, process in enumerate(processes)]
            pytest.fail(f"{function.__name__} on {n} ranks, within {timeout} s\n" + "\n".join(outputs), pytrace=False)
        return [torch.load(f"{folder}/result{i}", weights_only=False) for i in range(n)]


def _environment(i, n):
    own = {"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(n)}
    return os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | own


def _output(folder, i):
    path = Path(folder, f"output{i}")
    return path.read_text() if path.exists() else ""


def _await(processes, deadline):
    """Whether all end well before the deadline; the first that does not ends the wait."""
    running = {process.sentinel: process for process in processes}
    while running:
        ended = connection.wait(list(running), max(0.0, deadline - time.monotonic()))
        if not ended or any(running.pop(sentinel).exitcode for sentinel in ended):
            return False
    return True
