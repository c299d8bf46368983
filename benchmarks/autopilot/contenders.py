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

    def factors(self, constant: str) -> Mapping[str, float]:
        """By block type the factor on the rate, of rules that never change it; others have 1."""
        if self.name == "emb-head":
            return dict.fromkeys(("emb", "head"), float(constant))
        if self.name == "fixed":
            return dict.fromkeys(("emb", "qk", "head", "norm"), float(constant))
        return PAPER if self.name == "paper" else {}

    def largest_of_llr(self, constant: str) -> float | None:
        """The largest factor of layerwise learning rates; None for other rules."""
        return float(constant) if self.name == "llr" else None

    def autopilot(self, constant: str) -> AutopilotConfig | None:
        """The rules of sharpwatch's own; None for others."""
        if self.name == "share":
            return AutopilotConfig(curvature_share=CurvatureShareConfig(max=float(constant.removesuffix(APPLIED))))
        if self.name == "share-cap":
            return AutopilotConfig(
                curvature_share=CurvatureShareConfig(max=8.0), stability_cap=StabilityCapConfig(target=float(constant))
            )
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
    )
}
