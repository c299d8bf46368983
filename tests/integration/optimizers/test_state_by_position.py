"""Optimizers whose groups can't be split are watched and not controlled; the others are shown to be safe."""

from __future__ import annotations

import copy
import functools
import logging
import random

import numpy as np
import pytest
import torch
from real_projects import NOT_SEPARABLE, RATE, SEPARABLE, Own, PlainAdamW, StackedForSpeed, StackedMuon
from small_llama import (
    ELEMENTWISE,
    FIRST,
    LAST,
    MULTIPLIERS,
    SCHEDULE_FREE,
    backward,
    llama,
    matrices_and_rest,
    order,
    per_parameter,
    same,
    torchs,
)
from torch.optim.optimizer import register_optimizer_step_pre_hook

import sharpwatch
from sharpwatch.agent.optimizers import split_check
from sharpwatch.v1 import types_pb2

STEPS = 8


def generators():
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002 - the one that users' code draws from
    )


def everything(optimizer):
    """What an optimizer holds, with parameters by their position."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    places = {id(p): number for number, p in enumerate(held)}
    state = {places.get(id(key), str(key)): dict(value) for key, value in optimizer.state.items()}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    hooks = [[type(hook) for hook in getattr(optimizer, name).values()] for name in vars(optimizer) if "_hooks" in name]
    return copy.deepcopy((state, groups, hooks, sorted(set(vars(optimizer)) - {"step"})))


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def warnings(caplog):
    """What was warned of, beside what became of each command."""
    messages = [record.message for record in caplog.records if record.name == "sharpwatch"]
    return [message for message in messages if not message.startswith(("learning-rate multipliers of", "rollback to"))]


def trained(model, optimizer, steps=STEPS):
    for number in range(1, steps + 1):
        backward(model, number)
        optimizer.step()


def commanded(transports, make, *, after=0, **options):
    """A run that is sent a command for rates, beside one without sharpwatch; the results of its commands.

    The command comes with the step `after`; before it `attach` alone has acted.
    """
    ours, theirs = llama(), llama()
    optimizer = make(ours.parameters())
    torch.manual_seed(1)
    drawn = generators()
    watch = sharpwatch.attach(ours, optimizer, training_job="own", transport=transports.new(), probe_every=2, **options)
    assert generators() == drawn
    place = types_pb2.Checkpoint(step=1, uri="file:///1")
    transports[-1].command(id="back", apply_at_step=STEPS, rollback=types_pb2.Rollback(checkpoint=place))
    for number in range(1, STEPS + 1):
        if number == after + 1:
            order(transports[-1], {"qk": 0.5}, at=after + 2)
        backward(ours, number)
        optimizer.step()
        assert generators() == drawn
    status = watch.status
    watch.close()
    plain = make(theirs.parameters())
    trained(theirs, plain)
    assert same(ours, theirs) == []
    assert equal(everything(optimizer), everything(plain))
    return watch, status, transports[-1]


@pytest.mark.parametrize("name", NOT_SEPARABLE)
def test_what_cannot_be_split_is_refused_at_attach(transports, caplog, name):
    make, reason = NOT_SEPARABLE[name]
    asked = []
    with caplog.at_level(logging.WARNING, "sharpwatch"):
        _, status, transport = commanded(transports, make, on_rollback=asked.append)
    assert reason in status.lr_refusal
    assert warnings(caplog) == [f"learning rates are watched, but can't be changed: {status.lr_refusal}"]
    results = {result.command_id: result for result in transport.results}
    rates = results.pop("{'qk': 0.5}@2", None)
    if name == "compiled":  # no step is seen, and no command taken
        assert rates is None
        return
    assert (rates.outcome, rates.detail) == ("refused", f"learning rates can't be changed: {status.lr_refusal}")
    assert results["back"].outcome == "applied"
    assert [request.step for request in asked] == [1]
    assert len([sample for sample in transport.samples if sample.HasField("tap")]) == STEPS
    assert any(sample.HasField("gnb") for sample in transport.samples)
    assert transport.samples[-1].health.swallowed_errors == 0


class Side:
    """A watched run, and beside it one whose groups are real: one for each parameter."""

    def __init__(self, transports, make):
        self.model, self.real_model = llama(), llama()
        self.optimizer, self.real = make(self.model.parameters()), make(per_parameter(self.real_model))
        self.watch = sharpwatch.attach(
            self.model, self.optimizer, training_job="groups", transport=transports.new(), probes=()
        )
        self.transport = transports[-1]

    def run(self):
        order(self.transport, MULTIPLIERS, at=FIRST)
        order(self.transport, {}, at=LAST + 1)
        for number in range(1, STEPS + 1):
            in_force = MULTIPLIERS if FIRST <= number <= LAST else {}
            backward(self.model, number)
            backward(self.real_model, number)
            for group in self.real.param_groups:
                group["lr"] = self.optimizer.param_groups[0]["lr"] * in_force.get(group["block"], 1.0)
            self.optimizer.step()
            self.real.step()
        self.watch.close()
        return [(result.outcome, result.step) for result in self.transport.results]


@pytest.mark.parametrize("name", SEPARABLE)
def test_what_can_be_split_is_accepted_and_steps_as_with_real_groups(transports, caplog, name):
    with caplog.at_level(logging.WARNING, "sharpwatch"):
        side = Side(transports, SEPARABLE[name])
        assert side.watch.status.lr_refusal == ""
        with torch.compiler.set_stance("force_eager"):
            assert side.run() == [("applied", FIRST), ("applied", LAST + 1)]
    assert warnings(caplog) == []
    assert same(side.model, side.real_model) == []


def test_rounding_of_stacked_products_is_no_reason(transports):
    side = Side(transports, StackedForSpeed)
    assert side.watch.status.lr_refusal == ""
    assert side.run() == [("applied", FIRST), ("applied", LAST + 1)]


class StackedWhenLarge(StackedMuon):
    """Small copies don't show it: it stacks matrices from 4096 entries on."""

    def updates(self, held, **_):
        large = [p for p in held if p.numel() >= 4096]
        updates = dict(zip(map(id, large), super().updates(large), strict=True))
        return [updates.get(id(p), p.grad) for p in held]


class FlatWhenLarge(Own):
    """Small copies don't show it: one momentum of all large matrices, in an attribute."""

    flat = None

    def updates(self, held, **_):
        large = [p for p in held if p.numel() >= 4096]
        if large:
            grads = torch.cat([p.grad.flatten() for p in large])
            if self.flat is None or self.flat.shape != grads.shape:
                self.flat = torch.zeros_like(grads)
            self.flat.mul_(0.9).add_(grads)
            parts = iter(self.flat.split([p.numel() for p in large]))
        return [next(parts) if p.numel() >= 4096 else p.grad for p in held]


@pytest.mark.parametrize(
    ("kind", "after", "why"),
    [
        (StackedWhenLarge, 2, "it keeps 'momentum_buffer' of several parameters under one of them"),
        (FlatWhenLarge, 2, "its steps depend on how parameters are grouped, as copies showed"),
    ],
)
def test_what_only_the_state_of_a_run_shows_is_refused_when_a_command_comes(transports, caplog, kind, after, why):
    with caplog.at_level(logging.WARNING, "sharpwatch"):
        _, status, transport = commanded(transports, kind, after=after, on_rollback=lambda _: None)
    reason = f"{kind.__name__}: {why}"
    assert status.lr_refusal == reason
    assert warnings(caplog) == [f"learning rates can't be changed any more: {reason}"]
    results = {result.command_id: result for result in transport.results}
    assert results["back"].outcome == "applied"
    del results["back"]
    (rates,) = results.values()
    assert (rates.outcome, rates.detail) == ("refused", f"learning rates can't be changed: {reason}")


def test_a_run_taken_up_is_checked_before_its_multipliers_are_in_force(transports, caplog):
    model = llama()
    optimizer = PlainAdamW(model.parameters())
    with sharpwatch.attach(model, optimizer, training_job="own", transport=transports.new(), probes=()) as watch:
        order(transports[0], {"ffn": 0.5}, at=2)
        trained(model, optimizer)
        saved = watch.state_dict()
    ours, theirs = llama(), llama()
    optimizer, plain = StackedWhenLarge(ours.parameters()), StackedWhenLarge(theirs.parameters())
    trained(ours, optimizer, 2)
    trained(theirs, plain, 2)
    with (
        caplog.at_level(logging.WARNING, "sharpwatch"),
        sharpwatch.attach(ours, optimizer, training_job="own", transport=transports.new(), probes=()) as watch,
    ):
        watch.load_state_dict(saved)
        assert set(watch.status.multipliers.values()) == {1.0}
        assert "several parameters under one of them" in watch.status.lr_refusal
        trained(ours, optimizer)
    trained(theirs, plain)
    assert same(ours, theirs) == []


def test_the_users_hooks_schedulers_and_scalers_do_not_notice(transports):
    """Nothing of the user's fires for a copy's step, at attach or as a command comes."""
    model = llama()
    optimizer = PlainAdamW(model.parameters())
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    shared = register_optimizer_step_pre_hook(lambda *_: calls.append("global"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    wrapped = optimizer.step

    @functools.wraps(wrapped)
    def logged(*arguments):
        calls.append("wrapper")
        return wrapped(*arguments)

    optimizer.step = logged
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    watch = sharpwatch.attach(model, optimizer, training_job="hooks", transport=transports.new(), probes=())
    assert calls == []
    order(transports[0], {"ffn": 0.5}, at=3)
    for number in range(1, 5):
        backward(model, number)
        for parameter in model.parameters():
            parameter.grad.mul_(scaler.get_scale())
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        assert calls == ["wrapper", "global", "pre", "post"] * number
    watch.close()
    shared.remove()
    assert transports[0].results[0].outcome == "applied"
    assert [state["step"] for state in optimizer.state.values()] == [4] * len(optimizer.state)


def test_a_compiled_step_beside_others_is_refused_also_if_it_is_compiled_after_attach(transports, caplog):
    model = llama()
    matrices, rest = matrices_and_rest(model)
    first, second = torch.optim.SGD(matrices, lr=RATE), torch.optim.SGD(rest, lr=RATE)
    watch = sharpwatch.attach(model, (first, second), training_job="two", transport=transports.new(), probes=())
    assert watch.status.lr_refusal == ""
    second.step = torch.compile(second.step, backend="eager")
    order(transports[0], {"qk": 0.5}, at=3)
    with caplog.at_level(logging.WARNING, "sharpwatch"):
        for number in range(1, 6):
            backward(model, number)
            first.step()
            second.step()
    watch.close()
    assert [result.outcome for result in transports[0].results] == ["refused"]
    assert "SGD: its step() is compiled" in transports[0].results[0].detail
    torch.compiler.reset()


def test_one_whose_step_was_not_seen_is_refused_until_it_is(transports):
    """A step within a compiled function runs without hooks, so that no multiplier reaches it."""
    model = llama()
    matrices, rest = matrices_and_rest(model)
    first, second = torch.optim.SGD(matrices, lr=RATE), torch.optim.AdamW(rest, lr=RATE)
    watch = sharpwatch.attach(model, (first, second), training_job="two", transport=transports.new(), probes=())
    order(transports[0], {"qk": 0.5}, at=2)
    for number in range(1, 4):
        backward(model, number)
        first.step()
    assert [result.outcome for result in transports[0].results] == ["refused"]
    assert "AdamW: no step() of it was seen yet" in transports[0].results[0].detail
    for number in range(4, 8):
        backward(model, number)
        first.step()
        second.step()
        if number == 4:
            order(transports[0], {"qk": 0.25}, at=6)
    watch.close()
    assert [result.outcome for result in transports[0].results] == ["refused", "applied"]


def test_without_control_no_copy_is_stepped(transports):
    class Untouched(StackedMuon):
        def step(self):
            raise AssertionError

    model = llama()
    optimizer = Untouched(model.parameters())
    sharpwatch.attach(model, optimizer, training_job="stacked", transport=transports.new(), control="none").close()
    assert transports[0].closed


TESTED = (
    ELEMENTWISE | {f"schedule-free {name}": make for name, make in SCHEDULE_FREE.items()} | {"muon": torchs("Muon")}
)


@pytest.mark.parametrize("name", TESTED)
def test_a_trial_shows_what_the_other_tests_show(monkeypatch, name):
    """Those that sharpwatch takes as tested: a trial would call them safe too, without and with state."""
    model = llama()
    held = matrices_and_rest(model)[0] if name == "muon" else model.parameters()
    optimizer = TESTED[name](held)
    if hasattr(optimizer, "train"):
        optimizer.train()
    assert split_check.unsafe_to_split(optimizer) == ""
    monkeypatch.setattr(split_check, "_is_tested", lambda _: False)
    with torch.compiler.set_stance("force_eager"):  # torchao compiles
        assert split_check.unsafe_to_split(optimizer) == ""
        trained(model, optimizer, 3)
        assert split_check.PresentState([optimizer]).check() == ""
