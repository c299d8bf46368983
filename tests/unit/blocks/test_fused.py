"""Which rows of a fused matrix are values, found by what attention does with them and not by the rules.

What enters the output projection is linear in the values and in nothing else: twice the values (and their biases) are
exactly twice as much there. A slice that missed a row of values, or held one of queries or keys, would not show that.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import inspect
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sharpwatch.blocks import classify, fused

T = 6  # tokens
SMALL = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50}
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
GROUPED = {"num_key_value_heads": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
LATENT |= {"num_key_value_heads": 4, "n_routed_experts": 4, "num_local_experts": 4, "first_k_dense_replace": 1}
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 50}
DBRX = {"d_model": 32, "n_layers": 1, "n_heads": 4, "vocab_size": 50, "ffn_config": {"ffn_hidden_size": 16}}
DBRX |= {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 1e9}}
FALCON = {"new_decoder_architecture": False, "multi_query": False, "alibi": False}

# Family, options of its configuration, and the output projection of its first attention.
LANGUAGE = [
    ("gpt2", GPT2, "attn.c_proj"),
    ("gpt2", GPT2 | {"add_cross_attention": True}, "crossattention.c_proj"),
    ("openai-gpt", GPT2, "attn.c_proj"),
    ("gpt_neox", {}, "attention.dense"),
    ("gpt_neox_japanese", {"intermediate_multiple_size": 2}, "attention.dense"),
    ("bloom", {"n_head": 4, "n_layer": 1}, "self_attention.dense"),
    ("falcon", FALCON, "self_attention.dense"),
    ("falcon", FALCON | {"bias": True, "alibi": True}, "self_attention.dense"),
    ("falcon", FALCON | {"multi_query": True}, "self_attention.dense"),
    ("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}, "self_attention.dense"),
    ("gpt_bigcode", {"multi_query": True}, "attn.c_proj"),
    ("gpt_bigcode", {"multi_query": False}, "attn.c_proj"),
    ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 1}, "attn.out_proj"),
    ("codegen", GPT2 | {"rotary_dim": 4}, "attn.out_proj"),
    ("persimmon", {}, "self_attn.dense"),
    ("phi3", GROUPED, "self_attn.o_proj"),
    ("phi3", {"num_key_value_heads": 4}, "self_attn.o_proj"),
    ("dbrx", DBRX, "attn.out_proj"),
    ("modernbert", {"attention_bias": True}, "attn.Wo"),
    ("deberta", {}, "attention.output.dense"),
    ("jetmoe", {"kv_channels": 8, "num_key_value_heads": 2, "num_local_experts": 2}, "experts.output_linear"),
    ("deepseek_v2", LATENT, "self_attn.o_proj"),
    ("deepseek_v3", LATENT, "self_attn.o_proj"),
    ("deepseek_v3", LATENT | {"attention_bias": True}, "self_attn.o_proj"),
    ("minicpm3", LATENT, "self_attn.o_proj"),
    (
        "longcat_flash",
        LATENT | {"num_hidden_layers": 2, "head_dim": 4, "expert_ffn_hidden_size": 8},
        "self_attn.0.o_proj",
    ),
]


def named(case):
    name, options, _ = case
    labels = [
        f"{key}={value}" for key, value in options.items() if key in {"multi_query", "add_cross_attention", "bias"}
    ]
    labels += [key for key in ("new_decoder_architecture", "attention_bias") if options.get(key)]
    return "-".join([name, *labels])


def language_model(name, options):
    kind = AutoModelForMaskedLM if name in {"modernbert", "deberta"} else AutoModelForCausalLM
    own = {"n_embd", "d_model"} & options.keys()
    config = CONFIG_MAPPING[name](**(({} if own else SMALL) | IDS | options))
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = kind.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases start at zero, which would hide them
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def inputs_of(module, run):
    """What enters `module` in a run."""
    taken = []
    hook = module.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0].detach().clone()))
    with torch.no_grad():
        run()
    hook.remove()
    return taken[0]


def scale(weights, parts, kind, factor):
    """Multiply all of a block, or every other entry by the first and the second of two factors."""
    with torch.no_grad():
        for part in parts:
            view = part.view(weights[part.parameter])
            if part.type == kind:
                alternating = torch.as_tensor(factor, dtype=view.dtype).repeat(view.numel())[: view.numel()]
                view.mul_(alternating.view(view.shape))


def doubled_values_double_the_output(weights, parts, out, run):
    """`parts` are those of attention without its output projection `out`."""
    assert any(part.dim is not None for part in parts)
    before = inputs_of(out, run)
    scale(weights, parts, "vo", 2)
    # Latent attention norms a part of what is doubled, with an epsilon.
    torch.testing.assert_close(inputs_of(out, run), 2 * before, rtol=1e-4, atol=1e-5)
    scale(weights, parts, "qk", torch.tensor([3.0, 0.3]))  # not all alike: some models norm their queries and keys
    assert not torch.allclose(inputs_of(out, run), 2 * before, rtol=1e-3)


@pytest.mark.parametrize("case", [pytest.param(case, id=named(case)) for case in LANGUAGE])
def test_values_of_a_language_model(case):
    name, options, suffix = case
    model = language_model(name, options)
    path, out = next((path, module) for path, module in model.named_modules() if path.endswith(suffix))
    attention = path.removesuffix(suffix) + suffix.split(".")[0] + "."
    if suffix.split(".")[0] == "experts":
        attention = path.removesuffix(suffix)  # the experts are a part of attention
    inside = [part for part in classify(model).parts if part.parameter.startswith(attention)]
    parts = [part for part in inside if not part.parameter.startswith(path + ".")]
    tokens = torch.randint(50, (2, T), generator=torch.Generator().manual_seed(1))
    more = {}
    if "add_cross_attention" in options:
        more["encoder_hidden_states"] = torch.randn(2, T, 32)
    weights = dict(model.named_parameters())
    doubled_values_double_the_output(weights, parts, out, lambda: model(tokens, **more))


@functools.cache
def script():
    path = Path(__file__).parents[3] / "docs" / "families.py"
    spec = importlib.util.spec_from_file_location("families", path)
    module = sys.modules["families"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Attention of towers, taken out of a model: its class, and a family that has it.
TOWERS = {
    "BlipAttention": "blip",
    "Blip2Attention": "blip-2",
    "InstructBlipAttention": "instructblip",
    "InstructBlipVideoAttention": "instructblipvideo",
    "VisionAttention": "qwen2_vl",
    "Qwen2_5_VLVisionAttention": "qwen2_5_vl",
    "Qwen3VLVisionAttention": "qwen3_vl",
    "Qwen3VLMoeVisionAttention": "qwen3_vl_moe",
    "Qwen3_5VisionAttention": "qwen3_5",
    "Qwen3_5MoeVisionAttention": "qwen3_5_moe",
    "Qwen3OmniMoeVisionAttention": "qwen3_omni_moe_thinker",
    "Qwen4ExpVisionAttention": "qwen4_exp",
    "Glm4vVisionAttention": "glm4v",
    "Glm4vMoeVisionAttention": "glm4v_moe",
    "Glm5NextVisionAttention": "glm5_next",
    "GlmOcrVisionAttention": "glm_ocr",
    "Ernie4_5_VLMoeVisionAttention": "ernie4_5_vl_moe",
    "Dots3NoteVisionAttention": "dots3_note",
    "CohereCompassVisionAttention": "cohere_compass",
    "Exaone4_5_VisionAttention": "exaone4_5",
    "SamVisionAttention": "deepseek_vl_hybrid",
    "GotOcr2VisionAttention": "got_ocr2",
    "PPFormulaNetVisionAttention": "pp_formulanet",
    "DeepseekOcr2SamVisionAttention": "deepseek_ocr2",
    "UnlimitedOcrSamVisionAttention": "unlimited_ocr",
    "Florence2VisionChannelAttention": "florence2",
    "Florence2VisionWindowAttention": "florence2",
    "GraniteSpeechConformerAttention": "granite_speech",
    "GraniteSpeechPlusConformerAttention": "granite_speech_plus",
    "EvollaSequenceCompressorAttention": "evolla",
    "Phi4MultimodalAttention": "phi4_multimodal",
}


OUT = ("proj", "projection", "out_proj", "to_out", "o_proj")


def tower_attention(kind):
    """One attention of that class on the CPU, the map's parts of it by its own names."""
    zoo, family = script(), TOWERS[kind]
    kinds = ("causal",) if family == "phi4_multimodal" else ("image to text", "encoder-decoder")
    model = zoo.build(next(f for f in zoo.families() if f.name == family and set(kinds) & set(f.kinds)))
    path, found = next(
        (path, module)
        for path, module in model.named_modules()
        if kind in {cls.__name__ for cls in type(module).__mro__}
    )
    parts = [
        dataclasses.replace(part, parameter=part.parameter.removeprefix(path + "."))
        for part in classify(model).parts
        if part.parameter.startswith(path + ".")
    ]
    attention = copy.deepcopy(found).to_empty(device="cpu").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in attention.parameters():
            bound = (3 / parameter.shape[-1]) ** 0.5
            parameter.uniform_(-bound, bound)
    return attention, parts


def arguments(kind, attention, width):
    def noise(*shape):
        return torch.randn(*shape, width)

    if kind == "EvollaSequenceCompressorAttention":
        return {"x": noise(1, T), "latents": noise(1, 3), "mask": torch.ones(1, T + 3)}
    if kind.startswith("GraniteSpeech"):
        size = attention.context_size
        return {"hidden_states": noise(1, size), "attention_dists": torch.zeros(size, size, dtype=torch.long)}
    asked = inspect.signature(attention.forward).parameters
    given = {"attention_mask": None} if "attention_mask" in asked else {}
    if "position_embeddings" in asked:
        angles = torch.rand(T, attention.head_dim)
        given["position_embeddings"] = (angles.cos(), angles.sin())
    if "cu_seqlens" in asked:
        return given | {"hidden_states": noise(T), "cu_seqlens": torch.tensor([0, T], dtype=torch.int32)}
    if "Sam" in kind or "Window" in kind or kind.startswith(("GotOcr2", "PPFormulaNet")):
        side = getattr(attention, "window_size", 14)
        return given | {"hidden_states": noise(1, side, side)}
    if kind == "Phi4MultimodalAttention":
        given["position_embeddings"] = tuple(each[None] for each in given["position_embeddings"])
    return given | {"hidden_states": noise(1, T)}


@pytest.mark.parametrize("kind", TOWERS)
def test_values_of_a_towers_attention(kind):
    attention, parts = tower_attention(kind)
    weights = dict(attention.named_parameters())
    name, out = next((name, module) for name, module in attention.named_children() if name in OUT)
    split = next(part for part in parts if part.dim is not None and part.parameter.endswith("weight"))
    given = arguments(kind, attention, weights[split.parameter].shape[1])
    inside = [part for part in parts if not part.parameter.startswith(name + ".")]
    doubled_values_double_the_output(weights, inside, out, lambda: attention(**given))


QUERIES_WITH_GATES = [
    (
        "qwen3_next",
        GROUPED | {"head_dim": 8, "layer_types": ["full_attention"], "num_experts": 4, "num_experts_per_tok": 2},
        "q_proj",
    ),
    ("axk2", LATENT, "q_gate_proj"),
]


@pytest.mark.parametrize(("name", "options", "matrix"), QUERIES_WITH_GATES)
def test_gates_that_are_fused_with_queries(name, options, matrix):
    model = language_model(name, options)
    attention = next(module for path, module in model.named_modules() if path.endswith("self_attn"))
    weights = dict(model.named_parameters())
    parts = [part for part in classify(model).parts if part.parameter.endswith(f"{matrix}.weight")]
    assert [part.type for part in parts] == ["qk", "other"]
    tokens = torch.randint(50, (2, T), generator=torch.Generator().manual_seed(1))

    def run():
        model(tokens)

    inputs = inputs_of(getattr(attention, matrix), run)
    gate = parts[1].view(weights[parts[1].parameter]).detach().clone().flatten(0, 1)
    gated = inputs_of(attention.o_proj, run)
    scale(weights, parts, "other", 0)
    half = inputs_of(attention.o_proj, run)
    # With a gate of zero each output is halved, and nothing else has changed.
    torch.testing.assert_close(gated, 2 * half * torch.sigmoid(inputs @ gate.T), rtol=1e-4, atol=1e-5)
    scale(weights, parts, "qk", 0.1)
    assert (
        not torch.allclose(inputs_of(attention.o_proj, run), half, rtol=1e-3) or name == "qwen3_next"
    )  # norms its queries


def test_the_latent_is_distinguished_from_the_shared_key():
    model = language_model("deepseek_v3", LATENT)
    out = model.model.layers[0].self_attn.o_proj
    weights = dict(model.named_parameters())
    parts = [part for part in classify(model).parts if part.parameter.endswith("kv_a_proj_with_mqa.weight")]
    tokens = torch.randint(50, (2, T), generator=torch.Generator().manual_seed(1))
    before = inputs_of(out, lambda: model(tokens))
    # The latent is normed before anything is made of it: its scale is nothing, if that of all of it and only of it.
    scale(weights, parts, "vo", 3)
    torch.testing.assert_close(inputs_of(out, lambda: model(tokens)), before, rtol=1e-4, atol=1e-5)
    scale(weights, parts, "qk", 3)
    assert not torch.allclose(inputs_of(out, lambda: model(tokens)), before, rtol=1e-3)


def test_every_layout_is_shown():
    shown = set(TOWERS) | {"Attention", "GPT2Attention", "MptAttention", "ModernBertAttention", "Phi3Attention"}
    shown |= {"DbrxAttention", "GPTNeoXAttention", "GPTNeoXJapaneseAttention", "BloomAttention", "PersimmonAttention"}
    shown |= {"DisentangledSelfAttention", "JetMoeAttention", "FalconAttention", "GPTBigCodeAttention"}
    assert set().union(*(classes for classes, _ in fused._LAYOUTS)) == shown
