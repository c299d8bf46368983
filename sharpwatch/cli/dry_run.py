"""`--dry-run`: have the daemon check what a command would send, and print it with what it would come to."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import click

from sharpwatch.cli import output
from sharpwatch.cli.client import connected, find_connection
from sharpwatch.cli.options import DaemonOptions
from sharpwatch.errors import OperatorError
from sharpwatch.v1.operator_pb2 import (
    AbortPlanRequest,
    AcknowledgeIncidentRequest,
    AddSilenceRequest,
    ApproveDecisionRequest,
    CancelDecisionRequest,
    ExpireSilenceRequest,
    ForgetRunRequest,
    GetDaemonRequest,
    PausePlanRequest,
    PromotePlanRequest,
    RejectDecisionRequest,
    ReleaseRunRequest,
    RequestRollbackRequest,
    SetLearningRatesRequest,
    SetModeRequest,
    SetReferenceRequest,
    UndoLearningRatesRequest,
)
from sharpwatch.v1.operator_pb2_grpc import OperatorServiceStub

Change = (
    SetLearningRatesRequest
    | UndoLearningRatesRequest
    | RequestRollbackRequest
    | SetModeRequest
    | SetReferenceRequest
    | PromotePlanRequest
    | PausePlanRequest
    | AbortPlanRequest
    | ApproveDecisionRequest
    | RejectDecisionRequest
    | CancelDecisionRequest
    | AcknowledgeIncidentRequest
    | ReleaseRunRequest
    | AddSilenceRequest
    | ExpireSilenceRequest
    | ForgetRunRequest
)
PENDING = frozenset({"proposed", "approved", "planned", "sent"})  # outcomes of decisions that are not applied yet


def dry_run_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --dry-run to a command, which gets one argument `dry_run`."""
    about = "Have the daemon check the command, and print it; change nothing."
    return click.option("--dry-run", is_flag=True, help=about)(command)


def preview(options: DaemonOptions, requests: Sequence[Change]) -> None:
    """Have the daemon check requests, and print them; it makes none of them.

    It answers as it would answer the command, but each request as if it were the only one. The trainer's own answer
    is not foreseen.

    Args:
        options: The options of the command line.
        requests: What the command would send.

    Raises:
        OperatorError: The daemon would refuse one of them, or can't be asked.
    """
    connection = find_connection(options, os.environ)
    with connected(connection) as stub:
        if not stub.GetDaemon(GetDaemonRequest()).takes_dry_run:
            raise OperatorError(f"daemon at {connection.address} is an earlier version, which takes no --dry-run")
        effects = [_tried(stub, request) for request in requests]
    calls = [
        {"call": _call(request), "request": _shown(request), "effect": effect}
        for request, effect in zip(requests, effects, strict=True)
    ]
    lines = [
        f"dry run at {connection.address}, nothing is changed: {_line(request, effect)}"
        for request, effect in zip(requests, effects, strict=True)
    ]
    payload = {"dry_run": True, "address": connection.address, "calls": calls}
    output.print_answer(payload, "\n".join(lines) or "dry run: there is nothing to send", as_json=options.json)


def _call(request: Change) -> str:
    return type(request).__name__.removesuffix("Request")


def _shown(request: Change) -> dict[str, Any]:
    return {name: value for name, value in output.to_dict(request).items() if name != "dry_run"}


def _line(request: Change, effect: str) -> str:
    fields = []
    for field, value in request.ListFields():
        if field.name == "losses":
            continue  # as many as steps
        shown: dict[str, Callable[[Any], str]] = {
            "multipliers": lambda given: output.multipliers(given, given),
            "update_every": output.intervals,
            "steps": lambda given: f"{len(given)} from {given[0]} to {given[-1]}",
            "duration_seconds": lambda given: f"{given:g}",
        }
        fields.append(f"{field.name} {shown.get(field.name, str)(value)}")
    return output.clean("; ".join((f"{_call(request)} {', '.join(fields)}", *([effect] if effect else []))))


def _tried(stub: OperatorServiceStub, request: Change) -> str:
    """What a request would come to, beyond what stands in it; the stub raises where it would be refused."""
    asked = type(request)()
    asked.CopyFrom(request)  # type: ignore[arg-type]  # of the same type
    asked.dry_run = True
    answer = getattr(stub, _call(request))(asked)
    tell = _EFFECTS.get(type(request))
    return "" if tell is None else tell(request, answer)


def _plan(request: Any, answer: Any) -> str:
    stands = f"plan {answer.plan.name} would be {answer.plan.state}"
    # Its detail then names a decision that is not made.
    if not isinstance(request, PausePlanRequest) and answer.HasField("decision"):
        return f"{stands}; then in force: {output.describe_change(answer.decision)}"
    return stands + (f" ({answer.plan.detail})" if answer.plan.detail else "")


def _decision(request: Any, answer: Any) -> str:
    del request
    made = answer.decision
    return f"{made.action} of run {made.run}: {output.describe_change(made)}"


# What a request would come to, from it and its answer.
_EFFECTS: dict[type[Change], Callable[[Any, Any], str]] = {
    SetLearningRatesRequest: lambda asked, answer: (
        f"then in force: {output.describe_change(answer.decision, asked.multipliers)}"
    ),
    UndoLearningRatesRequest: lambda _, answer: (
        f"{output.describe_undo(answer)}; then in force: {output.describe_change(answer.decision)}"
    ),
    RequestRollbackRequest: lambda _, answer: output.describe_change(answer.decision),
    **dict.fromkeys((PromotePlanRequest, PausePlanRequest, AbortPlanRequest), _plan),
    **dict.fromkeys((ApproveDecisionRequest, RejectDecisionRequest, CancelDecisionRequest), _decision),
    SetModeRequest: lambda asked, answer: output.kept_in_force(answer.run) if asked.mode == "observe" else "",
    AcknowledgeIncidentRequest: lambda _, answer: f"incident {answer.incident.name} of run {answer.incident.run}",
    AddSilenceRequest: lambda _, answer: f"until {output.timestamp(answer.silence.ends_at_unix_ns)}",
    ForgetRunRequest: lambda _, answer: f"would delete {output.describe_size(answer)}",
    ExpireSilenceRequest: lambda _, answer: f"it holds until {output.timestamp(answer.silence.ends_at_unix_ns)}",
}
