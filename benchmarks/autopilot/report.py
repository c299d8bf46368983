"""The tables of the benchmark, of what was trained so far."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean, stdev

from scipy.stats import t

from benchmarks.autopilot.contenders import CONTENDERS
from benchmarks.autopilot.runs import SHAPES, Result
from benchmarks.autopilot.stages import OTHER_RATES, RATES, Results, lost_by_rate

# A probe by the work of a training step on the same tokens: a forward 1, its backward 2, each of two products 4, of 3.
PASSES = (1 + 2 + 2 * 4) / 3
FIXED = ("emb-head", "fixed", "paper")  # factors that never change


def tables(results: Results) -> Iterator[str]:
    """The lines of both tables."""
    yield f"Tuning of {results.model}, {results.size}: held-out loss by peak rate, and what a wrong rate costs"
    yield ""
    yield f"| contender | constant | {' | '.join(f'{rate:g}' for rate in RATES)} | lost over three decades |"
    yield "|---" * (len(RATES) + 3) + "|"
    for name in CONTENDERS:
        swept = results.swept(name)
        every = results.swept(name, (*RATES, *OTHER_RATES))
        losses = " | ".join(f"{swept[rate].loss:.3f}" if rate in swept else "–" for rate in RATES)
        lost = f"{lost_by_rate(every):.3f}" if len(every) == len(RATES) + len(OTHER_RATES) else "–"
        yield f"| {name} | {results.constant(name) or '–'} | {losses} | {lost} |"
    yield ""
    yield "Judged at the best rate: loss − tuned uniform with its 95 % interval, seeds paired; steps to uniform's last"
    yield "loss on each seed, with probes as steps by their time; probes' share of time; the tokens that the training"
    yield "could have taken for them, by passes, as a share of all; the agent in other steps is not in it. The best"
    yield f"fixed factors are those of {', '.join(FIXED)} whose mean is least."
    yield ""
    yield "| contender | rate | seeds | loss | − uniform | − fixed | steps to its loss | probes' time | tokens |"
    yield "|---|---|---|---|---|---|---|---|---|"
    every = {name: judged for name in CONTENDERS if (judged := results.judged(name))}
    if "uniform" in every:
        best = min((name for name in FIXED if name in every), key=lambda name: _mean(every[name]), default="uniform")
        for name in every:
            yield _line(results, name, every, best)


def _mean(judged: dict[int, Result]) -> float:
    return fmean(one.loss for one in judged.values())


def _pairs(judged: dict[int, Result], others: dict[int, Result]) -> list[tuple[Result, Result]]:
    return [(one, others[seed]) for seed, one in judged.items() if seed in others]


def _line(results: Results, name: str, every: dict[str, dict[int, Result]], best: str) -> str:
    judged = every[name]
    pairs = _pairs(judged, every["uniform"])
    apart, apart_from_best = (
        _interval([one.loss - other.loss for one, other in _pairs(judged, every[each])]) for each in ("uniform", best)
    )
    reached = [_steps_to(one, other) for one, other in pairs]
    steps = "–" if not reached or None in reached else f"{fmean(each or 0.0 for each in reached):.0f}"
    rows, _ = SHAPES[results.size]
    time = fmean(one.probe_seconds / one.seconds for one in judged.values())
    tokens = fmean(PASSES * one.probe_rows / (one.cell.steps * rows) for one in judged.values())
    rate = results.rate(name)
    measured = f"{_mean(judged):.3f} | {apart} | {apart_from_best} | {steps} | {time:.1%} | {tokens:.2%}"
    return f"| {name} | {rate:g} | {len(judged)} | {measured} |"


def _interval(differences: list[float]) -> str:
    if len(differences) < 2:
        return "–"
    half = float(t.ppf(0.975, len(differences) - 1)) * stdev(differences) / math.sqrt(len(differences))
    return f"{fmean(differences):+.4f} ± {half:.4f}"


def _steps_to(one: Result, other: Result) -> float | None:
    """The step at which `one` has come to the last loss of `other`, probes counted; None where it never does."""
    aim = other.curve[-1][1]
    before: tuple[float, float] = (0.0, one.initial)
    # Probes lengthen each step on average by so much.
    longer = one.seconds / (one.seconds - one.probe_seconds)
    for step, loss in one.curve:
        if loss <= aim:
            share = (before[1] - aim) / (before[1] - loss) if before[1] > loss else 1.0
            return (before[0] + share * (step - before[0])) * longer
        before = (step, loss)
    return None
