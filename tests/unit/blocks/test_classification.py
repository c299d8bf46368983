from __future__ import annotations

import ast
import re

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MixtralConfig,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

from sharpwatch.blocks import Row, classify
from sharpwatch.errors import BlockError

D, V, T = 8, 11, 6  # width, vocabulary, positions
SMALL = {"hidden_size": D, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": V}
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def gpt2(**options):
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=D, n_head=2, vocab_size=V, n_positions=T, **IDS, **options))


def llama(*, tied, **options):
    config = SMALL | {"num_key_value_heads": 1} | options
    return LlamaForCausalLM(LlamaConfig(**config, **IDS, tie_word_embeddings=tied))


class LayerNorm(nn.Module):
    """nanoGPT writes its own."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))


class CausalSelfAttention(nn.Module):
    def __init__(self, fused=3 * D):
        super().__init__()
        self.c_attn = nn.Linear(D, fused)
        self.c_proj = nn.Linear(D, D)


class SeparateAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(D, D), nn.Linear(D, 4), nn.Linear(D, 4)
        self.q_norm = LayerNorm(4)
        self.proj = nn.Linear(D, D, bias=False)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_fc = nn.Linear(D, 4 * D)
        self.c_proj = nn.Linear(4 * D, D)


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = LayerNorm(D), attention(), LayerNorm(D), MLP()


class NanoGPT(nn.Module):
    def __init__(self, attention=CausalSelfAttention, layers=1, *, tied=True):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(V, D),
                "wpe": nn.Embedding(T, D),
                "h": nn.ModuleList(Block(attention) for _ in range(layers)),
                "ln_f": LayerNorm(D),
            }
        )
        self.lm_head = nn.Linear(D, V, bias=False)
        if tied:
            self.transformer["wte"].weight = self.lm_head.weight


def types(block_map):
    return {row.parameter: row.type for row in block_map.rows}


def test_gpt2():
    h = "transformer.h.0."
    assert classify(gpt2()).rows == (
        Row("transformer.wte.weight", "emb", None, V * D),  # lm_head is tied to it
        Row("transformer.wpe.weight", "other", None, T * D),
        Row(h + "ln_1.weight", "norm", "layers.0", D),
        Row(h + "ln_1.bias", "norm", "layers.0", D),
        Row(h + "attn.c_attn.weight", "qk", "layers.0", 2 * D * D),
        Row(h + "attn.c_attn.weight", "vo", "layers.0", D * D),
        Row(h + "attn.c_attn.bias", "qk", "layers.0", 2 * D),
        Row(h + "attn.c_attn.bias", "vo", "layers.0", D),
        Row(h + "attn.c_proj.weight", "vo", "layers.0", D * D),
        Row(h + "attn.c_proj.bias", "vo", "layers.0", D),
        Row(h + "ln_2.weight", "norm", "layers.0", D),
        Row(h + "ln_2.bias", "norm", "layers.0", D),
        Row(h + "mlp.c_fc.weight", "ffn", "layers.0", 4 * D * D),
        Row(h + "mlp.c_fc.bias", "ffn", "layers.0", 4 * D),
        Row(h + "mlp.c_proj.weight", "ffn", "layers.0", 4 * D * D),
        Row(h + "mlp.c_proj.bias", "ffn", "layers.0", D),
        Row("transformer.ln_f.weight", "norm", None, D),
        Row("transformer.ln_f.bias", "norm", None, D),
    )


def test_gpt2s_fused_matrix_is_split_where_its_own_forward_splits_it():
    model = gpt2().eval()
    block_map = classify(model)
    tokens = torch.arange(T)[None]
    before = model(tokens).logits
    weights = dict(model.named_parameters())
    queries_and_keys = [
        view
        for part, view in zip(block_map.parts, block_map.views(weights), strict=True)
        if part.type == "qk" and "c_attn" in part.parameter
    ]
    assert len(queries_and_keys) == 2
    # Without queries and keys, attention is uniform; without values it would be nothing at all.
    attention = model.transformer.h[0].attn
    inputs = []
    attention.register_forward_hook(lambda _, __, output: inputs.append(output[0]))
    with torch.no_grad():
        for view in queries_and_keys:
            view.zero_()
        model(tokens)
        values = model.transformer.h[0].ln_1(model.transformer.wte(tokens) + model.transformer.wpe(tokens))
        values = values @ attention.c_attn.weight[:, 2 * D :] + attention.c_attn.bias[2 * D :]
        uniform = values.cumsum(1) / torch.arange(1, T + 1)[None, :, None]
        torch.testing.assert_close(inputs[0], attention.c_proj(uniform))
    assert not torch.equal(before, model(tokens).logits)


def test_llama():
    layer = "model.layers.0."
    assert classify(llama(tied=False)).rows == (
        Row("model.embed_tokens.weight", "emb", None, V * D),
        Row(layer + "self_attn.q_proj.weight", "qk", "layers.0", D * D),
        Row(layer + "self_attn.k_proj.weight", "qk", "layers.0", D * D // 2),
        Row(layer + "self_attn.v_proj.weight", "vo", "layers.0", D * D // 2),
        Row(layer + "self_attn.o_proj.weight", "vo", "layers.0", D * D),
        Row(layer + "mlp.gate_proj.weight", "ffn", "layers.0", 12 * D),
        Row(layer + "mlp.up_proj.weight", "ffn", "layers.0", 12 * D),
        Row(layer + "mlp.down_proj.weight", "ffn", "layers.0", 12 * D),
        Row(layer + "input_layernorm.weight", "norm", "layers.0", D),
        Row(layer + "post_attention_layernorm.weight", "norm", "layers.0", D),
        Row("model.norm.weight", "norm", None, D),
        Row("lm_head.weight", "head", None, V * D),
    )


def test_a_tied_llama_has_no_head():
    block_map = classify(llama(tied=True))
    assert block_map.blocks == ("emb", "qk", "vo", "ffn", "norm")
    assert block_map.numel["emb"] == V * D


@pytest.mark.parametrize(("tied", "block"), [(True, "emb"), (False, "head")])
def test_nanogpt(tied, block):
    model = NanoGPT(tied=tied)
    found = classify(model)
    fused = [part for part in found.parts if "c_attn" in part.parameter]
    # nn.Linear keeps its weight as [out, in]: thirds of dimension 0.
    assert [(p.type, p.dim, p.start, p.stop, p.numel) for p in fused] == [
        ("qk", 0, 0, 2 * D, 2 * D * D),
        ("vo", 0, 2 * D, 3 * D, D * D),
        ("qk", 0, 0, 2 * D, 2 * D),
        ("vo", 0, 2 * D, 3 * D, D),
    ]
    assert types(found)["transformer.wte.weight"] == "emb"
    assert types(found)["transformer.wpe.weight"] == "other"
    assert types(found)["transformer.h.0.attn.c_proj.weight"] == "vo"
    assert types(found)["transformer.h.0.mlp.c_proj.weight"] == "ffn"
    assert types(found)["transformer.ln_f.weight"] == "norm"
    owner = "transformer.wte.weight" if tied else "lm_head.weight"
    assert types(found)[owner] == block


def test_a_tied_embedding_that_is_registered_after_the_head_is_the_embedding():
    model = nn.Module()
    model.lm_head = nn.Linear(D, V)
    model.wte = nn.Embedding(V, D)
    model.wte.weight = model.lm_head.weight
    assert types(classify(model)) == {"lm_head.weight": "emb", "lm_head.bias": "emb"}


def test_separate_projections_and_head_norms():
    attention = {
        name.removeprefix("transformer.h.0.attn."): kind
        for name, kind in types(classify(NanoGPT(SeparateAttention))).items()
        if ".attn." in name
    }
    placed = {"q_proj": "qk", "k_proj": "qk", "v_proj": "vo", "q_norm": "norm"}
    biased = {f"{name}.{leaf}": kind for name, kind in placed.items() for leaf in ("weight", "bias")}
    assert attention == biased | {"proj.weight": "vo"}


class WrappedAttention(nn.Module):
    """Each projection is a module with its own norm, as in Inkling2; the output's also holds a gate."""

    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            wrapper = nn.ModuleDict({"linear": nn.Linear(D, D, bias=False), "norm": LayerNorm(D)})
            self.add_module(name, wrapper)
        self.o_proj["gate_proj"] = nn.Linear(D, D, bias=False)


def test_projections_that_are_modules_of_their_own():
    found = types(classify(NanoGPT(WrappedAttention)))
    attention = "transformer.h.0.attn."
    assert [found[f"{attention}{name}_proj.linear.weight"] for name in "qkvo"] == ["qk", "qk", "vo", "vo"]
    assert [found[f"{attention}{name}_proj.norm.weight"] for name in "qkvo"] == 4 * ["norm"]
    assert found[f"{attention}o_proj.gate_proj.weight"] == "other"


def test_a_recurrence_of_torchs_own_is_other():
    found = types(classify(NanoGPT(lambda: nn.LSTM(D, D))))
    assert {kind for name, kind in found.items() if ".attn." in name} == {"other"}


class Head(nn.Module):
    """One head of attention as in Karpathy's lecture."""

    def __init__(self):
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(D, 4, bias=False) for _ in range(3))


class LectureBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.sa = nn.Module()
        self.sa.heads = nn.ModuleList([Head(), Head()])
        self.sa.proj = nn.Linear(D, D)
        self.ffwd = nn.Module()
        self.ffwd.net = nn.Sequential(nn.Linear(D, 4 * D), nn.ReLU(), nn.Linear(4 * D, D))
        self.ln1 = nn.LayerNorm(D)


class Lecture(nn.Module):
    def __init__(self):
        super().__init__()
        self.token_embedding_table = nn.Embedding(V, D)
        self.position_embedding_table = nn.Embedding(T, D)
        self.blocks = nn.Sequential(LectureBlock(), LectureBlock())
        self.lm_head = nn.Linear(D, V)


def test_heads_in_a_list_and_layers_in_a_sequential():
    block_map = classify(Lecture())
    assert {row.layer for row in block_map.rows} == {None, "layers.0", "layers.1"}
    found = types(block_map)
    assert [row.type for row in block_map.rows[:2]] == ["emb", "other"]
    assert found["blocks.1.sa.heads.1.query.weight"] == "qk"
    assert found["blocks.1.sa.heads.1.value.weight"] == "vo"
    assert found["blocks.1.sa.proj.bias"] == "vo"
    assert found["blocks.1.ffwd.net.2.weight"] == "ffn"
    assert found["lm_head.bias"] == "head"


class MetaBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.feed_forward = nn.Module(), nn.Module()
        self.attention_norm = nn.RMSNorm(D)
        for name in ("wq", "wk", "wv", "wo"):
            self.attention.add_module(name, nn.Linear(D, D, bias=False))
        for name in ("w1", "w2", "w3"):
            self.feed_forward.add_module(name, nn.Linear(D, D, bias=False))


def test_metas_llama():
    model = nn.Module()
    model.tok_embeddings, model.output = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
    model.layers = nn.ModuleList([MetaBlock()])
    found = types(classify(model))
    assert [found[f"layers.0.attention.{name}.weight"] for name in ("wq", "wk", "wv", "wo")] == ["qk", "qk", "vo", "vo"]
    assert {found[f"layers.0.feed_forward.{name}.weight"] for name in ("w1", "w2", "w3")} == {"ffn"}
    assert (found["tok_embeddings.weight"], found["output.weight"]) == ("emb", "head")


def test_two_lists_of_layers_beside_each_other_keep_their_names():
    model = nn.Module()
    model.local, model.wide = nn.ModuleList([MetaBlock()]), nn.ModuleList([MetaBlock()])
    assert {row.layer for row in classify(model).rows} == {"local.0", "wide.0"}


def test_torchs_own_encoder_layers():
    model = nn.Module()
    model.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, 16), 2, enable_nested_tensor=False).layers
    block_map = classify(model)
    second = [(p.parameter, p.type, p.dim, p.start, p.stop) for p in block_map.parts if p.layer == "layers.1"]
    assert second == [
        ("layers.1.self_attn.in_proj_weight", "qk", 0, 0, 2 * D),
        ("layers.1.self_attn.in_proj_weight", "vo", 0, 2 * D, 3 * D),
        ("layers.1.self_attn.in_proj_bias", "qk", 0, 0, 2 * D),
        ("layers.1.self_attn.in_proj_bias", "vo", 0, 2 * D, 3 * D),
        *((f"layers.1.self_attn.out_proj.{leaf}", "vo", None, 0, 0) for leaf in ("weight", "bias")),
        *((f"layers.1.linear1.{leaf}", "ffn", None, 0, 0) for leaf in ("weight", "bias")),
        *((f"layers.1.linear2.{leaf}", "ffn", None, 0, 0) for leaf in ("weight", "bias")),
        *((f"layers.1.norm{i}.{leaf}", "norm", None, 0, 0) for i in (1, 2) for leaf in ("weight", "bias")),
    ]


def test_multihead_attention_with_widths_of_its_own():
    attention = nn.MultiheadAttention(D, 2, kdim=4, vdim=6, add_bias_kv=True)
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "bias_k", "bias_v", "out_proj.weight")
    found = types(classify(attention))
    assert [found[name] for name in names] == ["qk", "qk", "vo", "qk", "vo", "vo"]


def test_layers_of_an_encoder_decoder_are_distinguished():
    config = T5Config(d_model=D, d_ff=8, num_layers=2, num_decoder_layers=1, num_heads=2, d_kv=4, vocab_size=V)
    block_map = classify(T5ForConditionalGeneration(config))
    layers = {row.parameter: row.layer for row in block_map.rows}
    assert layers["encoder.block.1.layer.0.SelfAttention.q.weight"] == "encoder.layers.1"
    assert layers["decoder.block.0.layer.1.EncDecAttention.k.weight"] == "decoder.layers.0"
    assert layers["encoder.final_layer_norm.weight"] is None
    found = types(block_map)
    assert found["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] == "other"
    assert found["decoder.block.0.layer.1.EncDecAttention.o.weight"] == "vo"
    assert found["encoder.block.0.layer.1.DenseReluDense.wo.weight"] == "ffn"


@pytest.mark.parametrize("wrapper", ["module", "_orig_mod"])
def test_wrappers_change_nothing_but_names(wrapper):
    outer = nn.Module()
    outer.add_module(wrapper, NanoGPT(layers=2))
    plain = classify(NanoGPT(layers=2)).rows
    assert [row[1:] for row in classify(outer).rows] == [row[1:] for row in plain]


def test_experts_routers_and_state_spaces():
    mixtral = AutoModelForCausalLM.from_config(MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=2))
    found = types(classify(mixtral))
    assert found["model.layers.0.mlp.gate.weight"] == "other"
    assert found["model.layers.0.mlp.experts.gate_up_proj"] == "ffn"
    mamba = AutoModelForCausalLM.from_config(MambaConfig(hidden_size=D, num_hidden_layers=1, vocab_size=V))
    found = types(classify(mamba))
    assert found["backbone.layers.0.mixer.in_proj.weight"] == "other"
    assert found["backbone.layers.0.norm.weight"] == "norm"


def test_query_and_key_norms_are_norms():
    qwen = AutoModelForCausalLM.from_config(Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=4, **IDS))
    assert types(classify(qwen))["model.layers.0.self_attn.q_norm.weight"] == "norm"


class LookAlike(nn.Module):
    """Attention of one's own with a fused matrix of transformers' name: nothing tells how it is laid out."""

    def __init__(self):
        super().__init__()
        self.query_key_value, self.dense = nn.Linear(D, 3 * D), nn.Linear(D, D)


def test_a_fused_matrix_of_unknown_order_is_not_placed_although_its_shape_fits():
    with pytest.raises(BlockError, match=re.escape("transformer.h.0.attn.query_key_value.weight (24, 8)")):
        classify(NanoGPT(LookAlike), strict=True)


def test_a_fused_matrix_that_is_not_three_squares_is_not_placed():
    with pytest.raises(BlockError, match=r"transformer\.h\.0\.attn\.c_attn\.weight \(16, 8\)"):
        classify(NanoGPT(lambda: CausalSelfAttention(fused=2 * D)), strict=True)


def with_part(**modules):
    model = NanoGPT()
    for name, module in modules.items():
        model.transformer["h"][0].attn.add_module(name, module)
    return model


@pytest.mark.parametrize(
    "name", ["norm_mixer", "mlpish", "embedder", "gated", "wo_attn_q_extra", "key_value", "query_norm_proj"]
)
def test_a_name_that_merely_contains_a_known_word_is_not_placed(name):
    with pytest.raises(BlockError, match=rf"transformer\.h\.0\.attn\.{name}\.weight \(8, 8\)"):
        classify(with_part(**{name: nn.Linear(D, D)}), strict=True)


def strange(layers=1):
    model = NanoGPT(layers=layers)
    for layer in model.transformer["h"]:
        layer.register_parameter("wobble", nn.Parameter(torch.ones(3)))
    return model


def test_parameters_of_no_known_block_are_other_with_one_warning(caplog):
    model = strange(layers=2)
    model.register_parameter("gizmo", nn.Parameter(torch.ones(2, 2)))
    found = classify(model)
    assert found.unplaced == ("gizmo", "transformer.h.0.wobble", "transformer.h.1.wobble")
    assert {types(found)[name] for name in found.unplaced} == {"other"}
    assert sum(part.numel for part in found.parts) == sum(parameter.numel() for parameter in model.parameters())
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "gizmo (2, 2), transformer.h.0.wobble (3,), transformer.h.1.wobble (3,)" in record.message


def rules_of(message):
    """The rules that a message shows, as they would be pasted."""
    return ast.literal_eval(re.search(r"rules=(\{.*?\})", message)[1])


def test_the_rules_of_the_message_can_be_pasted(caplog):
    model = strange(layers=2)
    classify(model)
    rules = rules_of(caplog.text)
    assert rules == {"transformer.h.*.wobble": "other"}
    caplog.clear()
    found = classify(model, rules | {"transformer.h.*.wobble": "norm"}, strict=True)
    assert found.unplaced == ()
    assert [row.type for row in found.rows if "wobble" in row.parameter] == ["norm", "norm"]
    assert not caplog.records


def test_a_rule_of_the_message_matches_nothing_that_is_placed(caplog):
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"mlp": nn.Linear(D, D)}), nn.Module()])
    model.layers[1].weight = nn.Parameter(torch.ones(2))  # `layers.*.weight` would match mlp.weight too
    classify(model)
    assert rules_of(caplog.text) == {"layers.1.weight": "other"}


def test_a_message_about_many_parameters_stays_short():
    model = NanoGPT()
    for i in range(40):
        model.register_parameter(f"gizmo_{i}", nn.Parameter(torch.ones(2, 2)))
    with pytest.raises(
        BlockError, match=r"^these parameters belong to no known block: gizmo_0 \(2, 2\), .* and 34 more"
    ) as caught:
        classify(model, strict=True)
    assert len(str(caught.value)) < 1000


def test_what_is_not_understood_raises_where_it_is_asked_to():
    with pytest.raises(BlockError, match=re.escape("transformer.h.0.wobble (3,)")):
        classify(strange(), strict=True)


@pytest.mark.parametrize("build", [gpt2, lambda: llama(tied=False), NanoGPT], ids=["gpt2", "llama", "nanogpt"])
def test_covers_every_entry_once_frozen_ones_too(build):
    model = build()
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    block_map = classify(model)
    counts = {name: torch.zeros(parameter.shape) for name, parameter in model.named_parameters()}
    for view in block_map.views(counts):
        view.add_(1)
    assert all(bool((count == 1).all()) for count in counts.values())
    assert sum(block_map.numel.values()) == sum(p.numel() for p in model.parameters())
