"""`sharpwatch lr plan`, `promote`, `pause` and `abort`: a set of multipliers that is rolled out in stages."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from sharpwatch.cli import output
from sharpwatch.cli.client import author, operator, run_argument
from sharpwatch.cli.commands.decisions import answered, describe_outcome, failure_of
from sharpwatch.cli.dry_run import dry_run_option, preview
from sharpwatch.cli.options import (
    COUNT,
    MULTIPLIERS,
    STAGES,
    DaemonCommand,
    DaemonOptions,
    gather_lists,
    reason_option,
    wait_options,
)
from sharpwatch.cli.output import Grid, print_answer, to_dict
from sharpwatch.common.yaml_schema import read_yaml
from sharpwatch.v1.operator_pb2 import (
    AbortPlanRequest,
    Decision,
    GetRunRequest,
    PausePlanRequest,
    Plan,
    PlanStage,
    PromotePlanRequest,
    StartPlanRequest,
)
from sharpwatch.v1.operator_pb2_grpc import OperatorServiceStub

_RAMP = 50  # steps
_OWN = "own"  # the name of a set on the command line
_YAML = (".yaml", ".yml")


@click.command(
    cls=DaemonCommand,
    example="sharpwatch lr plan gpt2-a1 paper --dry-run\n"
    "sharpwatch lr plan gpt2-a1 --set emb=4,head=4 --stages head,emb --reason 'as in the small run'",
)
@run_argument(whole=True)
@click.argument(
    "name",
    metavar="[PLAN]",
    required=False,
    help="paper, measured, curvature-share, or a YAML file of your own with a multiplier for each block: emb: 4",
)
@click.option(
    "--set",
    "multipliers",
    metavar="BLOCK=FACTOR,...",
    type=MULTIPLIERS,
    multiple=True,
    callback=gather_lists,
    help="In place of PLAN: the multipliers themselves. Blocks that are not named keep theirs.",
)
@click.option(
    "--stages",
    metavar="BLOCKS,...",
    type=STAGES,
    default=(),
    help="The stages, such as vo,ffn+qk,emb: each block of the plan once. Default: one block a stage, the least raise "
    "first.",
)
@click.option(
    "--ramp-steps",
    metavar="STEPS",
    type=COUNT,
    default=_RAMP,
    help=f"Over how many steps each stage moves; 0 is at once. Default: {_RAMP}.",
)
@click.option("--auto", is_flag=True, help="Go on by itself after a stage that went well. Default: wait for promote.")
@reason_option()
@wait_options
@dry_run_option
@click.pass_obj
def plan(  # noqa: PLR0913 - click passes every option by name
    options: DaemonOptions,
    run: str,
    name: str | None,
    *,
    multipliers: Mapping[str, float],
    stages: Sequence[Sequence[str]],
    ramp_steps: int,
    auto: bool,
    reason: str,
    timeout: float | None,
    dry_run: bool,
) -> None:
    """Roll a set of multipliers out in stages, each judged by the run's loss, and wait for the first to be applied.

    A stage that harms is undone at once, and ends the plan. After one that went well the plan waits for `lr promote`.
    Where the first stage itself has to wait, as for a command that is under way, it says so and ends with status 0.
    """
    if bool(name) == bool(multipliers):
        raise click.UsageError(
            "give PLAN or --set: paper, measured, curvature-share, a YAML file, or --set emb=4,head=4"
        )
    if name and name.endswith(_YAML):
        name, multipliers = Path(name).stem, _from_file(Path(name))
    request = StartPlanRequest(
        run=run,
        name=name or _OWN,
        multipliers=multipliers,
        stages=[PlanStage(blocks=stage) for stage in stages],
        ramp_steps=ramp_steps,
        automatic=auto,
        author=author(os.environ),
        reason=reason,
        dry_run=dry_run,
    )
    with operator(options) as stub:
        response = stub.StartPlan(request)
        if dry_run:
            waits = not response.HasField("decision")
            draft = {"dry_run": True, "plan": to_dict(response.plan), "waits": waits}
            print_answer(draft, [plan_table(response.plan, title="dry run, not sent: ")], as_json=options.json)
            if waits and not options.json:
                print(f"nothing would be sent yet: {_what_waits(response.plan)}")
            return
        sent = response.decision if response.HasField("decision") else None
        _report(options, stub, response.plan, sent, timeout)


def _from_file(path: Path) -> dict[str, float]:
    """The multipliers in a YAML file; raises `ConfigError`."""
    document = read_yaml(path)
    if not isinstance(document.data, dict) or not document.data:
        raise document.error((), "must give each block its multiplier, such as emb: 4")
    for block, value in document.data.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and 0 < value < float("inf")):
            raise document.error((block,), f"must be a number above 0, got {value!r}")
    return {str(block): float(value) for block, value in document.data.items()}


@click.command(cls=DaemonCommand, example="sharpwatch lr promote gpt2-a1 --reason 'evaluation is fine'")
@run_argument(whole=True)
@reason_option()
@wait_options
@dry_run_option
@click.pass_obj
def promote(options: DaemonOptions, run: str, *, reason: str, timeout: float | None, dry_run: bool) -> None:
    """Have a plan go on that waits or is paused, and wait until the trainer has applied its next stage."""
    request = PromotePlanRequest(run=run, author=author(os.environ), reason=reason)
    if dry_run:
        preview(options, [request])
        return
    with operator(options) as stub:
        response = stub.PromotePlan(request)
        _report(options, stub, response.plan, response.decision if response.HasField("decision") else None, timeout)


@click.command(cls=DaemonCommand, example="sharpwatch lr pause gpt2-a1 --reason 'over the weekend'")
@run_argument(whole=True)
@reason_option()
@dry_run_option
@click.pass_obj
def pause(options: DaemonOptions, run: str, *, reason: str, dry_run: bool) -> None:
    """Have no further stage of a plan sent until it is promoted; what is in force stays."""
    request = PausePlanRequest(run=run, author=author(os.environ), reason=reason)
    if dry_run:
        preview(options, [request])
        return
    with operator(options) as stub:
        _report(options, stub, stub.PausePlan(request).plan, None, None)


@click.command(cls=DaemonCommand, example="sharpwatch lr abort gpt2-a1 --reason 'no gain'")
@run_argument(whole=True)
@reason_option()
@wait_options
@dry_run_option
@click.pass_obj
def abort(options: DaemonOptions, run: str, *, reason: str, timeout: float | None, dry_run: bool) -> None:
    """End a plan, and wait until the trainer is back at the multipliers from before it."""
    request = AbortPlanRequest(run=run, author=author(os.environ), reason=reason)
    if dry_run:
        preview(options, [request])
        return
    with operator(options) as stub:
        response = stub.AbortPlan(request)
        _report(options, stub, response.plan, response.decision if response.HasField("decision") else None, timeout)


def _report(
    options: DaemonOptions, stub: OperatorServiceStub, plan: Plan, sent: Decision | None, timeout: float | None
) -> None:
    """Wait for the trainer's answer to what was sent, if anything was, and print the plan and the answer.

    Raises:
        OperatorError: The trainer refused, or did not answer in time.
    """
    failed = None
    if sent is not None:
        sent = answered(stub, sent, timeout)
        failed = failure_of(sent, timeout)
        plan = stub.GetRun(GetRunRequest(run=plan.run)).detail.plan
    waits = plan.state == "running" and not plan.under_way
    payload = {"plan": to_dict(plan), "decision": None if sent is None else to_dict(sent), "waits": waits}
    if options.json or failed is None:
        print_answer(payload, [plan_table(plan)], as_json=options.json)
    if failed is not None:
        raise failed
    if sent is not None and not options.json:
        print(describe_outcome(sent))
    if waits and not options.json:
        print(f"nothing was sent yet: {_what_waits(plan)}; see sharpwatch lr show {plan.run}")


def _what_waits(plan: Plan) -> str:
    """Which stage of a plan waits, and for what."""
    blocks = ", ".join(plan.stages[plan.stages_done].blocks)
    return (
        f"stage {plan.stages_done + 1} ({blocks}) waits until no policy's change of rates is in force or judged, and "
        "no command is under way; it follows by itself"
    )


def plan_table(plan: Plan, title: str = "") -> Grid:
    """A row for each stage of a plan, below a line that says where it stands."""
    detail = f": {plan.detail}" if plan.detail else ""
    by = f", by {plan.changed_by}" if plan.changed_by else ""
    why = f" ({plan.changed_reason})" if plan.changed_reason else ""
    return Grid(
        "rlll",
        tuple(
            (str(index + 1), ", ".join(stage.blocks), _moves(plan, stage.blocks), _stage_state(plan, index))
            for index, stage in enumerate(plan.stages)
        ),
        ("stage", "blocks", "multipliers", "state"),
        title=output.clean(f"{title}plan {plan.name} of run {plan.run}, {plan.state}{detail}{by}{why}"),
    )


def _moves(plan: Plan, blocks: Sequence[str]) -> str:
    return ", ".join(f"{block} {plan.before[block]:.4g} to {plan.multipliers[block]:.4g}" for block in blocks)


def _stage_state(plan: Plan, index: int) -> str:
    if index < plan.stages_done:
        return "over"
    if index == plan.stages_done and plan.under_way:
        return "under way"
    return "to come" if plan.state in ("running", "waiting", "paused") else "not done"
