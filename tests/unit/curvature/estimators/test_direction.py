from __future__ import annotations

import copy

import dense
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import nn

from sharpwatch.blocks import Rule, Rules, classify
from sharpwatch.curvature.estimators.direction import direction_probe
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.errors import ProbeError


@pytest.fixture(scope="module", params=dense.MODELS)
def case(request):
    """A model, a step, and the truth of it: g and H at the model's weights, laid out flat."""
    model = dense.MODELS[request.param]()
    ids, labels = dense.tokens()
    exact = dense.Exact.of(model)
    gradient, hessian = dense.gradient_and_hessian(exact, ids, labels)
    generator = torch.Generator().manual_seed(2)
    step = 0.01 * (gradient + gradient.norm() / len(gradient) ** 0.5 * torch.randn(len(gradient), generator=generator))
    return model, Batch((), {"input_ids": ids, "labels": labels}), exact, gradient, hessian, step.float().double()


def unflatten(exact, step):
    sizes = [parameter.numel() for parameter in exact.parameters]
    pieces = zip(exact.names, exact.parameters, step.split(sizes), strict=True)
    return {name: piece.view(parameter.shape).float() for name, parameter, piece in pieces}


def test_agrees_with_the_dense_hessian(case):
    model, batch, exact, gradient, hessian, step = case
    block_map = classify(model)
    found = direction_probe(model, block_map, batch, unflatten(exact, step), blocks=block_map.blocks)
    product = hessian @ step
    curvature = step @ product
    # The model computes in float32: 1e-4 of each term, before they cancel.
    assert found.curvature == pytest.approx(float(curvature), rel=1e-4)
    assert found.descent == pytest.approx(float(gradient @ step + curvature), rel=1e-4)
    for index, block in enumerate(block_map.blocks):
        own = exact.entries(block_map, block)
        d = step[own]
        whole = d @ product[own]
        scale = 1e-4 * float((d * gradient[own]).abs().sum() + (d * product[own]).abs().sum())
        assert float(found.block_descent[index]) == pytest.approx(float(d @ gradient[own] + whole), abs=scale)
        alone = d @ hessian[own][:, own]
        scale = 1e-4 * float((alone * d).abs().sum())
        assert float(found.block_curvature[index]) == pytest.approx(float(alone @ d), abs=scale)


def test_descents_add_up_and_curvatures_of_blocks_do_not(case):
    model, batch, exact, _, _, step = case
    block_map = classify(model)
    found = direction_probe(model, block_map, batch, unflatten(exact, step), blocks=block_map.blocks)
    assert float(found.block_descent.sum()) == pytest.approx(found.descent, rel=1e-12)
    assert abs(float(found.block_curvature.sum()) - found.curvature) > 0.01 * abs(found.curvature)


def test_takes_only_the_blocks_whose_turn_it_is(case):
    model, batch, exact, _, _, step = case
    block_map = classify(model)
    every = direction_probe(model, block_map, batch, unflatten(exact, step), blocks=block_map.blocks)
    for blocks in ((), ("norm",), ("qk", "emb")):
        found = direction_probe(model, block_map, batch, unflatten(exact, step), blocks=blocks)
        taken = torch.tensor([block in blocks for block in block_map.blocks])
        assert torch.equal(~found.block_curvature.isnan(), taken)
        torch.testing.assert_close(found.block_curvature[taken], every.block_curvature[taken])
        assert found.curvature == pytest.approx(every.curvature, rel=1e-5)


def test_the_ratio_is_one_where_the_loss_stops_falling():
    # On a quadratic, a step along -g that ends on the far side at the same height has rho = 1.
    class Bowl(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte = nn.Embedding(1, 1)
            nn.init.constant_(self.wte.weight, -3.0)  # where the step from 3 ends

        def forward(self, idx, targets):
            del targets
            return None, 2.5 * self.wte(idx).square().sum()

    model = Bowl()
    zero = torch.zeros(1, 1, dtype=torch.int64)
    step = {"wte.weight": torch.full((1, 1), 6.0)}
    found = direction_probe(model, classify(model), Batch((zero, zero)), step, blocks=("emb",))
    assert found.descent == pytest.approx(15.0 * 6.0)  # g at 3 is 5 * 3
    assert found.curvature == pytest.approx(5.0 * 36.0)
    assert found.curvature / (2 * found.descent) == pytest.approx(1.0)
    assert float(found.block_curvature[0]) == pytest.approx(5.0 * 36.0)


def test_what_has_not_moved_counts_as_zero():
    model = dense.gpt2()
    model.transformer.wpe.weight.requires_grad_(False)
    model.unused = nn.Linear(4, 4)
    block_map = classify(model, Rules((Rule("unused.*", block="other"),)))
    ids, labels = dense.tokens()
    generator = torch.Generator().manual_seed(5)
    moved = {"transformer.ln_f.weight": 0.1 * torch.randn(16, generator=generator)}
    found = direction_probe(model, block_map, Batch((ids,), {"labels": labels}), moved, blocks=("emb", "norm", "other"))
    by_block = dict(zip(block_map.blocks, found.block_descent.tolist(), strict=True))
    assert {block for block, value in by_block.items() if value} == {"norm"}
    own = dict(zip(block_map.blocks, found.block_curvature.tolist(), strict=True))
    assert own["norm"] == pytest.approx(found.curvature, rel=1e-5)
    assert own["emb"] == own["other"] == 0.0


def test_the_loss_is_the_runs_own():
    model = dense.gpt2()
    block_map = classify(model)
    ids, labels = dense.tokens()
    batch = Batch((), {"input_ids": ids, "labels": labels, "num_items_in_batch": torch.tensor(10**6)})
    step = {name: 0.01 * parameter.detach() for name, parameter in model.named_parameters()}

    def twice(called, given):
        return 2 * called(input_ids=given.kwargs["input_ids"], labels=given.kwargs["labels"]).loss

    def by_hand(called, given):
        logits = called(given.kwargs["input_ids"]).logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, given.kwargs["labels"][:, 1:].flatten())

    own, double, manual = (
        direction_probe(model, block_map, batch, step, blocks=("qk",), loss_fn=loss_fn)
        for loss_fn in (None, twice, by_hand)
    )
    assert double.curvature == pytest.approx(2 * own.curvature, rel=1e-4)
    assert manual.curvature == pytest.approx(own.curvature, rel=1e-4)
    assert own.tokens == int((labels[:, 1:] != -100).sum())
    with pytest.raises(ProbeError, match="pass loss_fn"):
        direction_probe(model, block_map, Batch((ids,)), step, blocks=())


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


def test_says_where_there_is_no_second_derivative():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte = nn.Embedding(5, 4)

        def forward(self, idx):
            return _Once.apply(self.wte(idx)).square().sum()

    torch.manual_seed(0)
    model = Fused()
    step = {"wte.weight": torch.ones(5, 4)}
    batch = Batch((torch.arange(5)[None],))
    with pytest.raises(ProbeError, match="differentiated twice"):
        direction_probe(model, classify(model), batch, step, blocks=(), method="autograd")
    found = direction_probe(model, classify(model), batch, step, blocks=("emb",))
    assert found.method == "gradient differences"
    truth = float(30 * model.wte.weight.detach().double().pow(4).sum())  # of x^6: 30 x^4
    assert found.curvature == pytest.approx(truth, rel=1e-3)
    assert float(found.block_curvature[0]) == pytest.approx(truth, rel=1e-3)


def test_a_compiled_model_is_run_eagerly():
    model = dense.gpt2()
    ids, labels = dense.tokens()
    batch = Batch((), {"input_ids": ids, "labels": labels})
    step = {name: 0.01 * parameter.detach() for name, parameter in model.named_parameters()}
    eager = direction_probe(model, classify(model), batch, step, blocks=("vo",))
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(copy.deepcopy(model), backend=backend)
    wrapped = {f"_orig_mod.{name}": values for name, values in step.items()}
    found = direction_probe(compiled, classify(compiled), batch, wrapped, blocks=("vo",))
    assert found.curvature == pytest.approx(eager.curvature, rel=1e-6)
    assert found.block_curvature.nansum() == pytest.approx(float(eager.block_curvature.nansum()), rel=1e-6)
    assert not graphs
