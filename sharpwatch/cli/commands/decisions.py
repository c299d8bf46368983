"""`sharpwatch decisions`, `approve`, `reject` and `rollback`: what was decided, and an operator's part in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import click

from sharpwatch.cli import output
from sharpwatch.cli.client.client import author, operator, resolve_run
from sharpwatch.cli.client.follow_decision import describe_change, describe_outcome, follow
from sharpwatch.cli.options import (
    COUNT,
    STEP_RANGE,
    DaemonCommand,
    DaemonOptions,
    reason_option,
    run_argument,
    wait_options,
)
from sharpwatch.cli.output import Grid, print_answer
from sharpwatch.v1.operator_pb2 import (
    ApproveDecisionRequest,
    Decision,
    ListDecisionsRequest,
    RejectDecisionRequest,
    RequestRollbackRequest,
)


@click.command(cls=DaemonCommand, example="sharpwatch decisions gpt2-a1 --limit 5")
@run_argument(required=False)
@click.option("--limit", metavar="N", type=COUNT, default=20, help="Only the newest N. Default: 20.")
@click.pass_obj
def decisions(options: DaemonOptions, run: str | None, limit: int) -> None:
    """List the decisions of policies and operators, the newest first, of one run or of all."""
    with operator(options) as stub:
        name = resolve_run(stub, run) if run else ""
        response = stub.ListDecisions(ListDecisionsRequest(run=name, limit=limit))
    print_answer(response, [decision_table(response.decisions)], as_json=options.json)


def decision_table(found: Iterable[Decision]) -> Grid:
    """A row for each decision, in the given order."""
    return Grid(
        "lllrllllll",
        tuple(
            (
                decision.id,
                output.timestamp(decision.made_at_unix_ns),
                decision.run,
                str(decision.step),
                decision.action,
                decision.mode,
                decision.outcome,
                describe_change(decision),
                decision.author or decision.policy or output.ABSENT,
                _reasons(decision),
            )
            for decision in found
        ),
        ("id", "made at", "run", "step", "action", "mode", "outcome", "change", "by", "why"),
        empty="no decision yet",
    )


def _reasons(decision: Decision) -> str:
    guard = decision.guard if decision.guard not in ("", "ok") else ""
    applied = f"applied at step {decision.applied_step}" if decision.HasField("applied_step") else ""
    parts = (decision.alert_name, decision.reason, guard, decision.detail, applied)
    return "; ".join(part for part in parts if part) or output.ABSENT


def _id_argument() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.argument("id_", metavar="ID", help="The decision's id, as `sharpwatch decisions` shows it.")


@click.command(cls=DaemonCommand, example="sharpwatch approve d7")
@_id_argument()
@reason_option()
@wait_options
@click.pass_obj
def approve(options: DaemonOptions, id_: str, reason: str, timeout: float | None) -> None:
    """Approve a decision that a policy proposed, and wait until the trainer has applied it."""
    request = ApproveDecisionRequest(id=id_, author=author(os.environ), reason=reason)
    with operator(options) as stub:
        follow(stub, stub.ApproveDecision(request).decision, timeout, as_json=options.json)


@click.command(cls=DaemonCommand, example="sharpwatch reject d7 --reason 'expected after the restart'")
@_id_argument()
@reason_option()
@click.pass_obj
def reject(options: DaemonOptions, id_: str, reason: str) -> None:
    """Reject a decision that a policy proposed."""
    request = RejectDecisionRequest(id=id_, author=author(os.environ), reason=reason)
    with operator(options) as stub:
        decision = stub.RejectDecision(request).decision
    print_answer(decision, describe_outcome(decision), as_json=options.json)


@click.command(
    cls=DaemonCommand, example="sharpwatch rollback gpt2-a1 --to-step 400 --skip 405:421 --reason 'corrupt shard'"
)
@run_argument()
@click.option(
    "--to-step",
    metavar="STEP",
    type=COUNT,
    help="To the newest checkpoint at or before this step. Default: to the newest of all.",
)
@click.option(
    "--skip",
    metavar="A:B",
    type=STEP_RANGE,
    default=(0, 0),
    help="Skip the batches of the steps from A up to B, without B.",
)
@reason_option(required=True)
@wait_options
@click.pass_obj
def rollback(  # noqa: PLR0913, PLR0917 - click passes every option by name
    options: DaemonOptions,
    run: str,
    to_step: int | None,
    skip: tuple[int, int],
    reason: str,
    timeout: float | None,
) -> None:
    """Ask a trainer to go back to a checkpoint, and wait until it has done so."""
    with operator(options) as stub:
        request = RequestRollbackRequest(
            run=resolve_run(stub, run),
            to_step=to_step,
            skip_from_step=skip[0],
            skip_to_step=skip[1],
            author=author(os.environ),
            reason=reason,
        )
        follow(stub, stub.RequestRollback(request).decision, timeout, as_json=options.json)
