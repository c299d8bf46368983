"""Classification: divides a model's parameters into blocks, by the user's rules and by the known architectures."""

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
    from sharpwatch.blocks.placement import classify_parameter  # noqa: PLC0415 - torch only where there is a model
    from sharpwatch.blocks.structure import Tree  # noqa: PLC0415 - as above

    tree = Tree(model)
    user_rules = load_rules(rules) if isinstance(rules, str | Path) else rules or Rules()
    placed, used = _apply_rules(user_rules, tree.shapes)
    parts: list[Part] = []
    for name, shape in tree.shapes.items():
        placement = placed[name] if name in placed else classify_parameter(tree, name)
        parts += _parts(name, shape, tree.layers[name], placement)
    return BlockMap(tuple(parts), tree.shapes), used


def _apply_rules(rules: Rules, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, Placement], dict[str, str]]:
    placed: dict[str, Placement] = {}
    used: dict[str, str] = {}
    for rule in rules.rules:
        matched = [name for name in shapes if fnmatchcase(name, rule.match)]
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
