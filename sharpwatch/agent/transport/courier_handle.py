"""The trainer's handle of its courier process: writes samples to it without blocking, and starts it anew if it dies.

The courier itself, which connects to the daemon and tries again, is in `courier`.

A written sample is kept, up to `pending_bytes` of them, until the courier reports that it holds it no more
(acknowledged, refused or dropped). A courier that dies is replaced, and the new one gets what was kept.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping

from google.protobuf.message import DecodeError

from sharpwatch.agent.safety import signals_held, warn
from sharpwatch.agent.transport.base import (
    Connection,
    Destination,
    check_secrecy,
    find_token_file,
    parse_daemon_addresses,
    parse_tls,
    parse_token,
)
from sharpwatch.agent.transport.courier_launcher import (
    LOG,
    CourierGoneError,
    CourierProcess,
    NoCourierError,
    Unframer,
    frame,
)
from sharpwatch.agent.transport.spool import Spool, without_arrays
from sharpwatch.common.endpoint import Backoff
from sharpwatch.common.tls import Tls
from sharpwatch.errors import WireError
from sharpwatch.v1 import agent_pb2

PENDING_BYTES = 4 * 2**20
SPOOL_BYTES = 64 * 2**20
MAX_RESPONSE_BYTES = 2**20
_FIRST_RESTART_SECONDS = 0.2
_LAST_RESTART_SECONDS = 30.0
# Bounds the time in a step, however much a courier writes.
_READS_PER_CALL = 16
_MAX_COMMANDS = 256
_MAX_REASONS = 32
_LOGGED_REFUSALS = 8
_CLOSING_STARTS = 2  # couriers that close() may start
_STUCK_SECONDS = 1.0  # without reading a byte: close() then takes the courier for stuck


class CourierHandle:
    """The `Transport` that `attach` makes; for use in one thread.

    The courier is started when the first sample is sent or `receive` is called, so that the Hello may change until
    then. Only the constructor raises, and only `close` blocks.

    Args:
        address: The daemon's address, "HOST:PORT" or "unix:PATH"; of several daemons those of all shards, in order,
            with commas between them.
        token: The daemon's bearer token, if it has one; None for the one in the file $SHARPWATCH_TOKEN_FILE.
        tls: PEM files by name: "ca", and "cert" with "key".
        pending_bytes: How many bytes of samples the trainer keeps for the courier.
        spool_bytes: How many bytes of samples the courier keeps for the daemon.

    Raises:
        AttachError: The address, the token or the TLS files are not valid.
    """

    def __init__(
        self,
        *,
        address: str,
        token: str | None = None,
        tls: Mapping[str, str] | Tls | None = None,
        pending_bytes: int = PENDING_BYTES,
        spool_bytes: int = SPOOL_BYTES,
    ) -> None:
        where = parse_daemon_addresses(address)
        self._pid = os.getpid()
        self._destination = Destination(
            targets=tuple(each.target for each in where),
            token=parse_token(token),
            tls=tls if isinstance(tls, Tls) else parse_tls(tls),
            spool_bytes=spool_bytes,
            trainer=self._pid,
            token_file=find_token_file(token),
        )
        has_token = bool(self._destination.token or self._destination.token_file)
        check_secrecy(where, has_token=has_token, tls=self._destination.tls)
        self._hello = b""
        self._limit = pending_bytes
        self._spool = Spool(pending_bytes)
        # Written samples that did not fit in `pending_bytes`: they are lost if the courier dies with them.
        self._entrusted: OrderedDict[int, None] = OrderedDict()
        self._dropped: Counter[str] = Counter()
        self._connection = Connection(",".join(self._destination.targets))
        self._refusals: set[str] = set()  # that were logged since the last session
        self._commands: list[agent_pb2.SessionResponse] = []
        self._restart = _Restart()
        self._courier: CourierProcess | None = None
        self._started_one = False
        self._unframer = Unframer(MAX_RESPONSE_BYTES)
        self._writing = memoryview(b"")  # the rest of a frame that was written in part
        self._closed = False

    def send_hello(self, hello: agent_pb2.Hello) -> None:
        """Open every session with `hello`; must be called before the first sample is sent."""
        self._hello = frame(agent_pb2.SessionRequest(hello=hello).SerializeToString())

    @property
    def dropped(self) -> dict[str, int]:
        """Samples lost so far in trainer and courier, by reason."""
        return dict(self._dropped)

    @property
    def connection(self) -> Connection:
        """Whether the courier has a session with the daemon, by its last message."""
        return self._connection

    @property
    def courier_pid(self) -> int | None:
        """The courier's process id; None while no courier runs, or it has not reported yet."""
        return None if self._courier is None else self._courier.pid

    def send(self, request: agent_pb2.SessionRequest) -> None:
        """Queue a sample, and write as much as the pipe takes."""
        if self._inert():
            return
        payload = request.SerializeToString()
        if len(payload) > self._limit:
            self._count("oversized")
            request = agent_pb2.SessionRequest(sample=without_arrays(request.sample))
            payload = request.SerializeToString()
        # Numbers only grow in a session: the daemon would take an older one for a resend.
        if not self._spool.put(request.sample, payload):
            self._count("out_of_order")
        self._make_room()
        self.flush()

    def receive(self) -> list[agent_pb2.SessionResponse]:
        """Return the commands that came in since the last call, oldest first."""
        self.flush()
        commands, self._commands = self._commands, []
        return commands

    def flush(self) -> None:
        """Read what came in and write what the pipe takes; start a courier if none runs and one is due."""
        if self._inert():
            return
        with signals_held():  # outermost: a signal that was held raises once all that was written is recorded
            try:
                if self._courier is None and self._restart.is_due(time.monotonic()):
                    self._start()
                if self._courier is not None:
                    self._pull(self._courier)
                    self._push(self._courier)
            except CourierGoneError:
                self._lost("it closed its pipe")
            except WireError as error:
                self._lost(str(error))
            except BaseException:  # a second signal's: whether the last write was noted is not known
                self._lost("a signal handler raised while it was written to")
                raise

    def close(self, timeout: float = 2.0) -> None:
        """Write what is queued and wait for the courier to end, for at most `timeout` seconds in all."""
        if self._inert():
            return
        deadline = time.monotonic() + timeout
        stuck, patience = False, 0.0  # for a close that Ctrl-C cuts short
        try:
            if self._courier is not None:
                self._courier.wake()
            # A tenth of the time is left for the courier to deliver and end.
            stuck = not self._hand_over(deadline - timeout / 10)
            if self._courier is not None and not stuck:
                self._courier.end_input()
                self._await_end(self._courier, deadline)
            patience = max(0.0, deadline - time.monotonic())
        finally:
            self._closed = True
            self._note_session(connected=False, reason="closed")
            if self._courier is not None:
                self._courier.leave(kill=stuck, seconds=patience)
                self._courier = None
            undelivered = len(self._spool) + len(self._entrusted)
            if undelivered:  # as far as the courier has reported
                self._count("undelivered", undelivered)

    def _inert(self) -> bool:
        """Whether it is closed, or a forked child's copy: the courier belongs to the parent."""
        return self._closed or os.getpid() != self._pid

    def _make_room(self) -> None:
        while self._spool.overfull:
            written = self._spool.release_sent()
            if written is not None:
                self._entrusted[written] = None
            else:
                self._spool.drop_oldest()
                self._count("outbox_full")

    # The courier's life.

    def _start(self) -> None:
        self._restart.note_start(time.monotonic())
        try:
            self._courier = CourierProcess(self._destination)
        except OSError as error:
            self._restart.warn(f"no courier could be started: {error}")
            self._note_session(connected=False, reason=f"no courier could be started: {error}")
            return
        except NoCourierError as error:
            self._restart.give_up(str(error))
            self._note_session(connected=False, reason=str(error))
            return
        # The last courier may have died in the midst of a frame.
        self._unframer = Unframer(MAX_RESPONSE_BYTES)
        self._writing = memoryview(self._hello)

    def _lost(self, reason: str) -> None:
        courier, self._courier = self._courier, None
        if courier is None:
            return
        courier.leave(kill=True)
        self._note_session(connected=False, reason=f"the courier is gone: {reason}")
        now = time.monotonic()
        log = os.environ.get(LOG) or f"none; ${LOG} names a file for it"
        self._started_one |= courier.pid is not None
        if self._started_one:
            self._restart.note_end(now, now - courier.started)
            self._restart.warn(f"the courier is gone ({reason}) and will be replaced; its log: {log}")
        else:  # sys.executable may be the training program itself
            self._restart.give_up(f"sys.executable={sys.executable!r} did not start one; its log: {log}")
        self._writing = memoryview(b"")
        # What the last courier had not reported as settled goes to the next one.
        self._spool.rewind()
        if self._entrusted:
            self._count("courier_died", len(self._entrusted))
            self._entrusted.clear()

    # Bytes.

    def _push(self, courier: CourierProcess) -> None:
        """Write until the pipe is full or nothing is left to write."""
        while self._writing or self._take_up_next():
            written = courier.write(self._writing)
            if not written:
                return
            self._writing = self._writing[written:]

    def _take_up_next(self) -> bool:
        entry = self._spool.next()
        if entry is not None:
            self._writing = memoryview(frame(entry.payload))
        return entry is not None

    def _pull(self, courier: CourierProcess) -> None:
        for _ in range(_READS_PER_CALL):
            data = courier.read()
            if not data:
                return
            for payload in self._unframer.feed(data):
                self._take(payload)

    def _take(self, payload: bytes) -> None:
        try:
            response = agent_pb2.SessionResponse.FromString(payload)
        except DecodeError:
            return
        match response.WhichOneof("message"):
            case "command":
                self._commands = [*self._commands, response][-_MAX_COMMANDS:]
            case "ack":
                # A courier gone mad must not settle samples that do not exist yet.
                self._settle(min(response.ack.sequence, self._spool.newest))
            case "refusal":
                self._count(response.refusal.code)
            case "welcome":
                self._note_session(connected=True, acknowledged=response.welcome.acknowledged_sequence)
            case "drain":
                drain = response.drain
                self._note_session(connected=False, reason=drain.reason, refused=drain.refused)

    def _note_session(self, *, connected: bool, acknowledged: int = 0, reason: str = "", refused: bool = False) -> None:
        self._log_refusal(reason if refused else "", connected=connected)
        before = self._connection
        self._connection = Connection(
            address=before.address,
            connected=connected,
            since_unix_ns=before.since_unix_ns if connected == before.connected else time.time_ns(),
            acknowledged=max(before.acknowledged, acknowledged),
            reason=reason,
            refused=refused,
        )

    def _log_refusal(self, reason: str, *, connected: bool) -> None:
        """Say in the trainer's log that it is not watched, once for each reason, and when it is watched after all."""
        where = self._connection.address
        if reason and reason not in self._refusals and len(self._refusals) < _LOGGED_REFUSALS:
            self._refusals.add(reason)
            warn("the daemon at %s does not take this run, which is not watched until it does: %s", where, reason)
        elif connected and self._refusals:
            self._refusals.clear()
            warn("the daemon at %s takes this run now", where)

    def _settle(self, sequence: int) -> None:
        """The courier holds no sample up to `sequence` any more."""
        self._spool.settle(sequence)
        while self._entrusted and next(iter(self._entrusted)) <= sequence:
            self._entrusted.popitem(last=False)

    def _count(self, reason: str, samples: int = 1) -> None:
        """Count lost samples; reasons come from the daemon too, so their number and length are limited."""
        name = reason[:64] if reason.isprintable() and reason else "unnamed"
        known = name in self._dropped or len(self._dropped) < _MAX_REASONS
        self._dropped[name if known else "other"] += samples

    # The end.

    @property
    def _pending(self) -> int:
        """How much is still to be written; 0 when everything was."""
        return len(self._writing) + self._spool.unsent

    def _hand_over(self, deadline: float) -> bool:
        """Write everything that is queued; returns False if the courier has stopped reading."""
        for _ in range(_CLOSING_STARTS):
            if self._courier is None and self._pending:
                self._restart.allow_now()
            progress = self._write_until(deadline)
            if self._courier is not None or not self._pending:
                return not self._pending or deadline - progress < _STUCK_SECONDS
        return True

    def _write_until(self, deadline: float) -> float:
        """Write until all is written, the courier dies or `deadline` passes; returns when it last read something."""
        progress = time.monotonic()
        self.flush()
        while self._courier is not None and self._pending and (now := time.monotonic()) < deadline:
            before = self._pending
            self._courier.wait_ready(write=True, seconds=deadline - now)
            self.flush()
            if self._pending < before:
                progress = time.monotonic()
        return progress

    def _await_end(self, courier: CourierProcess, deadline: float) -> None:
        """Read until the courier closes its end, so that its last reports are counted."""
        try:
            while (remaining := deadline - time.monotonic()) > 0:
                courier.wait_ready(write=False, seconds=remaining)
                self._pull(courier)
        except (CourierGoneError, WireError):
            return


class _Restart:
    """When a courier may be started: at once, then after doubling waits while couriers don't last."""

    def __init__(self) -> None:
        self._backoff = Backoff(_FIRST_RESTART_SECONDS, _LAST_RESTART_SECONDS)
        self._at = 0.0
        self._warned = False
        self._given_up = False

    def is_due(self, now: float) -> bool:
        return now >= self._at and not self._given_up

    def allow_now(self) -> None:
        self._at = 0.0

    def give_up(self, reason: str) -> None:
        self._given_up = True
        self.warn(f"no courier in this program, nothing is sent to the daemon: {reason}")

    def note_start(self, now: float) -> None:
        self._at = now + _FIRST_RESTART_SECONDS

    def note_end(self, now: float, lived: float) -> None:
        # One that lived long died of something else than its start.
        if lived > _LAST_RESTART_SECONDS:
            self._backoff.reset()
        self._at = now + self._backoff.next()

    def warn(self, message: str) -> None:
        """Warn once; a courier that keeps ending is counted, not logged each time."""
        if not self._warned:
            self._warned = True
            warn("%s", message)
