from __future__ import annotations

import copy

import dense
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import nn

from sharpwatch.blocks import classify
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.objective.objective import Objective
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
