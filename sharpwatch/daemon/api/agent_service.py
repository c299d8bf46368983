"""AgentService: one session per attempt; hello, samples in, acknowledgements, refusals and commands out.

Messages are taken as bytes and parsed here, so that one that does not parse is refused and counted like any other bad
one, and a good one goes into the journal as it came.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Literal

import grpc
import structlog
from google.protobuf.message import DecodeError

from sharpwatch import wire
from sharpwatch._version import __version__
from sharpwatch.daemon.api.conversions import command_message
from sharpwatch.daemon.exporter.metrics import OwnMetrics
from sharpwatch.daemon.ingest.hello import RunHello, read_hello
from sharpwatch.daemon.ingest.queue import QueuedSample, SampleQueue
from sharpwatch.daemon.ingest.samples import Reading, read_sample
from sharpwatch.daemon.pipeline import Pipeline
from sharpwatch.daemon.records import Decision
from sharpwatch.daemon.runs.runs import Attempt, Run, Runs
from sharpwatch.errors import WireError
from sharpwatch.v1 import agent_pb2

log = structlog.get_logger(__name__)

MAX_REASON = 1_000  # characters of what is told of a bad message, which may quote it
MAX_OUTGOING = 1_024  # refusals and commands waiting for a client that does not read
Context = grpc.aio.ServicerContext[bytes, agent_pb2.SessionResponse]


class SessionEndedError(Exception):
    """This session is over, with the status the client is to see."""

    def __init__(self, code: grpc.StatusCode, reason: str) -> None:
        self.code = code
        super().__init__(reason)


class Session:
    """What goes out to one attempt: the newest acknowledgement, and a bounded queue of all else."""

    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt
        self._responses: deque[agent_pb2.SessionResponse] = deque()
        self._acknowledged = 0
        self._end: SessionEndedError | None = None
        self._finished = self._at_once = False
        self._wake = asyncio.Event()

    def acknowledge(self, sequence: int) -> None:
        """Say that all up to `sequence` is journalled; a later call overtakes an earlier one."""
        self._acknowledged = max(self._acknowledged, sequence)
        self._wake.set()

    def send(self, response: agent_pb2.SessionResponse) -> None:
        """Queue a response; a client that lets too many pile up is ended."""
        if len(self._responses) >= MAX_OUTGOING:
            self.end(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_OUTGOING} responses were not read")
            return
        self._responses.append(response)
        self._wake.set()

    def refuse(self, sequence: int, code: str, reason: str) -> None:
        """Tell that the sample `sequence` will never be taken."""
        refusal = agent_pb2.Refusal(sequence=sequence, code=code, reason=reason)
        self.send(agent_pb2.SessionResponse(refusal=refusal))

    def end(self, code: grpc.StatusCode, reason: str) -> None:
        """End the call with a status, after what is queued."""
        self._end = self._end or SessionEndedError(code, reason)
        self._wake.set()

    def finish(self, *, at_once: bool = False) -> None:
        """End the call in order, once all that the client sent is answered, or with what is queued now."""
        self._finished, self._at_once = True, at_once
        self._wake.set()

    async def outgoing(self) -> AsyncIterator[agent_pb2.SessionResponse]:
        """Responses as they come; raises `SessionEndedError` where the session is ended."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._responses:
                yield self._responses.popleft()
            if self._acknowledged:
                sequence, self._acknowledged = self._acknowledged, 0
                yield agent_pb2.SessionResponse(ack=agent_pb2.Ack(sequence=sequence))
            if self._end is not None:
                raise self._end
            if self._finished and (self._at_once or self.attempt.cursor.idle) and not self._wake.is_set():
                return


class Sessions:
    """The live sessions, one an attempt."""

    def __init__(self, metrics: OwnMetrics) -> None:
        self._metrics = metrics
        self._live: dict[str, Session] = {}

    def open(self, attempt: Attempt) -> Session:
        """A session for `attempt`; one it already had is ended."""
        session = Session(attempt)
        older = self._live.get(attempt.manifest.attempt)
        if older is not None:
            older.end(grpc.StatusCode.ABORTED, "a newer session of this attempt took over")
        self._live[attempt.manifest.attempt] = session
        self._metrics.sessions.set(len(self._live))
        return session

    def close(self, session: Session) -> bool:
        """Take `session` out; False where a newer one has its place."""
        identity = session.attempt.manifest.attempt
        if self._live.get(identity) is not session:
            return False
        del self._live[identity]
        self._metrics.sessions.set(len(self._live))
        return True

    def settled(self, attempt: Attempt, sequence: int) -> None:
        """Acknowledge, where the attempt is connected."""
        session = self._live.get(attempt.manifest.attempt)
        if session is not None:
            session.acknowledge(sequence)

    def evicted(self, entry: QueuedSample) -> None:
        """The queue dropped `entry`: count it and tell its agent not to send it again."""
        entry.attempt.cursor.forget(entry.reading.sequence)
        self._metrics.refused.labels("overflow").inc()
        session = self._live.get(entry.attempt.manifest.attempt)
        if session is not None:
            session.refuse(entry.reading.sequence, "overflow", "the daemon's queue is full")

    def command(self, run: Run, decision: Decision) -> None:
        """Send a decision's command to the run's newest attempt, where it is connected."""
        session = self._live.get(run.attempt.manifest.attempt)
        if session is not None:
            log.info("command_sent", run=run.name, decision=decision.id, action=decision.action)
            session.send(agent_pb2.SessionResponse(command=command_message(decision)))

    def drain(self, reason: str, retry_after: float) -> None:
        """Send everyone away in order."""
        response = agent_pb2.SessionResponse(drain=agent_pb2.Drain(reason=reason, retry_after_seconds=retry_after))
        for session in self._live.values():
            session.send(response)
            session.finish(at_once=True)


class AgentService:
    """The trainers' side of the daemon."""

    def __init__(
        self, *, runs: Runs, intake: SampleQueue, pipeline: Pipeline, sessions: Sessions, metrics: OwnMetrics
    ) -> None:
        self._runs = runs
        self._intake = intake
        self._pipeline = pipeline
        self._sessions = sessions
        self._metrics = metrics
        self.draining = False

    def handlers(self) -> grpc.GenericRpcHandler[bytes, agent_pb2.SessionResponse]:
        """What to register with the server."""
        session = grpc.stream_stream_rpc_method_handler(
            self.session,
            request_deserializer=None,
            response_serializer=agent_pb2.SessionResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler("sharpwatch.v1.AgentService", {"Session": session})

    async def session(
        self, requests: AsyncIterator[bytes], context: Context
    ) -> AsyncIterator[agent_pb2.SessionResponse]:
        """One stream, from Hello to the client's end or the daemon's."""
        try:
            attempt, run = await self._greet(requests)
        except SessionEndedError as error:
            self._metrics.refused.labels("hello").inc()
            log.warning("session_refused", peer=context.peer(), reason=str(error))
            await context.abort(error.code, str(error))
        session = self._sessions.open(attempt)
        if attempt is run.attempt:
            run.show(phase="running")
        log.info("session_opened", run=run.name, attempt=attempt.manifest.attempt, peer=context.peer())
        reader = asyncio.create_task(self._read(requests, session))
        try:
            yield self._welcome(attempt)
            if attempt is run.attempt:
                for decision in list(run.outstanding.values()):
                    self._sessions.command(run, decision)
            async for response in session.outgoing():
                yield response
        except SessionEndedError as error:
            log.warning("session_ended", run=run.name, attempt=attempt.manifest.attempt, reason=str(error))
            await context.abort(error.code, str(error))
        finally:
            reader.cancel()
            self._leave(session, run)

    def _welcome(self, attempt: Attempt) -> agent_pb2.SessionResponse:
        welcome = agent_pb2.Welcome(
            daemon_version=__version__,
            acknowledged_sequence=attempt.cursor.journalled,
            max_message_bytes=wire.MAX_MESSAGE_BYTES,
        )
        return agent_pb2.SessionResponse(welcome=welcome)

    def _leave(self, session: Session, run: Run) -> None:
        if self._sessions.close(session) and session.attempt is run.attempt:
            if run.phase == "running":
                run.show(phase="silent", last_seen_at=time.time())
            log.info("session_closed", run=run.name, attempt=session.attempt.manifest.attempt, phase=run.phase)

    async def _greet(self, requests: AsyncIterator[bytes]) -> tuple[Attempt, Run]:
        if self.draining:
            raise SessionEndedError(grpc.StatusCode.UNAVAILABLE, "the daemon is stopping")
        try:
            message = await anext(requests)
        except StopAsyncIteration:
            raise SessionEndedError(grpc.StatusCode.INVALID_ARGUMENT, "no Hello") from None
        try:
            _check_size(message)
            request = _parse(message, "hello")
            return await self._admit(read_hello(request.hello), request.hello.SerializeToString())
        except WireError as error:
            raise SessionEndedError(grpc.StatusCode.INVALID_ARGUMENT, f"{error.code}: {_said(error)}") from error

    async def _admit(self, manifest: RunHello, hello: bytes) -> tuple[Attempt, Run]:
        owner = self._runs.owner(manifest.attempt)
        if owner is not None and owner != manifest.run:
            raise WireError("wrong_run", f"attempt {manifest.attempt} belongs to run {owner}")
        held = self._runs.get(manifest.run)
        if held is not None and held.attempt.manifest.training_job != manifest.training_job:
            other = held.attempt.manifest.training_job
            raise WireError("wrong_run", f"run {manifest.run} belongs to training job {other}")
        known, run = self._runs.attempt(manifest.run, manifest.attempt), self._runs.get(manifest.run)
        if known is not None and run is not None:
            if not known.manifest.same_blocks(manifest):
                raise WireError("malformed", f"attempt {manifest.attempt} said a Hello of other blocks before")
            return known, run
        attempt = Attempt(manifest, hello)
        now = time.time()
        run = self._runs.begin(attempt, now)
        if run is None:
            raise SessionEndedError(grpc.StatusCode.RESOURCE_EXHAUSTED, "as many runs as the daemon holds are live")
        await self._pipeline.register(attempt, now)
        return attempt, run

    async def _read(self, requests: AsyncIterator[bytes], session: Session) -> None:
        try:
            await self._read_all(requests, session)
        except Exception:  # a session must not stand there unheard for our mistake; counted
            self._metrics.internal_errors.labels("session").inc()
            log.exception("session_failed", run=session.attempt.manifest.run)
            session.end(grpc.StatusCode.INTERNAL, "the daemon failed on a message; its log says more")

    async def _read_all(self, requests: AsyncIterator[bytes], session: Session) -> None:
        async for message in requests:
            try:
                _check_size(message)
            except WireError as error:
                self._metrics.refused.labels(error.code).inc()
                session.end(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{error.code}: {error}")
                return
            self._take(message, session)
        session.finish()

    def _take(self, message: bytes, session: Session) -> None:
        received_at = time.monotonic()
        self._metrics.received.inc()
        sequence = 0
        attempt = session.attempt
        try:
            request = _parse(message, "sample")
            sequence = request.sample.sequence
            reading = read_sample(attempt.manifest, request.sample)
            place = self._place(attempt, reading)
        except WireError as error:
            self._metrics.refused.labels(error.code).inc()
            reason = _said(error)
            log.warning("sample_refused", run=attempt.manifest.run, sequence=sequence, code=error.code, reason=reason)
            session.refuse(sequence, error.code, reason)
            return
        if place == "new":
            self._intake.put(QueuedSample(attempt, reading, message, received_at))
        elif place == "journalled":
            session.acknowledge(attempt.cursor.journalled)

    def _place(self, attempt: Attempt, reading: Reading) -> str:
        run = self._runs.get(attempt.manifest.run)
        if run is None:
            raise WireError("unknown_run", f"run {attempt.manifest.run} was given up for newer ones")
        return attempt.cursor.judge(reading.sequence, reading.step, restored=reading.restored)


def _said(error: WireError) -> str:
    """What a message is refused for, short enough for a client to take it."""
    return str(error)[:MAX_REASON]


def _check_size(message: bytes) -> None:
    if len(message) > wire.MAX_MESSAGE_BYTES:
        raise WireError("oversized", f"{len(message)} bytes, at most {wire.MAX_MESSAGE_BYTES}")


def _parse(message: bytes, expected: Literal["hello", "sample"]) -> agent_pb2.SessionRequest:
    try:
        request = agent_pb2.SessionRequest.FromString(message)
    except DecodeError as error:
        raise WireError("malformed", f"not a SessionRequest: {error}") from error
    if not request.HasField(expected):
        raise WireError("malformed", "the first message must be a Hello, and all others Samples")
    return request
