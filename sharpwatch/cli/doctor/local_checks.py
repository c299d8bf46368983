"""Checks of this machine: installed packages, the device, the pipe and the wire code."""

from __future__ import annotations

import fcntl
import importlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

PIPE_BYTES = 2**20  # the size that the agent requests for the pipe between trainer and courier
_OLDEST_PYTHON = (3, 11)
_NAME = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of one check.

    Attributes:
        check: What was checked.
        state: How it went.
        found: What was found.
        remedy: What to do, unless the state is ok.
    """

    check: str
    state: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""


def python() -> CheckResult:
    """Check that this Python is new enough."""
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < _OLDEST_PYTHON:
        return CheckResult("python", "fail", found, f"install Python {'.'.join(map(str, _OLDEST_PYTHON))} or newer")
    return CheckResult("python", "ok", f"{found} at {sys.executable}")


def packages() -> Iterator[CheckResult]:
    """Check the packages that sharpwatch declares: the agent needs its own, the extras may be missing."""
    try:
        declared = metadata.requires("sharpwatch") or []
    except metadata.PackageNotFoundError:
        yield CheckResult("packages", "fail", "sharpwatch is not installed", "pip install sharpwatch")
        return
    yield _group("agent's packages", [line for line in declared if "extra ==" not in line], "fail", "sharpwatch")
    for extra, check in (("cli", "command line's packages"), ("daemon", "daemon's packages")):
        lines = [line for line in declared if re.search(rf"extra == ['\"]{extra}['\"]", line)]
        yield _group(check, lines, "warn", f"sharpwatch[{extra}]")


def _group(check: str, declared: list[str], missing_is: Literal["warn", "fail"], install: str) -> CheckResult:
    names = [match[0] for line in declared if (match := _NAME.match(line)) and match[0] != "sharpwatch"]
    versions = {name: _version(name) for name in names}
    missing = [name for name, version in versions.items() if not version]
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    if missing:
        return CheckResult(check, missing_is, f"missing: {', '.join(missing)}", f"pip install '{install}'")
    return CheckResult(check, "ok", found)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def device() -> CheckResult:
    """Check that torch loads, and name the device that it computes curvature on."""
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:  # OSError: a shared library of it can't be loaded
        return CheckResult("torch", "fail", f"does not load: {error}", "reinstall torch for this machine's CPU or GPU")
    if torch.cuda.is_available():
        return CheckResult("torch", "ok", f"{torch.__version__}, {torch.cuda.get_device_name()}")
    if torch.version.cuda:
        return CheckResult(
            "torch",
            "warn",
            f"{torch.__version__} built for CUDA {torch.version.cuda}, no GPU usable",
            "fine for a daemon on CPU; on a GPU node check nvidia-smi and CUDA_VISIBLE_DEVICES",
        )
    return CheckResult("torch", "ok", f"{torch.__version__}, CPU only, {torch.get_num_threads()} threads")


def pipe() -> CheckResult:
    """Check that the kernel grants the size of the agent's pipe; only Linux lets a process choose it."""
    if not hasattr(fcntl, "F_SETPIPE_SZ"):
        return CheckResult("pipe size", "ok", "fixed by this system")
    ends = os.pipe()
    try:
        size = fcntl.fcntl(ends[0], fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    except OSError:
        size = fcntl.fcntl(ends[0], fcntl.F_GETPIPE_SZ)
    finally:
        for end in ends:
            os.close(end)
    if size < PIPE_BYTES:
        return CheckResult(
            "pipe size",
            "warn",
            f"{size} bytes granted, {PIPE_BYTES} requested: samples drop while the courier is busy",
            "raise sysctl fs.pipe-max-size and fs.pipe-user-pages-soft",
        )
    return CheckResult("pipe size", "ok", f"{size} bytes")


def wire() -> CheckResult:
    """Check that the generated wire code loads with the installed protobuf and gRPC."""
    try:
        from google.protobuf.runtime_version import VersionError  # noqa: PLC0415 - protobuf may be missing
    except ImportError as error:
        return CheckResult("wire code", "fail", str(error), "pip install --upgrade protobuf")
    try:
        importlib.import_module("sharpwatch.v1.operator_pb2_grpc")
    except (ImportError, RuntimeError, VersionError) as error:
        remedy = "pip install --upgrade sharpwatch grpcio protobuf"
        return CheckResult("wire code", "fail", " ".join(str(error).split()), remedy)
    return CheckResult("wire code", "ok", "loads with the installed grpcio and protobuf")
