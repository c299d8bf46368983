from __future__ import annotations

import dense
import pytest
import torch
from torch import nn

from sharpwatch.blocks import BlockMap, Part, classify
from sharpwatch.curvature.parameters.parameter_space import ParameterSpace
from sharpwatch.curvature.state.isolation import isolated

# Two layers: a fused matrix in runs along either dimension, one interleaved by heads, a bias, a norm, an embedding.
SHAPES = {"emb": (5, 4), "0.fused": (12, 4), "0.out": (4, 4), "0.norm": (4,), "1.conv": (4, 12), "1.heads": (12, 4)}
SHAPES |= {"1.bias": (12,), "1.out": (4, 4), "1.norm": (4,)}
PARTS = (
    Part("emb", "emb", None, None, 0, 0, 20),
    Part("0.fused", "qk", "0", 0, 0, 8, 32),
    Part("0.fused", "vo", "0", 0, 8, 12, 16),
    Part("0.out", "vo", "0", None, 0, 0, 16),
    Part("0.norm", "norm", "0", None, 0, 0, 4),
    Part("1.conv", "qk", "1", 1, 0, 8, 32),
    Part("1.conv", "vo", "1", 1, 8, 12, 16),
    Part("1.heads", "qk", "1", 0, 0, 4, 32, repeats=2),
    Part("1.heads", "vo", "1", 0, 4, 6, 16, repeats=2),
    Part("1.bias", "qk", "1", 0, 0, 4, 8, repeats=2),
    Part("1.bias", "vo", "1", 0, 4, 6, 4, repeats=2),
    Part("1.out", "vo", "1", None, 0, 0, 16),
    Part("1.norm", "norm", "1", None, 0, 0, 4),
)
MAP = BlockMap(PARTS, SHAPES)


def flat_weights(space):
    """The parameters of a space, as one of its vectors."""
    return space.flatten({name: space.leaves[name].detach() for name in space.names})


def leaves(frozen=()):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).requires_grad_(name not in frozen)
        for name, shape in SHAPES.items()
    }


def random(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("block", [None, *MAP.blocks])
def test_vectors_keep_their_entries_on_the_way_to_parameters_and_back(block):
    space = ParameterSpace(MAP, block, leaves())
    vectors = random(3, space.size)
    unflatten = space.unflatten(vectors)
    assert set(unflatten) == set(space.names)
    assert {name: tensor.shape for name, tensor in unflatten.items()} == {n: (3, *SHAPES[n]) for n in space.names}
    assert torch.equal(space.flatten_stacked(unflatten), vectors)
    assert torch.equal(space.flatten({name: tensor[1] for name, tensor in unflatten.items()}), vectors[1])


@pytest.mark.parametrize("block", MAP.blocks)
def test_a_block_has_exactly_the_entries_that_its_parts_view(block):
    unflatten = ParameterSpace(MAP, block, leaves()).unflatten(torch.ones(1, MAP.numel[block]))
    for name, shape in SHAPES.items():
        truth = torch.zeros(shape)
        for part in PARTS:
            if part.parameter == name and part.type == block:
                part.view(truth).fill_(1.0)
        assert torch.equal(unflatten[name][0] if name in unflatten else torch.zeros(shape), truth)


def test_blocks_divide_the_whole_and_keep_its_order():
    given = leaves()
    whole = ParameterSpace(MAP, None, given)
    assert whole.size == sum(MAP.numel.values()) == sum(tensor.numel() for tensor in given.values())
    assert torch.equal(sum(whole.mask(block) for block in MAP.blocks), torch.ones(whole.size))
    vector = random(whole.size)
    named = {name: tensor[0] for name, tensor in whole.unflatten(vector[None]).items()}
    for block in MAP.blocks:
        assert torch.equal(ParameterSpace(MAP, block, given).flatten(named), vector[whole.mask(block) == 1])


def test_inner_products_do_not_depend_on_the_layout():
    space = ParameterSpace(MAP, None, leaves())
    left, right = random(2, space.size, dtype=torch.float64)
    unflatten = [space.unflatten(vector[None]) for vector in (left, right)]
    by_parameter = sum(float((unflatten[0][name] * unflatten[1][name]).sum()) for name in SHAPES)
    assert by_parameter == pytest.approx(float(left @ right), rel=1e-12)


def test_weights_are_the_parameters_themselves():
    given = leaves()
    space = ParameterSpace(MAP, "vo", given)
    unflatten = space.unflatten(flat_weights(space)[None])
    own = space.unflatten(torch.ones(1, space.size))
    for name in space.names:
        assert torch.equal(unflatten[name][0], given[name].detach() * own[name][0])
    assert not flat_weights(space).requires_grad


def test_the_scale_is_the_weights_own_size_or_a_tenth_of_the_whole_models():
    given = leaves()
    own = ParameterSpace(MAP, "vo", given)
    assert own.weight_scale == pytest.approx(float(flat_weights(own).square().mean().sqrt()))
    with torch.no_grad():
        given["0.norm"].mul_(1e-6)
        given["1.norm"].zero_()
    everything = torch.cat([tensor.detach().flatten() for tensor in given.values()])
    assert ParameterSpace(MAP, "norm", given).weight_scale == pytest.approx(
        float(everything.square().mean().sqrt()) / 10
    )
    zeros = {name: torch.zeros_like(tensor).requires_grad_() for name, tensor in given.items()}
    assert ParameterSpace(MAP, "norm", zeros).weight_scale == 1.0


def test_what_is_frozen_is_left_out():
    space = ParameterSpace(MAP, "vo", leaves(frozen={"0.fused", "1.out"}))
    assert space.names == ("0.out", "1.conv", "1.heads", "1.bias")
    assert space.size == MAP.numel["vo"] - 16 - 16
    assert space.sum_by_layer(torch.ones(1, space.size)).sum() == space.size
    nothing = ParameterSpace(MAP, "emb", leaves(frozen={"emb"}))
    assert nothing.size == 0
    assert not nothing.names


def test_a_parameter_that_is_left_out_is_zero():
    space = ParameterSpace(MAP, "vo", leaves())
    vector = random(space.size)
    unflatten = {name: tensor[0] for name, tensor in space.unflatten(vector[None]).items() if name != "1.heads"}
    missing = space.flatten(unflatten)
    present = space.flatten({name: torch.ones(SHAPES[name]) for name in unflatten})
    assert torch.equal(missing, vector * present)
    assert int((present == 0).sum()) == 16
    assert torch.equal(space.flatten({"emb": torch.ones(5, 4)}), torch.zeros(space.size))
    assert torch.equal(space.flatten({}), torch.zeros(space.size))


def test_tied_weights_are_there_once():
    model = dense.gpt2()
    block_map = classify(model)
    with isolated(model, exact=True) as live:
        whole = ParameterSpace(block_map, None, live.leaves)
        assert whole.size == sum(parameter.numel() for parameter in model.parameters())
        assert len(set(whole.names)) == len(whole.names) == len(dict(model.named_parameters()))
        assert torch.equal(
            flat_weights(whole).double(), torch.cat([p.double().flatten() for p in whole_order(whole, model)])
        )


def whole_order(whole, model):
    parameters = dict(model.named_parameters())
    return [part.view(parameters[part.parameter]).detach().reshape(-1) for part in whole.parts]


def test_sums_by_layer_and_by_block_are_the_parts_sums():
    given = leaves()
    whole = ParameterSpace(MAP, None, given)
    products = random(2, whole.size)
    sum_by_layer, sum_by_block = whole.sum_by_layer(products), whole.sum_by_block(products[1])
    for index, layer_block in enumerate(MAP.layer_blocks):
        own = [i for i, part in enumerate(PARTS) if (part.type, part.layer) == (layer_block.type, layer_block.layer)]
        pieces = torch.split(products, [part.numel for part in PARTS], dim=1)
        truth = sum(pieces[i].double().sum(1) for i in own)
        torch.testing.assert_close(sum_by_layer[:, index], truth, rtol=1e-12, atol=1e-12)
    for index, block in enumerate(MAP.blocks):
        truth = products[1].double()[whole.mask(block) == 1].sum()
        assert float(sum_by_block[index]) == pytest.approx(float(truth), abs=1e-12)
        alone = ParameterSpace(MAP, block, given)
        mine = alone.sum_by_block(products[1][whole.mask(block) == 1])
        assert float(mine[index]) == pytest.approx(float(truth), abs=1e-12)
        assert int(mine.count_nonzero()) == 1


def test_sums_are_exact_where_float32_would_not_be():
    space = ParameterSpace(MAP, "emb", leaves())
    products = torch.tensor([1e8, 1.0, -1e8, 1.0] * 5).unsqueeze(0)  # float32's sum of these is not 10
    assert float(space.sum_by_layer(products).sum()) == 10.0
    assert float(space.sum_by_block(products[0]).sum()) == 10.0


def test_signs_are_fair_and_their_own_generators():
    big = BlockMap((Part("w", "ffn", None, None, 0, 0, 40_000),), {"w": (200, 200)})
    space = ParameterSpace(big, None, {"w": torch.zeros(200, 200, requires_grad=True)})
    before = torch.get_rng_state()
    signs = space.random_signs(torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(signs, space.random_signs(torch.Generator().manual_seed(3)))
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 5 / 200  # five standard errors of 40 000 fair signs
    assert abs(float((signs[1:] * signs[:-1]).mean())) < 5 / 200


def colours(space):
    """The entries that turn alike in all patterns of one set of signs."""
    turned = space.mirrored(torch.ones(space.size))
    kinds = sorted({tuple(column) for column in turned.T.tolist()})
    return [torch.tensor([tuple(column) == kind for column in turned.T.tolist()]) for kind in kinds]


@pytest.mark.parametrize("block", [None, *MAP.blocks])
def test_patterns_cancel_the_products_of_different_colours_and_nothing_else(block):
    # For any symmetric H at all, mean_k z_k'Hz_k = sum over colours c of z_c'H_cc z_c: so the mean over z stays Tr H.
    space = ParameterSpace(MAP, block, leaves())
    signs = space.random_signs(torch.Generator().manual_seed(2))
    patterns = space.mirrored(signs).double()
    assert len(patterns) in {1, 2, 4}
    assert torch.equal(patterns.abs(), torch.ones_like(patterns))
    assert torch.equal(patterns[0], signs.double())
    root = random(space.size, space.size, dtype=torch.float64)
    hessian = root + root.T
    mean = torch.einsum("ki,ij,kj->k", patterns, hessian, patterns).mean()
    z = signs.double()
    within = sum(float((z * own) @ hessian @ (z * own)) for own in colours(space))
    # Of about size^2 terms of order one, in float64.
    assert float(mean) == pytest.approx(within, abs=1e-9)


def patterns_of(block, frozen=()):
    space = ParameterSpace(MAP, block, leaves(frozen=frozen))
    return space, space.mirrored(torch.ones(space.size))


def test_matrices_of_a_layer_have_different_colours_and_vectors_the_first():
    # `vo` of layer 0: the value rows of a fused matrix, and the output; of layer 1 a bias too.
    space, turned = patterns_of("vo")
    first, _, third = torch.split(turned, [16 + 16, 16 + 16 + 4, 16], dim=1)
    value, out = first[:, :16], first[:, 16:]
    assert (value == value[:, :1]).all()
    assert (out == out[:, :1]).all()
    assert float(value[:, 0] @ out[:, 0]) == 0.0
    assert float(third[:, 0] @ turned[:, 32]) == 0.0  # another matrix of the same layer
    own = space.unflatten(turned)["1.bias"].view(-1, 2, 6)[:, :, 4:]
    assert (own == 1).all()
    for block in ("norm", "emb"):
        assert len(patterns_of(block)[1]) == 1
    assert len(patterns_of("vo", frozen={"1.conv", "1.heads", "1.bias", "1.out"})[1]) == 2
    assert len(patterns_of("qk", frozen={"1.conv", "1.heads", "1.bias"})[1]) == 2


def test_layers_share_colours():
    # A product of matrices of different layers is not cancelled, or a deep model would take a pattern for each.
    _, turned = patterns_of("vo")
    assert len(turned) == 4
    assert torch.equal(turned[:, 0], turned[:, 32])


@pytest.mark.parametrize("name", ["0.fused", "1.conv", "1.heads"])
def test_query_and_key_in_one_slice_have_different_colours(name):
    space = ParameterSpace(MAP, "qk", leaves(frozen=set(SHAPES) - {name}))
    patterns = space.unflatten(space.mirrored(torch.ones(space.size)))[name]
    assert len(patterns) == 2
    (part,) = space.parts
    half = (part.stop - part.start) // 2
    query, key = (Part(name, "qk", "", part.dim, start, start + half, 0, part.repeats) for start in (0, half))
    for pattern, turned in zip(patterns, (1.0, -1.0), strict=True):
        assert set(query.view(pattern).flatten().tolist()) == {1.0}
        assert set(key.view(pattern).flatten().tolist()) == {turned}


@pytest.mark.parametrize("make", dense.ZOO.values(), ids=dense.ZOO)
def test_every_family_takes_one_two_or_four_patterns(make):
    model = make()
    block_map = classify(model)
    with isolated(model, exact=True) as live:
        for block in (None, *block_map.blocks):
            space = ParameterSpace(block_map, block, live.leaves)
            signs = space.random_signs(torch.Generator().manual_seed(0))
            patterns = space.mirrored(signs)
            assert len(patterns) in {1, 2, 4}
            # Rows of a Hadamard matrix: each colour's row is orthogonal to every other's, or the same.
            distinct = torch.unique((patterns * signs).T, dim=0)
            assert torch.equal(distinct @ distinct.T, len(patterns) * torch.eye(len(distinct)))


class Mixed(nn.Module):
    """One of each kind of dtype that a model may hold."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(4, 3, dtype=torch.bfloat16)
        self.ln_f = nn.LayerNorm(3)


def test_half_precision_is_held_in_float32():
    model = Mixed()
    block_map = classify(model)
    with isolated(model, exact=True) as live:
        space = ParameterSpace(block_map, None, live.leaves)
        assert flat_weights(space).dtype == torch.float32
        assert torch.equal(flat_weights(space)[:12].view(4, 3), model.wte.weight.detach().float())
