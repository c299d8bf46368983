"""The tap: statistics of every step, read from the gradients, second moments, weights and learning rates in use."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sharpwatch.agent.optimizers.step_tensors import Layout, LocalEntries, SecondMoments, StepTensors
from sharpwatch.agent.statistics.clipping import Clip, Clips
from sharpwatch.agent.statistics.group_settings import GroupSettings, group_settings
from sharpwatch.agent.statistics.host_copy import AsyncHostCopy, Number, copied, is_ready, number
from sharpwatch.agent.statistics.reductions import (
    COLUMNS,
    FLOOR_SHARE,
    GRADIENT,
    NON_FINITE,
    SCALED,
    SECOND,
    WEIGHT,
    PartTensors,
    Scratch,
    device_sums,
    host_sums,
)
from sharpwatch.blocks import BlockMap
from sharpwatch.blocks.blockmap import part_views
from sharpwatch.curvature.parameters.shards import Shard

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class TapReading:
    """The statistics of one step: arrays [L], one entry for each of `block_map.layer_blocks`.

    Attributes:
        gradient_norm: Norm of the finite entries of the gradient; NaN if it can't be read. Before clipping, as far as
            the clipping is known.
        weight_norm: Norm of the finite entries of the weights.
        update_rms: Root mean square of g / √v̂; NaN without a second moment, or if the gradient can't be read. Of
            the gradient that is stepped on, after clipping.
        non_finite: The number of entries of the gradient that are not finite.
        learning_rate: Mean learning rate over the parameters, multiplier included.
        lr_multiplier: Mean multiplier over the parameters.
        second_moment: Mean of v̂ before the step; NaN where it is not known of all parameters.
        changed_parameter: The parameter that has moved the weight norm the most since the reading before, by its index
            in `block_map.parameter_names`; -1 where there is none.
        non_finite_parameter: The same of the one with the most entries of the gradient that are not finite, -1 also
            where several have as many; None where all are finite.
        zero_gradients: The number of parameters with a second moment whose gradient is exactly zero; None where there
            is none.
        zero_parameter: The one of these, by its index, -1 where there are several or none; None as before.
        clip_factor: The gradient's norm after clipping over that before; NaN if no clipping was seen or told.
    """

    gradient_norm: Array
    weight_norm: Array
    update_rms: Array
    non_finite: Array
    learning_rate: Array
    lr_multiplier: Array
    second_moment: Array
    changed_parameter: Array
    non_finite_parameter: Array | None = None
    zero_gradients: Array | None = None
    zero_parameter: Array | None = None
    clip_factor: float = math.nan


@dataclass(slots=True)
class PendingTap:
    """A reading whose numbers may still be on the device.

    Attributes:
        multipliers: The learning-rate multiplier of each part.
        read: The parts that were read.
        scattered: Of these, the parts whose gradient no rank has yet, because the optimizer itself reduces it.
        host: Sums of pieces computed on the CPU, each with the part that it belongs to.
        device: The same, computed on a device.
        learning_rates: The learning rates, by optimizer and parameter group.
        unscale: By optimizer, the loss scale that its gradients still have.
        clips: The clippings since the step before.
        groups: The settings of the optimizers' parameter groups.
    """

    multipliers: Array
    read: list[int] = field(default_factory=list)
    scattered: list[int] = field(default_factory=list)
    host: list[tuple[list[int], Array]] = field(default_factory=list)
    device: list[tuple[list[int], AsyncHostCopy]] = field(default_factory=list)
    learning_rates: dict[tuple[int, int], Number] = field(default_factory=dict)
    unscale: dict[int, Number] = field(default_factory=dict)
    clips: list[Clip] = field(default_factory=list)
    groups: list[GroupSettings] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        """Whether every number has arrived."""
        scalars = (*self.learning_rates.values(), *self.unscale.values(), *(group.steps for group in self.groups))
        arrived = all(sums.ready for _, sums in self.device) and all(clip.ready for clip in self.clips)
        return arrived and all(map(is_ready, scalars))


class _HeldParameter(NamedTuple):
    """A parameter of which this rank holds entries, with the rows of its parts and the group that steps it."""

    parameter: Tensor
    entries: LocalEntries
    is_whole: bool
    rows: list[int]
    group: int | None


class Tap:
    """Reads the statistics of a model right before its optimizers step.

    For each step call `start`, `read` for every optimizer, and `resolve` once the reading is ready. If a model is held
    by several ranks, sum their `local` arrays and pass the result to `reading` instead.

    Args:
        block_map: The blocks of the model.
        parameters: Its parameters by name, those of this rank.
        optimizers: The optimizers that step them; the methods name one by its index `which`.
        shares: By parameter name, the weight of this rank's sums, 1 if absent; over all ranks the weighted sums must
            add up to those of the model.
        layout: Where the optimizers keep what they step on; by default as torch's own do.
    """

    # The sums, then g² before clipping, learning rate, multiplier, and whether an optimizer holds the part.
    columns = COLUMNS + 4

    def __init__(
        self,
        block_map: BlockMap,
        parameters: Mapping[str, Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
        shares: Mapping[str, float] | None = None,
        layout: Layout | None = None,
    ) -> None:
        self._parts = block_map.parts
        self._layout = layout or Layout()
        entries = self._layout.local_entries(parameters)
        elsewhere = torch.empty(0, device="cpu")  # a parameter of another stage of a pipeline
        self._parameters = [parameters.get(part.parameter, elsewhere) for part in self._parts]
        self._entries = [entries.get(part.parameter, Shard.of(elsewhere)) for part in self._parts]
        self._here = np.array([part.parameter in parameters for part in self._parts])
        self._shares = np.array([(shares or {}).get(part.parameter, 1.0) for part in self._parts]) * self._here
        whole = [max(1, math.prod(block_map.shapes[part.parameter])) for part in self._parts]
        self._held_share = self._shares * [each.numel for each in self._entries] / whole
        self._optimizers = optimizers
        self._layer_of = np.array(block_map.layer_block_of)
        self._layers = len(block_map.layer_blocks)
        self._culprits = Culprits(block_map)
        self._numel = np.array([part.numel for part in self._parts], dtype=np.float64)
        # Until a floor is known, a whole part computes its own from its mean. A piece can't: its mean is another.
        self._no_floors = np.array([math.nan if each.is_whole else 0.0 for each in self._entries])
        self._floors: list[float] = self._no_floors.tolist()
        self._count_exactly = False
        self._scratch = Scratch()
        self._second_moments = SecondMoments()
        self._group_sizes: tuple[tuple[int, ...], ...] | None = None
        self._owner: list[tuple[int, int] | None] = []
        self._hidden: list[int] = []  # parts whose gradients can't be read
        self._places: list[list[_HeldParameter]] = []
        self.clips = Clips(parameters.values())

    def start(self, multipliers: Mapping[int, float]) -> PendingTap:
        """Start the reading of a step; `multipliers` are by parameter id, 1 if absent."""
        self._find_owners()
        return PendingTap(np.array([multipliers.get(id(parameter), 1.0) for parameter in self._parameters]))

    @torch.no_grad()
    def read(self, pending: PendingTap, which: int) -> None:
        """Read what an optimizer is about to step on; the first one also reads parameters that no optimizer holds."""
        optimizer = self._optimizers[which]
        for i, group in enumerate(optimizer.param_groups):
            pending.learning_rates[which, i] = copied(group.get("lr"))
            pending.groups.append(group_settings(optimizer, which, i))
        pending.clips += self.clips.take()
        scale = getattr(optimizer, "grad_scale", None)  # GradScaler leaves unscaling to a fused optimizer
        if scale is not None:
            pending.unscale[which] = copied(scale)
        by_device: dict[torch.device, tuple[list[int], list[PartTensors]]] = defaultdict(lambda: ([], []))
        places = self._places[which]
        tensors = self._layout.all_tensors([(place.parameter, place.group) for place in places], optimizer)
        moments = self._second_moments.read_all([place.parameter for place in places], tensors)
        for place, held, moment in zip(places, tensors, moments, strict=True):
            pending.read += place.rows
            if held is None:
                continue
            if held.scattered:
                pending.scattered += place.rows
            for i, piece in self._pieces(place, held, moment):
                members, pieces = by_device[piece.weight.device]
                members.append(i)
                pieces.append(piece)
        for device, (members, pieces) in by_device.items():
            if device.type == "cpu":
                pending.host.append((members, host_sums(pieces, self._scratch)))
            else:
                sums = device_sums(pieces)
                if self._count_exactly:
                    sums[:, NON_FINITE] = _counts(pieces, sums)
                pending.device.append((members, AsyncHostCopy(sums)))

    def resolve(self, pending: PendingTap, told_norm: float = math.nan) -> TapReading:
        """The reading of a model that this process holds alone. Call it once `pending.ready`.

        Args:
            pending: What was read.
            told_norm: As in `reading`.
        """
        return self.reading(self.local(pending), told_norm)

    def local(self, pending: PendingTap) -> Array:
        """This rank's sums [parts, columns], to be added to those of the other ranks. Call it once `pending.ready`."""
        sums = np.zeros((len(self._parts), COLUMNS))
        sums[self._here, SCALED] = sums[self._here, SECOND] = math.nan
        sums[pending.read] = 0.0  # a part without a piece here is held by other ranks
        for members, values in (*pending.host, *((members, copy.read().numpy()) for members, copy in pending.device)):
            # Not `+=`: a part may have several pieces here, and numpy would count only one of them.
            np.add.at(sums, members, values)
        sums[:, [GRADIENT, SCALED]] /= self._scales(pending)[:, None]
        sums *= self._shares[:, None]
        sums[[*self._hidden, *pending.scattered], GRADIENT] = math.nan
        owned = self._held_share * [owner is not None for owner in self._owner]
        unclipped = sums[:, GRADIENT] / self._clip_factors(pending) ** 2
        for clip in pending.clips:
            if clip.not_finite is not None:  # the others have their NaN from the clipping
                spread = [i for i, each in enumerate(self._parameters) if id(each) in clip.parameters - clip.not_finite]
                sums[spread, NON_FINITE] = 0.0
        return np.column_stack(
            [sums, unclipped, owned * self._learning_rates(pending), owned * pending.multipliers, owned]
        )

    def stepped(self, pending: PendingTap) -> Array:
        """Squared norms [parts] of the gradients after clipping, of a model that this process holds alone."""
        squares: Array = self._clipped(self.local(pending))[:, GRADIENT]
        return squares

    def reading(self, sums: Array, told_norm: float = math.nan) -> TapReading:
        """Turn the sum of all ranks' `local` arrays into a reading.

        This also sets the floors of the next readings, and the weights that they are compared with, so every rank must
        call it, after the same step.

        Args:
            sums: The sum.
            told_norm: The norm of all gradients before clipping, if the loop told it. It serves where no clipping was
                seen.
        """
        sums = self._clipped(sums)
        unclipped, rates, multipliers, owned = sums[:, COLUMNS:].T
        before, after = math.sqrt(np.nansum(unclipped)), math.sqrt(np.nansum(sums[:, GRADIENT]))
        if before == after and after > 0 and math.isfinite(told_norm) and told_norm > 0:
            unclipped, before = unclipped * (told_norm / after) ** 2, told_norm
        floors = FLOOR_SHARE * sums[:, SECOND] / np.maximum(self._numel, 1.0)
        self._floors = np.where(np.isnan(floors), self._no_floors, floors).tolist()
        self._count_exactly = bool((sums[:, NON_FINITE] > 0).any())
        seen = ~np.isnan(sums[:, SCALED])
        counted = self._by_layer(np.where(seen, self._numel, 0.0))
        scaled = self._by_layer(np.where(seen, sums[:, SCALED], 0.0))
        # A layer block has no update_rms if only some of its second moments are known (8-bit weights, plain biases).
        whole = self._by_layer(~seen & (sums[:, GRADIENT] != 0)) == 0
        known = (counted > 0) & whole
        zeros, zero_parameter = self._culprits.zero(sums[:, GRADIENT], sums[:, SCALED])
        return TapReading(
            gradient_norm=np.sqrt(self._by_layer(unclipped)),
            weight_norm=np.sqrt(self._by_layer(sums[:, WEIGHT])),
            update_rms=np.sqrt(np.divide(scaled, counted, out=np.full(self._layers, math.nan), where=known)),
            non_finite=np.rint(self._by_layer(sums[:, NON_FINITE])).astype(np.int64),
            learning_rate=self._owned_mean(rates, owned, 0.0),
            lr_multiplier=self._owned_mean(multipliers, owned, 1.0),
            second_moment=self._second_moment(sums[:, SECOND]),
            changed_parameter=self._culprits.changed(sums[:, WEIGHT]),
            non_finite_parameter=self._culprits.non_finite(sums[:, NON_FINITE]),
            zero_gradients=zeros,
            zero_parameter=zero_parameter,
            clip_factor=after / before if before > 0 else math.nan,
        )

    def _second_moment(self, sums: Array) -> Array:
        """The mean over each layer block, NaN where it is not known of all its parts."""
        means: Array = self._by_layer(sums) / np.maximum(self._by_layer(self._numel), 1.0)
        return means

    def _clip_factors(self, pending: PendingTap) -> Array:
        """What each part's gradient was scaled by, 1 where that is not known; of several clippings the newest."""
        factors: dict[int, float] = {}
        for clip in pending.clips:
            if math.isfinite(factor := clip.factor):
                factors |= dict.fromkeys(clip.parameters, factor)
        return np.array([factors.get(id(parameter), 1.0) for parameter in self._parameters])

    def _clipped(self, sums: Array) -> Array:
        """The sums after the clipping that some optimizers do within their `step()`."""
        for which, limit in self._layout.clip_norms().items():
            rows = [i for i, owner in enumerate(self._owner) if owner and owner[0] == which]
            excess = (math.sqrt(sums[rows, GRADIENT].sum()) + 1e-6) / limit
            sums = sums.copy()
            sums[np.ix_(rows, [GRADIENT, SCALED])] /= max(1.0, excess) ** 2
        return sums

    def _by_layer(self, values: Array) -> Array:
        sums: Array = np.bincount(self._layer_of, weights=values, minlength=self._layers)
        return sums

    def _owned_mean(self, values: Array, owned: Array, none: float) -> Array:
        """The mean by layer block over the entries that an optimizer holds; `none` if there are none."""
        total = self._by_layer(self._numel * owned)
        means: Array = np.divide(
            self._by_layer(self._numel * values), total, out=np.full(self._layers, none), where=total > 0
        )
        return means

    def _learning_rates(self, pending: PendingTap) -> Array:
        rates = {key: number(value) for key, value in pending.learning_rates.items()}
        own = np.array([rates.get(owner, 0.0) if owner else 0.0 for owner in self._owner])
        return own * pending.multipliers

    def _scales(self, pending: PendingTap) -> Array:
        """The square of the loss scale that each part's gradient still has."""
        squares = {which: number(value) ** 2 for which, value in pending.unscale.items()}
        return np.array([squares.get(owner[0], 1.0) if owner else 1.0 for owner in self._owner])

    def _find_owners(self) -> None:
        """Find the optimizer and group of each part, again whenever a group was added or changed its size."""
        sizes = tuple(tuple(len(group["params"]) for group in optimizer.param_groups) for optimizer in self._optimizers)
        if sizes == self._group_sizes:
            return
        self._group_sizes = sizes
        owner = {
            id(parameter): (which, number)
            for which, optimizer in enumerate(self._optimizers)
            for number, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        }
        self._owner = [owner.get(id(parameter)) for parameter in self._parameters]
        self._hidden = [i for i, owner in enumerate(self._owner) if owner and self._layout.is_hidden(owner[0])]
        rows: dict[int, list[int]] = {}
        for i in np.flatnonzero(self._here).tolist():
            rows.setdefault(id(self._parameters[i]), []).append(i)
        self._places = [[] for _ in self._optimizers]
        for first, *more in rows.values():
            which, number = self._owner[first] or (0, None)
            here = self._entries[first]
            self._places[which].append(
                _HeldParameter(self._parameters[first], here, here.is_whole, [first, *more], number)
            )

    def _pieces(
        self, place: _HeldParameter, held: StepTensors, moment: tuple[Tensor | None, float]
    ) -> Iterator[tuple[int, PartTensors]]:
        """The pieces of a parameter on this rank, each with the row of its part; an unsharded part is one piece."""
        second, correction = moment
        weight, gradient = held.weight, held.gradient
        if not weight.numel() or not (weight.is_floating_point() or weight.is_complex()):
            return  # the codes of a quantised weight have no norm
        # A sparse gradient has only some rows, so its shape differs; it belongs to an embedding, which is never fused.
        dense = gradient is not None and not gradient.is_sparse
        if weight.is_complex():
            weight, gradient, second = (_real(tensor) for tensor in (weight, gradient, second))
        # DeepSpeed's tensors are flat even if they are whole.
        in_one_piece = place.is_whole and held.weight.shape == place.parameter.shape
        if in_one_piece and self._parts[place.rows[0]].dim is not None:
            parts = [self._parts[i] for i in place.rows]
            views = part_views(parts, (weight, gradient if dense else None, second))
            for i, (w, g, v) in zip(place.rows, views, strict=True):
                yield i, PartTensors(cast("Tensor", w), g if dense else gradient, v, correction, self._floors[i])
            return
        for i in place.rows:
            part, floor = self._parts[i], self._floors[i]
            if part.dim is None and place.is_whole:  # the usual case, and the fast one
                yield i, PartTensors(weight, gradient, second, correction, floor)
                continue
            weights = place.entries.views(part, weight)
            gradients = (
                [gradient] * len(weights) if gradient is None or not dense else place.entries.views(part, gradient)
            )
            seconds = [None] * len(weights) if second is None else place.entries.views(part, second)
            for piece in zip(weights, gradients, seconds, strict=True):
                yield i, PartTensors(*piece, correction, floor)


class Culprits:
    """Finds in each layer block the parameter that explains most of what the block shows.

    Parameters are named by their index in `block_map.parameter_names` of their layer block, -1 for none.

    Args:
        block_map: The blocks of the model.
    """

    def __init__(self, block_map: BlockMap) -> None:
        names = block_map.parameter_names
        self._sizes = np.array([len(each) for each in names], dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._indices = np.array([i for each in names for i in range(len(each))], dtype=np.int64)
        # The parts of one parameter in one layer block are one row.
        rows = {row: i for i, row in enumerate((block, name) for block, own in enumerate(names) for name in own)}
        places = zip(block_map.layer_block_of, block_map.parts, strict=True)
        self._row_of = np.array([rows[block, part.parameter] for block, part in places], dtype=np.int64)
        self._weights = np.full(len(self._indices), np.nan)  # of the reading before

    def changed(self, weights: Array) -> Array:
        """The parameter of each layer block [L] whose weights have moved the block's norm the most.

        What moves a norm is the sum of squares. A small parameter may change by more of itself and still move nothing.

        Args:
            weights: Sums of squared weights, one a part; those of the call before are what they are compared with.
        """
        before, self._weights = self._weights, self._rows(weights)
        with np.errstate(invalid="ignore"):  # infinite before and now
            return self._largest(np.abs(self._weights - before))

    def non_finite(self, counts: Array) -> Array | None:
        """The parameter of each layer block [L] with the most entries that are not finite; None where all are finite.

        Args:
            counts: Of such entries of the gradient, one a part.
        """
        return self._largest(self._rows(counts)) if counts.any() else None

    def zero(self, gradients: Array, scaled: Array) -> tuple[Array | None, Array | None]:
        """How many parameters of each layer block [L] have a gradient of exactly zero, and which where it is one.

        A parameter without a gradient, or without a second moment, has no sum in `scaled`, and is none of them.

        Args:
            gradients: Sums of squared gradients, one a part.
            scaled: The same, over the second moment.
        """
        if not ((gradients == 0) & (scaled == 0)).any():
            return None, None
        zero = (self._rows(gradients) == 0) & (self._rows(scaled) == 0)
        return np.add.reduceat(zero, self._starts, dtype=np.int64), self._largest(zero.astype(np.float64))

    def _rows(self, values: Array) -> Array:
        rows: Array = np.bincount(self._row_of, weights=values, minlength=len(self._indices))
        return rows

    def _largest(self, values: Array) -> Array:
        """The index of the largest value of each layer block; -1 where it is 0 or unknown, or several are as large."""
        largest = np.maximum.reduceat(values, self._starts)
        is_largest = values == np.repeat(largest, self._sizes)
        alone = np.add.reduceat(is_largest, self._starts, dtype=np.int64) == 1
        with np.errstate(invalid="ignore"):
            alone &= largest > 0
        index: Array = np.add.reduceat(np.where(is_largest, self._indices, 0), self._starts)
        return np.where(alone, index, -1)


def _real(tensor: Tensor | None) -> Any:
    """Real and imaginary parts as separate entries, as Adam handles them."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor is not None and tensor.is_complex() else tensor


def _counts(parts: Sequence[PartTensors], sums: Tensor) -> Tensor:
    """The number of entries of each gradient that are not finite, [P] on the device; costs another pass."""
    zero = sums.new_zeros(())
    gradients = [part.gradient for part in parts]
    return torch.stack([zero if g is None else (~_values(g).isfinite()).sum().double() for g in gradients])


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient
