"""The part of a measurement that takes second derivatives: ends and densities of spectra, Hessian traces, stability."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.estimators.hutchinson import Base, Deflation, LossDifferences, quadratic_forms
from sharpwatch.curvature.estimators.lanczos import Lanczos, Product, product_in
from sharpwatch.curvature.estimators.linesearch import along
from sharpwatch.curvature.estimators.preconditioned import scaled_product
from sharpwatch.curvature.measure.draws import WHOLE, Draws, Ends
from sharpwatch.curvature.objective.hessian import Hessian
from sharpwatch.curvature.parameters.parameter_space import ParameterSpace
from sharpwatch.curvature.statistics.estimate import Cost, Estimate, stability_ratio
from sharpwatch.curvature.statistics.pooling import Pooled, relative_error, worst

_PRODUCTS = 100  # where a Lanczos iteration gives up; its residual then says so
_PRICE = 4  # forwards without a graph that take the time of one product (measured on a CPU: 3.9)
_COARSE = 0.5  # of the precision asked for: where an error that draws share is too large
_LEAST = 1.5  # Tr H over ‖H‖_F, as small as it is believed to be
_KEPT_BYTES = 8 * 2**30  # of all Krylov spaces that deflate
_QUADRATURE = 24  # products of one draw of a spectrum
_GRADIENTS = 4  # batches whose gradients are kept; of more, each quadratic form takes two forwards

Generators = Callable[..., torch.Generator]  # from what is drawn


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked for. `spectra` are the blocks, and "" for the whole model; a precision of None means `draws`."""

    estimators: Sequence[str]
    blocks: Sequence[str]
    spectra: Sequence[str]
    draws: int
    max_draws: int
    precision: float | None
    tolerance: float  # of the top of a spectrum: residual over its larger end
    bottom_tolerance: float
    losses: bool  # whether traces may be taken from the loss alone

    def wants(self, trace: Pooled | None, have: int) -> bool:
        """Whether a trace with `have` draws needs more."""
        if have < self.draws or trace is None:
            return True
        return self.reached(trace) is False and have < self.max_draws

    def reached(self, trace: Pooled) -> bool | None:
        """Whether a trace is as precise as asked; None where no further draw can bring it there."""
        if self.precision is None or trace.stderr == 0 or relative_error(trace.value, trace.sure) <= self.precision:
            return True
        return None if trace.floor > self.precision * abs(trace.value) else False


class SecondOrder:
    """One measurement's second half; what it finds goes into `found`, what is there already is not done again."""

    def __init__(self, plan: Plan, block_map: BlockMap, hessian: Hessian, found: Draws, generator: Generators) -> None:
        self._plan = plan
        self._block_map = block_map
        self._hessian = hessian
        self._found = found
        self._generator = generator
        self._spaces: dict[str, ParameterSpace] = {}
        self._pilots: dict[str, tuple[float, float]] = {}  # zᵀHz and ‖Hz‖ of one z a block, exact
        self._smooth: dict[str, LossDifferences | None] = {}
        self._deflations: dict[str, Deflation] = {}
        self._bases: list[Base] = []
        self._gradients: list[Mapping[str, Tensor]] = []
        self._smooth_loss = False  # whether traces may be taken from the loss
        found.products_by = hessian.method

    def run(self) -> Iterator[str]:
        """Yields what each finished piece was."""
        self._open()
        for block in self._plan.spectra:
            if "lanczos" in self._plan.estimators and (block not in self._found.ends or block in self._unfinished()):
                self._found.ends[block] = self._ends(block)
                yield f"lanczos {block or 'whole model'}"
            while "spectrum" in self._plan.estimators and len(self._found.spectra.get(block, [])) < self._plan.draws:
                self._spectrum(block)
                yield f"spectrum {block or 'whole model'}"
        wanted = self._wanted() if "hutchinson" in self._plan.estimators else {}
        while wanted:
            block = worst(wanted)
            self._draw(block)
            yield f"hutchinson {block}"
            wanted = {name: error for name, error in wanted.items() if name != block} | self._wanted(block)

    def _open(self) -> None:
        """What no block can be charged with: the trial, the losses, the first graph."""
        objective = self._hessian.objective
        self._found.spend("opening", objective.cost)
        with self._spending("opening"):
            if not self._found.losses:
                self._found.losses = [objective.value(index) for index in range(len(objective))]
            self._smooth_loss = self._plan.losses and self._hessian.smooth

    def direction(self, step: Mapping[str, Tensor]) -> None:
        """ρ = dᵀHd / 2gᵀd of the optimizer's next step d, whole and by block."""
        how = self._hessian.method
        for block in self._plan.spectra:
            space = self._space(block)
            with self._spending(f"direction/{block}"):
                d = space.flat_of(step).to(space.dtype)
                each = []
                for index in range(len(self._hessian.objective)):
                    gradient = space.flat_of(self._hessian.gradient(index))
                    image = self._hessian.products(space, d[None], index)[0]
                    each.append((_dot(d, image), _dot(gradient, d)))
            curvature, descent = zip(*each, strict=True)
            shares = self._found.shares
            ratio = stability_ratio(
                [c * w * len(shares) for c, w in zip(curvature, shares, strict=True)],
                [a * w * len(shares) for a, w in zip(descent, shares, strict=True)],
            )
            if ratio is not None:
                self._stable(
                    block, "direction", Estimate(ratio.value, ratio.stderr, ratio.probes, "direction", method=how)
                )

    def linesearch(self, step: Mapping[str, Tensor]) -> None:
        """Critical sharpness along the optimizer's next step, whole and by block."""
        for block in self._plan.spectra:
            space = self._space(block)
            with self._spending(f"linesearch/{block}"):
                found = along(self._hessian.objective, space, space.flat_of(step).to(space.dtype))
            estimate = Estimate(found.value, math.nan, 1, "linesearch", residual=found.half_width, method="losses")
            self._stable(block, "linesearch", estimate)

    def preconditioned(self, scales: Mapping[str, Tensor]) -> None:
        """The top eigenvalue of the preconditioned Hessian of the whole model, in units of Adam's edge."""
        space = self._space(WHOLE)
        with self._spending("preconditioned/"):
            found = Lanczos(space.signs(self._generator("preconditioned")))
            self._iterate(found, scaled_product(self._hessian, space, scales))
        top = found.top()
        estimate = Estimate(top.value, math.nan, 1, "lanczos", residual=top.residual, method=self._hessian.method)
        self._stable(WHOLE, "preconditioned", estimate)

    def _ends(self, block: str) -> Ends:
        space = self._space(block)
        if space.size == 0:
            nothing = [0.0] * len(self._found.shares)
            return Ends(0.0, 0.0, 0.0, 0.0, nothing, nothing, "")
        with self._spending(f"lanczos/{block}"):
            found = Lanczos(space.signs(self._generator(block, "pilot")))
            self._iterate(found, self._remembering(block, space))
            while block and not (found.full or found.exhausted) and self._pays(block, found):
                found.step(product_in(self._hessian, space))
            top, bottom = found.top(), found.bottom()
            tops, bottoms = self._quotients(space, torch.stack([top.vector, bottom.vector]))
        self._keep(block, space, found)
        spectrum = found.spectrum()
        if spectrum is not None and not self._found.spectra.get(block):
            self._found.spectra[block] = [(list(spectrum.eigenvalues), list(spectrum.weights))]
        return Ends(top.value, top.residual, bottom.value, bottom.residual, tops, bottoms, self._hessian.method)

    def _pays(self, block: str, found: Lanczos) -> bool:
        """Whether one more product is likely to spare draws that take longer than it.

        It adds `gain` to the part of ‖H‖²_F that deflation takes out of the draws' variance, 2‖H‖²_F.
        """
        quadratic, length = self._pilots[block]
        trace = max(abs(quadratic), _LEAST * length)  # zᵀHz may be near zero by chance
        if self._plan.precision is None or "hutchinson" not in self._plan.estimators or trace == 0:
            return False
        spared = 2 * found.gain / (self._plan.precision * trace) ** 2
        return spared > (_PRICE if self._smooth_loss else 1)

    def _keep(self, block: str, space: ParameterSpace, found: Lanczos) -> None:
        """Let the Krylov space deflate the block's draws, unless memory ends."""
        basis, projected = found.projection
        kept = sum(4 * each.entries for each in self._deflations.values())
        if block and "hutchinson" in self._plan.estimators and kept + 4 * basis.numel() <= _KEPT_BYTES:
            self._deflations[block] = Deflation(space, basis.clone(), projected)

    def _iterate(self, found: Lanczos, product: Product) -> None:
        while found.products < _PRODUCTS and not (found.products > 2 and self._known(found)):
            if found.exhausted:
                return
            found.step(product)

    def _known(self, found: Lanczos) -> bool:
        return found.converged(self._plan.tolerance, self._plan.bottom_tolerance)

    def _quotients(self, space: ParameterSpace, vectors: Tensor) -> list[list[float]]:
        """uᵀH_i u of each batch i; of one batch there is nothing to compare."""
        if len(self._found.shares) == 1:
            return [[], []]
        rows = [
            [_dot(u, image) for u, image in zip(vectors, self._hessian.products(space, vectors, index), strict=True)]
            for index in range(len(self._found.shares))
        ]
        return [list(column) for column in zip(*rows, strict=True)]

    def _spectrum(self, block: str) -> None:
        space = self._space(block)
        spectra = self._found.spectra.setdefault(block, [])
        with self._spending(f"spectrum/{block}"):
            found = Lanczos(space.signs(self._generator(block, "spectrum", len(spectra))))
            while found.products < _QUADRATURE and not found.exhausted:
                found.step(product_in(self._hessian, space))
        spectrum = found.spectrum()
        if spectrum is not None:
            spectra.append((list(spectrum.eigenvalues), list(spectrum.weights)))

    def _wanted(self, *blocks: str) -> dict[str, float]:
        """Which of `blocks` (none given: of all) need more draws, and how far from exact each is."""
        wanted = {}
        for block in blocks or self._plan.blocks:
            self._leave_the_loss(block)
            have = len(self._found.hutchinson.get(block, []))
            trace = self._found.hutchinson_trace(block) if have else None
            if self._plan.wants(trace, have):
                known = trace is not None and have >= self._plan.draws
                wanted[block] = relative_error(trace.value, trace.stderr) if known and trace else math.inf
        return wanted

    def _leave_the_loss(self, block: str) -> None:
        """Begin again with products where the rounding of L(θ), which all draws share, is too coarse for a trace."""
        common = self._found.common.get(block, 0.0)
        if self._plan.precision is None or common == 0 or len(self._found.hutchinson[block]) < self._plan.draws:
            return
        if common > _COARSE * self._plan.precision * abs(self._found.hutchinson_trace(block).value):
            self._smooth[block] = None
            self._found.hutchinson[block].clear()
            self._found.steps[block] = self._found.common[block] = 0.0

    def _unfinished(self) -> dict[str, float]:
        """Blocks whose draws go on: what deflates them must be had again."""
        return self._wanted() if "hutchinson" in self._plan.estimators else {}

    def _draw(self, block: str) -> None:
        """One draw on every batch."""
        space = self._space(block)
        draws = self._found.hutchinson.setdefault(block, [])
        if space.size == 0:
            draws.append([[0.0]] * len(self._found.shares))
            return
        with self._spending(f"hutchinson/{block}"):
            smooth = self._differences(block, space)
            row = []
            for index in range(len(self._found.shares)):
                patterns = space.patterns(space.signs(self._generator(block, "hutchinson", len(draws), index)))
                deflation = self._deflations.get(block)
                if smooth is not None:
                    known = deflation.known_in_all(patterns) if deflation else 0.0
                    row.append([smooth.draw(space, patterns, index) - known])
                else:
                    forms = quadratic_forms(self._hessian, space, patterns, index)
                    row.append((forms - deflation.known(patterns) if deflation else forms).tolist())
        draws.append(row)

    def _differences(self, block: str, space: ParameterSpace) -> LossDifferences | None:
        """How the block's quadratic forms are had from the loss; None where they are to be had from products."""
        if block not in self._smooth:
            self._smooth[block] = self._tried(block, space) if self._smooth_loss else None
            found = self._smooth[block]
            self._found.steps[block] = 0.0 if found is None else found.step
            self._found.common[block] = 0.0 if found is None else found.stderr
        return self._smooth[block]

    def _tried(self, block: str, space: ParameterSpace) -> LossDifferences | None:
        objective = self._hessian.objective
        if not self._bases:
            whole = self._space(WHOLE)
            indices = range(len(objective))
            self._bases = [Base.of(objective, i, whole, self._generator("base", i)) for i in indices]
            if len(objective) <= _GRADIENTS:
                self._gradients = [self._hessian.gradient(index) for index in indices]
        gradients = [space.flat_of(gradient) for gradient in self._gradients] or None
        kept = self._found.steps.get(block)
        if kept is not None:  # decided before the measurement was taken up again
            return LossDifferences(objective, self._bases, gradients, kept) if kept else None
        quadratic, length = self._pilot(block, space)
        curvature = max(abs(quadratic), math.sqrt(2) * length)
        found = LossDifferences.scaled(objective, space, bases=self._bases, gradients=gradients, curvature=curvature)
        signs = space.signs(self._generator(block, "pilot"))
        return found if found.agrees(space, signs, quadratic, curvature) else None

    def _pilot(self, block: str, space: ParameterSpace) -> tuple[float, float]:
        if block not in self._pilots:
            signs = space.signs(self._generator(block, "pilot"))
            self._remembering(block, space)(signs / math.sqrt(space.size))
        return self._pilots[block]

    def _remembering(self, block: str, space: ParameterSpace) -> Product:
        """The product, the first of which, with z/√n, is kept as the block's pilot."""
        product = product_in(self._hessian, space)

        def first(vector: Tensor) -> Tensor:
            image = product(vector)
            length = math.sqrt(space.size) * float(torch.linalg.vector_norm(image))
            self._pilots.setdefault(block, (space.size * _dot(vector, image), length))
            return image

        return first

    def _space(self, block: str) -> ParameterSpace:
        if block not in self._spaces:
            self._spaces[block] = ParameterSpace(self._block_map, block or None, self._hessian.objective.live.leaves)
        return self._spaces[block]

    def _stable(self, block: str, kind: str, estimate: Estimate) -> None:
        cost = self._found.costs[f"{kind}/{block}"]
        self._found.stability.setdefault(block, {})[kind] = replace(estimate, cost=cost)

    def _spending(self, name: str) -> _Spending:
        return _Spending(self._hessian, self._found, name)


class _Spending:
    """Books what the objective spends inside under a name."""

    def __init__(self, hessian: Hessian, found: Draws, name: str) -> None:
        self._hessian, self._found, self._name = hessian, found, name
        self._before = Cost()

    def __enter__(self) -> None:
        self._before = self._hessian.objective.cost

    def __exit__(self, *_: object) -> None:
        self._found.spend(self._name, self._hessian.objective.cost - self._before)


def _dot(left: Tensor, right: Tensor) -> float:
    return float((left.double() * right.double()).sum())
