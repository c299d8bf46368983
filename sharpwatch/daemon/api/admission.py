"""Which trainer may open a session: one at a time for each run, and a bounded number for each client.

A live run stays with its trainer. Another attempt of the run is refused until that trainer has left, or was not heard
for a while (`ingest.hello.Presence`); its agent tries again every few seconds, so that a restarted trainer is watched
soon. No attempt id is ever told to a client: whoever knows it is taken for the trainer.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import grpc

from sharpwatch.daemon.exporter.own_metrics import SessionRefusal
from sharpwatch.daemon.ingest.hello import Attempt, RunHello
from sharpwatch.daemon.runs.run import Run, Runs
from sharpwatch.errors import WireError

MAX_CLIENT_RUNS = 256  # live at a time
DELIVERY_SECONDS = 30.0  # that a replaced attempt has to send what it still holds


class RefusedError(Exception):
    """No session is opened: `reason` is counted, and the client sees `code` and the text."""

    def __init__(self, reason: SessionRefusal, code: grpc.StatusCode, text: str) -> None:
        self.reason = reason
        self.code = code
        super().__init__(text)


def client_of(peer: str, hello: RunHello) -> str:
    """Returns what tells clients apart: the peer's address, and the host that the agent names.

    Args:
        peer: The peer as gRPC has it, such as `ipv4:127.0.0.1:4711` or `unix:`.
        hello: The Hello.
    """
    # Without the port, which is another one for each connection. Hosts behind tunnels all come from loopback.
    host = peer if peer.startswith("unix:") else peer.rpartition(":")[0]
    return f"{host} {hello.host}"


class Admission:
    """Admits attempts to runs.

    Args:
        runs: The runs that the daemon holds.
        count_sessions: Returns how many sessions a client has open.
    """

    def __init__(self, runs: Runs, count_sessions: Callable[[str], int]) -> None:
        self._runs = runs
        self._count_sessions = count_sessions

    def admit(self, hello: RunHello, message: bytes, client: str, now: float) -> tuple[Attempt, Run]:
        """Admits an attempt: a new one, or one whose agent connects again.

        The run, and the attempt, must have been brought back from the journal where that has them.

        Args:
            hello: Its Hello.
            message: The bytes of that.
            client: Who connects, by `client_of`.
            now: Monotonic seconds.

        Returns:
            The attempt and its run. It is the newest of the run, unless it only delivers what it still holds.

        Raises:
            RefusedError: Another trainer has the run, or there are too many runs.
            WireError: The run or the attempt is another's, or has other blocks.
        """
        run, known = self._runs.get(hello.run), self._runs.attempt(hello.run, hello.attempt)
        self._check_names(hello, run, known)
        if run is not None and known is not None and (known is run.attempt or self.may_deliver(known, run, now)):
            return known, run
        if run is not None and run.is_live(now):
            raise RefusedError("live_run", grpc.StatusCode.ALREADY_EXISTS, _held(run.attempt.hello))
        if self._count_sessions(client) >= MAX_CLIENT_RUNS:
            text = f"a client may have {MAX_CLIENT_RUNS} live runs, and {client} has as many"
            raise RefusedError("client_runs", grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        attempt = Attempt(hello, message) if known is None else known
        attempt.began_at = now
        run = self._runs.begin(attempt, time.time())
        if run is None:
            text = "the daemon holds as many live runs as it can"
            raise RefusedError("runs", grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        return attempt, run

    def may_deliver(self, attempt: Attempt, run: Run, now: float) -> bool:
        """Returns whether an attempt that a newer one has replaced may still send samples."""
        return attempt is not run.attempt and now - run.attempt.began_at < DELIVERY_SECONDS

    def replaced(self, attempt: Attempt, now: float) -> str:
        """Returns why the session of `attempt` must end, as a newer attempt has its run; empty if it need not."""
        run = self._runs.get(attempt.hello.run)
        if run is None or attempt is run.attempt or self.may_deliver(attempt, run, now):
            return ""
        return _held(run.attempt.hello)

    def _check_names(self, hello: RunHello, run: Run | None, known: Attempt | None) -> None:
        # The journal knows a sample by attempt and sequence, so one id in two runs would mix their samples.
        owner = self._runs.owner(hello.attempt)
        if owner is not None and owner != hello.run:
            raise WireError("wrong_run", f"attempt {hello.attempt} belongs to run {owner}")
        # Another job under the same run name would be given this one's multipliers.
        if run is not None and run.attempt.hello.training_job != hello.training_job:
            other = run.attempt.hello.training_job
            raise WireError("wrong_run", f"run {hello.run} belongs to training job {other}")
        if known is not None and not known.hello.same_blocks(hello):
            raise WireError("malformed", f"attempt {hello.attempt} sent a Hello with other blocks before")


def _held(hello: RunHello) -> str:
    # Without times or numbers: the agent logs each text once.
    host = f" on host {hello.host}" if hello.host else ""
    return (
        f"run {hello.run} has a live trainer already{host}; end that one, or give this run another name. "
        "A trainer that ended without a farewell keeps its run for 30 s at most"
    )
