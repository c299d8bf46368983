"""One run of the demo: a daemon, a trainer, and a live view of loss, sharpness, alerts and decisions."""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import grpc.aio
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sharpwatch.demo.recipe import Recipe
from sharpwatch.demo.train import command
from sharpwatch.errors import SharpwatchError
from sharpwatch.v1 import operator_pb2 as pb
from sharpwatch.v1.operator_pb2 import Decision, RunDetail
from sharpwatch.v1.operator_pb2_grpc import OperatorServiceStub
from sharpwatch.v1.types_pb2 import Estimate

if TYPE_CHECKING:
    from sharpwatch.v1.operator_pb2_grpc import OperatorServiceAsyncStub


_LINE_EVERY = 25  # steps between two printed lines if there is no terminal
_Metadata = tuple[tuple[str, str], ...]
_CONFIG = """\
daemon:
  grpc: "127.0.0.1:0"
  http: "127.0.0.1:0"
  store: "sqlite:///{folder}/sharpwatch.db"
  token_file: "{folder}/operator.token"
policies:
  - name: hold-the-rate
    match: {{cause: learning-rate}}
    mode: {mode}
    action: {{kind: scale_lr, blocks: all, factor: auto}}
    guard: {{recover_within_steps: 100}}
  - name: rollback-damaged-weights
    match: {{cause: damaged-weight, severity: critical}}
    mode: {mode}
    action: {{kind: rollback, skip_margin: 0}}
"""


@dataclass(frozen=True)
class DemoOutcome:
    """The state of a run at its end, and where its files are."""

    detail: pb.RunDetail
    decisions: list[pb.Decision]  # oldest first
    losses: list[tuple[int, float]]  # (step, loss) in time order
    metrics_url: str
    config: Path


@dataclass(frozen=True)
class DaemonAddresses:
    """Where the daemon listens."""

    grpc: str
    http: str


def play(recipe: Recipe, mode: str, console: Console) -> DemoOutcome:
    """Run a recipe to its end, and show it.

    Args:
        recipe: The run; its address is ignored.
        mode: What the policy may do: observe, advise or enforce.
        console: Where to show it.

    Raises:
        SharpwatchError: The daemon or the trainer failed; the message names its log.
    """
    return asyncio.run(_play(recipe, mode, console))


async def _play(recipe: Recipe, mode: str, console: Console) -> DemoOutcome:
    folder = Path(recipe.folder)
    config = write_config(folder, mode)
    async with _daemon(config, folder) as addresses:
        recipe = replace(recipe, address=addresses.grpc)
        async with grpc.aio.insecure_channel(addresses.grpc) as channel, _trainer(recipe, folder) as trainer:
            operator: OperatorServiceAsyncStub = OperatorServiceStub(channel)
            shown = (("authorization", f"Bearer {_token(folder)}"),)
            viewer = asyncio.create_task(_watch(operator, shown, recipe, console))
            # The trainer first: if it fails before it attaches, the view would wait for a run that never appears.
            status = await trainer.wait()
            if status:
                viewer.cancel()
                raise SharpwatchError(f"the demo's trainer ended with status {status}; see {folder / 'trainer.log'}")
            await viewer
            detail = (await operator.GetRun(pb.GetRunRequest(run=recipe.run), metadata=shown)).detail
            listed = await operator.ListDecisions(pb.ListDecisionsRequest(run=recipe.run), metadata=shown)
    losses = json.loads((folder / "losses.json").read_text(encoding="utf-8"))
    ordered = sorted(listed.decisions, key=lambda decision: decision.made_at_unix_ns)
    return DemoOutcome(detail, ordered, losses, f"http://{addresses.http}/metrics", config)


def _token(folder: Path) -> str:
    """The token that the daemon has made."""
    return (folder / "operator.token").read_text(encoding="ascii").strip()


def write_config(folder: Path, mode: str) -> Path:
    """Write the daemon's configuration into `folder`, and return its path."""
    path = folder / "sharpwatch.yaml"
    path.write_text(_CONFIG.format(folder=folder, mode=mode), encoding="utf-8")
    return path


@asynccontextmanager
async def _daemon(config: Path, folder: Path) -> AsyncIterator[DaemonAddresses]:
    """Run a daemon as a process, stopped at the end."""
    log = folder / "daemon.log"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sharpwatch", "serve", "--config", str(config), stderr=subprocess.PIPE
    )
    assert process.stderr is not None  # noqa: S101 - asked for with PIPE
    with log.open("wb") as file:
        addresses = None
        async for line in process.stderr:
            file.write(line)
            file.flush()
            addresses = _addresses(line)
            if addresses is not None:
                break
        if addresses is None:
            raise SharpwatchError(f"the daemon did not start; see {log}")
        # Read to the end: once the pipe is full, the daemon would block in its next log line.
        pump = asyncio.create_task(_pump(process.stderr, log))
        try:
            yield addresses
        finally:
            # Not killed: on SIGTERM it journals what is queued, and the journal is what the user looks at afterwards.
            process.terminate()
            await process.wait()
            await pump


async def _pump(stream: asyncio.StreamReader, log: Path) -> None:
    with log.open("ab") as file:
        async for line in stream:
            file.write(line)
            file.flush()


def _addresses(line: bytes) -> DaemonAddresses | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    if not isinstance(event, dict) or event.get("event") != "serving":
        return None
    return DaemonAddresses(event["grpc"], event["http"])


@asynccontextmanager
async def _trainer(recipe: Recipe, folder: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run the trainer as a process, killed if the view ends first."""
    with (folder / "trainer.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *command(recipe), stdout=log, stderr=log, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def _watch(operator: OperatorServiceAsyncStub, token: _Metadata, recipe: Recipe, console: Console) -> None:
    """Show the run until it is closed."""
    losses: list[float] = []
    with Live(console=console, auto_refresh=False, transient=True) as live:
        shown = -_LINE_EVERY
        async for detail in _details(operator, token, recipe.run):
            if detail.run.HasField("loss"):
                losses.append(detail.run.loss)
            response = await operator.ListDecisions(pb.ListDecisionsRequest(run=recipe.run), metadata=token)
            decisions = sorted(response.decisions, key=lambda decision: decision.made_at_unix_ns)
            if console.is_terminal:
                live.update(render(detail, decisions, losses, recipe.steps), refresh=True)
            elif detail.run.step >= shown + _LINE_EVERY:
                shown = detail.run.step
                console.print(_line(detail, decisions))
            if detail.run.phase == pb.RUN_PHASE_CLOSED:
                return


async def _details(operator: OperatorServiceAsyncStub, token: _Metadata, run: str) -> AsyncIterator[pb.RunDetail]:
    """Yield the run's state whenever it changes, once the daemon knows the run."""
    while True:
        try:
            request = pb.WatchRunRequest(run=run, min_interval_seconds=0.25)
            async for message in operator.WatchRun(request, metadata=token):
                yield message.detail
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.NOT_FOUND:
                raise
            await asyncio.sleep(0.2)  # the trainer is still tokenising
        else:
            return


def _line(detail: pb.RunDetail, decisions: list[pb.Decision]) -> str:
    blocks = "  ".join(
        f"{block.block} {estimate.value:.1e}±{estimate.stderr:.0e}"
        for block in detail.blocks
        for estimate in block.estimates
        if estimate.quantity == "sharpness"
    )
    last = f"  | {decision_line(decisions[-1])}" if decisions else ""
    return f"step {detail.run.step:4}  loss {detail.run.loss:.3f}  {blocks}{last}"


_BARS = "▁▂▃▄▅▆▇█"
_SCALE = 30  # characters of the sharpness axis


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw `values` as at most `width` bars, each the mean of an equal share of them."""
    finite = [value for value in values if math.isfinite(value)]
    bars = min(width, len(finite))
    means = [fmean(finite[len(finite) * i // bars : len(finite) * (i + 1) // bars]) for i in range(bars)]
    if not means:
        return ""
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low or 1.0)
    return "".join(_BARS[round((value - low) * scale)] for value in means)


def estimate_of(estimates: Sequence[Estimate], quantity: str) -> Estimate | None:
    """The estimate of `quantity`, or None."""
    return next((estimate for estimate in estimates if estimate.quantity == quantity), None)


def error_bar(estimate: Estimate, low: float, high: float) -> Text:
    """Draw a value and two standard errors on a logarithmic axis from `low` to `high`."""
    width = _SCALE / max(math.log(high / low), 1e-9)

    def column(value: float) -> int:
        return max(0, min(_SCALE, round(math.log(max(value, low) / low) * width)))

    spread = 2 * estimate.stderr if math.isfinite(estimate.stderr) else 0.0
    left, mid, right = column(estimate.value - spread), column(estimate.value), column(estimate.value + spread)
    return Text(" " * left + "─" * (mid - left) + "●" + "─" * (right - mid))


def _blocks(detail: RunDetail) -> Table:
    table = Table(expand=True, box=None)
    for heading in ("block", "sharpness", "± s.e.", "", "stability", "update RMS", "LR ×"):
        table.add_column(heading, justify="left" if heading in ("block", "") else "right", no_wrap=True)
    sharpness = {block.block: estimate_of(block.estimates, "sharpness") for block in detail.blocks}
    values = [estimate.value for estimate in sharpness.values() if estimate and estimate.value > 0]
    low, high = (min(values) / 2, max(values) * 2) if values else (1.0, 2.0)
    for block in detail.blocks:
        estimate = sharpness[block.block]
        ratio = estimate_of(block.estimates, "stability_ratio")
        table.add_row(
            block.block,
            f"{estimate.value:.2e}" if estimate else "…",
            f"{estimate.stderr:.0e}" if estimate else "",
            error_bar(estimate, low, high) if estimate and estimate.value > 0 else "",
            f"{ratio.value:.2f}" if ratio else "…",
            f"{block.update_rms:.2f}" if block.HasField("update_rms") else "…",
            f"{block.lr_multiplier:.3g}" if block.HasField("lr_multiplier") else "…",
        )
    return table


def decision_line(decision: Decision) -> str:
    """Describe a decision in one line."""
    cause = decision.alert_name or decision.reason
    where = f" from step {decision.applied_step}" if decision.HasField("applied_step") else ""
    why = f" ({decision.guard})" if decision.outcome == "refused" else ""
    return f"step {decision.step} {cause} → {decision.action} {_change(decision)}{where}: {decision.outcome}{why}"


def _change(decision: Decision) -> str:
    if decision.HasField("rollback"):
        return f"to step {decision.rollback.checkpoint.step}"
    factors = {f"×{value:.3g}" for value in decision.multipliers.values()}
    if len(factors) == 1:
        return factors.pop()
    return ", ".join(f"{block} ×{value:.3g}" for block, value in sorted(decision.multipliers.items()))


def render(detail: RunDetail, decisions: Sequence[Decision], losses: Sequence[float], steps: int) -> RenderableType:
    """Draw the view of one message of `WatchRun`."""
    run = detail.run
    loss = f"{run.loss:.3f}" if run.HasField("loss") else "…"
    head = Text(f"step {run.step}/{steps}   loss {loss}   mode {run.mode}   LR revision {run.lr_revision}")
    trace = Text(sparkline(losses, 90), style="cyan")
    alerts = [
        Text(
            f"{'●' if alert.active else '○'} {alert.name} {','.join(alert.blocks)} "
            f"steps {alert.first_step}-{alert.last_step}: {alert.evidence}",
            style="red" if alert.active else "dim",
        )
        for alert in detail.alerts[-4:]
    ]
    made = [Text(decision_line(decision), style="yellow") for decision in decisions[-4:]]
    return Panel(Group(head, trace, _blocks(detail), *alerts, *made), title=run.run, title_align="left")
