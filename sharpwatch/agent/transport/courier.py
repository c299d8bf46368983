"""The courier: a process beside the trainer that holds the gRPC channel to the daemon.

It reads frames from the trainer, keeps the samples that the daemon has not acknowledged, and sends them again in every
new session. When its input ends or the trainer is gone, it delivers for at most DRAIN_SECONDS more, and ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import random
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
from google.protobuf.message import DecodeError

from sharpwatch.agent.transport.base import Destination
from sharpwatch.agent.transport.courier_launcher import ENVIRONMENT, Unframer
from sharpwatch.agent.transport.response_limits import MAX_RESPONSE_BYTES, too_long, within_limits
from sharpwatch.agent.transport.route import Route
from sharpwatch.agent.transport.spool import Spool
from sharpwatch.agent.transport.trainer_writer import TrainerWriter
from sharpwatch.common.endpoint import Backoff
from sharpwatch.common.tls import channel_credentials
from sharpwatch.common.token_file import read_token
from sharpwatch.errors import TokenFileError, WireError
from sharpwatch.v1 import agent_pb2

DRAIN_SECONDS = 1.5  # less than the 2 s that the trainer waits for the courier's end
FAREWELL_SECONDS = 0.3  # that a daemon has to end the session, once it has all samples
WELCOME_SECONDS = 3.0  # to connect and get the daemon's Welcome
# gRPC's keepalive did not notice a stopped server within 40 s of steady sending.
SILENCE_SECONDS = 20.0  # without an answer to samples sent: a dead connection can look alive for long
FIRST_WAIT_SECONDS = 0.2
LAST_WAIT_SECONDS = 4.0  # so that a restarted daemon has its runs back within 5 s
_TRAINER_SECONDS = 0.5  # between checks that the trainer is alive
_HANG_SECONDS = 30  # without such a check SIGALRM ends this process, whichever thread hangs
_MAX_REQUEST_BYTES = 64 * 2**20
# gRPC ends the stream at a longer response, and the daemon may send it again in each session: what the trainer can't
# have is received nevertheless, and refused here.
_MAX_RECEIVED_BYTES = 64 * 2**20
_MAX_CODE = 64  # characters
_MIN_HEARTBEAT_SECONDS = 1.0  # whatever the daemon asks for
_METHOD = "/sharpwatch.v1.AgentService/Session"
# With these the daemon is there, but does not take the run: the trainer's own log must say why.
_REFUSALS = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
    }
)
# Refusals for reasons that the sample's events have no part in: the next sample carries them.
_KEEPS_EVENTS = frozenset({"overflow", "out_of_order", "non_finite"})
_OPTIONS = (
    # A proxy in the environment is meant for the web: the daemon may be on this host or in this network.
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a new channel does not inherit the backoff of the last one
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 4_000),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.max_send_message_length", _MAX_REQUEST_BYTES),
    ("grpc.max_receive_message_length", _MAX_RECEIVED_BYTES),
)
_LOG = logging.getLogger("sharpwatch.courier")

Call = grpc.aio.StreamStreamCall[bytes, bytes]


class SessionOverError(Exception):
    """The session has ended; try again after `wait` seconds, or by the backoff if it is None."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        self.wait = wait
        super().__init__(reason)


class Courier:
    """Delivers the samples of one trainer to one daemon at a time."""

    def __init__(self, destination: Destination, to_trainer: TrainerWriter) -> None:
        self._destination = destination
        self._route = Route(destination.targets)
        self._to_trainer = to_trainer
        self._spool = Spool(destination.spool_bytes)
        jitter = random.Random()  # noqa: S311 - not a secret
        self._backoff = Backoff(FIRST_WAIT_SECONDS, LAST_WAIT_SECONDS, jitter)
        self._hello: bytes | None = None
        self._sent = 0  # highest sequence ever sent
        self._confirmed = 0  # highest sequence that the daemon has acknowledged
        self._limit = _MAX_REQUEST_BYTES
        self._welcomed = False  # whether any session was welcomed
        self._open = False  # whether the present session was welcomed
        self._heartbeat: float | None = None  # seconds after which the daemon wants to hear of a silent trainer
        self._news = asyncio.Event()  # a sample came, or the trainer ended
        self._ended = asyncio.Event()

    async def run(self, trainer: asyncio.StreamReader) -> None:
        """Deliver samples until the trainer ends, then what is left for at most DRAIN_SECONDS."""
        tasks = [asyncio.create_task(self._read(trainer)), asyncio.create_task(self._watch_trainer())]
        delivering = asyncio.create_task(self._deliver())
        # If delivery fails on an unforeseen error, this process ends and the trainer starts a new one.
        delivering.add_done_callback(lambda _: self._end())
        await self._ended.wait()
        signal.alarm(math.ceil(DRAIN_SECONDS) + 2)  # ends this process if anything below hangs
        # With nothing left to deliver, an open session is still told that the trainer is gone.
        if not self._done or self._open:
            await asyncio.wait({delivering}, timeout=FAREWELL_SECONDS if self._done else DRAIN_SECONDS)
        for task in (*tasks, delivering):
            task.cancel()
        await asyncio.wait((*tasks, delivering))
        _LOG.info("ended with %d samples undelivered", len(self._spool))

    # From the trainer.

    async def _read(self, trainer: asyncio.StreamReader) -> None:
        unframer = Unframer(_MAX_REQUEST_BYTES)
        try:
            while data := await trainer.read(2**18):
                for payload in unframer.feed(data):
                    self._accept(payload)
        except (WireError, DecodeError, OSError):
            _LOG.exception("can't read from the trainer")
        finally:
            self._end()

    async def _watch_trainer(self) -> None:
        """End when the trainer is gone: a worker forked from it may still hold the pipe open."""
        with _liveness(self._destination.trainer) as is_alive:
            while is_alive():
                if not self._ended.is_set():
                    signal.alarm(_HANG_SECONDS)
                await asyncio.sleep(_TRAINER_SECONDS)
        self._end()

    def _end(self) -> None:
        self._ended.set()
        self._news.set()

    def _accept(self, payload: bytes) -> None:
        request = agent_pb2.SessionRequest.FromString(payload)
        if request.HasField("hello"):
            self._hello = payload
            self._route.of_run(request.hello.run)
        elif not self._spool.put(request.sample, payload):
            self._to_trainer.refuse(request.sample.sequence, "out_of_order")
        # Every sample that is given up is reported, so that the trainer counts it as lost.
        while self._spool.overfull:
            self._to_trainer.refuse(self._spool.drop_oldest(), "spool_full")
        self._to_trainer.settle(self._spool.settled)
        self._news.set()

    # To the daemon.

    @property
    def _done(self) -> bool:
        return self._ended.is_set() and not len(self._spool)

    async def _deliver(self) -> None:
        while self._hello is None and not self._ended.is_set():
            self._news.clear()
            await self._news.wait()
        while self._hello is not None and not self._done:
            last_try = self._ended.is_set() and not self._welcomed
            wait = await self._try_session(self._hello)
            if self._done or (last_try and not self._welcomed):
                return  # no daemon was ever reached: the trainer must not wait for one
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._pause(), wait)

    async def _pause(self) -> None:
        """Wait for the trainer's end, upon which the next try is due at once; after it, wait for a moment."""
        if self._ended.is_set():
            await asyncio.sleep(FIRST_WAIT_SECONDS)
        else:
            await self._ended.wait()

    async def _try_session(self, hello: bytes) -> float:
        """Run one session, from its Hello to its end; returns the seconds to wait after it."""
        wait: float | None = None
        refused = is_open = False
        try:
            await self._session(hello)
            return self._backoff.next()
        except SessionOverError as error:
            wait, reason = error.wait, str(error)
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
            refused = not self._open and error.code() in _REFUSALS
        except TokenFileError as error:
            reason, refused = str(error), True  # the trainer's own log must say so
        except (TimeoutError, asyncio.InvalidStateError, OSError) as error:
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        finally:
            is_open, self._open = self._open, False
        _LOG.info("session with %s ended: %s", self._route.target, reason)
        # Nobody will watch the run of an agent whose list lacks a daemon: the trainer's own log must say so.
        unlisted = "" if is_open else self._route.unlisted(reason)
        self._to_trainer.disconnected(reason + unlisted, refused=refused or bool(unlisted))
        if is_open:
            self._route.restart()
        elif not refused and self._route.turned_away(reason):
            wait = FIRST_WAIT_SECONDS
        return self._backoff.next() if wait is None else wait

    async def _session(self, hello: bytes) -> None:
        async with self._channel() as channel:
            token = self._token()
            metadata = [("authorization", f"Bearer {token}")] if token else []
            call: Call = channel.stream_stream(_METHOD, None, None)(None, metadata=metadata)
            try:
                async with asyncio.timeout(WELCOME_SECONDS):
                    with contextlib.suppress(asyncio.InvalidStateError):  # refused by then: reading says why
                        await call.write(hello)
                    await self._await_welcome(call)
                await self._exchange(call)
            finally:
                call.cancel()

    def _token(self) -> str:
        """The token, from its file as it is now: tokens are replaced during long runs."""
        file = self._destination.token_file
        return read_token(Path(file)) if file else self._destination.token

    def _channel(self) -> grpc.aio.Channel:
        if self._destination.tls is None:
            return grpc.aio.insecure_channel(self._route.target, options=_OPTIONS)
        credentials = channel_credentials(self._destination.tls)
        return grpc.aio.secure_channel(self._route.target, credentials, options=_OPTIONS)

    async def _await_welcome(self, call: Call) -> None:
        while True:
            response = _parsed(await _message(call))
            if response is not None and response.HasField("welcome"):
                break
        # Sent is not taken: what the last session left unacknowledged goes out again.
        self._spool.rewind()
        # A daemon that acknowledges what it never got must not make this one drop samples.
        if response.welcome.acknowledged_sequence <= self._spool.newest:
            self._confirmed = response.welcome.acknowledged_sequence
            self._spool.settle(self._confirmed)
        self._to_trainer.connected(self._confirmed)
        self._to_trainer.settle(self._spool.settled)
        self._limit = response.welcome.max_message_bytes or _MAX_REQUEST_BYTES
        asked = response.welcome.heartbeat_seconds
        self._heartbeat = max(asked, _MIN_HEARTBEAT_SECONDS) if asked > 0 else None
        self._welcomed = self._open = True
        _LOG.info("welcomed by %.100s, %d samples to send", response.welcome.daemon_version, len(self._spool))

    async def _exchange(self, call: Call) -> None:
        sending = asyncio.create_task(self._send(call))
        try:
            while not self._done:
                payload = await self._next_message(call)
                if len(payload) > MAX_RESPONSE_BYTES:
                    self._to_trainer.command(too_long(len(payload)))
                    continue
                response = _parsed(payload)
                if response is not None:
                    self._take(response, payload)
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def _next_message(self, call: Call) -> bytes:
        reading = asyncio.ensure_future(_message(call))
        try:
            while not (await asyncio.wait({reading}, timeout=SILENCE_SECONDS))[0]:
                if self._spool.sent:
                    raise SessionOverError(f"no answer from the daemon for {SILENCE_SECONDS:g} s")
            return reading.result()
        finally:
            reading.cancel()

    async def _send(self, call: Call) -> None:
        while True:
            self._news.clear()
            while (entry := self._spool.next()) is not None:
                # The daemon would end the stream at a message that is too long, at every try again.
                if len(entry.payload) > self._limit:
                    self._refused(entry.sequence, "oversized", keep_events=True)
                    continue
                self._sent = max(self._sent, entry.sequence)
                await call.write(entry.payload)
            if self._ended.is_set():
                if self._heartbeat is not None:
                    await call.write(_heartbeat(last=True))
                await call.done_writing()
                return
            try:
                await asyncio.wait_for(self._news.wait(), self._heartbeat)
            except TimeoutError:
                # This process lives no longer than the trainer, which may be in a long step.
                await call.write(_heartbeat())

    def _take(self, response: agent_pb2.SessionResponse, payload: bytes) -> None:
        match response.WhichOneof("message"):
            case "ack":
                self._acknowledged(response.ack.sequence)
            case "refusal":
                code = response.refusal.code[:_MAX_CODE]
                self._refused(response.refusal.sequence, code, keep_events=code in _KEEPS_EVENTS)
            case "command":
                self._to_trainer.command(within_limits(payload, response.command))
            case "drain":
                asked = response.drain.retry_after_seconds
                wait = min(asked, LAST_WAIT_SECONDS) if asked > 0 else None
                raise SessionOverError(f"drained: {response.drain.reason}", wait)

    def _acknowledged(self, sequence: int) -> None:
        if sequence > self._sent:
            _LOG.warning("ignored the acknowledgement of sample %d, which was never sent", sequence)
            return
        self._spool.settle(sequence)
        self._confirmed = max(self._confirmed, sequence)
        self._to_trainer.connected(self._confirmed)
        self._to_trainer.settle(self._spool.settled)
        # Only an acknowledgement shows that the daemon works; a welcome alone does not.
        self._backoff.reset()

    def _refused(self, sequence: int, code: str, *, keep_events: bool) -> None:
        if self._spool.refuse(sequence, keep_events=keep_events):
            _LOG.warning("sample %d refused: %s", sequence, code)
            self._to_trainer.refuse(sequence, code)
            self._to_trainer.settle(self._spool.settled)


@contextlib.contextmanager
def _liveness(process: int) -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether `process` runs; not by its id, which a zombie or a new process may have."""
    try:
        descriptor = os.pidfd_open(process)
    except OSError:  # before Linux 5.3
        yield lambda: _exists(process)
        return
    try:
        yield lambda: not select.select([descriptor], [], [], 0)[0]
    finally:
        os.close(descriptor)


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it has changed its user
        return True
    return True


async def _message(call: Call) -> bytes:
    payload = await call.read()
    if not isinstance(payload, bytes):  # grpc.aio.EOF
        raise SessionOverError(f"the daemon closed the session: {await call.code()}: {await call.details()}")
    return payload


def _parsed(payload: bytes) -> agent_pb2.SessionResponse | None:
    if len(payload) > MAX_RESPONSE_BYTES:
        _LOG.warning("ignored a response of %d bytes", len(payload))
        return None
    try:
        return agent_pb2.SessionResponse.FromString(payload)
    except DecodeError:
        _LOG.warning("ignored %d bytes from the daemon that are no message", len(payload))
        return None


def _heartbeat(*, last: bool = False) -> bytes:
    return agent_pb2.SessionRequest(heartbeat=agent_pb2.Heartbeat(last=last)).SerializeToString()


async def _run(destination: Destination, inward: int, outward: int) -> None:
    trainer = asyncio.StreamReader(limit=2**20)
    with os.fdopen(inward, "rb", buffering=0) as pipe:
        protocol = asyncio.StreamReaderProtocol(trainer)
        await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, pipe)
        await Courier(destination, TrainerWriter(outward)).run(trainer)


def main() -> None:
    """Run the courier in this process; standard input and output are the pipes to the trainer.

    Environment:
        SHARPWATCH_COURIER: The destination as JSON, set by the trainer.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s courier %(process)d %(message)s")
    destination = Destination.from_json(os.environ.pop(ENVIRONMENT))
    # What prints to standard output must not end up between frames.
    inward, outward = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    asyncio.run(_run(destination, inward, outward))
    os._exit(0)  # without waiting for gRPC's threads


if __name__ == "__main__":
    main()
