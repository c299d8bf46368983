"""Probes as the agent runs them: turns, warm starts, what is kept, and what looks at the step itself."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from stand_ins import Net

from sharpwatch.agent.hooks import Hook
from sharpwatch.agent.probes import builtin, out_of_memory
from sharpwatch.agent.probes.context import ProbeContext, ProbedStep
from sharpwatch.agent.probes.gnb import Gnb
from sharpwatch.agent.probes.runner import ProbeRunner
from sharpwatch.blocks import classify
from sharpwatch.curvature.estimators.hutchinson import HutchinsonSample
from sharpwatch.curvature.estimators.lanczos import LanczosSample
from sharpwatch.curvature.estimators.preconditioned import PreconditionedSample
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.statistics.sketch import CountSketch
from sharpwatch.errors import ProbeError

TOKENS = torch.arange(40).view(8, 5) % 11
BATCH = Batch((TOKENS, TOKENS.roll(1, 1)))
ROWS = nullcontext(BATCH)


@pytest.fixture
def context():
    torch.manual_seed(3)
    model = Net().train()
    block_map = classify(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    source = torch.Generator().manual_seed(0)
    return ProbeContext(model, block_map, (optimizer,), CountSketch(block_map, 64), source, None, None)


@pytest.fixture
def step(context):
    """A step, taken."""
    step = ProbedStep(context)
    step.keep_weights()
    context.model(*BATCH.args)[1].backward()
    context.optimizers[0].step()
    return step


def runner(context, *probes):
    return ProbeRunner(probes, context.model, context.block_map, context.optimizers, seed=0, sketch_size=64)


@pytest.mark.parametrize("kind", builtin.PROBES)
def test_each_kind_brings_a_report_of_every_block_in_its_turns(context, step, kind):
    probe = builtin.PROBES[kind].runner(context)
    reports = [probe.run(ROWS, step) for _ in range(9)]
    samples = [getattr(report, "sample", report) for report in reports]
    if kind == "gradient_noise":  # it takes no rows, and no gradient was read
        assert all(sample.noise is None for sample in samples)
        return
    assert all(sample.rows == 8 for sample in samples)
    if kind in {"hutchinson", "lanczos"}:
        asked = {sample.block for sample in samples}
    elif kind in {"direction", "linesearch"}:
        columns = [getattr(sample, "block_curvature", getattr(sample, "block_sharpness", None)) for sample in samples]
        asked = {context.blocks[int(column.isfinite().nonzero())] for column in columns}
    else:
        return
    assert asked >= {"emb", "norm", "head"}


def test_the_step_is_what_the_optimizer_did_and_is_worked_out_once(context, step):
    kept = {name: weight.clone() for name, weight in step._weights.items()}
    after = context.weights
    moved = step.displacement
    assert step.displacement is moved
    assert all(torch.equal(moved[name], kept[name] - after[name]) for name in kept)
    assert step._weights == {}  # no second copy
    with pytest.raises(RuntimeError, match="could not be copied"):
        _ = ProbedStep(context).displacement


def test_the_update_ratio_is_that_of_each_block(context, step):
    report = builtin.DirectionProbe(context).run(ROWS, step)
    views = zip(
        context.block_map.block_of,
        context.block_map.views(step.displacement),
        context.block_map.views(context.weights),
        strict=True,
    )
    squares = torch.zeros(2, len(context.block_map.blocks), dtype=torch.float64)
    for index, moved, weight in views:
        squares[:, index] += torch.stack([moved.double().square().sum(), weight.double().square().sum()])
    assert report.update_ratio == pytest.approx((squares[0] / squares[1]).sqrt().numpy(), rel=1e-6)


def test_a_frozen_block_has_no_turn(context, step):
    context.model.wte.requires_grad_(False)
    assert context.blocks == ("norm", "head")
    probe = builtin.HutchinsonProbe(context)
    assert {probe.run(ROWS, step).block for _ in range(4)} <= {"norm", "head"}


class Asked:
    """Takes a probe's place, and remembers what it was asked."""

    def __init__(self, answer):
        self.calls = []
        self._answer = answer

    def __call__(self, model, block_map, part, *rest, **asked):
        del model, block_map, part, rest
        self.calls.append(asked)
        return self._answer(len(self.calls), asked)


def test_hutchinson_goes_where_the_relative_error_is_worst(context, step, monkeypatch):
    spread = {"emb": 0.1, "norm": 2.0, "head": 0.5}

    def answer(number, asked):
        noise = torch.randn(2, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        draws = 10 + spread[asked["block"]] * noise
        traces = torch.zeros(2, 3, dtype=torch.float64)
        traces[:, 0] = draws
        return HutchinsonSample(asked["block"], 8, 8, traces, "autograd")

    asked = Asked(answer)
    monkeypatch.setattr(builtin, "hutchinson_probe", asked)
    probe = builtin.HutchinsonProbe(context)
    for _ in range(27):
        probe.run(ROWS, step)
    blocks = [call["block"] for call in asked.calls]
    assert set(blocks[:3]) == set(spread)  # what was never measured comes first
    assert blocks[3] == "norm"
    assert blocks.count("norm") > 27 / 3
    assert all(block in blocks[first : first + 9] for first in range(18) for block in spread)  # none waits for long


def test_a_trace_that_is_not_finite_does_not_count(context, step, monkeypatch):
    def answer(number, asked):
        value = math.nan if number == 1 else 1.0
        return HutchinsonSample(asked["block"], 8, 8, torch.full((2, 3), value, dtype=torch.float64), "autograd")

    monkeypatch.setattr(builtin, "hutchinson_probe", Asked(answer))
    probe = builtin.HutchinsonProbe(context)
    assert [probe.run(ROWS, step).block for _ in range(4)] == ["emb", "emb", "norm", "head"]


def lanczos(residuals):
    """Answers with these top residuals, of an eigenvalue of 1."""

    def answer(number, asked):
        vectors = torch.full((2, 4), float(number))
        residual = residuals.get(number, 0.01)
        return LanczosSample(asked["block"], 8, 8, 1.0, residual, -1.0, 0.5, 6, "autograd", vectors)

    return Asked(answer)


def test_lanczos_stays_at_a_block_until_its_top_has_settled_and_goes_on_from_its_vectors(context, step, monkeypatch):
    asked = lanczos({1: 0.3, 2: 0.06})
    monkeypatch.setattr(builtin, "lanczos_probe", asked)
    probe = builtin.LanczosProbe(context)
    samples = [probe.run(ROWS, step) for _ in range(6)]
    assert [call["block"] for call in asked.calls] == ["emb", "emb", "emb", "norm", "head", ""]
    starts = [call["start"] for call in asked.calls]
    assert [None if start is None else float(start[0, 0]) for start in starts] == [None, 1.0, 2.0, None, None, None]
    assert all(sample.vectors.numel() == 0 for sample in samples)  # they are not kept pending


def test_lanczos_goes_on_after_six_probes_and_after_one_that_fails(context, step, monkeypatch):
    asked = lanczos(dict.fromkeys(range(1, 9), 0.9))
    monkeypatch.setattr(builtin, "lanczos_probe", asked)
    probe = builtin.LanczosProbe(context)
    for _ in range(7):
        probe.run(ROWS, step)
    assert [call["block"] for call in asked.calls] == ["emb"] * 6 + ["norm"]
    monkeypatch.setattr(builtin, "lanczos_probe", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        probe.run(ROWS, step)
    monkeypatch.setattr(builtin, "lanczos_probe", asked)
    probe.run(ROWS, step)
    assert (asked.calls[-1]["block"], asked.calls[-1]["start"]) == ("head", None)


def test_the_preconditioned_probe_goes_on_from_its_vector_unless_that_says_nothing(context, step, monkeypatch):
    def answer(number, _):
        vector = torch.full((4,), math.nan if number == 2 else float(number))
        return PreconditionedSample(8, 8, 0.5, 0.01, 6, "autograd", vector)

    asked = Asked(answer)
    monkeypatch.setattr(builtin, "preconditioned_probe", asked)
    probe = builtin.PreconditionedProbe(context)
    samples = [probe.run(ROWS, step) for _ in range(3)]
    assert [call["start"] is None for call in asked.calls] == [True, False, True]
    assert all(sample.vector.numel() == 0 for sample in samples)


def test_what_was_done_before_the_step_is_the_probes_time(context):
    probes = runner(context, "gnb", "linesearch")
    names = probes.names
    captured = probes.capture(BATCH.args, {})
    probes.forward(names)
    context.model(*BATCH.args)[1].backward()
    step = probes.before_step(names)
    assert set(step.seconds) == {"gnb", "linesearch"}
    context.optimizers[0].step()
    gradients = {name: parameter.grad for name, parameter in context.model.named_parameters()}
    step.seconds = {"linesearch": 1000.0}
    run = probes.run(names, captured, step)
    assert list(run.reports) == ["gnb", "linesearch"]
    assert run.seconds["linesearch"] > 1000 > run.seconds["gnb"]
    assert torch.equal(run.reports["gnb"].gradient_sketch, probes._context.sketcher.sketch(gradients))
    assert (run.reports["gnb"].sample.rows, run.reports["linesearch"].rows) == (1, 2)


def test_a_sketched_gradient_is_that_which_is_stepped_on(context, step):
    def sketched():
        probe = Gnb(context)
        probe.before_step(step)
        return probe.run(ROWS, step).gradient_sketch

    gradients = {name: parameter.grad.clone() for name, parameter in context.model.named_parameters()}
    context.model.wte.weight.grad = context.model.wte.weight.grad.to_sparse()
    torch.testing.assert_close(sketched(), context.sketcher.sketch(gradients))
    context.model.ln_f.zero_grad()
    assert sketched()[context.block_map.blocks.index("norm")].eq(0).all()


def test_a_sketch_is_of_its_own_step_alone(context, step):
    probe = Gnb(context)
    probe.before_step(step)
    assert probe.run(ROWS, step).gradient_sketch is not None
    assert probe.run(ROWS, step).gradient_sketch is None
    probe.before_step(step)
    probe.discard()
    assert probe.run(ROWS, step).gradient_sketch is None


class OnDevice(torch.Tensor):
    """As if it lay on an accelerator."""

    def cpu(self):
        return self.as_subclass(torch.Tensor).clone()


def test_what_is_kept_from_probe_to_probe_is_kept_on_the_host(context, step, monkeypatch):
    def lanczos_answer(_, asked):
        vectors = torch.ones(2, 4).as_subclass(OnDevice)
        return LanczosSample(asked["block"], 8, 8, 1.0, 0.9, -1.0, 0.5, 6, "autograd", vectors)

    def preconditioned_answer(*_):
        return PreconditionedSample(8, 8, 0.5, 0.01, 6, "autograd", torch.ones(4).as_subclass(OnDevice))

    for name, answer in (("lanczos", lanczos_answer), ("preconditioned", preconditioned_answer)):
        asked = Asked(answer)
        monkeypatch.setattr(builtin, f"{name}_probe", asked)
        probe = builtin.PROBES[name].runner(context)
        for _ in range(2):
            probe.run(ROWS, step)
        assert type(asked.calls[1]["start"]) is torch.Tensor


def test_the_weights_are_copied_only_where_the_step_keeps_room(context, monkeypatch):
    weights = sum(weight.nbytes for weight in context.weights.values())

    def copied():
        step = ProbedStep(context)
        step.keep_weights()
        return step._weights

    for copies, stepped in ((5, False), (3, True)):
        monkeypatch.setattr(out_of_memory, "free", lambda _, room=copies: room * weights)
        assert copied().keys() == context.weights.keys()
        monkeypatch.setattr(out_of_memory, "free", lambda _, room=copies: room * weights - 1)
        with pytest.raises(ProbeError, match="no copy of the weights"):
            copied()
        if not stepped:
            context.model(*BATCH.args)[1].backward()
            context.optimizers[0].step()


def test_ranks_probe_together_only_where_the_step_and_more_gradients_would_fit(context, monkeypatch):
    weights, peak = sum(weight.nbytes for weight in context.weights.values()), 1000
    probes = runner(context)
    monkeypatch.setattr(out_of_memory, "given_back", lambda _: peak)
    monkeypatch.setattr(out_of_memory, "free", lambda _: 3 * weights + peak)
    assert probes.has_room()
    monkeypatch.setattr(out_of_memory, "free", lambda _: 3 * weights + peak - 1)
    assert not probes.has_room()


def test_nothing_is_done_while_a_cuda_graph_is_captured(monkeypatch):
    calls = []
    hook = Hook(calls.append)
    capturing = [False, True]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", capturing.pop)
    hook("captured")
    hook("seen")
    assert calls == ["seen"]
