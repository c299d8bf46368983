"""Classification: divides a model's parameters into blocks, by the user's rules and by the known architectures.

The user's rules come from YAML or from code; the first rule that matches a parameter applies:

- match: "*.attn.sinks"            # glob on the name in model.named_parameters()
  block: other
- match: "*.attn.qkv.*"
  split:
    dim: 0                         # negative values count from the end
    parts: [{block: qk, size: 128}, {block: vo, size: 64}]
    repeats: 4                     # number of repetitions, such as heads; 1 by default
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpwatch.blocks.blockmap import BLOCKS, BlockMap, Part, Placement, Split
from sharpwatch.common.yaml_schema import Location, YamlDocument, read_yaml
from sharpwatch.errors import BlockError

if TYPE_CHECKING:
    from torch import nn


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


def classify(model: nn.Module, rules: Rules | str | Path | None = None) -> BlockMap:
    """Divide all parameters of `model`, including frozen ones, into blocks.

    Each parameter, or each slice of a fused one, belongs to exactly one block.

    Args:
        model: The model; its parameters may be on the meta device.
        rules: Rules that take precedence over the known architectures, or the path of a YAML file of them.

    Returns:
        The block map.

    Raises:
        BlockError: A parameter cannot be classified, or a rule applies to no parameter.
        ConfigError: The file of rules cannot be read or is invalid.
    """
    block_map, used = classify_reporting_unused(model, rules)
    for match, why in used.items():
        if why:
            raise BlockError(f"rule {match!r} applies to nothing: {why}")
    return block_map


def classify_reporting_unused(
    model: nn.Module, rules: Rules | str | Path | None = None
) -> tuple[BlockMap, Mapping[str, str]]:
    """Classify a model that is one stage of a pipeline, to which not every rule applies.

    Args:
        model: The model.
        rules: As for `classify`.

    Returns:
        The block map, and for the glob of each rule the reason why it applies to nothing; empty if it does apply.

    Raises:
        BlockError: A parameter cannot be classified.
        ConfigError: The file of rules cannot be read or is invalid.
    """
    from sharpwatch.blocks.module_tree import Tree  # noqa: PLC0415 - torch only where there is a model
    from sharpwatch.blocks.placement import classify_parameters  # noqa: PLC0415 - as above

    tree = Tree(model)
    user_rules = load_rules(rules) if isinstance(rules, str | Path) else rules or Rules()
    placed, used = _apply_rules(user_rules, tree.shapes)
    placed |= classify_parameters(tree, [name for name in tree.shapes if name not in placed])
    parts: list[Part] = []
    for name, shape in tree.shapes.items():
        parts += _parts(name, shape, tree.layers[name], placed[name])
    return BlockMap(tuple(parts), tree.shapes), used


def _apply_rules(rules: Rules, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, Placement], dict[str, str]]:
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


def _parts(name: str, shape: tuple[int, ...], layer: str | None, placement: Placement) -> list[Part]:
    if isinstance(placement, str):
        return [Part(name, placement, layer, None, 0, 0, math.prod(shape))]
    parts, start, repeats = [], 0, placement.repeats
    rest = repeats * math.prod(shape) // shape[placement.dim]
    for block, size in placement.parts:
        parts.append(Part(name, block, layer, placement.dim, start, start + size, size * rest, repeats))
        start += size
    return parts


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
