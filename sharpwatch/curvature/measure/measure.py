"""One look at a model: every block's sharpness with its error, from a list of batches; no daemon."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sharpwatch.blocks import BlockMap, Rules, classify
from sharpwatch.curvature.estimators.gnb import gnb_probe
from sharpwatch.curvature.measure import validation
from sharpwatch.curvature.measure.draws import WHOLE_MODEL, Draws
from sharpwatch.curvature.measure.report import SharpnessReport
from sharpwatch.curvature.measure.second_order import Plan, SecondOrder
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.objective.hessian import open_hessian
from sharpwatch.curvature.objective.next_step import next_step, preconditioner
from sharpwatch.curvature.objective.objective import Objective
from sharpwatch.curvature.objective.outputs import LogitsFn, LossFn
from sharpwatch.curvature.state.isolation import isolated
from sharpwatch.curvature.statistics.estimate import Cost
from sharpwatch.curvature.statistics.pooling import PooledEstimate, relative_error
from sharpwatch.errors import PrecisionError, ProbeError

ESTIMATORS = ("gnb", "hutchinson", "lanczos")
_RESIDUAL_TOLERANCE = 0.003  # residual over the larger end of a spectrum: where a Lanczos iteration stops
_MAX_TOP_TOLERANCE = (
    0.01  # at most, with a precision asked for: at 0.03 a run in a hundred took the second eigenvalue for the top
)
_MIN_BOTTOM_TOLERANCE = 0.1  # the same for the lower end there
_DRAWS_PER_FORWARD = 4  # gnb draws that share a forward, in search of a precision


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` pieces of work (None: until a precision is reached), the last of which was `what`."""

    done: int
    total: int | None
    what: str


def measure(  # noqa: PLR0913, PLR0917 - the public signature; each has a default that works
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    estimators: Sequence[str] = ESTIMATORS,
    draws: int = 8,
    seed: int = 0,
    *,
    precision: float | None = None,
    max_draws: int = 256,
    blocks: Sequence[str] | None = None,
    rules: Rules | str | None = None,
    loss_fn: LossFn | None = None,
    logits_fn: LogitsFn | None = None,
    method: str = "auto",
) -> SharpnessReport:
    """Measure `model` on `batches`, dicts of its arguments (Hugging Face: `input_ids`, `labels`).

    `estimators`: `gnb` (trace of the Gauss-Newton matrix), `hutchinson` (trace of the Hessian), `lanczos` (its largest
    and smallest eigenvalue), `spectrum` (its density, from `draws` starts), and for the next step of `optimizer`
    `direction`, `linesearch` and `preconditioned`. `precision` asks for every block's relative standard error to be
    below it, with up to `max_draws`. `blocks` None means all, and the whole model's eigenvalues. `method`: products by
    "autograd" alone, by "differences" of gradients alone, or "auto": autograd where that goes, and traces from the loss
    where the loss is smooth. Leaves no trace in `model`.

    Raises `ProbeError` or `BlockError` for what can't be measured, before anything starts, and `PrecisionError`, which
    has the report, for a precision that was not reached.
    """
    measurement = Measurement(
        model,
        batches,
        optimizer,
        estimators,
        draws,
        seed,
        precision=precision,
        max_draws=max_draws,
        blocks=blocks,
        rules=rules,
        loss_fn=loss_fn,
        logits_fn=logits_fn,
        method=method,
    )
    for _ in measurement.run():
        pass
    report = measurement.report()
    if report.unreached:
        raise PrecisionError(report)
    return report


class Measurement:
    """`measure` in pieces, that can be stopped, kept and gone on with: every draw is the seed's alone.

    Arguments and errors are `measure`'s; the constructor checks them and runs nothing.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - `measure`'s signature
        self,
        model: nn.Module,
        batches: Sequence[Mapping[str, Any]],
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        estimators: Sequence[str] = ESTIMATORS,
        draws: int = 8,
        seed: int = 0,
        *,
        precision: float | None = None,
        max_draws: int = 256,
        blocks: Sequence[str] | None = None,
        rules: Rules | str | None = None,
        loss_fn: LossFn | None = None,
        logits_fn: LogitsFn | None = None,
        method: str = "auto",
    ) -> None:
        validation.check_model(model)
        validation.check_estimators(estimators)
        validation.check_numbers(draws, seed, precision, max_draws)
        self._optimizers = validation.check_optimizers(model, optimizer, estimators)
        self._tokens = validation.check_batches(model, batches, logits_fn)
        self.block_map: BlockMap = classify(model, rules)
        self.blocks = validation.check_blocks(blocks, self.block_map)
        self._model = model
        self._batches = [Batch((), dict(batch)) for batch in batches]
        self._plan = Plan(
            estimators=tuple(estimators),
            blocks=self.blocks,
            spectra=(*self.blocks, *((WHOLE_MODEL,) if blocks is None else ())),
            draws=draws,
            max_draws=max(draws, max_draws),
            precision=precision,
            tolerance=_RESIDUAL_TOLERANCE if precision is None else min(precision, _MAX_TOP_TOLERANCE),
            bottom_tolerance=_RESIDUAL_TOLERANCE if precision is None else max(precision, _MIN_BOTTOM_TOLERANCE),
            losses=method == "auto",
        )
        self._seed = seed
        self._device = next(model.parameters()).device
        self._loss_fn, self._logits_fn, self._method = loss_fn, logits_fn, validation.check_method(method)
        self._draws = Draws(shares=[tokens / sum(self._tokens) for tokens in self._tokens])
        self._done = 0

    def run(self) -> Generator[Progress]:
        """Do the work, piece by piece; in between the model is on loan, and given back at the end or on `close()`."""
        yield from self._run_gnb()
        if set(self._plan.estimators) == {"gnb"}:
            return
        step = self._next_step()
        scales = preconditioner(self._model, self._optimizers) if "preconditioned" in self._plan.estimators else {}
        with open_hessian(
            self._model, self.block_map, self._batches, loss_fn=self._loss_fn, method=self._method
        ) as hessian:
            second = SecondOrder(self._plan, self.block_map, hessian, self._draws, self._generator)
            for piece in second.run():
                yield self._progress(piece)
            for name, argument in (("direction", step), ("linesearch", step), ("preconditioned", scales)):
                if name in self._plan.estimators:
                    getattr(second, name)(argument)
                    yield self._progress(name)

    def report(self) -> SharpnessReport:
        """What has been found so far."""
        draws = self._draws
        return SharpnessReport(
            blocks={name: draws.block(self.block_map, name) for name in self.blocks},
            layers=draws.layers(self.block_map),
            whole=draws.whole(self.block_map),
            loss=math.fsum(w * loss for w, loss in zip(draws.shares, draws.losses, strict=False))
            if draws.losses
            else math.nan,
            tokens=sum(self._tokens),
            batches=len(self._batches),
            seed=self._seed,
            cost=draws.cost,
            unreached=self._unreached(),
        )

    def state_dict(self) -> dict[str, Any]:
        """Every draw so far, as JSON takes it, and what it was drawn from."""
        return {"of": self._fingerprint(), "found": self._draws.to_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; more draws, another precision or other estimators may be asked for than when it was made.

        Raises `ProbeError` where it was drawn with another seed, or from other weights, batches or blocks.
        """
        for name, own in self._fingerprint().items():
            theirs = state.get("of", {}).get(name)
            if theirs != own:
                raise ProbeError(f"the state is of another measurement: its {name} is {theirs}, this one's {own}")
        self._draws = Draws.from_dict(state["found"])
        draws, first = self._draws, "lanczos" in self._plan.estimators
        self._done = len(self._batches) * bool(draws.gnb) + len(draws.ends)
        self._done += sum(map(len, draws.hutchinson.values())) + sum(len(s) - first for s in draws.spectra.values())

    def _fingerprint(self) -> dict[str, Any]:
        shapes = hashlib.sha256(repr(self.block_map.parts).encode())
        weights = hashlib.sha256()
        for parameter in self._model.parameters():
            weights.update(_tensor_bytes(parameter.detach().reshape(-1)[:1024]))
        batches = hashlib.sha256()
        for batch in self._batches:
            for tensor in batch.tensors():
                batches.update(_tensor_bytes(tensor))
        hashes = {"block map": shapes, "weights": weights, "batches": batches}
        return {"seed": self._seed, "method": self._method} | {k: v.hexdigest()[:16] for k, v in hashes.items()}

    def _run_gnb(self) -> Generator[Progress]:
        drawn = self._draws.gnb
        while "gnb" in self._plan.estimators and (count := self._missing_gnb_draws()):
            new_draws: list[list[list[float]]] = [[] for _ in range(count)]
            for index, (batch, share) in enumerate(zip(self._batches, self._draws.shares, strict=True)):
                sample = gnb_probe(
                    self._model,
                    self.block_map,
                    batch,
                    draws=count,
                    generator=self._generator("gnb", index, len(drawn)),
                    logits_fn=self._logits_fn,
                )
                for row, trace in zip(new_draws, sample.traces.tolist(), strict=True):
                    row.append(trace)
                self._draws.add_cost("gnb", Cost(share, share * count))
                yield self._progress("gnb")
            drawn += new_draws

    def _missing_gnb_draws(self) -> int:
        """How many more draws; every one is of all blocks."""
        count = len(self._draws.gnb)
        if count < self._plan.draws:
            return self._plan.draws - count
        unfinished = any(self._plan.wants(self._gnb_trace(block), count) for block in self.blocks)
        return min(_DRAWS_PER_FORWARD, self._plan.max_draws - count) if unfinished else 0

    def _gnb_trace(self, block: str) -> PooledEstimate:
        return self._draws.gnb_trace([i for i, b in enumerate(self.block_map.layer_blocks) if b.type == block])

    def _unreached(self) -> dict[str, str]:
        """Why, by block, where a trace is not as precise as asked."""
        reasons: dict[str, str] = {}
        for block in self.blocks if self._plan.precision is not None else ():
            traces = {"gnb": self._gnb_trace(block)} if self._draws.gnb else {}
            if self._draws.hutchinson.get(block):
                traces["hutchinson"] = self._draws.hutchinson_trace(block)
            shortfalls = [
                self._shortfall(name, trace) for name, trace in traces.items() if not self._plan.reached(trace)
            ]
            if shortfalls:
                reasons[block] = " and ".join(shortfalls)
        return reasons

    def _shortfall(self, estimator: str, trace: PooledEstimate) -> str:
        error = relative_error(trace.value, trace.stderr)
        shortfall = f"{estimator}'s relative standard error is {error:.2g}, not below {self._plan.precision:g}"
        if self._plan.reached(trace) is None:
            return f"{shortfall}: its batches differ by more than that, give more of them"
        return f"{shortfall}, with max_draws={self._plan.max_draws}"

    def _next_step(self) -> dict[str, Tensor]:
        """The optimizer's, on the mean gradient of all batches."""
        if not {"direction", "linesearch"} & set(self._plan.estimators):
            return {}
        mean: dict[str, Tensor] = {}
        with isolated(self._model, exact=True) as live:
            objective = Objective(live, self._batches, self._loss_fn)
            for index, share in enumerate(objective.shares):
                for name, gradient in objective.gradient(index, list(live.trainable)).items():
                    mean[name] = mean.get(name, 0) + share * gradient
            self._draws.add_cost("step", objective.cost)
        return next_step(self._model, self._optimizers, mean)

    def _generator(self, *key: object) -> torch.Generator:
        """A random source that depends on the seed and on what is drawn alone, not on what was drawn before."""
        digest = hashlib.sha256("/".join(map(str, (self._seed, *key))).encode()).digest()
        return torch.Generator(self._device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def _progress(self, what: str) -> Progress:
        self._done += 1
        return Progress(self._done, self._total_pieces(), what)

    def _total_pieces(self) -> int | None:
        plan, count = self._plan, {"gnb": len(self._batches)}
        if plan.precision is not None:
            return None
        count |= {"lanczos": len(plan.spectra), "hutchinson": plan.draws * len(plan.blocks)}
        first = "lanczos" in plan.estimators  # whose own start is a draw
        count |= {"spectrum": (plan.draws - first) * len(plan.spectra)}
        return sum(count.get(name, 1) for name in plan.estimators)


def _tensor_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
