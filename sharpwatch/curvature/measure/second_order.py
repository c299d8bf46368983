"""The part of a measurement that needs second derivatives: spectra, Hessian traces and stability ratios."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.estimators.directional import critical_sharpness_along
from sharpwatch.curvature.estimators.hutchinson import BaseLoss, Deflation, LossDifferences, quadratic_forms
from sharpwatch.curvature.estimators.lanczos import Lanczos, Matvec, hessian_matvec
from sharpwatch.curvature.estimators.preconditioned import preconditioned_matvec
from sharpwatch.curvature.measure.report import WHOLE_MODEL, Draws, SpectrumEnds
from sharpwatch.curvature.objective.hessian import Hessian
from sharpwatch.curvature.parameters.parameter_space import ParameterSpace
from sharpwatch.curvature.statistics.estimate import Cost, Estimate, stability_ratio
from sharpwatch.curvature.statistics.pooling import PooledEstimate, least_precise, relative_error

_MAX_PRODUCTS = 100  # of one Lanczos iteration; the residual then shows that it did not converge
_FORWARDS_PER_PRODUCT = 4  # one product takes as long as this many forwards without a graph (on a CPU: 3.9)
_MAX_SHARED_ERROR = 0.5  # of an error that all draws share, relative to the requested precision
_MIN_TRACE_RATIO = 1.5  # assumed lower bound of Tr H / ‖H‖_F
_MAX_DEFLATION_BYTES = 8 * 2**30  # of all Krylov bases kept for deflation
_QUADRATURE_PRODUCTS = 24  # of one spectral draw
_MAX_KEPT_GRADIENTS = 4  # with more batches, gradients are not kept and each quadratic form takes two forwards

Generators = Callable[..., torch.Generator]  # from the key of a draw


@dataclass(frozen=True, slots=True)
class Plan:
    """What a measurement is to do.

    Attributes:
        estimators: Names of the estimators.
        blocks: Block types whose traces are measured.
        spectra: Block types whose spectra are measured; "" for the whole model.
        draws: Number of draws; with a precision, the smallest number.
        max_draws: Largest number of draws.
        precision: Requested relative standard error, or None.
        tolerance: Lanczos tolerance of the top: residual relative to the larger end of the spectrum.
        bottom_tolerance: The same for the bottom.
        losses: Whether traces may be taken from loss differences.
    """

    estimators: Sequence[str]
    blocks: Sequence[str]
    spectra: Sequence[str]
    draws: int
    max_draws: int
    precision: float | None
    tolerance: float
    bottom_tolerance: float
    losses: bool

    def wants(self, trace: PooledEstimate | None, count: int) -> bool:
        """Whether a trace with `count` draws needs more."""
        if count < self.draws or trace is None:
            return True
        return self.reached(trace) is False and count < self.max_draws

    def reached(self, trace: PooledEstimate) -> bool | None:
        """Whether a trace is as precise as requested; None if no further draw can achieve that."""
        if (
            self.precision is None
            or trace.stderr == 0
            or relative_error(trace.value, trace.stopping_stderr) <= self.precision
        ):
            return True
        return None if trace.batch_stderr > self.precision * abs(trace.value) else False


class SecondOrder:
    """Runs the estimators that need second derivatives, and adds their results to `draws`.

    Results that `draws` already contains are not measured again.

    Args:
        plan: What to measure.
        block_map: The division of the parameters into blocks.
        hessian: The Hessian.
        draws: The draws so far.
        generator: Gives a random generator for the key of a draw.
    """

    def __init__(self, plan: Plan, block_map: BlockMap, hessian: Hessian, draws: Draws, generator: Generators) -> None:
        self._plan = plan
        self._block_map = block_map
        self._hessian = hessian
        self._draws = draws
        self._generator = generator
        self._spaces: dict[str, ParameterSpace] = {}
        self._pilots: dict[str, tuple[float, float]] = {}  # exact zᵀHz and ‖Hz‖ of one z for each block
        self._differences: dict[str, LossDifferences | None] = {}
        self._deflations: dict[str, Deflation] = {}
        self._bases: list[BaseLoss] = []
        self._gradients: list[Mapping[str, Tensor]] = []
        self._smooth_loss = False  # whether traces may be taken from loss differences
        draws.products_by = hessian.method

    def run(self) -> Iterator[str]:
        """Measure spectra and traces; yields the name of each finished piece."""
        self._open()
        for block in self._plan.spectra:
            if "lanczos" in self._plan.estimators and (
                block not in self._draws.ends or block in self._blocks_with_draws_to_go()
            ):
                self._draws.ends[block] = self._measure_ends(block)
                yield f"lanczos {block or 'whole model'}"
            while "spectrum" in self._plan.estimators and len(self._draws.spectra.get(block, [])) < self._plan.draws:
                self._draw_spectrum(block)
                yield f"spectrum {block or 'whole model'}"
        pending = self._unfinished_blocks() if "hutchinson" in self._plan.estimators else {}
        while pending:
            # Every block is to reach the same relative error, so the worst goes first.
            block = least_precise(pending)
            self._draw(block)
            yield f"hutchinson {block}"
            pending = {name: error for name, error in pending.items() if name != block} | self._unfinished_blocks(block)

    def _open(self) -> None:
        """Do the work that belongs to no block: the trial product, the losses, the first graph."""
        objective = self._hessian.objective
        # `open_hessian` has tried a product before this object existed.
        self._draws.add_cost("opening", objective.cost)
        with self._metered("opening"):
            if not self._draws.losses:
                self._draws.losses = [objective.value(index) for index in range(len(objective))]
            self._smooth_loss = self._plan.losses and self._hessian.smooth

    def direction(self, step: Mapping[str, Tensor]) -> None:
        """Measure ρ = dᵀHd / 2gᵀd along the optimizer's next step d, for the whole model and by block."""
        method = self._hessian.method
        for block in self._plan.spectra:
            space = self._space(block)
            with self._metered(f"direction/{block}"):
                direction = space.flatten(step).to(space.dtype)
                products = []
                for index in range(len(self._hessian.objective)):
                    gradient = space.flatten(self._hessian.gradient(index))
                    image = self._hessian.products(space, direction[None], index)[0]
                    products.append((_dot(direction, image), _dot(gradient, direction)))
            curvature, descent = zip(*products, strict=True)
            shares = self._draws.shares
            # `stability_ratio` weighs probes alike, but batches count by their tokens.
            ratio = stability_ratio(
                [c * w * len(shares) for c, w in zip(curvature, shares, strict=True)],
                [d * w * len(shares) for d, w in zip(descent, shares, strict=True)],
            )
            if ratio is not None:
                self._record_stability(
                    block, "direction", Estimate(ratio.value, ratio.stderr, ratio.probes, "direction", method=method)
                )

    def linesearch(self, step: Mapping[str, Tensor]) -> None:
        """Measure the critical sharpness along the optimizer's next step, for the whole model and by block."""
        for block in self._plan.spectra:
            space = self._space(block)
            with self._metered(f"linesearch/{block}"):
                critical = critical_sharpness_along(self._hessian.objective, space, space.flatten(step).to(space.dtype))
            estimate = Estimate(
                critical.value, math.nan, 1, "linesearch", residual=critical.half_width, method="losses"
            )
            self._record_stability(block, "linesearch", estimate)

    def preconditioned(self, scales: Mapping[str, Tensor]) -> None:
        """Measure the top eigenvalue of the preconditioned Hessian of the whole model, in units of Adam's edge."""
        space = self._space(WHOLE_MODEL)
        with self._metered("preconditioned/"):
            lanczos = Lanczos(space.random_signs(self._generator("preconditioned")))
            self._iterate(lanczos, preconditioned_matvec(self._hessian, space, scales))
        top = lanczos.top()
        estimate = Estimate(top.value, math.nan, 1, "lanczos", residual=top.residual, method=self._hessian.method)
        self._record_stability(WHOLE_MODEL, "preconditioned", estimate)

    def _measure_ends(self, block: str) -> SpectrumEnds:
        space = self._space(block)
        if space.size == 0:
            zeros = [0.0] * len(self._draws.shares)
            return SpectrumEnds(0.0, 0.0, 0.0, 0.0, zeros, zeros, "")
        with self._metered(f"lanczos/{block}"):
            # The start is the pilot's z, so the first product serves the choice of ε for this block's traces as well.
            lanczos = Lanczos(space.random_signs(self._generator(block, "pilot")))
            self._iterate(lanczos, self._recording_pilot(block, space))
            while block and not (lanczos.is_full or lanczos.is_invariant) and self._pays(block, lanczos):
                lanczos.step(hessian_matvec(self._hessian, space))
            top, bottom = lanczos.top(), lanczos.bottom()
            tops, bottoms = self._rayleigh_quotients(space, torch.stack([top.vector, bottom.vector]))
        self._keep_for_deflation(block, space, lanczos)
        spectrum = lanczos.spectrum()
        if spectrum is not None and not self._draws.spectra.get(block):
            self._draws.spectra[block] = [(list(spectrum.eigenvalues), list(spectrum.weights))]
        return SpectrumEnds(top.value, top.residual, bottom.value, bottom.residual, tops, bottoms, self._hessian.method)

    def _pays(self, block: str, lanczos: Lanczos) -> bool:
        """Whether one more product is likely to save draws that take longer than it.

        It adds `captured_per_product` to the part of ‖H‖²_F that deflation removes from the draws' variance, 2‖H‖²_F.
        """
        quadratic, length = self._pilots[block]
        trace = max(abs(quadratic), _MIN_TRACE_RATIO * length)  # zᵀHz may be near zero by chance
        if self._plan.precision is None or "hutchinson" not in self._plan.estimators or trace == 0:
            return False
        saved_draws = 2 * lanczos.captured_per_product / (self._plan.precision * trace) ** 2
        return saved_draws > (_FORWARDS_PER_PRODUCT if self._smooth_loss else 1)

    def _keep_for_deflation(self, block: str, space: ParameterSpace, lanczos: Lanczos) -> None:
        """Keep the Krylov space to deflate the block's draws, within the limit on memory."""
        basis, projected = lanczos.projection
        kept_bytes = sum(4 * deflation.numel for deflation in self._deflations.values())
        if block and "hutchinson" in self._plan.estimators and kept_bytes + 4 * basis.numel() <= _MAX_DEFLATION_BYTES:
            self._deflations[block] = Deflation(space, basis.clone(), projected)

    def _iterate(self, lanczos: Lanczos, matvec: Matvec) -> None:
        while lanczos.products < _MAX_PRODUCTS and not (lanczos.products > 2 and self._has_converged(lanczos)):
            if lanczos.is_invariant:
                return
            lanczos.step(matvec)

    def _has_converged(self, lanczos: Lanczos) -> bool:
        return lanczos.converged(self._plan.tolerance, self._plan.bottom_tolerance)

    def _rayleigh_quotients(self, space: ParameterSpace, vectors: Tensor) -> list[list[float]]:
        """uᵀH_i u for each batch i; empty for a single batch, which needs no comparison."""
        if len(self._draws.shares) == 1:
            return [[], []]
        rows = [
            [_dot(u, image) for u, image in zip(vectors, self._hessian.products(space, vectors, index), strict=True)]
            for index in range(len(self._draws.shares))
        ]
        return [list(column) for column in zip(*rows, strict=True)]

    def _draw_spectrum(self, block: str) -> None:
        space = self._space(block)
        spectra = self._draws.spectra.setdefault(block, [])
        with self._metered(f"spectrum/{block}"):
            lanczos = Lanczos(space.random_signs(self._generator(block, "spectrum", len(spectra))))
            lanczos.run(hessian_matvec(self._hessian, space), _QUADRATURE_PRODUCTS)
        spectrum = lanczos.spectrum()
        if spectrum is not None:
            spectra.append((list(spectrum.eigenvalues), list(spectrum.weights)))

    def _unfinished_blocks(self, *blocks: str) -> dict[str, float]:
        """The blocks among `blocks` (of all, if none is given) that need more draws, with their relative errors."""
        unfinished = {}
        for block in blocks or self._plan.blocks:
            self._reconsider_loss_differences(block)
            count = len(self._draws.hutchinson.get(block, []))
            trace = self._draws.hutchinson_trace(block) if count else None
            if self._plan.wants(trace, count):
                started = trace is not None and count >= self._plan.draws
                unfinished[block] = relative_error(trace.value, trace.stderr) if started and trace else math.inf
        return unfinished

    def _reconsider_loss_differences(self, block: str) -> None:
        """Start over with products if the rounding error of L(θ), which all draws share, is too large."""
        shared_error = self._draws.common.get(block, 0.0)
        if self._plan.precision is None or shared_error == 0 or len(self._draws.hutchinson[block]) < self._plan.draws:
            return
        if shared_error > _MAX_SHARED_ERROR * self._plan.precision * abs(self._draws.hutchinson_trace(block).value):
            self._differences[block] = None
            self._draws.hutchinson[block].clear()
            self._draws.steps[block] = self._draws.common[block] = 0.0

    def _blocks_with_draws_to_go(self) -> dict[str, float]:
        """The blocks that need more draws, so that their deflation must be computed again after a resume."""
        return self._unfinished_blocks() if "hutchinson" in self._plan.estimators else {}

    def _draw(self, block: str) -> None:
        """Take one draw on every batch."""
        space = self._space(block)
        draws = self._draws.hutchinson.setdefault(block, [])
        if space.size == 0:
            draws.append([[0.0]] * len(self._draws.shares))
            return
        with self._metered(f"hutchinson/{block}"):
            differences = self._loss_differences(block, space)
            row = []
            for index in range(len(self._draws.shares)):
                patterns = space.mirrored(space.random_signs(self._generator(block, "hutchinson", len(draws), index)))
                deflation = self._deflations.get(block)
                if differences is not None:
                    expected = deflation.control_variate_total(patterns) if deflation else 0.0
                    row.append([differences.draw(space, patterns, index) - expected])
                else:
                    forms = quadratic_forms(self._hessian, space, patterns, index)
                    row.append((forms - deflation.control_variate(patterns) if deflation else forms).tolist())
        draws.append(row)

    def _loss_differences(self, block: str, space: ParameterSpace) -> LossDifferences | None:
        """The loss differences of the block; None to use products."""
        if block not in self._differences:
            self._differences[block] = self._try_loss_differences(block, space) if self._smooth_loss else None
            differences = self._differences[block]
            self._draws.steps[block] = 0.0 if differences is None else differences.step
            self._draws.common[block] = 0.0 if differences is None else differences.stderr
        return self._differences[block]

    def _try_loss_differences(self, block: str, space: ParameterSpace) -> LossDifferences | None:
        objective = self._hessian.objective
        if not self._bases:
            whole = self._space(WHOLE_MODEL)
            indices = range(len(objective))
            self._bases = [BaseLoss.of(objective, i, whole, self._generator("base", i)) for i in indices]
            if len(objective) <= _MAX_KEPT_GRADIENTS:
                self._gradients = [self._hessian.gradient(index) for index in indices]
        gradients = [space.flatten(gradient) for gradient in self._gradients] or None
        earlier_step = self._draws.steps.get(block)
        if earlier_step is not None:  # decided before the measurement was resumed
            return LossDifferences(objective, self._bases, gradients, earlier_step) if earlier_step else None
        quadratic, norm = self._pilot(block, space)
        # One zᵀHz may be near zero by chance: the standard deviation of others is √2‖H‖_F at most, and ‖Hz‖ estimates
        # ‖H‖_F.
        curvature = max(abs(quadratic), math.sqrt(2) * norm)
        differences = LossDifferences.scaled(
            objective, space, bases=self._bases, gradients=gradients, curvature=curvature
        )
        signs = space.random_signs(self._generator(block, "pilot"))
        return differences if differences.agrees(space, signs, quadratic, curvature) else None

    def _pilot(self, block: str, space: ParameterSpace) -> tuple[float, float]:
        if block not in self._pilots:
            signs = space.random_signs(self._generator(block, "pilot"))
            self._recording_pilot(block, space)(signs / math.sqrt(space.size))
        return self._pilots[block]

    def _recording_pilot(self, block: str, space: ParameterSpace) -> Matvec:
        """The product with H; the first one, with z/√n, is kept as the block's pilot."""
        matvec = hessian_matvec(self._hessian, space)

        def recording(vector: Tensor) -> Tensor:
            image = matvec(vector)
            norm = math.sqrt(space.size) * float(torch.linalg.vector_norm(image))
            self._pilots.setdefault(block, (space.size * _dot(vector, image), norm))
            return image

        return recording

    def _space(self, block: str) -> ParameterSpace:
        if block not in self._spaces:
            self._spaces[block] = ParameterSpace(self._block_map, block or None, self._hessian.objective.live.leaves)
        return self._spaces[block]

    def _record_stability(self, block: str, kind: str, estimate: Estimate) -> None:
        cost = self._draws.costs[f"{kind}/{block}"]
        self._draws.stability.setdefault(block, {})[kind] = replace(estimate, cost=cost)

    def _metered(self, name: str) -> _CostMeter:
        return _CostMeter(self._hessian, self._draws, name)


class _CostMeter:
    """Adds the cost of the body to the cost of `name`."""

    def __init__(self, hessian: Hessian, draws: Draws, name: str) -> None:
        self._hessian, self._draws, self._name = hessian, draws, name
        self._before = Cost()

    def __enter__(self) -> None:
        self._before = self._hessian.objective.cost

    def __exit__(self, *_: object) -> None:
        self._draws.add_cost(self._name, self._hessian.objective.cost - self._before)


def _dot(left: Tensor, right: Tensor) -> float:
    return float((left.double() * right.double()).sum())
