"""The courier as the trainer sees it: a process started by exec, and two pipes that never block.

It is no child of the trainer, where a loop around `os.wait()` would meet it and never end: what is started forks the
courier and ends at once. Of the courier's own end the pipes tell.
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

from sharpwatch.agent.transport.destination import Destination

ENVIRONMENT = "SHARPWATCH_COURIER"  # the destination as JSON, in the courier's environment alone
LOG = "SHARPWATCH_COURIER_LOG"
_PIPE_BYTES = 2**20
_READ_BYTES = 2**16
_INSTANT_SECONDS = 0.5  # that the trainer gives a courier to come up, which takes some 20 ms
_BIRTH_SECONDS = 10.0  # without its first word: then what was started is another program
_FIRST_WORD = b"courier "  # and the process id in four bytes
# No site yet (-S), whose hooks can take long or start threads. The alarm, which a trainer may have blocked or ignored,
# ends a courier that hangs before its own watch over itself begins (an import from a dead file system).
_BIRTH = f"""
import os, signal, sys
if os.fork():
    os._exit(0)
for number in signal.valid_signals() - {{signal.SIGPIPE, signal.SIGXFSZ}}:
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, ())
signal.alarm(60)
os.write(1, {_FIRST_WORD!r} + os.getpid().to_bytes(4, "little"))
"""
# The working directory stays off the path (-P): a trainer's folder may hold a queue.py or a types.py. The package's own
# home goes to the end of it, for trainers that found sharpwatch by changing sys.path.
_CODE = """
import site
site.main()
sys.path.append(sys.argv.pop())
from sharpwatch.agent.transport.courier import main
main()
"""
_HOME = str(Path(__file__).resolve().parents[3])


class NoCourierError(Exception):
    """In this program there can be none, now or later."""


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
    """A running courier. Raises `OSError` where none can be started, `NoCourierError` where none ever can.

    `pid` is its process id; None until its first word was read.
    """

    def __init__(self, destination: Destination) -> None:
        _require_python()
        _reap()
        self.pid: int | None = None
        self.started = time.monotonic()
        with contextlib.ExitStack() as undo:
            with contextlib.ExitStack() as theirs:
                self._middleman, (inward, outward) = _start(destination, undo, theirs)
            self._inward, self._outward = _End(inward), _End(outward)
            self.wait_ready(write=False, seconds=_INSTANT_SECONDS)
            _await_reaped(self._middleman, self.started + _INSTANT_SECONDS)
            undo.pop_all()
        _LIVE.add(self)

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
            if self.pid is None and time.monotonic() - self.started > _BIRTH_SECONDS:
                raise CourierGoneError from None
            return b""
        if not data:
            raise CourierGoneError
        return data if self.pid is not None else self._born(data)

    def _born(self, data: bytes) -> bytes:
        """Take the courier's first word, which came whole, off `data`."""
        word, data = data[: len(_FIRST_WORD) + 4], data[len(_FIRST_WORD) + 4 :]
        if not word.startswith(_FIRST_WORD):
            raise CourierGoneError
        self.pid = int.from_bytes(word[len(_FIRST_WORD) :], "little")
        _reap()
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
        self._signal(signal.SIGCONT)

    def end_input(self) -> None:
        """Tell the courier that nothing more comes."""
        self._outward.close()

    def leave(self, *, kill: bool, seconds: float = 0.0) -> None:
        """Close both pipes and wait up to `seconds` for the courier's end; what is not known as one is killed."""
        deadline = time.monotonic() + seconds
        if self.pid is None:
            _kill_children(self._middleman)
        elif kill:
            self._signal(signal.SIGKILL)
        self._outward.close()
        self._hung_up(seconds)
        self._close_pipes()
        if self.pid is not None:
            _CHILDREN.add(self.pid)  # where the trainer takes in orphans (as process 1, as a subreaper)
            _await_reaped(self.pid, deadline)

    def forget(self) -> None:
        """In a fork's copy: let go of the pipes, which are the parent's."""
        self._close_pipes()

    def _signal(self, number: int) -> None:
        """To the courier, while it holds its end of the pipe: its process id is surely its own as long."""
        if self.pid is not None and not self._hung_up():
            with contextlib.suppress(OSError):
                os.kill(self.pid, number)

    def _hung_up(self, seconds: float = 0.0) -> bool:
        """Whether the courier has closed its end, or closes it within `seconds`; or ours is closed."""
        poll = select.poll()
        try:
            poll.register(self._inward.fileno(), 0)
        except CourierGoneError:
            return True
        return bool(poll.poll(max(0.0, seconds) * 1000))

    def _close_pipes(self) -> None:
        _LIVE.discard(self)
        self._inward.close()
        self._outward.close()


_LIVE: weakref.WeakSet[CourierProcess] = weakref.WeakSet()
_CHILDREN: set[int] = set()  # process ids that are to be reaped, if they are children of ours


def _require_python() -> None:
    """Elsewhere `sys.executable` would be the training program, and start it once more."""
    if getattr(sys, "frozen", False):
        raise NoCourierError("this program is frozen: it has no Python to start one with")
    if not sys.executable:
        raise NoCourierError("sys.executable is empty: there is no Python to start one with")


def _start(
    destination: Destination, undo: contextlib.ExitStack, theirs: contextlib.ExitStack
) -> tuple[int, tuple[int, int]]:
    """The middleman, and our ends of the courier's output and input; `undo` closes ours, `theirs` its ends here."""
    down_read, down_write = _pipe()
    theirs.callback(os.close, down_read)
    undo.callback(os.close, down_write)
    up_read, up_write = _pipe()
    theirs.callback(os.close, up_write)
    undo.callback(os.close, up_read)
    _enlarge(down_write)
    process = subprocess.Popen(
        [sys.executable, "-P", "-S", "-c", _BIRTH + _CODE, _HOME],
        stdin=down_read,
        stdout=up_write,
        stderr=theirs.enter_context(_log()),
        env={**os.environ, ENVIRONMENT: destination.to_json()},
        start_new_session=True,  # Ctrl-C in the trainer's terminal is not for the courier
    )
    process.returncode = 0  # it is reaped by its number
    _CHILDREN.add(process.pid)
    return process.pid, (up_read, down_write)


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
    """Reap what has ended of `_CHILDREN`, and forget what is no child of ours, or was reaped by the program."""
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


def _kill_children(middleman: int) -> None:
    """The middleman, if it is still there, and what it has started: all that is in its group."""
    _reap()
    if middleman in _CHILDREN:
        with contextlib.suppress(OSError):
            os.killpg(middleman, signal.SIGKILL)
        _await_reaped(middleman, time.monotonic() + _INSTANT_SECONDS)


def _forget_all() -> None:
    """A worker's copy of the pipes would keep the courier waiting for an end of input that never comes."""
    for courier in list(_LIVE):
        courier.forget()
    _CHILDREN.clear()


os.register_at_fork(after_in_child=_forget_all)
