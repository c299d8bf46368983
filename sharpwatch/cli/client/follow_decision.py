"""Follow a decision until the trainer has answered, and print the outcome."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from queue import SimpleQueue

import grpc

from sharpwatch.cli import output
from sharpwatch.cli.output import print_answer
from sharpwatch.errors import OperatorError
from sharpwatch.v1.operator_pb2 import Decision, WatchDecisionRequest
from sharpwatch.v1.operator_pb2_grpc import OperatorServiceStub

_PENDING = frozenset({"proposed", "approved", "sent"})
_DONE = frozenset({"applied", "recovered", "observed"})


def follow(
    stub: OperatorServiceStub,
    decision: Decision,
    timeout: float | None,
    *,
    as_json: bool,
    requested: Mapping[str, float] | None = None,
) -> None:
    """Wait for the trainer's answer to a decision, and print the outcome.

    Args:
        stub: The operator service.
        decision: The decision as the daemon returned it.
        timeout: Seconds to wait; None not to wait.
        as_json: Whether to print JSON, which is printed also before an error is raised.
        requested: The multipliers on the command line, by block.

    Raises:
        OperatorError: The trainer refused, or did not answer in time.
    """
    if timeout is not None and decision.outcome in _PENDING:
        try:
            decision = _wait(stub, decision, timeout)
        except KeyboardInterrupt:
            raise OperatorError(f"stopped waiting; {_pending_note(decision)}") from None
    failed = decision.outcome not in _DONE and not (timeout is None and decision.outcome in _PENDING)
    if as_json or not failed:
        print_answer(decision, describe_outcome(decision, requested), as_json=as_json)
    if failed:
        raise OperatorError(describe_failure(decision, timeout or 0.0))


def _wait(stub: OperatorServiceStub, decision: Decision, timeout: float) -> Decision:
    """The settled decision, or its state after `timeout` seconds."""
    news: SimpleQueue[Decision | grpc.RpcError | None] = SimpleQueue()
    # In another thread: a Ctrl-C inside gRPC can leave one of its locks held, and then closing the channel, which ends
    # the thread, would never return.
    threading.Thread(target=_listen, args=(stub, decision.id, timeout, news), daemon=True).start()
    newest = decision
    while newest.outcome in _PENDING:
        item = news.get()
        if item is None:
            break
        if isinstance(item, grpc.RpcError):
            if item.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                break
            raise item
        newest = item
    return newest


def _listen(
    stub: OperatorServiceStub, id_: str, timeout: float, news: SimpleQueue[Decision | grpc.RpcError | None]
) -> None:
    """Put every state of the decision into `news`, then the error that ended the stream, or None."""
    try:
        for response in stub.WatchDecision(WatchDecisionRequest(id=id_), timeout=timeout):
            news.put(response.decision)
    except grpc.RpcError as error:
        news.put(error)
    else:
        news.put(None)


def describe_outcome(decision: Decision, requested: Mapping[str, float] | None = None) -> str:
    """A decision's outcome in one line, and below it the trainer's remark if there is one.

    Args:
        decision: The decision.
        requested: The multipliers on the command line, which are named even where they are 1.

    Returns:
        Such as `revision 3 applied at step 412: qk 0.5`.
    """
    subject = f"revision {decision.revision}" if decision.revision else decision.action
    when = f" at step {decision.applied_step}" if decision.HasField("applied_step") else ""
    id_ = "" if decision.HasField("applied_step") else f" (decision {decision.id})"
    line = f"{subject} {decision.outcome}{when}: {describe_change(decision, requested)}{id_}"
    return f"{line}\n{decision.detail}" if decision.detail else line


def describe_change(decision: Decision, requested: Mapping[str, float] | None = None) -> str:
    """What a decision changes: its multipliers, or the checkpoint to go back to."""
    if decision.HasField("rollback"):
        rollback = decision.rollback
        place = f" ({rollback.checkpoint.uri})" if rollback.checkpoint.uri else ""
        skipped = (
            f", skipping steps {rollback.skip_from_step} to {rollback.skip_to_step - 1}"
            if rollback.skip_to_step > rollback.skip_from_step
            else ""
        )
        return f"back to step {rollback.checkpoint.step}{place}{skipped}"
    if decision.multipliers or decision.action in ("set_lr", "scale_lr", "ramp_back"):
        return output.multipliers(decision.multipliers, requested)
    return output.ABSENT


def describe_failure(decision: Decision, timeout: float) -> str:
    """Why a decision was not applied.

    Args:
        decision: The decision.
        timeout: Seconds that were waited.
    """
    if decision.outcome in _PENDING:
        return f"no answer from the trainer of {decision.run} within {timeout:g} s; {_pending_note(decision)}"
    guard = decision.guard if decision.guard not in ("", "ok") else ""
    why = ": ".join(part for part in (guard, decision.detail) if part) or "no reason given"
    return f"decision {decision.id} {decision.outcome}: {why}"


def _pending_note(decision: Decision) -> str:
    return f"decision {decision.id} stays {decision.outcome}: see sharpwatch decisions {decision.run}"
