"""Following a decision until the trainer has answered."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Mapping
from queue import SimpleQueue

import grpc

from sharpwatch.cli.output import formatting
from sharpwatch.cli.output.output import show
from sharpwatch.errors import OperatorError
from sharpwatch.v1.operator_pb2 import Decision, WatchDecisionRequest
from sharpwatch.v1.operator_pb2_grpc import OperatorServiceStub

_ON_ITS_WAY = frozenset({"proposed", "approved", "sent"})
_DONE = frozenset({"applied", "recovered", "observed"})


def finish(
    stub: OperatorServiceStub,
    args: argparse.Namespace,
    decision: Decision,
    named: Mapping[str, float] | None = None,
) -> int:
    """Wait for the trainer's answer unless told not to, and report it; `named` are the blocks that were asked for.

    Raises `OperatorError` if the answer is no, or none came in time; with --json the decision is printed all the same.
    """
    if not args.no_wait and decision.outcome in _ON_ITS_WAY:
        try:
            decision = _follow(stub, decision, args.timeout)
        except KeyboardInterrupt:
            raise OperatorError(f"stopped waiting; {_still(decision)}") from None
    failed = decision.outcome not in _DONE and not (args.no_wait and decision.outcome in _ON_ITS_WAY)
    if args.json or not failed:
        show(args, decision, said(decision, named))
    if failed:
        raise OperatorError(refusal(decision, args.timeout))
    return 0


def _follow(stub: OperatorServiceStub, decision: Decision, timeout: float) -> Decision:
    """The decision once it is settled, or as it stands after `timeout` seconds."""
    news: SimpleQueue[Decision | grpc.RpcError | None] = SimpleQueue()
    # In a thread of its own: a Ctrl-C that lands inside gRPC can leave one of its locks taken, and closing the channel
    # (which is what ends this thread) then never returns.
    listener = threading.Thread(target=_listen, args=(stub, decision.id, timeout, news), daemon=True)
    listener.start()
    newest = decision
    while newest.outcome in _ON_ITS_WAY:
        heard = news.get()
        if heard is None:
            break
        if isinstance(heard, grpc.RpcError):
            if heard.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                break
            raise heard
        newest = heard
    return newest


def _listen(
    stub: OperatorServiceStub, id_: str, timeout: float, news: SimpleQueue[Decision | grpc.RpcError | None]
) -> None:
    """Put every message of a decision's stream into `news`, then the error or the None that ended it."""
    try:
        for response in stub.WatchDecision(WatchDecisionRequest(id=id_), timeout=timeout):
            news.put(response.decision)
    except grpc.RpcError as error:
        news.put(error)
    else:
        news.put(None)


def said(decision: Decision, named: Mapping[str, float] | None = None) -> str:
    """A decision's outcome in one line, and what the trainer added to it: `revision 3 applied at step 412: qk 0.5`."""
    what = f"revision {decision.revision}" if decision.revision else decision.action
    when = f" at step {decision.applied_step}" if decision.HasField("applied_step") else ""
    id_ = "" if decision.HasField("applied_step") else f" (decision {decision.id})"
    line = f"{what} {decision.outcome}{when}: {change(decision, named)}{id_}"
    return f"{line}\n{decision.detail}" if decision.detail else line


def change(decision: Decision, named: Mapping[str, float] | None = None) -> str:
    """What a decision changes."""
    if decision.HasField("rollback"):
        back = decision.rollback
        place = f" ({back.checkpoint.uri})" if back.checkpoint.uri else ""
        skipped = (
            f", skipping steps {back.skip_from_step} to {back.skip_to_step - 1}"
            if back.skip_to_step > back.skip_from_step
            else ""
        )
        return f"back to step {back.checkpoint.step}{place}{skipped}"
    if decision.multipliers or decision.action in ("set_lr", "scale_lr", "ramp_back"):
        return formatting.multipliers(decision.multipliers, named)
    return formatting.ABSENT


def refusal(decision: Decision, timeout: float) -> str:
    """Why a decision did not come into force."""
    if decision.outcome in _ON_ITS_WAY:
        return f"no answer from the trainer of {decision.run} within {timeout:g} s; {_still(decision)}"
    guard = decision.guard if decision.guard not in ("", "ok") else ""
    why = ": ".join(part for part in (guard, decision.detail) if part) or "no reason given"
    return f"decision {decision.id} {decision.outcome}: {why}"


def _still(decision: Decision) -> str:
    return f"decision {decision.id} stays {decision.outcome}: see sharpwatch decisions {decision.run}"
