from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sharpwatch.agent.statistics.reductions import PartTensors, Scratch, host_sums
from sharpwatch.blocks import BLOCKS, BlockMap, Part, classify
from sharpwatch.curvature.parameters.shards import squared_norms, sum_by_index
from sharpwatch.curvature.statistics.sketch import CountSketch
from sharpwatch.errors import BlockError

D, V, T = 8, 11, 6  # width, vocabulary, positions
IDS = {"bos_token_id": 0, "eos_token_id": 0}


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=D, n_head=2, vocab_size=V, n_positions=T, **IDS))


def llama(layers):
    sizes = {"hidden_size": D, "intermediate_size": 12, "num_attention_heads": 2, "vocab_size": V}
    return LlamaForCausalLM(LlamaConfig(**sizes, **IDS, num_hidden_layers=layers, tie_word_embeddings=False))


def test_views_share_memory_and_run_parallel_to_the_parts():
    model = gpt2()
    block_map = classify(model)
    weights = dict(model.named_parameters())
    views = block_map.views(weights)
    assert [view.numel() for view in views] == [part.numel for part in block_map.parts]
    for part, view in zip(block_map.parts, views, strict=True):
        assert view.untyped_storage().data_ptr() == weights[part.parameter].untyped_storage().data_ptr()
    with pytest.raises(KeyError, match="wte"):
        block_map.views({})


def test_indices_by_layer_block_and_by_block():
    block_map = classify(llama(layers=12))
    assert block_map.blocks == BLOCKS[:-1]
    layers = [block.layer for block in block_map.layer_blocks]
    assert layers == [None] * 3 + [f"layers.{i}" for i in range(12) for _ in range(4)]
    assert [block.type for block in block_map.layer_blocks[:7]] == ["emb", "norm", "head", *BLOCKS[1:5]]
    for part, i, j in zip(block_map.parts, block_map.layer_block_of, block_map.block_of, strict=True):
        layer_block = block_map.layer_blocks[i]
        assert (layer_block.type, layer_block.layer) == (part.type, part.layer)
        assert block_map.blocks[j] == part.type
    assert sum(block.numel for block in block_map.layer_blocks) == sum(block_map.numel.values())


def test_the_same_model_gives_the_same_map():
    assert classify(gpt2()) == classify(gpt2())


def test_prints_as_a_table():
    lines = str(classify(gpt2())).splitlines()
    assert lines[0].split() == ["parameter", "type", "layer", "numel"]
    assert lines[5].split() == ["transformer.h.0.attn.c_attn.weight[:,", "0:16]", "qk", "layers.0", "128"]
    assert lines[-1].split() == ["total", "other", f"{T * D}"]
    assert len({len(line) for line in lines}) == 1


def by_head(shape, *, dim, heads, first):
    """Query and key rows, then value rows, of each head."""
    head = shape[dim] // heads
    rest = math.prod(shape) // head
    return (
        Part("w", "qk", None, dim, 0, first, first * rest, heads),
        Part("w", "vo", None, dim, first, head, (head - first) * rest, heads),
    )


@pytest.mark.parametrize(("shape", "dim"), [((12, 5), 0), ((5, 12), 1), ((12,), 0), ((2, 12, 3), 1)])
def test_a_part_that_repeats_is_its_slice_of_every_head(shape, dim):
    queries_and_keys, values = BlockMap(by_head(shape, dim=dim, heads=3, first=3), {"w": shape}).parts
    entries = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    of_heads = [head.split([3, 1], dim) for head in entries.split(4, dim)]
    for part, slices in zip((queries_and_keys, values), zip(*of_heads, strict=True), strict=True):
        assert part.view(entries).numel() == part.numel
        assert part.view(entries).untyped_storage().data_ptr() == entries.untyped_storage().data_ptr()
        wanted = torch.cat([each.reshape(-1) for each in slices])
        assert sorted(part.view(entries).reshape(-1).tolist()) == sorted(wanted.tolist())


def test_a_part_that_repeats_is_summed_and_sketched_as_its_slices_are():
    shape = (12, 40)
    each = [Part("w", "qk", None, 0, 4 * head, 4 * head + 3, 120) for head in range(3)]
    each += [Part("w", "vo", None, 0, 4 * head + 3, 4 * head + 4, 40) for head in range(3)]
    maps = (
        BlockMap(by_head(shape, dim=0, heads=3, first=3), {"w": shape}),
        BlockMap(tuple(sorted(each, key=lambda part: part.start)), {"w": shape}),
    )
    values = {"w": torch.randn(shape, generator=torch.Generator().manual_seed(0))}
    sums = [sum_by_index(squared_norms(block_map, values), block_map.block_of, 2) for block_map in maps]
    torch.testing.assert_close(*sums, rtol=1e-6, atol=0)  # norms of small parts are summed in float32
    sketches = [CountSketch(block_map, 64, seed=1).sketch(values) for block_map in maps]
    torch.testing.assert_close(*sketches)
    host = [host_sums([PartTensors(view, view, view.abs()) for view in m.views(values)], Scratch()) for m in maps]
    by_block = [
        np.stack([sums[np.array(m.block_of) == b].sum(0)[:3] for b in range(2)])
        for sums, m in zip(host, maps, strict=True)
    ]
    np.testing.assert_allclose(*[columns[:, :2] for columns in by_block], rtol=1e-6)


def parts(*ranges, dim=0):
    return tuple(Part("w", "qk", None, dim, start, stop, (stop - start) * 3) for start, stop in ranges)


@pytest.mark.parametrize(
    "wrong",
    [
        (),
        parts((0, 2)),
        parts((0, 2), (1, 4)),
        parts((0, 2), (3, 4)),
        parts((0, 5)),
        (Part("w", "qk", None, None, 0, 0, 11),),
        (*parts((0, 4)), Part("w", "vo", None, None, 0, 0, 12)),
        (*parts((0, 4)), Part("x", "vo", None, None, 0, 0, 12)),
        (Part("w", "attention", None, None, 0, 0, 12),),
        by_head((4, 3), dim=0, heads=2, first=1)[:1],
        (*by_head((4, 3), dim=0, heads=2, first=1)[:1], *parts((1, 2))),
        by_head((8, 3), dim=0, heads=2, first=1),
    ],
)
def test_a_map_with_gaps_overlaps_or_strangers_can_not_be(wrong):
    with pytest.raises(BlockError):
        BlockMap(wrong, {"w": (4, 3)})
