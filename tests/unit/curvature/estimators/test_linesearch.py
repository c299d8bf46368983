from __future__ import annotations

import copy
import math

import dense
import pytest
import torch
from torch import nn

from sharpwatch.blocks import classify
from sharpwatch.curvature.estimators.linesearch import critical_sharpness, critical_sharpness_along, linesearch_probe
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.objective.objective import Objective
from sharpwatch.curvature.parameters.parameter_space import ParameterSpace
from sharpwatch.curvature.state.isolation import isolated


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
