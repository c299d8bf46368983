"""What happens when a probe runs out of memory, and how the step is kept from doing so because of a probe.

Before a probe: weights are copied, a forward is tried and sharded ranks probe only if memory for it is left
(`copy_weights`, `require_room_for_copies`, `has_room_for_sharded_probe`). When a probe runs out of memory, it gets half
as many rows the next time; if that leaves none, it is given up (`halve_rows`).
"""

from __future__ import annotations

import math
import os
import resource
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from sharpwatch.curvature.parameters.shards import local_tensor
from sharpwatch.errors import ProbeError

# In copies of the weights: the copy itself, and twice the step's temporaries; in the first step also Adam's moments.
_STEP_NEEDS = 3
_FIRST_STEP_NEEDS = 5
# In copies of the gradients: the probe's own, and what it takes to gather and sum them.
_SHARDED_PROBE_NEEDS = 3
_CGROUPS = Path("/sys/fs/cgroup")
_CACHE = ("inactive_file", "active_file", "total_inactive_file", "total_active_file")  # the kernel frees it on demand


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether `error` says so: accelerators have a class of their own, the CPU's allocator a RuntimeError."""
    # The CPU's allocator has no class of its own; its name in the message is all there is.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def halve_rows(halvings: Counter[str], probe: str, rows: int) -> bool:
    """Has a probe that ran out of memory get half as many rows from now on.

    Args:
        halvings: How often the rows of each probe have been halved; changed in place.
        probe: The probe's name.
        rows: How many rows it ran out of memory with.

    Returns:
        Whether it must be given up, because it had only one row.
    """
    halvings[probe] += 1
    return rows <= 1


def copy_weights(weights: Mapping[str, Tensor], optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Copies the weights before a step.

    Raises:
        ProbeError: The copy would leave so little memory that the step itself could fail.
    """
    copies = _STEP_NEEDS if all(one.state for one in optimizers) else _FIRST_STEP_NEEDS
    device = _device(weights)
    if free(device) < copies * _bytes(weights):
        raise ProbeError(f"no copy of the weights: the step may need what is left of the memory of {device}")
    return {name: weight.clone() for name, weight in weights.items()}


def require_room_for_copies(weights: Mapping[str, Tensor]) -> None:
    """Raises `ProbeError` if there is no memory for copies of the weights to try a forward on."""
    device = _device(weights)
    if free(device) < _bytes(weights):
        raise ProbeError(f"no copy of the weights to try a forward on: memory of {device} is short")


def has_room_for_sharded_probe(parameters: Iterable[nn.Parameter]) -> bool:
    """Returns whether memory is left for as much as the step has had at its peak, and for gradients beside its own.

    A probe has fewer rows than the step. It must not run out of memory on one rank, where the others would wait for it.
    """
    shards = [local_tensor(parameter) for parameter in parameters]
    device = shards[0].device
    return free(device) >= given_back(device) + _SHARDED_PROBE_NEEDS * sum(shard.nbytes for shard in shards)


def free(device: torch.device) -> float:
    """Returns how many bytes can still be allocated on `device`, by the nearest limit; infinite if none is known."""
    if device.type == "cuda":
        # What torch's allocator has cached is taken from the driver, but free for the next tensor.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu":
        return min([math.inf, *_address_space(), *_machine(), *_control_groups()])
    return math.inf


def given_back(device: torch.device) -> float:
    """Returns how many bytes more the program has held at its peak than now; 0 where that is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    return 0.0


def _device(weights: Mapping[str, Tensor]) -> torch.device:
    return next(iter(weights.values())).device


def _bytes(weights: Mapping[str, Tensor]) -> int:
    return sum(weight.nbytes for weight in weights.values())


def _address_space() -> Iterator[float]:
    """Bytes left under `ulimit -v`."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        with suppress(OSError):
            yield limit - int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf(
                "SC_PAGESIZE"
            )


def _machine() -> Iterator[float]:
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024


def _control_groups() -> Iterator[float]:
    """Bytes left under the memory limits of the container. Beyond them the kernel kills, with no error to catch."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                root, limit, usage = _CGROUPS, "memory.max", "memory.current"
            elif "memory" in controllers.split(","):
                root, limit, usage = _CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            else:
                continue
            group = root / path.lstrip("/")
            # A limit may be set on any group above, and each of them counts all its children.
            for folder in (group, *group.parents[: len(group.relative_to(root).parts)]):
                with suppress(OSError, ValueError):  # no such file; no number, but "max"
                    yield int((folder / limit).read_text()) - int((folder / usage).read_text()) + _cache(folder)


def _cache(folder: Path) -> int:
    stat = (line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    sizes = {name: int(size) for name, size in stat if name in _CACHE}
    # cgroups v1 count themselves alone under the plain names, and with their children under "total_".
    return sum(size for name, size in sizes.items() if name.startswith("total_")) or sum(sizes.values())
