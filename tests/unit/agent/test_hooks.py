"""`step(closure)` is watched as a step whose gradients were there before it."""

from __future__ import annotations

import sys
import traceback

import numpy as np
import pytest
import torch
from stand_ins import Net
from torch import nn

import sharpwatch
from sharpwatch.agent import hooks, safety
from sharpwatch.agent.control.lr_multipliers import ParamGroupOverride
from sharpwatch.agent.probes.builtin import PROBES
from sharpwatch.agent.probes.gnb import Gnb
from sharpwatch.agent.probes.runner import ProbeRunner
from sharpwatch.agent.statistics.tap import Tap
from sharpwatch.v1 import types_pb2

EXACT = {"emb": 0.5, "norm": 2.0, "head": 0.25}  # powers of two: what is scaled and scaled back is as it was


class Output(Net):
    """Its loss is its own to tell."""

    def forward(self, idx):
        logits, loss = super().forward(idx, idx)
        return {"logits": logits, "loss": loss}


def tokens(step):
    return torch.randint(11, (8, 5), generator=torch.Generator().manual_seed(step))


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.0625)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.0625, momentum=0.9)


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters, lr=0.125, max_iter=4, history_size=3)


def lbfgs_with_line_search(parameters):
    return torch.optim.LBFGS(parameters, max_iter=4, history_size=3, line_search_fn="strong_wolfe")


class Twice(torch.optim.SGD):
    """Sharpness-aware: it steps by the gradient at the weights to which the first one leads."""

    @torch.no_grad()
    def step(self, closure):
        evaluate = torch.enable_grad()(closure)
        loss = evaluate()
        before = [parameter.clone() for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.add_(parameter.grad, alpha=0.1)
        evaluate()
        for parameter, old in zip(self.parameters, before, strict=True):
            parameter.copy_(old)
            parameter.sub_(parameter.grad, alpha=0.0625)
        return loss

    @property
    def parameters(self):
        return [parameter for group in self.param_groups for parameter in group["params"]]


def twice(parameters):
    return Twice(parameters, lr=0.0625)


class Run:
    """A watched model, and its loop's step."""

    def __init__(self, transports, make=adamw, **options):
        torch.manual_seed(3)
        self.model = Output().train()
        self.optimizer = make(self.model.parameters())
        self.watch = sharpwatch.attach(
            self.model, self.optimizer, training_job="closures", transport=transports.new(), **{"probes": ()} | options
        )
        self.transport = transports[-1]
        self.losses = []  # of each evaluation

    def backward(self, step):
        self.optimizer.zero_grad()
        loss = self.model(tokens(step))["loss"]
        loss.backward()
        self.losses.append(loss.item())
        return loss

    def closure(self, step):
        return lambda: self.backward(step)

    def end(self):
        """Its samples, with nothing in them that was measured in seconds."""
        assert self.watch._watched.barrier.swallowed == 0
        # A step of one micro-batch has no gradient noise.
        assert {each.probe for each in self.watch._watched.scheduler.runner.failures} <= {"gradient_noise"}
        self.watch.close()
        samples = [sample for sample in self.transport.samples if not sample.closing]
        for sample in samples:
            sample.ClearField("health")
            sample.taken_at_unix_ns = 0
            for probe in filter(sample.HasField, PROBES):
                getattr(sample, probe).seconds = 0.0
        return samples


def norms(sample):
    return np.frombuffer(sample.tap.gradient_norm.data, "<f4")


def norms_now(model):
    """By layer block: each parameter of this model is one."""
    return [parameter.grad.norm().item() for parameter in (model.wte.weight, *model.ln_f.parameters())]


WAYS = {
    "positional": lambda optimizer, closure: optimizer.step(closure),
    "keyword": lambda optimizer, closure: optimizer.step(closure=closure),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [adamw, sgd])
def test_samples_are_those_of_gradients_computed_before(transports, make, way):
    probes = PROBES if make is adamw else [*PROBES][:-1]  # the last is for Adam alone
    ours, theirs = (Run(transports, make, probes=probes, probe_every=2, on_rollback=print) for _ in range(2))
    for run in (ours, theirs):
        run.transport.command(id="a", apply_at_step=3, set_multipliers=types_pb2.MultiplierSet(multipliers=EXACT))
    for step in range(1, 7):
        WAYS[way](ours.optimizer, ours.closure(step))
        theirs.backward(step)
        theirs.optimizer.step(closure=None)
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(one, other)
    ours, theirs = ours.end(), theirs.end()
    assert ours == theirs
    assert [sample.step for sample in ours] == list(range(1, 7))
    assert [all(map(sample.HasField, probes)) for sample in ours] == [False, True] * 3
    assert all(sample.HasField("loss") for sample in ours)


@pytest.mark.parametrize("make", [lbfgs, lbfgs_with_line_search, twice])
def test_of_several_evaluations_the_first_is_the_steps(transports, make):
    run = Run(transports, make, probes=("gnb", "direction"), probe_every=1)
    first, evaluations = {}, []
    for step in range(1, 4):

        def closure(step=step):
            loss = run.backward(step)
            evaluations.append(step)
            if step not in first:
                first[step] = loss.item(), norms_now(run.model)
            run.watch.observe(loss=loss)
            return loss

        assert run.optimizer.step(closure).item() == first[step][0]
    assert all(evaluations.count(step) > 1 for step in first)
    samples = run.end()
    assert [sample.loss for sample in samples] == [loss for loss, _ in first.values()]
    for sample, (_, expected) in zip(samples, first.values(), strict=True):
        # The model's norm is two parameters in one block.
        shown = norms(sample)
        np.testing.assert_allclose(shown[:2], [expected[0], np.hypot(*expected[1:])], rtol=1e-6)
    assert all(sample.HasField("gnb") and sample.HasField("direction") for sample in samples)
    assert all(np.isfinite(sample.direction.descent) and sample.direction.descent != 0 for sample in samples)


def test_micro_batches_of_a_closure_tell_the_gradient_noise(transports):
    runs = [Run(transports, probes=("gradient_noise",), probe_every=1) for _ in range(2)]

    def accumulate(run):
        run.optimizer.zero_grad()
        for part in range(3):
            (run.model(tokens(part))["loss"] / 3).backward()

    runs[0].optimizer.step(lambda: accumulate(runs[0]))
    accumulate(runs[1])
    runs[1].optimizer.step()
    ours, theirs = (run.end()[0].gradient_noise for run in runs)
    assert ours == theirs
    assert (np.frombuffer(ours.noise.data, "<f4") > 0).all()


def test_the_closure_sees_the_groups_that_its_user_made(transports):
    run, seen = Run(transports, sgd), []
    run.transport.command(id="a", apply_at_step=2, set_multipliers=types_pb2.MultiplierSet(multipliers=EXACT))
    (own,) = run.optimizer.param_groups
    for step in range(1, 4):

        def closure(step=step):
            seen.append(run.optimizer.param_groups[0] is own and len(run.optimizer.param_groups) == 1)
            own["lr"] = 0.5**step  # in force at this very step
            return run.backward(step)

        before = [parameter.clone() for parameter in run.model.parameters()]
        momenta = [run.optimizer.state[p].get("momentum_buffer", torch.zeros(())).clone() for p in own["params"]]
        run.optimizer.step(closure)
        factors = [1.0] * 4 if step == 1 else [EXACT[block] for block in ("emb", "norm", "norm", "head")]
        for parameter, old, momentum, factor in zip(own["params"], before, momenta, factors, strict=True):
            assert torch.equal(parameter, old - 0.5**step * factor * (0.9 * momentum + parameter.grad))
        assert own["lr"] == 0.5**step
    assert seen == [True] * 3
    rates = [np.frombuffer(sample.tap.learning_rate.data, "<f4").tolist() for sample in run.end()]
    scaled = [EXACT[block.block] for block in run.transport.hello.layer_blocks]
    assert rates == [[0.5] * 3, [0.25 * factor for factor in scaled], [0.125 * factor for factor in scaled]]


@pytest.mark.parametrize("make", [adamw, lbfgs])
def test_the_loss_that_step_returns_may_be_observed_after_it(transports, make):
    class Silent(Net):
        def forward(self, idx):
            return super().forward(idx, idx)[1][None]

    torch.manual_seed(3)
    model = Silent().train()
    optimizer = make(model.parameters())
    watch = sharpwatch.attach(model, optimizer, training_job="closures", transport=transports.new(), probes=())

    def closure():
        optimizer.zero_grad()
        loss = model(tokens(1)).sum()
        loss.backward()
        return loss

    returned = []
    for _ in range(3):
        returned.append(optimizer.step(closure).item())
        watch.observe(loss=returned[-1])
    watch.close()
    assert [sample.loss for sample in transports[0].samples[:3]] == returned


def test_the_seconds_of_a_closure_are_the_loops(transports, monkeypatch):
    now, recorded = [0.0], []
    monkeypatch.setattr(safety, "perf_counter", lambda: now[0])
    run = Run(transports, lbfgs)
    run.watch._watched.scheduler.budget.record = lambda *seconds: recorded.append(seconds)

    def closure():
        now[0] += 1.0
        return run.backward(1)

    for _ in range(3):
        run.optimizer.step(closure)
    evaluations = len(run.losses) // 3
    assert evaluations > 1
    assert recorded == [(evaluations - 1.0, 0.0, {}), *[(float(evaluations), 0.0, {})] * 2]  # from the first forward on
    run.end()


class OwnError(Exception):
    """The user's."""


@pytest.mark.parametrize("multipliers", [{}, EXACT])
def test_what_a_closure_raises_reaches_the_loop_as_it_was(transports, multipliers):
    run, plain = Run(transports), Run(transports)
    for each in (run, plain):
        each.transport.command(
            id="a", apply_at_step=1, set_multipliers=types_pb2.MultiplierSet(multipliers=multipliers)
        )
    error = OwnError()

    def failing():
        run.backward(2)
        raise error

    run.optimizer.step(run.closure(1))
    with pytest.raises(OwnError) as raised:
        run.optimizer.step(failing)
    assert raised.value is error
    assert error.__cause__ is error.__context__ is None
    assert traceback.extract_tb(error.__traceback__)[-1].name == "failing"
    assert len(run.optimizer.param_groups) == 1
    run.optimizer.step(run.closure(3))
    for step in (1, 3):
        plain.optimizer.step(plain.closure(step))
    ours, theirs = run.end(), plain.end()
    assert [sample.tap for sample in ours] == [sample.tap for sample in theirs]
    assert [sample.step for sample in ours] == [1, 2]


def test_the_closures_own_value_and_name_come_through(transports):
    run, value, called = Run(transports), object(), []

    class Odd(torch.optim.SGD):
        def step(self, closure):
            called.append(closure.__name__)
            return closure(1, more=2)

    optimizer = Odd(run.model.parameters(), lr=0.1)
    with sharpwatch.attach(
        run.model, optimizer, training_job="closures", transport=transports.new(), probes=()
    ) as watch:
        called.clear()  # attach has stepped copies

        def named(*args, **kwargs):
            called.append((args, kwargs))
            return value

        assert optimizer.step(named) is value
        assert called == ["named", ((1,), {"more": 2})]
        assert watch.step == 1
        with pytest.raises(TypeError):
            optimizer.step()
    run.watch.close()


class Never(torch.optim.SGD):
    """It evaluates no closure."""

    @torch.no_grad()
    def step(self, closure=None):
        del closure
        for parameter in self.param_groups[0]["params"]:
            parameter.mul_(0.9)


def test_a_closure_that_is_never_evaluated_shows_no_reading(transports):
    run = Run(transports, lambda parameters: Never(parameters, lr=0.1), probes=("gnb", "direction"), probe_every=1)
    run.backward(0)
    run.optimizer.step(run.closure(1))
    run.optimizer.step()
    first, second = run.end()
    assert not first.HasField("tap")
    assert not any(map(first.HasField, PROBES))
    assert second.HasField("tap")


def test_a_closure_without_gradients_breaks_nothing(transports):
    class Zeroth(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure):
            return closure()

    run = Run(transports, lambda parameters: Zeroth(parameters, lr=0.1), probes=("gnb", "direction"), probe_every=1)
    for step in (1, 2):
        run.optimizer.step(lambda step=step: run.model(tokens(step))["loss"])
    samples = run.end()
    assert [norms(sample).tolist() for sample in samples] == [[0.0] * 3] * 2
    assert not any(sample.HasField(probe) for sample in samples for probe in PROBES)


def half(model):
    embedding = list(model.wte.parameters())
    return embedding, [parameter for parameter in model.parameters() if parameter is not embedding[0]]


def test_two_optimizers_with_closures_step_together(transports):
    def pair(closures):
        torch.manual_seed(3)
        model = Output().train()
        optimizers = [make(parameters) for make, parameters in zip((sgd, adamw), half(model), strict=True)]
        options = {"probes": ("gnb", "direction"), "probe_every": 2}
        watch = sharpwatch.attach(model, optimizers, training_job="closures", transport=transports.new(), **options)

        def backward(step):
            loss = model(tokens(step))["loss"]
            loss.backward()
            return loss

        for step in range(1, 5):
            model.zero_grad()
            if closures:
                optimizers[0].step(lambda step=step: backward(step))
                optimizers[1].step(lambda: None)  # its gradients are there
            else:
                backward(step)
                optimizers[0].step()
                optimizers[1].step()
        assert watch.step == 4
        assert watch._watched.barrier.swallowed == 0
        watch.close()
        return [(s.tap, s.loss, s.gnb.traces, s.direction.descent) for s in transports[-1].samples if not s.closing]

    assert pair(closures=True) == pair(closures=False)


def test_a_closure_may_step_another_watched_optimizer(transports):
    torch.manual_seed(3)
    model = Output().train()
    outer, inner = (sgd(parameters) for parameters in half(model))
    watch = sharpwatch.attach(
        model, [outer, inner], training_job="closures", transport=transports.new(), probes=("gnb",), probe_every=1
    )
    transports[0].command(id="a", apply_at_step=2, set_multipliers=types_pb2.MultiplierSet(multipliers=EXACT))

    def closure():
        model.zero_grad()
        model(tokens(1))["loss"].backward()
        inner.step()

    for _ in range(3):
        outer.step(closure)
    assert watch.step == 3
    assert [len(optimizer.param_groups) for optimizer in (outer, inner)] == [1, 1]
    assert watch._watched.barrier.swallowed == 0
    watch.close()
    assert [sample.HasField("tap") for sample in transports[0].samples] == [True] * 3 + [False]


def test_a_step_that_hands_its_closure_to_another_hooked_step_is_read_once(transports):
    class Wrapping(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # torch hooks the class's step when the first one is made
    wrapped, plain = (
        Run(transports, lambda p: Wrapping(p, lr=0.1)),
        Run(transports, lambda p: torch.optim.SGD(p, lr=0.1)),
    )
    for run in (wrapped, plain):
        run.optimizer.step(run.closure(1))
        run.backward(2)
        run.optimizer.step()
    assert wrapped.end() == plain.end()


def test_a_step_that_raised_is_read_anew(transports):
    run, plain = Run(transports), Run(transports)
    run.backward(7)
    handle = run.optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.optimizer.step()
    handle.remove()
    for each in (run, plain):
        each.backward(1)
        each.optimizer.step()
    assert [sample.tap for sample in run.end()] == [sample.tap for sample in plain.end()]


def test_a_watch_may_be_closed_in_a_closure(transports, monkeypatch):
    groups = []
    module = sys.modules[torch.optim.SGD.__module__]  # torch.optim hides it
    update = module.sgd

    def counting(*args, **kwargs):  # SGD calls it once for each group
        groups[-1] += 1
        return update(*args, **kwargs)

    monkeypatch.setattr(module, "sgd", counting)
    run = Run(transports, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    run.transport.command(id="a", set_multipliers=types_pb2.MultiplierSet(multipliers=EXACT))
    for step in (1, 2):
        groups.append(0)
        run.optimizer.step(run.closure(step))

    def closing():
        run.watch.close()
        return run.backward(3)

    groups.append(0)
    run.optimizer.step(closing)
    assert groups == [1, 3, 1]
    assert run.watch.step == 2
    assert run.transport.samples[-1].closing


def broken(*_, **__):
    raise ZeroDivisionError("on purpose")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Tap, "start"),
        (Tap, "read"),
        (ParamGroupOverride, "apply"),
        (ParamGroupOverride, "restore"),
        (ProbeRunner, "forward"),
        (Gnb, "before_step"),
        (hooks, "replace_closure"),
    ],
)
def test_whatever_breaks_the_closure_is_evaluated_as_ever(transports, owner, name, monkeypatch):
    def train():
        run = Run(transports, lbfgs, probes=("gnb", "direction"), probe_every=1)
        returned = [run.optimizer.step(run.closure(step)).item() for step in range(3)]
        swallowed = run.watch._watched.barrier.swallowed
        run.watch.close()
        return swallowed, (returned, run.losses, [parameter.tolist() for parameter in run.model.parameters()])

    healthy = train()
    assert healthy[0] == 0
    monkeypatch.setattr(owner, name, broken)
    swallowed, result = train()
    assert swallowed >= 3
    assert result == healthy[1]


# torch's own words on what it compiles.
@pytest.mark.filterwarnings("ignore:.*autograd.profiler.record_function", "ignore:The .grad attribute of a Tensor that")
def test_a_compiled_step_is_what_it_is_without_sharpwatch(transports, monkeypatch):
    def train():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()  # other tests compile too
        run = Run(transports)
        step = torch.compile(run.optimizer.step, backend="eager")
        for number in range(3):
            step(run.closure(number))
        assert run.watch._watched is None or run.watch._watched.barrier.swallowed == 0
        run.watch.close()
        captured = torch._dynamo.utils.counters["stats"]["calls_captured"]
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        return captured, [parameter.tolist() for parameter in run.model.parameters()]

    captured, weights = train()
    monkeypatch.setenv("SHARPWATCH_DISABLED", "1")
    assert train() == (captured, weights)
    assert captured > 0


def test_transformed_and_traced_calls_are_left_alone(transports):
    """As in a loop with gradients for each row (torch.func), or one that exports its model."""
    model, transport = Output().train(), transports.new()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    watch = sharpwatch.attach(model, optimizer, training_job="job", transport=transport, probe_every=1)
    weights = {name: each.detach() for name, each in model.named_parameters()}

    def loss(weights, row):
        return torch.func.functional_call(model, weights, (row[None],))["loss"]

    for step in range(2):
        model(tokens(step))["loss"].backward()
        torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, tokens(step))
        torch.jit.trace(model, tokens(step), strict=False, check_trace=False)
        optimizer.step()
    watch.close()
    assert transport.samples[-1].health.swallowed_errors == 0
    assert [sample.HasField("gnb") for sample in transport.samples[:2]] == [True, True]
