"""The command `sharpwatch`: turns errors into one line on standard error and an exit status."""

from __future__ import annotations

import gc
import io
import os
import sys
from collections.abc import Sequence

from sharpwatch.cli.extras import needs_extra
from sharpwatch.errors import SharpwatchError, UnansweredError

UNANSWERED, INTERRUPTED = 3, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: The arguments; those of this process by default.

    Returns:
        The exit status: 0 done, 1 failed, 2 wrong usage, 3 not answered by the trainer yet.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show ± is no reason to fail
    # Only for a process of its own: a program that calls `main` keeps its collector.
    if argv is None:
        # The command's imports create many objects that stay, and scanning them takes a tenth of the start-up time.
        gc.disable()  # until the command is imported, see LazyCommand.load
    try:
        status = _run(sys.argv[1:] if argv is None else argv)
        # Here, where a closed pipe is caught: at exit Python would print the error itself.
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough. Python would flush once more at exit, into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UnansweredError as error:
        return _fail(str(error), UNANSWERED)
    except SharpwatchError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 0
    return status


def _run(arguments: Sequence[str]) -> int:
    with needs_extra("the command line", "cli"):
        from sharpwatch.cli.commands.root import run  # noqa: PLC0415 - the agent's installation has no click
    return run(arguments)


def _fail(message: str, status: int = 1) -> int:
    # One line, whatever line breaks a library put into its message.
    print(f"sharpwatch: {' '.join(message.split())}", file=sys.stderr)
    return status
