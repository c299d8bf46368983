"""What trainers print: the lines of Megatron-LM (and of its descendants), and of torchtitan."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from sharpwatch.replay.log import Column, Log, Record, column_of, read_records

_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# " [2026-01-16 07:32:24] iteration        5/     100 | consumed samples: ... | lm loss: 1.344240E+01 | ..."; a launcher
# may put a rank in front, and GPT-NeoX its samples per second.
MEGATRON = re.compile(r"(?:^|[\s|\]])iteration\s+(\d+)\s*/\s*\d+\s*\|(.*)")
# "[rank0]:[titan] 2025-04-01 12:00:00,000 - root - INFO - step:  1  loss:  8.0491  grad_norm:  1.2  memory: ..."; not
# "validate step: ...". Early versions print no grad_norm.
TORCHTITAN = re.compile(r"(?<!validate )\bstep:\s*(\d+)\s+loss:\s*(\S+)(?:\s+grad_norm:\s*(\S+))?")
_RANK = re.compile(r"^\s*\[\w*?(\d+)\]:")
_PARTS_OF_A_LOSS = re.compile(r"balanc|aux|z_loss|mtp|scale", re.IGNORECASE)


def clean(line: str) -> str:
    """A line without the codes of colours."""
    return _COLOUR.sub("", line)


def read_megatron(text: str, source: str, given: Mapping[Column, str]) -> Log:
    """Read what Megatron-LM prints.

    Args:
        text: The output.
        source: The file's name, for error messages.
        given: The names of columns that the user has chosen.

    Raises:
        LogError: A value is no number.
    """
    found = [(number, match) for number, match in _matches(MEGATRON, text)]
    records = [(number, _megatron_values(match)) for number, match in found]
    loss = given.get("loss") or _loss_of(records)
    chosen: dict[Column, str] = {**given, **({"loss": loss} if loss else {})}
    return read_records([(line, _with_lost(values, loss)) for line, values in records], source, chosen)


def _matches(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, re.Match[str]]]:
    """The matching lines of one rank, which is the first that has one: several ranks may print the same."""
    rank: str | None = None
    for number, line in enumerate(text.split("\n"), 1):
        # Only at a glance: colours are rare, and logs are long.
        match = pattern.search(clean(line) if "\x1b" in line else line)
        if match is None:
            continue
        prefix = _RANK.match(match.string)
        printed_by = prefix[1] if prefix else ""
        if rank is None:
            rank = printed_by
        if printed_by == rank:
            yield number, match


def _megatron_values(match: re.Match[str]) -> dict[str, str]:
    values = {"iteration": match[1]}
    for part in match[2].split("|"):
        name, _, value = part.rpartition(":")
        if name.strip():
            values[name.strip()] = value.strip()
    return values


def _loss_of(records: Iterable[Record]) -> str | None:
    """The name of the loss; it depends on the model: "lm loss", "mlm loss" or another."""
    names = dict.fromkeys(name for _, values in records for name in values)
    known = [name for name in names if column_of(name) == "loss"]
    losses = [name for name in names if name.endswith("loss") and not _PARTS_OF_A_LOSS.search(name)]
    return next(iter([*known, *losses]), None)


def _with_lost(values: Mapping[str, str], loss: str | None) -> dict[str, str]:
    """The values of a line with a loss of nan where Megatron leaves it out.

    It does so where the mean is nan, and counts those of iterations whose step it skipped. A step that is skipped for
    its loss scale has no loss: a 0 is printed, or nothing.
    """
    whole = dict(values)
    if loss is None:
        return whole
    skipped = _count(values, "number of skipped iterations")
    if _count(values, "number of nan iterations") or (loss not in values and not skipped):
        whole[loss] = "nan"
    elif skipped and loss in values and not values[loss].strip("0.Ee+-"):
        del whole[loss]
    return whole


def _count(values: Mapping[str, str], name: str) -> int:
    text = values.get(name, "0")
    return int(text) if text.isdecimal() else 0


def read_torchtitan(text: str, source: str, given: Mapping[Column, str]) -> Log:
    """Read what torchtitan prints.

    Args:
        text: The output.
        source: The file's name, for error messages.
        given: The names of columns that the user has chosen.

    Raises:
        LogError: A value is no number.
    """
    records = (
        (number, {"step": match[1], "loss": match[2], "grad_norm": match[3]})
        for number, match in _matches(TORCHTITAN, text)
    )
    return read_records(records, source, given)
