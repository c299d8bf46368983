"""What competes: each with the constants among which one is chosen before any rate is tuned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sharpwatch.daemon.config.settings import AutopilotConfig, CurvatureShareConfig, StabilityCapConfig

APPLIED = "-applied"  # shares of the steps as they were applied, multipliers not undone
PAPER = {"emb": 10.0, "qk": 8.0, "ffn": 6.0, "vo": 4.0}  # arXiv 2502.19002; norm, and a head of its own, 1


@dataclass(frozen=True, slots=True)
class Contender:
    """A rule for the rates of blocks.

    Attributes:
        name: Its name.
        constants: Among which one is chosen; a single one is fixed beforehand.
    """

    name: str
    constants: tuple[str, ...] = ("",)

    def warm_up(self, constant: str) -> float:
        """The share of the steps over which the rate rises to its peak."""
        if self.name == "warm-up":
            return float(constant)
        return 0.0 if self.name in {"cap", "no-warm-up"} else 0.1

    def factors(self, constant: str) -> Mapping[str, float]:
        """By block type the factor on the rate, of rules that never change it; others have 1."""
        if self.name == "emb-head":
            return dict.fromkeys(("emb", "head"), float(constant))
        if self.name in {"emb", "head"}:
            return {self.name: float(constant)}
        if self.name == "fixed":
            return dict.fromkeys(("emb", "qk", "head", "norm"), float(constant))
        return PAPER if self.name == "paper" else {}

    def largest_of_llr(self, constant: str) -> float | None:
        """The largest factor of layerwise learning rates; None for other rules."""
        return float(constant) if self.name == "llr" else None

    def largest_of_layers(self, constant: str) -> float | None:
        """The largest multiplier of curvature shares with each layer by itself; None for other rules."""
        return float(constant) if self.name == "share-layers" else None

    def autopilot(self, constant: str) -> AutopilotConfig | None:
        """The rules of sharpwatch's own; None for others."""
        if self.name == "share":
            return AutopilotConfig(curvature_share=CurvatureShareConfig(max=float(constant.removesuffix(APPLIED))))
        if self.name == "share-cap":
            return AutopilotConfig(
                curvature_share=CurvatureShareConfig(max=8.0), stability_cap=StabilityCapConfig(target=float(constant))
            )
        if self.name == "cap":
            return AutopilotConfig(stability_cap=StabilityCapConfig(target=float(constant)))
        return None


CONTENDERS = {
    each.name: each
    for each in (
        Contender("uniform"),
        Contender("emb-head", ("4", "8", "16", "32")),
        Contender("fixed", ("4",)),
        Contender("paper"),
        Contender("llr", ("3", "5")),
        Contender("share", ("4", "8", "16", f"8{APPLIED}")),
        Contender("share-cap", ("0.1", "0.3")),
        Contender("share-layers", ("4", "8", "16")),
        Contender("cap", ("0.1", "0.3", "0.5")),  # its warm-up is found
        Contender("no-warm-up"),
        Contender("warm-up", ("0.02", "0.05", "0.2", "0.4")),  # uniform with a tuned one
        Contender("emb", ("8", "32")),
        Contender("head", ("8", "32")),
    )
}
