from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "unit")]
import dense
import sharding

from sharpwatch.blocks import classify
from sharpwatch.curvature import shards
from sharpwatch.curvature.batch import Batch
from sharpwatch.curvature.fsdp import DataRank
from sharpwatch.curvature.gnb import OutputGradients
from sharpwatch.curvature.gnb_sharded import sharded_gnb_probe
from sharpwatch.curvature.norms import squares, sum_into
from sharpwatch.curvature.sketch import CountSketch

ROWS = 4
DRAWS = 64
POSITIONS = torch.arange(dense.POSITIONS)[None]


def add(tensor):
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def batch_of(data):
    """The rows of one data rank, of `ROWS` in all; it sees no others."""
    ids, labels = dense.tokens(rows=ROWS)
    own = slice(data.number * ROWS // data.count, (data.number + 1) * ROWS // data.count)
    return Batch((), {"input_ids": ids[own], "labels": labels[own], "position_ids": POSITIONS})


def weights_of(block_map, model):
    held = [None] * dist.get_world_size()
    dist.all_gather_object(held, {name: shards.Shard.of(p).numel for name, p in model.named_parameters()})
    return shards.shares({name: math.prod(shape) for name, shape in block_map.shapes.items()}, held)


def source(data, draw=0):
    return torch.Generator().manual_seed(1000 * draw + data.number)


def probe(model, block_map, **options):
    data = DataRank.of(model)
    given = {"draws": 1, "generator": source(data), "add": add, "weights": weights_of(block_map, model)}
    return sharded_gnb_probe(model, block_map, batch_of(data), **given | options)


def unsharded(model, block_map, sketcher, count):
    """√N ∇L̂ of the same labels on one process: its squares and its sketch."""
    whole = 0
    tokens = int((dense.tokens(rows=ROWS)[1][:, 1:] != -100).sum())
    for number in range(count):
        data = DataRank(number, count)
        arguments = batch_of(data).kwargs
        logits = model(input_ids=arguments["input_ids"]).logits
        mask = torch.nn.functional.pad(arguments["labels"][:, 1:] != -100, (0, 1))
        # What the probe draws: its gradient by the logits is negative at the label alone.
        labels = OutputGradients(logits.detach(), mask, 1, source(data), scale=1.0)[0].argmin(-1)[mask]
        whole = whole + torch.nn.functional.cross_entropy(logits[mask], labels, reduction="sum")
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(whole / tokens**0.5, parameters), strict=True))
    by_layer = sum_into(squares(block_map, gradients), block_map.layer_block_of, len(block_map.layer_blocks))
    return tokens, by_layer, sketcher.sketch(gradients)


def check_traces(shard, truth, rounding=0.0):
    """One draw to the digit, many to their standard error. `rounding`, relative, is what the precision may cost."""
    model = shard(dense.llama())
    block_map = classify(dense.llama())
    sketcher = CountSketch(block_map, size=64, seed=1)
    data = DataRank.of(model)
    if not rounding:
        found = probe(model, block_map, sketcher=sketcher)
        tokens, traces, sketch = unsharded(dense.llama().eval(), block_map, sketcher, data.count)
        assert (found.tokens, found.rows) == (tokens, ROWS)
        torch.testing.assert_close(found.traces[0], traces, rtol=1e-4, atol=0)
        torch.testing.assert_close(found.sketches[0], sketch, rtol=1e-5, atol=1e-5 * float(sketch.abs().max()))
    draws = probe(model, block_map, draws=DRAWS, generator=source(data, 1)).traces
    stderr = draws.std(0) / DRAWS**0.5
    assert ((draws.mean(0) - truth).abs() < 4 * stderr + rounding * truth).all()
    assert (stderr < 0.15 * truth).all()  # else 4 of them would hold nothing


def two(truth):
    mesh = init_device_mesh("cpu", (2,))
    check_traces(lambda model: sharding.by_fsdp(model, mesh), truth)
    check_traces(lambda model: sharding.by_tensor_parallelism(model, mesh), truth)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    # bfloat16 rounds to 0.4 %; some thirty roundings, half of them up, make 1 % of a gradient and 2 % of its square.
    check_traces(lambda model: sharding.by_fsdp(model, mesh, mp_policy=half), truth, rounding=0.05)


def four(truth):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    check_traces(lambda model: sharding.by_fsdp(sharding.by_tensor_parallelism(model, mesh["tp"]), mesh["dp"]), truth)


@pytest.fixture(scope="module")
def truth():
    model = dense.llama()
    exact, block_map = dense.Exact.of(model), classify(model)
    root = dense.gauss_newton_root(exact, *dense.tokens(rows=ROWS))
    parts = torch.stack([part.square().sum() for part in exact.by_part(block_map, root)])
    return sum_into(parts, block_map.layer_block_of, len(block_map.layer_blocks)).detach()


def test_two_ranks_give_the_trace_of_every_layer_block(ranks, truth):
    ranks(two, 2, truth, timeout=120)


def test_four_ranks_give_the_trace_of_every_layer_block(ranks, truth):
    ranks(four, 4, truth, timeout=120)
