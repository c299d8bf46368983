"""Which optimizers' groups can be split is shown at attach, and showing it leaves everything as it was."""

from __future__ import annotations

import copy
import functools
import random
import threading

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sharpwatch.agent.optimizers import split_check
from sharpwatch.agent.optimizers.split_check import stacked_state, unsafe_to_split


def parameters(dtype=torch.float32):
    torch.manual_seed(0)
    shapes = [(24, 20), (24, 20), (24, 20), (20, 24), (20,), (20,)]
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def gradients(held):
    for parameter in held:
        parameter.grad = torch.randn(parameter.shape).to(parameter)


class Own(torch.optim.Optimizer):
    """A user's own: a subclass says in `update` what becomes of a group's gradients."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        del closure
        for group in self.param_groups:
            stepped = [p for p in group["params"] if p.grad is not None]
            for parameter, update in zip(stepped, self.updates(group, stepped), strict=True):
                parameter.add_(update, alpha=-float(group["lr"]))


class Momentum(Own):
    """Keeps its state as it should."""

    def updates(self, group, stepped):
        del group
        for parameter in stepped:
            buffer = self.state[parameter].setdefault("buffer", torch.zeros_like(parameter))
            yield buffer.mul_(0.9).add_(parameter.grad)


class Factored(Own):
    """Its state is each parameter's own, and shaped like none."""

    def updates(self, group, stepped):
        del group
        for p in stepped:
            rows = self.state[p].setdefault("rows", torch.zeros(len(p), 3 * p.numel()))
            rows.mul_(0.9).add_(p.grad.float().flatten(1).square().mean(1, keepdim=True) if p.ndim > 1 else 1.0)
            yield p.grad / (rows[:, 0].sqrt().add(0.1).to(p).view(-1, *[1] * (p.ndim - 1)))


class Stacked(Own):
    """One momentum for a group, under its first parameter, and anew where the shape differs."""

    def updates(self, group, stepped):
        del group
        flat = torch.nn.utils.rnn.pad_sequence([p.grad.flatten() for p in stepped], batch_first=True)
        state = self.state[stepped[0]]
        if "buffer" not in state or state["buffer"].shape != flat.shape:
            state["buffer"] = torch.zeros_like(flat)
        state["buffer"].mul_(0.9).add_(flat)
        return [row[: p.numel()].view_as(p) for p, row in zip(stepped, state["buffer"], strict=True)]


class Broadcast(Own):
    """The same without a look at the shape: it raises in a group that has been split."""

    def updates(self, group, stepped):
        del group
        flat = torch.nn.utils.rnn.pad_sequence([p.grad.flatten() for p in stepped], batch_first=True)
        buffer = self.state[stepped[0]].setdefault("buffer", torch.zeros_like(flat))
        flat.add_(buffer.mul_(0.9).add_(flat))
        return [row[: p.numel()].view_as(p) for p, row in zip(stepped, flat, strict=True)]


class Listed(Own):
    """Momentum in a list of the optimizer's own."""

    def updates(self, group, stepped):
        del group
        buffers = self.__dict__.setdefault("buffers", {})
        for place, parameter in enumerate(stepped):
            key = (place, parameter.shape)
            buffers[key] = buffers.get(key, 0) * 0.9 + parameter.grad
            yield buffers[key]


class InGroup(Own):
    """Momentum in the group, by position."""

    def updates(self, group, stepped):
        buffers = group.setdefault("buffers", [torch.zeros_like(p) for p in stepped])
        return [buffer.mul_(0.9).add_(p.grad) for p, buffer in zip(stepped, buffers, strict=False)]


class CountedOnce(Own):
    """Adam's correction, with the count of a group under its first parameter."""

    def updates(self, group, stepped):
        del group
        first = self.state[stepped[0]]
        first["step"] = first.get("step", 0) + 1
        for parameter in stepped:
            buffer = self.state[parameter].setdefault("buffer", torch.zeros_like(parameter))
            yield buffer.lerp_(parameter.grad, 0.1) / (1 - 0.9 ** first["step"])


@pytest.mark.parametrize("kind", [Momentum, Factored])
@pytest.mark.parametrize("lr", [0.01, 0.0, 1e-9, torch.tensor(0.01)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_by_parameter_is_shown_to_be_safe(kind, lr, dtype):
    assert unsafe_to_split(kind(parameters(dtype), lr)) == ""


@pytest.mark.parametrize("kind", [Stacked, Listed, InGroup, CountedOnce])
@pytest.mark.parametrize("lr", [0.01, 0.0, torch.tensor(0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_by_position_is_found_in_a_trial(kind, lr, dtype):
    reason = unsafe_to_split(kind(parameters(dtype), lr))
    assert reason.startswith(("its steps depend on how", "step() of a copy failed when", "what it keeps in 'buffers'"))


def test_a_step_that_fails_in_a_split_group_is_found():
    reason = unsafe_to_split(Broadcast(parameters()))
    assert reason.startswith("step() of a copy failed when its groups were split: RuntimeError")


def test_position_among_groups_counts_too():
    held = parameters()
    groups = [{"params": held[:3]}, {"params": held[3:]}]

    class ByGroup(Own):
        def updates(self, group, stepped):
            scales = dict(zip(map(id, self.param_groups), (1.0, 5.0, 9.0, 13.0, 17.0, 21.0), strict=False))
            return [parameter.grad * scales[id(group)] for parameter in stepped]

    assert unsafe_to_split(ByGroup(groups)) == "its steps depend on how parameters are grouped, as copies showed"


class Needing(Momentum):
    """As sharpness-aware ones: it evaluates the gradient again."""

    def step(self, closure):
        with torch.enable_grad():
            closure()
        return super().step()


def test_a_closure_is_given_where_one_is_needed():
    assert unsafe_to_split(Needing(parameters())) == ""


def test_what_takes_no_step_shows_nothing():
    class Idle(Own):
        def updates(self, group, stepped):
            del group
            return [torch.zeros_like(p) for p in stepped]

    assert "a copy takes no finite step on random gradients" in unsafe_to_split(Idle(parameters()))


class Counting(Own):
    """Moves by one part in ten million more for each further parameter of a group."""

    def updates(self, group, stepped):
        del group
        return [self.rounded(p.grad) * (1 + 1e-6 * len(stepped)) for p in stepped]

    def rounded(self, grad):
        return grad


class Multiplying(Counting):
    """The same, after a product of matrices, which may be rounded in other ways."""

    def rounded(self, grad):
        return grad @ torch.eye(grad.shape[-1])


def test_only_steps_that_round_by_layout_may_differ_in_a_bit():
    assert unsafe_to_split(Counting(parameters())).startswith("its steps depend on how")
    assert unsafe_to_split(Multiplying(parameters())) == ""


def test_what_is_kept_counts_though_no_step_shows_it_yet():
    later = Momentum(parameters())
    later.__class__ = type("Later", (Momentum,), {"updates": _counted})
    assert unsafe_to_split(later).startswith("what it keeps in 'calls' depends on how parameters are grouped")


def _counted(self, group, stepped):
    self.__dict__["calls"] = self.__dict__.get("calls", 0) + 1
    return Momentum.updates(self, group, stepped)


def test_a_rate_must_act_on_its_own_group_alone():
    class Largest(Own):
        def updates(self, group, stepped):
            largest = max(float(each["lr"]) for each in self.param_groups)
            return [p.grad * (largest / float(group["lr"])) for p in stepped]

    assert unsafe_to_split(Largest(parameters())).startswith("a group's learning rate does not act on")


def test_a_tested_step_is_not_tried(monkeypatch):
    def step(*_):
        raise AssertionError

    class Inheriting(torch.optim.AdamW):
        pass

    held = parameters()
    for optimizer in (torch.optim.AdamW(held), torch.optim.LBFGS(held), Inheriting(held)):
        monkeypatch.setattr(optimizer, "step", step)
        assert unsafe_to_split(optimizer) == ""


def everything(optimizer):
    held = [p for group in optimizer.param_groups for p in group["params"]]
    state = {key: value for key, value in vars(optimizer).items() if key not in {"state", "param_groups"}}
    return (
        [p.detach().clone() for p in held],
        [p.grad.clone() for p in held],
        [id(p.grad) for p in held],
        [{key: id(value) for key, value in group.items()} for group in optimizer.param_groups],
        {id(p): {key: value.clone() for key, value in optimizer.state.get(p, {}).items()} for p in held},
        {key: (id(value), copy.copy(value)) for key, value in state.items()},
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1],  # noqa: NPY002 - the one that users' code draws from
    )


def equal(one, other):
    if isinstance(one, (torch.Tensor, np.ndarray)):
        return one.shape == other.shape and bool((one == other).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


class Drawing(Momentum):
    """Draws from every generator, and changes what it holds."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, lr)
        self.seen, self.scale, self.everything = [], torch.ones(3), list(self.param_groups[0]["params"])

    def step(self, closure=None):
        self.seen.append(random.random() + np.random.rand() + torch.rand(()).item())  # noqa: NPY002, S311
        self.scale.mul_(2)
        for parameter in self.everything:
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)
        return super().step(closure)


@pytest.mark.parametrize("stepped", [False, True])
def test_nothing_of_the_users_is_touched(stepped):
    optimizer = Drawing(parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # it wraps the instance's step
    called = []
    gradients(optimizer.param_groups[0]["params"])
    if stepped:
        optimizer.step()
        schedule.step()
    optimizer.register_step_pre_hook(lambda *_: called.append("own"))
    hook = register_optimizer_step_pre_hook(lambda *_: called.append("global"))
    before = everything(optimizer)
    assert unsafe_to_split(optimizer) == ""
    hook.remove()
    assert equal(before, everything(optimizer))
    assert called == []


class Locked(Momentum):
    """Holds what can't be copied."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, lr)
        self.lock = threading.Lock()


class Freed(Momentum):
    """A copy's end would free what the optimizer still uses."""

    def __del__(self):
        raise AssertionError


class Big(Momentum):
    """Holds more than is copied at attach."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, lr)
        self.table = torch.zeros(1).expand(1 << 25)


class Failing(Momentum):
    """Its step wants what a trial does not give."""

    def step(self, closure=None):
        if self.param_groups[0]["params"][0].shape[0] < 20:
            raise ValueError("too small")
        return super().step(closure)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Locked, "it holds a _thread.lock, which is not copied"),
        (Big, "its attributes are too large to copy"),
    ],
)
def test_what_cannot_be_tried_is_refused(kind, why):
    optimizer = kind(parameters())
    assert unsafe_to_split(optimizer) == f"it could not be shown that its groups can be split: {why}"
    gradients(optimizer.param_groups[0]["params"])
    optimizer.step()
    assert unsafe_to_split(optimizer) == f"it could not be shown that its groups can be split: {why}"


def test_what_steps_no_small_matrices_is_tried_as_it_is():
    assert unsafe_to_split(Failing(parameters())) == ""


HELD = []


class Reaching(Own):
    """Steps what a global list holds, and forgets its gradients."""

    def step(self, closure=None):
        del closure
        for parameter in HELD:
            parameter.grad = None
            parameter.data.mul_(2)


def test_a_copy_never_reaches_the_runs_own_tensors():
    optimizer = Reaching(parameters())
    HELD[:] = optimizer.param_groups[0]["params"]
    gradients(HELD)
    before = everything(optimizer)
    assert unsafe_to_split(optimizer).endswith("its step() reaches the run's own tensors from a copy")
    assert equal(before, everything(optimizer))
    HELD.clear()


def test_what_a_destructor_frees_is_not_copied():
    optimizer = Freed(parameters())
    reason = unsafe_to_split(optimizer)
    Freed.__del__ = lambda _: None
    assert reason.endswith(": Freed has a __del__ method, so it is not copied")


@pytest.mark.parametrize("state", [torch.zeros(3), {"self": torch.zeros(3)}, 5, None])
def test_odd_state_raises_nothing(state):
    optimizer = Locked(parameters())
    for parameter in optimizer.param_groups[0]["params"]:
        optimizer.state[parameter] = state
    assert "could not be shown" in unsafe_to_split(optimizer)
    assert stacked_state(optimizer) == ""
    optimizer.state = state
    assert "could not be shown" in unsafe_to_split(optimizer)
    assert stacked_state(optimizer) == ""


class Sharing(Momentum):
    """Counts in a tensor of its class."""

    count = torch.zeros(())

    def step(self, closure=None):
        self.count.add_(1)
        return super().step(closure)


class Reading(Momentum):
    """Only reads it."""

    factor = torch.full((), 0.5)

    def updates(self, group, stepped):
        return [self.factor * update for update in super().updates(group, stepped)]


def test_a_copy_changes_no_tensor_of_its_class():
    assert unsafe_to_split(Sharing(parameters())).endswith("changes tensors that it shares with a copy")
    assert Sharing.count == 0
    assert unsafe_to_split(Reading(parameters())) == ""


@pytest.fixture
def _two_processes(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)


class Averaging(Momentum):
    """Averages gradients itself."""

    def updates(self, group, stepped):
        for parameter in stepped:
            averaged(parameter.grad)
        return super().updates(group, stepped)


def averaged(gradient):
    dist.all_reduce(gradient)


@pytest.mark.usefixtures("_two_processes")
def test_on_several_processes_what_may_communicate_is_not_tried():
    assert unsafe_to_split(Momentum(parameters())) == ""
    assert unsafe_to_split(Stacked(parameters())).startswith("its steps depend on how")
    assert "its code names 'dist': step() may wait for other ranks" in unsafe_to_split(Averaging(parameters()))


class Overriding(torch.optim.AdamW):
    """A subclass of one that is tested, with a method of its own."""

    def _init_group(self, group, *arguments):
        group["params"] = group["params"][::-1]
        try:
            return super()._init_group(group, *arguments)
        finally:
            group["params"] = group["params"][::-1]


def test_a_subclass_that_overrides_a_method_is_tried(monkeypatch):
    tried = []
    monkeypatch.setattr(split_check, "trial", lambda optimizer, _: tried.append(type(optimizer)) or "")
    for kind in (torch.optim.AdamW, type("Named", (torch.optim.AdamW,), {"__init__": _renamed}), Overriding):
        unsafe_to_split(kind(parameters()))
    assert tried == [Overriding]


def _renamed(self, params):
    torch.optim.AdamW.__init__(self, params, lr=0.1)


def test_a_patched_class_is_tried(monkeypatch):
    plain = torch.optim.SGD.step

    @functools.wraps(plain)
    def step(self, closure=None):
        for group in self.param_groups:
            group["weight_decay"] = 1e-3 * len(group["params"])
        return plain(self, closure)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    assert unsafe_to_split(torch.optim.SGD(parameters(), lr=0.1)).startswith("its steps depend on how")


@pytest.mark.parametrize(("kind", "key"), [(Momentum, ""), (Factored, ""), (Stacked, "buffer")])
def test_stacked_state_is_seen_by_its_shape(kind, key):
    held = parameters()
    optimizer = kind(held)
    assert stacked_state(optimizer) == ""
    gradients(held[:2] + held[3:])  # one never had a gradient: it has no state, and that says nothing
    optimizer.step()
    assert stacked_state(optimizer) == (f"it keeps {key!r} of several parameters under one of them" if key else "")


def test_many_groups_and_parameters_are_sampled():
    torch.manual_seed(0)
    groups = [{"params": [nn.Parameter(torch.randn(300, 200)) for _ in range(5)]} for _ in range(40)]
    assert unsafe_to_split(Momentum(groups)) == ""
    assert unsafe_to_split(Stacked(groups)) != ""
