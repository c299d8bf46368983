from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MixtralConfig,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

from sharpwatch.blocks import BLOCKS, BlockMap, Part, Row, Rule, Rules, classify, load_rules
from sharpwatch.blocks.rules import Split
from sharpwatch.errors import BlockError, ConfigError

D, V, T = 8, 11, 6  # width, vocabulary, positions
EXAMPLE = Path(__file__).parents[2] / "examples" / "block-rules.yaml"
SMALL = {"hidden_size": D, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": V}
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def gpt2(**options):
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=D, n_head=2, vocab_size=V, n_positions=T, **IDS, **options))


def llama(*, tied, **options):
    config = SMALL | {"num_key_value_heads": 1} | options
    return LlamaForCausalLM(LlamaConfig(**config, **IDS, tie_word_embeddings=tied))


class Norm(nn.Module):
    """nanoGPT writes its own."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))


class LayerNorm(Norm):
    pass


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
    heard = []
    attention.register_forward_hook(lambda _, __, output: heard.append(output[0]))
    with torch.no_grad():
        for view in queries_and_keys:
            view.zero_()
        model(tokens)
        values = model.transformer.h[0].ln_1(model.transformer.wte(tokens) + model.transformer.wpe(tokens))
        values = values @ attention.c_attn.weight[:, 2 * D :] + attention.c_attn.bias[2 * D :]
        uniform = values.cumsum(1) / torch.arange(1, T + 1)[None, :, None]
        torch.testing.assert_close(heard[0], attention.c_proj(uniform))
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
    biased = {f"{name}.{leaf}": kind for name, kind in BIASED.items() for leaf in ("weight", "bias")}
    assert attention == biased | {"proj.weight": "vo"}


BIASED = {"q_proj": "qk", "k_proj": "qk", "v_proj": "vo", "q_norm": "norm"}


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


def test_layers_of_an_encoder_decoder_are_told_apart():
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


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (GPTNeoXConfig(**SMALL, **IDS), "gpt_neox.layers.0.attention.query_key_value.weight"),
        (
            GPTBigCodeConfig(n_layer=1, n_embd=D, n_head=2, vocab_size=V, multi_query=False, **IDS),
            "transformer.h.0.attn.c_attn.weight",
        ),
    ],
)
def test_fused_matrices_of_unknown_order_raise_although_their_shape_fits(config, name):
    model = AutoModelForCausalLM.from_config(config)
    assert model.get_parameter(name).shape == (3 * D, D)
    with pytest.raises(BlockError, match=re.escape(f"{name} (24, 8)")):
        classify(model)


def test_a_fused_matrix_that_is_not_three_squares_raises():
    with pytest.raises(BlockError, match=r"transformer\.h\.0\.attn\.c_attn\.weight \(16, 8\)"):
        classify(NanoGPT(lambda: CausalSelfAttention(fused=2 * D)))


def with_part(**modules):
    model = NanoGPT()
    for name, module in modules.items():
        model.transformer["h"][0].attn.add_module(name, module)
    return model


@pytest.mark.parametrize(
    "name", ["norm_mixer", "mlpish", "embedder", "gate", "wo_attn_q_extra", "key_value", "query_norm_proj"]
)
def test_a_name_that_merely_contains_a_known_word_is_not_placed(name):
    with pytest.raises(BlockError, match=rf"transformer\.h\.0\.attn\.{name}\.weight \(8, 8\)"):
        classify(with_part(**{name: nn.Linear(D, D)}))


def test_what_is_not_understood_names_parameter_shape_and_remedy():
    model = NanoGPT()
    model.transformer["h"][0].register_parameter("temperature", nn.Parameter(torch.ones(3)))
    with pytest.raises(BlockError) as caught:
        classify(model)
    message = str(caught.value)
    assert "transformer.h.0.temperature (3,)" in message
    # The remedy it shows is one that works.
    rule = yaml.safe_load(re.search(r"rules=\.\.\.\): (\[\{.*?\}\])", message)[1])[0]
    rules = Rules((Rule(rule["match"], block=rule["block"]),))
    assert types(classify(model, rules))["transformer.h.0.temperature"] == "other"


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
    block_map = classify(NanoGPT(layers=12, tied=False))
    assert block_map.blocks == BLOCKS
    layers = [block.layer for block in block_map.layer_blocks]
    assert layers == [None] * 4 + [f"layers.{i}" for i in range(12) for _ in range(4)]
    assert [block.type for block in block_map.layer_blocks[:8]] == ["emb", "norm", "head", "other", *BLOCKS[1:5]]
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
    ],
)
def test_a_map_with_gaps_overlaps_or_strangers_can_not_be(wrong):
    with pytest.raises(BlockError):
        BlockMap(wrong, {"w": (4, 3)})


def test_rules_override_in_order():
    rules = Rules((Rule("*.mlp.c_proj.bias", block="other"), Rule("*.mlp.*", block="norm")))
    found = types(classify(gpt2(), rules))
    assert found["transformer.h.0.mlp.c_proj.bias"] == "other"
    assert found["transformer.h.0.mlp.c_proj.weight"] == "norm"
    assert found["transformer.h.0.attn.c_proj.bias"] == "vo"


def test_a_rule_splits_what_is_not_known():
    model = NanoGPT(lambda: CausalSelfAttention(fused=2 * D))
    split = Split(-1, (("qk", D + 4), ("vo", D - 4)))
    rules = Rules((Rule("*c_attn.bias", split=split), Rule("*c_attn.weight", split=Split(0, split.parts))))
    fused = [part for part in classify(model, rules).parts if "c_attn" in part.parameter]
    assert [(p.type, p.dim, p.start, p.stop, p.numel) for p in fused] == [
        ("qk", 0, 0, 12, 96),
        ("vo", 0, 12, 16, 32),
        ("qk", 0, 0, 12, 12),
        ("vo", 0, 12, 16, 4),
    ]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Rule("*.attn.q_proj.*", block="qk")], "places nothing: no parameter matches"),
        ([Rule("*", block="emb"), Rule("*.bias", block="norm")], "places nothing: all 7 it matches are placed"),
        ([Rule("*c_attn.bias", split=Split(1, (("qk", 16), ("vo", 8))))], "has no dimension 1"),
        ([Rule("*c_attn.bias", split=Split(0, (("qk", 16), ("vo", 9))))], "the sizes add up to 25"),
    ],
)
def test_rules_that_do_not_fit_the_model_are_refused(rules, message):
    with pytest.raises(BlockError, match=re.escape(message)):
        classify(gpt2(), Rules(tuple(rules)))


@pytest.mark.parametrize(
    "fields", [{}, {"block": "qk", "split": Split(0, (("qk", 1), ("vo", 1)))}, {"block": "attention"}]
)
def test_a_rule_that_can_not_be(fields):
    with pytest.raises(BlockError, match=re.escape("rule '*'")):
        Rule("*", **fields)


def test_the_example_is_read():
    grouped = (("qk", 640), ("vo", 128))
    assert load_rules(EXAMPLE) == Rules(
        (
            Rule("*.attention.scale", block="norm"),
            Rule("*.attention.qkv.weight", split=Split(0, grouped)),
            Rule("*.attention.qkv.bias", split=Split(0, grouped)),
        )
    )


def test_classify_takes_the_path_of_a_file(tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text('- {match: "transformer.wpe.weight", block: emb}\n')
    assert types(classify(gpt2(), rules=str(path)))["transformer.wpe.weight"] == "emb"


@pytest.mark.parametrize(
    ("text", "line", "key", "message"),
    [
        ("", 1, "rules", "expected a list of rules"),
        ("match: a\nblock: qk\n", 1, "rules", "expected a list"),
        ("- match: a\n  block: qk\n- [1]\n", 3, "rules[1]", "expected a mapping with keys block, match, split"),
        ("- match: a\n  blok: qk\n", 2, "rules[0].blok", "unknown key; allowed: block, match, split"),
        ("- match: a\n  block: attention\n", 2, "rules[0].block", f"allowed: {', '.join(BLOCKS)}"),
        ("- match: a\n  block: 3\n", 2, "rules[0].block", "expected a string"),
        ("- match: a\n  block: qk\n  block: vo\n", 3, "rules[0].block", "given twice"),
        ("- block: qk\n", 1, "rules[0].match", "is missing"),
        ("- match: a\n", 1, "rules[0]", "give either block or split"),
        ("- match: a\n  split: {dim: x, parts: []}\n", 2, "rules[0].split.parts", "expected two parts or more"),
        (
            "- match: a\n  split:\n    dim: x\n    parts: [{block: qk, size: 1}, {block: vo, size: 1}]\n",
            3,
            "rules[0].split.dim",
            "expected an integer",
        ),
        (
            "- match: a\n  split:\n    dim: 0\n    parts:\n    - {block: qk, size: 1}\n    - {block: vo, size: 0}\n",
            6,
            "rules[0].split.parts[1].size",
            "expected an integer of 1 or more",
        ),
        ("- match: 'a\n  block: qk\n", 3, "rules", "is not YAML"),
        ("- match: *a\n", 1, "rules", "is not YAML"),
    ],
)
def test_a_file_that_can_not_be_names_line_key_and_what_is_allowed(tmp_path, text, line, key, message):
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_rules(path)
    assert (caught.value.file, caught.value.line, caught.value.key) == (str(path), line, key)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_rules(tmp_path / "none.yaml")
