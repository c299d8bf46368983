"""Following a decision until the trainer has answered."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import grpc

from sharpwatch.cli import figures
from sharpwatch.cli.output import show
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
        decision = _follow(stub, decision, args.timeout)
    failed = decision.outcome not in _DONE and not (args.no_wait and decision.outcome in _ON_ITS_WAY)
    if args.json or not failed:
        show(args, decision, said(decision, named))
    if failed:
        raise OperatorError(refusal(decision, args.timeout))
    return 0


def _follow(stub: OperatorServiceStub, decision: Decision, timeout: float) -> Decision:
    call = stub.WatchDecision(WatchDecisionRequest(id=decision.id), timeout=timeout)
    newest = decision
    try:
        for response in call:
            newest = response.decision
            if newest.outcome not in _ON_ITS_WAY:
                break
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            raise
    except KeyboardInterrupt:
        raise OperatorError(f"stopped waiting; {_still(newest)}") from None
    finally:
        call.cancel()  # type: ignore[no-untyped-call] # the stubs leave it untyped
    return newest


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
        return figures.multipliers(decision.multipliers, named)
    return figures.ABSENT


def refusal(decision: Decision, timeout: float) -> str:
    """Why a decision did not come into force."""
    if decision.outcome in _ON_ITS_WAY:
        return f"no answer from the trainer of {decision.run} within {timeout:g} s; {_still(decision)}"
    guard = decision.guard if decision.guard not in ("", "ok") else ""
    why = ": ".join(part for part in (guard, decision.detail) if part) or "no reason given"
    return f"decision {decision.id} {decision.outcome}: {why}"


def _still(decision: Decision) -> str:
    return f"decision {decision.id} stays {decision.outcome}: see sharpwatch decisions {decision.run}"
