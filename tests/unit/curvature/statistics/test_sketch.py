from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharpwatch.blocks import BlockMap, Part
from sharpwatch.curvature.statistics import sketch as sketch_module
from sharpwatch.curvature.statistics.sketch import CountSketch
from sharpwatch.errors import BlockError

SIZE = 64
PROPERTY = settings(deadline=None, derandomize=True, max_examples=60, database=None)


def whole(name, kind, shape):
    return Part(name, kind, None, None, 0, 0, math.prod(shape))


SHAPES = {"wte": (7, 50), "columns": (11, 30), "rows": (9, 13), "ln": (5,), "scalar": ()}


def sliced(name, kind, dim, start, stop):
    shape = SHAPES[name]
    return Part(name, kind, None, dim, start, stop, math.prod(shape) // shape[dim] * (stop - start))


MIXED = BlockMap(
    (
        whole("wte", "emb", SHAPES["wte"]),
        sliced("columns", "qk", 1, 0, 20),
        sliced("columns", "vo", 1, 20, 30),
        sliced("rows", "qk", 0, 0, 6),
        sliced("rows", "vo", 0, 6, 9),
        whole("ln", "norm", SHAPES["ln"]),
        whole("scalar", "norm", SHAPES["scalar"]),
    ),
    SHAPES,
)


def single(shape):
    return BlockMap((whole("w", "ffn", shape),), {"w": shape})


def gradients(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def close(left, right, scale):
    # Sums of fewer than 1000 terms in float32: a few hundred roundings of 6e-8 at most.
    torch.testing.assert_close(left, right, rtol=0, atol=2e-5 * max(1.0, scale))


def projection(sketcher, block_map):
    """The dense projection [B, size, n], a column an entry, made of sketches of single entries."""
    columns = []
    for name, shape in block_map.shapes.items():
        for index in range(math.prod(shape)):
            unit = torch.zeros(math.prod(shape))
            unit[index] = 1.0
            columns.append(sketcher.sketch({name: unit.view(shape)}))
    return torch.stack(columns, -1)


def owners(block_map):
    """For each entry of all parameters, the index of the block it belongs to."""
    labels = {name: torch.full(shape, -1) for name, shape in block_map.shapes.items()}
    for view, block in zip(block_map.views(labels), block_map.block_of, strict=True):
        view.fill_(block)
    return torch.cat([label.reshape(-1) for label in labels.values()])


def test_each_entry_goes_with_a_sign_to_one_bucket_of_its_own_block():
    dense = projection(CountSketch(MIXED, SIZE, seed=3), MIXED)
    assert dense.shape == (len(MIXED.blocks), SIZE, sum(math.prod(shape) for shape in SHAPES.values()))
    assert torch.equal(dense.abs().sum((0, 1)), torch.ones(dense.shape[2]))
    assert set(dense.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert torch.equal(dense.abs().sum(1).argmax(0), owners(MIXED))


def test_the_sketch_is_the_projection_of_the_gradient():
    sketcher = CountSketch(MIXED, SIZE, seed=4)
    values = gradients(0)
    flat = torch.cat([values[name].reshape(-1) for name in SHAPES])
    close(sketcher.sketch(values), projection(sketcher, MIXED) @ flat, 10.0)


@PROPERTY
@given(st.integers(0, 2**63), st.floats(-3, 3), st.floats(-3, 3))
def test_is_linear(seed, a, b):
    sketcher = CountSketch(MIXED, SIZE, seed)
    x, y = gradients(1), gradients(2)
    mixed = {name: a * x[name] + b * y[name] for name in SHAPES}
    close(sketcher.sketch(mixed), a * sketcher.sketch(x) + b * sketcher.sketch(y), 10.0)


@PROPERTY
@given(st.integers(0, 2**32), st.dictionaries(st.sampled_from(sorted(SHAPES)), st.lists(st.integers(0, 400))))
def test_shards_add_up_to_the_whole(seed, cuts):
    sketcher = CountSketch(MIXED, SIZE, seed)
    values = gradients(3)
    total = torch.zeros(len(MIXED.blocks), SIZE)
    for name, tensor in values.items():
        flat = tensor.reshape(-1)
        edges = sorted({0, flat.numel(), *(cut % (flat.numel() + 1) for cut in cuts.get(name, []))})
        for low, high in itertools.pairwise(edges):
            total += sketcher.sketch({name: flat[low:high]}, {name: low})
    close(total, sketcher.sketch(values), 10.0)


def whole_numbers(seed):
    """Gradients whose sums float32 holds exactly, in whatever order they are added."""
    return {name: (8 * values).round() for name, values in gradients(seed).items()}


@PROPERTY
@given(st.integers(0, 2**32), st.integers(2, 5), st.randoms())
def test_no_order_of_shards_or_parameters_matters(seed, ranks, random):
    sketcher = CountSketch(MIXED, SIZE, seed)
    values = whole_numbers(3)
    sketches = []
    cuts = {name: [0, *sorted(random.choices(range(each.numel() + 1), k=ranks - 1))] for name, each in values.items()}
    for rank in range(ranks):
        low = {name: cut[rank] for name, cut in cuts.items()}
        high = {name: [*cut, values[name].numel()][rank + 1] for name, cut in cuts.items()}
        names = random.sample(sorted(values), len(values))
        sketches.append(
            sketcher.sketch({name: values[name].reshape(-1)[low[name] : high[name]] for name in names}, low)
        )
    random.shuffle(sketches)
    assert torch.equal(sum(sketches), sketcher.sketch(values))


@PROPERTY
@given(st.integers(0, 2**32), st.sampled_from(sorted(SHAPES)), st.data())
def test_an_entry_has_one_place_and_sign_in_whatever_shard_it_lies(seed, name, data):
    count = math.prod(SHAPES[name])
    low = data.draw(st.integers(0, count - 1))
    high = data.draw(st.integers(low + 1, count))
    unit = torch.zeros(count)
    unit[data.draw(st.integers(low, high - 1))] = 1.0
    shard = CountSketch(MIXED, SIZE, seed).sketch({name: unit[low:high]}, {name: low})
    # Another sketcher of the same seed stands for another rank.
    assert torch.equal(shard, CountSketch(MIXED, SIZE, seed).sketch({name: unit.view(SHAPES[name])}))
    assert shard.abs().sum() == 1


@PROPERTY
@given(st.data())
def test_pieces_hold_each_entry_of_a_part_once(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    dim = data.draw(st.none() | st.integers(0, len(shape) - 1))
    start = 0 if dim is None else data.draw(st.integers(0, shape[dim] - 1))
    stop = 0 if dim is None else data.draw(st.integers(start + 1, shape[dim]))
    part = Part("w", "ffn", None, dim, start, stop, 0)
    low = data.draw(st.integers(0, math.prod(shape)))
    high = data.draw(st.integers(low, math.prod(shape)))
    limit = data.draw(st.integers(1, 40))
    index = torch.arange(math.prod(shape)).view(shape)
    wanted = [i for i in part.view(index).reshape(-1).tolist() if low <= i < high]
    pieces = list(sketch_module._index_ranges(part, shape, low, high, limit))
    held = torch.cat([piece.view(index.view(-1), piece.start).reshape(-1) for piece in pieces]) if pieces else index[:0]
    assert sorted(held.reshape(-1).tolist()) == sorted(wanted)
    assert all(piece.span <= limit for piece in pieces)


def test_a_parameter_larger_than_the_buffer_is_taken_in_turns():
    shape = (700, 1024)  # 2800 rows of 256, the buffer holds 2048
    values = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    for parts in (
        (whole("w", "ffn", shape),),
        (Part("w", "qk", None, 1, 0, 700, 700 * 700), Part("w", "vo", None, 1, 700, 1024, 700 * 324)),
    ):
        sketcher = CountSketch(BlockMap(parts, {"w": shape}), 256, seed=6)
        flat = values.view(-1)
        shards = [sketcher.sketch({"w": flat[low : low + 1000]}, {"w": low}) for low in range(0, flat.numel(), 1000)]
        # Buckets sum about 2800 values in two different orders: 1e-6 relative to sqrt(2800).
        torch.testing.assert_close(sum(shards), sketcher.sketch({"w": values}), rtol=0, atol=5e-4)


def test_float32_sums_of_any_dtype_and_layout():
    block_map = single((40, 30))
    sketcher = CountSketch(block_map, SIZE, seed=7)
    values = torch.randn(30, 40, generator=torch.Generator().manual_seed(8)).bfloat16()
    truth = sketcher.sketch({"w": values.float().t().contiguous()})
    assert truth.dtype == torch.float32
    assert torch.equal(sketcher.sketch({"w": values.t()}), truth)
    assert torch.equal(sketcher.sketch({"w": values.t().double()}), truth)


def test_leaves_gradients_alone_and_takes_parameters_with_grad():
    values = torch.randn(10, 10, requires_grad=True)
    before = values.detach().clone()
    result = CountSketch(single((10, 10)), SIZE, seed=9).sketch({"w": values})
    assert not result.requires_grad
    assert torch.equal(values, before)


def test_non_finite_entries_stay_in_their_block():
    values = gradients(4)
    values["columns"][3, 25] = math.nan  # in vo
    bad = CountSketch(MIXED, SIZE, seed=10).sketch(values).isfinite().all(1)
    assert dict(zip(MIXED.blocks, bad.tolist(), strict=True)) == {"emb": True, "qk": True, "vo": False, "norm": True}


def test_waits_for_no_device():
    # Reading a value back to the host is an error on the meta device, as waiting would be on another.
    result = CountSketch(MIXED, SIZE, seed=10).sketch({name: value.to("meta") for name, value in gradients(4).items()})
    assert (result.device.type, result.shape) == ("meta", (len(MIXED.blocks), SIZE))


def test_missing_parameters_are_zeros_and_empty_is_zero():
    sketcher = CountSketch(MIXED, SIZE, seed=11)
    values = gradients(5) | {"wte": torch.zeros(SHAPES["wte"])}
    assert torch.equal(
        sketcher.sketch({name: value for name, value in values.items() if name != "wte"}), sketcher.sketch(values)
    )
    assert torch.equal(sketcher.sketch({}), torch.zeros(len(MIXED.blocks), SIZE))


def test_the_seed_alone_decides():
    values = gradients(6)
    one, same, other = (CountSketch(MIXED, SIZE, seed).sketch(values) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("values", "offsets", "message"),
    [
        ({"lm_head": torch.zeros(3)}, None, "lm_head is not a parameter of the block map"),
        ({"ln": torch.zeros(4)}, None, "ln has 5 entries, got 4 from entry 0 on"),
        ({"ln": torch.zeros(4)}, {"ln": 2}, "ln has 5 entries, got 4 from entry 2 on"),
        ({"ln": torch.zeros(4)}, {"ln": -1}, "ln has 5 entries, got 4 from entry -1 on"),
    ],
)
def test_refuses_what_does_not_fit(values, offsets, message):
    with pytest.raises(BlockError, match=re.escape(message)):
        CountSketch(MIXED, SIZE, seed=0).sketch(values, offsets)


@pytest.mark.parametrize("size", [0, -64, 100])
def test_refuses_sizes_that_are_not_multiples_of_64(size):
    with pytest.raises(ValueError, match="multiple of 64"):
        CountSketch(MIXED, size)


def unit_rows(width, column):
    """Rows that are one-hot at the same column: all in few buckets where an index is merely folded."""
    values = torch.zeros(96, width)
    values[:, column] = 1.0
    return values


def random_pair():
    generator = torch.Generator().manual_seed(12)
    x = torch.randn(24, 100, generator=generator)
    return x, 0.5 * x + torch.randn(24, 100, generator=generator)


def equal_rows(width):
    generator = torch.Generator().manual_seed(13)
    row, other = torch.randn(2, width, generator=generator)
    return row.expand(6, width), (0.3 * row + other).expand(6, width)


PAIRS = {
    "random": random_pair(),
    "ones": (torch.ones(2000), torch.ones(2000)),
    "equal rows of 768": equal_rows(768),
    "equal rows of 1024": equal_rows(1024),
    "one-hot rows of 768": (unit_rows(768, 5), unit_rows(768, 5)),
    "one-hot rows of 1024": (unit_rows(1024, 5), unit_rows(1024, 5)),
    "orthogonal one-hot rows": (unit_rows(768, 5), unit_rows(768, 6)),
}


def inner_products(x, y, size, seeds):
    block_map = single(tuple(x.shape))
    found = []
    for seed in range(seeds):
        sketcher = CountSketch(block_map, size, seed)
        found.append(float((sketcher.sketch({"w": x}).double() * sketcher.sketch({"w": y}).double()).sum()))
    return torch.tensor(found, dtype=torch.float64)


def variance(x, y, size):
    """Variance of <Sx, Sy>, and the bound on it that fully random buckets have."""

    def terms(a, b):
        return (a * a).sum(-1) * (b * b).sum(-1) + (a * b).sum(-1) ** 2

    x, y = x.reshape(-1).double(), y.reshape(-1).double()
    pad = (0, -x.numel() % size)
    rows = [torch.nn.functional.pad(v, pad).view(-1, size) for v in (x, y)]
    bound = terms(x, y) / size
    return float(bound - terms(*rows).sum() / size), float(bound)


@pytest.mark.parametrize("name", PAIRS)
def test_inner_products_are_unbiased_with_the_variance_of_the_formula(name):
    seeds = 1000
    x, y = PAIRS[name]
    found = inner_products(x, y, SIZE, seeds)
    expected, bound = variance(x, y, SIZE)
    truth = float((x.double() * y.double()).sum())
    assert abs(float(found.mean()) - truth) < 4 * math.sqrt(expected / seeds)
    squares = (found - truth) ** 2
    # Four standard errors of the mean of the squares, from their own spread.
    assert abs(float(squares.mean()) - expected) < 4 * float(squares.std()) / math.sqrt(seeds)
    assert expected <= bound


def test_signs_and_rotations_are_balanced_and_independent():
    count, size = 4096, 256
    hashed = CountSketch(single((1,)), size, seed=14)._hashes
    rows = torch.arange(count)
    signs = 1.0 - 2.0 * (hashed.signs(rows) != 0).double().view(count, size)
    # Sums of n random signs have variance n; the worst of 256 columns stays below 4.5 of its standard deviations.
    assert signs.sum(0).abs().max() < 4.5 * math.sqrt(count)
    # Correlation of neighbouring columns, of neighbouring rows and of rows 3 apart (width 768).
    for a, b in ((signs[:, 1:], signs[:, :-1]), (signs[1:], signs[:-1]), (signs[3:], signs[:-3])):
        assert abs(float((a * b).sum())) < 4 * math.sqrt(a.numel())
    buckets = torch.bincount(hashed.rotations(rows), minlength=size)
    steps = torch.bincount((hashed.rotations(rows + 3) - hashed.rotations(rows)) % size, minlength=size)
    for seen in (buckets, steps):
        statistic = float(((seen - count / size) ** 2 / (count / size)).sum())  # chi-square, 255 degrees of freedom
        assert abs(statistic - (size - 1)) < 4 * math.sqrt(2 * (size - 1))
