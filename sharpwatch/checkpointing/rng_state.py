"""The state of every random number generator a training loop draws from, as a value that a checkpoint can hold."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Python's, NumPy's, torch's on the CPU and on the current accelerator; read with `weights_only`."""
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


def seeded(seed: int) -> dict[str, Any]:
    """The state that every generator has after `seed`; they themselves stay where they are."""
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
    """Put every generator back to where it was at `random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002 - as above
    torch.set_rng_state(state["cpu"])
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and "accelerator" in state:
        torch.get_device_module(accelerator).set_rng_state(state["accelerator"])
