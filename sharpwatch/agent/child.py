"""The courier as the trainer sees it: a process started by exec, and two pipes that never block."""

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

from sharpwatch.agent.address import Destination

ENVIRONMENT = "SHARPWATCH_COURIER"  # the destination as JSON, in the courier's environment alone
LOG = "SHARPWATCH_COURIER_LOG"
_PIPE_BYTES = 2**20
_READ_BYTES = 2**16
# The working directory stays off the path (-P): a trainer's folder may hold a queue.py or a types.py. The package's own
# home goes to the end of it, for trainers that found sharpwatch by changing sys.path.
# The alarm ends a courier that hangs before its own watch over itself begins (an import from a dead file system).
_CODE = (
    "import signal, sys; signal.alarm(60); sys.path.append(sys.argv.pop()); "
    "from sharpwatch.agent.courier import main; main()"
)
_HOME = str(Path(__file__).resolve().parents[2])


class CourierGoneError(Exception):
    """The courier closed its end."""


class _End:
    """Our end of a pipe.

    A program that closes every descriptor frees our number for a file of its own, which must not get our bytes.
    """

    def __init__(self, number: int) -> None:
        os.set_blocking(number, False)
        self._number = number
        self._pipe = _identity(number)

    def fileno(self) -> int:
        """The descriptor; raises `CourierGoneError` where it was closed, or is another's by now."""
        if self._pipe is None or _identity(self._number) != self._pipe:
            raise CourierGoneError
        return self._number

    def close(self) -> None:
        with contextlib.suppress(CourierGoneError):
            os.close(self.fileno())
        self._pipe = None


def _identity(number: int) -> tuple[int, int] | None:
    """Which file a descriptor leads to; None where it is closed."""
    try:
        status = os.fstat(number)
    except OSError:
        return None
    return status.st_dev, status.st_ino


class CourierProcess:
    """A running courier. Raises `OSError` where none can be started."""

    def __init__(self, destination: Destination) -> None:
        _reap()
        self.started = time.monotonic()
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as theirs:
            self._process, (inward, outward) = _start(destination, undo, theirs)
            self._inward, self._outward = _End(inward), _End(outward)
            undo.pop_all()
        _LIVE.add(self)

    @property
    def pid(self) -> int:
        """The courier's process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.poll()

    def write(self, data: memoryview) -> int:
        """Bytes that the pipe took, 0 if it is full; raises `CourierGoneError`."""
        with _no_sigpipe():
            try:
                return os.write(self._outward.fileno(), data)
            except BlockingIOError:
                return 0
            except OSError as error:
                raise CourierGoneError from error

    def read(self) -> bytes:
        """What has come, b"" if nothing has; raises `CourierGoneError`."""
        try:
            data = os.read(self._inward.fileno(), _READ_BYTES)
        except BlockingIOError:
            return b""
        if not data:
            raise CourierGoneError
        return data

    def wait_ready(self, *, write: bool, seconds: float) -> None:
        """Return when something can be read (or, with `write`, written), or after `seconds`."""
        poll = select.poll()
        poll.register(self._inward.fileno(), select.POLLIN)
        if write:
            poll.register(self._outward.fileno(), select.POLLOUT)
        poll.poll(max(0.0, seconds) * 1000)

    def wake(self) -> None:
        """Let a courier go on that someone stopped: it could else neither finish nor end."""
        self._process.send_signal(signal.SIGCONT)

    def end_input(self) -> None:
        """Tell the courier that nothing more comes."""
        self._outward.close()

    def leave(self, *, kill: bool, seconds: float = 0.0) -> None:
        """Close both pipes and wait up to `seconds` for the process; later it is reaped in passing."""
        self._close_pipes()
        if kill:
            self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        _LEAVING.append(self._process)
        _reap()

    def forget(self) -> None:
        """In a fork's copy: let go of pipes and process, which are the parent's."""
        self._close_pipes()
        self._process.returncode = 0  # Popen would else warn, in this process, of a child that is not its own

    def _close_pipes(self) -> None:
        _LIVE.discard(self)
        self._inward.close()
        self._outward.close()


_LIVE: weakref.WeakSet[CourierProcess] = weakref.WeakSet()
_LEAVING: list[subprocess.Popen[bytes]] = []


def _start(
    destination: Destination, undo: contextlib.ExitStack, theirs: contextlib.ExitStack
) -> tuple[subprocess.Popen[bytes], tuple[int, int]]:
    """The process, and our ends of its output and input; `undo` closes ours, `theirs` the child's ends here."""
    down_read, down_write = _pipe()
    theirs.callback(os.close, down_read)
    undo.callback(os.close, down_write)
    up_read, up_write = _pipe()
    theirs.callback(os.close, up_write)
    undo.callback(os.close, up_read)
    _enlarge(down_write)
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _CODE, _HOME],
        stdin=down_read,
        stdout=up_write,
        stderr=theirs.enter_context(_log()),
        env={**os.environ, ENVIRONMENT: destination.to_json()},
        start_new_session=True,  # Ctrl-C in the trainer's terminal is not for the courier
    )
    return process, (up_read, down_write)


def _pipe() -> tuple[int, int]:
    """A pipe whose ends stay clear of 0, 1 and 2, where a trainer with closed standard streams still writes."""
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
    """Ask for a larger pipe; what the kernel gives has to do."""
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        with contextlib.suppress(OSError):
            fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


@contextlib.contextmanager
def _no_sigpipe() -> Iterator[None]:
    """Keep a dead courier's SIGPIPE from the trainer, which may have put the signal back to its deadly default."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
    try:
        yield
    except CourierGoneError:
        signal.sigtimedwait({signal.SIGPIPE}, 0)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _reap() -> None:
    """Collect couriers that have ended since they were left."""
    _LEAVING[:] = [process for process in _LEAVING if process.poll() is None]


def _forget_all() -> None:
    """A worker's copy of the pipes would keep the courier waiting for an end of input that never comes."""
    for courier in list(_LIVE):
        courier.forget()
    for process in _LEAVING:
        process.returncode = 0
    _LEAVING.clear()


os.register_at_fork(after_in_child=_forget_all)
