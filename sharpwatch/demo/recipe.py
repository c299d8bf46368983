"""The recipe of a demo run: its options and faults. Free of torch, so that the command line loads fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Fault = Literal["none", "lr-jump", "weight-corruption", "bad-batches"]
FAULTS: tuple[Fault, ...] = get_args(Fault)
MODELS = ("gpt2", "llama")
MODES = ("observe", "advise", "enforce")

# The loss recovers from a factor of 10 by itself within 100 steps, so it would prove nothing. After a factor of 30
# neither model gets back to where it was (docs/log.md). The rate stays up to the end of the run, as with a wrong
# schedule.
LR_JUMP = 30.0
CORRUPT_WEIGHT = 300.0  # the size of a weight of 0.02 after a flipped exponent bit
BAD_BATCHES = 3


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """The options of `sharpwatch demo`; `model` None trains all models, `json` None shows a live view."""

    model: str | None
    steps: int
    fault: Fault
    mode: str
    json: Path | None
    folder: Path
    seed: int


@dataclass(frozen=True)
class Recipe:
    """One run of the demo.

    Attributes:
        folder: Where checkpoints and losses go.
        cache: Where the tokenised text is kept.
    """

    model: str
    steps: int
    fault: Fault
    fault_step: int
    run: str
    address: str
    folder: str
    cache: str
    seed: int = 0
