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


class AsyncHostCopy:
    """A copy of `tensor` on the host, made without waiting for the device. Poll `ready`, then call `read`."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = tensor.detach()
        if tensor.device.type == "cuda":
            # Pinned, or CUDA would make the copy wait for the device.
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            self._host.copy_(tensor.detach(), non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(tensor.device))

    @property
    def ready(self) -> bool:
        """Whether `read` would return at once."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def read(self) -> Tensor:
        """The tensor on the CPU; waits until it has arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.cpu()


@dataclass(frozen=True, slots=True)
class TapReading:
    """The statistics of one step: arrays [L], one entry for each of `block_map.layer_blocks`.

    Attributes:
        gradient_norm: Norm of the finite entries of the gradient; NaN if it can't be read.
        weight_norm: Norm of the finite entries of the weights.
        update_rms: Root mean square of g / √v̂; NaN without a second moment, or if the gradient can't be read.
        non_finite: The number of entries of the gradient that are not finite.
        learning_rate: Mean learning rate over the parameters, multiplier included.
        lr_multiplier: Mean multiplier over the parameters.
    """

    gradient_norm: Array
    weight_norm: Array
    update_rms: Array
    non_finite: Array
    learning_rate: Array
    lr_multiplier: Array


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
    """

    multipliers: Array
    read: list[int] = field(default_factory=list)
    scattered: list[int] = field(default_factory=list)
    host: list[tuple[list[int], Array]] = field(default_factory=list)
    device: list[tuple[list[int], AsyncHostCopy]] = field(default_factory=list)
    learning_rates: dict[tuple[int, int], float | AsyncHostCopy] = field(default_factory=dict)
    unscale: dict[int, float | AsyncHostCopy] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        """Whether every number has arrived."""
        copies = [sums for _, sums in self.device]
        scalars = (*self.learning_rates.values(), *self.unscale.values())
        copies += [value for value in scalars if isinstance(value, AsyncHostCopy)]
        return all(copy.ready for copy in copies)


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

    columns = COLUMNS + 3  # the sums, then learning rate, multiplier, and whether an optimizer holds the part

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

    def start(self, multipliers: Mapping[int, float]) -> PendingTap:
        """Start the reading of a step; `multipliers` are by parameter id, 1 if absent."""
        self._find_owners()
        return PendingTap(np.array([multipliers.get(id(parameter), 1.0) for parameter in self._parameters]))

    @torch.no_grad()
    def read(self, pending: PendingTap, which: int) -> None:
        """Read what an optimizer is about to step on; the first one also reads parameters that no optimizer holds."""
        optimizer = self._optimizers[which]
        for i, group in enumerate(optimizer.param_groups):
            pending.learning_rates[which, i] = _copied(group.get("lr"))
        scale = getattr(optimizer, "grad_scale", None)  # GradScaler leaves unscaling to a fused optimizer
        if scale is not None:
            pending.unscale[which] = _copied(scale)
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

    def resolve(self, pending: PendingTap) -> TapReading:
        """The reading of a model that this process holds alone. Call it once `pending.ready`."""
        return self.reading(self.local(pending))

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
        return np.column_stack([sums, owned * self._learning_rates(pending), owned * pending.multipliers, owned])

    def stepped(self, pending: PendingTap) -> Array:
        """Squared norms [parts] of the gradients after clipping, of a model that this process holds alone."""
        squares: Array = self._clipped(self.local(pending))[:, GRADIENT]
        return squares

    def reading(self, sums: Array) -> TapReading:
        """Turn the sum of all ranks' `local` arrays into a reading.

        This also sets the floors of the next readings, so every rank must call it, after the same step.
        """
        sums = self._clipped(sums)
        rates, multipliers, owned = sums[:, COLUMNS:].T
        floors = FLOOR_SHARE * sums[:, SECOND] / np.maximum(self._numel, 1.0)
        self._floors = np.where(np.isnan(floors), self._no_floors, floors).tolist()
        self._count_exactly = bool((sums[:, NON_FINITE] > 0).any())
        seen = ~np.isnan(sums[:, SCALED])
        counted = self._by_layer(np.where(seen, self._numel, 0.0))
        scaled = self._by_layer(np.where(seen, sums[:, SCALED], 0.0))
        # A layer block has no update_rms if only some of its second moments are known (8-bit weights, plain biases).
        whole = self._by_layer(~seen & (sums[:, GRADIENT] != 0)) == 0
        known = (counted > 0) & whole
        return TapReading(
            gradient_norm=np.sqrt(self._by_layer(sums[:, GRADIENT])),
            weight_norm=np.sqrt(self._by_layer(sums[:, WEIGHT])),
            update_rms=np.sqrt(np.divide(scaled, counted, out=np.full(self._layers, math.nan), where=known)),
            non_finite=np.rint(self._by_layer(sums[:, NON_FINITE])).astype(np.int64),
            learning_rate=self._owned_mean(rates, owned, 0.0),
            lr_multiplier=self._owned_mean(multipliers, owned, 1.0),
        )

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
        rates = {key: _as_number(value) for key, value in pending.learning_rates.items()}
        own = np.array([rates.get(owner, 0.0) if owner else 0.0 for owner in self._owner])
        return own * pending.multipliers

    def _scales(self, pending: PendingTap) -> Array:
        """The square of the loss scale that each part's gradient still has."""
        squares = {which: _as_number(value) ** 2 for which, value in pending.unscale.items()}
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


def _copied(value: float | Tensor | None) -> float | AsyncHostCopy:
    """`value` as a number, or as a host copy if it is on a device; 0 for None, as there is no learning rate then."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return AsyncHostCopy(value)
    return 0.0 if value is None else float(value)


def _as_number(value: float | AsyncHostCopy) -> float:
    return float(value.read()) if isinstance(value, AsyncHostCopy) else value
