"""What can happen to a training: faults with their cause and culprit, and disturbances of healthy runs.

The list was fixed before any threshold was chosen on it. A fault's parameters do not depend on its seed, but for the
layer and the block type where a kind has several: these go round with the seed, so that all occur.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.faults.training import LENGTH, ROWS, Disturbance, Step, Training

BLOCKS = ("emb", "qk", "vo", "ffn", "norm", "head")
ONSET = 241  # the first step of a fault that begins in the middle of a run
AFTER = 300  # steps from there on
DAMAGE = 300.0


@dataclass(frozen=True, slots=True)
class Kind:
    """A fault, or a disturbance of a healthy run.

    Attributes:
        name: Its name.
        make: Makes the disturbance for a block and a layer.
        cause: What is wrong: as incidents name it; "healthy" for nothing.
        blocks: The block types that it takes place in, by turns; empty where it has none.
        within: Steps after the onset within which it must be found.
        onset: The step at which it begins.
        schedule: The learning rate at each step as a share of the peak, where it is not the usual one.
        attached: The step after which the agent is attached.
    """

    name: str
    make: Callable[[str, int | None], Disturbance]
    cause: str
    blocks: tuple[str, ...] = ()
    within: int = 60
    onset: int = ONSET
    schedule: Callable[[int], float] | None = None
    attached: int = 0

    def place(self, model: str, seed: int, layers: int = 4) -> tuple[str, int | None]:
        """The block type and the layer for a model and a seed; ("", None) where the kind has none."""
        # GPT-2's head is its embedding.
        blocks = [block for block in self.blocks if (model, block) != ("gpt2", "head")]
        if not blocks:
            return "", None
        block = blocks[seed % len(blocks)]
        return block, None if block in {"emb", "head"} else (seed // len(blocks) + seed) % layers


def _rate(factor: Callable[[Step], float]) -> Disturbance:
    def plan(_: Training, step: Step) -> None:
        step.factor = factor(step)

    return Disturbance(plan=plan)


def _jump(factor: float) -> Callable[[str, int | None], Disturbance]:
    return lambda *_: _rate(lambda _: factor)


def _ramp(growth: float) -> Callable[[str, int | None], Disturbance]:
    return lambda *_: _rate(lambda step: growth ** (step.since + 1))


def _weight(change: Callable[[Tensor, Training], None]) -> Callable[[str, int | None], Disturbance]:
    """Change the weights of a block once, in place."""

    def make(block: str, layer: int | None) -> Disturbance:
        def begin(training: Training, _: Step) -> None:
            with torch.no_grad():
                change(training.weight(training.part(block, layer)), training)

        return Disturbance(begin=begin)

    return make


def _entry(weight: Tensor, training: Training) -> tuple[int, ...]:
    """The place of one entry, in the middle; of a table of tokens, in the row of one that occurs."""
    middle = [size // 2 for size in weight.shape]
    return tuple([training.frequent, *middle[1:]] if weight.shape[0] == training.vocabulary else middle)


def _set_large(weight: Tensor, training: Training) -> None:
    weight[_entry(weight, training)] = DAMAGE


def _flip(bit: int) -> Callable[[Tensor, Training], None]:
    def flip(weight: Tensor, training: Training) -> None:
        place = _entry(weight, training)
        (bits,) = struct.unpack("<I", struct.pack("<f", float(weight[place])))
        (value,) = struct.unpack("<f", struct.pack("<I", bits ^ (1 << bit)))
        weight[place] = value

    return flip


def _damaged_row(weight: Tensor, training: Training) -> None:
    row = _entry(weight, training)[0]
    scale = 10 * float(weight.std())
    weight[row] = scale * torch.randn(weight[row].shape, generator=training.noise)


def _dead_rows(weight: Tensor, _: Training) -> None:
    weight[: weight.shape[0] // 2] = 0.0


def _state(change: Callable[[dict[str, Tensor]], None]) -> Callable[[str, int | None], Disturbance]:
    def begin(training: Training, _: Step) -> None:
        for state in training.optimizer.state.values():
            change(state)

    return lambda *_: Disturbance(begin=begin)


def _zero_moments(state: dict[str, Tensor]) -> None:
    state["exp_avg"].zero_()
    state["exp_avg_sq"].zero_()


def _reset(state: dict[str, Tensor]) -> None:
    _zero_moments(state)
    state["step"].zero_()


def _setting(name: str, change: Callable[[object], object]) -> Callable[[str, int | None], Disturbance]:
    def begin(training: Training, _: Step) -> None:
        for group in training.optimizer.param_groups:
            group[name] = change(group[name])

    return lambda *_: Disturbance(begin=begin)


def _batch(change: Callable[[Training, Step, Tensor], None]) -> Callable[[str, int | None], Disturbance]:
    def batch(training: Training, step: Step) -> None:
        if step.tokens is not None:
            change(training, step, step.tokens)

    return lambda *_: Disturbance(batch=batch)


def _noise(training: Training, step: Step, tokens: Tensor) -> None:
    step.tokens = torch.randint(training.vocabulary, tokens.shape, generator=training.noise)


def _shuffled(rows: int) -> Callable[[Training, Step, Tensor], None]:
    def shuffle(training: Training, step: Step, tokens: Tensor) -> None:
        step.labels = tokens[:, 1:].clone()
        for row in range(rows):
            step.labels[row] = step.labels[row, torch.randperm(LENGTH, generator=training.noise)]

    return shuffle


def _stuck(training: Training, step: Step, tokens: Tensor) -> None:
    step.tokens = training.memory.setdefault("batch", tokens)


def _repeated(training: Training, step: Step, tokens: Tensor) -> None:
    """Twenty batches over and over, as a loader that restarts its shard."""
    kept = training.memory.setdefault("batches", [])
    if len(kept) < 20:
        kept.append(tokens)
    step.tokens = kept[step.since % 20] if len(kept) == 20 else tokens


def _shifted(_: Training, step: Step, tokens: Tensor) -> None:
    """Each position is to predict the token after the next."""
    step.labels = torch.cat([tokens[:, 2:], tokens[:, -1:]], 1)


def _gradient(
    change: Callable[[Tensor, Training], None], *, clipped: bool = False
) -> Callable[[str, int | None], Disturbance]:
    """Change the gradient of a block's largest part at every step."""

    def make(block: str, layer: int | None) -> Disturbance:
        def act(training: Training, _: Step) -> None:
            change(training.gradient(training.part(block, layer)), training)

        return Disturbance(clipped=act) if clipped else Disturbance(gradients=act)

    return make


def _noisy(gradient: Tensor, training: Training) -> None:
    spread = float(gradient.norm()) / math.sqrt(gradient.numel())
    gradient.add_(torch.randn(gradient.shape, generator=training.noise), alpha=3 * spread)


def _set_nan(gradient: Tensor, training: Training) -> None:
    gradient[_entry(gradient, training)] = math.nan


def _attention_jump(_: str, layer: int | None) -> Disturbance:
    def begin(training: Training, _: Step) -> None:
        _scale_queries(training, layer, 4.0)

    return Disturbance(begin=begin)


def _attention_growth(_: str, layer: int | None) -> Disturbance:
    def stepped(training: Training, _: Step) -> None:
        _scale_queries(training, layer, 1.02)

    return Disturbance(stepped=stepped)


@torch.no_grad()
def _scale_queries(training: Training, layer: int | None, factor: float) -> None:
    part = training.part("qk", layer)
    if training.name == "gpt2":  # fused: queries are the first half of the columns of queries and keys
        queries = training.weight(part)
        queries[:, : queries.shape[1] // 2].mul_(factor)
    else:
        dict(training.model.named_parameters())[part.parameter.replace("k_proj", "q_proj")].mul_(factor)


def _one_rank_wrong(_: str, __: int | None) -> Disturbance:
    """Half of the rows are another rank's, whose labels belong to other inputs."""
    return _batch(_shuffled(ROWS // 2))("", None)


def _coarse_norm(block: str, layer: int | None) -> Disturbance:
    """A norm's weights are kept with three bits of mantissa, as where a kernel loses precision."""

    @torch.no_grad()
    def stepped(training: Training, _: Step) -> None:
        weight = training.weight(training.part(block, layer))
        mantissa, exponent = torch.frexp(weight)
        weight.copy_(torch.ldexp(torch.round(mantissa * 8) / 8, exponent))

    return Disturbance(stepped=stepped)


INNER = ("qk", "vo", "ffn")
FAULTS = (
    Kind("rate-x3", _jump(3.0), "learning-rate"),
    Kind("rate-x10", _jump(10.0), "learning-rate"),
    Kind("rate-x30", _jump(30.0), "learning-rate"),
    Kind("rate-ramp-1", _ramp(1.01), "learning-rate", within=260),
    Kind("rate-ramp-2", _ramp(1.02), "learning-rate", within=260),
    Kind("no-warm-up", _jump(1.0), "learning-rate", within=260, onset=1, schedule=lambda _: 3.0),
    Kind("rate-0", _jump(0.0), "learning-rate"),
    Kind("weight-300", _weight(_set_large), "damaged-weight", BLOCKS),
    *(Kind(f"flip-{bit}", _weight(_flip(bit)), "damaged-weight", BLOCKS) for bit in range(23, 31)),
    Kind("damaged-row", _weight(_damaged_row), "damaged-weight", ("emb", "qk", "vo", "ffn", "head")),
    Kind("dead-rows", _weight(_dead_rows), "damaged-weight", ("qk", "vo", "ffn", "norm", "head")),
    Kind("moments-zeroed", _state(_zero_moments), "optimizer-state"),
    Kind("optimizer-reset", _state(_reset), "optimizer-state"),
    Kind("beta2-wrong", _setting("betas", lambda betas: (betas[0], 0.5)), "optimizer-state"),  # type: ignore[index]
    Kind("weight-decay-x100", _setting("weight_decay", lambda decay: 100 * decay), "optimizer-state"),  # type: ignore[operator]
    Kind("noise-batches", _batch(_noise), "data"),
    Kind("shuffled-labels", _batch(_shuffled(ROWS)), "data"),
    Kind("partly-shuffled", _batch(_shuffled(1)), "data"),
    Kind("stuck-loader", _batch(_stuck), "data"),
    Kind("repeated-data", _batch(_repeated), "data"),
    Kind("shifted-labels", _batch(_shifted), "data"),
    Kind("gradient-dead", _gradient(lambda gradient, _: gradient.zero_()), "silent", INNER),
    Kind("gradient-negated", _gradient(lambda gradient, _: gradient.neg_()), "instability", INNER),
    Kind("gradient-noisy", _gradient(_noisy), "instability", INNER),
    Kind("gradient-x10-clipped", _gradient(lambda g, _: g.mul_(10), clipped=True), "instability", INNER),
    Kind("attention-x4", _attention_jump, "damaged-weight", ("qk",)),
    Kind("attention-growth", _attention_growth, "instability", ("qk",), within=260),
    Kind("nan", _gradient(_set_nan), "non-finite", INNER),
    Kind("one-rank-wrong", _one_rank_wrong, "data"),
    Kind("coarse-norm", _coarse_norm, "damaged-weight", ("norm",)),
)


def _plan(change: Callable[[Step], None]) -> Callable[[str, int | None], Disturbance]:
    return lambda *_: Disturbance(plan=lambda _, step: change(step))


def _more_rows(step: Step) -> None:
    step.rows = 4 * ROWS


def _fewer_rows(step: Step) -> None:
    step.rows = ROWS // 3


def _domains(step: Step) -> None:
    step.domain = ("english", "code", "mixed")[step.since // 100 % 3]


def _lower_rate(step: Step) -> None:
    step.factor = 0.1


def _other_data(*_: object) -> Disturbance:
    def begin(training: Training, _: Step) -> None:
        training.data.manual_seed(9000 + training.seed)

    return Disturbance(begin=begin)


def _pauses(*_: object) -> Disturbance:
    """An evaluation at every 50th step, in evaluation mode and without gradients."""

    def stepped(training: Training, step: Step) -> None:
        if step.since % 50 == 0:
            training.model.eval()
            with torch.no_grad():
                training.model(input_ids=torch.randint(training.vocabulary, (ROWS, LENGTH), generator=training.noise))
            training.model.train()

    return Disturbance(stepped=stepped)


def _thawed(*_: object) -> Disturbance:
    """The first layer is frozen, and thawed after 100 steps: by its gradients, so that the optimizer goes on."""

    def gradients(training: Training, step: Step) -> None:
        if step.since < 100:
            for name, parameter in training.model.named_parameters():
                if ".0." in name:
                    parameter.grad = None

    return Disturbance(gradients=gradients)


def _cosine(step: int) -> float:
    end = ONSET + AFTER
    return min(1.0, step / 60) * 0.5 * (1 + math.cos(math.pi * min(step, end) / end))


def _restarts(step: int) -> float:
    return min(1.0, step / 60) * 0.5 * (1 + math.cos(math.pi * (step % ONSET) / ONSET))


HEALTHY = (
    Kind("plain", _plan(lambda _: None), "healthy"),
    Kind("warm-up-1000", _plan(lambda _: None), "healthy", onset=1, schedule=lambda step: min(1.0, step / 1000)),
    Kind(
        "attached-in-warm-up",
        _plan(lambda _: None),
        "healthy",
        onset=1,
        schedule=lambda step: min(1.0, step / 400),
        attached=100,
    ),
    Kind("cosine-end", _plan(lambda _: None), "healthy", onset=1, schedule=_cosine),
    Kind("warm-restart", _plan(lambda _: None), "healthy", onset=1, schedule=_restarts),
    Kind("batch-x4", _plan(_more_rows), "healthy"),
    Kind("batch-third", _plan(_fewer_rows), "healthy"),
    Kind("domain-shifts", _plan(_domains), "healthy"),
    Kind("resume", _plan(lambda _: None), "healthy"),
    Kind("evaluation-pauses", _pauses, "healthy"),
    Kind("other-data", _other_data, "healthy"),
    Kind("planned-lower-rate", _plan(_lower_rate), "healthy"),
    Kind("layers-thawed", _thawed, "healthy"),
)
KINDS = {kind.name: kind for kind in (*FAULTS, *HEALTHY)}
