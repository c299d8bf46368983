"""The states of all random number generators of a training loop, as one value for a checkpoint.

Around a probe, `curvature.state.isolation` restores them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The states of Python, NumPy, and torch on the CPU and the current accelerator.

    `torch.load` can read them with `weights_only=True`.
    """
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - the generator that users' code draws from
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "cpu": torch.get_rng_state(),
    }
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None:
        state["accelerator"] = torch.get_device_module(accelerator).get_rng_state()
    return state


def seeded_state(seed: int) -> dict[str, Any]:
    """The states that `random_state` would return after seeding every generator; the generators are not changed."""
    before = random_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - as above
    torch.default_generator.manual_seed(seed)
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None:
        torch.get_device_module(accelerator).manual_seed(seed)
    try:
        return random_state()
    finally:
        set_random_state(before)


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set every generator to the state that `random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002 - as above
    torch.set_rng_state(state["cpu"])
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and "accelerator" in state:
        torch.get_device_module(accelerator).set_rng_state(state["accelerator"])
