"""The record of rollbacks, kept in a file beside a framework's checkpoints.

A training job may die after a rollback, before it has saved again, and be restarted by hand. It must then neither take
the skipped data nor continue from a checkpoint that the rollback has undone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sharpwatch.checkpointing.resumable_loader import Range
from sharpwatch.common.atomic_file import read_json, write_json

_LOG = logging.getLogger("sharpwatch")
_FILE = "sharpwatch.json"


@dataclass(frozen=True, slots=True)
class RollbackRecord:
    """The batches that rollbacks left out, and which checkpoints were saved before.

    Attributes:
        left_out: For each loader, the ranges of its batches that are left out.
        older: Names of the checkpoints that do not contain `left_out`, because they were saved before.
        undone: Of these, the checkpoints of steps that a rollback has undone.
    """

    left_out: Sequence[Sequence[Range]] = ()
    older: frozenset[str] = frozenset()
    undone: frozenset[str] = frozenset()

    @classmethod
    def read(cls, folder: Path) -> RollbackRecord:
        """Read the record of the checkpoints in `folder`; empty if there is none, or if it can't be read."""
        try:
            values = read_json(folder / _FILE)
            return cls(values["left_out"], frozenset(values["older"]), frozenset(values["undone"]))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, KeyError, TypeError) as error:
            # A training that could go on must not end for it.
            _LOG.warning("cannot read the rollback record, batches left out will be trained on again: %s", error)
            return cls()

    def write(self, folder: Path) -> None:
        """Write the record into `folder`; a failure is logged."""
        values = {"left_out": self.left_out, "older": sorted(self.older), "undone": sorted(self.undone)}
        try:
            write_json(folder / _FILE, values)
        except OSError as error:
            _LOG.warning("cannot write the rollback record, a restart may train on batches left out: %s", error)

    def saved(self, folder: Path, name: str) -> None:
        """Update the record in `folder` when checkpoint `name` was saved, which contains what is left out."""
        if name in self.older:
            replace(self, older=self.older - {name}, undone=self.undone - {name}).write(folder)

    def after_rollback(
        self, target: str, ages: Mapping[str, float], left_out: Sequence[Sequence[Range]]
    ) -> RollbackRecord:
        """The record after a rollback.

        Args:
            target: The name of the checkpoint that was restored.
            ages: Every checkpoint by name; newer ones have greater numbers.
            left_out: The ranges that are left out from now on, for each loader.
        """
        # All checkpoints that exist now were saved without `left_out`, so all are `older`; those past the target are
        # undone.
        undone = {name for name, age in ages.items() if age > ages.get(target, math.inf)}
        return RollbackRecord(left_out, frozenset(ages), frozenset(ages) & (self.undone | undone))

    def newest(self, ages: Mapping[str, float]) -> str | None:
        """The newest checkpoint of `ages` that is not undone."""
        remaining = ages.keys() - self.undone
        return max(remaining, key=lambda name: ages[name]) if remaining else None

    def left_out_beside(self, name: str) -> Sequence[Sequence[Range]]:
        """For each loader, the ranges to leave out when resuming from checkpoint `name`, beyond those it contains."""
        if name in self.undone:
            _LOG.warning("%s was undone by a rollback: it may have been trained on batches that are left out", name)
        # A checkpoint saved after the rollback has these ranges in its own state.
        return self.left_out if name in self.older else ()
