"""The division of a model's parameters into blocks. Imports torch only when a model is classified."""

from __future__ import annotations

from sharpwatch.blocks.blockmap import BLOCKS, SHARPNESS_ORDER, BlockMap, LayerBlock, Part, Row
from sharpwatch.blocks.classification import classify, classify_reporting_unused, report_unplaced
from sharpwatch.blocks.rules import Rule, Rules, RulesLike, load_rules

__all__ = [
    "BLOCKS",
    "SHARPNESS_ORDER",
    "BlockMap",
    "LayerBlock",
    "Part",
    "Row",
    "Rule",
    "Rules",
    "RulesLike",
    "classify",
    "classify_reporting_unused",
    "load_rules",
    "report_unplaced",
]
