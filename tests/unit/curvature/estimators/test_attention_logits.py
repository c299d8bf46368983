"""The scale of attention logits, against dense products of queries and keys as the model's own forward makes them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import sharpwatch
from sharpwatch.blocks.attention_heads import find_attention_heads
from sharpwatch.curvature.estimators.attention_logits import AttentionLogits

WIDTH, HEADS, VOCABULARY = 32, 4, 64
USUAL = {
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
FALCON = {name: USUAL[name] for name in USUAL if name != "intermediate_size"}
GPT2 = {"n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**USUAL, num_key_value_heads=2)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**USUAL, num_key_value_heads=2)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**USUAL)),
    "falcon-multi-query": lambda: FalconForCausalLM(FalconConfig(**FALCON)),
    "falcon-grouped": lambda: FalconForCausalLM(
        FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2),
    ),
}


def made(name):
    """A model with weights of an ordinary size, other in each layer, and without biases."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "attn" in key or "attention" in key:
                parameter.normal_(0.0, 0.2) if parameter.dim() == 2 else parameter.zero_()
    return model


def reader(model, seed=0):
    block_map = sharpwatch.classify(model)
    attentions, left_out = find_attention_heads(model, block_map)
    assert not left_out
    return AttentionLogits(attentions, len(block_map.layer_blocks), seed), block_map


def weights(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def measured(model, times, seed=0):
    logits, block_map = reader(model, seed)
    for _ in range(times):
        scales = logits.measure(weights(model))
    return scales, block_map


def dense(model, monkeypatch):
    """Of each layer the largest norm of W_Qᵀ W_K / √d_head, from queries and keys of every unit vector.

    A single token is at position 0, where a rotation by position changes nothing.
    """
    seen = []

    def attention(query, key, value, *_, **__):
        seen.append((query[:, :, 0].double(), key[:, :, 0].double()))  # [inputs, heads, d_head]
        groups = query.shape[1] // value.shape[1]
        return value.repeat_interleave(groups, 1)

    def unit_vectors(_, args, kwargs):
        states = torch.eye(WIDTH)[:, None]
        return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attention)
    handles = [
        module.register_forward_pre_hook(unit_vectors, with_kwargs=True)
        for name, module in model.named_modules()
        if name.endswith((".attn", ".self_attn", ".attention", ".self_attention"))
    ]
    with torch.no_grad():
        model(input_ids=torch.zeros(WIDTH, 1, dtype=torch.long))
    for handle in handles:
        handle.remove()
    assert len(seen) == len(handles) == 2
    scales = []
    for query, key in seen:
        shared = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        products = torch.einsum("xhc,yhc->hxy", query, shared)
        scales.append(float(torch.linalg.matrix_norm(products, ord=2).max()) / math.sqrt(query.shape[-1]))
    return scales


@pytest.mark.parametrize("name", MODELS)
def test_it_converges_to_the_dense_norm_from_below(name, monkeypatch):
    model = made(name)
    scales, block_map = measured(model, times=100)
    of_qk = np.array([block.type == "qk" for block in block_map.layer_blocks])
    true = dense(model, monkeypatch)
    assert scales.dtype == np.float32
    assert scales[of_qk] == pytest.approx(true, rel=1e-4)
    assert np.isnan(scales[~of_qk]).all()
    logits, _ = reader(model)
    for _ in range(5):
        assert (logits.measure(weights(model))[of_qk] <= np.array(true) * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_warm_vector_follows_weights_that_change(name, monkeypatch):
    model = made(name)
    logits, block_map = reader(model)
    of_qk = [block.type == "qk" for block in block_map.layer_blocks]
    source = torch.Generator().manual_seed(1)
    for _ in range(30):
        logits.measure(weights(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.01 * torch.randn(parameter.shape, generator=source))
    assert logits.measure(weights(model))[of_qk] == pytest.approx(dense(model, monkeypatch), rel=0.01)


def test_queries_that_grow_grow_the_scale_as_much():
    model = made("llama")
    logits, block_map = reader(model)
    (where,) = [i for i, each in enumerate(block_map.layer_blocks) if (each.layer, each.type) == ("layers.1", "qk")]
    for _ in range(50):
        before = logits.measure(weights(model))
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(3.0)
    after = logits.measure(weights(model))
    assert after[where] == pytest.approx(3 * before[where], rel=1e-3)


def test_it_draws_from_a_generator_of_its_own_and_changes_no_weight():
    model = made("gpt2")
    torch.manual_seed(5)
    state, before = torch.get_rng_state(), {name: one.clone() for name, one in weights(model).items()}
    one, _ = measured(model, times=2, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], weight) for name, weight in weights(model).items())
    again, _ = measured(model, times=2, seed=1)
    np.testing.assert_array_equal(one, again)
    other, _ = measured(model, times=2, seed=2)
    assert not np.array_equal(one, other, equal_nan=True)


@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_it_goes_on_after_weights_without_a_product(bad, monkeypatch):
    """Queries may start at zero, and a step that overflows may be undone."""
    model = made("llama")
    logits, block_map = reader(model)
    of_qk = [block.type == "qk" for block in block_map.layer_blocks]
    queries = model.model.layers[0].self_attn.q_proj.weight
    kept = queries.detach().clone()
    with torch.no_grad():
        queries.fill_(bad)
    first = logits.measure(weights(model))[of_qk]
    np.testing.assert_array_equal(first[0], bad)
    with torch.no_grad():
        queries.copy_(kept)
    for _ in range(100):
        scales = logits.measure(weights(model))
    assert scales[of_qk] == pytest.approx(dense(model, monkeypatch), rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(name, dtype, monkeypatch):
    model = made(name).to(dtype)
    scales, block_map = measured(model, times=50)
    of_qk = [block.type == "qk" for block in block_map.layer_blocks]
    assert scales[of_qk] == pytest.approx(dense(model.float(), monkeypatch), rel=1e-4)


class LargestTensor(TorchDispatchMode):
    """Keeps the size of the largest tensor made, in bytes; a view of the given tensors is none."""

    def __init__(self, known):
        super().__init__()
        self.bytes, self._known = 0, {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Runs the operation."""
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self._known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("name", MODELS)
def test_no_more_than_a_head_is_copied_to_float32(name):
    model = made(name).to(torch.bfloat16)
    logits, _ = reader(model)
    with LargestTensor(model.parameters()) as largest:
        logits.measure(weights(model))
    assert 0 < largest.bytes <= WIDTH // HEADS * WIDTH * torch.float32.itemsize
