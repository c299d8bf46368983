"""Under multipliers an optimizer steps as it would with real groups, and is afterwards what it would be without."""

from __future__ import annotations

import pytest
import torch
from small_llama import (
    ELEMENTWISE,
    FIRST,
    LAST,
    MULTIPLIERS,
    RATE,
    backward,
    imported,
    llama,
    loss_of,
    matrices_and_rest,
    order,
    per_parameter,
    same,
    saved,
    torchs,
)

import sharpwatch


@pytest.fixture(autouse=True)
def _eager():
    """torchao compiles a step for each shape; the arithmetic is the same without."""
    with torch.compiler.set_stance("force_eager"):
        yield


class Side:
    """A watched run, and beside it one whose groups are real: one for each parameter."""

    def __init__(self, transports, make, make_real=None):
        self.model, self.real_model = llama(), llama()
        self.optimizers = self._listed(make(self.model))
        self.real = self._listed((make_real or make)(self.real_model))
        self.watch = sharpwatch.attach(
            self.model, self.optimizers, training_job="groups", transport=transports.new(), probes=()
        )
        self.transport = transports[-1]

    @staticmethod
    def _listed(made):
        return made if isinstance(made, list) else [made]

    def step(self, number, multipliers):
        backward(self.model, number)
        backward(self.real_model, number)
        for ours, theirs in zip(self.optimizers, self.real, strict=True):
            for group in theirs.param_groups:
                group["lr"] = ours.param_groups[0]["lr"] * multipliers.get(group["block"], 1.0)
            ours.step()
            theirs.step()

    def run(self):
        """Ten steps under a schedule, the middle ones under multipliers."""
        schedules = [torch.optim.lr_scheduler.ExponentialLR(each, 0.9) for each in self.optimizers]
        for number in range(1, 11):
            if number == 2:
                order(self.transport, MULTIPLIERS, at=FIRST)
                order(self.transport, {}, at=LAST + 1)
            self.step(number, MULTIPLIERS if FIRST <= number <= LAST else {})
            for schedule in schedules:
                schedule.step()
        assert [result.step for result in self.transport.results] == [FIRST, LAST + 1]
        self.watch.close()


def goes_on_from_its_state_dict(side, make):
    """Whether a plain optimizer takes up the watched one's state, and takes the steps that it takes."""
    fresh = llama()
    fresh.load_state_dict(side.model.state_dict())
    plain = Side._listed(make(fresh))
    for theirs, ours in zip(plain, side.optimizers, strict=True):
        state = ours.state_dict()
        keys = [{*group, "initial_lr"} for group in theirs.state_dict()["param_groups"]]
        assert [set(group) for group in state["param_groups"]] == keys
        theirs.load_state_dict(saved(state))
    for number in (11, 12):
        for model, optimizers in ((side.model, side.optimizers), (fresh, plain)):
            backward(model, number)
            for optimizer in optimizers:
                optimizer.step()
    return not same(side.model, fresh)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_step_is_bit_identical_to_one_with_real_groups(transports, name):
    make = ELEMENTWISE[name]
    side = Side(transports, lambda model: make(model.parameters()), lambda model: make(per_parameter(model)))
    side.run()
    assert same(side.model, side.real_model) == []
    assert goes_on_from_its_state_dict(side, lambda model: make(model.parameters()))


def test_muon_beside_adamw_steps_as_with_real_groups(transports):
    def make(model, groups=lambda _, parameters: parameters):
        matrices, rest = matrices_and_rest(model)
        muon = torchs("Muon", momentum=0.9)(groups(model, matrices))
        return [muon, torchs("AdamW", lr=1e-3)(groups(model, rest))]

    side = Side(transports, make, lambda model: make(model, per_parameter))
    side.run()
    assert same(side.model, side.real_model) == []
    assert goes_on_from_its_state_dict(side, make)


def test_adam_mini_steps_as_with_rates_in_its_own_groups(transports):
    kind = imported("adam_mini", "Adam_mini")

    def make(model):
        return kind(model.named_parameters(), lr=RATE, weight_decay=0.1, dim=64, n_heads=2, n_kv_heads=1, verbose=False)

    def make_real(model):
        optimizer = make(model)
        for group, of in zip(optimizer.param_groups, per_parameter(model), strict=True):
            group["block"] = of["block"]
        return optimizer

    side = Side(transports, make, make_real)
    side.run()
    assert same(side.model, side.real_model) == []
    assert goes_on_from_its_state_dict(side, make)


def test_lbfgs_has_one_rate_and_takes_the_smallest_multiplier(transports):
    def make(model):
        return torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=3, history_size=4)

    def step(model, optimizer, number):
        def closure():
            optimizer.zero_grad()
            loss = loss_of(model, number)
            loss.backward()
            return loss

        optimizer.step(closure)

    model, real_model = llama(), llama()
    optimizer, real = make(model), make(real_model)
    watch = sharpwatch.attach(model, optimizer, training_job="groups", transport=transports.new(), probes=())
    for number in range(1, 9):
        if number == 2:
            order(transports[0], MULTIPLIERS, at=FIRST)
            order(transports[0], {}, at=LAST + 1)
        real.param_groups[0]["lr"] = 0.5 * (min(MULTIPLIERS.values()) if FIRST <= number <= LAST else 1.0)
        step(model, optimizer, number)
        step(real_model, real, number)
    assert [result.step for result in transports[0].results] == [FIRST, LAST + 1]
    watch.close()
    assert same(model, real_model) == []
    for key in ("n_iter", "func_evals"):
        assert optimizer.state[next(model.parameters())][key] == real.state[next(real_model.parameters())][key]
