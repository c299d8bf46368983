"""What a watched training shows, against the plain one."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.setups.trial import Record
from sharpwatch.wire import decode

_STDERRS = 4.0  # by how many a mean may be off
_LEEWAY = 0.1  # and by which share besides: rows with fewer tokens count as much as others in a probe's mean
_SAME_LOSS = 1e-5


@dataclass(frozen=True)
class Number:
    """One quantity over a training: what was shown and what is true, as means over the same steps.

    Attributes:
        shown: The mean of what was shown.
        stderr: Its standard error.
        true: The mean of the truth; None where there is none.
        right: Whether they agree; True where there is no truth.
    """

    shown: float
    stderr: float
    true: float | None
    right: bool

    def __str__(self) -> str:
        wrong = "" if self.right else f", is {self.true:.3g}"
        return f"{self.shown:.3g} ± {self.stderr:.2g}{wrong}"


@dataclass(frozen=True)
class Verdict:
    """What became of one model of a setup.

    Attributes:
        refusal: Why `attach` refused; empty if it did not.
        unplaced: Parameters for which a rule was asked for.
        unlike: Names of tensors that differ from the plain training's, bit for bit.
        loss: What is wrong with the losses shown; empty if nothing is.
        objective: What the watch names as the objective.
        blocks: The blocks shown.
        expected: The blocks that there are.
        numbers: By (probe's quantity, block); the block "" is the whole model.
        reasons: By probe, why it failed last.
        gauss_newton: Whether the loss has a Gauss-Newton matrix that `gnb` may show.
    """

    refusal: str
    unplaced: Sequence[str]
    unlike: Sequence[str]
    loss: str
    objective: str
    blocks: Sequence[str]
    expected: frozenset[str]
    numbers: Mapping[tuple[str, str], Number]
    reasons: Mapping[str, str]
    gauss_newton: bool

    def problems(self) -> Iterator[str]:
        """Everything that a user must not meet."""
        if self.unlike:
            yield f"{len(self.unlike)} tensors differ from those of a run without, first {self.unlike[0]}"
        if self.refusal:
            yield f"attach refused: {self.refusal}"
            return
        if self.loss:
            yield self.loss
        if self.unplaced:
            yield f"a rule is asked for {', '.join(self.unplaced)}"
        if set(self.blocks) != self.expected:
            yield f"blocks are {' '.join(self.blocks)}, expected {' '.join(sorted(self.expected))}"
        if not self.objective:
            yield "the objective is not named"
        yield from self._wrong_numbers()

    def _wrong_numbers(self) -> Iterator[str]:
        """What probes show wrong, and those that show nothing and do not say why."""
        for (quantity, block), number in self.numbers.items():
            if not number.right:
                yield f"{quantity} of {block or 'all'}: {number}"
        measured = {quantity.split()[0] for quantity, _ in self.numbers}
        if "gnb" in measured and not self.gauss_newton:
            yield "gnb shows numbers for a loss that is neither a cross-entropy nor a squared error"
        for probe in ("gnb", "direction"):
            if probe not in measured and not self.reasons.get(probe):
                yield f"{probe}: neither numbers nor a reason"
        for probe, reason in self.reasons.items():
            if re.match(r"\w+Error: ", reason):  # of Python or torch, and so for nobody to act on
                yield f"{probe} failed: {reason}"

    @property
    def traces(self) -> str:
        """The trace of each block, or why there is none."""
        numbers = {block: number for (quantity, block), number in self.numbers.items() if quantity == "gnb trace"}
        if not numbers:
            return f"none: {self.reasons.get('gnb', self.refusal)}"
        return "; ".join(f"{block} {number}" for block, number in sorted(numbers.items()))


def judge(plain: Record, watched: Record) -> Verdict:
    """Compare a model's two trainings."""
    status = None if watched.watch is None else watched.watch.status
    hello, samples = watched.transport.hello, watched.transport.samples
    health = samples[-1].health if samples else None
    return Verdict(
        refusal=watched.refusal,
        unplaced=tuple(getattr(status, "unplaced", ())),
        unlike=_unlike(plain, watched),
        loss="" if watched.refusal else _loss(watched),
        objective=getattr(health, "objective", "") or getattr(status, "objective", ""),
        blocks=() if hello is None else tuple(hello.blocks),
        expected=plain.blocks,
        numbers=_numbers(plain, watched),
        reasons={} if health is None else {each.probe: each.reason for each in health.probe_failures},
        gauss_newton=plain.truth.outputs is not None,
    )


def _unlike(plain: Record, watched: Record) -> tuple[str, ...]:
    names = plain.weights.keys() | watched.weights.keys()
    differ = [
        name
        for name in sorted(names)
        if not (name in plain.weights and name in watched.weights)
        or not torch.equal(plain.weights[name], watched.weights[name])
    ]
    return (*differ, *(["the losses"] if plain.losses != watched.losses else []))


def _loss(watched: Record) -> str:
    """What is wrong with the losses shown."""
    shown = {sample.step: sample.loss for sample in watched.transport.samples if sample.HasField("loss")}
    for step, loss in enumerate(watched.losses, 1):
        if step not in shown:
            return f"no loss shown at step {step}, stepped on {loss:.6g}"
        if not math.isclose(shown[step], loss, rel_tol=_SAME_LOSS, abs_tol=_SAME_LOSS):
            return f"loss shown at step {step} is {shown[step]:.6g}, stepped on {loss:.6g}"
    return ""


def _numbers(plain: Record, watched: Record) -> dict[tuple[str, str], Number]:
    found: defaultdict[tuple[str, str], list[tuple[float, float | None]]] = defaultdict(list)
    for step, quantity, block, value in _shown(watched):
        truth = plain.curvatures.get(step)
        found[quantity, block].append((value, None if truth is None else _true(truth, quantity, block)))
    return {key: _number(values) for key, values in found.items()}


def _true(truth: Any, quantity: str, block: str) -> float | None:
    if quantity == "gnb trace":
        return truth.traces.get(block)
    if quantity == "direction curvature":
        return truth.curvature
    return truth.descents.get(block, 0.0) if block else sum(truth.descents.values())


def _shown(watched: Record) -> Iterator[tuple[int, str, str, float]]:
    """Step, quantity, block and value of all that probes sent."""
    hello = watched.transport.hello
    if hello is None:
        return
    for sample in watched.transport.samples:
        if sample.HasField("gnb"):
            rows = decode(sample.gnb.traces, name="traces", dtype="float64", shape=(None, None)).mean(0)
            sums: defaultdict[str, float] = defaultdict(float)
            for layer_block, value in zip(hello.layer_blocks, rows, strict=True):
                sums[layer_block.block] += float(value)
            yield from ((sample.step, "gnb trace", block, value) for block, value in sums.items())
        if sample.HasField("direction"):
            message = sample.direction
            yield sample.step, "direction descent", "", message.descent
            yield sample.step, "direction curvature", "", message.curvature
            descents = decode(message.block_descent, name="block_descent", dtype="float64", shape=(None,))
            for block, value in zip(hello.blocks, descents, strict=True):
                yield sample.step, "direction descent", block, float(value)


def _number(values: Sequence[tuple[float, float | None]]) -> Number:
    """Over the steps; what is shown differs from the truth by the rows that a probe drew."""
    shown = [value for value, _ in values]
    true = [value for _, value in values if value is not None]
    known = statistics.fmean(true) if len(true) == len(values) else None
    right = all(map(math.isfinite, shown))
    if known is not None and right:
        differences = [value - truth for (value, _), truth in zip(values, true, strict=True)]
        allowed = _STDERRS * _stderr(differences) + _LEEWAY * abs(known) + 1e-12
        right = abs(statistics.fmean(differences)) <= allowed
    return Number(statistics.fmean(shown), _stderr(shown), known, right)


def _stderr(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
