"""`sharpwatch replay`: what detectors find in recorded runs and logs, and what policies would do, without a daemon."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from sharpwatch.cli.commands.incidents import culprit
from sharpwatch.cli.extras import needs_extra
from sharpwatch.cli.options import LocalCommand, ParsedText
from sharpwatch.cli.output import Grid, describe_change, print_answer
from sharpwatch.errors import LogError, SharpwatchError

if TYPE_CHECKING:
    from sharpwatch.replay.files import ReadOptions
    from sharpwatch.replay.judge import JudgedIncident, Judgement, WouldBe
    from sharpwatch.replay.recorded_run import RecordedRun

# As in sharpwatch.replay, which is not imported for the help.
_FORMATS = ("csv", "jsonl", "trainer-state", "tensorboard", "megatron", "torchtitan", "recording", "journal")
_COLUMNS = {"step": "step", "loss": "loss", "grad-norm": "gradient norm", "lr": "learning rate"}
_NOT_APPLIED = (
    "nothing was applied: the run goes on as it was recorded, so no outcome is known, and no limit that counts earlier "
    "actions (cooldown_steps, max_actions_per_hour, rollback_window_steps) was met; the trainer is assumed to take "
    "learning rates within 0.01 to 10, and rollbacks"
)
JOURNAL, STANDARD_INPUT = "sqlite:///", "-"
_MEASURED = ("loss", "grad-norm", "lr")


def _column(text: str) -> tuple[str, str]:
    column, _, name = text.partition("=")
    if column not in _COLUMNS or not name:
        raise ValueError(f"{text!r} must be COLUMN=NAME, with a column of {', '.join(_COLUMNS)}")
    return column, name


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError(f"{text!r} must be KEY=VALUE")
    return key, value


def reading_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options on how files are read: `--format` and `--column`."""
    of_format = click.option(
        "--format",
        "format_",
        type=click.Choice(_FORMATS),
        help="The format of all files. Default: found by the content.",
    )
    of_column = click.option(
        "--column",
        "columns",
        metavar="COLUMN=NAME",
        multiple=True,
        type=ParsedText("column", _column),
        help="The name of a column in the files, such as loss=train/nll; a column is step, loss, grad-norm or lr. "
        "Default: usual names.",
    )
    return of_format(of_column(command))


@click.command(
    cls=LocalCommand,
    example="sharpwatch replay outputs/checkpoint-5000/trainer_state.json\n"
    "sharpwatch replay train.log runs/tensorboard metrics.csv.gz",
)
@click.argument(
    "files",
    metavar="FILE...",
    nargs=-1,
    required=True,
    help="A log of a run, - for standard input, a folder of TensorBoard's event files, or a daemon's journal: "
    "sqlite:///PATH.",
)
@reading_options
@click.option("--run", metavar="NAME", help="The run in a journal; a prefix is enough. Default: the only one.")
@click.option(
    "--reference",
    metavar="FILE",
    help="A run whose losses those of each file are held against: a file of any of these kinds, or a run in a journal "
    "as sqlite:///PATH#NAME.",
)
@click.option(
    "--config",
    metavar="FILE",
    help="A daemon's configuration: its `detection` section counts, and what its "
    "policies would have decided is printed.",
)
@click.option(
    "--label",
    "labels",
    metavar="KEY=VALUE",
    multiple=True,
    type=ParsedText("label", _label),
    help="A label of the runs, by which overrides in the configuration fit them. Default: those that a recording has.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def replay(  # noqa: PLR0913, PLR0917 - its options
    files: tuple[str, ...],
    format_: str | None,
    columns: tuple[tuple[str, str], ...],
    run: str | None,
    reference: str | None,
    config: str | None,
    labels: tuple[tuple[str, str], ...],
    as_json: bool,
) -> int:
    """Run logs of finished or running trainings through the detectors, and print the incidents they find.

    With --config it also prints what the policies would have decided; nothing is applied.

    It reads CSV, JSON lines, trainer_state.json, TensorBoard's event files, what Megatron-LM and torchtitan print, and
    sharpwatch's own recordings; files may be compressed with gzip or xz. It needs no daemon.
    """
    with needs_extra("replay", "daemon"):
        from sharpwatch.replay.files import ReadOptions  # noqa: PLC0415 - loads numpy

        options = ReadOptions(cast("Any", format_), cast("Any", dict(columns)), run)
        held_against = None if reference is None else read_one(reference, None, options)
        found, errors = _judged(files, options, config, held_against, dict(labels))
    payload = {"runs": [to_dict(each) for each in found], "errors": errors}
    if found or as_json:
        print_answer(payload, list(_grids(found)), as_json=as_json)
    for error in errors:
        click.echo(f"sharpwatch replay: {' '.join(error.split())}", err=True)
    return 1 if errors else 0


def _judged(
    files: Iterable[str],
    options: ReadOptions,
    config: str | None,
    reference: RecordedRun | None,
    labels: Mapping[str, str],
) -> tuple[list[Judgement], list[str]]:
    """The judgements of all files that can be read, and the errors of the others."""
    from sharpwatch.daemon.config.load import load_config  # noqa: PLC0415 - loads pydantic
    from sharpwatch.daemon.detection.thresholds import Budget  # noqa: PLC0415 - loads numpy
    from sharpwatch.replay.files import expand, read_run  # noqa: PLC0415 - as above
    from sharpwatch.replay.judge import judge  # noqa: PLC0415 - as above

    settings = load_config(config)
    found: list[Judgement] = []
    errors: list[str] = []
    for given in files:
        try:
            sources = expand(given)
        except SharpwatchError as error:
            errors.append(str(error))
            continue
        for source in sources:
            try:
                run = read_run(source, options)
                budget = Budget.of(settings.detection.of({**run.labels, **labels}))
                found.append(judge(run, budget, reference, settings.policies))
            except SharpwatchError as error:
                errors.append(str(error))
    return found, errors


def read_one(given: str, store: str | None, options: ReadOptions) -> RecordedRun:
    """Read a run.

    Args:
        given: How the user names it.
        store: A daemon's journal, in which `given` may be a name.
        options: How a file is read.

    Raises:
        LogError: It can't be read, or is a folder of several.
    """
    from sharpwatch.replay.files import expand, read_run  # noqa: PLC0415 - as above

    source, name = _source(given, store)
    sources = expand(source)
    if len(sources) > 1:
        raise LogError(f"must be one run, but the folder has {len(sources)}: {', '.join(sources)[:200]}", given)
    return read_run(sources[0], dataclasses.replace(options, run=name))


def _source(given: str, store: str | None) -> tuple[str, str | None]:
    """What to read of an argument, and the run in a journal; None for the only one."""
    if given.startswith(JOURNAL):
        # A "#" may also be part of the file's name.
        is_whole = Path(given.removeprefix(JOURNAL)).exists()
        url, _, name = (given, "", "") if is_whole else given.partition("#")
        return url, name or None
    if store is None or given == STANDARD_INPUT or Path(given).exists():
        return given, None
    return store, given


def to_dict(judgement: Judgement) -> dict[str, Any]:
    """A judgement for JSON."""
    run = judgement.run
    steps = [observation.step for observation in run.observations]
    return {
        "file": run.source,
        "format": run.format,
        "rows": len(steps),
        "first_step": steps[0] if steps else None,
        "last_step": steps[-1] if steps else None,
        "columns": dict(run.names),
        "blind_rows": dict(judgement.blind),
        "notes": list(run.notes),
        "incidents": [
            {**dataclasses.asdict(each.incident), "closed_step": each.closed_step} for each in judgement.incidents
        ],
        "policies": [policy.name for policy in judgement.policies],
        "decisions": [
            {
                **dataclasses.asdict(each.made),
                "outcome": each.outcome,
                "evidence": list(each.incident.evidence),
                "hypothetical": each.is_hypothetical,
            }
            for each in judgement.decisions
        ],
    }


def _grids(found: Iterable[Judgement]) -> Iterator[Grid]:
    for judgement in found:
        yield incident_table(judgement)
        if judgement.policies:
            yield decision_table(judgement)
        yield Grid("l", tuple((line,) for line in summary(judgement)))


def incident_table(judgement: Judgement) -> Grid:
    """The incidents of a run, in the order they were opened."""
    source = judgement.run.source
    return Grid(
        "rrrlllll",
        tuple(_incident(each) for each in judgement.incidents),
        ("onset", "opened", "closed", "severity", "cause", "name", "culprit", "evidence"),
        title=source,
        empty=f"{source}: no incident",
    )


def _incident(each: JudgedIncident) -> tuple[str, ...]:
    found = each.incident
    return (
        str(found.onset),
        str(found.first_step),
        "open" if each.closed_step is None else str(each.closed_step),
        found.severity,
        found.cause,
        found.name,
        culprit(found.layer_blocks, found.parameter, found.rank),
        "; ".join(found.evidence),
    )


def decision_table(judgement: Judgement) -> Grid:
    """What the policies would have decided, in order."""
    return Grid(
        "rlllllll",
        tuple(_decision(each) for each in judgement.decisions),
        ("step", "incident", "policy", "action", "would be", "guard", "change", "evidence"),
        title="what the policies would have decided",
        empty="the policies would have decided nothing",
    )


def _decision(each: WouldBe) -> tuple[str, ...]:
    from sharpwatch.daemon.api.conversions import decision_message  # noqa: PLC0415 - loads grpc

    made = each.made
    return (
        f"{made.step}{'*' if each.is_hypothetical else ''}",
        f"{each.incident.name} from step {each.incident.onset}",
        made.policy,
        made.action,
        each.outcome,
        made.guard,
        describe_change(decision_message(made)),
        "; ".join(each.incident.evidence),
    )


def _unknown(judgement: Judgement) -> list[str]:
    """What a replay of policies can't know."""
    if not judgement.decisions:
        return []
    lines = [_NOT_APPLIED]
    if any(value != 1.0 for each in judgement.run.observations for value in each.multipliers.values()):
        lines.append("the recorded run was acted upon already: multipliers other than 1 were in force")
    if judgement.first_action is not None:
        lines.append(
            f"the action of step {judgement.first_action} would have changed what follows: decisions marked with * "
            "may never have come, and others may have"
        )
    if not judgement.run.checkpoints and any(each.made.action == "rollback" for each in judgement.decisions):
        lines.append("no checkpoint is known from the file, which a rollback needs")
    return lines


def summary(judgement: Judgement) -> list[str]:
    """What was read of a run and what could be judged, in a line; and a line for each note."""
    run = judgement.run
    steps = [observation.step for observation in run.observations]
    rows = f"{run.format}: {len(steps)} rows, steps {steps[0]} to {steps[-1]}" if steps else f"{run.format}: no row"
    parts = [rows, _judged_columns(judgement)]
    if absent := [_COLUMNS[each] for each in _MEASURED if not run.is_own and each not in run.names]:
        parts.append(f"not in the file and not judged: {', '.join(absent)}")
    if not run.is_own:
        parts.append("blocks, weights and optimizer state are known only to the agent")
    return ["; ".join(filter(None, parts)), *(f"note: {note}" for note in (*run.notes, *_unknown(judgement)))]


def _judged_columns(judgement: Judgement) -> str:
    run = judgement.run
    return ", ".join(
        f"{_COLUMNS[column]}{_named(column, run.names)} {_from_row(column, rows)}"
        for column, rows in judgement.blind.items()
        if run.is_own or column in run.names
    )


def _named(column: str, names: Mapping[Any, str]) -> str:
    """Its name in the file, where that is another."""
    return f" ({names[column]})" if names.get(column, column) not in {column, _COLUMNS[column]} else ""


def _from_row(column: str, blind: int | None) -> str:
    if blind is not None:
        return f"judged after {blind} rows"
    return "not judged" if column == "lr" else "judged only for nan and inf"
