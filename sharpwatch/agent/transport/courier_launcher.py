"""Starts, signals and ends the courier process; reads and writes its two pipes without blocking.

Frames on the pipes are a 4-byte little-endian length, then that many bytes. The trainer writes `SessionRequest`
messages, as they will go to the daemon; `trainer_writer` says what the courier writes back.

The courier must not be a child of the trainer, whose own loop around `os.wait()` would then wait for it forever. So
the process that is started (the launcher) forks the courier and exits at once. The pipes show when the courier ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sharpwatch.agent.transport.base import Destination
from sharpwatch.errors import WireError

# Environment variables. The first holds the destination as JSON, is set for the courier alone, and marks its process;
# users set the second to a file that the courier's log is appended to. Without it the courier logs nothing.
ENVIRONMENT = "SHARPWATCH_COURIER"
LOG = "SHARPWATCH_COURIER_LOG"
_FRAME_HEADER = 4
# By default the most that Linux grants a user without privileges.
_PIPE_BYTES = 2**20
_READ_BYTES = 2**16
_START_SECONDS = 0.5  # that the trainer waits for a courier to start, which takes some 20 ms
_REPORT_SECONDS = 10.0  # without its report: then sys.executable is some other program
_REPORT = b"courier "  # the courier reports its start by this and its process id in four bytes
# Without `site` (-S) at first, whose hooks can take long or start threads. A trainer may have blocked or ignored
# signals; SIGALRM must end a courier that hangs before it checks on itself (as in an import from a dead file system).
_LAUNCHER_CODE = f"""
import os, signal, sys
if os.fork():
    os._exit(0)
for number in signal.valid_signals() - {{signal.SIGPIPE, signal.SIGXFSZ}}:
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, ())
signal.alarm(60)
os.write(1, {_REPORT!r} + os.getpid().to_bytes(4, "little"))
"""
# The working directory is kept out of sys.path (-P): a trainer's folder may hold a queue.py or a types.py. The folder
# of the package is appended, for trainers that found sharpwatch by changing sys.path.
_COURIER_CODE = """
import site
site.main()
sys.path.append(sys.argv.pop())
from sharpwatch.agent.transport.courier import main
main()
"""
_HOME = str(Path(__file__).resolve().parents[3])


def frame(payload: bytes) -> bytes:
    """Return `payload` as one frame."""
    return len(payload).to_bytes(_FRAME_HEADER, "little") + payload


class Unframer:
    """Splits a stream of bytes into the payloads of its frames."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Return the payloads that `data` completes.

        Raises:
            WireError: A frame is longer than the limit. The stream is then corrupt, or not a stream of frames.
        """
        self._buffer += data
        payloads = []
        start = 0
        while len(self._buffer) - start >= _FRAME_HEADER:
            length = int.from_bytes(self._buffer[start : start + _FRAME_HEADER], "little")
            if length > self._limit:
                raise WireError("oversized", f"a frame must have at most {self._limit} bytes, got {length}")
            end = start + _FRAME_HEADER + length
            if len(self._buffer) < end:
                break
            payloads.append(bytes(self._buffer[start + _FRAME_HEADER : end]))
            start = end
        del self._buffer[:start]
        return payloads


class NoCourierError(Exception):
    """No courier can be started in this program, now or later."""


class CourierGoneError(Exception):
    """The courier has closed its end of a pipe."""


class _End:
    """The trainer's end of a pipe, which checks that its descriptor still is that pipe.

    A program that closes every descriptor frees its number for another file, which must not get the agent's bytes.
    """

    def __init__(self, number: int) -> None:
        # The training loop must never wait in a write to a courier that does not read.
        os.set_blocking(number, False)
        self._number = number
        self._pipe = _identity(number)

    def fileno(self) -> int:
        """The descriptor; raises `CourierGoneError` if it was closed, or is another file's by now."""
        if self._pipe is None or _identity(self._number) != self._pipe:
            raise CourierGoneError
        return self._number

    def close(self) -> None:
        with contextlib.suppress(CourierGoneError):
            os.close(self.fileno())
        self._pipe = None


def _identity(number: int) -> tuple[int, int] | None:
    """The device and inode of an open descriptor; None if it is closed."""
    try:
        status = os.fstat(number)
    except OSError:
        return None
    return status.st_dev, status.st_ino


class CourierProcess:
    """A running courier, started by the constructor.

    Attributes:
        pid: Its process id; None until its report was read.
        started: When it was started, by `time.monotonic`.

    Raises:
        OSError: It could not be started now.
        NoCourierError: It can never be started in this program.
    """

    def __init__(self, destination: Destination) -> None:
        _require_python()
        _reap()
        self.pid: int | None = None
        self.started = time.monotonic()
        with contextlib.ExitStack() as undo:
            with contextlib.ExitStack() as theirs:
                self._launcher, (from_courier, to_courier) = _start(destination, undo, theirs)
            self._from_courier, self._to_courier = _End(from_courier), _End(to_courier)
            self.wait_ready(write=False, seconds=_START_SECONDS)
            _await_reaped(self._launcher, self.started + _START_SECONDS)
            undo.pop_all()
        _LIVE.add(self)

    def write(self, data: memoryview) -> int:
        """Write to the courier; returns how many bytes the pipe took, and raises `CourierGoneError`."""
        with _no_sigpipe():
            try:
                return os.write(self._to_courier.fileno(), data)
            except BlockingIOError:
                return 0
            except OSError as error:
                raise CourierGoneError from error

    def read(self) -> bytes:
        """Return what the courier has written, b"" if nothing; raises `CourierGoneError`."""
        try:
            data = os.read(self._from_courier.fileno(), _READ_BYTES)
        except BlockingIOError:
            if self.pid is None and time.monotonic() - self.started > _REPORT_SECONDS:
                raise CourierGoneError from None
            return b""
        if not data:
            raise CourierGoneError
        return data if self.pid is not None else self._without_report(data)

    def _without_report(self, data: bytes) -> bytes:
        """Read the courier's report, which arrives whole, and return the rest of `data`."""
        report, data = data[: len(_REPORT) + 4], data[len(_REPORT) + 4 :]
        if not report.startswith(_REPORT):
            raise CourierGoneError
        self.pid = int.from_bytes(report[len(_REPORT) :], "little")
        _reap()
        return data

    def wait_ready(self, *, write: bool, seconds: float) -> None:
        """Wait until something can be read (or, with `write`, written), for at most `seconds`."""
        poll = select.poll()
        poll.register(self._from_courier.fileno(), select.POLLIN)
        if write:
            poll.register(self._to_courier.fileno(), select.POLLOUT)
        poll.poll(max(0.0, seconds) * 1000)

    def wake(self) -> None:
        """Continue a courier that someone stopped; otherwise it could not end."""
        self._signal(signal.SIGCONT)

    def end_input(self) -> None:
        """Tell the courier that no more samples come."""
        self._to_courier.close()

    def leave(self, *, kill: bool, seconds: float = 0.0) -> None:
        """Close both pipes and wait up to `seconds` for the courier to end.

        It is killed first if `kill` is set, or if it never reported and may be some other program.
        """
        deadline = time.monotonic() + seconds
        if self.pid is None:
            _kill_children(self._launcher)
        elif kill:
            self._signal(signal.SIGKILL)
        self._to_courier.close()
        self._hung_up(seconds)
        self._close_pipes()
        if self.pid is not None:
            _CHILDREN.add(self.pid)  # it is a child if the trainer adopts orphans (as process 1, or a subreaper)
            _await_reaped(self.pid, deadline)

    def forget(self) -> None:
        """Close the pipes in a forked child; they belong to the parent."""
        self._close_pipes()

    def _signal(self, number: int) -> None:
        """Send a signal, but only while the courier holds its end of the pipe: until then its process id is its own."""
        if self.pid is not None and not self._hung_up():
            with contextlib.suppress(OSError):
                os.kill(self.pid, number)

    def _hung_up(self, seconds: float = 0.0) -> bool:
        """Whether the courier closes its end within `seconds`, or either end is closed already."""
        poll = select.poll()
        try:
            poll.register(self._from_courier.fileno(), 0)
        except CourierGoneError:
            return True
        return bool(poll.poll(max(0.0, seconds) * 1000))

    def _close_pipes(self) -> None:
        _LIVE.discard(self)
        self._from_courier.close()
        self._to_courier.close()


_LIVE: weakref.WeakSet[CourierProcess] = weakref.WeakSet()
_CHILDREN: set[int] = set()  # process ids to reap, if they are children of this process


def _require_python() -> None:
    """Raise `NoCourierError` where `sys.executable` is the training program itself and would be started once more."""
    if getattr(sys, "frozen", False):
        raise NoCourierError("this program is frozen, without a Python interpreter to start one with")
    if not sys.executable:
        raise NoCourierError("sys.executable is empty: no Python interpreter is known to start one with")


def _start(
    destination: Destination, undo: contextlib.ExitStack, theirs: contextlib.ExitStack
) -> tuple[int, tuple[int, int]]:
    """Start the launcher; returns its process id, and the trainer's ends of the courier's output and input.

    `undo` closes these ends, `theirs` the courier's ends in this process.
    """
    down_read, down_write = _pipe()
    theirs.callback(os.close, down_read)
    undo.callback(os.close, down_write)
    up_read, up_write = _pipe()
    theirs.callback(os.close, up_write)
    undo.callback(os.close, up_read)
    _enlarge(down_write)
    process = subprocess.Popen(
        [sys.executable, "-P", "-S", "-c", _LAUNCHER_CODE + _COURIER_CODE, _HOME],
        stdin=down_read,
        stdout=up_write,
        stderr=theirs.enter_context(_log()),
        env={**os.environ, ENVIRONMENT: destination.to_json()},
        start_new_session=True,  # Ctrl-C in the trainer's terminal must not end the courier
    )
    process.returncode = 0  # `_reap` reaps it by its id
    _CHILDREN.add(process.pid)
    return process.pid, (up_read, down_write)


def _pipe() -> tuple[int, int]:
    """Make a pipe with descriptors above 2: a trainer with closed standard streams still writes to 0, 1 and 2."""
    low = os.pipe()
    with contextlib.ExitStack() as stack:
        for end in low:
            stack.callback(os.close, end)
        read = fcntl.fcntl(low[0], fcntl.F_DUPFD_CLOEXEC, 3)
        try:
            return read, fcntl.fcntl(low[1], fcntl.F_DUPFD_CLOEXEC, 3)
        except OSError:
            os.close(read)
            raise


def _log() -> IO[bytes]:
    path = os.environ.get(LOG)
    if path:
        with contextlib.suppress(OSError):
            return Path(path).open("ab")
    return Path(os.devnull).open("wb")


def _enlarge(end: int) -> None:
    """Ask the kernel for a larger pipe; a smaller one works too."""
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        with contextlib.suppress(OSError):
            fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


@contextlib.contextmanager
def _no_sigpipe() -> Iterator[None]:
    """Keep the SIGPIPE of a write to a dead courier from a trainer that may have set it back to its deadly default."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
    try:
        yield
    except CourierGoneError:
        # Takes the pending signal away, before unblocking would deliver it.
        signal.sigtimedwait({signal.SIGPIPE}, 0)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _reap() -> None:
    """Reap the processes of `_CHILDREN` that have ended; forget those that are no children, or were reaped already."""
    for child in tuple(_CHILDREN):
        try:
            running = os.waitpid(child, os.WNOHANG)[0] == 0
        except ChildProcessError:
            running = False
        if not running:
            _CHILDREN.discard(child)


def _await_reaped(child: int, deadline: float) -> None:
    _reap()
    while child in _CHILDREN and time.monotonic() < deadline:
        time.sleep(0.001)
        _reap()


def _kill_children(launcher: int) -> None:
    """Kill the launcher, if it still runs, and all that it has started: its process group."""
    _reap()
    # Once reaped, its id may be another process's.
    if launcher in _CHILDREN:
        with contextlib.suppress(OSError):
            os.killpg(launcher, signal.SIGKILL)
        _await_reaped(launcher, time.monotonic() + _START_SECONDS)


def _forget_all() -> None:
    """Close the pipes in a forked child, whose copies would keep the courier from seeing the end of its input."""
    for courier in list(_LIVE):
        courier.forget()
    _CHILDREN.clear()


os.register_at_fork(after_in_child=_forget_all)
