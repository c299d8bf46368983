"""The checked Hello of a small run, for tests of what the daemon makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sharpwatch.daemon.ingest.hello import RunHello


def run_hello(parameters: Mapping[tuple[str, str], int], **fields: Any) -> RunHello:
    """A Hello of layer blocks, (block, layer), with so many parameters each; `fields` are those that matter."""
    blocks = tuple(dict.fromkeys(block for block, _ in parameters))
    usual = {
        "training_job": "job",
        "run": "run",
        "attempt": "a",
        "optimizer": "AdamW",
        "control": "lr",
        "can_roll_back": True,
        "takes_update_intervals": True,
        "lr_bounds": (0.1, 10),
        "initial_step": 0,
        "seed": 0,
        "sketch_size": 64,
        "host": "h",
        "agent_version": "0.1.0",
    }
    return RunHello(
        layer_blocks=tuple(parameters),
        parameters=np.array([*parameters.values()]),
        block_of=np.array([blocks.index(block) for block, _ in parameters]),
        blocks=blocks,
        **usual | fields,
    )
