"""Learning-rate multipliers from the shares that blocks have in the curvature along the step.

The share of block b along the step u is s_b = u_bᵀ(Hu)_b / uᵀHu. The step of the sharpest block is what bounds the
learning rate, so that blocks with small shares can take larger steps for little. Multipliers are raised only.
"""

from __future__ import annotations

from collections.abc import Mapping

MAX_MULTIPLIER = 4.0
EXPONENT = 0.5


def multipliers_from_shares(
    shares: Mapping[str, float], *, largest: float = MAX_MULTIPLIER, exponent: float = EXPONENT
) -> dict[str, float]:
    """Return m_b = clip((max s / s_b)^exponent, 1, largest).

    Args:
        shares: The share of each block in the curvature, of steps at a multiplier of 1 (see `at_unit_multipliers`).
        largest: The largest multiplier, at least 1.
        exponent: How much of the ratio of shares is made up for; above 0.

    Returns:
        By block the multiplier; 1 for all where no block has a positive share, as where the loss is concave along the
        step.
    """
    most = max(shares.values(), default=0.0)
    if not most > 0:
        return dict.fromkeys(shares, 1.0)
    # A share that is zero or negative costs nothing to raise.
    ratios = {block: most / share if share > 0 else float("inf") for block, share in shares.items()}
    return {block: min(max(ratio**exponent, 1.0), largest) for block, ratio in ratios.items()}


def at_unit_multipliers(parts: Mapping[str, float], multipliers: Mapping[str, float]) -> dict[str, float]:
    """Return by how much the curvature grows with each block's multiplier.

    A block's step is its multiplier times a step v_b, so that v_bᵀ(Hu)_b = u_bᵀ(Hu)_b / m_b is the derivative of
    ½uᵀHu by m_b. Without this a raise would lift the share that it came from, and so undo itself.

    Args:
        parts: u_bᵀ(Hu)_b by block.
        multipliers: Those in force for that step; a block that is not named has 1.
    """
    return {block: part / multipliers.get(block, 1.0) for block, part in parts.items()}
