"""The report of `measure`: estimates by block type, by layer block and of the whole model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sharpwatch.curvature.statistics.estimate import Cost, Estimate, Spectrum


@dataclass(frozen=True, slots=True)
class BlockReport:
    """The estimates of one set of parameters.

    Eigenvalues are of the Hessian: the algebraically largest and smallest one. Quantities that were not requested are
    None or missing.

    Attributes:
        parameters: Number of parameters.
        estimates: Traces by estimator.
        top_eigenvalue: Largest eigenvalue.
        bottom_eigenvalue: Smallest eigenvalue.
        spectrum: Spectral density.
        stability: Stability ratios of the optimizer's next step by kind: `direction`, `linesearch`, `preconditioned`. 1
            is the edge of stability.
    """

    parameters: int
    estimates: Mapping[str, Estimate] = field(default_factory=dict)
    top_eigenvalue: Estimate | None = None
    bottom_eigenvalue: Estimate | None = None
    spectrum: Spectrum | None = None
    stability: Mapping[str, Estimate] = field(default_factory=dict)

    @property
    def trace(self) -> Estimate | None:
        """The trace of H from `hutchinson`, or of G if only `gnb` was requested."""
        return self.estimates.get("hutchinson", self.estimates.get("gnb"))

    @property
    def sharpness(self) -> Estimate | None:
        """Average sharpness: the trace divided by the number of parameters (Wang et al. 2025, arXiv 2502.19002)."""
        return None if self.trace is None else per_parameter(self.trace, self.parameters)


@dataclass(frozen=True, slots=True)
class SharpnessReport:
    """The result of `measure`; `str(report)` is a table.

    Attributes:
        blocks: Reports by block type.
        layers: Reports by layer block, such as "layers.3.qk"; traces only.
        whole: Report of all parameters together.
        loss: Mean loss over the batches; NaN if only `gnb` was requested.
        tokens: Number of predicting positions.
        batches: Number of batches.
        seed: Seed of the draws.
        cost: Passes over all batches.
        unreached: For each block whose requested precision was not reached, the reason.
    """

    blocks: Mapping[str, BlockReport]
    layers: Mapping[str, BlockReport]
    whole: BlockReport
    loss: float
    tokens: int
    batches: int
    seed: int
    cost: Cost
    unreached: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values for `json.dumps`.

        Returns:
            Nested dicts. A number that is not finite becomes None.
        """
        return {
            "blocks": {name: _block(block) for name, block in self.blocks.items()},
            "layers": {name: _block(block) for name, block in self.layers.items()},
            "whole": _block(self.whole),
            "loss": _finite(self.loss),
            "tokens": self.tokens,
            "batches": self.batches,
            "seed": self.seed,
            "cost": asdict(self.cost),
            "unreached": dict(self.unreached),
        }

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("block", "parameters", "trace", "sharpness", "λ_max", "λ_min")]
        rows += [_row(name, block) for name, block in [*self.blocks.items(), ("whole", self.whole)]]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
        passes = f"{self.cost.forwards:g} forwards, {self.cost.backwards:g} backwards"
        lines.append(f"loss {self.loss:.4f} over {self.tokens:,} tokens; {passes}; ± one standard error, [residual]")
        lines += [f"{block}: {why}" for block, why in self.unreached.items()]
        return "\n".join(lines)


def per_parameter(trace: Estimate, parameters: int) -> Estimate:
    """`trace` divided by the number of parameters."""
    return Estimate(
        trace.value / parameters,
        trace.stderr / parameters,
        trace.draws,
        trace.estimator,
        trace.step,
        trace.residual / parameters,
        trace.method,
        trace.cost,
    )


def _block(block: BlockReport) -> dict[str, Any]:
    single = ("trace", "sharpness", "top_eigenvalue", "bottom_eigenvalue")
    values: dict[str, Any] = {"parameters": block.parameters}
    values |= {name: _estimate(getattr(block, name)) for name in single if getattr(block, name) is not None}
    for name, several in (("estimates", block.estimates), ("stability", block.stability)):
        if several:
            values[name] = {each: _estimate(estimate) for each, estimate in several.items()}
    if block.spectrum is not None:
        values["spectrum"] = asdict(block.spectrum)
    return values


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {name: _finite(value) for name, value in asdict(estimate).items() if name != "step"}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _row(name: str, block: BlockReport) -> tuple[str, ...]:
    cells = (block.trace, block.sharpness, block.top_eigenvalue, block.bottom_eigenvalue)
    return name, f"{block.parameters:,}", *map(_cell, cells)


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    stderr = f" ± {estimate.stderr:.2g}" if math.isfinite(estimate.stderr) else ""
    residual = f" [{estimate.residual:.1g}]" if math.isfinite(estimate.residual) else ""
    return f"{estimate.value:.4g}{stderr}{residual}"
