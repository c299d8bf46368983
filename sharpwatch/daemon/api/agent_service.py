"""AgentService: a session for each attempt. Samples come in; acknowledgements, refusals and commands go out.

Messages are received as bytes and parsed here. One that does not parse is refused and counted like any other bad one,
and a good one goes into the journal exactly as it came.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Literal

import grpc
import structlog
from google.protobuf.message import DecodeError

from sharpwatch import wire
from sharpwatch._version import __version__
from sharpwatch.common.shards import every_run
from sharpwatch.daemon.api.admission import Admission, RefusedError, client_of
from sharpwatch.daemon.api.auth import Authorizer, Caller
from sharpwatch.daemon.api.call_guard import SESSION, CallGuard
from sharpwatch.daemon.api.conversions import command_message
from sharpwatch.daemon.exporter.own_metrics import OwnMetrics, SessionRefusal
from sharpwatch.daemon.ingest.hello import Attempt, RunHello, read_hello
from sharpwatch.daemon.ingest.samples import QueuedSample, Reading, SampleQueue, read_sample
from sharpwatch.daemon.pipeline import Pipeline
from sharpwatch.daemon.records import Decision
from sharpwatch.daemon.run_loader import RunLoader
from sharpwatch.daemon.runs.run import Run, Runs
from sharpwatch.errors import NoRoomError, NotHeldError, StoreError, WireError
from sharpwatch.v1 import agent_pb2

log = structlog.get_logger(__name__)

MAX_REASON = 1_000  # characters of a refusal, which may quote the bad message
MAX_OUTGOING = 1_024  # refusals and commands that wait for a client which does not read
HEARTBEAT_SECONDS = 10.0  # a third of the silence after which a run may go to another trainer
_REVOKED_SECONDS = 2.0  # between looks for sessions whose token was revoked
LARGE_BYTES = 2**18  # of a message that is read on a thread: in the event loop it would hold up all other sessions
REFUSED_SECONDS = 0.01  # after a refused message in which no more of its session are read: they cost a sender nothing
_LOGGED = 256  # refused sessions that are remembered, as each tries again every few seconds
Context = grpc.aio.ServicerContext[bytes, agent_pb2.SessionResponse]


class SessionEndedError(Exception):
    """Ends a session with the status `code` and a reason, which the client sees."""

    def __init__(self, code: grpc.StatusCode, reason: str) -> None:
        self.code = code
        super().__init__(reason)


@dataclass(frozen=True, slots=True)
class _Received:
    """A message that was read: as it was parsed, with the sample's reading if it is one, or why it is refused."""

    request: agent_pb2.SessionRequest
    reading: Reading | None = None
    error: WireError | None = None


class Session:
    """What is to be sent to one attempt: the newest acknowledgement, and a bounded queue of all other responses."""

    def __init__(self, attempt: Attempt, client: str, caller: Caller) -> None:
        self.attempt = attempt
        self.client = client
        self.caller = caller
        self._responses: deque[agent_pb2.SessionResponse] = deque()
        self._acknowledged = 0
        self._end: SessionEndedError | None = None
        self._finished = self._at_once = False
        self._refused: set[str] = set()  # the codes of refusals that were logged
        self.refusals = 0
        self._wake = asyncio.Event()
        self.is_drained = False

    def acknowledge(self, sequence: int) -> None:
        """Sends that all samples up to `sequence` are journalled; replaces an acknowledgement that is not sent yet."""
        # A number, not a queue: the newest acknowledgement says all that earlier ones said.
        self._acknowledged = max(self._acknowledged, sequence)
        self._wake.set()

    def send(self, response: agent_pb2.SessionResponse) -> None:
        """Queues a response; ends the session if too many are unread."""
        # Ended, not dropped from: in its next session the agent sends again, and outstanding commands go out again.
        if len(self._responses) >= MAX_OUTGOING:
            self.end(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_OUTGOING} responses are unread")
            return
        self._responses.append(response)
        self._wake.set()

    def refuse(self, sequence: int, code: str, reason: str) -> None:
        """Sends that the sample `sequence` is refused, so that the agent does not send it again."""
        self.refusals += 1
        # Of each code once: the metric counts them, and whoever sends nothing else must not fill the log.
        if code not in self._refused:
            self._refused.add(code)
            run = self.attempt.hello.run
            log.warning("sample_refused", run=run, sequence=sequence, code=code, reason=reason)
        refusal = agent_pb2.Refusal(sequence=sequence, code=code, reason=reason)
        self.send(agent_pb2.SessionResponse(refusal=refusal))

    def end(self, code: grpc.StatusCode, reason: str) -> None:
        """Ends the call with a status, after what is queued."""
        self._end = self._end or SessionEndedError(code, reason)
        self._wake.set()

    def finish(self, *, at_once: bool = False) -> None:
        """Ends the call without an error, once all samples are answered or, with `at_once`, after what is queued."""
        self._finished, self._at_once = True, at_once
        self._wake.set()

    async def outgoing(self) -> AsyncIterator[agent_pb2.SessionResponse]:
        """Yields responses as they come.

        Raises:
            SessionEndedError: `end` was called.
        """
        while True:
            await self._wake.wait()
            # Cleared before the queue is read, so that what comes while a response is on its way wakes the loop again.
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
    """The live sessions, at most one for each attempt."""

    def __init__(self, metrics: OwnMetrics) -> None:
        self._metrics = metrics
        self._live: dict[str, Session] = {}

    def count(self, client: str) -> int:
        """Returns how many sessions `client` has."""
        return sum(session.client == client for session in self._live.values())

    def open(self, attempt: Attempt, client: str, caller: Caller) -> Session:
        """Opens a session for `attempt`, and ends the one that it already has."""
        session = Session(attempt, client, caller)
        older = self._live.get(attempt.hello.attempt)
        if older is not None:
            # A courier gives up a stream that is silent and connects again, before this side has noticed anything.
            older.end(grpc.StatusCode.ABORTED, "a newer session of this attempt took over")
        self._live[attempt.hello.attempt] = session
        self._metrics.sessions.set(len(self._live))
        return session

    def close(self, session: Session) -> bool:
        """Removes `session`; returns False if a newer one has replaced it."""
        identity = session.attempt.hello.attempt
        if self._live.get(identity) is not session:
            return False
        del self._live[identity]
        self._metrics.sessions.set(len(self._live))
        return True

    def acknowledge(self, attempt: Attempt, sequence: int) -> None:
        """Acknowledges all samples up to `sequence`, if the attempt is connected."""
        session = self._live.get(attempt.hello.attempt)
        if session is not None:
            session.acknowledge(sequence)

    def evicted(self, entry: QueuedSample) -> None:
        """Counts a sample that the queue dropped, and refuses it."""
        # Otherwise the session would wait for it at its end, and never close.
        entry.attempt.cursor.forget(entry.reading.sequence)
        self._metrics.refused.labels("overflow").inc()
        session = self._live.get(entry.attempt.hello.attempt)
        if session is not None:
            session.refuse(entry.reading.sequence, "overflow", "the daemon's queue is full")

    def command(self, run: Run, decision: Decision) -> None:
        """Sends the command of a decision to the newest attempt of a run, if it is connected."""
        session = self._live.get(run.attempt.hello.attempt)
        if session is not None:
            log.info("command_sent", run=run.name, decision=decision.id, action=decision.action)
            session.send(agent_pb2.SessionResponse(command=command_message(decision)))

    def end(self, run: Run, code: grpc.StatusCode, reason: str) -> None:
        """Ends the sessions of all attempts of a run."""
        for session in list(self._live.values()):
            if session.attempt.hello.run == run.name:
                session.end(code, reason)

    async def end_revoked(self, authorizer: Authorizer) -> None:
        """Ends the sessions whose token is valid no more, for ever."""
        while True:
            await asyncio.sleep(_REVOKED_SECONDS)
            for session in list(self._live.values()):
                if session.caller.sha256 and not authorizer.still_holds(session.caller):
                    text = f"the token of {session.caller.name} is valid no more"
                    session.end(grpc.StatusCode.UNAUTHENTICATED, text)

    def drain(self, reason: str, retry_after: float, of: Callable[[str], bool] = every_run) -> None:
        """Asks agents to reconnect `retry_after` seconds later, and ends their sessions.

        Args:
            reason: Why.
            retry_after: Seconds.
            of: Whether it concerns a run. What its agent still sends is not taken, and so not acknowledged.
        """
        response = agent_pb2.SessionResponse(drain=agent_pb2.Drain(reason=reason, retry_after_seconds=retry_after))
        for session in self._live.values():
            if of(session.attempt.hello.run):
                session.is_drained = True
                session.send(response)
                session.finish(at_once=True)


class AgentService:
    """Serves the agents.

    Args:
        runs: The runs that the daemon holds.
        loader: Brings back others.
        queue: Where samples are put.
        pipeline: Journals new attempts.
        sessions: The live sessions.
        authorizer: Knows who calls.
        guard: Begins every call.
        metrics: The daemon's own metrics.
    """

    def __init__(  # noqa: PLR0913  the parts that it connects
        self,
        *,
        runs: Runs,
        loader: RunLoader,
        queue: SampleQueue,
        pipeline: Pipeline,
        sessions: Sessions,
        authorizer: Authorizer,
        guard: CallGuard,
        metrics: OwnMetrics,
    ) -> None:
        self._runs = runs
        self._loader = loader
        self._queue = queue
        self._pipeline = pipeline
        self._sessions = sessions
        self._authorizer = authorizer
        self._guard = guard
        self._metrics = metrics
        self._admission = Admission(runs, sessions.count, authorizer)
        self._logged: set[str] = set()
        self._reading_large = asyncio.Semaphore(1)  # of many at once each would take the interpreter as long
        self.draining = False

    def release(self, run: Run) -> None:
        """Gives the name of a run to the next trainer of its job that asks for it, and ends its session."""
        self._admission.release(run)
        self._sessions.end(run, grpc.StatusCode.PERMISSION_DENIED, f"run {run.name} was released by an operator")

    def handlers(self) -> grpc.GenericRpcHandler[bytes, agent_pb2.SessionResponse]:
        """Returns the handler to register with the server."""
        # By hand: the generated servicer parses messages itself, and one that is malformed ends the call uncounted.
        session = grpc.stream_stream_rpc_method_handler(
            self.session,
            request_deserializer=None,
            response_serializer=agent_pb2.SessionResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler("sharpwatch.v1.AgentService", {"Session": session})

    async def session(
        self, requests: AsyncIterator[bytes], context: Context
    ) -> AsyncIterator[agent_pb2.SessionResponse]:
        """Serves one stream, from its Hello until client or daemon ends it."""
        requests = await self._guard.begin(SESSION, requests, context)
        try:
            session, run = await self._handshake(requests, context)
        except RefusedError as error:
            self._count_refusal(error, context.peer())
            _end(context, error.code, str(error))
            return
        attempt = session.attempt
        if attempt is run.attempt:
            run.publish(phase="running")
        log.info("session_opened", run=run.name, attempt=attempt.hello.attempt, peer=context.peer())
        # A task of its own: acknowledgements must go out also while no sample comes in.
        reader = asyncio.create_task(self._read(requests, session))
        try:
            if not attempt.journalled:
                attempt.journalled = True
                await self._pipeline.register(attempt, time.time())
            yield self._welcome(attempt)
            if attempt is run.attempt:
                # They may have been lost with the last connection. The trainer applies a command of one id once.
                for decision in list(run.outstanding.values()):
                    self._sessions.command(run, decision)
            async for response in session.outgoing():
                yield response
        except SessionEndedError as error:
            log.warning("session_ended", run=run.name, attempt=attempt.hello.attempt, reason=str(error))
            _end(context, error.code, str(error))
        finally:
            reader.cancel()
            self._close(session, run)

    def _welcome(self, attempt: Attempt) -> agent_pb2.SessionResponse:
        welcome = agent_pb2.Welcome(
            daemon_version=__version__,
            acknowledged_sequence=attempt.cursor.journalled,
            max_message_bytes=wire.MAX_MESSAGE_BYTES,
            heartbeat_seconds=HEARTBEAT_SECONDS,
        )
        return agent_pb2.SessionResponse(welcome=welcome)

    def _close(self, session: Session, run: Run) -> None:
        # A session that a newer one replaced says nothing about the run.
        if not self._sessions.close(session):
            return
        session.attempt.presence.broke(time.monotonic())
        if session.attempt is run.attempt:
            # A run that sent its closing sample is closed, or will be once that is folded.
            is_here = self._runs.get(run.name) is run  # else another daemon says what becomes of it
            if is_here and run.phase == "running" and not session.attempt.said_farewell:
                killed = session.attempt.presence.has_left
                run.publish(phase="killed" if killed else "silent", last_seen_at=time.time())
                if killed:
                    self._pipeline.note_killed(session.attempt)
            log.info("session_closed", run=run.name, attempt=session.attempt.hello.attempt, phase=run.phase)

    async def _handshake(self, requests: AsyncIterator[bytes], context: Context) -> tuple[Session, Run]:
        if self.draining:
            raise RefusedError("stopping", grpc.StatusCode.UNAVAILABLE, "the daemon is stopping")
        try:
            message = await anext(requests)
        except StopAsyncIteration:
            raise RefusedError("malformed", grpc.StatusCode.INVALID_ARGUMENT, "no Hello") from None
        try:
            _check_size(message)
            sent = _parse(message, "hello").hello
            hello = read_hello(sent)
            caller = self._authorizer.caller_of(context)
            if not caller.speaks_for(hello.training_job):
                # It does not say which jobs there are.
                text = f"the token of {caller.name} is not for training job {hello.training_job}"
                raise RefusedError("other_job", grpc.StatusCode.PERMISSION_DENIED, text)
            await self._bring_back(hello)
            now = time.monotonic()
            client = client_of(context.peer(), hello)
            attempt, run = self._admission.admit(hello, sent, caller, client, now)
        except WireError as error:
            reason: SessionRefusal = "wrong_run" if error.code == "wrong_run" else "malformed"
            text = f"{error.code}: {_reason(error)}"
            raise RefusedError(reason, grpc.StatusCode.INVALID_ARGUMENT, text) from error
        run.received_bytes += len(message)
        # In the same turn of the loop: of two trainers that come at once, one must find the other.
        attempt.presence.heard(now)
        return self._sessions.open(attempt, client, caller), run

    async def _bring_back(self, hello: RunHello) -> None:
        """Has the run and the attempt of a Hello in memory, if the journal has them."""
        try:
            run = await self._loader.get(hello.run)
            # Of a new run, too: its attempt may be one of a run that is in the journal alone.
            await self._loader.find_attempt(hello.run, hello.attempt)
            self._loader.check(hello.run)  # its shard may have been handed over meanwhile
        except NotHeldError as error:
            raise RefusedError("other_shard", grpc.StatusCode.UNAVAILABLE, str(error)) from error
        except NoRoomError as error:
            raise RefusedError("runs", grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)) from error
        except StoreError as error:
            # Begun anew, the run would have revision 0, and its operators' next command would be wrong.
            raise RefusedError("store", grpc.StatusCode.UNAVAILABLE, str(error)) from error
        if self._pipeline.is_full and self._runs.attempt(hello.run, hello.attempt) is None:
            text = f"no new attempt can be journalled now: {self._pipeline.store_error}"
            raise RefusedError("store", grpc.StatusCode.UNAVAILABLE, text)
        if self._runs.get(hello.run) is not run:
            raise RefusedError("runs", grpc.StatusCode.UNAVAILABLE, "the run has just left memory; try again")
        if self.draining:
            raise RefusedError("stopping", grpc.StatusCode.UNAVAILABLE, "the daemon is stopping")

    def _count_refusal(self, error: RefusedError, peer: str) -> None:
        self._metrics.refused.labels("hello").inc()
        self._metrics.sessions_refused.labels(error.reason).inc()
        if str(error) in self._logged:
            return
        if len(self._logged) >= _LOGGED:
            self._logged.clear()
        self._logged.add(str(error))
        log.warning("session_refused", peer=peer, code=error.reason, reason=str(error))

    async def _read(self, requests: AsyncIterator[bytes], session: Session) -> None:
        try:
            await self._read_all(requests, session)
        except Exception:  # otherwise a session would stay open without a reader; counted
            self._metrics.internal_errors.labels("session").inc()
            log.exception("session_failed", run=session.attempt.hello.run)
            session.end(grpc.StatusCode.INTERNAL, "the daemon failed on a message; see its log")

    async def _read_all(self, requests: AsyncIterator[bytes], session: Session) -> None:
        async for message in requests:
            try:
                _check_size(message)
            except WireError as error:
                self._metrics.refused.labels(error.code).inc()
                # Not a refusal: that needs the sequence, and a message of this size is not parsed to find it.
                session.end(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{error.code}: {error}")
                return
            received_at = time.monotonic()
            if len(message) > LARGE_BYTES:
                async with self._reading_large:
                    received = await asyncio.to_thread(_read, message, session.attempt.hello)
            else:
                received = _read(message, session.attempt.hello)
            refusals = session.refusals
            self._take(received, message, session, received_at)
            if session.refusals > refusals:
                await asyncio.sleep(REFUSED_SECONDS)
            # What is not read waits at the agent, which would else have the rest refused as too much.
            session.attempt.presence.is_unread = True
            try:
                await self._queue.room(session.attempt.hello.run)
            finally:
                session.attempt.presence.is_unread = False
        session.finish()

    def _take(self, received: _Received, message: bytes, session: Session, received_at: float) -> None:
        if session.attempt.released or session.is_drained:
            return  # its session is about to end; a sample after the release would undo that at the next start
        session.attempt.presence.heard(received_at)
        run = self._runs.get(session.attempt.hello.run)
        if run is not None:
            run.received_bytes += len(message)
        request = received.request
        if not request.HasField("heartbeat"):
            self._metrics.received.inc()
        if received.error is not None:
            self._refuse(session, request.sample.sequence, received.error)
        elif received.reading is not None:
            self._take_sample(received.reading, message, session, received_at)
        elif request.heartbeat.last:
            session.attempt.presence.left()
        else:
            self._end_if_replaced(session)

    def _take_sample(self, reading: Reading, message: bytes, session: Session, received_at: float) -> None:
        attempt = session.attempt
        try:
            # Last, because it moves the cursor: a sample that is refused must leave no trace.
            place = self._place(session, reading)
        except WireError as error:
            self._refuse(session, reading.sequence, error)
            return
        if place == "new":
            attempt.said_farewell = reading.closing
            self._queue.put(QueuedSample(attempt.hello.run, attempt, reading, message, received_at))
        elif place == "journalled":
            session.acknowledge(attempt.cursor.journalled)

    def _refuse(self, session: Session, sequence: int, error: WireError) -> None:
        self._metrics.refused.labels(error.code).inc()
        session.refuse(sequence, error.code, _reason(error))

    def _end_if_replaced(self, session: Session) -> None:
        """Ends the session of an attempt whose run another one has, and which has had time to send what it held."""
        replaced = self._admission.replaced(session.attempt, time.monotonic())
        if replaced:
            session.end(grpc.StatusCode.FAILED_PRECONDITION, replaced)

    def _place(self, session: Session, reading: Reading) -> str:
        attempt = session.attempt
        run = self._runs.get(attempt.hello.run)
        if run is None:
            raise WireError("unknown_run", f"run {attempt.hello.run} was dropped for newer runs")
        if attempt is not run.attempt:
            self._end_if_replaced(session)
        return attempt.cursor.place(reading.sequence, reading.step, restored=reading.restored)


def _end(context: Context, code: grpc.StatusCode, reason: str) -> None:
    """Has a call end with a status, once its method has returned."""
    # Not `abort`: gRPC never lets go of a stream that it has ended while the client could still send, and a connection
    # with as many of these as it may have streams is refused all calls. Those of several trainers may come over one.
    context.set_code(code)
    context.set_details(reason)


def _reason(error: WireError) -> str:
    """Returns why a message is refused, short enough to be sent."""
    return str(error)[:MAX_REASON]


def _check_size(message: bytes) -> None:
    if len(message) > wire.MAX_MESSAGE_BYTES:
        raise WireError("oversized", f"a message must have at most {wire.MAX_MESSAGE_BYTES} bytes, got {len(message)}")


def _read(message: bytes, hello: RunHello) -> _Received:
    request = agent_pb2.SessionRequest()
    try:
        request = _parse(message, "sample", "heartbeat")
        return _Received(request, read_sample(hello, request.sample) if request.HasField("sample") else None)
    except WireError as error:
        return _Received(request, error=error)


def _parse(message: bytes, *expected: Literal["hello", "sample", "heartbeat"]) -> agent_pb2.SessionRequest:
    try:
        request = agent_pb2.SessionRequest.FromString(message)
    except DecodeError as error:
        raise WireError("malformed", f"not a SessionRequest: {error}") from error
    if request.WhichOneof("message") not in expected:
        raise WireError("malformed", "the first message must be a Hello, and all others Samples or Heartbeats")
    return request
