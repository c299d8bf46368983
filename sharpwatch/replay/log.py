"""What a training log says, step by step, from records of named values: the names that logs use, and their numbers.

A log of another trainer has at most a loss, the norm of the whole gradient and a learning rate. A value that is not
there was not measured; one that is nan or inf was, and is bad.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from sharpwatch.errors import LogError

Column = Literal["step", "loss", "grad-norm", "lr"]
COLUMNS: tuple[Column, ...] = ("step", "loss", "grad-norm", "lr")
MEASURED = COLUMNS[1:]
# As `_plain` writes them; where several have as many values, the first in the list counts.
NAMES: Mapping[Column, tuple[str, ...]] = {
    "step": (
        *("step", "global_step", "iteration", "iter", "trainer/global_step", "train/global_step", "_step", "steps"),
        *("global_steps", "iterations", "train_step", "update", "updates", "num_updates", "train/step"),
    ),
    "loss": (
        *("loss", "train/loss", "train_loss", "lm_loss", "training_loss", "train/lm_loss", "training/loss"),
        *("loss/train", "train/train_loss", "train_loss_step", "train/loss_step", "loss_metrics/global_avg_loss"),
        *("train/crossentropyloss", "train/ce_loss", "train/total_loss", "total_loss", "lm_loss_training/lm_loss"),
    ),
    "grad-norm": (
        *("grad_norm", "train/grad_norm", "gradient_norm", "train/gradient_norm", "gnorm", "total_grad_norm"),
        *(
            "global_grad_norm",
            "train/global_grad_norm",
            "optim/total_grad_norm",
            "training/grad_norm",
            "grad_norm_total",
        ),
        *("grad_2.0_norm_total", "optim/grad_norm", "train/gnorm", "grad_norm/grad_norm"),
    ),
    "lr": (
        *("learning_rate", "train/learning_rate", "lr", "train/lr", "training/lr", "training/learning_rate"),
        *("optim/learning_rate", "optim/lr", "optim/learning_rate_group0", "learning_rate/learning_rate", "lr/group_0"),
        *("lr_adamw", "lr_adam", "lr_sgd", "learning_rate/group_0", "train/learning_rate_group0"),
    ),
}
_COLUMN_OF: Mapping[str, tuple[Column, int]] = {
    name: (column, rank) for column, names in NAMES.items() for rank, name in enumerate(names)
}
_NOT_MEASURED = frozenset({"", "none", "null", "n/a", "na", "-"})
_MAX_STEP = 2**63
_NO_STEP = -1

Record = tuple[int, Mapping[str, Any]]  # line, 0 where there are none; value by name


@dataclass(frozen=True, slots=True)
class Row:
    """One logged step; None for what was not measured."""

    step: int
    loss: float | None = None
    gradient_norm: float | None = None
    learning_rate: float | None = None


@dataclass(frozen=True, slots=True)
class Log:
    """A log of another trainer.

    Attributes:
        rows: In the order of the file; a step may come again after a restart.
        names: By column its name in the file; a column that the file has not is left out.
        notes: What the reader should know, such as that a last line is incomplete.
    """

    rows: Sequence[Row]
    names: Mapping[Column, str]
    notes: tuple[str, ...] = ()


def column_of(name: str) -> Column | None:
    """The column that a name stands for, or None."""
    found = _COLUMN_OF.get(_plain(name))
    return None if found is None else found[0]


def _plain(name: str) -> str:
    # W&B exports put a run's name in front: "gpt2-a1 - train/loss".
    return name.rpartition(" - ")[2].strip().lower().replace(" ", "_").replace("-", "_")


def read_records(records: Iterable[Record], source: str, given: Mapping[Column, str], notes: Iterable[str] = ()) -> Log:
    """Make a log of records.

    Args:
        records: One for each line or entry; several of one step may each have a part.
        source: The file, as error messages show it.
        given: The names of columns that the user has chosen.
        notes: To be kept with the log.

    Raises:
        LogError: A value is no number, or there is neither loss, gradient norm nor learning rate.
    """
    kept, others = _relevant(records, given)
    names, rivals = _choose(kept, source, given, others)
    rows: list[Row] = []
    without_step = 0
    for number, (line, values) in enumerate(kept, 1):
        row = _row(line, values, names, source)
        if (row.loss, row.gradient_norm, row.learning_rate) == (None, None, None):
            continue
        if "step" not in names:
            row = replace(row, step=number)
        if row.step == _NO_STEP:
            without_step += 1
        elif rows and rows[-1].step == row.step:
            rows[-1] = _merged(rows[-1], row)
        else:
            rows.append(row)
    if without_step:
        notes = (*notes, f"{without_step} records without a step are left out")
    if "step" not in names:
        notes = (*notes, "there is no step: rows are counted from 1")
    return Log(rows, names, (*notes, *rivals))


def _relevant(records: Iterable[Record], given: Mapping[Column, str]) -> tuple[list[Record], dict[str, None]]:
    """The records with the values that may be a column's; and other names, for an error message."""
    chosen = set(given.values())
    kept: list[Record] = []
    others: dict[str, None] = {}
    for line, values in records:
        found = {name: value for name, value in values.items() if name in chosen or column_of(name) is not None}
        others |= dict.fromkeys(name for name in values if name not in found)
        if found:
            kept.append((line, found))
    return kept, others


def _choose(
    records: Sequence[Record], source: str, given: Mapping[Column, str], others: Iterable[str]
) -> tuple[dict[Column, str], list[str]]:
    """The name of each column: the one with most values. And notes on what else it might have been."""
    counts = Counter(name for _, values in records for name, value in values.items() if _is_measured(value))
    for column, name in given.items():
        if not counts[name]:
            known = _some([*counts, *others])
            raise LogError(f"there is no value of {name!r}, which is given as the {column}; there are {known}", source)
    names: dict[Column, str] = dict(given)
    notes = []
    for column in COLUMNS:
        found = sorted(
            (name for name in counts if column_of(name) == column and name not in given.values()),
            key=lambda name: (-counts[name], _COLUMN_OF[_plain(name)][1]),
        )
        if column not in given and found:
            names[column] = found[0]
            rivals = [name for name in found[1:] if 2 * counts[name] >= counts[found[0]]]
            if rivals and column != "step":
                notes.append(f"{column} is {found[0]!r}; --column {column}=NAME takes another: {_some(rivals)}")
    if not set(names) & set(MEASURED):
        raise LogError(
            f"there is neither a loss, a gradient norm nor a learning rate under a known name; there are "
            f"{_some(list(others) or ['no values at all'])}. --column loss=NAME names a column",
            source,
        )
    return names, notes


def _some(names: Sequence[str], limit: int = 12) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _row(line: int, values: Mapping[str, Any], names: Mapping[Column, str], source: str) -> Row:
    def value(column: Column) -> float | None:
        name = names.get(column, "")
        return _number(values.get(name), name, source, line)

    step = value("step")
    if step is None:
        step = _NO_STEP
    elif not (math.isfinite(step) and step == int(step) and 0 <= step < _MAX_STEP):
        raise LogError(f"{names.get('step')} must be a whole number, 0 or more, got {step:g}", source, line)
    return Row(int(step), value("loss"), value("grad-norm"), value("lr"))


def _is_measured(value: Any) -> bool:
    return value is not None and not (isinstance(value, str) and value.strip().lower() in _NOT_MEASURED)


def _number(value: Any, name: str, source: str, line: int) -> float | None:
    if not _is_measured(value):
        return None
    try:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise LogError(f"{name} must be a number, nan, inf or empty, got {str(value)[:40]!r}", source, line)


def _merged(first: Row, second: Row) -> Row:
    """Two records of one step, each with a part; what the first has counts."""
    return replace(
        first,
        loss=second.loss if first.loss is None else first.loss,
        gradient_norm=second.gradient_norm if first.gradient_norm is None else first.gradient_norm,
        learning_rate=second.learning_rate if first.learning_rate is None else first.learning_rate,
    )
