"""`sharpwatch demo`: train, watch, break, recover, and sum up."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from rich.console import Console

from sharpwatch.demo.play import DemoOutcome, decision_line, estimate_of, play, render
from sharpwatch.demo.recipe import BAD_BATCHES, CORRUPT_WEIGHT, LR_JUMP, MODELS, DemoOptions, Recipe
from sharpwatch.v1 import operator_pb2 as pb

_FAULT_AT = 0.5  # of the run: late enough for baselines, early enough to see the end of it
_LOSS_WINDOW = 20  # steps that the losses "before" and "at the end" are the means of
_FAULTS = {
    "none": "nothing is broken",
    "lr-jump": f"the schedule multiplies the learning rate by {LR_JUMP:g}, to the end of the run",
    "weight-corruption": f"one feed-forward weight becomes {CORRUPT_WEIGHT:g}",
    "bad-batches": f"{BAD_BATCHES} batches of noise",
}


def run(options: DemoOptions) -> int:
    """Play a run for each model, and return the exit status."""
    console = Console(quiet=options.json is not None)
    models: Sequence[str] = (options.model,) if options.model else MODELS
    results: list[dict[str, Any]] = []
    for model in models:
        recipe = _recipe(options, model)
        console.print(f"[bold]{model}[/]: {options.steps} steps, {_fault_sentence(recipe)}, policy mode {options.mode}")
        outcome = play(recipe, options.mode, console)
        results.append(summarise(recipe, outcome))
        _sum_up(console, recipe, outcome, results[-1])
    if options.json is not None:
        options.json.write_text(json.dumps(results[0] if options.model else results, indent=2) + "\n", encoding="utf-8")
    return 0


def _recipe(options: DemoOptions, model: str) -> Recipe:
    root = options.folder.resolve()
    name = f"demo-{model}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    folder = root / name
    folder.mkdir(parents=True)
    return Recipe(
        model=model,
        steps=options.steps,
        fault=options.fault,
        fault_step=int(options.steps * _FAULT_AT),
        run=name,
        address="",
        folder=str(folder),
        cache=str(root / "cache"),
        seed=options.seed,
    )


def _fault_sentence(recipe: Recipe) -> str:
    at = "" if recipe.fault == "none" else f"at step {recipe.fault_step} "
    return at + _FAULTS[recipe.fault]


def _sum_up(console: Console, recipe: Recipe, outcome: DemoOutcome, result: dict[str, Any]) -> None:
    loss = result["loss"]
    if console.is_terminal:
        losses = [loss for _, loss in outcome.losses]
        console.print(render(outcome.detail, outcome.decisions, losses, recipe.steps))
    else:
        console.print(f"\n{recipe.run}")
    if recipe.fault != "none":
        console.print(f"  fault         {_fault_sentence(recipe)}")
        console.print(
            f"  loss          {loss['before_fault']:.3f} before, {loss['peak']:.3f} at its worst, "
            f"{loss['end']:.3f} at the end"
        )
    else:
        console.print(f"  loss          {loss['end']:.3f} at the end")
    for alert in result["alerts"]:
        console.print(f"  alert         {alert['name']} at step {alert['step']}: {', '.join(alert['blocks'])}")
    for decision in outcome.decisions:
        console.print(f"  decision      {decision_line(decision)}")
    for block, values in result["blocks"].items():
        if values["sharpness"] is not None:
            console.print(f"  sharpness     {block:6} {values['sharpness']:.3g} ± {values['stderr']:.1g}")
    console.print(f"  overhead      {100 * result['overhead_ratio']:.1f} % of the training time")
    console.print(f"  while it ran  {outcome.metrics_url}")
    console.print("  look again    its journal, open, and what an operator sees of it:")
    console.print(f"    sharpwatch serve --config {outcome.config} --grpc 127.0.0.1:7741", soft_wrap=True)
    console.print(f"    sharpwatch show {recipe.run}; sharpwatch decisions {recipe.run}", soft_wrap=True)
    console.print("  in Grafana    grafana/ has the dashboard, deploy/ the scrape configuration and alert rules\n")


def summarise(recipe: Recipe, outcome: DemoOutcome) -> dict[str, Any]:
    """The result of a run, as `--json` writes it."""
    detail = outcome.detail
    return {
        "run": recipe.run,
        "model": recipe.model,
        "steps": recipe.steps,
        "fault": {"kind": recipe.fault, "step": recipe.fault_step},
        "blocks": {block.block: _block(block) for block in detail.blocks},
        "alerts": [
            {
                "name": alert.name,
                "step": alert.first_step,
                "last_step": alert.last_step,
                "blocks": list(alert.blocks),
                "severity": alert.severity,
                "evidence": alert.evidence,
            }
            for alert in sorted(detail.alerts, key=lambda alert: alert.first_step)
        ],
        "decisions": [_decision(decision) for decision in outcome.decisions],
        "loss": _loss(recipe, outcome.losses),
        "overhead_ratio": detail.overhead_ratio,
        "metrics_url": outcome.metrics_url,
        "dropped": sum(detail.dropped.values()),
    }


def _block(block: pb.Block) -> dict[str, Any]:
    sharpness = estimate_of(block.estimates, "sharpness")
    trace = estimate_of(block.estimates, "trace")
    top = estimate_of(block.estimates, "top_eigenvalue")
    return {
        "sharpness": sharpness.value if sharpness else None,
        "stderr": sharpness.stderr if sharpness else None,
        "trace": trace.value if trace else None,
        "top_eigenvalue": top.value if top else None,
        "parameters": block.parameters,
    }


def _decision(decision: pb.Decision) -> dict[str, Any]:
    return {
        "action": decision.action,
        "mode": decision.mode,
        "outcome": decision.outcome,
        "applied_step": decision.applied_step if decision.HasField("applied_step") else None,
        "step": decision.step,
        "alert": decision.alert_name,
        "multipliers": dict(decision.multipliers),
        "guard": decision.guard,
        "detail": decision.detail,
    }


def _loss(recipe: Recipe, losses: list[tuple[int, float]]) -> dict[str, float | None]:
    before = [loss for step, loss in losses if recipe.fault_step - _LOSS_WINDOW < step <= recipe.fault_step]
    after = [loss for step, loss in losses if step > recipe.fault_step]
    return {
        "before_fault": fmean(before) if before else None,
        "peak": max(after) if after else None,
        "end": fmean([loss for _, loss in losses[-_LOSS_WINDOW:]]),
    }
