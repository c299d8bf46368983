"""`sharpwatch demo`: train, watch, break, recover, and sum up."""

from __future__ import annotations

import argparse
import json
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sharpwatch.demo.faults import BAD_BATCHES, CORRUPT_WEIGHT, FAULTS, LR_JUMP
from sharpwatch.demo.play import Outcome, play
from sharpwatch.demo.result import summarise
from sharpwatch.demo.train import Recipe
from sharpwatch.demo.view import decision_line, render

MODELS = ("gpt2", "llama")
_FAULT_AT = 0.5  # of the run: late enough for baselines, early enough to see the end of it
_WHAT = {
    "none": "nothing is broken",
    "lr-jump": f"the schedule multiplies the learning rate by {LR_JUMP:g}, to the end of the run",
    "weight-corruption": f"one feed-forward weight becomes {CORRUPT_WEIGHT:g}",
    "bad-batches": f"{BAD_BATCHES} batches of noise",
}


def _steps(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a number of steps; 1 or more is allowed")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sharpwatch demo`."""
    parser.add_argument("--model", choices=MODELS, help="train only this one (default: one after the other)")
    parser.add_argument("--steps", type=_steps, default=400, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--fault", choices=FAULTS, default="lr-jump", help="what goes wrong (default: %(default)s)")
    parser.add_argument(
        "--mode",
        choices=("observe", "advise", "enforce"),
        default="enforce",
        help="what the policy may do (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result; no live view")
    parser.add_argument(
        "--folder", type=Path, default=Path(".demo"), help="where runs and the tokenised text go (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and fault (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Play the asked-for runs; returns the exit status."""
    console = Console(quiet=args.json is not None)
    models: Sequence[str] = (args.model,) if args.model else MODELS
    results: list[dict[str, Any]] = []
    for model in models:
        recipe = _recipe(args, model)
        console.print(f"[bold]{model}[/]: {args.steps} steps, {_fault_sentence(recipe)}, policy mode {args.mode}")
        outcome = play(recipe, args.mode, console)
        results.append(summarise(recipe, outcome))
        _sum_up(console, recipe, outcome, results[-1])
    if args.json is not None:
        args.json.write_text(json.dumps(results[0] if args.model else results, indent=2) + "\n", encoding="utf-8")
    return 0


def _recipe(args: argparse.Namespace, model: str) -> Recipe:
    root = args.folder.resolve()
    name = f"demo-{model}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    folder = root / name
    folder.mkdir(parents=True)
    return Recipe(
        model=model,
        steps=args.steps,
        fault=args.fault,
        fault_step=int(args.steps * _FAULT_AT),
        run=name,
        address="",
        folder=str(folder),
        cache=str(root / "cache"),
        seed=args.seed,
    )


def _fault_sentence(recipe: Recipe) -> str:
    at = "" if recipe.fault == "none" else f"at step {recipe.fault_step} "
    return at + _WHAT[recipe.fault]


def _sum_up(console: Console, recipe: Recipe, outcome: Outcome, result: dict[str, Any]) -> None:
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
