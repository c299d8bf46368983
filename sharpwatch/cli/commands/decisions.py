"""`sharpwatch decisions`, `approve`, `reject`, `cancel`, `rollback`: the decisions, and operators' answers."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from heapq import merge
from queue import SimpleQueue
from typing import Any

import click
import grpc

from sharpwatch.cli import output
from sharpwatch.cli.client import all_decisions, author, completions, operator, resolve_run, run_argument
from sharpwatch.cli.client import audit as audit_of
from sharpwatch.cli.dry_run import PENDING, dry_run_option, preview
from sharpwatch.cli.options import (
    COUNT,
    STEP_RANGE,
    DaemonCommand,
    DaemonOptions,
    reason_option,
    wait_options,
)
from sharpwatch.cli.output import Grid, print_answer, to_dict
from sharpwatch.errors import OperatorError, UnansweredError
from sharpwatch.v1.operator_pb2 import (
    ApproveDecisionRequest,
    CancelDecisionRequest,
    Decision,
    ListDecisionsRequest,
    ListTransitionsResponse,
    OperatorEvent,
    Plan,
    RejectDecisionRequest,
    RequestRollbackRequest,
    Transition,
    WatchDecisionRequest,
)
from sharpwatch.v1.operator_pb2_grpc import OperatorServiceStub

_LISTED = 20  # decisions, by default
_CONNECTS_SECONDS = 10.0  # in which a trainer that has just started connects: with its first step
_DONE = frozenset({"applied", "recovered", "worse", "no-effect", "inconclusive", "observed"})


@click.command(
    cls=DaemonCommand, example="sharpwatch decisions gpt2-a1 --limit 5\nsharpwatch decisions gpt2-a1 --audit"
)
@run_argument(required=False)
@click.option(
    "--limit", metavar="N", type=COUNT, help="Only the newest N decisions. Default: 20; with --audit as many as 10,000."
)
@click.option(
    "--audit",
    is_flag=True,
    help="List everything that became of each decision, and what operators asked for beside, the oldest first.",
)
@click.pass_obj
def decisions(options: DaemonOptions, run: str | None, *, limit: int | None, audit: bool) -> None:
    """List the decisions of policies and operators, the newest first, of one run or of all."""
    with operator(options) as stub:
        name = resolve_run(stub, run) if run else ""
        if audit:
            found = audit_of(stub, name, limit or 0)
            payload = {key: value for key, value in to_dict(found).items() if key != "next_page_token"}
            print_answer(payload, [transition_table(found)], as_json=options.json)
            return
        listed = all_decisions(stub, name, _LISTED if limit is None else limit)
    print_answer({"decisions": list(map(to_dict, listed))}, [decision_table(listed)], as_json=options.json)


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
                output.describe_change(decision),
                decision.author or decision.policy or output.ABSENT,
                _reasons(decision, decision),
            )
            for decision in found
        ),
        ("id", "made at", "run", "step", "action", "mode", "outcome", "change", "by", "why"),
        empty="no decision yet",
    )


def transition_table(found: ListTransitionsResponse) -> Grid:
    """A row for each transition and each other request of an operator, in the given order of both, by time."""
    of = {decision.id: decision for decision in found.decisions}
    plans = {plan.id: plan for plan in found.plans}

    def row(one: Transition | OperatorEvent) -> tuple[str, ...]:
        if isinstance(one, OperatorEvent):
            return _event_row(one)
        return _plan_row(plans[one.decision_id], one) if one.decision_id in plans else _row(of[one.decision_id], one)

    both: tuple[Iterable[Transition | OperatorEvent], ...] = (found.transitions, found.events)
    return Grid(
        "lrllllll",
        # Each in its own order, since the clock may go back.
        tuple(row(one) for one in merge(*both, key=lambda one: one.at_unix_ns)),
        ("at", "step", "id", "run", "action", "outcome", "by", "why"),
        empty="no decision yet",
    )


def _row(decision: Decision, one: Transition) -> tuple[str, ...]:
    return (
        output.timestamp(one.at_unix_ns),
        str(decision.step),
        decision.id,
        decision.run,
        decision.action,
        one.outcome,
        one.author or decision.policy or output.ABSENT,
        _reasons(decision, one),
    )


def _event_row(one: OperatorEvent) -> tuple[str, ...]:
    return (
        output.timestamp(one.at_unix_ns),
        output.ABSENT,
        one.id or output.ABSENT,
        one.run or output.ABSENT,
        one.action,
        one.outcome,
        one.author or output.ABSENT,
        "; ".join(part for part in (one.reason, one.detail) if part) or output.ABSENT,
    )


def _plan_row(plan: Plan, one: Transition) -> tuple[str, ...]:
    why = "; ".join(part for part in (f"plan {plan.name}", one.reason, one.detail) if part)
    at, by = output.timestamp(one.at_unix_ns), one.author or output.ABSENT
    return (at, output.ABSENT, plan.id, plan.run, "plan", one.outcome, by, why)


def _reasons(decision: Decision, state: Decision | Transition) -> str:
    """Why a decision came to the outcome of `state`, which may be an earlier state of it."""
    # A decision has its guard's verdict and its step from then on, an earlier state of it had not.
    guard = decision.guard if state.outcome == decision.outcome and decision.guard not in ("", "ok") else ""
    is_applied = decision.HasField("applied_step") and state.outcome in {"applied", decision.outcome}
    applied = f"applied at step {decision.applied_step}" if is_applied else ""
    waits = decision.waits if state.outcome == decision.outcome else ""
    parts = (decision.alert_name, state.reason, guard, state.detail, applied, waits)
    return "; ".join(part for part in parts if part) or output.ABSENT


def _id_argument(
    outcomes: Collection[str] = ("proposed",),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The argument ID, which a shell completes to decisions that have one of `outcomes`."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
        del param
        return completions(ctx, having, incomplete)

    def having(stub: OperatorServiceStub) -> list[str]:
        found = stub.ListDecisions(ListDecisionsRequest()).decisions
        return [decision.id for decision in found if decision.outcome in outcomes]

    about = "The decision's id in full, as `sharpwatch decisions` shows it."
    return click.argument("id_", metavar="ID", help=about, shell_complete=complete)


@click.command(cls=DaemonCommand, example="sharpwatch approve 3f9c01d2ab47")
@_id_argument()
@reason_option()
@wait_options
@dry_run_option
@click.pass_obj
def approve(options: DaemonOptions, id_: str, *, reason: str, timeout: float | None, dry_run: bool) -> None:
    """Approve a decision that a policy proposed, and wait until the trainer has applied it."""
    request = ApproveDecisionRequest(id=id_, author=author(os.environ), reason=reason)
    if dry_run:
        preview(options, [request])
        return
    with operator(options) as stub:
        follow(stub, stub.ApproveDecision(request).decision, timeout, as_json=options.json)


@click.command(cls=DaemonCommand, example="sharpwatch reject 3f9c01d2ab47 --reason 'expected after the restart'")
@_id_argument()
@reason_option()
@dry_run_option
@click.pass_obj
def reject(options: DaemonOptions, id_: str, *, reason: str, dry_run: bool) -> None:
    """Reject a decision that a policy proposed."""
    request = RejectDecisionRequest(id=id_, author=author(os.environ), reason=reason)
    if dry_run:
        preview(options, [request])
        return
    with operator(options) as stub:
        decision = stub.RejectDecision(request).decision
    print_answer(decision, describe_outcome(decision), as_json=options.json)


@click.command(cls=DaemonCommand, example="sharpwatch cancel 3f9c01d2ab47 --reason 'planned for the wrong step'")
@_id_argument(PENDING)
@reason_option()
@wait_options
@dry_run_option
@click.pass_obj
def cancel(options: DaemonOptions, id_: str, *, reason: str, timeout: float | None, dry_run: bool) -> None:
    """Take back a decision that is not applied yet, and wait until the trainer has let go of it.

    A proposal is cancelled at once. A command that was sent is cancelled by the trainer, on all ranks before the same
    step; what it has applied by then stays in force.
    """
    request = CancelDecisionRequest(id=id_, author=author(os.environ), reason=reason)
    if dry_run:
        preview(options, [request])
        return
    with operator(options) as stub:
        decision = stub.CancelDecision(request).decision
        follow(stub, decision, timeout, as_json=options.json, wanted=frozenset({"cancelled"}))


@click.command(
    cls=DaemonCommand, example="sharpwatch rollback gpt2-a1 --to-step 400 --skip 405:421 --reason 'corrupt shard'"
)
@run_argument(whole=True)
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
@dry_run_option
@click.pass_obj
def rollback(  # noqa: PLR0913 - click passes every option by name
    options: DaemonOptions,
    run: str,
    *,
    to_step: int | None,
    skip: tuple[int, int],
    reason: str,
    timeout: float | None,
    dry_run: bool,
) -> None:
    """Ask a trainer to go back to a checkpoint, and wait until it has done so."""
    request = RequestRollbackRequest(
        run=run,
        to_step=to_step,
        skip_from_step=skip[0],
        skip_to_step=skip[1],
        author=author(os.environ),
        reason=reason,
    )
    if dry_run:
        preview(options, [request])
        return
    with operator(options) as stub:
        follow(stub, stub.RequestRollback(request).decision, timeout, as_json=options.json)


# Following a decision until the trainer has answered, also for `sharpwatch lr`


def follow(  # noqa: PLR0913 - keyword-only, and two of them for one caller each
    stub: OperatorServiceStub,
    decision: Decision,
    timeout: float | None,
    *,
    as_json: bool,
    requested: Mapping[str, float] | None = None,
    wanted: Collection[str] = _DONE,
) -> None:
    """Wait for the trainer's answer to a decision, and print the outcome.

    Args:
        stub: The operator service.
        decision: The decision as the daemon returned it.
        timeout: Seconds to wait; None not to wait.
        as_json: Whether to print JSON, which is printed also before an error is raised.
        requested: The multipliers on the command line, by block.
        wanted: The outcomes that were asked for.

    Raises:
        OperatorError: The trainer refused, or did not answer in time.
    """
    decision = answered(stub, decision, timeout)
    failed = failure_of(decision, timeout, wanted)
    if as_json or failed is None:
        print_answer(decision, describe_outcome(decision, requested), as_json=as_json)
    if failed is not None:
        raise failed


def answered(stub: OperatorServiceStub, decision: Decision, timeout: float | None) -> Decision:
    """A decision once the trainer has answered, or as it is after `timeout` seconds; None does not wait.

    Where no trainer is there, one that has just started may be about to connect: that is waited for, and no longer.
    """
    if timeout is None or decision.outcome not in PENDING:
        return decision
    if decision.waits:
        timeout = min(timeout, _CONNECTS_SECONDS)
    try:
        return _wait(stub, decision, timeout)
    except KeyboardInterrupt:
        # Ctrl-C ends the waiting, not the command: the trainer may still apply it, and the user must know.
        raise UnansweredError(f"stopped waiting; {_pending_note(decision)}") from None


def failure_of(decision: Decision, timeout: float | None, wanted: Collection[str] = _DONE) -> OperatorError | None:
    """The error of a decision that did not come into force in time.

    One that is planned for a later step is none, nor is one under way that is not waited for, with None.
    """
    if decision.outcome in {*wanted, "planned"} or (timeout is None and decision.outcome in PENDING):
        return None
    kind = UnansweredError if decision.outcome in PENDING else OperatorError
    return kind(describe_failure(decision, timeout or 0.0))


def _wait(stub: OperatorServiceStub, decision: Decision, timeout: float) -> Decision:
    """The settled decision, or its state after `timeout` seconds."""
    events: SimpleQueue[Decision | grpc.RpcError | OperatorError | None] = SimpleQueue()
    # In another thread: a Ctrl-C inside gRPC can leave one of its locks held, and then closing the channel, which ends
    # the thread, would never return.
    threading.Thread(target=_listen, args=(stub, decision.id, timeout, events), daemon=True).start()
    newest = decision
    while newest.outcome in PENDING:
        item = events.get()
        if item is None:
            break
        if isinstance(item, OperatorError):
            raise item
        if isinstance(item, grpc.RpcError):
            # The deadline of the stream is the user's --timeout, which the caller reports with the decision's state.
            if item.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                break
            raise item
        newest = item
    return newest


def _listen(
    stub: OperatorServiceStub,
    id_: str,
    timeout: float,
    events: SimpleQueue[Decision | grpc.RpcError | OperatorError | None],
) -> None:
    """Put every state of the decision into `events`, then the error that ended the stream, or None."""
    try:
        for response in stub.WatchDecision(WatchDecisionRequest(id=id_), timeout=timeout):
            events.put(response.decision)
    except (grpc.RpcError, OperatorError) as error:  # the second where no daemon of several answers
        events.put(error)
    else:
        events.put(None)


def describe_outcome(decision: Decision, requested: Mapping[str, float] | None = None) -> str:
    """A decision's outcome in one line, and below it the trainer's remark, or that no trainer is there.

    Args:
        decision: The decision.
        requested: The multipliers on the command line, which are named even where they are 1.

    Returns:
        Such as `revision 3 applied at step 412: qk 0.5`.
    """
    subject = f"revision {decision.revision}" if decision.revision else decision.action
    when = f" at step {decision.applied_step}" if decision.HasField("applied_step") else ""
    id_ = "" if decision.HasField("applied_step") else f" (decision {decision.id})"
    line = f"{subject} {decision.outcome}{when}: {output.describe_change(decision, requested)}{id_}"
    return "\n".join(part for part in (line, decision.detail, decision.waits) if part)


def describe_failure(decision: Decision, timeout: float) -> str:
    """Why a decision was not applied.

    Args:
        decision: The decision.
        timeout: Seconds that were waited.
    """
    if decision.outcome in PENDING and decision.waits:
        return f"{decision.waits}; {_pending_note(decision)}"
    if decision.outcome in PENDING:
        return f"no answer from the trainer of {decision.run} within {timeout:g} s; {_pending_note(decision)}"
    if decision.HasField("applied_step"):  # as nobody waits for an action to fail, it was to be cancelled
        return (
            f"too late: decision {decision.id} was applied at step {decision.applied_step}, and is {decision.outcome}"
        )
    guard = decision.guard if decision.guard not in ("", "ok") else ""
    why = ": ".join(part for part in (guard, decision.detail) if part) or "no reason given"
    return f"decision {decision.id} {decision.outcome}: {why}"


def _pending_note(decision: Decision) -> str:
    return f"decision {decision.id} stays {decision.outcome}: see sharpwatch decisions {decision.run}"
