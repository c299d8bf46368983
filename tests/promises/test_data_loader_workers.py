"""Promise: with a DataLoader's workers, forked or spawned, the run is the same, and so is the end of one that dies."""

from __future__ import annotations

CODE = """
torchs_handler = None
shown = []


def show_once(number, frame):
    # torch's handler raises at every SIGCHLD that comes after a worker's death, also where the test tells of the first.
    if not shown:
        try:
            torchs_handler(number, frame)
        except RuntimeError:
            shown.append(number)
            raise


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
            try:
                for tokens in loader:
                    if torchs_handler is None:
                        torchs_handler = signal.signal(signal.SIGCHLD, show_once)
                    os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)
                    trainer.step_on(tokens)
            finally:
                shown.append("by whatever came first")  # from here on the handler is silent
        except (RuntimeError, OSError) as error:
            say(died=str(error))
        loader._iterator._shutdown_workers()
        trainer.close()
        shown.clear()
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
    assert len(watched.all_values("died")) == len(plain.all_values("died")) == 2
    assert watched.all_values("swallowed") == [0] * 2
    assert watched.all_values("dropped") == [{}] * 2
    assert [hello.run for hello in daemon.hellos] == ["run"] * 2  # one of each trainer, none of a worker's
    for samples, run in zip(daemon.streams, watched.runs, strict=True):
        # A step may have ended, and the signal's handler raise before it is reported.
        assert len(run) + 1 <= len(samples) <= len(run) + 2
        assert [sample.sequence for sample in samples] == list(range(1, len(samples) + 1))
