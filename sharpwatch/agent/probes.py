"""Runs the probes that are due around a step: the batch they see, the weights they compare, what they cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.batch import Batch
from sharpwatch.curvature.direction import DirectionSample, direction_probe
from sharpwatch.curvature.gnb import GnbSample, gnb_probe
from sharpwatch.curvature.outputs import EmptyBatchError
from sharpwatch.curvature.sketch import CountSketch
from sharpwatch.errors import ProbeError

PROBES = ("gnb", "direction")
_DRAWS = 4
_ROW_SHARE = {"gnb": 8, "direction": 4}  # a probe sees one row in so many; its cost goes with it
_FAILURES = 3  # in a row before a kind is given up: one drawing of rows may hold no position that predicts


@dataclass(frozen=True, slots=True)
class GnbReport:
    """A `gnb` probe and its measured seconds."""

    sample: GnbSample
    seconds: float


@dataclass(frozen=True, slots=True)
class DirectionReport:
    """A `direction` probe, ‖d_b‖/‖θ_b‖ by block type, and its measured seconds."""

    sample: DirectionSample
    update_ratio: npt.NDArray[np.float32]
    seconds: float


@dataclass(frozen=True, slots=True)
class ProbeFailure:
    """Why a kind of probe failed last, how often, and whether it was given up."""

    probe: str
    reason: str
    count: int
    disabled: bool


@dataclass(frozen=True, slots=True)
class Autocast:
    """The autocast in force where the model was called, one entry a device type."""

    states: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def now(cls, device_type: str) -> Autocast:
        """What is in force now for the CPU and `device_type`."""
        kinds = sorted({"cpu", device_type})
        return cls(tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds))

    def enter(self, stack: ExitStack) -> None:
        """Put it in force until `stack` unwinds; without the cache, which may hold casts of other weights."""
        for kind, enabled, dtype in self.states:
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))


@dataclass(frozen=True, slots=True)
class Captured:
    """What the model was last called with in training."""

    batch: Batch
    autocast: Autocast


@dataclass(frozen=True, slots=True)
class ProbeRun:
    """What the probes of one step brought."""

    gnb: GnbReport | None = None
    direction: DirectionReport | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


class Probes:
    """The probes of one model: their own random source, their row counts, their failures."""

    def __init__(  # noqa: PLR0913 - what a probe needs to know of the run
        self,
        model: nn.Module,
        block_map: BlockMap,
        *,
        seed: int,
        sketch_size: int,
        loss_fn: Callable[..., Any] | None = None,
        logits_fn: Callable[..., Any] | None = None,
    ) -> None:
        self._model = model
        self._block_map = block_map
        self._device = next(model.parameters()).device
        self._loss_fn = loss_fn
        self._logits_fn = logits_fn
        self._rows_source = torch.Generator().manual_seed(seed)
        self._label_source = torch.Generator(self._device).manual_seed(seed)
        self._sketcher = CountSketch(block_map, size=sketch_size, seed=seed)
        self._row_limit: dict[str, int] = {}
        self._turn = 0
        self._failures: dict[str, ProbeFailure] = {}
        self._in_a_row: dict[str, int] = {}

    @property
    def failures(self) -> Sequence[ProbeFailure]:
        """One entry for each kind that ever failed."""
        return tuple(self._failures.values())

    def copy_weights(self) -> dict[str, Tensor]:
        """θ_t by parameter name, before the step that a `direction` probe looks at."""
        return {name: parameter.detach().clone() for name, parameter in self._model.named_parameters()}

    def capture(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Captured:
        """References, no copies, to what the model is being called with; detached from any graph."""
        return Captured(Batch(_detached(args), _detached(dict(kwargs))), Autocast.now(self._device.type))

    def run(self, kinds: Sequence[str], captured: Captured, before: Mapping[str, Tensor] | None) -> ProbeRun:
        """Run `kinds` at the present weights; a failure is recorded, never raised."""
        done = ProbeRun()
        for kind in kinds:
            started = _now(self._device)
            rows = 0
            try:
                chosen = self._draw_rows(kind, captured.batch.rows)
                rows = len(chosen)
                with ExitStack() as stack:
                    captured.autocast.enter(stack)
                    done = self._run(kind, captured.batch.slice(chosen), before, done, started)
                self._in_a_row[kind] = 0
            except Exception as error:  # noqa: BLE001 - host-safety border: a probe never reaches the loop
                self._fail(kind, error, rows)
            done = replace(done, seconds={**done.seconds, kind: _now(self._device) - started})
        return done

    def disabled(self) -> tuple[str, ...]:
        """The kinds that were given up."""
        return tuple(kind for kind, failure in self._failures.items() if failure.disabled)

    def _run(
        self, kind: str, part: Batch, before: Mapping[str, Tensor] | None, done: ProbeRun, started: float
    ) -> ProbeRun:
        if kind == "gnb":
            sample = gnb_probe(
                self._model,
                self._block_map,
                part,
                draws=_DRAWS,
                generator=self._label_source,
                sketcher=self._sketcher,
                logits_fn=self._logits_fn,
            )
            return replace(done, gnb=GnbReport(sample, _now(self._device) - started))
        if before is None:
            raise RuntimeError("the weights could not be copied before the step")
        displacement = self._displacement(before)
        blocks = self._block_map.blocks
        turn = blocks[self._turn % len(blocks)]
        direction = direction_probe(
            self._model, self._block_map, part, displacement, blocks=(turn,), loss_fn=self._loss_fn
        )
        self._turn += 1
        ratio = self._update_ratio(displacement)
        return replace(done, direction=DirectionReport(direction, ratio, _now(self._device) - started))

    def _draw_rows(self, kind: str, rows: int) -> Tensor:
        """Rows drawn without replacement: the estimate is then of the batch, not of its first rows."""
        wanted = max(1, rows // _ROW_SHARE[kind])
        wanted = min(wanted, self._row_limit.get(kind, wanted))
        return torch.randperm(rows, generator=self._rows_source)[:wanted].sort().values

    def _displacement(self, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """θ_t − θ_{t+1} by parameter name."""
        with torch.no_grad():
            return {name: before[name] - parameter.detach() for name, parameter in self._model.named_parameters()}

    def _update_ratio(self, displacement: Mapping[str, Tensor]) -> npt.NDArray[np.float32]:
        weights = {name: parameter.detach() for name, parameter in self._model.named_parameters()}
        moved = self._block_norms(displacement)
        size = self._block_norms(weights)
        return np.divide(moved, size, out=np.zeros_like(moved), where=size > 0).astype(np.float32)

    def _block_norms(self, tensors: Mapping[str, Tensor]) -> npt.NDArray[np.float64]:
        views = self._block_map.views(tensors)
        exact = [torch.promote_types(view.dtype, torch.float32) for view in views]
        norms = [torch.linalg.vector_norm(view, dtype=dtype) for view, dtype in zip(views, exact, strict=True)]
        squares = torch.stack([norm.to(self._device) for norm in norms]).double().square().cpu().numpy()
        blocks = len(self._block_map.blocks)
        return np.sqrt(np.bincount(np.array(self._block_map.block_of), weights=squares, minlength=blocks))

    def _fail(self, kind: str, error: Exception, rows: int) -> None:
        """Record why; out of memory halves the rows, what keeps failing is given up."""
        count = self._failures[kind].count + 1 if kind in self._failures else 1
        self._in_a_row[kind] = self._in_a_row.get(kind, 0) + 1
        if _out_of_memory(error):
            self._row_limit[kind] = max(1, rows // 2)
            disabled = rows <= 1
        elif isinstance(error, EmptyBatchError):
            disabled = False  # the labels' doing, as in a row that is all prompt: the next rows may predict
        else:
            disabled = self._in_a_row[kind] >= _FAILURES
        reason = str(error) if isinstance(error, ProbeError) else f"{type(error).__name__}: {error}"
        self._failures[kind] = ProbeFailure(kind, reason, count, disabled)


def _detached(value: Any) -> Any:
    match value:
        case Tensor():
            return value.detach()
        case dict():
            return {key: _detached(item) for key, item in value.items()}
        case list():
            return [_detached(item) for item in value]
        case tuple():
            items = [_detached(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def _out_of_memory(error: Exception) -> bool:
    """Accelerators raise a class of their own; the CPU's allocator only a RuntimeError that says so."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "not enough memory" in str(error)
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
