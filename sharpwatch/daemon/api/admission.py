"""Which trainer may open a session: one at a time for each run, and a bounded number for each client.

A live run stays with its trainer. Another attempt of the run is refused until that trainer has left, or was not heard
for a while (`ingest.hello.Presence`); its agent tries again every few seconds, so that a restarted trainer is watched
soon. It has to show the secret by which its first session was opened, and no attempt id is ever told to a client.

A run without a live trainer belongs to the credential that opened it, so that nobody else takes its name while its
trainer restarts. Without credentials nobody can be told apart: then any trainer of the run's job may have it. A name is
held by a sample, not by a Hello alone: who only names runs holds nobody up once gone.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import grpc

from sharpwatch.daemon.api.auth import Authorizer, Caller
from sharpwatch.daemon.exporter.own_metrics import SessionRefusal
from sharpwatch.daemon.ingest.hello import Attempt, Claim, RunHello
from sharpwatch.daemon.runs.run import Run, Runs
from sharpwatch.errors import WireError
from sharpwatch.v1 import agent_pb2

MAX_CLIENT_RUNS = 256  # live at a time
DELIVERY_SECONDS = 30.0  # that a replaced attempt has to send what it still holds
Admitted = tuple[Attempt, Run]


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
        authorizer: Knows which credentials there are.
    """

    def __init__(self, runs: Runs, count_sessions: Callable[[str], int], authorizer: Authorizer) -> None:
        self._runs = runs
        self._authorizer = authorizer
        self._count_sessions = count_sessions

    def admit(self, hello: RunHello, sent: agent_pb2.Hello, caller: Caller, client: str, now: float) -> Admitted:
        """Admits an attempt: a new one, or one whose agent connects again.

        The run, and the attempt, must have been brought back from the journal where that has them.

        Args:
            hello: Its Hello.
            sent: The same as it came.
            caller: Who sends it.
            client: Who connects, by `client_of`.
            now: Monotonic seconds.

        Returns:
            The attempt and its run. It is the newest of the run, unless it only delivers what it still holds.

        Raises:
            RefusedError: Another trainer has the run, or there are too many runs.
            WireError: The run or the attempt is another's, or has other blocks.
        """
        claim = _claim(sent, caller)
        self._drop_empty(hello, caller, now)
        run, known = self._runs.get(hello.run), self._runs.attempt(hello.run, hello.attempt)
        self._check_names(hello, run, known)
        if known is not None:
            _check_return(known, claim)
        if run is not None and known is not None and (known is run.attempt or self.may_deliver(known, run, now)):
            return known, run
        if run is not None and not self._may_take(run, caller):
            raise RefusedError("held_run", grpc.StatusCode.PERMISSION_DENIED, _belongs(run))
        if run is not None and run.is_live(now):
            raise RefusedError("live_run", grpc.StatusCode.ALREADY_EXISTS, _held(run.attempt.hello))
        if self._count_sessions(client) >= MAX_CLIENT_RUNS:
            text = f"a client may have {MAX_CLIENT_RUNS} live runs, and {client} has as many"
            raise RefusedError("client_runs", grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        attempt = Attempt(hello, _stored(sent, claim)) if known is None else known
        attempt.claim, attempt.began_at = claim, now
        run = self._runs.begin(attempt, time.time())
        if run is None:
            text = "the daemon holds as many live runs as it can"
            raise RefusedError("runs", grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        return attempt, run

    def release(self, run: Run) -> None:
        """Gives the name of a run to the next trainer of its job that asks for it, whoever it is."""
        for attempt in self._runs.attempts(run.name):
            attempt.released = True
            attempt.presence.left()

    def may_deliver(self, attempt: Attempt, run: Run, now: float) -> bool:
        """Returns whether an attempt that a newer one has replaced may still send samples."""
        return attempt is not run.attempt and now - run.attempt.began_at < DELIVERY_SECONDS

    def replaced(self, attempt: Attempt, now: float) -> str:
        """Returns why the session of `attempt` must end, as a newer attempt has its run; empty if it need not."""
        run = self._runs.get(attempt.hello.run)
        if run is None or attempt is run.attempt or self.may_deliver(attempt, run, now):
            return ""
        return _held(run.attempt.hello)

    def _drop_empty(self, hello: RunHello, caller: Caller, now: float) -> None:
        """Forgets a run that somebody else has named and never trained, so that it does not keep its name."""
        run = self._runs.get(hello.run)
        if run is None or run.snapshot.step is not None or run.is_live(now):
            return
        # Samples that are too old are not kept; that they came is.
        if run.controller.newest_revision or any(each.cursor.journalled for each in self._runs.attempts(run.name)):
            return
        if run.attempt.hello.training_job != hello.training_job or not self._may_take(run, caller):
            self._runs.drop(run.name)

    def _may_take(self, run: Run, caller: Caller) -> bool:
        """Whether a new trainer of `caller` may go on with a run once it has no live one."""
        holder = run.attempt.claim.credential
        if not holder or run.attempt.released or caller.may("operator"):
            return True
        # A credential that is gone for good holds nothing: its successor has another name.
        return holder == caller.name or not self._authorizer.knows(holder)

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


def _claim(sent: agent_pb2.Hello, caller: Caller) -> Claim:
    # An operator may speak for all, and so holds no run against an agent.
    credential = "" if caller.may("operator") else caller.name
    return Claim(credential, hashlib.sha256(sent.secret).digest() if sent.secret else b"")


def _stored(sent: agent_pb2.Hello, claim: Claim) -> bytes:
    """The Hello as the journal keeps it: with the hash in place of the secret."""
    stored = agent_pb2.Hello()
    stored.CopyFrom(sent)
    stored.secret, stored.secret_sha256, stored.credential = b"", claim.secret_sha256, claim.credential
    return stored.SerializeToString()


def _check_return(known: Attempt, claim: Claim) -> None:
    """Refuses an attempt that comes back, if it is not the same trainer, or an operator has released its run."""
    run = known.hello.run
    if known.released:
        text = f"run {run} was released by an operator; start the trainer anew, or give the run another name"
        raise RefusedError("held_run", grpc.StatusCode.PERMISSION_DENIED, text)
    if not known.claim.is_same_trainer(claim):
        text = f"run {run} has another trainer, whose secret was not shown"
        raise RefusedError("held_run", grpc.StatusCode.PERMISSION_DENIED, text)


def _belongs(run: Run) -> str:
    return (
        f"run {run.name} belongs to {run.attempt.claim.credential}; give this run another name, "
        f"or have an operator release it: sharpwatch release {run.name}"
    )


def _held(hello: RunHello) -> str:
    # Without times or numbers: the agent logs each text once.
    host = f" on host {hello.host}" if hello.host else ""
    return (
        f"run {hello.run} has a live trainer already{host}; end that one, or give this run another name. "
        "A trainer that ended without a farewell keeps its run for 30 s at most"
    )
