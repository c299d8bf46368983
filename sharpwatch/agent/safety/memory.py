"""How much memory can still be had, by whichever bound is the nearest."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

_CGROUPS = Path("/sys/fs/cgroup")
_CACHE = ("inactive_file", "active_file", "total_inactive_file", "total_active_file")  # given up when there is need


def free(device: torch.device) -> float:
    """Bytes that can still be allocated on `device`; infinite where nothing tells."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu":
        return min([math.inf, *_address_space(), *_machine(), *_control_groups()])
    return math.inf


def given_back(device: torch.device) -> float:
    """Bytes that the program has held at its peak beyond what it holds now; 0 where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    return 0.0


def out_of_memory(error: Exception) -> bool:
    """Accelerators raise a class of their own; the CPU's allocator only a RuntimeError that says so."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def _address_space() -> Iterator[float]:
    """What `ulimit -v` leaves."""
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
    """What a container's limit leaves, or any above it: past it the kernel kills without an error to catch."""
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
            for folder in (group, *group.parents[: len(group.relative_to(root).parts)]):
                with suppress(OSError, ValueError):  # not there; "max"
                    yield int((folder / limit).read_text()) - int((folder / usage).read_text()) + _cache(folder)


def _cache(folder: Path) -> int:
    stat = (line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    sizes = {name: int(size) for name, size in stat if name in _CACHE}
    # The older kind of group tells of itself alone, and in total with those in it.
    return sum(size for name, size in sizes.items() if name.startswith("total_")) or sum(sizes.values())
