"""Runs the probes around a step: the batch they get, what they cost, and what happens to those that fail."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sharpwatch.agent.calls import MODEL, OtherCall
from sharpwatch.agent.probes.attention import AttentionReader
from sharpwatch.agent.probes.builtin import PROBES
from sharpwatch.agent.probes.context import Probe, ProbeContext, ProbedStep, ShardReduction, call_model
from sharpwatch.agent.probes.failures import ProbeFailure, ProbeFailures
from sharpwatch.agent.probes.observed import ObservedBatch
from sharpwatch.agent.probes.other_call import loss_of, output_of
from sharpwatch.agent.probes.out_of_memory import (
    halve_rows,
    has_room_for_sharded_probe,
    is_out_of_memory,
)
from sharpwatch.agent.probes.trial import Trial, UnfitError
from sharpwatch.agent.safety import ExceptionBarrier, from_signal_handler, signals_held
from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.objective.verification import ObjectiveInUse
from sharpwatch.curvature.parameters.parameter_space import require_real
from sharpwatch.curvature.state.snapshot import StateSnapshot
from sharpwatch.curvature.statistics.sketch import CountSketch
from sharpwatch.errors import DesyncError, EmptyBatchError, ProbeError, TrainingChangedError, UndecidedError


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
    """What the model was last called with in training, and what the loop showed of it.

    Attributes:
        batch: The arguments of the call; without any where no call was seen.
        autocast: The autocast in force there.
        observed: The loop's own batch, for `loss_fn` and `logits_fn`.
        trained_on: Whether backward ran from the loss in the call's output; None if there is no loss in it.
    """

    batch: Batch
    autocast: Autocast
    observed: ObservedBatch | None = None
    trained_on: Callable[[], bool] | None = None


@dataclass(frozen=True, slots=True)
class ProbeRun:
    """The probes of one step.

    Attributes:
        reports: By name; a probe that failed has none.
        seconds: How long each took, the last one with the reading of attention.
        attention: The scale of attention logits, float32 [L]; None where nothing is known of it.
    """

    reports: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    attention: npt.NDArray[np.float32] | None = None


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
        objective: The loss whose Gauss-Newton matrix `gnb` measures, or why it measures none; None before the first
            probe.
        attention: Reads the scale of attention logits at each step with a probe.
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
        self.objective: ObjectiveInUse | None = None
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
        self.attention = AttentionReader(self._context, seed)
        self._probes = {name: _made(name, self._context) for name in names}
        self._listening = [name for name in names if _overrides(self._probes[name], Probe.forward)]
        self._reading = [name for name in names if _overrides(self._probes[name], Probe.output)]
        self._preparing = [name for name in names if _overrides(self._probes[name], Probe.before_step)]
        self._seed = seed
        self._runs = dict.fromkeys(names, 0)
        self._rows_source = torch.Generator()
        self._rows: dict[str, int] = {}  # of the newest run of each probe
        self._halvings: Counter[str] = Counter()  # of its rows
        self._failures = ProbeFailures()
        self._loss_fn = loss_fn  # the user's
        self._trial = Trial()
        try:
            require_real(model)
        except ProbeError as error:
            for name in self.names:
                self._failures.failed(name, str(error), gives_up=True)

    @property
    def failures(self) -> tuple[ProbeFailure, ...]:
        """One for each probe that ever failed."""
        return self._failures.failures

    @property
    def disabled(self) -> tuple[str, ...]:
        """The probes that were given up."""
        return self._failures.disabled

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

    def capture(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Captured:
        """Returns what the model is called with: references, not copies, detached from any graph."""
        return Captured(Batch(args, kwargs).map_tensors(Tensor.detach), Autocast.now(self._device.type))

    def forward(self, names: Sequence[str]) -> None:
        """The model is called in training, in a step after which `names` are due."""
        for name in self._listening:
            if name in names:
                self._probes[name].forward()

    def output(self, names: Sequence[str], captured: Captured, output: Any) -> None:
        """The call of `forward` returned `output`."""
        for name in self._reading:
            if name in names:
                self._probes[name].output(captured.batch, output)

    def without_forward(self) -> Captured:
        """No call of the model was seen in the step, but the loop observed a batch."""
        return Captured(Batch(), Autocast.now(self._device.type))

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
                reports[name] = self._probes[name].run(self._rows_of(name, captured, step), step)
                self._failures.succeeded(name, self._probes[name].reason)
            # The one error that must end the run: training on would silently train wrong weights.
            except DesyncError:
                raise
            except Exception as error:  # exception barrier: a probe never raises into the loop
                if from_signal_handler(error):
                    raise
                self._record_failure(name, error)
            seconds[name] = _now(self._device) - started + step.seconds.get(name, 0.0)
        self.objective = getattr(self._probes.get("gnb"), "objective", None)
        started = _now(self._device)
        attention = self.attention.read() if names else None
        for name in names[-1:]:
            seconds[name] += _now(self._device) - started
        return ProbeRun(reports, seconds, attention)

    @contextmanager
    def _rows_of(self, name: str, captured: Captured, step: ProbedStep) -> Iterator[Batch]:
        """Yields rows of the batch; nothing else of the program runs within, and its state is restored at the end."""
        context = self._context
        whole = self._batch_of(name, captured, step)
        values = (*whole.args, *whole.kwargs.values(), *_held_by(context.loss_fn), *_held_by(context.logits_fn))
        # The model gets copies of the batch's tensors, and the probe itself restores the modules.
        snapshot = StateSnapshot(excluded=[*whole.tensors(), *context.model.modules()])
        for value in values:
            snapshot.add(value)
        with signals_held(), ExitStack() as stack:
            captured.autocast.enter(stack)
            # Registered after autocast, so that it runs before autocast ends, with signals still held.
            stack.callback(snapshot.restore)
            step.layout = self._trial.layout_of(whole, context)
            whole = replace(whole, axes=step.layout.axes)
            step.batch_rows = whole.rows
            step.rows = self._draw_rows(name, whole.rows)
            yield whole.slice(step.rows)

    def _batch_of(self, name: str, captured: Captured, step: ProbedStep) -> Batch:
        """The batch that the probe `name` runs on.

        Raises:
            ProbeError: The observed batch can't be used, or the loop trains on a loss that this probe does not know.
        """
        context = self._context
        # `gnb` needs the logits; all others need the loss.
        known = context.loss_fn or (context.logits_fn if name == "gnb" else None)
        if known is None and captured.trained_on is not None and not captured.trained_on():
            self._probes[name].backward_from_another_loss(step)
        return captured.batch if known is None or captured.observed is None else captured.observed.take()

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
        probe = self._probes[name]
        wanted = max(1, min(rows, max(probe.least_rows, rows // probe.share)) >> self._halvings[name])
        self._rows[name] = wanted
        return torch.randperm(rows, generator=self._rows_source, device="cpu")[:wanted].sort().values

    def call_by(self, call: OtherCall) -> None:
        """The loop calls `call` in place of the model, so probes do as well, unless the user has said how."""
        loss_fn, is_model = self._loss_fn, call == MODEL
        self._context = replace(
            self._context,
            loss_fn=loss_fn if loss_fn is not None or is_model else loss_of(call),
            finds_loss=loss_fn is None and not is_model,
            call=call_model if is_model else output_of(call),
        )
        self._trial = Trial()
        for probe in self._probes.values():
            probe.context = self._context

    def not_called(self, names: Sequence[str], reason: str) -> None:
        """Probes had their turn, but there was no batch for them."""
        for name in names:
            self._failures.failed(name, reason, gives_up=False)

    def _record_failure(self, name: str, error: Exception) -> None:
        reason = str(error) if isinstance(error, ProbeError) else f"{type(error).__name__}: {error}"
        self._failures.failed(name, reason, gives_up=self._gives_up(name, error))

    def _gives_up(self, name: str, error: Exception) -> bool:
        """Returns whether the probe is not run again after `error`."""
        too_often = self._failures.repeats(name)
        if self._context.shards is not None:  # all ranks must decide alike, and not all know why one of them failed
            if not isinstance(error, UndecidedError):
                halve_rows(self._halvings, name, self._rows.get(name, 0))
            return too_often and not isinstance(error, EmptyBatchError | TrainingChangedError | UndecidedError)
        if is_out_of_memory(error):
            return halve_rows(self._halvings, name, self._rows.get(name, 0))
        if isinstance(error, UnfitError):
            return True
        # An empty batch is due to its labels, as in a row that is all prompt; the next rows may have some, or show what
        # is undecided.
        return too_often and not isinstance(error, EmptyBatchError | TrainingChangedError | UndecidedError)


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


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        # Otherwise a probe's kernels would be charged to whatever waits for the device next.
        torch.cuda.synchronize(device)
    return time.perf_counter()
