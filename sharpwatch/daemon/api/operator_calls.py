"""What operators' calls have in common: who may change something, and what is meant, tried, journalled and refused."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial, wraps
from typing import Any, NoReturn, Protocol, TypeVar, cast

import grpc
import structlog

from sharpwatch.daemon.api.auth import Authorizer
from sharpwatch.daemon.decisions.transitions import Event, can
from sharpwatch.daemon.pipeline import Pipeline
from sharpwatch.daemon.records import Changes, Decision, Incident
from sharpwatch.daemon.run_loader import RunLoader
from sharpwatch.daemon.runs.run import Run, Runs
from sharpwatch.daemon.storage import catalog
from sharpwatch.daemon.storage.schema import ModeRow, ReferenceRow, RequestRow
from sharpwatch.errors import NoRoomError, NotHeldError, OperatorError, StoreError
from sharpwatch.wire import MAX_TEXT

Context = grpc.aio.ServicerContext[Any, Any]
Result = TypeVar("Result")
Answer = TypeVar("Answer", bound=Callable[..., Awaitable[Any]])
log = structlog.get_logger(__name__)
_MAX_REASON = 2_000
_NOT_ASKED = {"author", "reason", "steps", "losses"}  # fields that stand elsewhere, or would fill the log
_NAMED = 8  # runs or decisions that an error lists


class Audited(Protocol):
    """A request that changes something, unless it is a dry run."""

    author: str
    reason: str
    dry_run: bool


class _RefusalContext:
    """The context of a call, in which what ends the call is told to `note` first."""

    def __init__(self, context: Context, note: Callable[[grpc.StatusCode, str], Awaitable[None]]) -> None:
        self._context = context
        self._note = note

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def abort(self, code: grpc.StatusCode, details: str = "") -> NoReturn:
        """Ends the call."""
        await self._note(code, details)
        await self._context.abort(code, details)


def refusals_noted(action: str) -> Callable[[Answer], Answer]:
    """Has the daemon's log, and the journal, say who was refused what and why.

    Args:
        action: The command by which operators know the method.
    """

    def noted(method: Answer) -> Answer:
        @wraps(method)
        async def call(service: OperatorCalls, request: Any, context: Context) -> Any:
            async def note(code: grpc.StatusCode, why: str) -> None:
                await service.note_refused(action, request, context, code, why)

            return await method(service, request, _RefusalContext(context, note))

        return cast("Answer", call)

    return noted


class OperatorCalls:
    """The part of the operator service that knows no method of it.

    Args:
        runs: The runs that the daemon holds.
        loader: Brings back others.
        pipeline: Journals changes and sends their commands.
        authorizer: Tells operators from viewers.
    """

    def __init__(self, runs: Runs, loader: RunLoader, pipeline: Pipeline, authorizer: Authorizer) -> None:
        self._runs = runs
        self._loader = loader
        self._pipeline = pipeline
        self._authorizer = authorizer

    async def _authorize(self, request: Audited, context: Context) -> None:
        await self._authorizer.require("operator", context)
        if not request.author.strip():
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "author must name who asks for the change")
        if max(len(request.author), len(request.reason)) > _MAX_REASON:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"author and reason must have at most {_MAX_REASON} characters each"
            )

    async def _authorized_run(self, name: str, request: Audited, context: Context) -> Run:
        """Finds the run that is to be changed, by its whole name."""
        await self._authorize(request, context)
        return await self._run_to_change(name, context)

    async def _look_up(self, answer: Awaitable[Result], context: Context) -> Result:
        """What the loader answers; ends the call where it can't."""
        try:
            return await answer
        except NotHeldError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except NoRoomError as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except StoreError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"the journal can't be read: {error}")

    async def _find_run(self, name: str, context: Context) -> Run | None:
        return await self._look_up(self._loader.get(name), context)

    async def _run(self, name: str, context: Context) -> Run:
        run = await self._find_run(name, context)
        if run is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no run {name!r}")
        return run

    async def _run_to_change(self, name: str, context: Context) -> Run:
        run = await self._find_run(name, context)
        if run is None:
            await refuse_name(context, "run", name, await self._look_up(self._loader.names(name), context))
        return run

    async def _find_decision(self, given: str, context: Context) -> tuple[Run, str]:
        """Finds a decision to read, by its id or by a beginning that no other id has; returns its run and its id."""
        found = await self._look_up(self._loader.decisions(given), context) if given else []
        if not found:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no decision {given!r}")
        if len(found) > 1:
            some = _some([identity for _, identity in found])
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"{len(found)} decisions begin with {given!r}: {some}"
            )
        name, identity = found[0]
        return await self._run(name, context), identity

    async def _decision(self, run: Run, identity: str, context: Context) -> Decision:
        """A decision by its whole id. One that memory has let go of is settled, and the journal has it."""
        made = next((one for one in run.controller.decisions if one.id == identity), None)
        if made is None:
            _, kept = await self._look_up(self._loader.ask(partial(catalog.told, ids=[identity])), context)
            if not kept:
                await context.abort(grpc.StatusCode.NOT_FOUND, f"no decision {identity!r}")
            made = kept[0]
        return made

    async def _incident_to_answer(self, given: str, context: Context) -> tuple[Run, Incident]:
        """Finds an incident and its run by the incident's whole id."""
        found = await self._look_up(self._loader.incidents(given), context)
        whole = next((name for name, identity in found if identity == given), None)
        run = None if whole is None else await self._run(whole, context)
        incident = None if run is None else run.controller.incident(given)
        if run is None:
            await refuse_name(context, "incident", given, [identity for _, identity in found])
        if incident is None:
            text = f"incident {given} of run {run.name} is closed, and only the journal has it still"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
        return run, incident

    async def _decision_to_answer(self, given: str, event: Event, context: Context) -> tuple[Run, str]:
        """Finds a decision by its whole id; a beginning could be of another decision than the one that is meant.

        Those that begin so are named where they can take `event`.
        """
        found = await self._look_up(self._loader.decisions(given), context)
        whole = next((one for one in found if one[1] == given), None)
        if whole is None:
            await self._refuse_beginning(given, [identity for _, identity in found], event, context)
        name, identity = whole
        run = await self._run(name, context)
        if identity not in {made.id for made in run.controller.decisions}:
            made = await self._decision(run, identity, context)
            text = f"decision {given} is {made.outcome}, which is final"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
        return run, identity

    async def _refuse_beginning(self, given: str, found: Sequence[str], event: Event, context: Context) -> NoReturn:
        _, kept = await self._look_up(self._loader.ask(partial(catalog.told, ids=found)), context)
        # A new one may not be written yet.
        held = {made.id: made for run in self._runs for made in run.controller.decisions}
        newest = {made.id: made for made in kept} | held
        open_ones = [one for one in found if can(newest[one].outcome, event)]
        if given and found and not open_ones:
            text = f"no decision that begins with {given!r} can take {event}"
            await context.abort(grpc.StatusCode.NOT_FOUND, text)
        await refuse_name(context, "decision", given, open_ones)

    async def _change(self, context: Context, change: Callable[[], Result]) -> Result:
        """Makes the change, unless the journal fails: no change may go unrecorded."""
        # Asked before the controller: once it has made a decision, that can't be taken back.
        if self._pipeline.store_error:
            await context.abort(
                grpc.StatusCode.UNAVAILABLE, f"no change can be journalled now: {self._pipeline.store_error}"
            )
        try:
            return change()
        except OperatorError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))

    async def _change_run(self, run: Run, request: Audited, context: Context, change: Callable[[], Changes]) -> Changes:
        """Makes a change of a run's decisions, journals it and sends its commands; a dry run is only tried."""
        if request.dry_run:
            return await self._change(context, lambda: run.controller.tried(change))
        changes = await self._change(context, change)
        await self._submit(run, changes, context)
        return changes

    async def _submit(
        self,
        run: Run,
        changes: Changes,
        context: Context,
        row: ModeRow | ReferenceRow | RequestRow | None = None,
    ) -> None:
        try:
            await self._pipeline.submit(run, changes, row)
        except NotHeldError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except StoreError as error:
            made = ", ".join(made.id for made in changes.decisions) or "the change"
            await context.abort(
                grpc.StatusCode.UNAVAILABLE, f"{made} is sent once the journal takes writes again: {error}"
            )

    async def note_refused(self, action: str, request: Any, context: Context, code: grpc.StatusCode, why: str) -> None:
        """Note that a request was refused: in the log, and for an operator's own in the journal.

        Args:
            action: The command that makes such requests.
            request: The request.
            context: The context of the call.
            code: The status that it ends with.
            why: The reason that is given.
        """
        if request.dry_run:
            return
        run, subject, asked = self._asked(request)
        log.warning(
            "request_refused",
            action=action,
            run=run,
            subject=subject,
            asked=asked,
            author=request.author[:_MAX_REASON],
            reason=request.reason[:_MAX_REASON],
            status=code.name,
            why=why,
        )
        # Whoever shows no token must not fill the journal, and while that fails, the log alone has it.
        failing = self._pipeline.store_error or code is grpc.StatusCode.UNAVAILABLE
        if failing or not self._authorizer.caller_of(context).may("operator"):
            return
        texts = (f"{asked}: {why}" if asked else why, request.author[:_MAX_REASON], request.reason[:_MAX_REASON])
        with suppress(StoreError):
            await self._pipeline.keep_request(RequestRow(run, time.time(), action, subject, "refused", *texts))

    def _asked(self, request: Any) -> tuple[str, str, str]:
        """The run of a request, the id of what it is about, and what else it asks for, in words of bounded length."""
        fields = {field.name: value for field, value in request.ListFields() if field.name not in _NOT_ASKED}
        subject = str(fields.pop("id", "") or fields.pop("incident_id", ""))[:MAX_TEXT]
        run = str(fields.pop("run", ""))[:MAX_TEXT]
        if subject and not run:
            run = next((of.name for of in self._runs for made in of.controller.decisions if made.id == subject), "")
        words = (f"{name} {_plain(value)}" for name, value in fields.items())
        return run, subject, ", ".join(words)[:_MAX_REASON]


async def refuse_name(context: Context, kind: str, given: str, names: Iterable[str]) -> NoReturn:
    """Ends a call that would change something, as `given` is none of `names`; says which of them it may be."""
    candidates = [name for name in names if name.startswith(given)]
    if not candidates:
        await context.abort(grpc.StatusCode.NOT_FOUND, f"no {kind} {given!r}")
    # Also with a single candidate: `rollback ""` would else be for the only run there is.
    await context.abort(
        grpc.StatusCode.INVALID_ARGUMENT,
        f"a {kind} that is changed must be named in full, got {given!r}; say which one is meant: {_some(candidates)}",
    )


def decision_of(run: Run, identity: str) -> Decision:
    """The decision of a run by its whole id."""
    return next(made for made in run.controller.decisions if made.id == identity)


def _plain(value: Any) -> str:
    """A field of a request in words."""
    if hasattr(value, "items"):
        return ", ".join(f"{key} {each:g}" for key, each in sorted(value.items()))
    return f"{value:g}" if isinstance(value, float) else " ".join(str(value).split())


def _some(names: Sequence[str]) -> str:
    """Returns the first of `names`, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
