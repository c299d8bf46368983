from __future__ import annotations

import copy

import dense
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from sharpwatch.curvature.estimators.directional import next_step
from sharpwatch.curvature.estimators.preconditioned import preconditioner, require_adam
from sharpwatch.errors import ProbeError


def loss_of(model, seed=1):
    ids, labels = dense.tokens(seed=seed)
    return model(input_ids=ids, labels=labels).loss


def trained(optimizers_of, steps=3):
    model = dense.gpt2(dropout=0.0)
    optimizers = optimizers_of(model)
    for step in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model, step).backward()
        for optimizer in optimizers:
            optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad()
    return model, optimizers


def two_groups(model):
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    plain = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    return [{"params": decayed, "weight_decay": 0.1, "lr": 1e-2}, {"params": plain, "weight_decay": 0.0, "lr": 3e-3}]


def scheduled(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    return [optimizer]


def one_of_each(model):
    groups = two_groups(model)
    return [torch.optim.AdamW(groups[0]["params"], lr=1e-2), torch.optim.SGD(groups[1]["params"], lr=1e-2)]


OPTIMIZERS = {
    "AdamW": lambda model: [torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)],
    "AdamW, fused": lambda model: [torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)],
    "AdamW, one by one": lambda model: [torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)],
    "Adam, amsgrad": lambda model: [torch.optim.Adam(model.parameters(), lr=1e-2, amsgrad=True)],
    "Adam, rate in a tensor": lambda model: [torch.optim.Adam(model.parameters(), lr=torch.tensor(1e-2))],
    "SGD, Nesterov": lambda model: [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)],
    "SGD": lambda model: [torch.optim.SGD(model.parameters(), lr=0.1)],
    "groups": lambda model: [torch.optim.AdamW(two_groups(model))],
    "a schedule": scheduled,
    "two optimizers": one_of_each,
}


def gradients_of(model):
    found = torch.autograd.grad(loss_of(model, 9), list(model.parameters()))
    return dict(zip((name for name, _ in model.named_parameters()), found, strict=True))


def snapshot(model, optimizers):
    return copy.deepcopy((model.state_dict(), [optimizer.state_dict() for optimizer in optimizers]))


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return one == other


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_is_the_step_that_the_optimizer_would_take_to_the_bit(name, steps):
    model, optimizers = trained(OPTIMIZERS[name], steps)
    gradients = gradients_of(model)
    kept = snapshot(model, optimizers)
    found = next_step(model, optimizers, gradients)
    assert equal(kept, snapshot(model, optimizers))
    assert all(parameter.grad is None for parameter in model.parameters())
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    for key, parameter in model.named_parameters():
        parameter.grad = gradients[key].clone()
    for optimizer in optimizers:
        optimizer.step()
    assert set(found) == set(before)
    for key, parameter in model.named_parameters():
        assert torch.equal(found[key], before[key] - parameter.detach()), key
        assert found[key].any()


def test_the_users_own_gradients_play_no_part_and_stay():
    model, optimizers = trained(OPTIMIZERS["AdamW"])
    gradients = gradients_of(model)
    truth = next_step(model, optimizers, gradients)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    found = next_step(model, optimizers, gradients)
    assert equal(truth, found)
    assert all((parameter.grad == 1e6).all() for parameter in model.parameters())


def test_what_has_no_gradient_or_no_optimizer_does_not_move():
    model = dense.gpt2(dropout=0.0)
    model.transformer.wpe.weight.requires_grad_(False)
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([p for name, p in named.items() if "ln" not in name], weight_decay=0.5)
    found = next_step(model, [optimizer], {"transformer.wte.weight": torch.ones(dense.VOCAB, 16)})
    assert found["transformer.wte.weight"].all()
    assert not any(step.any() for name, step in found.items() if name != "transformer.wte.weight")
    assert not any("ln" in name for name in found)


def test_hooks_and_schedules_of_the_user_do_not_run():
    model, optimizers = trained(OPTIMIZERS["AdamW"])
    called = []
    optimizers[0].register_step_pre_hook(lambda *_: called.append("before"))
    optimizers[0].register_step_post_hook(lambda *_: called.append("after"))
    next_step(model, optimizers, gradients_of(model))
    assert not called


def test_hooks_on_all_optimizers_do_not_run():
    model, optimizers = trained(OPTIMIZERS["AdamW"])
    called = []
    handle = register_optimizer_step_post_hook(lambda *_: called.append("after"))
    try:
        next_step(model, optimizers, gradients_of(model))
    finally:
        handle.remove()
    assert not called


def test_a_parameter_of_another_model_is_left_alone():
    model, other = dense.gpt2(dropout=0.0), nn.Linear(2, 2)
    optimizer = torch.optim.AdamW([*model.parameters(), *other.parameters()], lr=1e-2)
    gradients = gradients_of(model)
    assert set(next_step(model, [optimizer], gradients)) == set(gradients)
    assert not optimizer.state


def test_an_optimizer_that_needs_more_than_a_gradient_is_refused_by_name():
    model = dense.gpt2(dropout=0.0)
    with pytest.raises(ProbeError, match="LBFGS"):
        next_step(model, [torch.optim.LBFGS(model.parameters())], gradients_of(model))


def by_hand(optimizer, parameter, group):
    """D of one parameter from the state that torch keeps, with none of the code under test."""
    state = optimizer.state[parameter]
    moment = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    first, second = group["betas"]
    corrected = moment.double() / (1 - second ** float(state["step"]))
    return (float(group["lr"]) * (1 - first) / (2 + 2 * first) / (corrected.sqrt() + group["eps"])).sqrt()


@pytest.mark.parametrize("name", ["AdamW", "AdamW, fused", "Adam, amsgrad", "Adam, rate in a tensor", "groups"])
def test_the_preconditioner_is_the_formula(name):
    model, optimizers = trained(OPTIMIZERS[name])
    kept = snapshot(model, optimizers)
    found = preconditioner(model, optimizers)
    assert equal(kept, snapshot(model, optimizers))
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    assert set(found) == set(names.values())
    for group in optimizers[0].param_groups:
        for parameter in group["params"]:
            truth = by_hand(optimizers[0], parameter, group)
            torch.testing.assert_close(found[names[id(parameter)]].double(), truth, rtol=1e-5, atol=0)


def test_what_no_optimizer_moves_is_not_in_the_preconditioner():
    model = dense.gpt2(dropout=0.0)
    model.transformer.wpe.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for name, p in model.named_parameters() if "ln" not in name])
    loss_of(model).backward()
    optimizer.step()
    found = preconditioner(model, [optimizer])
    assert "transformer.wpe.weight" not in found
    assert not any("ln" in name for name in found)


@pytest.mark.parametrize("name", ["SGD", "SGD, Nesterov", "two optimizers"])
def test_an_optimizer_without_a_second_moment_is_refused_by_name(name):
    model, optimizers = trained(OPTIMIZERS[name])
    with pytest.raises(ProbeError, match="SGD"):
        preconditioner(model, optimizers)
    with pytest.raises(ProbeError, match="SGD"):
        require_adam(optimizers)


def test_before_the_first_step_there_is_no_preconditioner():
    model, optimizers = trained(OPTIMIZERS["AdamW"], steps=0)
    require_adam(optimizers)
    with pytest.raises(ProbeError, match=r"transformer\.wte\.weight.*step"):
        preconditioner(model, optimizers)


def test_a_second_moment_of_another_shape_is_refused():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters())
    F.mse_loss(model(torch.ones(2, 4)), torch.zeros(2, 3)).backward()
    optimizer.step()
    optimizer.state[model.weight]["exp_avg_sq"] = torch.ones(3, 1)  # factored
    with pytest.raises(ProbeError, match="weight"):
        preconditioner(model, [optimizer])
