"""`sharpwatch lr`: the learning-rate multipliers of a run's blocks, their revisions and plans."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import click

from sharpwatch.cli import output
from sharpwatch.cli.client import all_revisions, author, operator, resolve_run, run_argument
from sharpwatch.cli.commands.decisions import follow
from sharpwatch.cli.commands.lr_plan import abort, pause, plan, plan_table, promote
from sharpwatch.cli.dry_run import PENDING, dry_run_option, preview
from sharpwatch.cli.options import (
    COUNT,
    INTERVALS,
    CommandGroup,
    DaemonCommand,
    DaemonOptions,
    gather_lists,
    multipliers_argument,
    reason_option,
    wait_options,
)
from sharpwatch.cli.output import Grid, print_answer, to_dict
from sharpwatch.v1.operator_pb2 import (
    Block,
    GetRunRequest,
    Revision,
    RunDetail,
    SetLearningRatesRequest,
    UndoLearningRatesRequest,
)

_SAME = 1e-5  # relative; trainers report float32

lr = CommandGroup(
    "lr",
    help="Show, set and undo the multipliers of a run's learning rates, or roll a plan of them out in stages. Each "
    "block has one; every change of them is a numbered revision.",
    example="sharpwatch lr set gpt2-a1 qk=0.5 --reason 'loss spikes'\nsharpwatch lr undo gpt2-a1",
)


@lr.command(cls=DaemonCommand, example="sharpwatch lr show gpt2-a1")
@run_argument()
@click.pass_obj
def show(options: DaemonOptions, run: str) -> None:
    """Show each block's learning rate and multiplier, the newest revision and the newest plan.

    Where a multiplier is not the one that was asked for, it says whether that is still to come, or wrong since when.
    """
    with operator(options) as stub:
        name = resolve_run(stub, run)
        detail = stub.GetRun(GetRunRequest(run=name)).detail
        revisions = all_revisions(stub, name)
    newest = max(filter(may_hold, revisions), key=lambda revision: revision.revision, default=None)
    payload = {
        "run": name,
        "lr_revision": detail.run.lr_revision,
        "newest_revision": to_dict(newest) if newest else None,
        "plan": to_dict(detail.plan) if detail.HasField("plan") else None,
        "differences": [
            {"block": block.block, "asked_for": asked_for(block.block, newest), "state": state}
            for block in detail.blocks
            if (state := rate_state(block, newest, detail.run.step))
        ],
        "blocks": [
            {name: block[name] for name in ("block", "learning_rate", "lr_multiplier", "update_every")}
            for block in to_dict(detail)["blocks"]
        ],
    }
    grids = [rate_table(detail, newest), *([revision_table([newest])] if newest else [])]
    grids += [plan_table(detail.plan)] if detail.HasField("plan") else []
    print_answer(payload, grids, as_json=options.json)


def may_hold(revision: Revision) -> bool:
    """Whether a revision came into force, or still can."""
    return revision.HasField("applied_step") or revision.outcome in {*PENDING, ""}  # earlier daemons don't say


def rate_table(detail: RunDetail, newest: Revision | None) -> Grid:
    """Each block's rate and multiplier as the trainer reported them, beside the multiplier of the newest revision."""
    return Grid(
        "lrrrrl",
        tuple(
            (
                block.block,
                output.measured(block, "learning_rate"),
                output.measured(block, "lr_multiplier"),
                output.number(asked_for(block.block, newest)),
                f"{block.update_every} steps" if block.update_every > 1 else "step",
                rate_state(block, newest, detail.run.step),
            )
            for block in detail.blocks
        ),
        ("block", "learning rate", "multiplier", "asked for", "updated every", "state"),
        title=f"run {detail.run.run}, step {detail.run.step}, revision {detail.run.lr_revision}",
        empty=f"run {detail.run.run} has reported no block yet",
    )


def asked_for(block: str, newest: Revision | None) -> float:
    """The multiplier of a block in a revision; 1 where it is not named, or without one."""
    return newest.multipliers.get(block, 1.0) if newest else 1.0


def rate_state(block: Block, newest: Revision | None, step: int) -> str:
    """What is to be said of the multiplier that a trainer reports of a block; empty where it is as asked for.

    Args:
        block: The block.
        newest: The newest revision that came into force, or still can.
        step: The run's step.
    """
    wanted = asked_for(block.block, newest)
    if not block.HasField("lr_multiplier") or math.isclose(block.lr_multiplier, wanted, rel_tol=_SAME):
        return ""
    if newest is None:
        return "wrong: nothing was asked for"
    if not newest.HasField("applied_step"):
        return "not applied yet"
    there = newest.applied_step + newest.ramp_steps
    if step < there:
        return f"on its way, until step {there}"
    # The mean over a block's parameters, of which those that several blocks share take the smallest multiplier.
    if min(newest.multipliers.values(), default=1.0) <= block.lr_multiplier < wanted:
        return (
            f"below {output.number(wanted)} since step {there}: wrong, unless it shares parameters with a slower block"
        )
    return f"wrong: should be {output.number(wanted)} since step {there}"


@lr.command(
    "set",
    cls=DaemonCommand,
    example="sharpwatch lr set gpt2-a1 qk=0.5 vo=0.8 --ramp 20 --reason 'loss spikes'",
)
@run_argument(whole=True)
@multipliers_argument()
@click.option(
    "--every",
    metavar="BLOCK=STEPS,...",
    type=INTERVALS,
    multiple=True,
    callback=gather_lists,
    help="Update a block only at steps that a number divides, such as emb=4; 1 is every step again.",
)
@click.option("--ramp", metavar="STEPS", type=COUNT, default=0, help="Move there over so many steps. Default: at once.")
@click.option("--at-step", metavar="STEP", type=COUNT, default=0, help="Not before this step. Default: the next one.")
@reason_option()
@wait_options
@dry_run_option
@click.pass_obj
def set_multipliers(  # noqa: PLR0913 - click passes every option by name
    options: DaemonOptions,
    run: str,
    multipliers: Mapping[str, float],
    *,
    every: Mapping[str, int],
    ramp: int,
    at_step: int,
    reason: str,
    timeout: float | None,
    dry_run: bool,
) -> None:
    """Multiply the learning rates of blocks by a factor each, and wait until the trainer has done it.

    With --every a block is also updated at some steps only.
    """
    if not (multipliers or every):
        raise click.UsageError("Missing argument 'BLOCK=FACTOR...', or --every BLOCK=STEPS")
    request = SetLearningRatesRequest(
        run=run,
        multipliers=multipliers,
        update_every=every,
        ramp_steps=ramp,
        apply_at_step=at_step,
        author=author(os.environ),
        reason=reason,
    )
    if dry_run:
        preview(options, [request])
        return
    with operator(options) as stub:
        decision = stub.SetLearningRates(request).decision
        follow(stub, decision, timeout, as_json=options.json, requested=multipliers)


@lr.command(cls=DaemonCommand, example="sharpwatch lr history gpt2-a1")
@run_argument()
@click.pass_obj
def history(options: DaemonOptions, run: str) -> None:
    """List the revisions: the multipliers of each, who made it and why."""
    with operator(options) as stub:
        revisions = all_revisions(stub, resolve_run(stub, run))
    payload = {"revisions": list(map(to_dict, revisions))}
    revisions.sort(key=lambda revision: revision.revision)
    print_answer(payload, [revision_table(revisions)], as_json=options.json)


def revision_table(revisions: list[Revision]) -> Grid:
    """A row for each revision, in the given order."""
    return Grid(
        "rlrlll",
        tuple(
            (
                str(revision.revision),
                output.timestamp(revision.made_at_unix_ns),
                _when(revision),
                ", ".join(
                    filter(None, (output.multipliers(revision.multipliers), output.intervals(revision.update_every)))
                ),
                revision.author,
                f"undoes {revision.undoes}: {revision.reason}".removesuffix(": ")
                if revision.undoes
                else revision.reason,
            )
            for revision in revisions
        ),
        ("revision", "made at", "applied at step", "multipliers", "author", "reason"),
        empty="no revision: the multiplier of every block is 1",
    )


def _when(revision: Revision) -> str:
    if revision.HasField("applied_step"):
        return str(revision.applied_step)
    return "not yet" if may_hold(revision) else f"never: {revision.outcome}"


@lr.command(cls=DaemonCommand, example="sharpwatch lr undo gpt2-a1 --reason 'loss is calm again'")
@run_argument(whole=True)
@click.option("--revision", metavar="N", type=COUNT, default=0, help="The revision to undo. Default: the newest.")
@reason_option()
@wait_options
@dry_run_option
@click.pass_obj
def undo(  # noqa: PLR0913 - click passes every option by name
    options: DaemonOptions, run: str, *, revision: int, reason: str, timeout: float | None, dry_run: bool
) -> None:
    """Undo a revision by a new one, and wait until the trainer has done it."""
    request = UndoLearningRatesRequest(run=run, revision=revision, author=author(os.environ), reason=reason)
    if dry_run:
        preview(options, [request])
        return
    with operator(options) as stub:
        answer = stub.UndoLearningRates(request)
        follow(stub, answer.decision, timeout, as_json=options.json)
        if answer.HasField("undone") and not options.json:
            print(output.clean(output.describe_undo(answer)))


for command in (plan, promote, pause, abort):
    lr.add_command(command)
