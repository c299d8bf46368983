"""Learning-rate multipliers from the shares that blocks have in the curvature along the step.

The share of block b along the step u is s_b = u_bᵀ(Hu)_b / uᵀHu. The step of the sharpest block is what bounds the
learning rate, so that blocks with small shares can take larger steps for little. Multipliers are raised only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from sharpwatch.daemon.config.settings import CurvatureShareConfig

USUAL = CurvatureShareConfig()


def multipliers_from_shares(shares: Mapping[str, float], rule: CurvatureShareConfig = USUAL) -> dict[str, float]:
    """Return m_b = clip((max s / s_b)^exponent, 1, max).

    Args:
        shares: The share of each block in the curvature, of steps at a multiplier of 1 (see `at_unit_multipliers`);
            only their ratios count.
        rule: The exponent and the largest multiplier.

    Returns:
        By block the multiplier; 1 for all where no block has a positive share, as where the loss is concave along the
        step.
    """
    most = max(shares.values(), default=0.0)
    if not most > 0:
        return dict.fromkeys(shares, 1.0)
    # A share that is zero or negative costs nothing to raise.
    ratios = {block: most / share if share > 0 else math.inf for block, share in shares.items()}
    return {block: min(max(ratio**rule.exponent, 1.0), rule.max) for block, ratio in ratios.items()}


def at_unit_multipliers(parts: Mapping[str, float], multipliers: Mapping[str, float]) -> dict[str, float]:
    """Return by how much the curvature grows with each block's multiplier.

    A block's step is its multiplier times a step v_b, so that v_bᵀ(Hu)_b = u_bᵀ(Hu)_b / m_b is the derivative of
    ½uᵀHu by m_b. Without this a raise would lift the share that it came from, and so undo itself.

    Args:
        parts: u_bᵀ(Hu)_b by block.
        multipliers: Those in force for that step; a block that is not named has 1.
    """
    return {block: part / multipliers.get(block, 1.0) for block, part in parts.items()}
