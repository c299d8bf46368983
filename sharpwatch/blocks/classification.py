"""Classification: divides a model's parameters into blocks, by the user's rules and by the known architectures."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from sharpwatch.blocks.blockmap import BLOCKS, BlockMap, Part, Placement
from sharpwatch.blocks.rules import RulesLike, apply_rules, as_rules
from sharpwatch.errors import BlockError

if TYPE_CHECKING:
    from torch import nn

_LOG = logging.getLogger("sharpwatch")
_NAMES = 6  # parameters, and rules, that a message shows


def classify(model: nn.Module, rules: RulesLike | None = None, *, strict: bool = False) -> BlockMap:
    """Divide all parameters of `model`, including frozen ones, into blocks.

    Each parameter, or each slice of a fused one, belongs to exactly one block. A parameter whose block is not known is
    counted as `other`, with one warning in the log that has the rules to write.

    Args:
        model: The model; its parameters may be on the meta device.
        rules: Rules that take precedence over the known architectures: a dict by glob, such as `{"*.gizmo": "ffn"}`, a
            list of rules, or the path of a YAML file.
        strict: Raise where a parameter's block is not known.

    Returns:
        The block map.

    Raises:
        BlockError: A rule is invalid or applies to no parameter; with `strict`, a parameter's block is not known.
        ConfigError: The file of rules cannot be read or is invalid.
    """
    block_map, used = classify_reporting_unused(model, rules)
    for match, why in used.items():
        if why:
            raise BlockError(f"rule {match!r} applies to nothing: {why}")
    report_unplaced(block_map, strict=strict)
    return block_map


def classify_reporting_unused(model: nn.Module, rules: RulesLike | None = None) -> tuple[BlockMap, Mapping[str, str]]:
    """Classify a model that is one stage of a pipeline, to which not every rule applies.

    Args:
        model: The model.
        rules: As for `classify`.

    Returns:
        The block map, and for the glob of each rule the reason why it applies to nothing; empty if it does apply.

    Raises:
        BlockError: A rule is invalid.
        ConfigError: The file of rules cannot be read or is invalid.
    """
    from sharpwatch.blocks.module_tree import Tree  # noqa: PLC0415 - torch only where there is a model
    from sharpwatch.blocks.placement import classify_parameters  # noqa: PLC0415 - as above

    tree = Tree(model)
    placed, used = apply_rules(as_rules(rules), tree.shapes)
    placed |= classify_parameters(tree, [name for name in tree.shapes if name not in placed])
    parts: list[Part] = []
    for name, shape in tree.shapes.items():
        adapter = any(at.adapter for at in tree.occurrences[id(tree.parameters[name])])
        own = _parts(name, shape, tree.layers[name], placed.get(name, "other"))
        parts += [replace(part, adapter=adapter, known=name in placed) for part in own]
    return BlockMap(tuple(parts), tree.shapes), used


def report_unplaced(block_map: BlockMap, *, strict: bool) -> None:
    """Tell of the parameters whose block is not known, and which rules would place them: one warning in the log.

    Args:
        block_map: A block map.
        strict: Raise instead.

    Raises:
        BlockError: With `strict`, if there are such parameters.
    """
    if not block_map.unplaced:
        return
    message = unplaced_message(block_map)
    if strict:
        raise BlockError(message)
    _LOG.warning("%s. Until then they count as 'other'", message)


def unplaced_message(block_map: BlockMap) -> str:
    """Name the parameters whose block is not known, and the rules to write, as they may be passed for `rules`."""
    shapes = [f"{name} {block_map.shapes[name]}" for name in block_map.unplaced]
    rules = dict.fromkeys((_glob(name, block_map) for name in block_map.unplaced), "other")
    shown = json.dumps(dict(list(rules.items())[:_NAMES]))
    split = '{"split": {"dim": 0, "parts": [{"block": "qk", "size": ...}, {"block": "vo", "size": ...}]}}'
    return (
        f"these parameters belong to no known block: {_first(shapes)}. To place them, pass "
        f"rules={shown}{_more(len(rules))} with their blocks ({', '.join(BLOCKS)}); a fused matrix has {split} instead "
        "of a block"
    )


def _glob(name: str, block_map: BlockMap) -> str:
    """`name` with numbers as `*`, since layers are alike, unless that would match what is placed already."""
    glob = re.sub(r"\.\d+(?=\.)", ".*", name)
    matched = {each for each in block_map.shapes if fnmatchcase(each, glob)}
    return glob if matched <= set(block_map.unplaced) else name


def _first(names: list[str]) -> str:
    return ", ".join(names[:_NAMES]) + _more(len(names))


def _more(count: int) -> str:
    return f" and {count - _NAMES} more" if count > _NAMES else ""


def _parts(name: str, shape: tuple[int, ...], layer: str | None, placement: Placement) -> list[Part]:
    if isinstance(placement, str):
        return [Part(name, placement, layer, None, 0, 0, math.prod(shape))]
    parts, start, repeats = [], 0, placement.repeats
    rest = repeats * math.prod(shape) // shape[placement.dim]
    for block, size in placement.parts:
        parts.append(Part(name, block, layer, placement.dim, start, start + size, size * rest, repeats))
        start += size
    return parts
