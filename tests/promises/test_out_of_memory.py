"""Promise: where memory runs short, probes are what is left out; the step gets what it gets without sharpwatch.

The address space is limited as `ulimit -v` does it, so that allocations fail in earnest; only where rows are halved, a
probe says that it has failed.
"""

from __future__ import annotations

import pytest
import torch
from trainer import ROWS, Trainer

# Large weights (32 MB) and few activations: a product with the Hessian takes several times the weights. What two steps
# have taken at their height suffices for all steps. The room on top of that is for Python's objects and for what `gnb`
# keeps until the step is over, logits and their gradients (3 MB), or for the probes.
CODE = """
import resource, trainer as sizes
sizes.VOCABULARY, sizes.WIDTH = 4096, 512
trainer = Trainer(probe_every=3, probes=("gnb", "direction", "hutchinson", "lanczos"))
trainer.train(2)
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmPeak"))
resource.setrlimit(resource.RLIMIT_AS, (peak * 2**10 + ROOM * 2**20,) * 2)
trainer.train(8)
if trainer.watched is not None:
    say(reasons=[failure.reason for failure in trainer.watched.scheduler.runner.failures])
trainer.close()
"""


# Where freed tensors go back to the system, not into holes of the heap: what steps take then is the same each time.
# With holes, even the runs without sharpwatch differ by tens of megabytes.
TO_THE_SYSTEM = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}


@pytest.mark.parametrize("room", [8, 32])
def test_probes_that_find_no_memory(train, serve, room):
    daemon = serve()
    code = CODE.replace("ROOM", str(room))
    watched = train(code, address=daemon.address, fresh=True, **TO_THE_SYSTEM)
    plain = train(code, SHARPWATCH_DISABLED="1", fresh=True, **TO_THE_SYSTEM)
    assert (watched.end(), plain.end()) == (0, 0)
    assert watched.steps == plain.steps
    assert len(plain.steps) == 10
    shortages = ("can't allocate memory", "no copy of the weights")  # found, or foreseen
    assert any(shortage in reason for shortage in shortages for reason in watched.latest("reasons"))
    assert watched.latest("dropped") == {}
    assert daemon.sequences == list(range(1, 12))
    reported = {failure.probe: failure.count for failure in daemon.samples[-1].health.probe_failures}
    assert reported == watched.latest("failed_probes")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_rows_are_halved_until_none_is_left(transports, monkeypatch, error):
    seen = []

    def hungry(*arguments, **_):
        seen.append(arguments[2].rows)
        raise error

    monkeypatch.setattr("sharpwatch.agent.probes.builtin.direction_probe", hungry)
    trainer = Trainer(probes=("direction",), probe_every=1, transport=transports.new())
    trainer.train(8)
    trainer.watch.close()
    assert seen == [ROWS // 4, ROWS // 8]
    (failure,) = transports[0].samples[-1].health.probe_failures
    assert (failure.probe, failure.count, failure.disabled) == ("direction", 2, True)
