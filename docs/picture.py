"""Draws docs/demo.svg, the README's picture, from a real run: `python docs/picture.py`."""

from __future__ import annotations

import io
import re
import tempfile
from pathlib import Path

from rich.console import Console

from sharpwatch.demo.play import play, render
from sharpwatch.demo.recipe import Recipe

STEPS = 400


def main() -> None:
    """Play one run and draw what its view showed at the end."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(
            model="gpt2",
            steps=STEPS,
            fault="lr-jump",
            fault_step=STEPS // 2,
            run="demo-gpt2",
            address="",
            folder=folder,
            cache=str(Path(folder) / "cache"),
        )
        outcome = play(recipe, "enforce", Console(quiet=True))
    console = Console(record=True, width=118, file=io.StringIO(), force_terminal=True)
    console.print(render(outcome.detail, outcome.decisions, [loss for _, loss in outcome.losses], STEPS))
    svg = console.export_svg(title="sharpwatch demo")
    # Fonts from a content network are neither needed nor wanted in a README.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    Path(__file__).with_name("demo.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
