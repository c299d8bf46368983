"""Which hooks are part of a model's computation."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from sharpwatch.curvature.state.hooks import hidden_pre_hooks, hide_user_hooks, is_computing


def own(*_):
    pass


class OwnModule(nn.Module):
    def forward(self, *_):
        pass


def made_in(module):
    def hook(*_):
        pass

    hook.__module__ = module
    return hook


@pytest.mark.parametrize(
    ("hook", "computes"),
    [
        (own, False),
        (functools.partial(own, 1), False),
        (OwnModule(), False),
        (made_in("transformers.utils.output_capturing"), True),
        (functools.partial(made_in("peft.tuners.tuners_utils"), 1), True),
        (made_in("transformers.trainer"), False),
        (made_in("torchvision.models"), False),
    ],
)
def test_a_hook_computes_where_a_library_made_it_for_that(hook, computes):
    assert is_computing(hook) is computes


def test_torchs_own_weight_hooks_compute():
    module = nn.utils.spectral_norm(nn.Linear(2, 2))
    (hook,) = module._forward_pre_hooks.values()
    assert is_computing(hook)


def halved(module, _):
    module.weight = module.weight_orig / 2


def factored(module, _):
    module.weight = module.weight_a @ module.weight_b


def keeping(module, inputs):
    module.last = inputs[0]


def with_hook(hook, **parameters):
    module = nn.Linear(3, 4)
    if parameters:
        del module._parameters["weight"]
    for name, shape in parameters.items():
        module.register_parameter(name, nn.Parameter(torch.ones(shape)))
    module.register_forward_pre_hook(hook)
    return module


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize(
    ("module", "kept"),
    [
        (with_hook(halved, weight_orig=(4, 3)), True),
        (with_hook(factored, weight_a=(4, 1), weight_b=(1, 3)), True),
        (with_hook(keeping), False),
    ],
)
def test_pre_hooks_that_set_a_weight_are_kept(module, kept, gradients):
    with torch.set_grad_enabled(gradients):
        module(torch.ones(2, 3))
    assert bool(hidden_pre_hooks(module)) is not kept
    original = module._forward_pre_hooks
    hide_user_hooks(module)
    assert bool(module._forward_pre_hooks) is kept
    module._forward_pre_hooks = original


def test_a_hidden_hook_is_named():
    assert hidden_pre_hooks(with_hook(keeping)) == ["keeping"]
