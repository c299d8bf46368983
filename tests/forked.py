"""Python processes forked from one that has imported torch: importing it takes each process of its own 2 to 3 s.

A forked process is what `python -c CODE` is to the code: `__main__`, its own environment, folder, session and standard
streams, exit handlers at its end. What has to be a new interpreter (memory limits, an interpreter's own start, no
Python) is started with `subprocess` as ever.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
import types
from multiprocessing import forkserver
from multiprocessing.reduction import DupFd
from pathlib import Path

import torch

FORKS = multiprocessing.get_context("forkserver")
# One server serves all the tests of this process: what daemons, trainers and ranks import, in one list.
PRELOADED = [
    "forked",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "sharpwatch.daemon.app",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "gpt_neox", "llama", "mixtral", "t5")),
]
FRAMEWORKS = ["transformers.trainer", "lightning.pytorch", "trl.trainer.sft_trainer"]
FORKS.set_forkserver_preload(PRELOADED)


def preload_frameworks():
    """Import the trainers of other projects too, which takes the server 5 s; before it has forked any process."""
    FORKS.set_forkserver_preload([*PRELOADED, *FRAMEWORKS])


def module_code(name):
    """`python -m NAME`, as code."""
    return f"import runpy; runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"


COMMAND_LINE = module_code("sharpwatch")


class ForkedProcess:
    """As `subprocess.Popen` of a Python program, with text streams; `code` or the file `path` is run."""

    def __init__(self, code="", *, path=None, env, cwd=".", stderr=None, arguments=(), start_new_session=False):
        ours_in, theirs_out, self.stdin, self.stdout = _pipes()
        self.stderr, err = _error_stream(stderr, theirs_out)
        streams = [DupFd(fd) for fd in (ours_in, theirs_out, err)]
        what = (code, None if path is None else str(path), list(arguments))
        self._process = FORKS.Process(target=_main, args=(what, streams, dict(env), str(cwd), start_new_session))
        self._process.start()
        self.pid = self._process.pid
        for fd in {ours_in, theirs_out, *([err] if stderr == subprocess.PIPE else [])}:
            os.close(fd)

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.returncode

    def send_signal(self, number):
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def close(self):
        """Close our ends of its streams."""
        for stream in filter(None, (self.stdin, self.stdout, self.stderr)):
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def terminate(self):
        self.send_signal(signal.SIGTERM)


class ForkedRank(ForkedProcess):
    """A rank of torchrun's, as the `Popen` of its Python program that torchrun makes; the streams are torchrun's."""

    def __init__(self, args, *, env, start_new_session, stdout, stderr):
        assert stdout is stderr is None
        _, unbuffered, path, *arguments = args
        assert unbuffered == "-u"
        forkserver._forkserver.ensure_running = lambda: None  # it runs: it has forked torchrun, and is not its child
        streams = [DupFd(fd) for fd in (0, 1, 2)]
        what = ("", path, arguments)
        self._process = FORKS.Process(target=_main, args=(what, streams, env, ".", start_new_session))
        self._process.start()
        self.pid = self._process.pid


# `torchrun`, as code.
TORCHRUN = f"""
import forked
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
subprocess_handler.Popen = forked.ForkedRank
{module_code("torch.distributed.run")}
"""


def run(code="", *, timeout, **options):
    """As `subprocess.run` with its output captured: (exit status, standard output, standard error)."""
    process = ForkedProcess(code, stderr=subprocess.PIPE, **options)
    process.stdin.close()
    error_output = []
    collect = threading.Thread(target=lambda: error_output.append(process.stderr.read()))
    collect.start()
    output = process.stdout.read()
    status = process.wait(timeout)
    collect.join()
    process.close()
    return status, output, error_output[0]


def _pipes():
    """The child's ends of its standard input and output, and ours as text files."""
    child_in, ours = os.pipe()
    theirs, child_out = os.pipe()
    return child_in, child_out, os.fdopen(ours, "w", encoding="utf-8"), os.fdopen(theirs, encoding="utf-8")


def _error_stream(stderr, stdout):
    """Our end of the child's standard error as a text file, or None; the child's end."""
    if stderr == subprocess.PIPE:
        ours, theirs = os.pipe()
        return os.fdopen(ours, encoding="utf-8"), theirs
    return None, 2 if stderr is None else stdout if stderr == subprocess.STDOUT else stderr.fileno()


def _main(what, streams, env, cwd, start_new_session):
    """The forked process."""
    gc.freeze()  # what the server imported is no garbage, and to walk through it takes half a second each time
    for number, stream in enumerate(streams):
        fd = stream.detach()
        os.dup2(fd, number)
        os.close(fd)
    if start_new_session:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    # The server read this when it imported torch, under whatever environment it was started in.
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", "1")))
    sys.stdin, sys.stdout, sys.stderr = (open(fd, mode, closefd=False) for fd, mode in ((0, "r"), (1, "w"), (2, "w")))  # noqa: SIM115
    sys.path[:0] = [folder for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder]
    os._exit(_status(*what))


def _status(code, path, arguments):
    """Run the program to its end, exit handlers included; its exit status."""
    status = 0
    try:
        if path is None:
            sys.argv = ["-c", *arguments]
            sys.path.insert(0, "")
            module = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(code, "<string>", "exec"), module.__dict__)  # noqa: S102 - the test's own program
        else:
            sys.argv = [path, *arguments]
            sys.path.insert(0, str(Path(path).parent))
            runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:  # noqa: BLE001 - what an interpreter does with what its program raises
        sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
        traceback.print_exc()
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status
