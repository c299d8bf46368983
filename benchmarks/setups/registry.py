"""The list of setups, by name; a setup's module is imported only where its packages are installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.setups.trial import Trial


@dataclass(frozen=True)
class Setup:
    """One setup.

    Attributes:
        name: Its name, which is also its function's, with underscores.
        module: Of this folder, with the function.
        needs: The packages that it is built from, by the names they are imported by.
        optional: Those of them that `pip install -e .[dev]` does not bring.
    """

    name: str
    module: str
    needs: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[str, ...]:
        """The packages that are not installed."""
        return tuple(each for each in (*self.needs, *self.optional) if importlib.util.find_spec(each) is None)

    @property
    def train(self) -> Callable[[Trial], None]:
        """Trains it once."""
        module = importlib.import_module(f"benchmarks.setups.{self.module}")
        return getattr(module, self.name.replace("-", "_"))


SETUPS = {
    setup.name: setup
    for setup in (
        Setup("run-clm", "trainers", ("accelerate", "peft")),
        Setup("run-clm-no-trainer", "accelerated", ("accelerate",)),
        Setup("trl-sft", "trl_trainers", ("trl", "datasets")),
        Setup("trl-dpo", "trl_trainers", ("trl", "datasets")),
        Setup("peft-lora", "trainers", ("peft",)),
        Setup("litgpt", "litgpt_loop", optional=("litgpt",)),
        Setup("timm-vit", "timm_vit", optional=("timm", "torchvision")),
        Setup("mingpt", "mingpt"),
        Setup("nanochat", "nanochat"),
        Setup("dit", "dit"),
        Setup("sentence-transformers", "sentence", ("sentence_transformers", "datasets")),
        Setup("x-transformers", "x_transformers_loop", ("x_transformers",)),
        Setup("mixtral", "mixtures"),
        Setup("jamba", "mixtures"),
        Setup("accelerate", "accelerated", ("accelerate",)),
        Setup("dcgan", "dcgan"),
        Setup("two-watches", "two_watches"),
    )
}
