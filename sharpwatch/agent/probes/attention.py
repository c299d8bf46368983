"""The scale of attention logits, measured whenever probes run: a few matrix-vector products, and no forward."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sharpwatch.agent.probes.context import ProbeContext
from sharpwatch.agent.probes.failures import IN_A_ROW
from sharpwatch.agent.probes.out_of_memory import is_out_of_memory
from sharpwatch.agent.safety import from_signal_handler, warn
from sharpwatch.blocks.attention_heads import AttentionHeads, find_attention_heads, why_not_read
from sharpwatch.curvature.estimators.attention_logits import AttentionLogits
from sharpwatch.curvature.state.float32 import float32_exact

_LOG = logging.getLogger("sharpwatch")


class AttentionReader:
    """Reads the scale of attention logits of a run, as far as its heads are known.

    Args:
        context: The run.
        seed: Of the first vectors.

    Attributes:
        note: How many layer blocks are measured, and why others are left out; why the newest reading failed, if it did;
            empty before the first reading, and for a model without attention.
    """

    def __init__(self, context: ProbeContext, seed: int) -> None:
        self.note = ""
        self._context = context
        self._seed = seed
        self._found: tuple[list[AttentionHeads], AttentionLogits] | None = None
        self._summary = ""  # the note while readings succeed
        self._in_a_row = 0
        self._warned: set[str] = set()
        self._is_over = False

    def read(self) -> npt.NDArray[np.float32] | None:
        """Measures once at the present weights.

        Returns:
            Float32 [L], NaN for a layer block without attention; None where nothing can be measured. An error ends the
            readings, at the third time in a row if memory was short. Each kind of error is logged once, and the end.
        """
        if self._is_over:
            return None
        try:
            scales = self._measured()
        except Exception as error:  # exception barrier: a reading never raises into the loop
            if from_signal_handler(error):
                raise
            self._failed(error)
            return None
        self._in_a_row, self.note = 0, self._summary
        return scales

    def _failed(self, error: Exception) -> None:
        self._in_a_row += 1
        self._is_over = self._in_a_row >= IN_A_ROW or not is_out_of_memory(error)
        # The message has numbers that differ each time, as how much memory is free; the kind does not.
        kind = type(error).__name__
        self.note = f"{kind}: {error}"
        if self._is_over:
            times = f"{self._in_a_row} failures in a row" if self._in_a_row > 1 else "a failure"
            self.note = f"given up after {times}: {self.note}"
        if self._is_over or kind not in self._warned:
            warn("the scale of attention logits is not measured: %s", self.note)
        self._warned.add(kind)

    def _measured(self) -> npt.NDArray[np.float32] | None:
        weights = self._context.watched_weights
        if self._found is None:
            self._found = self._find()
        heads, logits = self._found
        if not heads:
            self._is_over = True
            return None
        self._require_readable(heads, weights)
        device = next(iter(weights.values())).device.type
        with float32_exact(), torch.autocast(device, enabled=False):
            return logits.measure(weights)

    def _find(self) -> tuple[list[AttentionHeads], AttentionLogits]:
        block_map = self._context.block_map
        heads, left_out = find_attention_heads(self._context.model, block_map)
        measured = {each.layer_block for each in heads}
        names = [".".join(filter(None, (each.layer, each.type))) for each in block_map.layer_blocks]
        by_reason: dict[str, list[str]] = {}
        for index, reason in left_out.items():
            by_reason.setdefault(reason, []).append(names[index])
        reasons = [f"{_first(blocks)} left out: {reason}" for reason, blocks in by_reason.items()]
        if heads or reasons:
            self._summary = "; ".join([f"{len(measured)} layer blocks measured", *reasons])
        if reasons:
            _LOG.info("scale of attention logits: %s", self._summary)
        digest = hashlib.sha256(f"{self._seed}/attention".encode()).digest()
        seed = int.from_bytes(digest[:8], "little") >> 1
        return heads, AttentionLogits(heads, len(block_map.layer_blocks), seed)

    def _require_readable(self, heads: list[AttentionHeads], weights: Mapping[str, Tensor]) -> None:
        shapes = self._context.block_map.shapes
        names = {each.part.parameter for head in heads for each in (head.query, head.key) if each is not None}
        for name in names:
            if reason := why_not_read(weights[name], shapes[name]):
                raise ValueError(f"{name}: {reason}")


def _first(names: list[str]) -> str:
    more = len(names) - 1
    return names[0] + (f" and {more} more" if more else "")
