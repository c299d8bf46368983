"""One rank's process: calls a function under gloo and keeps what it returns."""

from __future__ import annotations

import atexit
import gc
import importlib.util
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def main(file, function, folder, environment, timeout):
    gc.freeze()  # as every forked process, see forked.py
    os.environ.update(environment, RESULTS=folder)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with Path(folder, f"output{rank}").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=float(timeout)))
    arguments = torch.load(f"{folder}/arguments", weights_only=False)
    torch.save(getattr(module, function)(*arguments), f"{folder}/result{rank}")
    dist.destroy_process_group()
    atexit._run_exitfuncs()  # as a program's end does, and that of a forked process does not
