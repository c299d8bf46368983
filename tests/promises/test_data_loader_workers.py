"""Promise: with a DataLoader's workers, forked or spawned, the run is the same, and so is the end of one that dies."""

from __future__ import annotations

CODE = """
if __name__ == "__main__":
    for context in ("fork", "spawn"):
        trainer = Trainer()
        loader = torch.utils.data.DataLoader(
            Rows(), ROWS, shuffle=True, num_workers=2, multiprocessing_context=context, persistent_workers=True
        )
        for _ in range(2):
            for tokens in loader:
                trainer.step_on(tokens)
        try:
            for tokens in loader:
                os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)
                trainer.step_on(tokens)
        except (RuntimeError, OSError) as error:  # as it happens to show
            say(died=str(error))
        try:
            loader._iterator._shutdown_workers()
        except (RuntimeError, OSError):
            pass  # torch's signal handler tells of the death once more; from now on it is silent
        trainer.close()
"""


def test_workers_by_fork_and_by_spawn(train, serve):
    daemon = serve()
    watched = train(CODE, address=daemon.address)
    plain = train(CODE, SHARPWATCH_DISABLED="1")
    assert (watched.end(), plain.end()) == (0, 0)
    for run, plain_run in zip(watched.runs, plain.runs, strict=True):
        assert len(plain_run) >= 20
        # When the death of a worker shows is the operating system's matter.
        assert all(step == other for step, other in zip(run, plain_run, strict=False))
    assert len(watched.all_said("died")) == len(plain.all_said("died")) == 2
    assert watched.all_said("swallowed") == [0] * 2
    assert watched.all_said("dropped") == [{}] * 2
    assert [hello.run for hello in daemon.hellos] == ["run"] * 2  # one of each trainer, none of a worker's
    for samples, run in zip(daemon.streams, watched.runs, strict=True):
        # A step may have ended, and the signal's handler raise before it is told of.
        assert len(run) + 1 <= len(samples) <= len(run) + 2
        assert [sample.sequence for sample in samples] == list(range(1, len(samples) + 1))
