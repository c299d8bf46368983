from __future__ import annotations

import copy
import math

import dense
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import nn

from sharpwatch.blocks import Rule, Rules, classify
from sharpwatch.curvature.estimators.directional import (
    critical_sharpness,
    critical_sharpness_along,
    direction_probe,
    linesearch_probe,
)
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.objective.objective import Objective
from sharpwatch.curvature.parameters.parameter_space import ParameterSpace
from sharpwatch.curvature.state.isolation import isolated
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
        parts = [found.curvature_parts[i] for i, each in enumerate(block_map.layer_blocks) if each.type == block]
        assert float(sum(parts)) == pytest.approx(float(whole), abs=1e-4 * float((d * product[own]).abs().sum()))
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


def test_says_where_there_is_no_second_derivative():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte = nn.Embedding(5, 4)

        def forward(self, idx):
            return dense.Once.apply(self.wte(idx)).square().sum()

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


def parabola(critical):
    """Falls from 0 and is back at 0 at the scale `critical`, exactly, where a float can say so."""
    return lambda scale: scale * (scale - critical)


@pytest.mark.parametrize("critical", [0.003, 0.3, 0.97, 1.0, 1.03, 2.0, 2.4, 17.0, 1000.0, 4000.0])
def test_finds_where_a_parabola_is_back_at_its_start(critical):
    found = critical_sharpness(parabola(critical))
    assert abs(found.value - 1 / critical) <= found.half_width * (1 + 1e-9)
    # A factor of two in sixteen steps: the bracket is at most a sixteenth of its lower end.
    assert found.half_width <= found.value / 32 * (1 + 1 / 16)
    # 0, 1, the doublings or halvings, 4 bisections.
    assert found.forwards <= 2 + math.ceil(abs(math.log2(critical))) + 1 + 4


@pytest.mark.parametrize("critical", [0.6, 0.97, 1.03, 1.9])
def test_near_the_edge_takes_seven_forwards(critical):
    calls = []

    def loss(scale):
        calls.append(scale)
        return parabola(critical)(scale)

    assert critical_sharpness(loss).forwards == len(calls) == 7


def test_a_step_that_raises_the_loss_has_more_than_one():
    assert critical_sharpness(parabola(0.9)).value > 1 > critical_sharpness(parabola(1.1)).value


@pytest.mark.parametrize("loss", [lambda scale: -scale, lambda _: 3.0, parabola(5000.0)], ids=["falls", "flat", "far"])
def test_a_loss_that_no_scale_in_reach_raises_has_none(loss):
    found = critical_sharpness(loss)
    assert found.value == 0.0
    assert found.half_width == 1 / 4096  # where the search ended
    assert found.forwards == 14


@pytest.mark.parametrize(
    ("loss", "truth"),
    [(parabola(1e-5), 1e5), (lambda scale: scale, math.inf)],
    ids=["nearer than the search goes", "ascends"],
)
def test_a_loss_that_every_scale_in_reach_raises_has_no_finite_bracket(loss, truth):
    found = critical_sharpness(loss)
    assert math.isnan(found.value) or found.value + found.half_width >= truth


def test_a_loss_that_is_no_number_has_risen():
    found = critical_sharpness(lambda scale: -scale if scale < 3 else math.nan)
    assert abs(found.value - 1 / 3) <= found.half_width
    assert found.half_width < 0.02
    overflowing = critical_sharpness(lambda scale: -scale if scale < 0.4 else math.inf)
    assert abs(overflowing.value - 1 / 0.4) <= overflowing.half_width


def test_from_a_loss_that_is_no_number_there_is_no_critical_sharpness():
    assert math.isnan(critical_sharpness(lambda _: math.nan).value)


def test_a_jump_is_found_as_a_crossing_is():
    found = critical_sharpness(lambda scale: -1.0 if 0 < scale < 1.5 else 1.0 if scale else 0.0)
    assert abs(found.value - 1 / 1.5) <= found.half_width


class Bowl(nn.Module):
    """½ θᵀAθ in two blocks that A couples."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(3, 4)
        self.ln_f = nn.LayerNorm(4)
        generator = torch.Generator().manual_seed(0)
        root = torch.randn(20, 20, generator=generator)
        self.register_buffer("curvature", root @ root.T / 20 + 0.1 * torch.eye(20))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, idx, targets):
        del idx, targets
        theta = torch.cat([parameter.flatten() for parameter in self.parameters()])
        return None, theta @ self.curvature @ theta / 2


ZERO = torch.zeros(1, 1, dtype=torch.int64)


def flat(tensors):
    return torch.cat([tensors[name].flatten() for name, _ in Bowl().named_parameters()]).double()


@pytest.mark.parametrize("rate", [0.01, 0.3, 3.0])
def test_probe_finds_the_whole_step_and_each_block_from_where_the_step_began(rate):
    # On a quadratic c* = 2 g'd / d'Hd, with g at theta_t; the model has taken the step already.
    model = Bowl()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradient = model.curvature.double() @ flat(start)
    pieces = gradient.split([parameter.numel() for parameter in start.values()])
    step = {n: rate * piece.view(start[n].shape).float() for n, piece in zip(start, pieces, strict=True)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.sub_(step[name])
    left = copy.deepcopy(model.state_dict())
    block_map = classify(model)
    found = linesearch_probe(model, block_map, Batch((ZERO, ZERO)), step, blocks=("norm", "emb"))

    def truth(names):
        d = flat({name: values if name in names else torch.zeros_like(values) for name, values in step.items()})
        return float(d @ model.curvature.double() @ d / (2 * gradient @ d))

    # float32 losses of a size near 10: they resolve the scale far below the half width of a bracket.
    slack = 1.01
    assert found.sharpness == pytest.approx(truth(set(step)), abs=slack * found.half_width)
    assert 0 < found.half_width < 0.04 * found.sharpness
    for block, names in (("emb", {"wte.weight"}), ("norm", {"ln_f.weight", "ln_f.bias"})):
        index = block_map.blocks.index(block)
        width = float(found.block_half_width[index])
        assert float(found.block_sharpness[index]) == pytest.approx(truth(names), abs=slack * width)
    assert all(torch.equal(left[name], values) for name, values in model.state_dict().items())


def test_probe_leaves_blocks_that_are_not_asked_for_open():
    model = Bowl()
    block_map = classify(model)
    step = {name: 0.1 * parameter.detach() for name, parameter in model.named_parameters()}
    found = linesearch_probe(model, block_map, Batch((ZERO, ZERO)), step, blocks=("norm",))
    asked = torch.tensor([block == "norm" for block in block_map.blocks])
    assert torch.equal(~found.block_sharpness.isnan(), asked)
    assert torch.equal(~found.block_half_width.isnan(), asked)
    nothing = linesearch_probe(model, block_map, Batch((ZERO, ZERO)), {"ln_f.weight": step["ln_f.weight"]}, blocks=())
    assert nothing.block_sharpness.isnan().all()


@pytest.mark.parametrize("name", dense.MODELS)
def test_probe_of_a_model_is_a_search_by_hand(name):
    model = dense.MODELS[name]()
    ids, labels = dense.tokens()
    batch = Batch((), {"input_ids": ids, "labels": labels})
    exact = dense.Exact.of(model)
    loss = exact.model(input_ids=ids, labels=labels).loss
    gradients = dict(zip(exact.names, torch.autograd.grad(loss, exact.parameters), strict=True))
    step = {name: 3.0 * gradient.float() for name, gradient in gradients.items()}
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.sub_(step[key])
    found = linesearch_probe(model, classify(model), batch, step, blocks=())

    def by_hand(scale):
        with torch.no_grad():
            for key, parameter in exact.model.named_parameters():
                parameter.copy_(start[key].double() - scale * step[key].double())
            return float(exact.model(input_ids=ids, labels=labels).loss)

    assert found.sharpness > 0
    below, above = 1 / (found.sharpness + found.half_width), 1 / (found.sharpness - found.half_width)
    # float32 resolves a loss of 4 to 1e-6 at worst; the slope at the crossing is of the order of the loss over c.
    assert by_hand(below * 0.999) <= by_hand(0.0)
    assert by_hand(above * 1.001) > by_hand(0.0)


def test_several_batches_are_searched_as_one():
    model = dense.gpt2()
    block_map = classify(model)
    ids, labels = dense.tokens(rows=4)
    whole = [Batch((), {"input_ids": ids, "labels": labels})]
    rows = [Batch((), {"input_ids": ids[i : i + 1], "labels": labels[i : i + 1]}) for i in range(4)]
    found = []
    for batches in (whole, rows):
        with isolated(model, exact=True) as live:
            objective = Objective(live, batches)
            space = ParameterSpace(block_map, "vo", live.leaves)
            gradient = sum(
                share * space.flatten(objective.gradient(index, space.names))
                for index, share in enumerate(objective.shares)
            )
            found.append(critical_sharpness_along(objective, space, gradient))
    assert found[0].value == pytest.approx(found[1].value, abs=found[0].half_width)
