"""The user's block rules, from YAML or from code; the first rule that matches a parameter applies.

- match: "*.attn.sinks"            # glob on the name in model.named_parameters()
  block: other
- match: "*.attn.qkv.*"
  split:
    dim: 0                         # negative values count from the end
    parts: [{block: qk, size: 128}, {block: vo, size: 64}]
    repeats: 4                     # number of repetitions, such as heads; 1 by default
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharpwatch.blocks.blockmap import BLOCKS
from sharpwatch.common.yaml_schema import Location, YamlDocument, read_yaml
from sharpwatch.errors import BlockError


@dataclass(frozen=True, slots=True)
class Split:
    """A fused parameter as parts along one dimension.

    Attributes:
        dim: The dimension.
        parts: (block type, size) of each part, in order.
        repeats: How often the sequence of parts repeats along `dim`.
    """

    dim: int
    parts: tuple[tuple[str, int], ...]
    repeats: int = 1


@dataclass(frozen=True, slots=True)
class Rule:
    """Assigns the parameters whose names match a glob to one block, or splits them between blocks.

    Attributes:
        match: Glob on the name in `model.named_parameters()`.
        block: The block type; None with `split`.
        split: The split; None with `block`.

    Raises:
        BlockError: Neither or both of `block` and `split` are given, or a block type is unknown.
    """

    match: str
    block: str | None = None
    split: Split | None = None

    def __post_init__(self) -> None:
        if (self.block is None) == (self.split is None):
            raise BlockError(f"rule {self.match!r}: give either block or split")
        named = [self.block] if self.split is None else [kind for kind, _ in self.split.parts]
        if not set(named) <= set(BLOCKS):
            raise BlockError(f"rule {self.match!r}: block must be one of {', '.join(BLOCKS)}, got {named}")


@dataclass(frozen=True, slots=True)
class Rules:
    """Rules, in order of precedence."""

    rules: tuple[Rule, ...] = ()


def load_rules(path: str | Path) -> Rules:
    """Read a file of rules.

    Args:
        path: A YAML file with a list of rules, as above.

    Raises:
        ConfigError: The file cannot be read or holds something else; names file, line, key and what is valid.
    """
    document = read_yaml(Path(path), root="rules")
    if document.data is None:
        raise document.error((), "is empty; expected a list of rules")
    reader = _RulesReader(document)
    return Rules(tuple(reader.rule(at) for at in reader.items(())))


@dataclass(frozen=True, slots=True)
class _RulesReader:
    """Checks the values of a document and makes rules of them."""

    document: YamlDocument

    def rule(self, at: Location) -> Rule:
        given = self.mapping(at, required=("match",), optional=("block", "split"))
        if ("block" in given) == ("split" in given):
            raise self.document.error(at, "give either block or split")
        match = self.text((*at, "match"))
        if "block" in given:
            return Rule(match, block=self.block((*at, "block")))
        return Rule(match, split=self.split((*at, "split")))

    def split(self, at: Location) -> Split:
        given = self.mapping(at, required=("dim", "parts"), optional=("repeats",))
        parts = self.items((*at, "parts"))
        if len(parts) < 2:
            raise self.document.error((*at, "parts"), "expected two parts or more")
        repeats = self.count((*at, "repeats")) if "repeats" in given else 1
        return Split(self.integer((*at, "dim")), tuple(self.part(part) for part in parts), repeats)

    def part(self, at: Location) -> tuple[str, int]:
        self.mapping(at, required=("block", "size"))
        return self.block((*at, "block")), self.count((*at, "size"))

    def block(self, at: Location) -> str:
        name = self.text(at)
        if name not in BLOCKS:
            raise self.document.error(at, f"{name!r} is not a block type; allowed: {', '.join(BLOCKS)}")
        return name

    def text(self, at: Location) -> str:
        value = self.document.at(at)
        if not isinstance(value, str) or not value:
            raise self.document.error(at, "expected a string")
        return value

    def count(self, at: Location) -> int:
        value = self.integer(at)
        if value < 1:
            raise self.document.error(at, f"{value}: expected an integer of 1 or more")
        return value

    def integer(self, at: Location) -> int:
        value = self.document.at(at)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.document.error(at, "expected an integer")
        return value

    def items(self, at: Location) -> list[Location]:
        value = self.document.at(at)
        if not isinstance(value, list):
            raise self.document.error(at, "expected a list")
        return [(*at, index) for index in range(len(value))]

    def mapping(self, at: Location, *, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
        allowed = ", ".join(sorted((*required, *optional)))
        value = self.document.at(at)
        if not isinstance(value, dict):
            raise self.document.error(at, f"expected a mapping with keys {allowed}")
        for name in value:
            if name not in (*required, *optional):
                raise self.document.error((*at, name), f"unknown key; allowed: {allowed}")
        for name in required:
            if name not in value:
                raise self.document.error((*at, name), f"is missing; allowed: {allowed}")
        return value
