"""Saves and restores the states of the random number generators: for a checkpoint, and around a probe.

A checkpoint keeps `random_state`, one value that can be written to a file. A probe runs within `rng_state_restored`,
after which the generators are as if nothing had been drawn.

Generators that are not global are restored by their owners: those of a model's modules by
`curvature.state.snapshot.StateSnapshot`, those of a data loader by `checkpointing.resumable_loader.ResumableLoader`.
"""

from __future__ import annotations

import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# The global generators of the process, as (read, write).
_GENERATORS: Mapping[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "random": (random.getstate, random.setstate),
    "numpy": (np.random.get_state, np.random.set_state),
    "torch": (torch.get_rng_state, torch.set_rng_state),
}
# Global generators that a model or a function was seen not to use. Weak, so that a probe keeps no model alive.
_UNUSED_GENERATORS: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()
_UNDER_WAY = threading.local()  # `put_back`: for each `rng_state_restored`, the generators put back within it


def random_state() -> dict[str, Any]:
    """The states of Python, NumPy, and torch on the CPU and the current accelerator.

    `torch.load` can read them with `weights_only=True`.
    """
    # As a tensor: `weights_only` loads no arrays of NumPy's.
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
    # NumPy takes a seed of 32 bits only.
    np.random.seed(seed % 2**32)  # noqa: NPY002 - as above
    # Not `torch.manual_seed`: that seeds every accelerator, and only the current one is restored below.
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


@contextmanager
def rng_state_restored(model: nn.Module, user: object = None) -> Iterator[None]:
    """Restore the global random generators, of the process and of the model's accelerators, after the body.

    Other threads, such as one that prepares batches, draw from the process's generators too, and their draws must not
    be undone. So while there are other threads, a generator that `user` was once seen not to use is assumed to be
    theirs.

    Args:
        model: The model, for its accelerators.
        user: What the body calls: a function that draws where the model does not; by default the model.
    """
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type not in {"cpu", "meta"}}
    unused = _unused_by(model if user is None else user)
    before = {name: read() for name, (read, _) in _GENERATORS.items()}
    with ExitStack() as stack:
        for device in devices:
            backend = torch.get_device_module(device)
            stack.callback(backend.set_rng_state, backend.get_rng_state(device), device)
        put_back: set[str] = set()
        enclosing: list[set[str]] = vars(_UNDER_WAY).setdefault("put_back", [])
        enclosing.append(put_back)
        try:
            yield
        finally:
            enclosing.pop()
            for name, (read, write) in _GENERATORS.items():
                if _equal_states(read(), before[name]):
                    unused.update({name} - put_back)
                elif name not in unused or len(sys._current_frames()) == 1:  # noqa: SLF001 - as `threading.active_count`
                    write(before[name])
                    for each in enclosing:  # there it will look unused
                        each.add(name)


def _unused_by(user: Any) -> set[str]:
    """The generators that `user` was seen not to use; none is remembered of what can't be a key of a dict."""
    try:
        # A bound method is a new object each time.
        return _UNUSED_GENERATORS.setdefault(getattr(user, "__func__", user), set())
    except TypeError:
        return set()


def _equal_states(left: Any, right: Any) -> bool:
    """Whether two generator states are equal; each is a tensor, or a tuple that contains an array."""
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    return all(np.array_equal(x, y) for x, y in zip(left, right, strict=True))
