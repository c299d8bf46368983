"""What a rollback leaves behind, noted beside a framework's checkpoints.

A training that dies after a rollback, before it has saved again, is restarted by hand: it must neither take the data
again nor go on from a checkpoint that the rollback has undone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sharpwatch.checkpointing.data_position import Range
from sharpwatch.common.atomic_file import read_json, write_json

_LOG = logging.getLogger("sharpwatch")
_FILE = "sharpwatch.json"


@dataclass(frozen=True, slots=True)
class RollbackRecord:
    """What is left out of each loader's batches, and the checkpoints, by name, that do not say so themselves."""

    left_out: Sequence[Sequence[Range]] = ()
    older: frozenset[str] = frozenset()
    undone: frozenset[str] = frozenset()  # of them, those of steps that were undone

    @classmethod
    def of(cls, folder: Path) -> RollbackRecord:
        """What the rollbacks to checkpoints in `folder` have left; nothing where there were none."""
        try:
            noted = read_json(folder / _FILE)
            return cls(noted["left_out"], frozenset(noted["older"]), frozenset(noted["undone"]))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, KeyError, TypeError) as error:
            _LOG.warning("what rollbacks have left out could not be read, and will be taken again: %s", error)
            return cls()

    def note(self, folder: Path) -> None:
        """Note it in `folder`."""
        noted = {"left_out": self.left_out, "older": sorted(self.older), "undone": sorted(self.undone)}
        try:
            write_json(folder / _FILE, noted)
        except OSError as error:
            _LOG.warning("what rollbacks have left out is not noted: %s", error)

    def saved(self, folder: Path, name: str) -> None:
        """Note that checkpoint `name` in `folder` is a new one, that says itself what is left out."""
        if name in self.older:
            replace(self, older=self.older - {name}, undone=self.undone - {name}).note(folder)

    def after(self, target: str, ages: Mapping[str, float], left_out: Sequence[Sequence[Range]]) -> RollbackRecord:
        """What is left when a rollback has gone to `target`; `ages` has all checkpoints, newer ones greater."""
        undone = {name for name, age in ages.items() if age > ages.get(target, math.inf)}
        return RollbackRecord(left_out, frozenset(ages), frozenset(ages) & (self.undone | undone))

    def newest(self, ages: Mapping[str, float]) -> str | None:
        """The newest checkpoint of `ages` that is not undone."""
        standing = ages.keys() - self.undone
        return max(standing, key=lambda name: ages[name]) if standing else None

    def of_checkpoint(self, name: str) -> Sequence[Sequence[Range]]:
        """What is left out of each loader beyond what checkpoint `name` says itself, when it is gone on from."""
        if name in self.undone:
            _LOG.warning("%s was undone by a rollback: what that left out may be in its weights", name)
        return self.left_out if name in self.older else ()
