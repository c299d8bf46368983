"""Model and rules in, block map out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from sharpwatch.blocks.blockmap import BlockMap, Part
from sharpwatch.blocks.rules import Rule, Rules, Split, load_rules
from sharpwatch.errors import BlockError

if TYPE_CHECKING:
    from torch import nn

Placement = str | Split


def classify(model: nn.Module, rules: Rules | str | Path | None = None) -> BlockMap:
    """Divide all parameters of `model`, frozen ones too, into blocks: exhaustive and disjoint, or it raises.

    `rules` (or the path of a YAML file of them) go before what is known of transformers. Raises `BlockError` for a
    parameter that can't be placed and for a rule that places nothing, `ConfigError` for a file that can't be.
    """
    block_map, used = classified(model, rules)
    for match, why in used.items():
        if why:
            raise BlockError(f"rule {match!r} places nothing: {why}")
    return block_map


def classified(model: nn.Module, rules: Rules | str | Path | None = None) -> tuple[BlockMap, Mapping[str, str]]:
    """`classify` for a stage of a pipeline: says by each rule's glob why it places nothing here, empty if it does."""
    from sharpwatch.blocks.placement import place  # noqa: PLC0415 - torch only where there is a model
    from sharpwatch.blocks.tree import Tree  # noqa: PLC0415 - as above

    tree = Tree(model)
    own = load_rules(rules) if isinstance(rules, str | Path) else rules or Rules()
    placed, used = _apply(own, tree.shapes)
    parts: list[Part] = []
    for name, shape in tree.shapes.items():
        placement = placed[name] if name in placed else place(tree, name)
        parts += _parts(name, shape, tree.layer(name), placement)
    return BlockMap(tuple(parts), tree.shapes), used


def _apply(rules: Rules, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, Placement], dict[str, str]]:
    placed: dict[str, Placement] = {}
    used: dict[str, str] = {}
    for rule in rules.rules:
        matched = [name for name in shapes if fnmatchcase(name, rule.match)]
        mine = [name for name in matched if name not in placed]
        used[rule.match] = ""
        if not mine:
            taken = f"all {len(matched)} it matches are placed by earlier rules"
            used[rule.match] = taken if matched else "no parameter matches"
        placed |= {name: _decide(rule, name, shapes[name]) for name in mine}
    return placed, used


def _decide(rule: Rule, name: str, shape: tuple[int, ...]) -> Placement:
    if rule.split is None:
        return str(rule.block)
    if not -len(shape) <= rule.split.dim < len(shape):
        raise BlockError(f"rule {rule.match!r}: {name} {shape} has no dimension {rule.split.dim}")
    split = Split(rule.split.dim % len(shape), rule.split.parts, rule.split.repeats)
    total = sum(size for _, size in split.parts) * split.repeats
    if total != shape[split.dim]:
        raise BlockError(
            f"rule {rule.match!r}: the sizes add up to {total}, dimension {split.dim} of {name} {shape} is "
            f"{shape[split.dim]}"
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
