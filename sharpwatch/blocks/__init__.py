"""Which parameters are which block. Free of torch until a model is classified."""

from __future__ import annotations

from sharpwatch.blocks.blockmap import BLOCKS, BlockMap, LayerBlock, Part, Row
from sharpwatch.blocks.classification import classified, classify
from sharpwatch.blocks.rules import Rule, Rules, load_rules

__all__ = ["BLOCKS", "BlockMap", "LayerBlock", "Part", "Row", "Rule", "Rules", "classified", "classify", "load_rules"]
