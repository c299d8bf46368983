"""`--dry-run`: print what a command would send, after the checks for which the daemon need not change anything."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import click
import grpc

from sharpwatch.cli import output
from sharpwatch.cli.client import connected, find_connection, plain_words, some
from sharpwatch.cli.options import DaemonOptions
from sharpwatch.errors import OperatorError
from sharpwatch.v1.operator_pb2 import (
    AbortPlanRequest,
    ApproveDecisionRequest,
    CancelDecisionRequest,
    Decision,
    GetDaemonRequest,
    GetRunRequest,
    ListRevisionsRequest,
    ListRunsRequest,
    PausePlanRequest,
    PromotePlanRequest,
    RejectDecisionRequest,
    RequestRollbackRequest,
    Run,
    SetLearningRatesRequest,
    SetModeRequest,
    UndoLearningRatesRequest,
    WatchDecisionRequest,
)
from sharpwatch.v1.operator_pb2_grpc import OperatorServiceStub
from sharpwatch.v1.types_pb2 import Rollback

PlanChange = PromotePlanRequest | PausePlanRequest | AbortPlanRequest
Change = SetLearningRatesRequest | UndoLearningRatesRequest | RequestRollbackRequest | SetModeRequest | PlanChange
Answer = ApproveDecisionRequest | RejectDecisionRequest | CancelDecisionRequest
PENDING = frozenset({"proposed", "approved", "planned", "sent"})  # outcomes of decisions that are not applied yet
_CHANGEABLE: dict[type[PlanChange], tuple[str, ...]] = {  # the states in which a plan takes each change
    PromotePlanRequest: ("waiting", "paused"),
    PausePlanRequest: ("running", "waiting"),
    AbortPlanRequest: ("running", "waiting", "paused"),
}
_SECONDS = 10.0  # deadline for the one answer that is read from a stream


def dry_run_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --dry-run to a command, which gets one argument `dry_run`."""
    return click.option("--dry-run", is_flag=True, help="Check the command and print it; send nothing.")(command)


def preview(options: DaemonOptions, requests: Sequence[Change | Answer]) -> None:
    """Check requests and print them, but send none.

    The trainer's own answer, and the limits that only the daemon knows (`lr_bounds`, commands under way), are not
    foreseen.

    Args:
        options: The options of the command line.
        requests: What the command would send.

    Raises:
        OperatorError: The daemon would refuse one of them, or can't be asked.
    """
    connection = find_connection(options, os.environ)
    with connected(connection) as stub:
        daemon = stub.GetDaemon(GetDaemonRequest())
        if daemon.role != "operator":
            reason = "a change needs the operator's token"
            raise OperatorError(plain_words(grpc.StatusCode.UNAUTHENTICATED, reason, connection))
        if not daemon.store_writable:
            reason = f"no change can be journalled now: {daemon.store_error}"
            raise OperatorError(plain_words(grpc.StatusCode.UNAVAILABLE, reason, connection))
        runs = {run.run: run for run in stub.ListRuns(ListRunsRequest()).runs}
        effects = [_checked(stub, request, runs) for request in requests]
    calls = [
        {"call": _call(request), "request": output.to_dict(request), "effect": effect}
        for request, effect in zip(requests, effects, strict=True)
    ]
    lines = [
        f"dry run, not sent to {connection.address}: {_line(each)}" for each in zip(requests, effects, strict=True)
    ]
    payload = {"dry_run": True, "address": connection.address, "calls": calls}
    output.print_answer(payload, "\n".join(lines) or "dry run: there is nothing to send", as_json=options.json)


def _call(request: Change | Answer) -> str:
    return type(request).__name__.removesuffix("Request")


def _line(sent: tuple[Change | Answer, str]) -> str:
    request, effect = sent
    fields = []
    for field, value in request.ListFields():
        shown = {"multipliers": lambda given: output.multipliers(given, given), "update_every": output.intervals}
        text = shown.get(field.name, str)(value)
        fields.append(f"{field.name} {text}")
    return output.clean("; ".join((f"{_call(request)} {', '.join(fields)}", *([effect] if effect else []))))


def _checked(stub: OperatorServiceStub, request: Change | Answer, runs: dict[str, Run]) -> str:
    """What the request would do beyond what stands in it; raises `OperatorError` where it would be refused."""
    if isinstance(request, Answer):
        return _answered(stub, request, runs)
    run = _named_in_full(request.run, runs)
    match request:
        case SetLearningRatesRequest():
            _controlled(run)
            blocks = [block.block for block in stub.GetRun(GetRunRequest(run=run.run)).detail.blocks]
            named = (*request.multipliers, *request.update_every)
            unknown = next((block for block in named if block not in blocks), None)
            if unknown is not None:
                raise OperatorError(f"run {run.run} has no block {unknown!r}; allowed: {', '.join(blocks)}")
        case UndoLearningRatesRequest():
            _controlled(run)
            known = [each.revision for each in stub.ListRevisions(ListRevisionsRequest(run=run.run)).revisions]
            if not known or (request.revision and request.revision not in known):
                names = ", ".join(map(str, known)) or "none yet"
                raise OperatorError(f"no revision {request.revision or ''} of run {run.run}; known: {names}")
        case RequestRollbackRequest():
            _controlled(run)
            return _rolled_back(stub, request, run)
        case PromotePlanRequest() | PausePlanRequest() | AbortPlanRequest():
            return _planned(stub, request, run)
    return ""


def _named_in_full(given: str, runs: dict[str, Run]) -> Run:
    """As the daemon finds a run that is to be changed, and in its words."""
    if given in runs:
        return runs[given]
    meant = sorted(name for name in runs if name.startswith(given))
    if not meant:
        raise OperatorError(f"no run {given!r}")
    raise OperatorError(
        f"a run that is changed must be named in full, got {given!r}; say which one is meant: {some(meant)}"
    )


def _controlled(run: Run) -> None:
    if run.control == "none":
        raise OperatorError(f'run {run.run} was attached with control="none"')


def _planned(stub: OperatorServiceStub, request: PlanChange, run: Run) -> str:
    """The plan that would be changed."""
    detail = stub.GetRun(GetRunRequest(run=run.run)).detail
    if not detail.HasField("plan"):
        raise OperatorError(f"run {run.run} has no plan; start one with: sharpwatch lr plan")
    plan, states = detail.plan, _CHANGEABLE[type(request)]
    stands = f"plan {plan.name} is {plan.state}" + (f" ({plan.detail})" if plan.detail else "")
    if plan.state not in states:
        raise OperatorError(f"{stands}; it must be {' or '.join(states)}")
    return stands


def _rolled_back(stub: OperatorServiceStub, request: RequestRollbackRequest, run: Run) -> str:
    """The checkpoint that the daemon would choose: the newest at or before the step asked for and the present one."""
    limit = min(request.to_step, run.step) if request.HasField("to_step") else run.step
    saved = stub.GetRun(GetRunRequest(run=run.run)).detail.checkpoints
    found = [each for each in saved if each.step <= limit]
    if not found:
        have = ", ".join(str(each.step) for each in saved) or "none"
        raise OperatorError(f"no checkpoint to go back to at or before step {limit}; there are those of steps: {have}")
    # Of several of one step the one saved last.
    target = max(enumerate(found), key=lambda each: (each[1].step, each[0]))[1]
    skip = {"skip_from_step": request.skip_from_step, "skip_to_step": request.skip_to_step}
    return output.describe_change(Decision(rollback=Rollback(checkpoint=target, **skip)))


def _answered(stub: OperatorServiceStub, request: Answer, runs: dict[str, Run]) -> str:
    """What the decision would change."""
    # The first message comes at once; the stream ends with the connection.
    decision = next(iter(stub.WatchDecision(WatchDecisionRequest(id=request.id), timeout=_SECONDS))).decision
    if decision.id != request.id:
        raise OperatorError(
            f"a decision that is changed must be named in full, got {request.id!r}; "
            f"say which one is meant: {decision.id}"
        )
    if isinstance(request, CancelDecisionRequest):
        if decision.outcome not in PENDING:
            raise OperatorError(f"decision {decision.id} is {decision.outcome}: it is too late to cancel it")
        if decision.cancelled_by:
            raise OperatorError(f"{decision.cancelled_by} has asked to cancel decision {decision.id} already")
    elif decision.outcome != "proposed":
        raise OperatorError(f"decision {decision.id} is {decision.outcome}: only a proposal can be answered")
    if isinstance(request, ApproveDecisionRequest):
        _controlled(_named_in_full(decision.run, runs))
    return f"{decision.action} of run {decision.run}: {output.describe_change(decision)}"
