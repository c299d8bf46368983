"""Which attentions have heads that are known, and the reason for those that have not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import sharpwatch
from sharpwatch.blocks.attention_heads import _NORM_CALL, find_attention_heads, why_not_read

USUAL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


class Attention(nn.Module):
    """A user's own attention."""

    def __init__(self, heads=None):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(32, 32, bias=False), nn.Linear(32, 16, bias=False)
        self.v_proj, self.o_proj = nn.Linear(32, 16, bias=False), nn.Linear(32, 32, bias=False)
        if heads is not None:
            self.n_head = heads


class NormedInCode(Attention):
    """Its queries and keys are normalised without a module."""

    def forward(self, x):
        """Queries and keys alone."""
        q, k = self.q_proj(x), self.k_proj(x)
        return functional.rms_norm(q, (32,)), functional.rms_norm(k, (16,))


class Model(nn.Module):
    """One layer with an attention."""

    def __init__(self, attention):
        super().__init__()
        self.wte = nn.Embedding(64, 32)
        self.layers = nn.ModuleList([nn.ModuleDict({"attn": attention})])


def found(model, trained=None):
    block_map = sharpwatch.classify(model)
    block_map = block_map if trained is None else block_map.restricted_to(trained)
    heads, left_out = find_attention_heads(model, block_map)
    assert {block_map.layer_blocks[index].type for index in left_out} <= {"qk"}
    return heads, set(left_out.values())


def test_the_number_of_heads_is_the_attentions_own():
    heads, left_out = found(Model(Attention(heads=4)))
    assert [(each.heads, each.key_heads, each.width) for each in heads] == [(4, 2, 8)]
    assert not left_out


@pytest.mark.parametrize(
    ("heads", "reason"),
    [(None, "the number of heads is not known"), (3, "3 heads don't fit"), (1, "1 heads don't fit")],
)
def test_heads_that_are_not_known_or_do_not_fit_are_left_out(heads, reason):
    known, (left_out,) = found(Model(Attention(heads)))
    assert not known
    assert left_out.startswith(reason)


@pytest.mark.parametrize("on_config", [False, True])
@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"head_dim": 8, "num_key_value_heads": 2}, None),
        ({"head_dim": 16}, "the matrices have 8 entries a head, the attention states 16"),  # one of two ranks' half
        ({"num_key_value_heads": 4}, "the matrices have 2 key heads, the attention states 4"),
    ],
)
def test_separate_matrices_of_other_sizes_than_stated_are_left_out(sizes, reason, on_config):
    attention = Attention(heads=4)
    if on_config:
        attention.config = SimpleNamespace(**sizes)
    else:
        vars(attention).update(sizes)
    known, left_out = found(Model(attention))
    assert (len(known), left_out) == ((1, set()) if reason is None else (0, {reason}))


def test_the_modules_own_width_outweighs_the_configs_key_heads():
    """As in MiMo-V2, whose sliding layers have twice the key heads of its config."""
    attention = Attention(heads=4)
    attention.head_dim, attention.config = 8, SimpleNamespace(num_key_value_heads=1)
    assert [each.key_heads for each in found(Model(attention))[0]] == [2]


@pytest.mark.parametrize(
    "model",
    [
        lambda: Qwen3ForCausalLM(Qwen3Config(**USUAL, head_dim=8)),
        lambda: Olmo2ForCausalLM(Olmo2Config(**USUAL)),
        lambda: Model(NormedInCode(heads=4)),
    ],
    ids=["qwen3", "olmo2", "in-code"],
)
def test_normalised_queries_and_keys_are_left_out(model):
    known, (left_out,) = found(model())
    assert not known
    assert left_out.startswith("queries and keys are normalised (")


class NormedByRequest(Attention):
    """Its queries are normalised by a module, if it has one."""

    def forward(self, x):
        """Queries alone."""
        query_states = self.q_proj(x)
        return self.q_norm(query_states) if hasattr(self, "q_norm") else query_states


@pytest.mark.parametrize("norm", [None, nn.Identity()])
def test_a_norm_that_is_switched_off_is_none(norm):
    attention = NormedByRequest(heads=4)
    if norm is not None:
        attention.q_norm = norm
    assert len(found(Model(attention))[0]) == 1
    attention.q_norm = nn.LayerNorm(32)
    assert not found(Model(attention))[0]


@pytest.mark.parametrize(
    ("code", "normalises"),
    [
        ("q, k = norm(q), norm(k)", True),
        ("q = F.rms_norm(q, (q.size(-1),))", True),
        ("scores = nn.functional.normalize(query_layer, dim=-1) @ keys", True),
        ("q = torch.nn.functional.normalize( q)", True),
        ("query_states = self.q_layernorm(query_states)", False),  # if it has none, there is no such module
        ("q = self.q_proj(self.norm(x))", False),
        ("x = rms_norm(kwargs)", False),
    ],
)
def test_a_norm_of_queries_is_known_in_code(code, normalises):
    assert bool(_NORM_CALL.search(code)) == normalises


def test_latent_attention_is_left_out():
    config = DeepseekV3Config(
        **USUAL | {"num_key_value_heads": 4},
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
    )
    known, left_out = found(DeepseekV3ForCausalLM(config))
    assert not known
    assert left_out == {"no single trained matrix of queries with one of keys"}


def test_both_attentions_of_a_decoder_layer_count():
    config = T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=64, decoder_start_token_id=0)
    heads, left_out = found(T5ForConditionalGeneration(config))
    assert len(heads) == 3
    assert len({each.layer_block for each in heads}) == 2
    assert not left_out


def test_a_frozen_key_leaves_its_attention_out():
    model = Model(Attention(heads=4))
    trained = {name for name, _ in model.named_parameters() if "k_proj" not in name}
    assert found(model, trained)[1] == {"no single trained matrix of queries with one of keys"}


def test_adapters_are_left_out():
    peft = pytest.importorskip("peft")
    model = LlamaForCausalLM(LlamaConfig(**USUAL))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    known, left_out = found(adapted, trained)
    assert not known
    assert left_out == {"an adapter changes the weights"}


def test_reparametrized_weights_are_left_out():
    model = Model(Attention(heads=4))
    nn.utils.parametrizations.weight_norm(model.layers[0]["attn"].q_proj)
    known, (left_out,) = found(model)
    assert not known
    assert "no plain matrix" in left_out


class Packed(torch.Tensor):
    """Stands for a library's tensor with a format of its own."""


@pytest.mark.parametrize(
    ("parameter", "reason"),
    [
        (nn.Parameter(torch.zeros(4, 4)), ""),
        (nn.Parameter(torch.zeros(4, 2)), "sharded"),
        (nn.Parameter(torch.zeros(0)), "sharded"),
        (nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False), "quantised"),
        (torch.zeros(4, 4).as_subclass(Packed), "Packed"),
    ],
)
def test_only_plain_whole_weights_are_read(parameter, reason):
    assert reason in why_not_read(parameter, (4, 4))
    assert bool(reason) == bool(why_not_read(parameter, (4, 4)))
