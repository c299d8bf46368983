"""Block rules of the user's own: from a YAML file, or as Python values.

The first rule that matches a parameter applies. A file holds a list of rules:

- match: "*.attn.sinks"            # glob on the name in model.named_parameters()
  block: other
- match: "*.attn.qkv.*"
  split:
    dim: 0                         # negative values count from the end
    parts: [{block: qk, size: 128}, {block: vo, size: 64}]
    repeats: 4                     # number of repetitions, such as heads; 1 by default

In Python the same list, or a dict by glob: `{"*.attn.sinks": "other", "*.attn.qkv.*": {"split": {...}}}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from sharpwatch.blocks.blockmap import BLOCKS, Placement, Split
from sharpwatch.common.yaml_schema import Location, key_of, read_yaml
from sharpwatch.errors import BlockError


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


# The forms in which rules may be given: the path of a file, a dict by glob, or a list.
RulesLike = Rules | str | Path | Mapping[str, Any] | Sequence[Rule | Mapping[str, Any]]


def as_rules(rules: RulesLike | None) -> Rules:
    """Read rules in any of the forms in which they may be given.

    Args:
        rules: The path of a YAML file; a dict by glob, such as `{"*.gizmo": "ffn"}`; a list of rules; or None.

    Returns:
        The rules.

    Raises:
        BlockError: A value is invalid; names its place and what is valid.
        ConfigError: The file cannot be read or is invalid.
    """
    if rules is None or isinstance(rules, Rules):
        return rules or Rules()
    if isinstance(rules, str | Path):
        return load_rules(rules)
    if isinstance(rules, Mapping):
        return _read(_Values([_by_glob(match, value) for match, value in rules.items()]))
    if isinstance(rules, Sequence):
        return _read(_Values(list(rules)))
    raise BlockError(f"rules must be a dict by glob, a list of rules or the path of a file, got {type(rules).__name__}")


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
    return _read(document)


def apply_rules(rules: Rules, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Placement], dict[str, str]]:
    """Place the parameters that rules match.

    Args:
        rules: The rules.
        shapes: The shapes of the parameters by name.

    Returns:
        The placements by parameter, and for the glob of each rule why it applies to nothing; empty if it does apply.

    Raises:
        BlockError: A split does not fit a parameter's shape.
    """
    placed: dict[str, Placement] = {}
    used: dict[str, str] = {}
    for rule in rules.rules:
        matched = [name for name in shapes if fnmatchcase(name, rule.match)]
        # A rule whose parameters are all taken by earlier ones is reported as unused: their order may be wrong.
        mine = [name for name in matched if name not in placed]
        used[rule.match] = ""
        if not mine:
            taken = f"earlier rules apply to all {len(matched)} parameters that it matches"
            used[rule.match] = taken if matched else "no parameter matches"
        placed |= {name: _placement_of(rule, name, shapes[name]) for name in mine}
    return placed, used


def _placement_of(rule: Rule, name: str, shape: tuple[int, ...]) -> Placement:
    if rule.split is None:
        return str(rule.block)
    if not -len(shape) <= rule.split.dim < len(shape):
        raise BlockError(f"rule {rule.match!r}: {name} {shape} has no dimension {rule.split.dim}")
    # Checked here although BlockMap checks it too, because the rule to correct is known here.
    split = Split(rule.split.dim % len(shape), rule.split.parts, rule.split.repeats)
    total = sum(size for _, size in split.parts) * split.repeats
    if total != shape[split.dim]:
        raise BlockError(
            f"rule {rule.match!r}: the sizes of the parts must add up to dimension {split.dim} of {name} {shape}, "
            f"got {total}"
        )
    return split


class _Source(Protocol):
    """Where rules are read from: a YAML document, or values of the caller's."""

    @property
    def data(self) -> Any:
        """Mappings, lists and scalars."""

    def at(self, location: Location, /) -> Any:
        """The value at `location`; None where there is none."""

    def error(self, location: Location, message: str, /) -> Exception:
        """An error about the value at `location`."""


@dataclass(frozen=True, slots=True)
class _Values:
    """Rules as the caller's own values."""

    data: list[Any]

    def at(self, location: Location) -> Any:
        value: Any = self.data
        for step in location:
            try:
                value = value[step]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def error(self, location: Location, message: str) -> BlockError:
        return BlockError(f"{key_of(location, 'rules')}: {message}")


def _by_glob(match: Any, value: Any) -> Any:
    """The list's form of one entry of a dict by glob."""
    return {"match": match, **value} if isinstance(value, Mapping) else {"match": match, "block": value}


def _read(source: _Source) -> Rules:
    reader = _RulesReader(source)
    return Rules(tuple(reader.rule(at) for at in reader.items(())))


@dataclass(frozen=True, slots=True)
class _RulesReader:
    """Checks the values of a source and makes rules of them."""

    source: _Source

    def rule(self, at: Location) -> Rule:
        value = self.source.at(at)
        if isinstance(value, Rule):
            return value
        given = self.mapping(at, required=("match",), optional=("block", "split"))
        if ("block" in given) == ("split" in given):
            raise self.source.error(at, "give either block or split")
        match = self.text((*at, "match"))
        if "block" in given:
            return Rule(match, block=self.block((*at, "block")))
        return Rule(match, split=self.split((*at, "split")))

    def split(self, at: Location) -> Split:
        given = self.mapping(at, required=("dim", "parts"), optional=("repeats",))
        parts = self.items((*at, "parts"))
        if len(parts) < 2:
            raise self.source.error((*at, "parts"), "expected two parts or more")
        repeats = self.count((*at, "repeats")) if "repeats" in given else 1
        return Split(self.integer((*at, "dim")), tuple(self.part(part) for part in parts), repeats)

    def part(self, at: Location) -> tuple[str, int]:
        self.mapping(at, required=("block", "size"))
        return self.block((*at, "block")), self.count((*at, "size"))

    def block(self, at: Location) -> str:
        name = self.text(at)
        if name not in BLOCKS:
            raise self.source.error(at, f"{name!r} is not a block type; allowed: {', '.join(BLOCKS)}")
        return name

    def text(self, at: Location) -> str:
        value = self.source.at(at)
        if not isinstance(value, str) or not value:
            raise self.source.error(at, "expected a string")
        return value

    def count(self, at: Location) -> int:
        value = self.integer(at)
        if value < 1:
            raise self.source.error(at, f"{value}: expected an integer of 1 or more")
        return value

    def integer(self, at: Location) -> int:
        value = self.source.at(at)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.source.error(at, "expected an integer")
        return value

    def items(self, at: Location) -> list[Location]:
        value = self.source.at(at)
        if not isinstance(value, list | tuple):
            raise self.source.error(at, "expected a list")
        return [(*at, index) for index in range(len(value))]

    def mapping(self, at: Location, *, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> Mapping[str, Any]:
        allowed = ", ".join(sorted((*required, *optional)))
        value = self.source.at(at)
        if not isinstance(value, Mapping):
            raise self.source.error(at, f"expected a mapping with keys {allowed}")
        for name in value:
            if name not in (*required, *optional):
                raise self.source.error((*at, name), f"unknown key; allowed: {allowed}")
        for name in required:
            if name not in value:
                raise self.source.error((*at, name), f"is missing; allowed: {allowed}")
        return value
