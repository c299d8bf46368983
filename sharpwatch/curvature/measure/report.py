"""The report of `measure`, and the draws it is made of.

`Draws` holds plain numbers, which can be saved, loaded and added to; `SharpnessReport` and `BlockReport` are the
estimates by block type, by layer block and of the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.measure.embedding_rows import EmbeddingRows, Frequencies
from sharpwatch.curvature.statistics.estimate import Cost, Estimate, Spectrum, per_parameter
from sharpwatch.curvature.statistics.pooling import PooledEstimate, pool_draws, weighted_mean_stderr

# [draws][batches][layer blocks], or [draws][batches][1] for the sum over layers, or [draws][batches][row groups]
DrawValues = list[list[list[float]]]
WHOLE_MODEL = ""  # the name of all blocks together


@dataclass(frozen=True, slots=True)
class BlockReport:
    """The estimates of one set of parameters.

    Eigenvalues are of the Hessian: the algebraically largest and smallest one. Quantities that were not requested are
    None or missing.

    Attributes:
        parameters: Number of trained parameters.
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
        """Average sharpness: the trace over the number of trained parameters (Wang et al. 2025, arXiv 2502.19002)."""
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
        objective: The loss whose Gauss-Newton matrix `gnb` measures, and whether it was verified against the loss
            itself. Without `gnb` it only weighs the batches, and is empty for a single one.
        embedding_rows: The token embedding by deciles of token frequency; None if `gnb` or the block `emb` was not
            requested.
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
    objective: str = ""
    embedding_rows: EmbeddingRows | None = None

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
            "objective": self.objective,
            "embedding_rows": None if self.embedding_rows is None else _embedding_rows(self.embedding_rows),
        }

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("block", "parameters", "trace", "sharpness", "λ_max", "λ_min")]
        rows += [_row(name, block) for name, block in [*self.blocks.items(), ("whole", self.whole)]]
        lines = _aligned(rows)
        if self.embedding_rows is not None:
            lines += _embedding_lines(self.embedding_rows)
        passes = f"{self.cost.forwards:g} forwards, {self.cost.backwards:g} backwards"
        objective = f"; objective: {self.objective}" if self.objective else ""
        lines.append(
            f"loss {self.loss:.4f} over {self.tokens:,} tokens; {passes}; ± one standard error, [residual]{objective}"
        )
        lines += [f"{block}: {why}" for block, why in self.unreached.items()]
        return "\n".join(lines)


def _embedding_rows(found: EmbeddingRows) -> dict[str, Any]:
    groups = {
        name: {field: getattr(group, field) for field in ("tokens", "parameters", "min_count", "max_count", "share")}
        | {"trace": _estimate(group.trace), "sharpness": _estimate(group.sharpness)}
        for name, group in found.groups.items()
    }
    return {
        "parameter": found.parameter,
        "groups": groups,
        "tied": list(found.tied),
        "others": list(found.others),
        "reason": found.reason,
    }


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
    # JSON has no NaN and no infinity.
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]


def _embedding_lines(found: EmbeddingRows) -> list[str]:
    rows: list[tuple[str, ...]] = [("tokens by frequency", "tokens", "share", "trace", "sharpness")]
    rows += [
        (name, f"{group.tokens:,}", f"{group.share:.2%}", _cell(group.trace), _cell(group.sharpness))
        for name, group in found.groups.items()
    ]
    return [*(_aligned(rows) if found.groups else ()), *(f"embedding rows: {note}" for note in found.notes)]


def _row(name: str, block: BlockReport) -> tuple[str, ...]:
    cells = (block.trace, block.sharpness, block.top_eigenvalue, block.bottom_eigenvalue)
    return name, f"{block.parameters:,}", *map(_cell, cells)


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    stderr = f" ± {estimate.stderr:.2g}" if math.isfinite(estimate.stderr) else ""
    residual = f" [{estimate.residual:.1g}]" if math.isfinite(estimate.residual) else ""
    return f"{estimate.value:.4g}{stderr}{residual}"


@dataclass(frozen=True, slots=True)
class SpectrumEnds:
    """The extreme eigenvalues of one block.

    Attributes:
        top: Largest Ritz value.
        top_residual: Its residual.
        bottom: Smallest Ritz value.
        bottom_residual: Its residual.
        tops: Rayleigh quotient of the top Ritz vector on each batch.
        bottoms: Rayleigh quotient of the bottom Ritz vector on each batch.
        method: How the products were computed.
    """

    top: float
    top_residual: float
    bottom: float
    bottom_residual: float
    tops: list[float]
    bottoms: list[float]
    method: str


@dataclass(slots=True)
class Draws:
    """All draws so far, by estimator and block.

    The names of the fields are the keys of the saved state.

    Attributes:
        shares: Weight of each batch.
        losses: Loss of each batch.
        gnb: Draws of Tr G.
        gnb_rows: The same draws by groups of the embedding's rows; empty if there are none.
        hutchinson: Draws of Tr H by block.
        common: Standard error that all `hutchinson` draws of a block share.
        steps: ε of the loss differences by block; 0 if products are used.
        ends: Extreme eigenvalues by block.
        spectra: Atoms and weights of each spectral draw by block.
        stability: Stability ratios by block, then by kind.
        costs: Cost by estimator, or by "estimator/block".
        products_by: How products are computed.
        objective: The loss, in words.
    """

    shares: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gnb: DrawValues = field(default_factory=list)
    gnb_rows: DrawValues = field(default_factory=list)
    hutchinson: dict[str, DrawValues] = field(default_factory=dict)
    common: dict[str, float] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)
    ends: dict[str, SpectrumEnds] = field(default_factory=dict)
    spectra: dict[str, list[tuple[list[float], list[float]]]] = field(default_factory=dict)
    stability: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    products_by: str = ""
    objective: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The draws as plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Draws:
        """Load what `to_dict` returned."""
        plain = dict(values)
        ends = {name: SpectrumEnds(**each) for name, each in plain.pop("ends").items()}
        costs = {name: Cost(**each) for name, each in plain.pop("costs").items()}
        stability = {
            block: {kind: Estimate(**{**one, "cost": Cost(**one["cost"])}) for kind, one in kinds.items()}
            for block, kinds in plain.pop("stability").items()
        }
        return cls(**plain, ends=ends, costs=costs, stability=stability)

    def add_cost(self, name: str, cost: Cost) -> None:
        """Add `cost` to the cost of `name`."""
        self.costs[name] = self.costs.get(name, Cost()) + cost

    @property
    def cost(self) -> Cost:
        """Total cost."""
        return sum(self.costs.values(), Cost())

    def gnb_trace(self, layers: Sequence[int]) -> PooledEstimate:
        """Tr G, summed over the layer blocks with these indices."""
        return self._sum_columns(self.gnb, layers)

    def hutchinson_trace(self, block: str) -> PooledEstimate:
        """Tr H of a block type."""
        totals = [[math.fsum(row) for row in draw] for draw in self.hutchinson[block]]
        return pool_draws(totals, self.shares, self.common.get(block, 0.0))

    def block(self, block_map: BlockMap, name: str) -> BlockReport:
        """Summarize the draws of a block type."""
        layers = [i for i, each in enumerate(block_map.layer_blocks) if each.type == name]
        estimates: dict[str, Estimate] = {}
        if self.gnb:
            estimates["gnb"] = self._gnb(layers)
        if self.hutchinson.get(name):
            estimates["hutchinson"] = self._hutchinson(name, self.hutchinson_trace(name))
        return self._with_spectrum(BlockReport(block_map.numel[name], estimates), name)

    def layers(self, block_map: BlockMap) -> dict[str, BlockReport]:
        """Summarize traces by layer block; Tr H is included only if it was measured by products."""
        reports = {}
        for index, layer in enumerate(block_map.layer_blocks):
            estimates = {"gnb": self._gnb([index])} if self.gnb else {}
            draws = self.hutchinson.get(layer.type, [])
            # Loss differences give the sum over layers alone.
            if draws and len(draws[0][0]) == len(block_map.layer_blocks):
                trace = pool_draws([[row[index] for row in draw] for draw in draws], self.shares)
                estimates["hutchinson"] = self._hutchinson(layer.type, trace)
            if estimates:
                reports[f"{layer.layer}.{layer.type}" if layer.layer else layer.type] = BlockReport(
                    layer.numel, estimates
                )
        return reports

    def whole(self, block_map: BlockMap) -> BlockReport:
        """Summarize all blocks together; Tr H is included only if every block was measured."""
        estimates: dict[str, Estimate] = {}
        if self.gnb:
            estimates["gnb"] = self._gnb(range(len(block_map.layer_blocks)))
        if all(self.hutchinson.get(block) for block in block_map.blocks):
            # The sum over blocks: signs drawn over the whole model at once would add the variance of all products
            # between blocks.
            traces = [self._hutchinson(block, self.hutchinson_trace(block)) for block in block_map.blocks]
            estimates["hutchinson"] = _sum_independent(traces)
        return self._with_spectrum(BlockReport(sum(block_map.numel.values()), estimates), WHOLE_MODEL)

    def embedding_rows(self, frequencies: Frequencies | EmbeddingRows) -> EmbeddingRows:
        """Summarize the draws by groups of the embedding's rows; without groups, hand on why there are none."""
        if isinstance(frequencies, EmbeddingRows):
            return frequencies
        if len(self.gnb_rows) < len(self.gnb):
            return EmbeddingRows(reason="the state was written by a version of sharpwatch that did not keep them")
        columns = range(len(frequencies.counts))
        return frequencies.report([self._gnb_estimate(self._sum_columns(self.gnb_rows, [i])) for i in columns])

    def _sum_columns(self, draws: DrawValues, columns: Sequence[int]) -> PooledEstimate:
        return pool_draws([[math.fsum(row[i] for i in columns) for row in draw] for draw in draws], self.shares)

    def _gnb(self, layers: Sequence[int]) -> Estimate:
        return self._gnb_estimate(self.gnb_trace(layers))

    def _gnb_estimate(self, trace: PooledEstimate) -> Estimate:
        cost = self.costs.get("gnb", Cost())
        return Estimate(trace.value, trace.stderr, len(self.gnb), "gnb", method="autograd", cost=cost)

    def _hutchinson(self, block: str, trace: PooledEstimate) -> Estimate:
        method = "loss differences" if self.steps.get(block) else self.products_by
        cost = self.costs.get(f"hutchinson/{block}", Cost())
        draws = len(self.hutchinson[block])
        return Estimate(trace.value, trace.stderr, draws, "hutchinson", method=method, cost=cost)

    def _with_spectrum(self, report: BlockReport, name: str) -> BlockReport:
        ends = self.ends.get(name)
        cost = self.costs.get(f"lanczos/{name}", Cost())
        top = bottom = None
        if ends is not None:
            batches = len(self.shares)
            # The Ritz vector is that of the mean loss. How its quotients differ between batches says what the data
            # contribute.
            errors = weighted_mean_stderr(ends.tops, self.shares), weighted_mean_stderr(ends.bottoms, self.shares)
            top = Estimate(ends.top, errors[0], batches, "lanczos", 0, ends.top_residual, ends.method, cost)
            bottom = Estimate(ends.bottom, errors[1], batches, "lanczos", 0, ends.bottom_residual, ends.method, cost)
        spectrum = _average_spectra(self.spectra.get(name, []))
        stability = self.stability.get(name, {})
        return BlockReport(report.parameters, report.estimates, top, bottom, spectrum, stability)


def _sum_independent(estimates: Sequence[Estimate]) -> Estimate:
    """The sum of independent estimates."""
    methods = "; ".join(dict.fromkeys(estimate.method for estimate in estimates))
    # Every block has signs of its own, so the errors add in squares.
    value, stderr = math.fsum(e.value for e in estimates), math.hypot(*(e.stderr for e in estimates))
    cost = sum((estimate.cost for estimate in estimates), Cost())
    return Estimate(value, stderr, min(e.draws for e in estimates), "hutchinson", method=methods, cost=cost)


def _average_spectra(spectra: Sequence[tuple[list[float], list[float]]]) -> Spectrum | None:
    if not spectra:
        return None
    values = torch.tensor([value for values, _ in spectra for value in values], dtype=torch.float64, device="cpu")
    weights = torch.tensor([weight for _, weights in spectra for weight in weights], dtype=torch.float64, device="cpu")
    order = values.argsort()
    # Each spectrum's weights sum to 1, so their union divided by the count is the average density.
    return Spectrum(tuple(values[order].tolist()), tuple((weights[order] / len(spectra)).tolist()), len(spectra))
