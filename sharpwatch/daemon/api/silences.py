"""A request for a silence: what is wrong with it, and the silence that it asks for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime

from sharpwatch.common.yaml_schema import nearest
from sharpwatch.daemon.config.settings import ALERT_NAMES, CAUSES
from sharpwatch.daemon.decisions.run_controller import random_id
from sharpwatch.daemon.records import Silence
from sharpwatch.daemon.storage.schema import RequestRow
from sharpwatch.v1 import operator_pb2 as pb

_LONGEST = 30 * 86_400.0  # seconds


def wrong_silence(request: pb.AddSilenceRequest, policies: Collection[str], foreign: Collection[str]) -> str:
    """What is wrong with a request; empty if nothing is. A mistyped name would silence nothing, and nobody would know.

    Args:
        request: The request.
        policies: The names of all policies.
        foreign: The names of other systems' alerts that are taken in.
    """
    if not request.reason.strip():
        return "a silence must have a comment"
    if not (request.run or request.alert or request.cause or request.policy):
        return (
            "a silence must name a run, an alert, a cause or a policy; sharpwatch mode --all observe stops everything"
        )
    if not 1.0 <= request.duration_seconds <= _LONGEST:
        return f"a silence must last 1 s to 30 days, got {request.duration_seconds:g} s"
    for kind, given, known in (
        ("alert", request.alert, (*ALERT_NAMES, *foreign)),
        ("cause", request.cause, CAUSES),
        ("policy", request.policy, policies),
    ):
        if given and given not in known:
            return f"no {kind} {given!r}; allowed: {', '.join(known) or 'none'}{nearest(given, known)}"
    return ""


def silence_rows(silences: Iterable[Silence], run: str) -> Iterator[RequestRow]:
    """What operators did about the silences that concern a run, or about all for an empty name."""
    for one in silences:
        if run and one.run not in {"", run}:
            continue
        matched = (f"{kind} {name}" for kind in ("alert", "cause", "policy") if (name := getattr(one, kind)))
        about = ", ".join(matched) or "all incidents"
        until = datetime.fromtimestamp(one.ends_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        row = RequestRow(
            one.run, one.made_at, "silence", one.id, "added", f"{about}, until {until}", one.author, one.comment
        )
        yield row
        if one.expired_at:
            yield replace(
                row, at=one.expired_at, outcome="ended", author=one.expired_by, reason=one.expired_reason, detail=about
            )


def silence_of(request: pb.AddSilenceRequest, now: float) -> Silence:
    """The silence that a request asks for, from `now` on, in unix seconds."""
    return Silence(
        id=random_id(),
        author=request.author,
        comment=request.reason,
        made_at=now,
        ends_at=now + request.duration_seconds,
        run=request.run,
        alert=request.alert,
        cause=request.cause,
        policy=request.policy,
    )
