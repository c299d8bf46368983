"""`sharpwatch decisions`, `approve`, `reject` and `rollback`: what was decided, and an operator's say in it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable

from sharpwatch.cli.arguments import Command, add_reason, add_run, add_waiting, count, steps
from sharpwatch.cli.client.client import author, operator, resolve_run
from sharpwatch.cli.client.follow_decision import change, finish, said
from sharpwatch.cli.output import formatting
from sharpwatch.cli.output.output import show
from sharpwatch.cli.output.tables import Grid
from sharpwatch.v1.operator_pb2 import (
    ApproveDecisionRequest,
    Decision,
    ListDecisionsRequest,
    RejectDecisionRequest,
    RequestRollbackRequest,
)


def _decisions_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser, optional=True)
    parser.add_argument("--limit", metavar="N", type=count, default=20, help="the newest N (default: 20)")


def _decisions(args: argparse.Namespace) -> int:
    with operator(args) as stub:
        run = resolve_run(stub, args.run) if args.run else ""
        response = stub.ListDecisions(ListDecisionsRequest(run=run, limit=args.limit))
    show(args, response, [table(response.decisions)])
    return 0


def table(decisions: Iterable[Decision]) -> Grid:
    """Decisions in the daemon's order."""
    return Grid(
        "lllrllllll",
        tuple(
            (
                decision.id,
                formatting.timestamp(decision.made_at_unix_ns),
                decision.run,
                str(decision.step),
                decision.action,
                decision.mode,
                decision.outcome,
                change(decision),
                decision.author or decision.policy or formatting.ABSENT,
                _why(decision),
            )
            for decision in decisions
        ),
        ("id", "made at", "run", "step", "action", "mode", "outcome", "change", "by", "why"),
        empty="no decision yet",
    )


def _why(decision: Decision) -> str:
    guard = decision.guard if decision.guard not in ("", "ok") else ""
    applied = f"applied at step {decision.applied_step}" if decision.HasField("applied_step") else ""
    parts = (decision.alert_name, decision.reason, guard, decision.detail, applied)
    return "; ".join(part for part in parts if part) or formatting.ABSENT


def _approve_arguments(parser: argparse.ArgumentParser) -> None:
    _id(parser)
    add_reason(parser)
    add_waiting(parser)


def _approve(args: argparse.Namespace) -> int:
    request = ApproveDecisionRequest(id=args.id, author=author(os.environ), reason=args.reason)
    with operator(args) as stub:
        return finish(stub, args, stub.ApproveDecision(request).decision)


def _reject_arguments(parser: argparse.ArgumentParser) -> None:
    _id(parser)
    add_reason(parser)


def _reject(args: argparse.Namespace) -> int:
    request = RejectDecisionRequest(id=args.id, author=author(os.environ), reason=args.reason)
    with operator(args) as stub:
        decision = stub.RejectDecision(request).decision
    show(args, decision, said(decision))
    return 0


def _id(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help="a decision's id, as `sharpwatch decisions` shows it")


def _rollback_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--to-step",
        metavar="N",
        type=count,
        help="to the newest checkpoint at or before step N (default: the newest)",
    )
    parser.add_argument(
        "--skip", metavar="A:B", type=steps, default=(0, 0), help="leave out the batches of steps A up to, not with, B"
    )
    add_reason(parser, required=True)
    add_waiting(parser)


def _rollback(args: argparse.Namespace) -> int:
    with operator(args) as stub:
        request = RequestRollbackRequest(
            run=resolve_run(stub, args.run),
            to_step=args.to_step,
            skip_from_step=args.skip[0],
            skip_to_step=args.skip[1],
            author=author(os.environ),
            reason=args.reason,
        )
        return finish(stub, args, stub.RequestRollback(request).decision)


COMMANDS = {
    "decisions": Command(_decisions_arguments, _decisions),
    "approve": Command(_approve_arguments, _approve),
    "reject": Command(_reject_arguments, _reject),
    "rollback": Command(_rollback_arguments, _rollback),
}
