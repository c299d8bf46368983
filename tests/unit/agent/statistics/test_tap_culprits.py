"""Which parameter of a layer block is named, against what was done to the model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sharpwatch.agent.reporting import Identity, hello_message
from sharpwatch.agent.statistics.tap import Culprits, Tap
from sharpwatch.blocks import BlockMap, classify
from sharpwatch.blocks.blockmap import Part
from sharpwatch.wire import MAX_NAME, MAX_PARAMETER_NAMES


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


class Trained:
    """A model with its tap, read before each step."""

    def __init__(self, net):
        self.net = net
        self.parameters = dict(net.named_parameters())
        self.optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        self.block_map = classify(net)
        self.tap = Tap(self.block_map, self.parameters, [self.optimizer])

    def read(self, spoil=lambda: None):
        tokens = torch.randint(50, (2, 8))
        self.optimizer.zero_grad()
        self.net(input_ids=tokens, labels=tokens).loss.backward()
        spoil()
        pending = self.tap.start({})
        self.tap.read(pending, 0)
        self.optimizer.step()
        return self.tap.resolve(pending)

    def named(self, indices):
        """By layer block, the name of the parameter that is meant."""
        blocks = [(block.layer, block.type) for block in self.block_map.layer_blocks]
        rows = zip(blocks, self.block_map.parameter_names, indices.tolist(), strict=True)
        return {block: names[index] if index >= 0 else None for block, names, index in rows}


def test_each_layer_block_names_its_own_parameters():
    block_map = classify(llama())
    for block, names in zip(block_map.layer_blocks, block_map.parameter_names, strict=True):
        parts = [part for part in block_map.parts if (part.layer, part.type) == (block.layer, block.type)]
        assert names == tuple(part.parameter for part in parts)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.1.mlp.down_proj.weight", ("layers.1", "ffn")),
        ("model.layers.0.self_attn.q_proj.weight", ("layers.0", "qk")),
        ("model.layers.1.post_attention_layernorm.weight", ("layers.1", "norm")),
    ],
)
def test_the_parameter_that_moves_a_norm_is_named(name, block):
    trained = Trained(llama())
    assert set(trained.named(trained.read().changed_parameter).values()) == {None}  # nothing to compare with
    trained.read()
    with torch.no_grad():
        trained.parameters[name].view(-1)[3] = 40.0
    assert trained.named(trained.read().changed_parameter)[block] == name


def test_a_part_of_a_fused_parameter_is_told_in_its_own_block_alone():
    torch.manual_seed(0)
    trained = Trained(GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2)))
    trained.read()
    fused = trained.parameters["transformer.h.0.attn.c_attn.weight"]
    with torch.no_grad():
        fused[:, 3] = 40.0  # of a query
        trained.parameters["transformer.h.0.attn.c_proj.bias"].fill_(9.0)
    named = trained.named(trained.read().changed_parameter)
    assert named["layers.0", "qk"] == "transformer.h.0.attn.c_attn.weight"
    assert named["layers.0", "vo"] == "transformer.h.0.attn.c_proj.bias"


def test_what_does_not_move_the_norm_is_not_named_however_much_it_changes():
    culprits = Culprits(classify(llama()))
    block_map = classify(llama())
    weights = np.full(len(block_map.parts), 100.0)
    small, large = (
        next(i for i, part in enumerate(block_map.parts) if part.parameter == f"model.layers.0.mlp.{name}.weight")
        for name in ("up_proj", "down_proj")
    )
    weights[small] = 1e-6
    culprits.changed(weights)
    after = weights.copy()
    after[small], after[large] = 1e-3, 150.0  # a thousand times itself, and half
    block = block_map.layer_block_of[large]
    index = culprits.changed(after)[block]
    assert block_map.parameter_names[block][index] == "model.layers.0.mlp.down_proj.weight"


def test_norms_that_are_zero_or_infinite_name_nothing_by_chance():
    block_map = classify(llama())
    culprits = Culprits(block_map)
    still, endless = np.zeros(len(block_map.parts)), np.full(len(block_map.parts), math.inf)
    for weights in (still, still):
        assert (culprits.changed(weights) == -1).all()  # not known before, then as it was
    culprits.changed(endless)
    assert (culprits.changed(endless) == -1).all()
    culprits.changed(still)
    one = still.copy()
    one[0] = math.inf
    assert culprits.changed(one)[block_map.layer_block_of[0]] >= 0


def test_the_parameter_with_the_most_entries_that_are_not_finite_is_named():
    trained = Trained(llama())
    assert trained.read().non_finite_parameter is None
    up, down = (trained.parameters[f"model.layers.1.mlp.{name}.weight"] for name in ("up_proj", "down_proj"))

    def spoil():
        up.grad.view(-1)[:2] = math.nan
        down.grad.view(-1)[:5] = math.inf

    named = trained.named(trained.read(spoil).non_finite_parameter)
    assert named.pop(("layers.1", "ffn")) == "model.layers.1.mlp.down_proj.weight"
    assert set(named.values()) == {None}


def test_a_parameter_whose_gradient_is_exactly_zero_is_named_and_one_without_a_gradient_is_not():
    trained = Trained(llama())
    trained.optimizer = trained.tap._optimizers[0] = torch.optim.AdamW(trained.net.parameters(), lr=1e-3)
    for _ in range(2):  # Adam has no second moment before its first step
        assert trained.read().zero_gradients is None

    def spoil():
        trained.parameters["model.layers.0.mlp.up_proj.weight"].grad.zero_()
        trained.parameters["model.layers.1.self_attn.v_proj.weight"].grad = None
        trained.parameters["model.layers.1.mlp.up_proj.weight"].grad.zero_()
        trained.parameters["model.layers.1.mlp.down_proj.weight"].grad.zero_()

    reading = trained.read(spoil)
    blocks = [(block.layer, block.type) for block in trained.block_map.layer_blocks]
    counts = dict(zip(blocks, reading.zero_gradients.tolist(), strict=True))
    assert {block: count for block, count in counts.items() if count} == {
        ("layers.0", "ffn"): 1,
        ("layers.1", "ffn"): 2,
    }
    named = {block: name for block, name in trained.named(reading.zero_parameter).items() if name}
    assert named == {("layers.0", "ffn"): "model.layers.0.mlp.up_proj.weight"}


def test_of_parameters_that_have_as_many_none_is_named():
    trained = Trained(llama())

    def spoil():
        for parameter in trained.parameters.values():
            parameter.grad.fill_(math.nan)

    named = trained.named(trained.read(spoil).non_finite_parameter)
    assert named["layers.0", "norm"] is None  # two of one size
    assert named[None, "emb"] == "model.embed_tokens.weight"


IDENTITY = Identity(
    "job", "run", "attempt", "AdamW", "none", (0.1, 10.0), 0, 0, (), can_roll_back=False, started_at_unix_ns=0
)


def many(count, length):
    names = [f"{i:05d}".ljust(length, "x") for i in range(count)]
    parts = [Part(name, "other", None, None, 0, 0, 1) for name in names]
    return BlockMap(tuple(parts), dict.fromkeys(names, (1,)))


def test_the_names_are_told_unless_they_are_too_long():
    block_map = classify(llama())
    told = hello_message(IDENTITY, block_map).layer_blocks
    assert [tuple(block.parameter_names) for block in told] == list(block_map.parameter_names)
    fits = many(MAX_PARAMETER_NAMES // MAX_NAME, MAX_NAME)
    assert len(hello_message(IDENTITY, fits).layer_blocks[0].parameter_names) == len(fits.parts)
    for unfit in (many(MAX_PARAMETER_NAMES // MAX_NAME + 1, MAX_NAME), many(1, MAX_NAME + 1)):
        assert not hello_message(IDENTITY, unfit).layer_blocks[0].parameter_names
