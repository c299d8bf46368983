"""A block that is updated at some steps only: bit for bit as if its gradients were None for the other `step()`s."""

from __future__ import annotations

import copy

import pytest
import torch
from small_llama import RATE, backward, blocks, llama, loss_of, same, torchs

import sharpwatch
from sharpwatch.testing import InMemoryTransport

EVERY = {"emb": 3, "ffn": 2}
STEPS = 10
MAKERS = {
    "adamw": torchs("AdamW", betas=(0.9, 0.95), weight_decay=0.1, foreach=False),
    "adamw foreach": torchs("AdamW", weight_decay=0.1, foreach=True),
    "adamw fused": torchs("AdamW", weight_decay=0.1, fused=True),
    "sgd momentum": torchs("SGD", momentum=0.9, nesterov=True, weight_decay=0.01),
}


class ByHand:
    """Leaves blocks out of a step: their gradients are None for its length, and put back after it."""

    def __init__(self, model, every):
        kinds = blocks(model)
        self.rows = [(p, every.get(kinds[name], 1)) for name, p in model.named_parameters()]

    def without(self, number):
        held = [(p, p.grad) for p, steps in self.rows if number % steps]
        for parameter, _ in held:
            parameter.grad = None
        return held

    def step(self, number, step):
        held = self.without(number)
        step()
        for parameter, gradient in held:
            parameter.grad = gradient


def watched(make, **changes):
    """A watched run, and one that is stepped by hand."""
    ours, theirs, transport = llama(), llama(), InMemoryTransport()
    optimizer, real = make(ours.parameters()), make(theirs.parameters())
    watch = sharpwatch.attach(ours, optimizer, training_job="rests", transport=transport, probes=(), **changes)
    return ours, theirs, optimizer, real, transport, watch


def state_of(optimizer):
    return [
        {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in each.items()}
        for each in optimizer.state_dict()["state"].values()
    ]


def equal(one, other):
    return all(
        a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
@pytest.mark.parametrize("multipliers", [{}, {"emb": 2.0, "qk": 0.5}], ids=["alone", "with multipliers"])
def test_weights_and_state_are_those_of_doing_it_by_hand(make, multipliers):
    ours, theirs, optimizer, real, transport, watch = watched(make)
    if multipliers:  # the truth is then groups of the user's own
        kinds = blocks(theirs)
        real = make([{"params": [p], "block": kinds[name]} for name, p in theirs.named_parameters()])
        for group in real.param_groups:
            group["lr"] *= multipliers.get(group["block"], 1.0)
    hand = ByHand(theirs, EVERY)
    transport.set_multipliers(multipliers, update_every=EVERY, apply_at_step=1, id="c")
    own = optimizer.param_groups
    for number in range(STEPS):
        backward(ours, number)
        backward(theirs, number)
        if number == 0:  # it comes with the first step, and is in force from the second on
            optimizer.step()
            real_lrs = [group["lr"] for group in real.param_groups]
            for group in real.param_groups:
                group["lr"] = RATE
            real.step()
            for group, rate in zip(real.param_groups, real_lrs, strict=True):
                group["lr"] = rate
            continue
        before = {name: p.detach().clone() for name, p in ours.named_parameters()}
        gradients = [(p, p.grad, p.grad.clone()) for p in ours.parameters()]
        optimizer.step()
        hand.step(number + 1, real.step)
        assert all(p.grad is held and torch.equal(held, value) for p, held, value in gradients)
        assert optimizer.param_groups is own
        kinds = blocks(ours)
        moved = {kinds[name] for name, p in ours.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {block for block in kinds.values() if not (number + 1) % EVERY.get(block, 1)}
    assert same(ours, theirs) == []
    assert equal(state_of(optimizer), state_of(real))
    assert dict(watch.status.update_every) == EVERY
    assert "emb updated every 3 steps, ffn updated every 2 steps" in str(watch.status)
    assert dict(transport.samples[-1].health.update_every) == EVERY
    watch.close()


@pytest.mark.parametrize("name", ["adamw foreach", "sgd momentum"])
def test_clipping_and_closures_see_all_gradients(name):
    ours, theirs, optimizer, real, transport, watch = watched(MAKERS[name])
    hand = ByHand(theirs, EVERY)

    def closure_of(model, number, evaluated):
        def closure():
            model.zero_grad()
            loss = loss_of(model, number)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            evaluated(number)
            return loss

        return closure

    held = []
    transport.set_multipliers({}, update_every=EVERY, id="c")
    for number in range(STEPS):
        optimizer.step(closure_of(ours, number, lambda _: None))
        # By hand what is held back is so after the closure has computed it.
        real.step(closure_of(theirs, number, lambda step: held.extend(hand.without(step + 1) if step else ())))
        for parameter, gradient in held:
            parameter.grad = gradient
        held.clear()
    assert same(ours, theirs) == []
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    watch.close()


@pytest.mark.parametrize("name", ["adamw fused", "sgd momentum"])
def test_grad_scaler_is_as_without(name):
    ours, theirs, optimizer, real, transport, watch = watched(MAKERS[name])
    hand = ByHand(theirs, EVERY)
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3) for _ in range(2)]
    transport.set_multipliers({}, update_every=EVERY, id="c")
    for number in range(STEPS):
        for model, scaler in zip((ours, theirs), scalers, strict=True):
            model.zero_grad()
            scaler.scale(loss_of(model, number)).backward()
            if name == "sgd momentum":
                scaler.unscale_(optimizer if model is ours else real)
        scalers[0].step(optimizer)
        if number:
            hand.step(number + 1, lambda: scalers[1].step(real))
        else:
            scalers[1].step(real)
        for scaler in scalers:
            scaler.update()
    assert same(ours, theirs) == []
    assert scalers[0].get_scale() == scalers[1].get_scale()
    watch.close()


def test_every_step_again_is_a_plain_run_and_so_is_one_without_a_command():
    ours, theirs, optimizer, real, transport, watch = watched(MAKERS["adamw foreach"])
    transport.set_multipliers({}, update_every=dict.fromkeys(EVERY, 1), id="c")
    for number in range(STEPS):
        for model, stepped in ((ours, optimizer), (theirs, real)):
            backward(model, number)
            stepped.step()
        assert "step" not in vars(optimizer) or number == 0  # wrapped for the command alone
    assert same(ours, theirs) == []
    assert dict(watch.status.update_every) == {}
    watch.close()


def test_a_resumed_run_rests_at_the_same_steps():
    whole, _, optimizer, _, transport, watch = watched(MAKERS["sgd momentum"])
    transport.set_multipliers({}, update_every=EVERY, id="c")
    for number in range(STEPS):
        if number == 4:
            saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), watch.state_dict()))
        backward(whole, number)
        optimizer.step()
    again, _, second, _, _, other = watched(MAKERS["sgd momentum"])
    again.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    other.load_state_dict(saved[2])
    for number in range(4, STEPS):
        backward(again, number)
        second.step()
    assert same(whole, again) == []
    for each in (watch, other):
        each.close()


def step_by_closure(model, optimizer) -> None:
    """Three steps as LBFGS takes them, which the others take as well."""

    def closure():
        backward(model, 0)
        return loss_of(model, 0)

    for _ in range(3):
        backward(model, 0)
        optimizer.step(closure)


def test_an_interval_that_can_not_be_takes_no_cut_with_it():
    """As where a run with update intervals in force goes on with LBFGS, and a policy cuts its rates."""
    ours, _, optimizer, _, transport, watch = watched(torchs("LBFGS"))
    assert not transport.hellos[-1].takes_update_intervals  # so that none is asked for anew
    transport.set_multipliers({"qk": 0.5}, update_every={"emb": 2}, id="c")

    step_by_closure(ours, optimizer)
    assert (watch.status.multipliers["qk"], dict(watch.status.update_every)) == (0.5, {})
    watch.close()
    (result,) = transport.results
    assert result.outcome == "applied"
    assert result.detail.endswith(
        "emb updated at every step, since no block can be left out of one: LBFGS steps all parameters as one"
    )


@pytest.mark.parametrize(
    ("make", "changes", "every", "why"),
    [
        (torchs("Rprop"), {}, {"emb": 2}, "learning rates can't be changed: Rprop"),
        (torchs("SGD"), {"control": "none"}, {"emb": 2}, 'control="none"'),
        (torchs("SGD"), {}, {"attention": 2}, "unknown block 'attention'"),
        (torchs("SGD"), {}, {"emb": 0}, "'emb' must be updated every 1 to 1000 steps, got 0"),
    ],
)
def test_what_can_not_be_done_is_refused_with_the_reason(make, changes, every, why):
    ours, _, optimizer, _, transport, watch = watched(make, **changes)
    transport.set_multipliers({}, update_every=every, id="c")

    step_by_closure(ours, optimizer)
    watch.close()
    (result,) = transport.results
    assert result.outcome == "refused"
    assert why in result.detail
