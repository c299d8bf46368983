# ruff: noqa: N802  the methods are named by the wire
"""OperatorService: what operators see and change. Reading needs the role viewer, changes need the role operator."""

from __future__ import annotations

import asyncio
import heapq
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, cast, get_args

import grpc
import structlog

from sharpwatch import wire
from sharpwatch._version import __version__
from sharpwatch.daemon.api.auth import Authorizer
from sharpwatch.daemon.api.conversions import (
    alert_message,
    decision_message,
    detail_message,
    ended_run_message,
    event_message,
    message_bytes,
    override_messages,
    plan_message,
    reference_message,
    revision_message,
    run_message,
    silence_message,
    transition_message,
)
from sharpwatch.daemon.api.history import history_message
from sharpwatch.daemon.api.operator_calls import (
    Audited,
    Context,
    OperatorCalls,
    decision_of,
    refusals_noted,
    refuse_name,
)
from sharpwatch.daemon.api.pages import Page, fitting
from sharpwatch.daemon.api.silences import silence_of, silence_rows, wrong_silence
from sharpwatch.daemon.config.settings import Config, DetectionConfig
from sharpwatch.daemon.decisions.lr_plan import PlanRequest
from sharpwatch.daemon.decisions.muting import Silences
from sharpwatch.daemon.decisions.operator_requests import OperatorContext
from sharpwatch.daemon.decisions.plan_rollout import PlanRollout
from sharpwatch.daemon.decisions.run_controller import RunController, configured_mode
from sharpwatch.daemon.decisions.transitions import UNDER_WAY, Event, is_settled
from sharpwatch.daemon.detection.history import MAX_LOSSES, Losses
from sharpwatch.daemon.held_shards import HeldShards
from sharpwatch.daemon.pipeline import Pipeline
from sharpwatch.daemon.records import NO_CHANGES, Changes, Decision, LrPlan, Mode, Silence
from sharpwatch.daemon.run_loader import RunLoader, RunPage
from sharpwatch.daemon.runs.run import Run, Runs
from sharpwatch.daemon.storage import catalog
from sharpwatch.daemon.storage.journal import Store
from sharpwatch.daemon.storage.schema import ModeRow, ReferenceRow, RequestRow
from sharpwatch.errors import StoreError
from sharpwatch.v1 import operator_pb2 as pb
from sharpwatch.v1.operator_pb2_grpc import OperatorServiceServicer
from sharpwatch.wire import MAX_STEP, MAX_TEXT

log = structlog.get_logger(__name__)

_DEFAULT_LIMIT, _MOST = 100, 10_000
_MOST_RUNS = 1_000  # in a page
_AUDITED = 2_000  # decisions, plans and events in a page


@dataclass(frozen=True, slots=True)
class DaemonInfo:
    """Facts about the daemon. What is of its rules changes when its configuration is loaded anew."""

    started_at: float  # monotonic seconds
    device: str
    store: str
    http_address: str
    policies: tuple[str, ...] = ()  # their names
    foreign_alerts: tuple[str, ...] = ()  # the names of those that are taken in
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    mode: Mode = "observe"  # of runs for which none was set


def rules_of(config: Config) -> dict[str, Any]:
    """The facts about the daemon that a reload of its configuration changes."""
    return {
        "policies": tuple(policy.name for policy in config.policies),
        "foreign_alerts": tuple(config.foreign_alerts),
        "detection": config.detection,
        "mode": configured_mode(config.policies, config.autopilot),
    }


class OperatorService(OperatorCalls, OperatorServiceServicer):
    """Serves the operators.

    Args:
        runs: The runs that the daemon holds.
        loader: Brings back others.
        silences: The silences of all runs.
        pipeline: Journals changes and sends their commands.
        store: The journal, which alone has what became of each decision.
        authorizer: Tells operators from viewers.
        release: Gives the name of a run to the next trainer.
        info: Facts about the daemon.
        shards: The shards that it holds.
    """

    def __init__(  # noqa: PLR0913  the parts that it connects
        self,
        *,
        runs: Runs,
        loader: RunLoader,
        silences: Silences,
        pipeline: Pipeline,
        store: Store,
        authorizer: Authorizer,
        release: Callable[[Run], None],
        info: DaemonInfo,
        shards: HeldShards,
    ) -> None:
        super().__init__(runs, loader, pipeline, authorizer)
        self._release = release
        self._silences = silences
        self._store = store
        self._info = info
        self._shards = shards
        self._draining = False
        self._showing, self._decoding = asyncio.Lock(), asyncio.Lock()

    def configure(self, config: Config) -> None:
        """Answers by the rules of another configuration."""
        self._info = replace(self._info, **rules_of(config))

    def drain(self) -> None:
        """Ends every watch; other calls are still answered."""
        self._draining = True
        for run in self._runs:
            run.signal.notify()

    async def GetDaemon(self, request: pb.GetDaemonRequest, context: Context) -> pb.GetDaemonResponse:
        """Returns facts about the daemon."""
        del request
        return pb.GetDaemonResponse(
            version=__version__,
            protocol=wire.PROTOCOL,
            uptime_seconds=time.monotonic() - self._info.started_at,
            device=self._info.device,
            store=self._info.store,
            http_address=self._info.http_address,
            runs=len(self._runs),
            store_writable=not self._pipeline.store_error,
            store_error=self._pipeline.store_error,
            role=self._authorizer.caller_of(context).role,
            takes_dry_run=True,
            shard=self._shards.own.index,
            shards=self._shards.own.count,
            shards_held=self._shards,
            address=self._shards.address,
        )

    async def ListRuns(self, request: pb.ListRunsRequest, context: Context) -> pb.ListRunsResponse:
        """Lists all runs, those in the journal too, page by page."""
        page = RunPage(list(self._runs), (), 0)
        if not request.held_only:
            page = await self._page(request, context)
        held = (run_message(run.snapshot) for run in page.held if run.name.startswith(request.name_prefix))
        others = (ended_run_message(each, self._info.mode) for each in page.others)
        return pb.ListRunsResponse(
            runs=sorted((*held, *others), key=lambda run: (run.training_job, run.run)),
            next_page_token=str(page.last) if page.last else "",
            shards_held=self._shards,
            shards=self._shards.own.count,
        )

    async def _page(self, request: pb.ListRunsRequest, context: Context) -> RunPage:
        token = request.page_token or "0"
        if not token.isdecimal() or int(token) >= 2**63:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"page_token must be of a page, got {token[:40]!r}")
        limit = min(request.page_size or _MOST_RUNS, _MOST_RUNS)
        return await self._look_up(self._loader.page(request.name_prefix, int(token), limit), context)

    async def GetRun(self, request: pb.GetRunRequest, context: Context) -> pb.GetRunResponse:
        """Returns all about a run."""
        run = await self._run(request.run, context)
        return pb.GetRunResponse(detail=await self._shown(run))

    async def GetHistory(self, request: pb.GetHistoryRequest, context: Context) -> pb.GetHistoryResponse:
        """Returns the newest samples and estimates of a run that the journal keeps."""
        run = await self._run(request.run, context)
        try:
            found = await self._store.history(run.name, min(request.limit or _MOST, _MOST))
        except StoreError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"the journal can't be read: {error}")
        # Thousands of samples take a second to decode, in which the others must be served; on one thread, since each
        # more has the event loop wait for the interpreter longer.
        async with self._decoding:
            return await asyncio.to_thread(history_message, found)

    async def WatchRun(self, request: pb.WatchRunRequest, context: Context) -> AsyncIterator[pb.WatchRunResponse]:
        """Yields all about a run at each change, at most once every `min_interval_seconds`."""
        run = await self._run(request.run, context)
        while True:
            version = run.signal.version
            yield pb.WatchRunResponse(detail=await self._shown(run))
            if request.min_interval_seconds > 0:
                await asyncio.sleep(request.min_interval_seconds)
            await self._changed(run, version, context)
            run = await self._run(request.run, context)  # it may have left memory, and come back as another object

    @refusals_noted("lr set")
    async def SetLearningRates(
        self, request: pb.SetLearningRatesRequest, context: Context
    ) -> pb.SetLearningRatesResponse:
        """Puts block multipliers in force."""
        run = await self._authorized_run(request.run, request, context)
        changes = await self._change_run(
            run,
            request,
            context,
            lambda: run.controller.set_learning_rates(
                dict(request.multipliers),
                request.ramp_steps,
                request.apply_at_step,
                request.author,
                request.reason,
                time.time(),
                dict(request.update_every),
            ),
        )
        return pb.SetLearningRatesResponse(decision=self._told(changes.decisions[-1]))

    @refusals_noted("lr undo")
    async def UndoLearningRates(
        self, request: pb.UndoLearningRatesRequest, context: Context
    ) -> pb.UndoLearningRatesResponse:
        """Puts the multipliers before a revision in force again."""
        run = await self._authorized_run(request.run, request, context)
        changes = await self._change_run(
            run,
            request,
            context,
            lambda: run.controller.undo(request.revision, request.author, request.reason, time.time()),
        )
        undone = run.controller.revisions[changes.revisions[-1].undoes - 1]
        by = decision_of(run, undone.decision_id)
        return pb.UndoLearningRatesResponse(
            decision=self._told(changes.decisions[-1]),
            undone=revision_message(undone, by),
            undone_decision=self._told(by),
        )

    async def ListRevisions(self, request: pb.ListRevisionsRequest, context: Context) -> pb.ListRevisionsResponse:
        """Lists the LR revisions of a run, oldest first, page by page."""
        page = await self._page_of(request.page_token, context)
        run = await self._run(request.run, context)
        by = {made.id: made for made in run.controller.decisions}
        revisions = run.controller.revisions
        asked = (revision_message(one, by[one.decision_id]) for one in revisions[page.start :])
        found = fitting(asked, message_bytes)
        return pb.ListRevisionsResponse(revisions=found, next_page_token=page.token(len(found), len(revisions)))

    @refusals_noted("lr plan")
    async def StartPlan(self, request: pb.StartPlanRequest, context: Context) -> pb.StartPlanResponse:
        """Rolls a learning-rate plan out, or answers which one that would be."""
        run = await self._authorized_run(request.run, request, context)
        wanted = PlanRequest(
            request.name,
            dict(request.multipliers),
            [tuple(stage.blocks) for stage in request.stages],
            request.ramp_steps,
            request.automatic,
        )
        known = run.snapshot.without_stale().all_estimates
        plan, made = await self._change_plan(
            run, request, context, lambda rollout, operator: rollout.start(wanted, known, operator)
        )
        if request.dry_run:
            draft = await self._change(
                context,
                lambda: run.controller.draft_plan(wanted, known, request.author, request.reason, time.time()),
            )
            plan = plan_message(draft)  # nothing is under way yet
        return pb.StartPlanResponse(plan=plan, decision=made)

    @refusals_noted("lr promote")
    async def PromotePlan(self, request: pb.PromotePlanRequest, context: Context) -> pb.PromotePlanResponse:
        """Has the newest plan of a run go on."""
        run = await self._authorized_run(request.run, request, context)
        plan, made = await self._change_plan(run, request, context, PlanRollout.promote)
        return pb.PromotePlanResponse(plan=plan, decision=made)

    @refusals_noted("lr pause")
    async def PausePlan(self, request: pb.PausePlanRequest, context: Context) -> pb.PausePlanResponse:
        """Has no further stage of a run's plan sent."""
        run = await self._authorized_run(request.run, request, context)
        plan, _ = await self._change_plan(run, request, context, PlanRollout.pause)
        return pb.PausePlanResponse(plan=plan)

    @refusals_noted("lr abort")
    async def AbortPlan(self, request: pb.AbortPlanRequest, context: Context) -> pb.AbortPlanResponse:
        """Ends a run's plan, with the multipliers from before it."""
        run = await self._authorized_run(request.run, request, context)
        plan, made = await self._change_plan(run, request, context, PlanRollout.abort)
        return pb.AbortPlanResponse(plan=plan, decision=made)

    async def _change_plan(
        self, run: Run, request: Audited, context: Context, change: Callable[[PlanRollout, OperatorContext], None]
    ) -> tuple[pb.Plan, pb.Decision | None]:
        """Changes a run's plan; returns it, and the decision that is sent for it, if any."""
        changes = await self._change_run(
            run,
            request,
            context,
            lambda: run.controller.change_plan(change, request.author, request.reason, time.time()),
        )
        sent = self._told(changes.commands[-1]) if changes.commands else None
        return plan_message(changes.plans[-1]), sent

    @refusals_noted("rollback")
    async def RequestRollback(self, request: pb.RequestRollbackRequest, context: Context) -> pb.RequestRollbackResponse:
        """Asks the trainer to go back to a checkpoint."""
        run = await self._authorized_run(request.run, request, context)
        changes = await self._change_run(
            run,
            request,
            context,
            lambda: run.controller.request_rollback(
                request.to_step if request.HasField("to_step") else None,
                request.skip_from_step,
                request.skip_to_step,
                request.author,
                request.reason,
                time.time(),
            ),
        )
        return pb.RequestRollbackResponse(decision=self._told(changes.decisions[-1]))

    @refusals_noted("mode")
    async def SetMode(self, request: pb.SetModeRequest, context: Context) -> pb.SetModeResponse:
        """Sets what policies may do to a run."""
        run = await self._authorized_run(request.run, request, context)
        if request.mode not in get_args(Mode):
            allowed = ", ".join(get_args(Mode))
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"mode must be one of {allowed}, got {request.mode!r}"
            )
        mode = cast("Mode", request.mode)
        if request.dry_run:
            await self._change(context, lambda: None)
            answer = pb.SetModeResponse(run=run_message(run.snapshot))
            answer.run.mode = mode
            return answer
        changes = await self._change(
            context, lambda: run.controller.set_mode(mode, request.author, request.reason, time.time())
        )
        await self._submit(run, changes, context, ModeRow(run.name, mode, request.author, request.reason, time.time()))
        return pb.SetModeResponse(run=run_message(run.snapshot))

    async def ListDecisions(self, request: pb.ListDecisionsRequest, context: Context) -> pb.ListDecisionsResponse:
        """Lists the newest decisions of a run or of all runs, newest first, page by page."""
        page = await self._page_of(request.page_token, context)
        newest = await self._newest_decisions(request.run, request.limit or _DEFAULT_LIMIT, page, context)
        found = fitting(map(self._told, newest[page.start :]), message_bytes)
        until = max((one.made_at for one in newest), default=0.0)
        return pb.ListDecisionsResponse(
            decisions=found, next_page_token=page.token(len(found), len(newest), until=until)
        )

    async def ListTransitions(self, request: pb.ListTransitionsRequest, context: Context) -> pb.ListTransitionsResponse:
        """Lists every transition of the newest decisions of a run or of all runs, and of their plans, page by page."""
        page = await self._page_of(request.page_token, context)
        limit = request.limit or _MOST
        newest = await self._newest_decisions(request.run, limit, page, context)
        since = newest[-1].made_at if len(newest) == limit else 0.0
        plans = await self._plans(request.run, since, context)
        try:
            requests = list(await self._store.requests(request.run, since, _MOST))
        except StoreError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"the journal can't be read: {error}")
        requests += (row for row in silence_rows(self._silences, request.run) if row.at >= since)
        events = page.before(sorted(requests, key=lambda row: row.at), lambda row: row.at)
        items: list[Decision | LrPlan | RequestRow] = [*newest, *page.before(plans, lambda plan: plan.made_at), *events]
        until = max((one.at if isinstance(one, RequestRow) else one.made_at for one in items), default=0.0)
        answer, taken = await self._audit_page(items[page.start : page.start + _AUDITED], context)
        answer.next_page_token = page.token(taken, len(items), until=until)
        return answer

    async def _audit_page(
        self, items: Sequence[Decision | LrPlan | RequestRow], context: Context
    ) -> tuple[pb.ListTransitionsResponse, int]:
        """The first items that fit in an answer, with all transitions of each, and how many they are."""
        ids = [one.id for one in items if not isinstance(one, RequestRow)]
        try:
            rows = await self._store.transitions(ids)
        except StoreError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"the journal can't be read: {error}")
        sizes: Counter[str] = Counter()
        for row in rows:
            sizes[row.decision] += message_bytes(transition_message(row))

        def size(one: Decision | LrPlan | RequestRow) -> int:
            if isinstance(one, RequestRow):
                return message_bytes(event_message(one))
            message = self._told(one) if isinstance(one, Decision) else plan_message(one)
            return message_bytes(message) + sizes[one.id]

        found = fitting(items, size)
        shown = {one.id for one in found if not isinstance(one, RequestRow)}
        answer = pb.ListTransitionsResponse(
            transitions=(transition_message(row) for row in rows if row.decision in shown),
            decisions=(self._told(one) for one in found if isinstance(one, Decision)),
            plans=(plan_message(one) for one in found if isinstance(one, LrPlan)),
            events=(event_message(one) for one in found if isinstance(one, RequestRow)),
        )
        return answer, len(found)

    async def WatchDecision(
        self, request: pb.WatchDecisionRequest, context: Context
    ) -> AsyncIterator[pb.WatchDecisionResponse]:
        """Yields a decision at each change, until it is settled."""
        run, identity = await self._find_decision(request.id, context)
        shown = None
        while True:
            version = run.signal.version
            made = await self._decision(run, identity, context)
            if made != shown:
                yield pb.WatchDecisionResponse(decision=self._told(made))
            if is_settled(made):
                return
            shown = made
            await self._changed(run, version, context)
            run = await self._run(run.name, context)  # as above

    @refusals_noted("approve")
    async def ApproveDecision(self, request: pb.ApproveDecisionRequest, context: Context) -> pb.ApproveDecisionResponse:
        """Approves a proposed decision."""
        made = await self._answer(request, context, "approve", RunController.approve)
        return pb.ApproveDecisionResponse(decision=made)

    @refusals_noted("reject")
    async def RejectDecision(self, request: pb.RejectDecisionRequest, context: Context) -> pb.RejectDecisionResponse:
        """Rejects a proposed decision."""
        made = await self._answer(request, context, "reject", RunController.reject)
        return pb.RejectDecisionResponse(decision=made)

    @refusals_noted("cancel")
    async def CancelDecision(self, request: pb.CancelDecisionRequest, context: Context) -> pb.CancelDecisionResponse:
        """Takes a decision back that is not applied yet."""
        made = await self._answer(request, context, "cancel", RunController.cancel)
        return pb.CancelDecisionResponse(decision=made)

    async def _answer(
        self,
        request: pb.ApproveDecisionRequest | pb.RejectDecisionRequest | pb.CancelDecisionRequest,
        context: Context,
        event: Event,
        answer: Callable[[RunController, str, str, str, float], Changes],
    ) -> pb.Decision:
        """Approves, rejects or cancels a decision, by a method of its run's controller."""
        await self._authorize(request, context)
        run, identity = await self._decision_to_answer(request.id, event, context)
        changes = await self._change_run(
            run,
            request,
            context,
            lambda: answer(run.controller, identity, request.author, request.reason, time.time()),
        )
        return self._told(next(made for made in changes.decisions if made.id == identity))

    @refusals_noted("release")
    async def ReleaseRun(self, request: pb.ReleaseRunRequest, context: Context) -> pb.ReleaseRunResponse:
        """Gives the name of a run to the next trainer of its job that asks for it."""
        run = await self._authorized_run(request.run, request, context)
        await self._change(context, (lambda: None) if request.dry_run else (lambda: self._release(run)))
        if not request.dry_run:
            holder = run.attempt.claim.credential or run.attempt.hello.host
            row = RequestRow(run.name, time.time(), "release", "", "released", holder, request.author, request.reason)
            await self._submit(run, NO_CHANGES, context, row)
        return pb.ReleaseRunResponse(run=run_message(run.snapshot))

    @refusals_noted("ack")
    async def AcknowledgeIncident(
        self, request: pb.AcknowledgeIncidentRequest, context: Context
    ) -> pb.AcknowledgeIncidentResponse:
        """Notes that someone has seen an incident."""
        await self._authorize(request, context)
        run, incident = await self._incident_to_answer(request.incident_id, context)
        if request.dry_run:
            await self._change(context, lambda: None)
            return pb.AcknowledgeIncidentResponse(incident=alert_message(incident))
        changes = await self._change(
            context, lambda: run.controller.acknowledge(request.incident_id, request.author, request.reason)
        )
        seen = RequestRow(
            run.name, time.time(), "ack", incident.id, "acknowledged", incident.title, request.author, request.reason
        )
        await self._submit(run, changes, context, seen)
        return pb.AcknowledgeIncidentResponse(incident=alert_message(changes.incidents[-1]))

    @refusals_noted("reference")
    async def SetReference(self, request: pb.SetReferenceRequest, context: Context) -> pb.SetReferenceResponse:
        """Sets what a run is held against."""
        run = await self._authorized_run(request.run, request, context)
        losses = await self._reference_losses(request, context)
        if request.dry_run:
            await self._change(context, lambda: None)
            would_be = pb.Reference(name=request.reference) if request.reference else None
            return pb.SetReferenceResponse(reference=would_be)
        row = ReferenceRow(run.name, request.reference, losses, request.author, request.reason, time.time())
        changes = await self._change(context, lambda: self._pipeline.peers.set_reference(run, row))
        await self._submit(run, changes, context, row)
        return pb.SetReferenceResponse(reference=reference_message(run.controller.reference))

    @refusals_noted("silence add")
    async def AddSilence(self, request: pb.AddSilenceRequest, context: Context) -> pb.AddSilenceResponse:
        """Keeps policies from acting on the incidents that match."""
        await self._authorize(request, context)
        if request.run:
            await self._run_to_change(request.run, context)
        wrong = wrong_silence(request, self._info.policies, self._info.foreign_alerts)
        if wrong:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, wrong)
        silences = self._silences.trial() if request.dry_run else self._silences
        silence = await self._change(context, lambda: silences.add(silence_of(request, time.time())))
        return pb.AddSilenceResponse(silence=await self._keep_silence(silence, request, context))

    async def ListSilences(self, request: pb.ListSilencesRequest, context: Context) -> pb.ListSilencesResponse:
        """Lists the silences, the newest first."""
        del context
        now = time.time()
        found = tuple(self._silences) if request.include_ended else self._silences.active(now)
        return pb.ListSilencesResponse(silences=[silence_message(each, now) for each in found[: -_MOST - 1 : -1]])

    @refusals_noted("silence expire")
    async def ExpireSilence(self, request: pb.ExpireSilenceRequest, context: Context) -> pb.ExpireSilenceResponse:
        """Ends a silence before its time."""
        await self._authorize(request, context)
        if request.id not in {silence.id for silence in self._silences}:
            # Another daemon may have added it since this one last looked.
            self._silences.follow(await self._look_up(self._store.silences(), context))
        if request.id not in {silence.id for silence in self._silences}:
            active = [silence.id for silence in self._silences.active(time.time())]
            await refuse_name(context, "silence", request.id, active)
        silences = self._silences.trial() if request.dry_run else self._silences
        silence = await self._change(
            context, lambda: silences.expire(request.id, request.author, request.reason, time.time())
        )
        return pb.ExpireSilenceResponse(silence=await self._keep_silence(silence, request, context))

    @refusals_noted("forget")
    async def ForgetRun(self, request: pb.ForgetRunRequest, context: Context) -> pb.ForgetRunResponse:
        """Deletes all that there is of an ended run."""
        await self._authorize(request, context)
        # Not brought back from the journal for this: it may be one that this version can't read.
        size = await self._look_up(self._loader.size(request.run), context)
        if size is None:
            names = await self._look_up(self._loader.names(request.run), context)
            await refuse_name(context, "run", request.run, names)
        run, attempts = self._runs.get(request.run), self._runs.attempts(request.run)
        if run is not None and run.is_live(time.monotonic()):
            text = f"run {run.name} has a live trainer; only a run that has ended can be forgotten"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
        if not all(each.cursor.idle for each in attempts):
            text = f"samples of run {request.run} are about to be journalled; try again"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
        await self._change(context, lambda: None)
        if not request.dry_run:
            await self._forget(request, size, context)
        return pb.ForgetRunResponse(run=request.run, **asdict(size))

    async def _forget(self, request: pb.ForgetRunRequest, size: catalog.RunSize, context: Context) -> None:
        what = ", ".join(f"{count} {kind}" for kind, count in asdict(size).items())
        row = RequestRow(request.run, time.time(), "forget", "", "forgotten", what, request.author, request.reason)
        try:
            await self._loader.forget(row)
        except StoreError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"run {request.run} may be there still: {error}")
        log.warning("run_forgotten", run=request.run, author=request.author, reason=request.reason, deleted=what)

    async def _keep_silence(self, silence: Silence, request: Audited, context: Context) -> pb.Silence:
        try:
            if not request.dry_run:
                await self._pipeline.keep_silence(silence)
        except StoreError as error:
            await context.abort(
                grpc.StatusCode.UNAVAILABLE,
                f"the change of silence {silence.id} is in force, and is journalled once that is possible: {error}",
            )
        return silence_message(silence, time.time())

    async def _reference_losses(self, request: pb.SetReferenceRequest, context: Context) -> bytes:
        """Checks a reference; returns the state of the losses that came with it, if any did."""
        wrong = _wrong_reference(request)
        if wrong:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, wrong)
        if request.steps:
            return Losses.of(request.steps, request.losses).state()
        if request.reference:
            await self._run_to_change(request.reference, context)
        return b""

    def _told(self, made: Decision) -> pb.Decision:
        """A decision as a message, which says so where no trainer is there to take its command."""
        message, run = decision_message(made), self._runs.get(made.run)
        # Of a run whose shard another daemon holds, that one alone knows the trainer.
        is_ours = self._shards.holds(made.run)
        if made.outcome in UNDER_WAY and is_ours and (run is None or not run.is_live(time.monotonic())):
            message.waits = f"run {made.run} has no trainer now: its next one gets it"
        return message

    async def _shown(self, run: Run) -> pb.RunDetail:
        # Hundreds may ask at once, or watch the same change: samples are taken in between two answers.
        async with self._showing:
            await asyncio.sleep(0)
            return self._detail(run)

    def _detail(self, run: Run) -> pb.RunDetail:
        twins = sorted(twin.name for twin in self._pipeline.peers.twins(run))
        detail = detail_message(run.snapshot, run.controller.checkpoints, twins)
        detail.overrides.extend(override_messages(self._info.detection, run.attempt.hello.all_labels))
        reference = reference_message(run.controller.reference)
        if reference is not None:
            detail.reference.CopyFrom(reference)
        if run.controller.plans:
            detail.plan.CopyFrom(plan_message(run.controller.plans[-1]))
        return detail

    async def _changed(self, run: Run, version: int, context: Context) -> None:
        """Waits until `run` is past `version`; ends the call if the daemon stops."""
        # Asked before and after: `drain` may come while this waits, and must not be waited for if it came before.
        if not self._draining:
            await run.signal.after(version)
        if self._draining:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the daemon is stopping")

    async def _page_of(self, token: str, context: Context) -> Page:
        try:
            return Page.of(token)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    async def _newest_decisions(self, name: str, limit: int, page: Page, context: Context) -> list[Decision]:
        """The newest decisions of a run, or of all runs for an empty name, newest first, as on the first page."""
        limit = min(limit, _MOST)
        runs = [await self._run(name, context)] if name else list(self._runs)
        made = {one.id: one for run in runs for one in reversed(run.controller.decisions)}
        # Memory has not all of a run, and not all runs.
        ask = partial(catalog.newest_decisions, run=name, limit=limit, until=page.until)
        kept = await self._look_up(self._loader.ask(ask), context)
        made = {one.id: one for one in kept if one.id not in made} | made
        # `nlargest` keeps the given order of equals, so of one moment's decisions the newest comes first.
        return heapq.nlargest(limit, page.before(made.values(), lambda one: one.made_at), key=lambda one: one.made_at)

    async def _plans(self, name: str, since: float, context: Context) -> list[LrPlan]:
        """The plans of a run, or of all runs for an empty name, that were made at unix seconds `since` or later."""
        held = {plan.id: plan for run in self._runs if name in {"", run.name} for plan in run.controller.plans}
        if not name:
            kept = await self._look_up(self._loader.ask(partial(catalog.plans, since=since)), context)
            held = {plan.id: plan for plan in kept} | held
        return [plan for plan in held.values() if plan.made_at >= since]


def _wrong_reference(request: pb.SetReferenceRequest) -> str:
    """What is wrong with the reference of a request; empty if nothing is."""
    count = len(request.steps)
    if not request.reference:
        return f"steps must come with a reference that names them, got {count} without" if count else ""
    if len(request.reference) > MAX_TEXT:
        return f"reference must have at most {MAX_TEXT} characters, got {len(request.reference)}"
    if request.reference == request.run and not count:
        return f"reference must be another run than the one it is for, got {request.reference!r}"
    if count > MAX_LOSSES or count != len(request.losses):
        return (
            f"steps and losses must be equally many, at most {MAX_LOSSES}, got {count} steps and "
            f"{len(request.losses)} losses"
        )
    if not all(before < after for before, after in pairwise((-1, *request.steps, MAX_STEP + 1))):
        return "steps must be 0 to 2**53 and ascend"
    return "" if all(map(math.isfinite, request.losses)) else "losses must be finite"
