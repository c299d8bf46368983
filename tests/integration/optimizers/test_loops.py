"""The ways in which loops drive an optimizer: each under multipliers, beside real groups scaled by hand."""

from __future__ import annotations

import pytest
import torch
from small_llama import RATE, backward, blocks, llama, loss_of, order, same

import sharpwatch

EXACT = {"emb": 0.5, "qk": 0.25, "ffn": 4.0, "norm": 2.0}  # powers of two: what is scaled and scaled back is as it was
FIRST, LAST = 3, 6  # steps under multipliers
STEPS = 8


def whole(model, groups):
    """The user's groups: {parameters' names: options}."""
    named = dict(model.named_parameters())
    return [{"params": [named[name] for name in names], **options} for names, options in groups]


def split(model, groups):
    """The same with a group for each parameter."""
    kinds, named = blocks(model), dict(model.named_parameters())
    return [{"params": [named[name]], "block": kinds[name], **options} for names, options in groups for name in names]


def scale(optimizer, power):
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * EXACT.get(group["block"], 1.0) ** power


class Pair:
    """A watched model and one beside it, in the same loop."""

    def __init__(self, transports, groups=None, make=torch.optim.AdamW):
        self.ours, self.theirs = llama(), llama()
        groups = groups or [([name for name, _ in self.ours.named_parameters()], {})]
        self.optimizer = make(whole(self.ours, groups), lr=RATE)
        self.real = make(split(self.theirs, groups), lr=RATE)
        self.watch = sharpwatch.attach(
            self.ours, self.optimizer, training_job="loops", transport=transports.new(), probes=()
        )
        self.transport = transports[-1]

    def run(self, step, under=range(FIRST, LAST + 1)):
        """`step(model, optimizer, number)` on both sides; whether they end in the same bits.

        `under` are the loop's own numbers of the steps under multipliers: its void steps are none to the agent.
        """
        order(self.transport, EXACT, at=FIRST)
        order(self.transport, {}, at=LAST + 1)
        for number in range(1, STEPS + 1):
            step(self.ours, self.optimizer, number)
            # Rates are scaled around `step()` alone, so that the loop may set them.
            hooks = [
                self.real.register_step_pre_hook(lambda *_, power=number in under: scale(self.real, power)),
                self.real.register_step_post_hook(lambda *_, power=number in under: scale(self.real, -power)),
            ]
            step(self.theirs, self.real, number)
            for hook in hooks:
                hook.remove()
        self.watch.close()
        return same(self.ours, self.theirs) == []


def plain_step(model, optimizer, number):
    backward(model, number)
    optimizer.step()


def decayed_and_not(model):
    """Groups as most loops have them: matrices decay, the rest does not, and embeddings have a rate of their own."""
    named = dict(model.named_parameters())
    embedding = [name for name in named if "embed" in name]
    matrices = [name for name, p in named.items() if p.ndim == 2 and name not in embedding]
    rest = [name for name, p in named.items() if p.ndim < 2]
    return [(matrices, {"weight_decay": 0.1}), (rest, {"weight_decay": 0.0}), (embedding, {"lr": 3e-3, "eps": 1e-6})]


def test_groups_of_the_users_own_keep_their_options(transports):
    pair = Pair(transports, decayed_and_not(llama()))
    assert pair.run(plain_step)
    assert [group["lr"] for group in pair.optimizer.param_groups] == [RATE, RATE, 3e-3]
    assert [group["weight_decay"] for group in pair.optimizer.param_groups] == [0.1, 0.0, 0.01]


def test_clipped_gradients_are_what_is_stepped_on(transports):
    def step(model, optimizer, number):
        backward(model, number)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()

    assert Pair(transports).run(step)


@pytest.mark.parametrize("options", [{}, {"fused": True}])
def test_a_grad_scaler_skips_and_rescales_as_ever(transports, options):
    scalers = {}

    def step(model, optimizer, number):
        scaler = scalers.setdefault(optimizer, torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3))
        model.zero_grad()
        scaler.scale(loss_of(model, number)).backward()
        if number in {2, 5}:  # void: one before the multipliers, one under them
            next(model.parameters()).grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()

    pair = Pair(transports, make=lambda groups, lr: torch.optim.AdamW(groups, lr=lr, **options))
    assert pair.run(step, under=range(FIRST + 1, STEPS + 1))
    assert pair.watch.step == STEPS - 2
    watched, plain = scalers.values()
    assert watched.state_dict() == plain.state_dict()
    assert watched.get_scale() != 1024.0


def test_a_group_added_under_multipliers_is_under_them_too(transports):
    named = [name for name, _ in llama().named_parameters()]
    late = [name for name in named if "mlp" in name or "head" in name]
    pair = Pair(transports, [([name for name in named if name not in late], {})])

    def step(model, optimizer, number):
        if number == FIRST + 1:
            make = whole if optimizer is pair.optimizer else split
            for group in make(model, [(late, {"lr": 5e-3})]):
                optimizer.add_param_group(group)
        plain_step(model, optimizer, number)

    assert pair.run(step)
    assert [group["lr"] for group in pair.optimizer.param_groups] == [RATE, 5e-3]


def test_parameters_may_be_frozen_and_thawed_under_multipliers(transports):
    def step(model, optimizer, number):
        frozen = number in {1, 2, FIRST + 1}
        model.model.embed_tokens.requires_grad_(not frozen)
        model.model.layers[0].mlp.requires_grad_(number != FIRST)
        plain_step(model, optimizer, number)

    assert Pair(transports).run(step)


def test_gradients_are_accumulated_over_several_backwards(transports):
    def step(model, optimizer, number):
        model.zero_grad()
        for part in range(3):
            (loss_of(model, 10 * number + part) / 3).backward()
        optimizer.step()

    assert Pair(transports).run(step)


def test_a_loop_may_set_rates_by_hand(transports):
    def step(model, optimizer, number):
        for group in optimizer.param_groups:
            group["lr"] = RATE / number
        plain_step(model, optimizer, number)

    assert Pair(transports).run(step)


def test_a_step_may_be_given_a_closure(transports):
    def step(model, optimizer, number):
        def closure():
            optimizer.zero_grad()
            loss = loss_of(model, number)
            loss.backward()
            return loss

        assert optimizer.step(closure).item() > 0

    assert Pair(transports).run(step)


def test_with_every_multiplier_at_one_nothing_of_it_is_touched(transports):
    ours, theirs = llama(), llama()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=RATE) for model in (ours, theirs)]
    watch = sharpwatch.attach(ours, optimizers[0], training_job="loops", transport=transports.new(), probes=())
    order(transports[0], {"ffn": 1.0, "qk": 1.0}, at=2)
    groups = []
    optimizers[0].register_step_pre_hook(lambda taken, *_: groups.append(taken.param_groups))
    for number in range(1, 5):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            plain_step(model, optimizer, number)
    watch.close()
    assert all(each is optimizers[0].param_groups for each in groups)
    assert same(ours, theirs) == []
