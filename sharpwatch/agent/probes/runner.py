"""Runs the probes that are due around a step: the batch they see, what they cost, what becomes of those that fail."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sharpwatch.agent.optimizers.deepspeed import fragments, hidden
from sharpwatch.agent.probes.builtin import KINDS, SHARDED, Probe, Report, ShardedGnb
from sharpwatch.agent.probes.context import BeforeStep, ProbeContext, ShardReduction, TakenStep
from sharpwatch.agent.safety.exception_barrier import from_signal_handler
from sharpwatch.agent.safety.memory import free, given_back, out_of_memory
from sharpwatch.agent.safety.signals import signals_held
from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.parameters.shards import Shard, local_gradient_summand, local_tensor, sketch_shards
from sharpwatch.curvature.state.isolation import isolated
from sharpwatch.curvature.state.snapshot import StateSnapshot
from sharpwatch.curvature.statistics.sketch import CountSketch
from sharpwatch.errors import DesyncError, EmptyBatchError, ProbeError

_STEPS_NEED = 3  # copies of the weights that have room before one is made: itself, and twice the step's temporaries
_FIRST_STEPS_NEED = 5  # and Adam's moments
_GRADIENTS_NEED = 3  # their size: the probe's own, and what gathering and summing them takes
_COLLECTIVES = frozenset({"c10d", "_c10d_functional", "c10d_functional", "_c10d_functional_autograd"})
_FAILURES = 3  # in a row before a kind is given up: one drawing of rows may hold no position that predicts


class _UnfitError(ProbeError):
    """No probe may run the model's forward: it would change the run, or wait for ranks that don't probe."""


class _Alone(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets no operation pass that other ranks have to take part in."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`."""
        del types
        if func.namespace in _COLLECTIVES:
            raise _UnfitError(f"the model's forward talks to other ranks ({func}): no probe of one rank may run it")
        return func(*args, **(kwargs or {}))


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
    """What the probes of one step brought, and what each took: those that failed have no report."""

    reports: Mapping[str, Report] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


class ProbeRunner:
    """The probes of one model: of each kind its own turns, its rows and its failures."""

    def __init__(  # noqa: PLR0913 - what a probe needs to know of the run
        self,
        kinds: Sequence[str],
        model: nn.Module,
        block_map: BlockMap,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        seed: int,
        sketch_size: int,
        loss_fn: Callable[..., Any] | None = None,
        logits_fn: Callable[..., Any] | None = None,
        together: ShardReduction | None = None,
    ) -> None:
        self._subject = ProbeContext(
            model=model,
            block_map=block_map,
            optimizers=optimizers,
            sketcher=CountSketch(block_map, size=sketch_size, seed=seed),
            source=torch.Generator(next(model.parameters()).device),
            loss_fn=loss_fn,
            logits_fn=logits_fn,
            together=together,
        )
        self._kinds: dict[str, Probe | ShardedGnb] = {
            kind: SHARDED[kind](self._subject, together) if together else KINDS[kind](self._subject) for kind in kinds
        }
        self._seed = seed
        self._runs = dict.fromkeys(kinds, 0)
        self._rows_source = torch.Generator()
        self._rows: dict[str, int] = {}  # of each kind's newest probe
        self._halvings: dict[str, int] = {}  # of its rows
        self._failures: dict[str, ProbeFailure] = {}
        self._in_a_row: dict[str, int] = {}
        self._tried = False

    @property
    def _device(self) -> torch.device:
        """Of the model, which may be moved after `attach`."""
        return next(self._subject.model.parameters()).device

    @property
    def kinds(self) -> tuple[str, ...]:
        """All that were asked for, also those that were given up."""
        return tuple(self._kinds)

    @property
    def failures(self) -> Sequence[ProbeFailure]:
        """One entry for each kind that ever failed."""
        return tuple(self._failures.values())

    def copy_weights(self) -> dict[str, Tensor]:
        """θ_t by parameter name, before the step that a moving kind looks at.

        Raises `ProbeError` where memory would get so short that the step itself could fail.
        """
        weights, device = self._subject.weights, self._device
        copies = _STEPS_NEED if all(one.state for one in self._subject.optimizers) else _FIRST_STEPS_NEED
        if free(device) < copies * sum(weight.nbytes for weight in weights.values()):
            raise ProbeError(f"no copy of the weights: the step may need what is left of the memory of {device}")
        return {name: weight.clone() for name, weight in weights.items()}

    def has_room(self) -> bool:
        """Whether memory is left for all that the step has had, and for gradients beside its own.

        A probe has fewer rows than the step; one rank that runs out in it leaves the others waiting.
        """
        size = sum(weight.nbytes for weight in map(local_tensor, self._subject.model.parameters()))
        return free(self._device) >= given_back(self._device) + _GRADIENTS_NEED * size

    def sketch_gradient(self) -> Tensor | None:
        """Float32 [B, k] of the gradients as they stand, whatever has been done to their scale; not waited for.

        None where they don't stand with the parameters.
        """
        if fragments(self._subject.optimizers) or hidden(self._subject.optimizers):
            return None
        together, parameters = self._subject.together, dict(self._subject.model.named_parameters())
        if together is not None:  # this rank's summand
            shards = {name: Shard.of(parameter) for name, parameter in parameters.items()}
            summands = {name: local_gradient_summand(parameter) for name, parameter in parameters.items()}
            found = {name: gradient for name, (gradient, _) in summands.items() if gradient is not None}
            weights = {name: together.weights[name] * ranks for name, (_, ranks) in summands.items()}
            return sketch_shards(self._subject.sketcher, found, shards, weights)
        given = {name: parameter.grad for name, parameter in parameters.items()}
        gradients = {name: g.to_dense() if g.is_sparse else g for name, g in given.items() if g is not None}
        return self._subject.sketcher.sketch(gradients)

    def capture(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Captured:
        """References, no copies, to what the model is being called with; detached from any graph."""
        return Captured(Batch(_detached(args), _detached(dict(kwargs))), Autocast.now(self._device.type))

    def run(self, kinds: Sequence[str], captured: Captured, before: BeforeStep) -> ProbeRun:
        """Run `kinds` at the present weights; a failure is recorded, not raised, but for `DesyncError`."""
        step = TakenStep(self._subject, before)
        reports: dict[str, Report] = {}
        seconds: dict[str, float] = {}
        for kind in kinds:
            started = _now(self._device)
            self._draw_anew(kind)
            try:
                reports[kind] = self._probe(kind, captured, step)
                self._in_a_row[kind] = 0
            except DesyncError:
                raise
            except Exception as error:  # host-safety border: a probe never reaches the loop
                if from_signal_handler(error):
                    raise
                self._fail(kind, error)
            seconds[kind] = _now(self._device) - started + before.seconds.get(kind, 0.0)
        return ProbeRun(reports, seconds)

    def _probe(self, kind: str, captured: Captured, step: TakenStep) -> Report:
        probe, part = self._kinds[kind], self._part(kind, captured)
        if isinstance(probe, ShardedGnb):
            return probe.run(part, step)
        with part as rows:
            self._try(rows)
            return probe.run(rows, step)

    @contextmanager
    def _part(self, kind: str, captured: Captured) -> Iterator[Batch]:
        """Rows of the batch, in a context in which nothing else of the program is run or changed."""
        part = captured.batch.slice(self._draw_rows(kind, captured.batch.rows))
        subject = self._subject
        held = StateSnapshot(excluded=[*part.tensors(), *subject.model.modules()])  # copies; what is put back anyway
        for value in (*part.args, *part.kwargs.values(), *_held_by(subject.loss_fn), *_held_by(subject.logits_fn)):
            held.add(value)
        with signals_held(), ExitStack() as stack:
            captured.autocast.enter(stack)
            stack.callback(held.restore)
            yield part

    def _try(self, part: Batch) -> None:
        """BeforeStep the first probe, run one forward on copies of the weights.

        Raises `_UnfitError` if it writes into them or needs other ranks, `ProbeError` if there is no room for copies.
        """
        modules = self._subject.model.modules()
        sharded = any(type(module).__module__.startswith("torch.distributed.fsdp") for module in modules)
        if self._tried or sharded:  # FSDP wants a backward for each forward
            return
        weights, device = self._subject.weights, self._device
        if free(device) < sum(weight.nbytes for weight in weights.values()):
            raise ProbeError(f"no copy of the weights to try a forward on: memory of {device} is short")
        call = part.prepared()
        with isolated(self._subject.model) as live, torch.no_grad(), _Alone():  # type: ignore[no-untyped-call]
            copies = {name: weight.clone() for name, weight in weights.items()}
            for name, copy in copies.items():
                live.place(name, copy)
            live(*call.args, **call.kwargs)
        for name, copy in copies.items():
            if not torch.allclose(copy, weights[name], rtol=0, atol=0, equal_nan=True):
                raise _UnfitError(f"the model's forward writes into {name}: no probe may run it")
        self._tried = True

    def disabled(self) -> tuple[str, ...]:
        """The kinds that were given up."""
        return tuple(kind for kind, failure in self._failures.items() if failure.disabled)

    def state_dict(self) -> dict[str, Any]:
        """How often each kind ran and had its turn: what it draws next follows from that. Plain values."""
        return {
            "runs": dict(self._runs),
            "turns": {name: kind.turn for name, kind in self._kinds.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was made, with the kinds of now; what was given up is tried again.

        Raises `KeyError`, `TypeError` or `ValueError` for what is no such state; nothing is changed then.
        """
        runs = {name: int(state["runs"].get(name, 0)) for name in self._runs}
        turns = {name: int(state["turns"].get(name, 0)) for name in self._kinds}
        self._runs = runs
        for name, kind in self._kinds.items():
            kind.turn = turns[name]

    def _draw_anew(self, kind: str) -> None:
        """Seed what the next probe of `kind` draws by the run's seed and how often it ran: all ranks the same rows.

        Those that compute on different data draw other labels.
        """
        what = f"{self._seed}/{kind}/{self._runs[kind]}"
        self._runs[kind] += 1
        together = self._subject.together
        for source, name in (
            (self._rows_source, "rows"),
            (self._subject.source, f"draws of {together.data_rank if together else 0}"),
        ):
            digest = hashlib.sha256(f"{what}/{name}".encode()).digest()
            source.manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def _draw_rows(self, kind: str, rows: int) -> Tensor:
        """Rows drawn without replacement: the estimate is then of the batch, not of its first rows."""
        wanted = max(1, (rows // self._kinds[kind].share) >> self._halvings.get(kind, 0))
        self._rows[kind] = wanted
        return torch.randperm(rows, generator=self._rows_source, device="cpu")[:wanted].sort().values

    def _fail(self, kind: str, error: Exception) -> None:
        """StateSnapshot why; out of memory halves the rows, what keeps failing is given up."""
        count = self._failures[kind].count + 1 if kind in self._failures else 1
        self._in_a_row[kind] = self._in_a_row.get(kind, 0) + 1
        if self._subject.together is not None:  # all ranks must come to the same, and not all know why one failed
            self._halvings[kind] = self._halvings.get(kind, 0) + 1
            disabled = self._in_a_row[kind] >= _FAILURES and not isinstance(error, EmptyBatchError)
        elif out_of_memory(error):
            self._halvings[kind] = self._halvings.get(kind, 0) + 1
            disabled = self._rows.get(kind, 0) <= 1
        elif isinstance(error, _UnfitError):
            disabled = True
        elif isinstance(error, EmptyBatchError):
            disabled = False  # the labels' doing, as in a row that is all prompt: the next rows may predict
        else:
            disabled = self._in_a_row[kind] >= _FAILURES
        reason = str(error) if isinstance(error, ProbeError) else f"{type(error).__name__}: {error}"
        self._failures[kind] = ProbeFailure(kind, reason, count, disabled)


def _held_by(function: object) -> Iterator[Any]:
    """What a function of the user's holds: a criterion with buffers, say."""
    yield function
    yield getattr(function, "__self__", None)
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # it is empty yet
            yield cell.cell_contents


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


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
