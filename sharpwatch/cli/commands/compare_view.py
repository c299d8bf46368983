"""What `sharpwatch compare` prints: tables and sentences for people, and the same for JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sharpwatch.cli.output import ABSENT, Grid, number, with_error

if TYPE_CHECKING:
    from sharpwatch.daemon.detection.parting import Mean, Stretch
    from sharpwatch.replay.compare import Comparison, Quantity, Section
    from sharpwatch.replay.paired_estimates import BlockOrder, EstimatePair, NoisePair
    from sharpwatch.replay.recorded_run import RecordedRun

_MOST_STRETCHES = 12  # in the table; the newest
_SHOWN = 3  # in a sentence
_FEWEST = 16  # steps to judge a difference
_BOTH = ("run", "reference")


# For people


def comparison_view(found: Comparison) -> list[Grid]:
    """All tables of a comparison.

    Args:
        found: The comparison.
    """
    return [
        _runs(found),
        _sections(found),
        Grid("l", tuple((line,) for line in _sentences(found))),
        _stretches(found),
        _sharpness(found),
        Grid("l", tuple((line,) for line in _orders(found))),
        _noise(found),
    ]


def _runs(found: Comparison) -> Grid:
    rows = [
        (role, run.source, _rows(run, replaced))
        for role, run, replaced in zip(_BOTH, (found.run, found.reference), found.replaced, strict=True)
    ]
    rows.append(("in common", "", f"{len(found.steps)} steps, {found.steps[0]} to {found.steps[-1]}"))
    rows += [("note", run.source, note) for run in (found.run, found.reference) for note in run.notes]
    return Grid("lll", tuple(rows))


def _rows(run: RecordedRun, replaced: int) -> str:
    steps = [observation.step for observation in run.observations]
    text = f"{run.format}: {len(steps)} rows, steps {min(steps)} to {max(steps)}"
    return f"{text}; {replaced} of an earlier attempt are left out" if replaced else text


def _sections(found: Comparison) -> Grid:
    return Grid(
        "lrrrrrrrr",
        tuple(_section(each) for each in found.sections),
        (
            *("steps", "loss", "reference", "difference", "in errors"),
            *("gradient norm", "reference", "learning rate", "reference"),
        ),
    )


def _section(section: Section) -> tuple[str, ...]:
    values = (section.gradient_norm, section.learning_rate)
    return (
        f"{section.first_step} to {section.last_step}",
        *_both(section.loss),
        with_error(section.difference.value, section.difference.stderr) if section.loss else ABSENT,
        _in_errors(section.difference.errors),
        *(text for pair in values for text in _both(pair)),
    )


def _both(pair: tuple[float, float] | None) -> tuple[str, str]:
    return (ABSENT, ABSENT) if pair is None else (number(pair[0]), number(pair[1]))


def _in_errors(errors: float) -> str:
    return ABSENT if math.isnan(errors) else f"{round(errors, 1) + 0.0:+.1f}"  # + 0.0: no -0.0


def _sentences(found: Comparison) -> Iterator[str]:
    yield from _about_data(found)
    yield from _about_loss(found)
    if found.gradient_norm.parting is not None:
        yield f"gradient norm: {_sides(found.gradient_norm)}{_factor(found.gradient_norm)}"
    if found.first_other_rate is not None:
        yield f"learning rates first differ at step {found.first_other_rate}"
    for role, step in zip(_BOTH, found.first_bad_loss, strict=True):
        if step is not None:
            yield f"the loss of the {role} is not finite at step {step}"
    yield from _about_test(found)


def _about_data(found: Comparison) -> Iterator[str]:
    twins = found.twins
    if twins is None:
        yield "no step has a loss in both runs"
        return
    if twins.first_other is None:
        yield f"all {twins.equal_steps} losses are equal: the same data in the same order (found by equal losses)"
        return
    if twins.equal_steps > 1:
        yield (
            f"equal losses to step {twins.equal_until}, the first other one at step {twins.first_other}: the same data "
            "in the same order (found by equal losses)"
        )
    elif twins.equal_steps:
        yield f"an equal loss at step {twins.equal_until}, the first; the first other one at step {twins.first_other}"
    if not math.isnan(twins.correlation):
        same = "the same data in the same order" if twins.same_data else "no sign of the same data in the same order"
        yield f"changes of the two losses from step to step correlate by {twins.correlation:.2f}: {same}"


def _about_loss(found: Comparison) -> Iterator[str]:
    parting = found.loss.parting
    if parting is None:
        return
    if not parting.windows:
        pairs = len(found.loss.values)
        why = "differences are correlated over too many of them" if pairs >= _FEWEST else f"it takes {_FEWEST}"
        yield f"loss: {pairs} common steps are too few to tell where the runs part; {why}"
        return
    yield f"loss: {_sides(found.loss)}"
    if not parting.stretches:
        return
    last = parting.stretches[-1]
    reference = float(found.loss.values.reference[-last.window :].mean())
    at = _measured(last.onset)
    if parting.stays:
        first = _step(found.loss, last.first)
        yield f"they part for good at step {first}: by {at} over the first {last.window} common steps"
    size = f", {number(100 * abs(parting.last.value / reference), 3)} % of the reference's loss" if reference else ""
    tolerated = ", which is tolerated" if abs(parting.last.value) <= found.tolerance else ""
    yield f"at the end: by {_measured(parting.last)}{size}{tolerated}"


def _measured(mean: Mean) -> str:
    return f"{with_error(mean.value, mean.stderr)}, {abs(mean.errors):.1f} standard errors"


def _step(quantity: Quantity, pair: int) -> int:
    return int(quantity.values.steps[pair])


def _sides(quantity: Quantity) -> str:
    """In words, on which side of the reference the run is from where to where."""
    parting = quantity.parting
    if parting is None or not parting.stretches:
        return "no difference can be told"  # also where there are too few pairs
    shown = parting.stretches[-_SHOWN:]
    words = [
        f"{_side(each)} the reference from step {_step(quantity, each.first)} "
        + ("on" if each.end == len(quantity.values) else f"to step {_step(quantity, each.end - 1)}")
        for each in shown
    ]
    before = len(parting.stretches) - len(shown)
    return (f"{before} earlier {'stretches' if before > 1 else 'stretch'}, then " if before else "") + ", ".join(words)


def _side(stretch: Stretch) -> str:
    return "above" if stretch.onset.value > 0 else "below"


def _about_test(found: Comparison) -> Iterator[str]:
    parting = found.loss.parting
    if parting is None or not parting.windows:
        return
    tolerance = f"more than {number(found.tolerance)} and " if found.tolerance else ""
    pairs = f"{parting.batch} common steps" if parting.batch > 1 else "1 common step"
    yield (
        f"a mean difference counts {tolerance}beyond {parting.bound:.1f} standard errors, in any of {parting.windows} "
        f"windows of 16 batches of {pairs} or more; runs that do not differ have one in about 5 % of comparisons"
    )


def _factor(norms: Quantity) -> str:
    parting = norms.parting
    if parting is None or not parting.stretches:
        return ""
    return f"; at the end by a factor of {number(math.exp(parting.last.value), 3)}"


def _stretches(found: Comparison) -> Grid:
    parting = found.loss.parting
    stretches = parting.stretches if parting else ()
    left_out = len(stretches) - _MOST_STRETCHES
    return Grid(
        "lrrrrrr",
        tuple(
            (
                _side(each),
                str(_step(found.loss, each.first)),
                str(_step(found.loss, each.end - 1)),
                number(each.mean.value),
                str(each.window),
                with_error(each.onset.value, each.onset.stderr),
                _in_errors(each.onset.errors),
            )
            for each in stretches[-_MOST_STRETCHES:]
        ),
        ("loss", "from step", "to step", "mean difference", "first window", "its difference", "in errors"),
        title=f"the last {_MOST_STRETCHES} of {len(stretches)} stretches" if left_out > 0 else "",
    )


def _sharpness(found: Comparison) -> Grid:
    from sharpwatch.replay.paired_estimates import newest  # noqa: PLC0415 - loads numpy

    missing = [role for role, run in zip(_BOTH, (found.run, found.reference), strict=True) if not run.estimates]
    without = f"there is none of the {' and of the '.join(missing)}; a daemon's journal has them"
    why = without if missing else f"none within {found.within} steps of each other by one estimator"
    return Grid(
        "llrrrrr",
        tuple(
            (
                *(pair.block, pair.estimator, str(pair.run.step), str(pair.reference.step)),
                *(with_error(each.value, each.stderr) for each in (pair.run, pair.reference)),
                _in_errors(pair.errors),
            )
            for pair in newest(found.sharpness)
        ),
        ("block", "estimator", "step", "reference's step", "sharpness", "reference", "in errors"),
        empty=f"no sharpness to compare: {why}",
    )


def _orders(found: Comparison) -> Iterator[str]:
    for both in found.orders:
        for role, order in zip(_BOTH, both, strict=True):
            if order.correlation is None:
                continue  # fewer than three blocks
            rank = f"rank correlation {number(order.correlation, 2)}"
            inverted = [f"{low} above {high} by {errors:.1f} standard errors" for low, high, errors in order.inversions]
            yield f"block order of the {role} ({order.estimator}): {rank}; {', '.join(inverted) or 'no inversion'}"


def _noise(found: Comparison) -> Grid:
    return Grid(
        "lrrr",
        tuple(
            (
                pair.block,
                *(with_error(each.value, each.stderr) for each in (pair.run, pair.reference)),
                _in_errors(pair.errors),
            )
            for pair in found.gradient_noise
        ),
        ("block", "gradient noise", "reference", "in errors"),
    )


# For JSON


def to_dict(found: Comparison) -> dict[str, Any]:
    """A comparison for JSON; what is unknown is None.

    Args:
        found: The comparison.
    """
    twins = found.twins
    return {
        "run": _run_dict(found.run, found.replaced[0]),
        "reference": _run_dict(found.reference, found.replaced[1]),
        "steps": {"count": len(found.steps), "first": int(found.steps[0]), "last": int(found.steps[-1])},
        "data": None
        if twins is None
        else {
            "same": twins.same_data,
            "equal_steps": twins.equal_steps,
            "equal_until": twins.equal_until,
            "first_other": twins.first_other,
            "correlation": _known(twins.correlation),
        },
        "loss": _quantity_dict(found.loss) | {"tolerance": found.tolerance},
        "log_gradient_norm": _quantity_dict(found.gradient_norm),
        "learning_rate": {"first_other_step": found.first_other_rate},
        "first_not_finite_loss": dict(zip(_BOTH, found.first_bad_loss, strict=True)),
        "sections": [_section_dict(each) for each in found.sections],
        "sharpness": {"within_steps": found.within, "pairs": [_estimate_pair_dict(each) for each in found.sharpness]},
        "block_order": [
            {"estimator": both[0].estimator} | dict(zip(_BOTH, map(_order_dict, both), strict=True))
            for both in found.orders
        ],
        "gradient_noise": [_noise_dict(each) for each in found.gradient_noise],
    }


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _run_dict(run: RecordedRun, replaced: int) -> dict[str, Any]:
    return {
        "source": run.source,
        "format": run.format,
        "rows": len(run.observations),
        "replaced_rows": replaced,
        "notes": list(run.notes),
    }


def _mean_dict(mean: Mean) -> dict[str, float | None]:
    return {"value": _known(mean.value), "stderr": _known(mean.stderr), "errors": _known(mean.errors)}


def _quantity_dict(quantity: Quantity) -> dict[str, Any]:
    parting = quantity.parting
    if parting is None:
        return {"pairs": 0, "parted_step": None, "stretches": []}
    last = parting.stretches[-1] if parting.stays else None
    return {
        "pairs": len(quantity.values),
        "parted_step": None if last is None else _step(quantity, last.first),
        "difference_there": None if last is None else _mean_dict(last.onset),
        "difference_at_end": _mean_dict(parting.last),
        "bound": _known(parting.bound),
        "windows": parting.windows,
        "batch": parting.batch,
        "batch_correlation": parting.correlation,
        "stretches": [_stretch_dict(quantity, each) for each in parting.stretches],
    }


def _stretch_dict(quantity: Quantity, stretch: Stretch) -> dict[str, Any]:
    return {
        "side": _side(stretch),
        "first_step": _step(quantity, stretch.first),
        "last_step": _step(quantity, stretch.end - 1),
        "difference": _mean_dict(stretch.mean),
        "window": stretch.window,
        "window_difference": _mean_dict(stretch.onset),
    }


def _pair_dict(values: Sequence[float] | None) -> dict[str, float] | None:
    return None if values is None else dict(zip(_BOTH, values, strict=True))


def _section_dict(section: Section) -> dict[str, Any]:
    return {
        "first_step": section.first_step,
        "last_step": section.last_step,
        "loss": _pair_dict(section.loss),
        "difference": _mean_dict(section.difference),
        "gradient_norm": _pair_dict(section.gradient_norm),
        "learning_rate": _pair_dict(section.learning_rate),
    }


def _estimate_pair_dict(pair: EstimatePair) -> dict[str, Any]:
    both = {
        role: {
            "step": each.step,
            "value": _known(each.value),
            "stderr": _known(each.stderr),
            "draws": each.draws,
        }
        for role, each in zip(_BOTH, (pair.run, pair.reference), strict=True)
    }
    return {"block": pair.block, "estimator": pair.estimator, **both, "errors": _known(pair.errors)}


def _order_dict(order: BlockOrder) -> dict[str, Any]:
    inversions: Iterable[tuple[str, str, float]] = order.inversions
    return {
        "correlation": order.correlation,
        "inversions": [{"sharper": low, "less_sharp": high, "errors": _known(by)} for low, high, by in inversions],
    }


def _noise_dict(pair: NoisePair) -> dict[str, Any]:
    return {
        "block": pair.block,
        "run": _mean_dict(pair.run),
        "reference": _mean_dict(pair.reference),
        "errors": _known(pair.errors),
    }
