"""From rows of layer blocks to block types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sharpwatch.daemon.ingest.hello import RunHello
from sharpwatch.daemon.ingest.limits import Floats
from sharpwatch.daemon.ingest.samples import TapValues

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class BlockTap:
    """A tap by block type; every array is [B], NaN where nothing was measured."""

    gradient_norm: Doubles
    weight_norm: Doubles
    update_rms: Doubles
    non_finite: npt.NDArray[np.int64]
    learning_rate: Doubles
    lr_multiplier: Doubles


def sum_rows(manifest: RunHello, rows: npt.NDArray[Any]) -> Doubles:
    """Sum of `rows` [..., L] over the layers of each block type, [..., B]."""
    membership = manifest.block_of[:, None] == np.arange(len(manifest.blocks))
    summed: Doubles = np.asarray(rows, dtype=np.float64) @ membership
    return summed


def _bincount(manifest: RunHello, rows: Doubles) -> Doubles:
    # Not a product with the membership matrix: there one NaN or inf would spread over all blocks.
    return np.bincount(manifest.block_of, weights=rows, minlength=len(manifest.blocks)).astype(np.float64)


def _norms(manifest: RunHello, rows: Floats) -> Doubles:
    """Root of the sum of squares: the norm of the parts put together."""
    return np.sqrt(_bincount(manifest, np.square(rows, dtype=np.float64)))


def _means(manifest: RunHello, rows: Doubles) -> Doubles:
    """Mean weighted by parameters over the rows that are not NaN; NaN where there are none."""
    present = ~np.isnan(rows)
    weights = np.where(present, manifest.parameters, 0).astype(np.float64)
    total = _bincount(manifest, weights)
    with np.errstate(invalid="ignore"):
        return _bincount(manifest, np.where(present, rows * manifest.parameters, 0.0)) / total


def block_tap(manifest: RunHello, tap: TapValues) -> BlockTap:
    """Gather a tap of layer blocks into one of block types.

    Norms are roots of sums of squares; RMS_t is a mean over parameters under its root, so it is gathered as the
    parameter-weighted root mean square; rates and multipliers are parameter-weighted means.
    """
    squares = np.square(tap.update_rms, dtype=np.float64)
    return BlockTap(
        gradient_norm=_norms(manifest, tap.gradient_norm),
        weight_norm=_norms(manifest, tap.weight_norm),
        update_rms=np.sqrt(_means(manifest, squares)),
        non_finite=_bincount(manifest, tap.non_finite.astype(np.float64)).astype(np.int64),
        learning_rate=_means(manifest, tap.learning_rate.astype(np.float64)),
        lr_multiplier=_means(manifest, tap.lr_multiplier.astype(np.float64)),
    )
