"""Runs the probes around a step: the batch they get, what they cost, and what happens to those that fail."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sharpwatch.agent.probes.builtin import PROBES
from sharpwatch.agent.probes.context import Probe, ProbeContext, ProbedStep, ShardReduction
from sharpwatch.agent.probes.out_of_memory import (
    halve_rows,
    has_room_for_sharded_probe,
    is_out_of_memory,
    require_room_for_copies,
)
from sharpwatch.agent.safety import ExceptionBarrier, from_signal_handler, signals_held, warn
from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.state.isolation import isolated
from sharpwatch.curvature.state.snapshot import StateSnapshot
from sharpwatch.curvature.statistics.sketch import CountSketch
from sharpwatch.errors import DesyncError, EmptyBatchError, ProbeError, TrainingChangedError

_COLLECTIVES = frozenset({"c10d", "_c10d_functional", "c10d_functional", "_c10d_functional_autograd"})
_FAILURES = 3  # in a row after which a probe is given up; the rows of a single draw may all be without labels


class _UnfitError(ProbeError):
    """Raised when a probe must not run the model's forward: it would change the run, or wait for other ranks."""


class _NoCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses operations that other ranks have to take part in."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`."""
        del types
        if func.namespace in _COLLECTIVES:
            raise _UnfitError(f"the model's forward talks to other ranks ({func}): no probe of one rank may run it")
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, slots=True)
class ProbeFailure:
    """Why a probe failed last, how often it has failed, and whether it was given up."""

    probe: str
    reason: str
    count: int
    disabled: bool


@dataclass(frozen=True, slots=True)
class Autocast:
    """The autocast in force where the model was called, with one entry for each device type."""

    states: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def now(cls, device_type: str) -> Autocast:
        """Returns what is in force now for the CPU and `device_type`."""
        types = sorted({"cpu", device_type})
        return cls(tuple((each, torch.is_autocast_enabled(each), torch.get_autocast_dtype(each)) for each in types))

    def enter(self, stack: ExitStack) -> None:
        """Puts it in force until `stack` unwinds, without the cache, which may hold casts of other weights."""
        for device_type, enabled, dtype in self.states:
            stack.enter_context(torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False))


@dataclass(frozen=True, slots=True)
class Captured:
    """What the model was last called with in training."""

    batch: Batch
    autocast: Autocast


@dataclass(frozen=True, slots=True)
class ProbeRun:
    """The reports of the probes of one step, and the seconds that each took. A probe that failed has no report."""

    reports: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


class ProbeRunner:
    """The probes of one run, each with its own turns, rows and failures.

    Args:
        names: The probes to run, of `sharpwatch.agent.probes.builtin.PROBES`.
        model: The model.
        block_map: Its blocks.
        optimizers: Its optimizers.
        seed: Probes draw the same rows, labels and signs for the same seed.
        sketch_size: Entries of a sketch.
        loss_fn: The user's loss, if any.
        logits_fn: The user's logits, if any.
        barrier: Ends errors of hooks and of what is done before the step.
        several_ranks: Whether other ranks train with this one.
        shards: How ranks add up their results, where no rank holds whole parameters.

    Attributes:
        names: As given; also those that were given up.
        failures: One for each probe that ever failed.
        disabled: The probes that were given up.
    """

    def __init__(  # noqa: PLR0913 - what probes need to know of the run
        self,
        names: Sequence[str],
        model: nn.Module,
        block_map: BlockMap,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        seed: int,
        sketch_size: int,
        loss_fn: Callable[..., Any] | None = None,
        logits_fn: Callable[..., Any] | None = None,
        barrier: ExceptionBarrier | None = None,
        several_ranks: bool = False,
        shards: ShardReduction | None = None,
    ) -> None:
        self.names = tuple(names)
        self.failures: tuple[ProbeFailure, ...] = ()
        self.disabled: tuple[str, ...] = ()
        self._context = ProbeContext(
            model=model,
            block_map=block_map,
            optimizers=optimizers,
            sketcher=CountSketch(block_map, size=sketch_size, seed=seed),
            source=torch.Generator(next(model.parameters()).device),
            loss_fn=loss_fn,
            logits_fn=logits_fn,
            barrier=barrier or ExceptionBarrier(),
            several_ranks=several_ranks,
            shards=shards,
        )
        self._probes = {name: _made(name, self._context) for name in names}
        self._listening = [name for name in names if _overrides(self._probes[name], Probe.forward)]
        self._preparing = [name for name in names if _overrides(self._probes[name], Probe.before_step)]
        self._seed = seed
        self._runs = dict.fromkeys(names, 0)
        self._rows_source = torch.Generator()
        self._rows: dict[str, int] = {}  # of the newest run of each probe
        self._halvings: Counter[str] = Counter()  # of its rows
        self._failures: dict[str, ProbeFailure] = {}
        self._in_a_row: Counter[str] = Counter()
        self._tried = False

    @property
    def _device(self) -> torch.device:
        """The device of the model, which may be moved after `attach`."""
        return next(self._context.model.parameters()).device

    @property
    def runs(self) -> Mapping[str, int]:
        """How often each probe ran, failures included."""
        return dict(self._runs)

    def has_room(self) -> bool:
        """Returns whether memory is left for a probe that all ranks run together."""
        return has_room_for_sharded_probe(self._context.model.parameters())

    def forward(self, names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Captured:
        """The model is called in training, in a step after which `names` are due.

        Returns:
            What it is called with: references, not copies, detached from any graph.
        """
        captured = Captured(Batch(_detached(args), _detached(dict(kwargs))), Autocast.now(self._device.type))
        for name in self._listening:
            if name in names:
                self._probes[name].forward()
        return captured

    def before_step(self, names: Sequence[str]) -> ProbedStep:
        """The gradients of a step are complete: has the probes `names` prepare what they need of it."""
        step = ProbedStep(self._context)
        if not names or self._context.training_change:
            return step  # `run` then says why
        for name in self._preparing:
            if name in names:
                started = time.perf_counter()
                with self._context.barrier.guard(f"preparing the {name} probe"):
                    self._probes[name].before_step(step)
                step.seconds[name] = time.perf_counter() - started
        return step

    def discard(self) -> None:
        """The step that was being prepared does not come: removes all hooks."""
        for probe in self._probes.values():
            probe.discard()

    def run(self, names: Sequence[str], captured: Captured, step: ProbedStep) -> ProbeRun:
        """Runs the probes `names` at the present weights; a failure is recorded, not raised, except `DesyncError`."""
        reports: dict[str, Any] = {}
        seconds: dict[str, float] = {}
        for name in names:
            started = _now(self._device)
            self._seed_draws(name)
            try:
                self._context.require_same_training()
                reports[name] = self._probes[name].run(self._rows_of(name, captured), step)
                self._in_a_row[name] = 0
            # The one error that must end the run: training on would silently train wrong weights.
            except DesyncError:
                raise
            except Exception as error:  # exception barrier: a probe never raises into the loop
                if from_signal_handler(error):
                    raise
                self._record_failure(name, error)
            seconds[name] = _now(self._device) - started + step.seconds.get(name, 0.0)
        return ProbeRun(reports, seconds)

    @contextmanager
    def _rows_of(self, name: str, captured: Captured) -> Iterator[Batch]:
        """Yields rows of the batch; nothing else of the program runs within, and its state is restored at the end."""
        context = self._context
        batch = captured.batch.slice(self._draw_rows(name, captured.batch.rows))
        values = (*batch.args, *batch.kwargs.values(), *_held_by(context.loss_fn), *_held_by(context.logits_fn))
        # The rows are copies, and the probe itself restores the modules.
        snapshot = StateSnapshot(excluded=[*batch.tensors(), *context.model.modules()])
        for value in values:
            snapshot.add(value)
        with signals_held(), ExitStack() as stack:
            captured.autocast.enter(stack)
            # Registered after autocast, so that it runs before autocast ends, with signals still held.
            stack.callback(snapshot.restore)
            if not self._tried and context.shards is None:
                self._try_forward(batch)
            yield batch

    def _try_forward(self, batch: Batch) -> None:
        """Before the first probe, runs one forward on copies of the weights.

        Raises:
            _UnfitError: The forward writes into the weights, or needs other ranks.
            ProbeError: There is no memory for the copies.
        """
        context = self._context
        if any(type(module).__module__.startswith("torch.distributed.fsdp") for module in context.model.modules()):
            return  # FSDP needs a backward for each forward
        weights = context.weights
        require_room_for_copies(weights)
        call = batch.prepared()
        with isolated(context.model) as live, torch.no_grad(), _NoCollectives():  # type: ignore[no-untyped-call]
            # On copies, because version counters do not show what is written through `.data`.
            copies = {name: weight.clone() for name, weight in weights.items()}
            for name, copy in copies.items():
                live.set_parameter(name, copy)
            live(*call.args, **call.kwargs)
        for name, copy in copies.items():
            if not torch.allclose(copy, weights[name], rtol=0, atol=0, equal_nan=True):
                raise _UnfitError(f"the model's forward writes into {name}: no probe may run it")
        self._tried = True

    def state_dict(self) -> dict[str, Any]:
        """How often each probe ran and had its turn, as plain values; its next draws follow from them."""
        return {
            "runs": dict(self._runs),
            "turns": {name: probe.turn for name, probe in self._probes.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues the run that made `state`, with the probes of this one; those that were given up are tried again.

        Raises:
            KeyError, TypeError, ValueError: `state` is no such state. Nothing is changed then.
        """
        runs = {name: int(state["runs"].get(name, 0)) for name in self._runs}
        turns = {name: int(state["turns"].get(name, 0)) for name in self._probes}
        self._runs = runs
        for name, probe in self._probes.items():
            probe.turn = turns[name]

    def _seed_draws(self, name: str) -> None:
        """Seeds the generators by the run's seed and how often the probe ran.

        All ranks draw the same rows; ranks that compute on different data draw different labels.
        """
        shards = self._context.shards
        of_run = f"{self._seed}/{name}/{self._runs[name]}"
        self._runs[name] += 1
        for source, drawn in (
            (self._rows_source, "rows"),
            (self._context.source, f"draws of {shards.data_rank if shards else 0}"),
        ):
            # Not hash(), which differs between processes: ranks must draw alike, and so must a resumed run.
            digest = hashlib.sha256(f"{of_run}/{drawn}".encode()).digest()
            source.manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def _draw_rows(self, name: str, rows: int) -> Tensor:
        """Draws rows without replacement, so that the estimate is of the whole batch rather than of its first rows."""
        wanted = max(1, (rows // self._probes[name].share) >> self._halvings[name])
        self._rows[name] = wanted
        return torch.randperm(rows, generator=self._rows_source, device="cpu")[:wanted].sort().values

    def _record_failure(self, name: str, error: Exception) -> None:
        self._in_a_row[name] += 1
        reason = str(error) if isinstance(error, ProbeError) else f"{type(error).__name__}: {error}"
        count = self._failures[name].count + 1 if name in self._failures else 1
        failure = self._failures[name] = ProbeFailure(name, reason, count, self._gives_up(name, error))
        if failure.disabled:
            warn("probe %s is given up after %d failures: %s", name, count, reason)
        self.failures = tuple(self._failures.values())
        self.disabled = tuple(each.probe for each in self.failures if each.disabled)

    def _gives_up(self, name: str, error: Exception) -> bool:
        """Returns whether the probe is not run again after `error`."""
        too_often = self._in_a_row[name] >= _FAILURES
        if self._context.shards is not None:  # all ranks must decide alike, and not all know why one of them failed
            halve_rows(self._halvings, name, self._rows.get(name, 0))
            return too_often and not isinstance(error, EmptyBatchError | TrainingChangedError)
        if is_out_of_memory(error):
            return halve_rows(self._halvings, name, self._rows.get(name, 0))
        if isinstance(error, _UnfitError):
            return True
        # An empty batch is due to its labels, as in a row that is all prompt; the next rows may have some.
        return too_often and not isinstance(error, EmptyBatchError | TrainingChangedError)


def _made(name: str, context: ProbeContext) -> Probe:
    spec = PROBES[name]
    make = spec.runner if context.shards is None else spec.sharded_runner
    if make is None:
        raise ProbeError(f"probe {name!r} can't run where parameters are sharded")
    return make(context)


def _overrides(probe: Probe, method: Callable[..., Any]) -> bool:
    """Returns whether `probe` overrides a method of `Probe`; those that do nothing are not called."""
    return getattr(type(probe), method.__name__) is not method


def _held_by(function: object) -> Iterator[Any]:
    """What a function of the user holds, such as a criterion with buffers."""
    yield function
    yield getattr(function, "__self__", None)
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # the cell is empty
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
        # Otherwise a probe's kernels would be charged to whatever waits for the device next.
        torch.cuda.synchronize(device)
    return time.perf_counter()
