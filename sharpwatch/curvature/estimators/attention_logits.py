"""How large attention logits can get: the spectral norm of each head's product of queries and keys.

The logit of two inputs x and y is xᵀW_Qᵀ W_K y / √d_head, for matrices [d_head, d] of one head: for inputs of length 1
at most ‖W_Qᵀ W_K‖₂ / √d_head. Its growth goes before the collapse of attention's entropy (Zhai et al. 2023, Stabilizing
Transformer Training by Preventing Attention Entropy Collapse, arXiv 2303.06296) and before divergence (Wortsman et al.
2023, Small-scale proxies for large-scale Transformer training instabilities, arXiv 2309.14322). Biases, the scales of
a norm before attention and rotations by position are left out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sharpwatch.blocks.attention_heads import AttentionHeads

ITERATIONS = 2  # power iterations of a measurement
FIRST_ITERATIONS = 16  # of the first one, whose vectors are random


class AttentionLogits:
    """Measures the scale of attention logits, each time from the vectors of the time before.

    The vectors are kept on the host, with `d_head` entries for each head: memory of an accelerator that is held between
    measurements could be missing in a step.

    Args:
        attentions: Queries and keys of each attention.
        layer_blocks: The number L of layer blocks.
        seed: Of the first vectors, which come from a generator of their own.
    """

    def __init__(self, attentions: Sequence[AttentionHeads], layer_blocks: int, seed: int) -> None:
        self._attentions = attentions
        self._layer_blocks = layer_blocks
        source = torch.Generator("cpu").manual_seed(seed)
        self._vectors = [
            torch.randn(each.key_heads, each.heads // each.key_heads, each.width, generator=source, device="cpu")
            for each in attentions
        ]
        self._is_warm = False

    @torch.no_grad()
    def measure(self, weights: Mapping[str, Tensor]) -> npt.NDArray[np.float32]:
        """Returns the largest scale over the heads of each layer block, float32 [L]; NaN for one without attention.

        Each is a lower bound, which comes closer as weights change little from one call to the next.

        Args:
            weights: The parameters by name.
        """
        found: dict[torch.device, list[tuple[int, Tensor]]] = defaultdict(list)
        for place, (heads, vectors) in enumerate(zip(self._attentions, self._vectors, strict=True)):
            queries, keys = heads.matrices(weights)
            count = ITERATIONS if self._is_warm else FIRST_ITERATIONS
            norms, after = _in_float32(queries, keys, vectors.to(queries.device), count)
            scale = norms.amax() / math.sqrt(heads.width)
            found[queries.device].append((place, torch.cat([scale[None], after.flatten()])))
        scales = np.full(self._layer_blocks, np.nan, dtype=np.float32)
        for each in found.values():
            # In one copy, which waits for the device once.
            values = torch.cat([value for _, value in each]).cpu()
            for (place, _), one in zip(each, torch.split(values, [len(value) for _, value in each]), strict=True):
                layer_block = self._attentions[place].layer_block
                scales[layer_block] = _larger(scales[layer_block], float(one[0]))
                self._vectors[place] = one[1:].view_as(self._vectors[place])
        self._is_warm = True
        return scales


def power_iterations(queries: Tensor, keys: Tensor, vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Power iterations for the largest singular value of M = W_Qᵀ W_K of each head, without forming M.

    A vector c stands for u = W_Qᵀc / ‖W_Qᵀc‖, which is what an iteration makes of any start. The new one is
    c = W_K v / ‖v‖ with v = Mᵀu = W_Kᵀ W_Q u, so that u turns to M Mᵀu (Golub and Van Loan, Matrix Computations, 8.6).

    Args:
        queries: W_Q of each head, [key heads, g, width, inputs], where g query heads share a key head.
        keys: W_K of each key head, [key heads, width, inputs].
        vectors: The start c of each head, [key heads, g, width].
        count: How many iterations.

    Returns:
        ‖Mᵀu‖ of the last one, [key heads, g], which is never above the largest singular value; and the vectors to go on
        from. A head whose product is zero or not finite keeps the vector that it had.
    """
    tiny = torch.finfo(queries.dtype).tiny
    norms = vectors.new_zeros(vectors.shape[:-1])
    for _ in range(count):
        u = (vectors[..., None, :] @ queries)[..., 0, :]
        u = u / u.norm(dim=-1, keepdim=True).clamp_min(tiny)
        v = (queries @ u[..., None])[..., 0] @ keys
        norms = v.norm(dim=-1)
        after = (v / norms[..., None].clamp_min(tiny)) @ keys.mT
        known = (norms > 0) & after.isfinite().all(-1)
        vectors = torch.where(known[..., None], after, vectors)
    return norms, vectors


def _in_float32(queries: Tensor, keys: Tensor, vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`power_iterations` in float32; other weights are cast head by head, because memory may be nearly full."""
    if queries.dtype == keys.dtype == torch.float32:
        return power_iterations(queries, keys, vectors, count)
    norms, after = vectors.new_empty(vectors.shape[:-1]), torch.empty_like(vectors)
    for group, matrix in enumerate(keys):
        key = matrix.float()[None]
        for head, query in enumerate(queries[group]):
            at = (slice(group, group + 1), slice(head, head + 1))
            norms[at], after[at] = power_iterations(query.float()[None, None], key, vectors[at], count)
    return norms, after


def _larger(one: float, other: float) -> float:
    """The larger number; a NaN of an attention counts, that of a layer block without one before does not."""
    return other if math.isnan(one) else max(one, other)
