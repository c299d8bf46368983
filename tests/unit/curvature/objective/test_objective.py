from __future__ import annotations

import copy

import dense
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from sharpwatch.blocks import classify
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.objective.objective import (
    Objective,
    is_smooth,
    require_twice_differentiable,
    twice_differentiable,
)
from sharpwatch.curvature.parameters.parameter_space import ParameterSpace
from sharpwatch.curvature.state.isolation import isolated
from sharpwatch.curvature.statistics.estimate import Cost
from sharpwatch.errors import ProbeError


def batches(*rows):
    """One batch of each so many rows, and all of them as one."""
    ids, labels = dense.tokens(rows=sum(rows))
    cut = [torch.split(tensor, list(rows)) for tensor in (ids, labels)]
    parts = [Batch((), {"input_ids": i, "labels": each}) for i, each in zip(*cut, strict=True)]
    return parts, Batch((), {"input_ids": ids, "labels": labels})


def state(model):
    return {
        "weights": [parameter.detach().clone() for parameter in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "buffers": [buffer.clone() for buffer in model.buffers()],
        "objects": [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
        "training": [module.training for module in model.modules()],
    }


def same(one, other):
    for name in ("weights", "gradients", "buffers"):
        pairs = zip(one[name], other[name], strict=True)
        if not all((a is None and b is None) or torch.equal(a, b) for a, b in pairs):
            return False
    return one["objects"] == other["objects"] and one["training"] == other["training"]


@pytest.mark.parametrize("name", dense.ZOO)
def test_the_mean_over_batches_of_different_sizes_is_the_loss_of_all_tokens(name):
    model = dense.ZOO[name]()
    parts, whole = batches(1, 4, 2)
    with isolated(model, exact=True) as live:
        split, one = Objective(live, parts), Objective(live, [whole])
        assert sum(split.tokens) == one.tokens[0]
        assert len(set(split.shares)) == 3
        assert sum(split.shares) == pytest.approx(1.0)
        mean = sum(share * split.value(index) for index, share in enumerate(split.shares))
        # float32 sums in another order.
        assert mean == pytest.approx(one.value(0), rel=2e-6)
        names = list(live.trainable)
        each = [split.gradient(index, names) for index in range(3)]
        truth = one.gradient(0, names)
        assert set(truth) == set(each[0])
        for key, gradient in truth.items():
            found = sum(share * own[key] for share, own in zip(split.shares, each, strict=True))
            torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-6 + 1e-5 * float(gradient.abs().max()))


def test_the_value_is_the_models_own_loss_without_dropout():
    model = dense.gpt2(dropout=0.5)
    _, whole = batches(3)
    truth = copy.deepcopy(model).eval()(**whole.kwargs).loss.detach()
    with isolated(model, exact=True) as live:
        objective = Objective(live, [whole])
        assert objective.value(0) == float(truth)
        assert objective.value(0) == float(truth)  # and again: nothing is drawn


def test_inside_the_weights_are_elsewhere_and_outside_where_they_were():
    model = dense.gpt2()
    block_map = classify(model)
    _, whole = batches(3)
    twin = copy.deepcopy(model).eval()
    with isolated(model, exact=True) as live:
        objective = Objective(live, [whole])
        space = ParameterSpace(block_map, "vo", live.leaves)
        displacement = 0.1 * space.random_signs(torch.Generator().manual_seed(0))
        before, leaves = objective.value(0), dict(live.leaves)
        for name, values in space.unflatten(displacement[None]).items():
            twin.get_parameter(name).data += values[0]
        with objective.displaced(space, displacement) as moved:
            assert objective.value(0) == float(twin(**whole.kwargs).loss.detach())
            assert set(moved) == set(space.names)
            assert all(live.leaves[name] is tensor and tensor.requires_grad for name, tensor in moved.items())
            inside = objective.gradient(0, list(live.trainable))
            assert all(torch.equal(live.leaves[n], leaves[n]) for n in leaves if n not in moved)
        truth = torch.autograd.grad(twin(**whole.kwargs).loss, list(twin.parameters()))
        for (name, _), gradient in zip(twin.named_parameters(), truth, strict=True):
            torch.testing.assert_close(inside[name], gradient, rtol=1e-4, atol=1e-6)
        assert all(live.leaves[name] is leaf for name, leaf in leaves.items())
        assert objective.value(0) == before != float(twin(**whole.kwargs).loss.detach())


def test_what_of_a_fused_parameter_is_another_blocks_stays():
    model = dense.gpt2()
    block_map = classify(model)
    _, whole = batches(1)
    name = "transformer.h.0.attn.c_attn.weight"
    own = model.get_parameter(name).detach()
    with isolated(model, exact=True) as live:
        space = ParameterSpace(block_map, "qk", live.leaves)
        with Objective(live, [whole]).displaced(space, torch.ones(space.size)) as moved:
            difference = moved[name].detach() - own
        assert (difference[:, :32] != 0).all()
        assert (difference[:, 32:] == 0).all()


class BoomError(Exception):
    pass


def test_the_weights_are_back_after_an_error_in_the_body():
    model = dense.llama()
    block_map = classify(model)
    parts, _ = batches(1)
    kept = state(model)

    def fail(objective, space):
        with objective.displaced(space, torch.ones(space.size)):
            objective.value(0)
            raise BoomError

    with isolated(model, exact=True) as live:
        objective = Objective(live, parts)
        before, leaves = objective.value(0), dict(live.leaves)
        with pytest.raises(BoomError):
            fail(objective, ParameterSpace(block_map, None, live.leaves))
        assert all(live.leaves[name] is leaf for name, leaf in leaves.items())
        assert objective.value(0) == before
    assert same(kept, state(model))


def test_displacements_nest():
    model = dense.gpt2()
    block_map = classify(model)
    parts, _ = batches(1)
    with isolated(model, exact=True) as live:
        objective = Objective(live, parts)
        whole, norm = ParameterSpace(block_map, None, live.leaves), ParameterSpace(block_map, "norm", live.leaves)
        start = objective.value(0)
        with objective.displaced(whole, torch.full((whole.size,), 0.01)):
            outer = objective.value(0)
            with objective.displaced(norm, torch.full((norm.size,), 0.01)):
                assert objective.value(0) not in {start, outer}
            assert objective.value(0) == outer
        assert objective.value(0) == start


class Keeping(nn.Module):
    """Writes a buffer in each forward and is tied to nothing that a probe may touch."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(dense.VOCAB, 8)
        self.ln_f = nn.LayerNorm(8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, idx, targets):
        self.calls += 1
        x = self.ln_f(self.wte(idx))
        return F.cross_entropy((x @ self.wte.weight.T).flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("make", [dense.gpt2, Keeping])
def test_the_users_model_is_bitwise_untouched(make):
    torch.manual_seed(0)
    model = make().train()
    ids, labels = dense.tokens()
    batch = Batch((ids,), {"labels" if make is dense.gpt2 else "targets": labels.clamp(min=0)})
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    kept, parameters, block_map = state(model), list(model.parameters()), classify(model)
    with isolated(model, exact=True) as live:
        objective = Objective(live, [batch])
        space = ParameterSpace(block_map, None, live.leaves)
        with objective.displaced(space, torch.ones(space.size)):
            objective.value(0)
            objective.gradient(0, space.names)
            assert all(torch.equal(p, w) for p, w in zip(parameters, kept["weights"], strict=True))
        objective.gradient(0, space.names)
    assert same(kept, state(model))


def test_a_frozen_parameter_stays_where_it_is():
    model = dense.gpt2()
    frozen = model.transformer.wpe.weight.requires_grad_(False)
    block_map = classify(model)
    parts, _ = batches(1)
    with isolated(model, exact=True) as live:
        objective = Objective(live, parts)
        space = ParameterSpace(block_map, "emb", live.leaves)
        with objective.displaced(space, torch.ones(space.size)) as moved:
            assert set(moved) == {"transformer.wte.weight"}
            assert torch.equal(live.leaves["transformer.wpe.weight"], frozen)


def test_counts_passes_in_units_of_all_batches():
    model = dense.gpt2()
    parts, _ = batches(1, 3)
    with isolated(model, exact=True) as live:
        objective = Objective(live, parts)
        for index in range(2):
            objective.value(index)
            objective.gradient(index, ["transformer.ln_f.weight"])
        assert objective.cost.forwards == pytest.approx(2.0)
        assert objective.cost.backwards == pytest.approx(1.0)
        before = objective.cost
        objective.value(1)
        assert (objective.cost - before).forwards == pytest.approx(objective.shares[1])
        assert (objective.cost - before).backwards == Cost().backwards


def test_a_sparse_gradient_is_made_dense_and_what_is_not_reached_left_out():
    torch.manual_seed(0)
    model = Keeping()
    model.wte = nn.Embedding(dense.VOCAB, 8, sparse=True)
    model.unused = nn.LayerNorm(3)
    ids, labels = dense.tokens()

    def loss_fn(called, batch):
        return called.ln_f(called.wte(batch.args[0])).square().mean()

    with isolated(model, exact=True) as live:
        found = Objective(live, [Batch((ids, labels))], loss_fn).gradient(0, list(live.trainable))
    assert set(found) == {"wte.weight", "ln_f.weight", "ln_f.bias"}
    assert not found["wte.weight"].is_sparse


def test_a_batch_in_which_nothing_predicts_is_refused():
    model = dense.gpt2()
    ids, labels = dense.tokens()
    parts = [Batch((), {"input_ids": ids, "labels": each}) for each in (labels, torch.full_like(labels, -100))]
    with isolated(model, exact=True) as live, pytest.raises(ProbeError, match="no position"):
        Objective(live, parts)


def test_a_model_held_in_bfloat16_is_evaluated_in_float32():
    model = dense.llama().bfloat16()
    _, whole = batches(3)
    truth = copy.deepcopy(model).float().eval()(**whole.kwargs).loss.detach()
    with torch.autocast("cpu", torch.bfloat16), isolated(model, exact=True) as live:
        objective = Objective(live, [whole])
        assert objective.value(0) == float(truth)
        gradient = objective.gradient(0, list(live.trainable))
    assert {tensor.dtype for tensor in gradient.values()} == {torch.float32}


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
        require_twice_differentiable(through(dense.Once.apply))
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
