from __future__ import annotations

import dense
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from sharpwatch.curvature.objective.autograd_graph import is_smooth, require_twice_differentiable, twice_differentiable
from sharpwatch.curvature.state.isolation import isolated
from sharpwatch.errors import ProbeError


def loss_of(make):
    model = make()
    ids, labels = dense.tokens()
    with isolated(model, exact=True) as live:
        return live(input_ids=ids, labels=labels).loss


@pytest.mark.parametrize("name", ["gpt2", "llama", "tied_llama", "gpt_neox"])
def test_a_dense_transformer_is_smooth(name):
    assert is_smooth(loss_of(dense.ZOO[name]))


@pytest.mark.parametrize("name", ["mixtral", "t5"])  # the best experts of each token; ReLU in the feed-forward
def test_a_choice_of_experts_and_relu_are_not_smooth(name):
    assert not is_smooth(loss_of(dense.ZOO[name]))


X = torch.linspace(-2.0, 2.0, 12).view(3, 4)
KINKS = {
    "relu": F.relu,
    "relu squared": lambda x: F.relu(x).square(),
    "leaky relu": F.leaky_relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "hardswish": F.hardswish,
    "threshold": lambda x: F.threshold(x, 0.1, 0.0),
    "clamp": lambda x: x.clamp(-1, 1),
    "abs": torch.abs,
    "max": lambda x: x.max(1).values,
    "amax": lambda x: x.amax(1),
    "maximum": lambda x: torch.maximum(x, x.square()),
    "topk": lambda x: x.topk(2).values,
    "sort": lambda x: x.sort().values,
    "median": lambda x: x.median(1).values,
    "round": torch.round,
    "l1": lambda x: F.l1_loss(x, torch.zeros_like(x)),
    "selu": F.selu,
    "elu": F.elu,
    "softshrink": F.softshrink,
    "huber": lambda x: F.huber_loss(x, torch.zeros_like(x)),
    "smooth l1": lambda x: F.smooth_l1_loss(x, torch.zeros_like(x)),
    "cummax": lambda x: x.cummax(1).values,
    "trunc": torch.trunc,
    "remainder": lambda x: torch.remainder(x, 0.7),
    "pooled": lambda x: F.max_pool1d(x, 2),
}
SMOOTH = {
    "gelu": F.gelu,
    "tanh gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "mish": F.mish,
    "softmax": lambda x: x.softmax(-1),
    "log softmax": lambda x: x.log_softmax(-1),
    "layer norm": lambda x: F.layer_norm(x, (4,)),
    "rms norm": lambda x: x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt(),
    "masked": lambda x: x.masked_fill(torch.eye(3, 4, dtype=torch.bool), -1e9).softmax(-1),
    "cross-entropy": lambda x: F.cross_entropy(x, torch.tensor([0, 1, 2])),
    "attention": lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
}


def through(function):
    x = X.clone().requires_grad_()
    return function(x.exp()).square().sum()


@pytest.mark.parametrize("name", KINKS)
def test_sees_a_kink_wherever_in_the_graph(name):
    assert not is_smooth(through(KINKS[name]))


@pytest.mark.parametrize("name", SMOOTH)
def test_takes_no_smooth_function_for_a_kink(name):
    assert is_smooth(through(SMOOTH[name]))


def test_a_loss_without_a_graph_is_smooth():
    assert is_smooth(torch.ones(()))
    require_twice_differentiable(torch.ones(()))


def test_what_is_shared_many_times_over_is_walked_once():
    x = X.clone().requires_grad_()
    y = x
    for _ in range(200):  # 2^200 paths, and deeper than Python's stack for some
        y = y + y.sin()
    for _ in range(3000):
        y = y + 1
    assert is_smooth(y.sum())
    assert not is_smooth(F.relu(y).sum())


@pytest.mark.parametrize("reentrant", [True, False])
def test_sees_into_a_checkpointed_part(reentrant):
    # Inside `isolated` a reentrant checkpoint keeps its graph; outside its backward is one opaque node.
    model = torch.nn.Linear(4, 4)
    with isolated(model, exact=True) as live:
        x = X.clone().requires_grad_()
        assert not is_smooth(checkpoint(lambda y: F.relu(live(y)), x, use_reentrant=reentrant).sum())
        assert is_smooth(checkpoint(lambda y: F.silu(live(y)), x, use_reentrant=reentrant).sum())


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


def test_names_the_function_that_has_no_second_derivative():
    with pytest.raises(ProbeError, match=r"differentiated twice.*Once"):
        require_twice_differentiable(through(Once.apply))
    require_twice_differentiable(through(Twice.apply))


def test_knows_the_packages_whose_kernels_autograd_does_not_see_into(monkeypatch):
    monkeypatch.setattr(Twice, "__module__", "flash_attn.flash_attn_interface")
    with pytest.raises(ProbeError, match="flash_attn"):
        require_twice_differentiable(through(Twice.apply))


@pytest.mark.parametrize(
    "words",
    [
        "derivative for aten::_scaled_dot_product_flash_attention_for_cpu_backward is not implemented",
        "trying to differentiate twice a function that was marked with @once_differentiable",
    ],
)
def test_torchs_complaint_about_a_second_derivative_is_a_probe_error(words):
    def complain():
        with twice_differentiable():
            raise RuntimeError(words)

    with pytest.raises(ProbeError, match="differentiated twice"):
        complain()


def test_other_errors_pass():
    def fail():
        with twice_differentiable():
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()


def test_attention_is_by_the_kernel_with_two_derivatives_inside_and_by_the_users_choice_afterwards():
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        with twice_differentiable():
            assert torch.backends.cuda.math_sdp_enabled()
            assert not torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cuda.math_sdp_enabled()
