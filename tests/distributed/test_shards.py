from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from sharpwatch.blocks import BlockMap, Part
from sharpwatch.curvature.parameters import shards
from sharpwatch.curvature.statistics.sketch import CountSketch

# Even, uneven, fewer rows than ranks, one dimension, three.
SHAPES = {"even": (8, 4), "uneven": (11, 6), "few": (3, 5), "one": (1, 7), "bias": (10,), "experts": (5, 4, 6)}


def whole(shape):
    return torch.arange(math.prod(shape), dtype=torch.float32).view(shape) + 1


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterDict({name: nn.Parameter(whole(shape)) for name, shape in SHAPES.items()})

    def replace(self, make):
        for name, parameter in self.weights.items():
            self.weights[name] = nn.Parameter(make(parameter.detach()))


def by_fsdp(mesh):
    model = Model()
    fully_shard(model, mesh=mesh)
    return model


def by_tensor_parallelism(mesh, dim):
    model = Model()
    model.replace(lambda weight: distribute_tensor(weight, mesh, [Shard(min(dim, weight.dim() - 1))]))
    return model


def by_packs(mesh, dim):
    """Two matrices packed into one, of each of which a rank has its chunk, as transformers cuts gate and up."""
    model = Model()

    def packed(weight):
        along = min(dim, weight.dim() - 1)
        return distribute_tensor(weight, mesh, [_StridedShard(along, split_factor=2)], src_data_rank=None)

    model.replace(packed)
    return model


def by_both(model, mesh):
    fully_shard(model, mesh=mesh)
    return model


def by_placements(mesh, placements):
    model = Model()
    model.replace(
        lambda weight: distribute_tensor(
            weight, mesh, [Shard(min(p.dim, weight.dim() - 1)) if isinstance(p, Shard) else p for p in placements]
        )
    )
    return model


def layouts(n):
    """Every way in which n ranks may hold the model."""
    line = init_device_mesh("cpu", (n,))
    yield "fsdp", by_fsdp(line)
    for dim in (0, 1):
        yield f"tp {dim}", by_tensor_parallelism(line, dim)
        yield f"packed {dim}", by_packs(line, dim)
    if n < 4:
        return
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    yield "hsdp", by_fsdp(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    for dim in (0, 1):
        yield f"fsdp and tp {dim}", by_both(by_tensor_parallelism(square["tp"], dim), square["dp"])
        yield f"fsdp and packed {dim}", by_both(by_packs(square["tp"], dim), square["dp"])
    for placements in itertools.product((Shard(0), Shard(1), Replicate()), repeat=2):
        yield str(placements), by_placements(square, placements)


def parts_of(name, shape):
    """The parameter as one part; by stretches; by stretches that repeat, as heads do."""
    yield [Part(name, "other", None, None, 0, 0, math.prod(shape))]
    for dim, size in enumerate(shape):
        for repeats in (r for r in range(1, size) if size % r == 0 and size // r > 1):
            period = size // repeats
            cut, each = (period + 1) // 2, math.prod(shape) // size * repeats
            yield [
                Part(name, "qk", None, dim, 0, cut, each * cut, repeats),
                Part(name, "vo", None, dim, cut, period, each * (period - cut), repeats),
            ]


def gathered(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_layouts():
    checked = []
    for layout, model in layouts(dist.get_world_size()):
        parameters = {name.removeprefix("weights."): p for name, p in model.named_parameters()}
        assert shards.is_sharded(model)
        held = {name: shards.local_tensor(p.detach()) for name, p in parameters.items()}
        found = {name: shards.Shard.of(p) for name, p in parameters.items()}
        numel = {name: math.prod(shape) for name, shape in SHAPES.items()}
        weights = shards.shard_weights(numel, gathered({name: shard.numel for name, shard in found.items()}))
        for name, shape in SHAPES.items():
            shard, where = found[name], f"{layout}: {name}"
            at = [torch.tensor([i for run in runs for i in run], dtype=torch.int64) for runs in shard.runs]
            own = whole(shape)[torch.meshgrid(*at, indexing="ij")]
            assert torch.equal(held[name].reshape(-1), own.reshape(-1)), where
            if not layout.startswith("fsdp and packed"):  # whose rows torch puts together in another order
                assert torch.equal(parameters[name].full_tensor(), whole(shape)), where
            entries = sum(weights[name] * each[name].numel for each in gathered(found))
            assert entries == pytest.approx(numel[name]), where
            for parts in parts_of(name, shape):
                check_parts(parts, shard, held[name], weights[name], where)
        check_sketches(held, found, weights, layout)
        checked.append(layout)
    return checked


def check_parts(parts, shard, held, weight, where):
    for part in parts:
        views = list(shard.views(part, held))
        assert len(views) <= 3 * max(map(len, shard.runs))
        assert all(view.numel() for view in views)
        assert all(view.untyped_storage().data_ptr() == held.untyped_storage().data_ptr() for view in views), where
        mine = torch.cat([view.reshape(-1) for view in views]) if views else torch.zeros(0)
        counts = torch.zeros(math.prod(shard.shape)).index_add_(0, mine.long() - 1, torch.full_like(mine, weight))
        dist.all_reduce(counts)
        expected = torch.zeros_like(counts).index_fill_(0, part.view(whole(shard.shape)).reshape(-1).long() - 1, 1.0)
        torch.testing.assert_close(counts, expected, msg=f"{where}: {part}")


def check_sketches(held, found, weights, layout):
    parts = [part for name, shape in SHAPES.items() for part in list(parts_of(name, shape))[-1]]
    block_map = BlockMap(tuple(parts), SHAPES)
    sketcher = CountSketch(block_map, size=64, seed=3)
    total = shards.sketch_shards(sketcher, held, found, weights)
    dist.all_reduce(total)
    expected = sketcher.sketch({name: whole(shape) for name, shape in SHAPES.items()})
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-3, msg=layout)


@pytest.mark.parametrize("n", [2, 4])
def test_boxes_views_and_sketches_are_those_of_the_whole(ranks, n):
    checked = ranks(check_layouts, n)
    assert checked == [checked[0]] * n


def test_a_plain_parameter_is_whole():
    parameter = nn.Parameter(whole((3, 4)))
    shard = shards.Shard.of(parameter)
    assert shard.is_whole
    assert shard.offset == 0
    assert shards.local_tensor(parameter).data_ptr() == parameter.data_ptr()
    assert not shards.is_sharded(nn.Linear(2, 2))


def test_replicas_count_once():
    held = [{"matrix": 6, "norm": 4}, {"matrix": 4, "norm": 4}]
    assert shards.shard_weights({"matrix": 10, "norm": 4}, held) == {"matrix": 1.0, "norm": 0.5}
