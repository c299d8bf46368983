"""Runs a function on several ranks, each a process of its own."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import tempfile
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import pytest
import torch

RANK = Path(__file__).with_name("rank.py")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


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
        outputs = [Path(folder, f"output{rank}") for rank in range(n)]
        command = [sys.executable, RANK, inspect.getfile(function), function.__name__, folder, str(timeout)]
        processes = [_started(command, rank, n, output) for rank, output in enumerate(outputs)]
        with ThreadPoolExecutor(n) as pool:
            try:
                done, _ = wait([pool.submit(_succeed, process) for process in processes], timeout, FIRST_EXCEPTION)
            finally:
                for process in processes:
                    process.kill()
        if len(done) < n or any(each.exception() for each in done):
            told = [
                f"--- rank {rank}: {process.returncode}\n{output.read_text()}"
                for rank, (process, output) in enumerate(zip(processes, outputs, strict=True))
            ]
            pytest.fail(f"{function.__name__} on {n} ranks, within {timeout} s\n" + "\n".join(told), pytrace=False)
        return [torch.load(f"{folder}/result{rank}", weights_only=False) for rank in range(n)]


def _started(command, rank, n, output):
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n)}
    with output.open("w") as out:
        return subprocess.Popen(command, env=os.environ | ENVIRONMENT | own, stdout=out, stderr=subprocess.STDOUT)


def _succeed(process):
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, process.args)
