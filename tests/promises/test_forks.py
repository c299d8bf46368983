"""Promise: a fork of the trainer may train on, exit, crash, close or attach: the trainer is unharmed."""

from __future__ import annotations

ACTS = {
    "trains on": "trainer.train(5); tell(trainer.digest()); os._exit(0)",
    "exits": "sys.exit(3)",
    "raises": "raise RuntimeError",
    "crashes": "os.kill(os.getpid(), signal.SIGKILL)",
    "closes": "trainer.watch.close(); os._exit(0)",
    "attaches": "trainer.watch.close(); Trainer(run='another').close(); os._exit(0)",
}
STATUS = {"trains on": 0, "exits": 3, "raises": 1, "crashes": -9, "closes": 0, "attaches": 0}
CODE = f"""
from pathlib import Path

def tell(digest):
    os.dup2(stdout, 1)
    say(child_digest=digest)

def children():
    return list(map(int, Path(f"/proc/self/task/{{os.getpid()}}/children").read_text().split()))

trainer = Trainer()
for name, act in {ACTS!r}.items():
    trainer.train(5)
    if (child := os.fork()) == 0:
        stdout = os.dup(1)
        for end in 1, 2:
            os.dup2(os.open(os.devnull, os.O_WRONLY), end)  # its steps are none of the run's
        exec(act)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    say(act=name, status=status, others=[pid for pid in children() if pid != trainer.transport.courier_pid])
trainer.train(5)
trainer.close()
say(left=children())
"""


def test_forks(train, serve, assert_unchanged, reference):
    daemon = serve()
    trainer = train(CODE, address=daemon.address)
    assert trainer.end() == 0
    assert_unchanged(trainer)
    assert dict(zip(trainer.all_values("act"), trainer.all_values("status"), strict=True)) == STATUS
    assert trainer.latest("child_digest") == reference.until(10)[-1]["digest"]
    assert not any(trainer.all_values("others"))  # neither zombies nor anything else
    assert trainer.latest("left") == []
    assert trainer.latest("swallowed") == 0
    assert trainer.latest("dropped") == {}
    assert [hello.run for hello in daemon.hellos] == ["run", "another"]
    assert [sample.sequence for sample in daemon.streams[0]] == list(range(1, len(trainer.steps) + 2))
    assert [sample.closing for sample in daemon.streams[1]] == [True]
