"""`sharpwatch lr`: the blocks' learning-rate multipliers and their revisions."""

from __future__ import annotations

import argparse
import os

from sharpwatch.cli.arguments import Command, add_multipliers, add_reason, add_run, add_waiting, count
from sharpwatch.cli.client.client import author, operator, resolve_run
from sharpwatch.cli.client.follow_decision import finish
from sharpwatch.cli.output import formatting
from sharpwatch.cli.output.output import show, to_dict
from sharpwatch.cli.output.tables import Grid
from sharpwatch.v1.operator_pb2 import (
    GetRunRequest,
    ListRevisionsRequest,
    Revision,
    RunDetail,
    SetLearningRatesRequest,
    UndoLearningRatesRequest,
)


def _set_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_multipliers(parser)
    parser.add_argument("--ramp", metavar="N", type=count, default=0, help="move there over N steps (default: at once)")
    parser.add_argument("--at-step", metavar="N", type=count, default=0, help="not before step N (default: the next)")
    add_reason(parser)
    add_waiting(parser)


def _set(args: argparse.Namespace) -> int:
    with operator(args) as stub:
        request = SetLearningRatesRequest(
            run=resolve_run(stub, args.run),
            multipliers=args.multipliers,
            ramp_steps=args.ramp,
            apply_at_step=args.at_step,
            author=author(os.environ),
            reason=args.reason,
        )
        return finish(stub, args, stub.SetLearningRates(request).decision, args.multipliers)


def _undo_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--revision", metavar="N", type=count, default=0, help="which one (default: the newest)")
    add_reason(parser)
    add_waiting(parser)


def _undo(args: argparse.Namespace) -> int:
    with operator(args) as stub:
        request = UndoLearningRatesRequest(
            run=resolve_run(stub, args.run), revision=args.revision, author=author(os.environ), reason=args.reason
        )
        return finish(stub, args, stub.UndoLearningRates(request).decision)


def _show(args: argparse.Namespace) -> int:
    with operator(args) as stub:
        run = resolve_run(stub, args.run)
        detail = stub.GetRun(GetRunRequest(run=run)).detail
        revisions = stub.ListRevisions(ListRevisionsRequest(run=run)).revisions
    newest = max(revisions, key=lambda revision: revision.revision, default=None)
    payload = {
        "run": run,
        "lr_revision": detail.run.lr_revision,
        "newest_revision": to_dict(newest) if newest else None,
        "blocks": [
            {name: block[name] for name in ("block", "learning_rate", "lr_multiplier")}
            for block in to_dict(detail)["blocks"]
        ],
    }
    show(args, payload, [rates(detail, newest), *([history([newest])] if newest else [])])
    return 0


def rates(detail: RunDetail, newest: Revision | None) -> Grid:
    """Each block's rate and multiplier as the trainer reported them."""
    wanted = newest.multipliers if newest else {}
    return Grid(
        "lrrr",
        tuple(
            (
                block.block,
                formatting.optional(block.learning_rate if block.HasField("learning_rate") else None),
                formatting.optional(block.lr_multiplier if block.HasField("lr_multiplier") else None),
                formatting.number(wanted.get(block.block, 1.0)),
            )
            for block in detail.blocks
        ),
        ("block", "learning rate", "multiplier", "asked for"),
        title=f"run {detail.run.run}, step {detail.run.step}, revision {detail.run.lr_revision}",
        empty=f"run {detail.run.run} has reported no block yet",
    )


def _history(args: argparse.Namespace) -> int:
    with operator(args) as stub:
        response = stub.ListRevisions(ListRevisionsRequest(run=resolve_run(stub, args.run)))
    show(args, response, [history(sorted(response.revisions, key=lambda revision: revision.revision))])
    return 0


def history(revisions: list[Revision]) -> Grid:
    """Revisions, who made them and why."""
    return Grid(
        "rlrlll",
        tuple(
            (
                str(revision.revision),
                formatting.timestamp(revision.made_at_unix_ns),
                str(revision.applied_step) if revision.HasField("applied_step") else "not yet",
                formatting.multipliers(revision.multipliers),
                revision.author,
                f"undoes {revision.undoes}: {revision.reason}".removesuffix(": ")
                if revision.undoes
                else revision.reason,
            )
            for revision in revisions
        ),
        ("revision", "made at", "applied at step", "multipliers", "author", "reason"),
        empty="no revision: every block stands at 1",
    )


COMMANDS = {
    "show": Command(add_run, _show),
    "set": Command(_set_arguments, _set),
    "history": Command(add_run, _history),
    "undo": Command(_undo_arguments, _undo),
}
