# ruff: noqa: N802  the methods are named by the wire
"""OperatorService: what operators see and do. Reading is open to who can connect; changing asks for the operator."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, cast, get_args

import grpc

from sharpwatch import wire
from sharpwatch._version import __version__
from sharpwatch.daemon.api.auth import Authorizer
from sharpwatch.daemon.api.conversions import decision_message, detail_message, revision_message, run_message
from sharpwatch.daemon.decisions.decision_log import Changes
from sharpwatch.daemon.decisions.lifecycle import FINAL
from sharpwatch.daemon.pipeline import Pipeline
from sharpwatch.daemon.records import Decision, Mode
from sharpwatch.daemon.runs.runs import Run, Runs
from sharpwatch.daemon.storage.schema import ModeRow
from sharpwatch.errors import OperatorError, StoreError
from sharpwatch.v1 import operator_pb2 as pb
from sharpwatch.v1.operator_pb2_grpc import OperatorServiceServicer

Context = grpc.aio.ServicerContext[Any, Any]
_DEFAULT_LIMIT, _MOST = 100, 10_000
_MAX_REASON = 2_000
_NAMED = 5  # decisions named where what was said fits several


class Audited(Protocol):
    """A request that changes something."""

    author: str
    reason: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What the daemon knows of itself once it serves."""

    started_at: float  # monotonic seconds
    device: str
    store: str
    http_address: str


class OperatorService(OperatorServiceServicer):
    """The operators' side of the daemon."""

    def __init__(self, *, runs: Runs, pipeline: Pipeline, gate: Authorizer, facts: Facts) -> None:
        self._runs = runs
        self._pipeline = pipeline
        self._gate = gate
        self._facts = facts
        self._draining = False

    def drain(self) -> None:
        """End every watch; calls that answer at once may still come."""
        self._draining = True
        for run in self._runs:
            run.signal.notify()

    async def GetDaemon(self, request: pb.GetDaemonRequest, context: Context) -> pb.GetDaemonResponse:
        """The daemon itself."""
        del request
        return pb.GetDaemonResponse(
            version=__version__,
            protocol=wire.PROTOCOL,
            uptime_seconds=time.monotonic() - self._facts.started_at,
            device=self._facts.device,
            store=self._facts.store,
            http_address=self._facts.http_address,
            runs=len(self._runs),
            store_writable=not self._pipeline.store_error,
            store_error=self._pipeline.store_error,
            role=self._gate.role(context),
        )

    async def ListRuns(self, request: pb.ListRunsRequest, context: Context) -> pb.ListRunsResponse:
        """All runs held, by training job and name."""
        del request, context
        views = sorted(self._runs.views(), key=lambda view: (view.manifest.training_job, view.manifest.run))
        return pb.ListRunsResponse(runs=map(run_message, views))

    async def GetRun(self, request: pb.GetRunRequest, context: Context) -> pb.GetRunResponse:
        """All about a run."""
        run = await self._run(request.run, context)
        return pb.GetRunResponse(detail=detail_message(run.view, run.supervisor.checkpoints))

    async def WatchRun(self, request: pb.WatchRunRequest, context: Context) -> AsyncIterator[pb.WatchRunResponse]:
        """All about a run, again at each change, at most one every `min_interval_seconds`."""
        run = await self._run(request.run, context)
        while True:
            version = run.signal.version
            yield pb.WatchRunResponse(detail=detail_message(run.view, run.supervisor.checkpoints))
            if request.min_interval_seconds > 0:
                await asyncio.sleep(request.min_interval_seconds)
            await self._changed(run, version, context)

    async def SetLearningRates(
        self, request: pb.SetLearningRatesRequest, context: Context
    ) -> pb.SetLearningRatesResponse:
        """Put block multipliers in force."""
        run = await self._may_change(request.run, request, context)
        changes = await self._ask(
            context,
            lambda: run.supervisor.set_learning_rates(
                dict(request.multipliers),
                request.ramp_steps,
                request.apply_at_step,
                request.author,
                request.reason,
                time.time(),
            ),
        )
        return pb.SetLearningRatesResponse(decision=await self._journalled(run, changes, context))

    async def UndoLearningRates(
        self, request: pb.UndoLearningRatesRequest, context: Context
    ) -> pb.UndoLearningRatesResponse:
        """Put the multipliers before a revision in force again."""
        run = await self._may_change(request.run, request, context)
        changes = await self._ask(
            context,
            lambda: run.supervisor.undo(request.revision, request.author, request.reason, time.time()),
        )
        return pb.UndoLearningRatesResponse(decision=await self._journalled(run, changes, context))

    async def ListRevisions(self, request: pb.ListRevisionsRequest, context: Context) -> pb.ListRevisionsResponse:
        """A run's LR revisions, oldest first."""
        run = await self._run(request.run, context)
        return pb.ListRevisionsResponse(revisions=map(revision_message, run.supervisor.revisions))

    async def RequestRollback(self, request: pb.RequestRollbackRequest, context: Context) -> pb.RequestRollbackResponse:
        """Ask the trainer to go back to a checkpoint."""
        run = await self._may_change(request.run, request, context)
        changes = await self._ask(
            context,
            lambda: run.supervisor.request_rollback(
                request.to_step if request.HasField("to_step") else None,
                request.skip_from_step,
                request.skip_to_step,
                request.author,
                request.reason,
                time.time(),
            ),
        )
        return pb.RequestRollbackResponse(decision=await self._journalled(run, changes, context))

    async def SetMode(self, request: pb.SetModeRequest, context: Context) -> pb.SetModeResponse:
        """Set what policies may do to a run."""
        run = await self._may_change(request.run, request, context)
        if request.mode not in get_args(Mode):
            allowed = ", ".join(get_args(Mode))
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"mode {request.mode!r}; allowed: {allowed}")
        mode = cast("Mode", request.mode)
        changes = await self._ask(
            context, lambda: run.supervisor.set_mode(mode, request.author, request.reason, time.time())
        )
        await self._submit(run, changes, context, ModeRow(run.name, mode, request.author, request.reason, time.time()))
        return pb.SetModeResponse(run=run_message(run.view))

    async def ListDecisions(self, request: pb.ListDecisionsRequest, context: Context) -> pb.ListDecisionsResponse:
        """The newest decisions, newest first; of all runs where none is named."""
        runs = [await self._run(request.run, context)] if request.run else list(self._runs)
        limit = min(request.limit or _DEFAULT_LIMIT, _MOST)
        made = chain.from_iterable(reversed(run.supervisor.decisions) for run in runs)
        newest = heapq.nlargest(limit, made, key=lambda one: one.made_at)
        return pb.ListDecisionsResponse(decisions=map(decision_message, newest))

    async def WatchDecision(
        self, request: pb.WatchDecisionRequest, context: Context
    ) -> AsyncIterator[pb.WatchDecisionResponse]:
        """A decision, again at each change, until its outcome is final."""
        run, identity = await self._meant(request.id, context)
        shown = None
        while True:
            version = run.signal.version
            made = _decision(run, identity)
            if made != shown:
                yield pb.WatchDecisionResponse(decision=decision_message(made))
            # An operator's own is done once it is applied; a policy's has still to prove itself.
            if made.outcome in FINAL or (made.outcome == "applied" and not made.policy):
                return
            shown = made
            await self._changed(run, version, context)

    async def ApproveDecision(self, request: pb.ApproveDecisionRequest, context: Context) -> pb.ApproveDecisionResponse:
        """Let a proposed decision be carried out."""
        await self._authorise(request, context)
        run, identity = await self._meant(request.id, context)
        changes = await self._ask(
            context, lambda: run.supervisor.approve(identity, request.author, request.reason, time.time())
        )
        await self._submit(run, changes, context)
        return pb.ApproveDecisionResponse(decision=decision_message(_decision(run, identity)))

    async def RejectDecision(self, request: pb.RejectDecisionRequest, context: Context) -> pb.RejectDecisionResponse:
        """Put a proposed decision aside."""
        await self._authorise(request, context)
        run, identity = await self._meant(request.id, context)
        changes = await self._ask(
            context, lambda: run.supervisor.reject(identity, request.author, request.reason, time.time())
        )
        await self._submit(run, changes, context)
        return pb.RejectDecisionResponse(decision=decision_message(_decision(run, identity)))

    async def _changed(self, run: Run, version: int, context: Context) -> None:
        """Wait until `run` is past `version`; ends the call where the daemon stops."""
        if not self._draining:
            await run.signal.after(version)
        if self._draining:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the daemon is stopping")

    async def _run(self, name: str, context: Context) -> Run:
        run = self._runs.get(name)
        if run is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no run {name!r}")
        return run

    async def _meant(self, said: str, context: Context) -> tuple[Run, str]:
        """The decision that an id, or the beginning of just one, names, and its run."""
        found = self._runs.decisions(said) if said else []
        if not found:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no decision {said!r}")
        if len(found) > 1:
            some = ", ".join(identity for _, identity in found[:_NAMED]) + (", ..." if len(found) > _NAMED else "")
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{len(found)} decisions begin with {said!r}: {some}")
        return found[0]

    async def _authorise(self, request: Audited, context: Context) -> None:
        await self._gate.require_operator(context)
        if not request.author.strip():
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "author: a change needs the name of who asks for it")
        if max(len(request.author), len(request.reason)) > _MAX_REASON:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"author and reason: at most {_MAX_REASON} characters"
            )

    async def _may_change(self, name: str, request: Audited, context: Context) -> Run:
        await self._authorise(request, context)
        return await self._run(name, context)

    async def _ask(self, context: Context, change: Callable[[], Changes]) -> Changes:
        """Let the supervisor judge; nothing is begun that could not be journalled."""
        if self._pipeline.store_error:
            await context.abort(
                grpc.StatusCode.UNAVAILABLE, f"nothing can be audited now: {self._pipeline.store_error}"
            )
        try:
            return change()
        except OperatorError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))

    async def _submit(self, run: Run, changes: Changes, context: Context, mode: ModeRow | None = None) -> None:
        try:
            await self._pipeline.submit(run, changes, mode)
        except StoreError as error:
            made = ", ".join(made.id for made in changes.decisions) or "the change"
            await context.abort(
                grpc.StatusCode.UNAVAILABLE, f"{made} waits for the journal and is sent once it takes writes: {error}"
            )

    async def _journalled(self, run: Run, changes: Changes, context: Context) -> pb.Decision:
        await self._submit(run, changes, context)
        return decision_message(_decision(run, changes.decisions[-1].id))


def _decision(run: Run, identity: str) -> Decision:
    return next(made for made in run.supervisor.decisions if made.id == identity)
