"""TensorBoard's event files: their scalars. The package `tensorboard` reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sharpwatch.errors import LogError
from sharpwatch.replay.log import Column, Log, Record, read_records

_FRAME = 16  # bytes around each record: its length and two checksums


def event_files(folder: Path) -> list[Path]:
    """The event files in a folder itself, oldest first: their names have the time."""
    return sorted(path for path in folder.glob("*tfevents*") if path.is_file())


def read_events(paths: Sequence[Path], source: str, given: Mapping[Column, str]) -> Log:
    """Read the scalars of a run's event files.

    Args:
        paths: The files, oldest first.
        source: The file's or folder's name, for error messages.
        given: The names of columns that the user has chosen.

    Raises:
        LogError: tensorboard is not installed, or a file is no event file.
    """
    notes: list[str] = []
    records = [record for path in paths for record in _records(path, notes)]
    return read_records(records, source, given, notes)


def _records(path: Path, notes: list[str]) -> list[Record]:
    # By step: a writer may write the scalars of one step one after the other, or those of one tag.
    steps: dict[int, dict[str, Any]] = {}
    for event in _events(path, notes):
        for value in event.summary.value:
            scalar = _scalar(value)
            if scalar is not None:
                steps.setdefault(event.step, {"step": event.step})[value.tag] = scalar
    return [(0, steps[step]) for step in sorted(steps)]


def _events(path: Path, notes: list[str]) -> Iterator[Any]:
    try:
        from google.protobuf.message import DecodeError  # noqa: PLC0415 - only for event files
        from tensorboard.backend.event_processing.event_file_loader import (  # noqa: PLC0415 - optional, and slow
            RawEventFileLoader,
        )
        from tensorboard.compat.proto.event_pb2 import Event  # noqa: PLC0415 - as above
    except ModuleNotFoundError as missing:
        raise LogError(
            f"reading TensorBoard's event files needs the package {missing.name}; run: pip install tensorboard",
            str(path),
        ) from None
    size, read = path.stat().st_size, 0
    for record in RawEventFileLoader(str(path)).Load():
        read += len(record) + _FRAME
        try:
            yield Event.FromString(record)
        except DecodeError:
            raise LogError(f"the record before byte {read} is no TensorBoard event", str(path)) from None
    if not read:
        raise LogError("no TensorBoard event can be read: the file is empty, cut off or of another format", str(path))
    if read < size:
        notes.append(f"{path.name} can't be read from byte {read} of {size} on: it is cut off or damaged there")


def _scalar(value: Any) -> float | None:
    """The number in a summary: `simple_value`, or a tensor of one number."""
    if value.HasField("simple_value"):
        return float(value.simple_value)
    if not value.HasField("tensor"):
        return None
    from tensorboard.util.tensor_util import make_ndarray  # noqa: PLC0415 - slow to import

    try:
        array = make_ndarray(value.tensor)
    except (TypeError, ValueError):
        return None
    return float(array.item()) if array.size == 1 and array.dtype.kind in "fiu" else None
