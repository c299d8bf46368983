"""Logs that are tables: CSV, JSON lines, and Hugging Face's trainer_state.json."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sharpwatch.errors import LogError
from sharpwatch.replay.log import Column, Log, Record, column_of, read_records

_DELIMITERS = ",\t;"
_CUT_OFF = "the last line is incomplete and left out"


def delimiter_of(header: str) -> str:
    """The delimiter of a CSV file, by its header line; "" if it has none."""
    counts = {each: header.count(each) for each in _DELIMITERS}
    best = max(counts, key=counts.__getitem__)
    return best if counts[best] else ""


def read_csv(text: str, source: str, given: Mapping[Column, str]) -> Log:
    """Read a table with a header line; the delimiter is a comma, a tab or a semicolon.

    Args:
        text: The file.
        source: The file's name, for error messages.
        given: The names of columns that the user has chosen.

    Raises:
        LogError: It is no such table.
    """
    notes: list[str] = []
    return read_records(_csv_records(text, source, given, notes), source, given, notes)


def _csv_records(text: str, source: str, given: Mapping[Column, str], notes: list[str]) -> Iterator[Record]:
    # A file that a trainer is still writing ends in the middle of a line.
    whole = text.endswith(("\n", "\r"))
    last = text.count("\n") + (0 if whole else 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter_of(text.partition("\n")[0]) or ",")
    try:
        header = next(reader)
        _check_header(header, source, given)
        for cells in reader:
            if len(cells) == len(header):
                yield reader.line_num, dict(zip(header, cells, strict=True))
            elif cells and not whole and reader.line_num >= last:
                notes.append(_CUT_OFF)
            elif cells:
                raise LogError(
                    f"{len(cells)} cells, but the header has {len(header)} columns: {', '.join(header)[:200]}",
                    source,
                    reader.line_num,
                )
    except csv.Error as error:
        raise LogError(f"not CSV: {error}", source, reader.line_num) from None


def _check_header(header: Sequence[str], source: str, given: Mapping[Column, str]) -> None:
    if not any(name in given.values() or column_of(name) for name in header):
        raise LogError(
            f"no column is known: {', '.join(header)[:200]}. Known are such as step, loss, grad_norm and lr; "
            "--column loss=NAME names another",
            source,
            1,
        )


def read_json_lines(text: str, source: str, given: Mapping[Column, str]) -> Log:
    """Read a file with a JSON object on each line.

    Args:
        text: The file.
        source: The file's name, for error messages.
        given: The names of columns that the user has chosen.

    Raises:
        LogError: A line is no JSON object.
    """
    notes: list[str] = []
    return read_records(_json_records(text, source, notes), source, given, notes)


def _json_records(text: str, source: str, notes: list[str]) -> Iterator[Record]:
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines) > 1:
                notes.append(_CUT_OFF)
                return
            raise LogError(f"not JSON: {error}", source, number) from None
        if not isinstance(values, dict):
            raise LogError(f"must be a JSON object, got {line.strip()[:40]!r}", source, number)
        yield number, _flat(values)


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of nested objects under their paths: {"train": {"loss": 2}} has "train/loss"."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{below}": each for below, each in value.items()}
        else:
            flat[name] = value
    return flat


def read_trainer_state(text: str, source: str, given: Mapping[Column, str]) -> Log:
    """Read Hugging Face's trainer_state.json, or its `log_history` alone.

    Args:
        text: The file.
        source: The file's name, for error messages.
        given: The names of columns that the user has chosen.

    Raises:
        LogError: It is no such file.
    """
    try:
        state = json.loads(text)
    except json.JSONDecodeError as error:
        why = f"not a whole JSON file: {error.msg} (column {error.colno})"
        raise LogError(f"{why}; a trainer_state.json is valid", source, error.lineno) from None
    except (ValueError, RecursionError) as error:  # a number of too many digits, or nested too deeply
        raise LogError(f"not a trainer_state.json: {error}", source) from None
    history = state.get("log_history") if isinstance(state, dict) else state
    if not (isinstance(history, list) and all(isinstance(entry, dict) for entry in history)):
        raise LogError("must have a list of records, log_history, as trainer_state.json has", source)
    if not history:
        raise LogError("log_history is empty: nothing was logged (see TrainingArguments.logging_steps)", source)
    # A list has no lines to name.
    return read_records(((0, _flat(entry)) for entry in history), source, given)
