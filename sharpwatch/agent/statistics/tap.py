"""The free statistics of a step, read from what is there already: gradients, the second moment, weights, rates."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sharpwatch.agent.optimizers.deepspeed import DeepSpeedOptimizer, Fragment, fragments
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
from sharpwatch.curvature.parameters.shards import Shard, local_gradient, local_tensor, needs_redistribution

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class TapReading:
    """One step's statistics, arrays [L] over `block_map.layer_blocks`.

    Norms are over the finite entries, `non_finite` counts the others. `update_rms` is NaN without a second moment, and
    with `gradient_norm` where gradients can't be read.
    """

    gradient_norm: Array
    weight_norm: Array
    update_rms: Array
    non_finite: Array
    learning_rate: Array
    lr_multiplier: Array


class AsyncHostCopy:
    """A small tensor on its way to the host; nothing waits for it."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = tensor.detach()
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            self._host.copy_(tensor.detach(), non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(tensor.device))

    @property
    def ready(self) -> bool:
        """Whether `read` would return at once."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def read(self) -> Tensor:
        """The tensor on the CPU; waits for it where it must."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.cpu()


@dataclass(slots=True)
class PendingTap:
    """A reading whose numbers may still be on the device.

    `read` are the parts that were looked at, `scattered` those whose gradients no rank has entries of; `host`
    and `device` have sums of pieces, with the parts they are of.
    """

    multipliers: Array
    read: list[int] = field(default_factory=list)
    scattered: list[int] = field(default_factory=list)
    host: list[tuple[list[int], Array]] = field(default_factory=list)
    device: list[tuple[list[int], AsyncHostCopy]] = field(default_factory=list)
    rates: dict[tuple[int, int], float | AsyncHostCopy] = field(default_factory=dict)
    unscale: dict[int, float | AsyncHostCopy] = field(
        default_factory=dict
    )  # by optimizer: the scale still on its gradients

    @property
    def ready(self) -> bool:
        """Whether every number has arrived."""
        late = [later for _, later in self.device]
        late += [value for value in (*self.rates.values(), *self.unscale.values()) if isinstance(value, AsyncHostCopy)]
        return all(later.ready for later in late)


class _HeldParameter(NamedTuple):
    """A parameter that this rank holds something of, the parts it is made of, and the group that steps it."""

    parameter: Tensor
    shard: Shard | Fragment
    rows: list[int]
    group: int | None


class Tap:
    """Reads one model under one or several optimizers.

    Of a sharded model it reads what this rank holds. `shares` are the weights of this rank's sums by parameter, 1 where
    left out: the sum of all ranks' `local` numbers is then the model's.
    """

    columns = COLUMNS + 3  # rates, multipliers, and whether an optimizer holds the part

    def __init__(
        self,
        block_map: BlockMap,
        parameters: Mapping[str, Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
        shares: Mapping[str, float] | None = None,
    ) -> None:
        self._parts = block_map.parts
        cut = fragments(optimizers)
        shards = {name: cut.get(id(parameter)) or Shard.of(parameter) for name, parameter in parameters.items()}
        elsewhere = torch.empty(0, device="cpu")  # a parameter of another stage of a pipeline
        self._parameters = [parameters.get(part.parameter, elsewhere) for part in self._parts]
        self._shards = [shards.get(part.parameter, Shard.of(elsewhere)) for part in self._parts]
        self._here = np.array([part.parameter in parameters for part in self._parts])
        self._shares = np.array([(shares or {}).get(part.parameter, 1.0) for part in self._parts]) * self._here
        whole = [max(1, math.prod(block_map.shapes[part.parameter])) for part in self._parts]
        self._held_share = self._shares * [shard.numel for shard in self._shards] / whole
        self._optimizers = optimizers
        self._layer_of = np.array(block_map.layer_block_of)
        self._layers = len(block_map.layer_blocks)
        self._numel = np.array([part.numel for part in self._parts], dtype=np.float64)
        # While none is known, that of a whole part comes from its own mean; a piece's mean is not its part's.
        self._no_floors = np.array([math.nan if shard.is_whole else 0.0 for shard in self._shards])
        self._floors: list[float] = self._no_floors.tolist()
        self._count_exactly = False
        self._scratch = Scratch()
        self._steps: dict[int, tuple[Tensor, int]] = {}  # by parameter id: a device's step counter, and its value
        self._layout: tuple[tuple[int, ...], ...] | None = None
        self._owner: list[tuple[int, int] | None] = []
        self._hidden: list[int] = []  # parts whose gradients can't be read
        self._places: list[list[_HeldParameter]] = []

    def start(self, multipliers: Mapping[int, float]) -> PendingTap:
        """A reading to be filled by each optimizer; `multipliers` by parameter id, 1 where absent."""
        self._find_owners()
        return PendingTap(np.array([multipliers.get(id(parameter), 1.0) for parameter in self._parameters]))

    @torch.no_grad()
    def read(self, pending: PendingTap, which: int) -> None:
        """Read what optimizer `which` is about to step on (the first one also what none of them holds)."""
        optimizer = self._optimizers[which]
        for number, group in enumerate(optimizer.param_groups):
            pending.rates[which, number] = _value(group.get("lr"))
        scale = getattr(optimizer, "grad_scale", None)  # GradScaler leaves unscaling to a fused optimizer
        if scale is not None:
            pending.unscale[which] = _value(scale)
        by_device: dict[torch.device, tuple[list[int], list[PartTensors]]] = defaultdict(lambda: ([], []))
        for place in self._places[which]:
            pending.read += place.rows
            for i, piece in self._pieces(place, optimizer, pending):
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
        """The reading of a model that this process holds alone, once `pending.ready`."""
        return self.reading(self.local(pending))

    def local(self, pending: PendingTap) -> Array:
        """This rank's summand [parts, columns] of the numbers that all ranks' add up to, once `pending.ready`."""
        sums = np.zeros((len(self._parts), COLUMNS))
        sums[self._here, SCALED] = sums[self._here, SECOND] = math.nan
        sums[pending.read] = 0.0  # what no piece is added to is held by other ranks
        for members, values in (*pending.host, *((members, later.read().numpy()) for members, later in pending.device)):
            np.add.at(sums, members, values)
        sums[:, [GRADIENT, SCALED]] /= self._scales(pending)[:, None]
        sums *= self._shares[:, None]
        sums[[*self._hidden, *pending.scattered], GRADIENT] = math.nan
        owned = self._held_share * [owner is not None for owner in self._owner]
        return np.column_stack([sums, owned * self._rates(pending), owned * pending.multipliers, owned])

    def stepped(self, pending: PendingTap) -> Array:
        """Squared norms [parts] of the gradients that are stepped on, where no other rank holds a part of them."""
        squares: Array = self._clipped(self.local(pending))[:, GRADIENT]
        return squares

    def reading(self, sums: Array) -> TapReading:
        """The reading, from the sum over ranks of their `local` numbers.

        It sets the floors of the next ones, so every rank takes its own, after the same step.
        """
        sums = self._clipped(sums)
        rates, multipliers, owned = sums[:, COLUMNS:].T
        floors = FLOOR_SHARE * sums[:, SECOND] / np.maximum(self._numel, 1.0)
        self._floors = np.where(np.isnan(floors), self._no_floors, floors).tolist()
        self._count_exactly = bool((sums[:, NON_FINITE] > 0).any())
        seen = ~np.isnan(sums[:, SCALED])
        counted = self._by_layer(np.where(seen, self._numel, 0.0))
        scaled = self._by_layer(np.where(seen, sums[:, SCALED], 0.0))
        # Of a layer block whose second moments are known in part (8-bit weights with plain biases), nothing is said.
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
        """`sums` of the gradients that are stepped on, also where it is within its `step()` that an optimizer clips."""
        for which, optimizer in enumerate(self._optimizers):
            if isinstance(optimizer, DeepSpeedOptimizer):
                rows = [i for i, owner in enumerate(self._owner) if owner and owner[0] == which]
                excess = (math.sqrt(sums[rows, GRADIENT].sum()) + 1e-6) / optimizer.clips_to
                sums = sums.copy()
                sums[np.ix_(rows, [GRADIENT, SCALED])] /= max(1.0, excess) ** 2
        return sums

    def _by_layer(self, values: Array) -> Array:
        sums: Array = np.bincount(self._layer_of, weights=values, minlength=self._layers)
        return sums

    def _owned_mean(self, values: Array, owned: Array, none: float) -> Array:
        """The parameter-weighted mean over what an optimizer holds; `none` where it holds nothing of a layer block."""
        total = self._by_layer(self._numel * owned)
        means: Array = np.divide(
            self._by_layer(self._numel * values), total, out=np.full(self._layers, none), where=total > 0
        )
        return means

    def _rates(self, pending: PendingTap) -> Array:
        rates = {key: _number(value) for key, value in pending.rates.items()}
        own = np.array([rates.get(owner, 0.0) if owner else 0.0 for owner in self._owner])
        return own * pending.multipliers

    def _scales(self, pending: PendingTap) -> Array:
        """What to divide each part's squared gradient by."""
        squares = {which: _number(value) ** 2 for which, value in pending.unscale.items()}
        return np.array([squares.get(owner[0], 1.0) if owner else 1.0 for owner in self._owner])

    def _find_owners(self) -> None:
        """Which optimizer and group holds each part; looked up again when a group was added or unfrozen."""
        layout = tuple(
            tuple(len(group["params"]) for group in optimizer.param_groups) for optimizer in self._optimizers
        )
        if layout == self._layout:
            return
        self._layout = layout
        owner = {
            id(parameter): (which, number)
            for which, optimizer in enumerate(self._optimizers)
            for number, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        }
        self._owner = [owner.get(id(parameter)) for parameter in self._parameters]
        hidden = [
            isinstance(optimizer, DeepSpeedOptimizer) and bool(optimizer.hidden) for optimizer in self._optimizers
        ]
        self._hidden = [i for i, owner in enumerate(self._owner) if owner and hidden[owner[0]]]
        rows: dict[int, list[int]] = {}
        for i in np.flatnonzero(self._here).tolist():
            rows.setdefault(id(self._parameters[i]), []).append(i)
        self._places = [[] for _ in self._optimizers]
        for first, *more in rows.values():
            which, number = self._owner[first] or (0, None)
            self._places[which].append(
                _HeldParameter(self._parameters[first], self._shards[first], [first, *more], number)
            )

    def _pieces(
        self, place: _HeldParameter, optimizer: torch.optim.Optimizer, pending: PendingTap
    ) -> Iterator[tuple[int, PartTensors]]:
        """The pieces that this rank holds, each with its part: where nothing is cut, one of each part."""
        parameter, shard, rows, number = place
        if not isinstance(shard, Fragment):
            weight, gradient, like = local_tensor(parameter), None, parameter
            if needs_redistribution(parameter):
                pending.scattered += rows
            else:
                gradient = local_gradient(parameter)
            group = None if number is None else optimizer.param_groups[number]
            state = optimizer.state.get(parameter)  # `get`: the defaultdict must not grow
        elif shard.numel:
            weight, gradient, group, state = shard.weight, shard.gradient, shard.group, shard.state
            like = weight
        else:
            return
        if not weight.numel() or not (weight.is_floating_point() or weight.is_complex()):
            return  # codes of a quantised weight have no norm
        second, correction = None, 1.0
        # A sparse gradient has rows, not the parameter's shape; it belongs to an embedding, which is never fused.
        dense = gradient is not None and not gradient.is_sparse
        if dense and state and group is not None:
            second, correction = self._second_moment(parameter, group, state, like.shape)
        if weight.is_complex():
            weight, gradient, second = (_real(tensor) for tensor in (weight, gradient, second))
        for i in rows:
            part, floor = self._parts[i], self._floors[i]
            if part.dim is None and shard.is_whole:  # most are; the rest is slower
                yield i, PartTensors(weight, gradient, second, correction, floor)
                continue
            weights = shard.views(part, weight)
            gradients = [gradient] * len(weights) if gradient is None or not dense else shard.views(part, gradient)
            seconds = [None] * len(weights) if second is None else shard.views(part, second)
            for piece in zip(weights, gradients, seconds, strict=True):
                yield i, PartTensors(*piece, correction, floor)

    def _second_moment(
        self, parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any], shape: torch.Size
    ) -> tuple[Tensor | None, float]:
        """The second moment of step t-1 and 1 - β₂^(t-1): Adam's `exp_avg_sq`, or RMSprop's `square_avg` as it is."""
        second, correction = state.get("square_avg"), 1.0
        # Adafactor's moment has no betas, Adan's has three; Prodigy's is in units of its d.
        if len(group.get("betas", ())) == 2 and "d" not in group:
            steps = self._step_of(parameter, state.get("step", group.get("k", 0)))  # schedule-free: by group
            second = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))  # what divides the step
            correction = 1.0 - float(group["betas"][1]) ** steps
        if not isinstance(second, Tensor) or second.shape != shape or correction <= 0:
            return None, 1.0
        own = local_tensor(second)
        return (own, correction) if type(own) is Tensor else (None, 1.0)  # a quantised one is a tensor of its own kind

    def _step_of(self, parameter: Tensor, step: float | Tensor) -> int:
        """The state's step count; one on a device is read once (and after a reload), then counted along."""
        if not isinstance(step, Tensor) or step.device.type == "cpu":
            return int(step)
        counter, count = self._steps.get(id(parameter), (None, 0))
        count = count + 1 if counter is step else int(step.item())
        self._steps[id(parameter)] = (step, count)
        return count


def _real(tensor: Tensor | None) -> Any:
    """Real and imaginary parts, as Adam takes them."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor is not None and tensor.is_complex() else tensor


def _counts(parts: Sequence[PartTensors], sums: Tensor) -> Tensor:
    """Entries of the gradients that are not finite, [P] on the device: a slower read after a damaged one."""
    zero = sums.new_zeros(())
    gradients = [part.gradient for part in parts]
    return torch.stack([zero if g is None else (~_values(g).isfinite()).sum().double() for g in gradients])


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _value(value: float | Tensor | None) -> float | AsyncHostCopy:
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return AsyncHostCopy(value)
    return 0.0 if value is None else float(value)  # relative steps: there is no rate


def _number(value: float | AsyncHostCopy) -> float:
    return float(value.read()) if isinstance(value, AsyncHostCopy) else value
