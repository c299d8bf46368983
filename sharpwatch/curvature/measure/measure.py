"""`measure`: the sharpness of every block of a model with standard errors, from a list of batches; no daemon needed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sharpwatch.blocks import BlockMap, RulesLike, classify
from sharpwatch.curvature.estimators.directional import next_step
from sharpwatch.curvature.estimators.gnb import GnbSample, gnb_probe
from sharpwatch.curvature.estimators.preconditioned import preconditioner
from sharpwatch.curvature.measure import validation
from sharpwatch.curvature.measure.embedding_rows import EMBEDDING, Frequencies, token_frequencies
from sharpwatch.curvature.measure.report import WHOLE_MODEL, Draws, DrawValues, SharpnessReport
from sharpwatch.curvature.measure.second_order import Plan, SecondOrder
from sharpwatch.curvature.objective.batch import Batch, LogitsFn, LossFn
from sharpwatch.curvature.objective.hessian import open_hessian
from sharpwatch.curvature.objective.hooked_weights import require_hooked_weights
from sharpwatch.curvature.objective.objective import Objective
from sharpwatch.curvature.objective.weighing import Weighing
from sharpwatch.curvature.parameters.trained import trained_parameters
from sharpwatch.curvature.state.isolation import isolated
from sharpwatch.curvature.statistics.estimate import Cost
from sharpwatch.curvature.statistics.pooling import PooledEstimate, relative_error
from sharpwatch.errors import PrecisionError, ProbeError

ESTIMATORS = ("gnb", "hutchinson", "lanczos")
_RESIDUAL_TOLERANCE = 0.003  # residual at which Lanczos stops, relative to the larger end of the spectrum
# Limits of that tolerance if a precision is requested. At 0.03, one run in a hundred took the second eigenvalue for
# the top one.
_MAX_TOP_TOLERANCE = 0.01
_MIN_BOTTOM_TOLERANCE = 0.1
_DRAWS_PER_FORWARD = 4  # gnb draws that share a forward while a precision is being reached


@dataclass(frozen=True, slots=True)
class Settings:
    """What to measure and how precisely: the arguments of `measure` that describe no model, with its defaults."""

    estimators: Sequence[str] = ESTIMATORS
    draws: int = 8
    seed: int = 0
    precision: float | None = None
    max_draws: int = 256
    blocks: Sequence[str] | None = None
    rules: RulesLike | None = None
    loss_fn: LossFn | None = None
    logits_fn: LogitsFn | None = None
    method: str = "auto"
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a measurement.

    Attributes:
        done: Number of finished pieces of work.
        total: Number of pieces in total; None if the end depends on a precision.
        what: The last finished piece.
    """

    done: int
    total: int | None
    what: str


def measure(  # noqa: PLR0913, PLR0917 - the public signature, with defaults
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
    rules: RulesLike | None = None,
    loss_fn: LossFn | None = None,
    logits_fn: LogitsFn | None = None,
    method: str = "auto",
    strict: bool = False,
) -> SharpnessReport:
    """Measure the sharpness of `model` on `batches`; leaves `model` unchanged.

    Sharpness is over what is trained: parameters that require no gradient are no part of any block.

    Args:
        model: The model, on the device where it is to be measured.
        batches: Dicts of the model's arguments (Hugging Face: `input_ids`, `labels`).
        optimizer: The optimizer or optimizers, for estimators that concern its next step.
        estimators: What to measure. `gnb`: trace of the Gauss-Newton matrix. `hutchinson`: trace of the Hessian.
            `lanczos`: largest and smallest eigenvalue of the Hessian. `spectrum`: its density, from `draws` starts.
            `direction`, `linesearch`, `preconditioned`: stability of the optimizer's next step.
        draws: Number of draws for each trace.
        seed: Seed of the draws; the same seed gives the same draws.
        precision: Requested relative standard error of every block's trace; more draws are taken to reach it.
        max_draws: Largest number of draws, with `precision`.
        blocks: Block types to measure; None for all of them and the eigenvalues of the whole model.
        rules: Block rules: a dict by glob, a list, or the path of a YAML file; see `classify`.
        loss_fn: Computes the loss as `loss_fn(model, batch)`; None to use the model's own.
        logits_fn: Computes logits [..., V] and a mask of the predicting positions as `logits_fn(model, batch)`; None to
            find them.
        method: "autograd" differentiates twice, "differences" takes finite differences of gradients. "auto" takes
            autograd if it works, and traces from loss differences if the loss is smooth.
        strict: Raise where a parameter's block is not known; by default it is `other`, with a warning in the log.

    Returns:
        The estimates by block.

    Raises:
        ProbeError: An argument is invalid, or the model cannot be measured; raised before anything runs if possible.
        BlockError: A rule is invalid or applies to no parameter; with `strict`, a parameter's block is not known.
        PrecisionError: `precision` was not reached; the error has the report.
    """
    settings = Settings(
        estimators,
        draws,
        seed,
        precision,
        max_draws,
        blocks,
        rules,
        loss_fn=loss_fn,
        logits_fn=logits_fn,
        method=method,
        strict=strict,
    )
    measurement = Measurement(model, batches, optimizer, settings)
    for _ in measurement.run():
        pass
    report = measurement.report()
    if report.unreached:
        raise PrecisionError(report)
    return report


class Measurement:
    """`measure` in steps: it can be interrupted, saved and resumed, since every draw depends on the seed alone.

    The arguments and errors are those of `measure`. The constructor checks the arguments and runs nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Mapping[str, Any]],
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
        settings: Settings,
    ) -> None:
        validation.check_model(model)
        validation.check_estimators(settings.estimators)
        validation.check_functions(loss_fn=settings.loss_fn, logits_fn=settings.logits_fn)
        validation.check_numbers(settings.draws, settings.seed, settings.precision, settings.max_draws)
        self._optimizers = validation.check_optimizers(model, optimizer, settings.estimators)
        self._tokens = validation.check_batches(model, batches, settings.logits_fn)
        self.whole_map: BlockMap = classify(model, settings.rules, strict=settings.strict)  # with what is frozen
        self.block_map = self.whole_map.restricted_to(trained_parameters(model))
        self.blocks = validation.check_blocks(settings.blocks, self.block_map)
        self._method = validation.check_method(settings.method)
        self._settings = settings
        self._model = model
        self._batches = [Batch((), dict(batch)) for batch in batches]
        self._frequencies = token_frequencies(model, self.whole_map, self._batches, self.block_map.shapes)
        self._plan = _plan(settings, self.blocks)
        self._device = next(model.parameters()).device
        self._draws = Draws(shares=[tokens / sum(self._tokens) for tokens in self._tokens])
        self._done = 0

    def run(self) -> Generator[Progress]:
        """Run piece by piece; the model is in use between pieces, and released at the end or by `close()`.

        Yields:
            The progress after each piece.
        """
        self._check_hooks()
        # `gnb` runs in the model's own precision, the rest on a stand-in in float32 that stays open until the end.
        yield from self._run_gnb()
        if "gnb" not in self._plan.estimators and len(self._batches) > 1:
            self._weigh_batches()
        if set(self._plan.estimators) == {"gnb"}:
            return
        step = self._next_step()
        scales = preconditioner(self._model, self._optimizers) if "preconditioned" in self._plan.estimators else {}
        with open_hessian(
            self._model,
            self.block_map,
            self._batches,
            loss_fn=self._settings.loss_fn,
            method=self._method,
            shares=self._draws.shares,
        ) as hessian:
            second = SecondOrder(self._plan, self.block_map, hessian, self._draws, self._generator)
            for piece in second.run():
                yield self._progress(piece)
            for name, argument in (("direction", step), ("linesearch", step), ("preconditioned", scales)):
                if name in self._plan.estimators:
                    getattr(second, name)(argument)
                    yield self._progress(name)

    def _check_hooks(self) -> None:
        first, call = self._batches[0].prepared(), self._settings.loss_fn or self._settings.logits_fn
        require_hooked_weights(
            self._model, lambda live: call(live, first) if call else live(*first.args, **first.kwargs)
        )

    def report(self) -> SharpnessReport:
        """Summarize the draws so far."""
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
            seed=self._settings.seed,
            cost=draws.cost,
            unreached=self._unreached(),
            objective=draws.objective,
            embedding_rows=draws.embedding_rows(self._frequencies) if draws.gnb and EMBEDDING in self.blocks else None,
        )

    def state_dict(self) -> dict[str, Any]:
        """All draws so far as values for JSON, with a fingerprint of the inputs."""
        return {"of": self._fingerprint(), "found": self._draws.to_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state`; draws, precision and estimators may differ from those it was saved with.

        Args:
            state: What `state_dict` returned.

        Raises:
            ProbeError: The state was drawn with another seed or method, or from other weights, batches or blocks.
        """
        for name, own in self._fingerprint().items():
            theirs = state.get("of", {}).get(name)
            if theirs != own:
                raise ProbeError(f"the state belongs to another measurement: its {name} is {theirs}, expected {own}")
        self._draws = Draws.from_dict(state["found"])
        draws, first = self._draws, "lanczos" in self._plan.estimators
        # Pieces that the state has; `total` counts them too.
        self._done = len(self._batches) * bool(draws.gnb) + len(draws.ends)
        self._done += sum(map(len, draws.hutchinson.values())) + sum(len(s) - first for s in draws.spectra.values())

    def _fingerprint(self) -> dict[str, Any]:
        hashes = validation.fingerprint(self._model, self.block_map, self._batches)
        return {"seed": self._settings.seed, "method": self._method, **hashes}

    def _run_gnb(self) -> Generator[Progress]:
        drawn = self._draws.gnb
        row_groups = self._frequencies.rows if isinstance(self._frequencies, Frequencies) else None
        while "gnb" in self._plan.estimators and (count := self._missing_gnb_draws()):
            new_draws: DrawValues = [[] for _ in range(count)]
            new_rows: DrawValues = [[] for _ in range(count if row_groups else 0)]
            samples: list[GnbSample] = []
            for index, (batch, share) in enumerate(zip(self._batches, self._draws.shares, strict=True)):
                sample = gnb_probe(
                    self._model,
                    self.block_map,
                    batch,
                    draws=count,
                    generator=self._generator("gnb", index, len(drawn)),
                    row_groups=row_groups,
                    logits_fn=self._settings.logits_fn,
                    loss_fn=self._settings.loss_fn,
                )
                samples.append(sample)
                for row, trace in zip(new_draws, sample.traces.tolist(), strict=True):
                    row.append(trace)
                if sample.row_traces is not None:
                    for row, traces in zip(new_rows, sample.row_traces.tolist(), strict=True):
                        row.append(traces)
                self._draws.add_cost("gnb", Cost(share, share * count))
                yield self._progress("gnb")
            drawn += new_draws
            self._draws.gnb_rows += new_rows
            self._note_objective(samples)

    def _note_objective(self, samples: Sequence[GnbSample]) -> None:
        """Take the weights of the batches, and the loss in words, from what was found of it."""
        self._tokens = [sample.tokens for sample in samples]
        self._set_shares([sample.share for sample in samples])
        self._draws.objective = "; ".join(dict.fromkeys(str(sample.objective) for sample in samples))

    def _weigh_batches(self) -> None:
        """Find what the batches count beside each other, where `gnb` does not: by a forward on two rows.

        A loss that is not known has been weighed by labels and rows.
        """
        weighing = Weighing(self._settings.loss_fn)
        with isolated(self._model) as live:
            found = [weighing.weigh(live, live.inner, batch.prepared()) for batch in self._batches]
        if all(each is not None for each in found):
            self._tokens = [each.tokens for each in found if each is not None]
            self._set_shares([each.share for each in found if each is not None])
        self._draws.objective = weighing.objective
        rows = sum(batch.rows for batch in self._batches)
        self._draws.add_cost("weighing", Cost(forwards=weighing.rows / rows))

    def _set_shares(self, weights: Sequence[float]) -> None:
        self._draws.shares = [weight / math.fsum(weights) for weight in weights]

    def _missing_gnb_draws(self) -> int:
        """Number of draws to take next; each covers all blocks."""
        count = len(self._draws.gnb)
        if count < self._plan.draws:
            return self._plan.draws - count
        # One backward draws for every block, so the least precise one decides for all.
        unfinished = any(self._plan.wants(self._gnb_trace(block), count) for block in self.blocks)
        return min(_DRAWS_PER_FORWARD, self._plan.max_draws - count) if unfinished else 0

    def _gnb_trace(self, block: str) -> PooledEstimate:
        return self._draws.gnb_trace([i for i, b in enumerate(self.block_map.layer_blocks) if b.type == block])

    def _unreached(self) -> dict[str, str]:
        """For each block whose trace is less precise than requested, the reason."""
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
            return f"{shortfall}: the batches differ by more than that, pass more batches"
        return f"{shortfall}, with max_draws={self._plan.max_draws}"

    def _next_step(self) -> dict[str, Tensor]:
        """The optimizer's next step on the mean gradient of all batches."""
        if not {"direction", "linesearch"} & set(self._plan.estimators):
            return {}
        mean: dict[str, Tensor] = {}
        with isolated(self._model, exact=True) as live:
            objective = Objective(live, self._batches, self._settings.loss_fn, self._draws.shares)
            for index, share in enumerate(objective.shares):
                # Weighted by positions, as the gradient of all batches as one would be.
                for name, gradient in objective.gradient(index, list(live.trainable)).items():
                    mean[name] = mean.get(name, 0) + share * gradient
            self._draws.add_cost("step", objective.cost)
        return next_step(self._model, self._optimizers, mean)

    def _generator(self, *key: object) -> torch.Generator:
        """A random generator that depends on the seed and `key` alone, not on earlier draws."""
        digest = hashlib.sha256("/".join(map(str, (self._settings.seed, *key))).encode()).digest()
        return torch.Generator(self._device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def _progress(self, what: str) -> Progress:
        self._done += 1
        return Progress(self._done, self._total_pieces(), what)

    def _total_pieces(self) -> int | None:
        plan, count = self._plan, {"gnb": len(self._batches)}
        if plan.precision is not None:
            return None
        count |= {"lanczos": len(plan.spectra), "hutchinson": plan.draws * len(plan.blocks)}
        first = "lanczos" in plan.estimators  # its own start counts as one spectral draw
        count |= {"spectrum": (plan.draws - first) * len(plan.spectra)}
        return sum(count.get(name, 1) for name in plan.estimators)


def _plan(settings: Settings, blocks: Sequence[str]) -> Plan:
    precision = settings.precision
    return Plan(
        estimators=tuple(settings.estimators),
        blocks=blocks,
        # Eigenvalues of the whole model do not add up from those of blocks, so they take products of their own.
        spectra=(*blocks, *((WHOLE_MODEL,) if settings.blocks is None else ())),
        draws=settings.draws,
        # `draws` are taken in any case.
        max_draws=max(settings.draws, settings.max_draws),
        precision=precision,
        tolerance=_RESIDUAL_TOLERANCE if precision is None else min(precision, _MAX_TOP_TOLERANCE),
        bottom_tolerance=_RESIDUAL_TOLERANCE if precision is None else max(precision, _MIN_BOTTOM_TOLERANCE),
        losses=settings.method == "auto",
    )
