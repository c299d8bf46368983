"""Finds the rows of a batch: the dimension of each argument along which the model treats every entry by itself.

A model computes each row's outputs from that row alone, so f(slice of the batch) = slice of f(batch). Which dimension
has this property is tried, on two rows and on the second of them alone: a causal model's first positions do not depend
on later ones, so a beginning of the sequences would pass for rows.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sharpwatch.curvature.objective.batch import Batch, row_axis
from sharpwatch.curvature.objective.outputs import named_outputs
from sharpwatch.errors import ObjectiveError, UndecidedError

_MIN_TOLERANCE = 2e-3  # kernels for one row and for two may round to TF32 differently
_TOLERANCE_UNITS = 8
_SIZES = 3  # of a dimension, by how many tensors have them
_TRIAL_ERRORS = (RuntimeError, ValueError, IndexError, TypeError, KeyError, AssertionError)

Finding = Literal["rows", "alike", "unseen", "none"]


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Where the rows of a call are.

    Attributes:
        axes: As `Batch.axes`; None for the first dimension, by the vote of `Batch.rows`.
        interleaved: In an output with several entries for each row, they are apart: entry i belongs to row i mod rows.
        certain: Whether another batch can't show more.
    """

    axes: tuple[int | None, ...] | None = None
    interleaved: bool = False
    certain: bool = True


def find_rows(call: Callable[[Batch], Any], batch: Batch, precision: float) -> RowLayout:
    """Find the rows of a batch by two forwards, on two rows and on one; a few more if the first dimension has none.

    Args:
        call: Runs the model on a batch, without side effects, and returns its output.
        batch: The arguments of the model.
        precision: ε of the least precise format that the model computes in.

    Returns:
        The layout. A single row, a loss as the only output, and a model that draws random numbers show nothing: the
        first dimension is taken then.

    Raises:
        ObjectiveError: No dimension has rows that the model treats apart.
        UndecidedError: Several do, as the outputs are all alike.
    """
    trial = _Trial(call, max(_MIN_TOLERANCE, _TOLERANCE_UNITS * precision))
    alike: list[RowLayout] = []
    for axes in _candidates(batch):
        candidate = replace(batch, axes=axes)
        if candidate.rows == 1:
            call(candidate.slice(torch.zeros(1, dtype=torch.int64, device="cpu")))
            return RowLayout(axes, certain=False)
        finding, interleaved = trial.finding(candidate)
        if finding in {"rows", "unseen"}:
            return RowLayout(axes, interleaved)
        if finding == "alike":
            alike.append(RowLayout(axes, interleaved, certain=False))
    if len(alike) > 1:
        what = "which dimension of the batch has the rows is undecided"
        raise UndecidedError(f"{what}: the model's outputs are all alike")
    if not alike:
        raise trial.refusal
    return alike[0]


def precision_of(model: nn.Module) -> float:
    """ε of the least precise format among the model's weights and the autocast in force."""
    formats = {parameter.dtype for parameter in model.parameters()}
    for kind in {
        "cpu",
        *(parameter.device.type for parameter in model.parameters() if parameter.device.type != "meta"),
    }:
        if torch.is_autocast_enabled(kind):
            formats.add(torch.get_autocast_dtype(kind))
    # Quantized weights are multiplied in half precision.
    return max(torch.finfo(each if each.is_floating_point else torch.bfloat16).eps for each in formats)


def select_rows(values: Tensor, rows: Tensor, of: int, *, interleaved: bool, like: torch.Size) -> Tensor:
    """Select what belongs to some rows.

    Args:
        values: One value for each position of an output on the whole batch.
        rows: Int64 [n], the rows.
        of: Number of rows of the batch.
        interleaved: As in `RowLayout`.
        like: The shape that the result must have.

    Returns:
        The values of these rows.

    Raises:
        ObjectiveError: No dimension of `values` has entries for each row.
    """
    if values.shape == like:
        return values
    for axis, (whole, part) in enumerate(zip(values.shape, like, strict=False)):
        if whole != part and whole % of == 0 and part * of == whole * len(rows):
            count = whole // of
            entries = torch.arange(whole, device=rows.device).view((count, of) if interleaved else (of, count))
            index = entries[:, rows] if interleaved else entries[rows]
            chosen = values.index_select(axis, index.reshape(-1).to(values.device))
            if chosen.shape == like:
                return chosen
    raise ObjectiveError(f"output positions {tuple(values.shape)} can't be cut to {tuple(like)} by rows; pass loss_fn")


def _candidates(batch: Batch) -> Iterator[tuple[int | None, ...] | None]:
    """Axes to try, the likely ones first."""
    yield None
    tensors = [tensor for tensor, _ in batch.named_tensors()]
    seen = {_axes(batch, batch.rows, (0,))}
    for masks, choices in itertools.product((False, True), ((0,), (1,), (0, 1))):
        sizes = Counter(t.shape[axis] for t in tensors for axis in choices if t.dim() >= 2 and t.shape[axis] > 1)
        for size, _ in sizes.most_common(_SIZES):
            axes = _axes(batch, size, choices, masks=masks)
            if axes not in seen and any(axis is not None for axis in axes):
                seen.add(axes)
                yield axes


def _axes(batch: Batch, rows: int, choices: tuple[int, ...], *, masks: bool = False) -> tuple[int | None, ...]:
    """For each tensor the first dimension among `choices` that runs over `rows` rows; None for one without.

    With `masks` it is None for what may be a mask of attention, [T, T], in a batch with as many rows.
    """
    found = (
        [None if masks and _may_be_mask(tensor) else row_axis(tensor, name, rows, axis) for axis in choices]
        for tensor, name in batch.named_tensors()
    )
    return tuple(next((axis for axis in axes if axis is not None), None) for axes in found)


def _may_be_mask(tensor: Tensor) -> bool:
    is_kind = tensor.is_floating_point() or tensor.dtype == torch.bool
    return is_kind and tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1]


class _Trial:
    """Runs a model on two rows and on one."""

    def __init__(self, call: Callable[[Batch], Any], tolerance: float) -> None:
        self._ran = False
        self._failure: Exception | None = None  # of the first candidate
        self._call = call
        self._tolerance = tolerance

    def finding(self, batch: Batch) -> tuple[Finding, bool]:
        """What two forwards show of the rows that `batch.axes` names, and whether outputs are interleaved."""
        try:
            return self._try(batch)
        except torch.OutOfMemoryError:
            raise
        except _TRIAL_ERRORS as error:  # this is how a model answers to a wrong dimension
            self._failure = self._failure or error
            return "none", False

    @property
    def refusal(self) -> Exception:
        """What is wrong with all candidates."""
        if self._failure is not None and not self._ran:
            return self._failure
        what = "the batch can't be cut into rows"
        return ObjectiveError(f"{what}: the model's outputs of some rows depend on the other rows")

    def _try(self, batch: Batch) -> tuple[Finding, bool]:
        last = batch.rows - 1
        both, second = torch.tensor([0, last], device="cpu"), torch.tensor([last], device="cpu")
        two, one = self._outputs(batch.slice(both)), self._outputs(batch.slice(second))
        is_first, self._ran = not self._ran, True
        if not one:
            return "unseen", False
        for interleaved in (False, True):
            finding = _compare(two, one, self._tolerance, interleaved=interleaved)
            if finding != "none":
                return finding, interleaved
        # Random numbers make every comparison worthless, and one might succeed by chance.
        if is_first and self._is_random(one, self._outputs(batch.slice(second))):
            return "unseen", False
        return "none", False

    def _outputs(self, batch: Batch) -> dict[str, Tensor]:
        return named_outputs(self._call(batch))

    def _is_random(self, once: dict[str, Tensor], again: dict[str, Tensor]) -> bool:
        return any(not _agree(once[name], again[name], self._tolerance) for name in once)


def _compare(two: dict[str, Tensor], one: dict[str, Tensor], tolerance: float, *, interleaved: bool) -> Finding:
    """Whether `one` is the second row of `two`; "alike" if it is the first one just as well."""
    findings: set[Finding] = set()
    for name, alone in one.items():
        both = two.get(name)
        if both is None or both.dim() != alone.dim():
            return "none"
        differing = [axis for axis in range(both.dim()) if both.shape[axis] != alone.shape[axis]]
        if not differing:
            continue  # no output for each row
        axis, count = differing[0], alone.shape[differing[0]]
        if len(differing) > 1 or both.shape[axis] != 2 * count:
            return "none"
        entries = torch.arange(2 * count, device=both.device).view((count, 2) if interleaved else (2, count))
        first, second = (both.index_select(axis, each) for each in (entries.T if interleaved else entries))
        if not _agree(second, alone, tolerance):
            return "none"
        findings.add("alike" if _agree(first, alone, tolerance) else "rows")
    if not findings:
        return "none"
    return "rows" if "rows" in findings else "alike"


def _agree(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Whether most entries agree: a router may send single positions elsewhere for a rounding error."""
    one, other = one.float(), other.float()
    size = other.square().mean().sqrt() + other.abs()
    # Masked logits may be infinite on both sides.
    close = ((one - other).abs() <= tolerance * size) | (one == other)
    return 2 * int(close.sum()) > close.numel()
