"""Files to replay: which format each has, found by its content, and reading it."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sharpwatch.errors import LogError
from sharpwatch.replay.log import Column, Log, column_of
from sharpwatch.replay.printed import MEGATRON, TORCHTITAN, clean, read_megatron, read_torchtitan
from sharpwatch.replay.recorded_run import RecordedRun, from_log
from sharpwatch.replay.tables import delimiter_of, read_csv, read_json_lines, read_trainer_state
from sharpwatch.replay.tensorboard_events import event_files, read_events

Format = Literal["csv", "jsonl", "trainer-state", "tensorboard", "megatron", "torchtitan", "recording", "journal"]
_TextReader = Callable[[str, str, Mapping[Column, str]], Log]
_TEXT_READERS: Mapping[str, _TextReader] = {
    "csv": read_csv,
    "jsonl": read_json_lines,
    "trainer-state": read_trainer_state,
    "megatron": read_megatron,
    "torchtitan": read_torchtitan,
}
FORMATS: tuple[Format, ...] = (
    *("csv", "jsonl", "trainer-state", "tensorboard", "megatron", "torchtitan", "recording", "journal"),
)
_VALID = (
    "valid are CSV, JSON lines, trainer_state.json, TensorBoard's event files, what Megatron-LM or torchtitan prints, "
    "and sharpwatch's own recordings and journal"
)
_JOURNAL_URL = "sqlite:///"
_SQLITE = b"SQLite format 3\0"
_GZIP, _XZ = b"\x1f\x8b", b"\xfd7zXZ\0"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How files are read.

    Attributes:
        format: Of all files; None to find it by the content.
        names: The names of columns that the user has chosen.
        run: The run in a journal.
    """

    format: Format | None = None
    names: Mapping[Column, str] = field(default_factory=dict)
    run: str | None = None


def expand(given: str) -> list[str]:
    """The sources that an argument stands for: itself, or a folder's runs.

    A folder of event files is a run, and so is a checkpoint of Hugging Face's Trainer; a folder of such folders is
    several.

    Args:
        given: The argument.

    Raises:
        LogError: The folder has nothing to replay.
    """
    folder = Path(given)
    if given.startswith(_JOURNAL_URL) or not folder.is_dir():
        return [given]
    state = folder / "trainer_state.json"
    if state.exists():
        return [str(state)]
    if event_files(folder):
        return [given]
    below = sorted({str(path.parent) for path in folder.rglob("*tfevents*") if path.is_file()})
    if below:
        return below
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    if not states:
        raise LogError("the folder has neither TensorBoard's event files nor a trainer_state.json", given)
    return [str(states[-1])]


def read_run(source: str, options: ReadOptions) -> RecordedRun:
    """Read one run.

    Args:
        source: A file, "-" for standard input, a folder of event files, or a journal as `sqlite:///PATH`.
        options: How it is read.

    Raises:
        LogError: It can't be read; the message says where and what is valid.
    """
    path = Path("/dev/stdin" if source == "-" else source)
    try:
        if source.startswith(_JOURNAL_URL):
            return _read_journal(source, options.run)
        if path.is_dir():
            return from_log(read_events(event_files(path), source, options.names), source, "tensorboard")
        if options.format == "journal" or _is_database(path):
            return _read_journal(f"{_JOURNAL_URL}{path}", options.run)
        return _read_file(path, source, options)
    except OSError as error:
        raise LogError(error.strerror or str(error), source) from None


def _is_database(path: Path) -> bool:
    if not path.is_file():  # such as a pipe, which can be read only once
        return False
    with path.open("rb") as file:
        return file.read(len(_SQLITE)) == _SQLITE


def _read_file(path: Path, source: str, options: ReadOptions) -> RecordedRun:
    data = _uncompressed(path.read_bytes(), source)
    if not data.strip():
        raise LogError(f"the file is empty; {_VALID}", source)
    found = options.format or _format_of(data, source)
    if found == "recording":
        return _read_recording(data, path)
    if found == "tensorboard":
        return from_log(read_events([path], source, options.names), source, found)
    run = from_log(_TEXT_READERS[found](_decoded(data), source, options.names), source, found)
    if not run.observations:
        raise LogError("no step has a loss, a gradient norm or a learning rate", source)
    return run


def _read_journal(url: str, run: str | None) -> RecordedRun:
    from sharpwatch.replay.own_recordings import read_journal  # noqa: PLC0415 - loads torch, which takes seconds

    return read_journal(url, run)


def _read_recording(data: bytes, path: Path) -> RecordedRun:
    from sharpwatch.replay.own_recordings import read_recording  # noqa: PLC0415 - as above

    return read_recording(data, path)


def _uncompressed(data: bytes, source: str) -> bytes:
    """The content of a gzip or xz file, of one or several parts; else the data as they are."""
    try:
        if data.startswith(_GZIP):
            return gzip.decompress(data)
        if data.startswith(_XZ):
            return lzma.decompress(data)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise LogError(f"the compressed file is cut off or damaged ({error}); {_whole_lines(data)}", source) from None
    return data


def _whole_lines(data: bytes) -> str:
    decompressor = zlib.decompressobj(wbits=31) if data.startswith(_GZIP) else lzma.LZMADecompressor()
    try:
        read = decompressor.decompress(data)
    except (zlib.error, lzma.LZMAError):
        return "nothing of it can be read"
    return f"it can be read up to line {read.count(10)}"


def _decoded(data: bytes) -> str:
    # A trainer's output may hold anything; what is read of it is ASCII. PowerShell writes UTF-16.
    return data.decode("utf-16" if data.startswith(_UTF16) else "utf-8-sig", errors="replace")


def _format_of(data: bytes, source: str) -> str:
    """The format of a file's content.

    Raises:
        LogError: It is of none that is known.
    """
    if b"brain.Event:" in data[:64]:
        return "tensorboard"
    if _is_recording(data):
        return "recording"
    if b"\0" in data[:4096] and not data.startswith(_UTF16):
        raise LogError(f"a binary file of an unknown format; {_VALID}", source)
    text = _decoded(data).lstrip()
    found = _format_of_json(text) if text.startswith(("{", "[")) else None
    found = found or next(_formats_of_lines(text), None)
    if found is None:
        first = text.partition("\n")[0][:60]
        raise LogError(f"the format is not known by its content (it begins with {first!r}); {_VALID}", source)
    return found


def _is_recording(data: bytes) -> bool:
    line, newline, rest = data[:1_000_000].partition(b"\n")
    return bool(newline) and line.startswith(b'{"kind": ') and b"\0" in rest[:4]


def _format_of_json(text: str) -> Format | None:
    line, _, rest = text.partition("\n")
    try:
        first = json.loads(line)
    except (ValueError, RecursionError):
        # Indented JSON begins with a bracket alone; "[rank0]: ..." is a line of a printed log.
        return "trainer-state" if line.strip() in {"{", "["} or '"log_history"' in text else None
    if isinstance(first, list) or "log_history" in first or not isinstance(first, dict):
        return "trainer-state"
    return "jsonl" if rest.strip() or any(map(column_of, first)) else "trainer-state"


def _formats_of_lines(text: str) -> Iterator[Format]:
    lines = text.split("\n")
    header = lines[0]
    delimiter = delimiter_of(header)
    if delimiter and any(column_of(name.strip().strip('"')) for name in header.split(delimiter)):
        yield "csv"
    for line in map(clean, lines):
        if MEGATRON.search(line):
            yield "megatron"
        elif TORCHTITAN.search(line):
            yield "torchtitan"
    if delimiter and _is_table(lines, delimiter):
        yield "csv"


def _is_table(lines: Sequence[str], delimiter: str) -> bool:
    """Whether the first two lines have as many cells: then an error can name the columns that are there."""
    return len(lines) > 1 and lines[0].count(delimiter) == lines[1].count(delimiter)
