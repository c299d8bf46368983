"""The division of a model's parameters into blocks. Imports torch only when a model is classified."""

from __future__ import annotations

from sharpwatch.blocks.blockmap import BLOCKS, BlockMap, LayerBlock, Part, Row
from sharpwatch.blocks.classification import Rule, Rules, classify, classify_reporting_unused, load_rules

__all__ = [
    "BLOCKS",
    "BlockMap",
    "LayerBlock",
    "Part",
    "Row",
    "Rule",
    "Rules",
    "classify",
    "classify_reporting_unused",
    "load_rules",
]
