from __future__ import annotations

import math

import pytest
import torch

from sharpwatch.agent.probes import out_of_memory as memory

CPU = torch.device("cpu")


def test_an_accelerator_has_what_is_free_and_what_its_allocator_holds(monkeypatch):
    for name, value in (("memory_reserved", 70), ("memory_allocated", 40), ("mem_get_info", (5, 100))):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert memory.free(torch.device("cuda")) == 35


def test_where_nothing_tells_there_is_no_bound(monkeypatch):
    assert memory.free(torch.device("meta")) == math.inf
    assert memory.free(CPU) > 0
    monkeypatch.setattr(memory, "Path", lambda _: memory._CGROUPS / "nothing")
    assert memory.free(CPU) == math.inf


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Write files of a tree of control groups; the kernel's own in /proc say that we are in a/b."""

    def make(own, files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (tmp_path / "own").write_text(own)
        monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
        monkeypatch.setattr(memory, "Path", lambda _: tmp_path / "own")
        return list(memory._control_groups())

    return make


def test_a_container_has_what_its_group_and_those_above_leave_it(groups):
    found = groups(
        "1:name=systemd:/x\n0::/a/b\n",
        {
            "a/b/memory.max": "1000\n",
            "a/b/memory.current": "700\n",
            "a/b/memory.stat": "anon 500\ninactive_file 40\nactive_file 60\n",
            "a/memory.max": "max\n",
            "a/memory.current": "800\n",
            "memory.max": "2000\n",
            "memory.current": "1800\n",
            "memory.stat": "inactive_file 1\n",
        },
    )
    assert found == [400, 201]


def test_the_older_kind_of_group(groups):
    found = groups(
        "4:cpu,memory:/a\n",
        {
            "memory/a/memory.limit_in_bytes": "1000\n",
            "memory/a/memory.usage_in_bytes": "700\n",
            "memory/a/memory.stat": "inactive_file 1\ntotal_inactive_file 40\ntotal_active_file 60\n",
        },
    )
    assert found == [400]


def test_what_the_cpus_allocator_raises_is_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert memory.is_out_of_memory(caught.value)
    assert memory.is_out_of_memory(MemoryError())
    assert not memory.is_out_of_memory(RuntimeError("another"))
