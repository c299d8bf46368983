"""Adapters are placed by what they adapt: PEFT's configurations, against the names of the modules they target."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from missing import missing
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from sharpwatch.blocks import classify

try:
    import peft
except ImportError:
    peft = None

WIDTH, LAYERS, VOCABULARY, TOKENS = 16, 2, 24, 5
SIZE = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 32}
SIZE |= {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"n_embd": WIDTH, "n_layer": 1, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 16}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EVERY = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
# What the matrices of a LLaMA are: the truth that every adapter's name is held against.
BLOCK_OF = {"q_proj": "qk", "k_proj": "qk", "v_proj": "vo", "o_proj": "vo", "norm": "norm", "layernorm": "norm"}
BLOCK_OF |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "ffn")
BLOCK_OF |= {"embed_tokens": "emb", "lm_head": "head", "score": "head"}


@pytest.fixture(autouse=True)
def _peft():
    if peft is None:
        missing("peft")


def llama(model=LlamaForCausalLM):
    return model(LlamaConfig(**SIZE))


def adapted(model, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about its own defaults
        return peft.get_peft_model(model, config)


def module_of(name):
    """The name of the matrix, norm or embedding that `name` belongs to."""
    found = [known for known in BLOCK_OF if re.search(rf"{known}(\.|$)", name)]
    return BLOCK_OF[found[-1]]


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def targets(modules, **options):
    return {"target_modules": modules, **options}


LORA = targets(EVERY, r=2)
CONFIGURATIONS = {
    "LoRA": ("LoraConfig", LORA),
    "rsLoRA": ("LoraConfig", LORA | {"use_rslora": True}),
    "DoRA": ("LoraConfig", LORA | {"use_dora": True}),
    "LoRA with bias": ("LoraConfig", LORA | {"lora_bias": True}),
    "LoRA on embeddings": ("LoraConfig", targets(["embed_tokens", "lm_head", "q_proj"], r=2)),
    "LoRA and whole modules": ("LoraConfig", targets(["v_proj"], r=2, modules_to_save=["lm_head", "embed_tokens"])),
    "LoRA and some tokens": ("LoraConfig", targets(["v_proj"], r=2, trainable_token_indices=[3, 4])),
    "AdaLoRA": ("AdaLoraConfig", targets(EVERY, init_r=2, target_r=1, total_step=10)),
    "IA3": ("IA3Config", targets(["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "LoHa": ("LoHaConfig", targets(EVERY, r=2)),
    "LoKr": ("LoKrConfig", targets(EVERY, r=2)),
    "OFT": ("OFTConfig", targets(EVERY, oft_block_size=4)),
    "BOFT": ("BOFTConfig", targets(EVERY, boft_block_size=4)),
    "VeRA": ("VeraConfig", targets(["q_proj", "v_proj"], r=2)),
    "FourierFT": ("FourierFTConfig", targets(ATTENTION, n_frequency=4)),
    "HRA": ("HRAConfig", targets(EVERY, r=2)),
    "SHiRA": ("ShiraConfig", targets(EVERY, r=1)),
    "RandLoRA": ("RandLoraConfig", targets(["q_proj", "v_proj"], r=2)),
    "C3A": ("C3AConfig", targets(EVERY, block_size=4)),
    "MiSS": ("MissConfig", targets(EVERY, r=2)),
    "RoAd": ("RoadConfig", targets(EVERY, group_size=4)),
    "LN tuning": ("LNTuningConfig", targets(["input_layernorm", "post_attention_layernorm", "norm"])),
    "trainable tokens": ("TrainableTokensConfig", targets(["embed_tokens"], token_indices=[1, 2])),
}


@pytest.mark.parametrize(("kind", "options"), CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_adapters_are_placed_by_what_they_adapt(kind, options):
    model = adapted(llama(), getattr(peft, kind)(**options))
    block_map = classify(model, strict=True)
    placed = {row.parameter: row.type for row in block_map.rows}
    assert placed == {name: module_of(name) for name, _ in model.named_parameters()}
    layers = {row.parameter: row.layer for row in block_map.rows}
    numbers = {name: re.search(r"\.layers\.(\d+)\.", name) for name in layers}
    assert layers == {name: f"layers.{number[1]}" if number else None for name, number in numbers.items()}


@pytest.mark.parametrize(("kind", "options"), CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_adapters_are_told_apart(kind, options):
    base = llama()
    plain = {id(parameter) for parameter in base.parameters()}
    model = adapted(base, getattr(peft, kind)(**options))
    of_adapters = {row.parameter for row in classify(model).rows if row.adapter}
    copies = {name for name, _ in model.named_parameters() if "modules_to_save" in name}  # whole modules, no adapters
    own = {name for name, parameter in model.named_parameters() if id(parameter) in plain}
    assert of_adapters == {name for name, _ in model.named_parameters()} - copies - own
    assert trained(model) <= of_adapters | copies


def test_whole_modules_that_are_trained_are_no_adapters():
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], r=2)
    rows = {row.parameter: row for row in classify(adapted(llama(LlamaForSequenceClassification), config)).rows}
    score = next(row for name, row in rows.items() if "modules_to_save" in name)
    assert (score.type, score.adapter) == ("head", False)


def gpt2(**options):
    return adapted(GPT2LMHeadModel(GPT2Config(**GPT2)), peft.LoraConfig(r=3, **options))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_the_second_factor_of_a_fused_matrix_is_split_as_the_matrix_is(options):
    block_map = classify(gpt2(target_modules=["c_attn"], fan_in_fan_out=True, **options))
    parts = {
        name: [(p.type, p.dim, p.start, p.stop) for p in block_map.parts if p.parameter.endswith(name)]
        for name in ("c_attn.base_layer.weight", "lora_A.default.weight", "lora_B.default.weight")
    }
    halves = [("qk", 0, 2 * WIDTH), ("vo", 2 * WIDTH, 3 * WIDTH)]
    # GPT-2 keeps its matrix as [in, out], and the adapter's as [out, in].
    assert parts["c_attn.base_layer.weight"] == [(block, 1, start, stop) for block, start, stop in halves]
    assert parts["lora_B.default.weight"] == [(block, 0, start, stop) for block, start, stop in halves]
    # The first factor serves all three, and is counted with the sharper block.
    assert parts["lora_A.default.weight"] == [("vo", None, 0, 0)]


def test_the_split_of_the_second_factor_is_that_of_queries_keys_and_values():
    torch.manual_seed(0)
    model = gpt2(target_modules=["c_attn"], fan_in_fan_out=True).eval()
    ids = torch.randint(0, VOCABULARY, (2, 6))
    attention, values = model.base_model.model.transformer.h[0].attn, []
    block_map, weights = classify(model), dict(model.named_parameters())
    attention.c_proj.register_forward_pre_hook(lambda _, args: values.append(args[0].detach()))
    with torch.no_grad():
        attention.c_attn.weight.zero_()  # the matrix itself gives nothing; queries and keys of zero attend evenly
        attention.c_attn.base_layer.bias.zero_()
        for part, view in zip(block_map.parts, block_map.views(weights), strict=True):
            if "lora_B" in part.parameter:
                view.fill_(float(part.type == "vo"))
        model(ids)
        given = model.base_model.model.transformer.h[0].ln_1(
            model.base_model.model.transformer.wte(ids) + model.base_model.model.transformer.wpe(torch.arange(6))
        )
        lora = attention.c_attn
        each = lora.lora_A["default"](given).sum(-1, keepdim=True).expand(-1, -1, WIDTH) * lora.scaling["default"]
        evenly = each.cumsum(1) / torch.arange(1, 7)[None, :, None]
    torch.testing.assert_close(values[0], evenly)


def test_an_adapter_of_torchs_attention_is_split_too():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)])
    model = adapted(model, peft.LoraConfig(target_modules=["self_attn"], r=2))
    block_map = classify(model, strict=True)
    of = {
        name: {p.type for p in block_map.parts if name in p.parameter} for name in ("in_proj_weight", "lora_B", "out_")
    }
    assert of["in_proj_weight"] == {"qk", "vo"}
    factors = [p for p in block_map.parts if p.parameter.endswith("self_attn.lora_B.default.weight")]
    assert [(p.type, p.start, p.stop) for p in factors] == [("qk", 0, 2 * WIDTH), ("vo", 2 * WIDTH, 3 * WIDTH)]


def test_adapters_of_experts():
    size = SIZE | {"num_local_experts": 2, "num_key_value_heads": 2}
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(target_modules=["q_proj"], target_parameters=names, r=2)
    model = adapted(MixtralForCausalLM(MixtralConfig(**size)), config)
    placed = {row.parameter: row.type for row in classify(model, strict=True).rows if row.adapter}
    assert placed == {name: "qk" if "q_proj" in name else "ffn" for name in trained(model)}


def test_an_adapter_that_all_blocks_share_is_counted_with_the_sharpest():
    model = adapted(llama(), peft.VBLoRAConfig(target_modules=ATTENTION, r=2, num_vectors=4, vector_length=4, topk=2))
    placed = {row.parameter: row.type for row in classify(model, strict=True).rows if row.adapter}
    bank = next(name for name in placed if "vector_bank" in name)
    assert placed.pop(bank) == "vo"
    assert placed == {name: module_of(name) for name in placed}


@pytest.mark.parametrize("projected", [False, True])
def test_prefixes_are_keys_and_values(projected):
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, prefix_projection=projected, encoder_hidden_size=WIDTH
    )
    model = adapted(llama(), config)
    block_map = classify(model, strict=True)
    name = "prompt_encoder.default." + ("transform.2.weight" if projected else "embedding.weight")
    parts = [(p.type, p.dim, p.start, p.stop, p.repeats, p.adapter) for p in block_map.parts if p.parameter == name]
    dim = 0 if projected else 1
    assert parts == [("qk", dim, 0, WIDTH, LAYERS, True), ("vo", dim, WIDTH, 2 * WIDTH, LAYERS, True)]
    assert {row.parameter for row in block_map.rows if row.adapter} == trained(model)


def test_a_prefixs_parts_are_the_keys_and_values_that_peft_reads():
    model = adapted(llama(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS))
    block_map, weights = classify(model), dict(model.named_parameters())
    with torch.no_grad():
        for part, view in zip(block_map.parts, block_map.views(weights), strict=True):
            if "prompt_encoder" in part.parameter:
                view.fill_({"qk": 1.0, "vo": 2.0}[part.type])
        prefix = model.get_prompt(batch_size=1)
    layers = [prefix.layers[i] for i in range(LAYERS)] if hasattr(prefix, "layers") else None
    pairs = [(each.keys, each.values) for each in layers] if layers else [tuple(each) for each in prefix]
    assert len(pairs) == LAYERS
    assert all(bool((keys == 1).all()) and bool((values == 2).all()) for keys, values in pairs)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PromptTuningConfig", {}),
        ("PromptEncoderConfig", {"encoder_hidden_size": 8}),
        ("PromptEncoderConfig", {"encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM"}),
        ("MultitaskPromptTuningConfig", {"num_tasks": 2}),
    ],
    ids=["prompt tuning", "p-tuning", "p-tuning with an LSTM", "multitask"],
)
def test_virtual_tokens_are_embeddings(kind, options):
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, **options)
    model = adapted(llama(), config)
    rows = {row.parameter: row for row in classify(model, strict=True).rows}
    assert {name: (rows[name].type, rows[name].adapter) for name in trained(model)} == dict.fromkeys(
        trained(model), ("emb", True)
    )


def test_prompts_beside_attention_are_read_through_its_values():
    config = peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM")
    model = adapted(llama(), config)
    rows = {row.parameter: row for row in classify(model, strict=True).rows}
    assert {(rows[name].type, rows[name].adapter) for name in trained(model)} == {("vo", True)}
    assert {row.type for name, row in rows.items() if "q_proj" in name} == {"qk"}


def test_encoder_decoders_are_adapted():
    config = T5Config(d_model=WIDTH, d_ff=32, num_layers=1, num_heads=2, d_kv=8, vocab_size=VOCABULARY)
    config.decoder_start_token_id = 0
    model = adapted(T5ForConditionalGeneration(config), peft.LoraConfig(target_modules=["q", "v", "wo"], r=2))
    rows = [row for row in classify(model, strict=True).rows if row.adapter]
    block = {"q": "qk", "v": "vo", "wo": "ffn"}
    assert {row.parameter: row.type for row in rows} == {
        name: block[re.search(r"\.(q|v|wo)\.lora", name)[1]] for name in trained(model)
    }
    assert {row.layer for row in rows} == {"encoder.layers.0", "decoder.layers.0"}


def test_quantized_matrices_are_placed_by_name():
    """As bitsandbytes keeps them in four bits: the weight is packed, and its shape is another."""

    class Linear4bit(nn.Linear):
        def __init__(self, *size):
            super().__init__(*size, bias=False)
            packed = torch.zeros(self.weight.numel() // 2, 1, dtype=torch.uint8)
            self.weight = nn.Parameter(packed, requires_grad=False)

    model = llama()
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, Linear4bit(child.in_features, child.out_features))
    model = adapted(model, peft.LoraConfig(target_modules=EVERY, r=2))
    placed = {row.parameter: row.type for row in classify(model, strict=True).rows}
    assert placed == {name: module_of(name) for name, _ in model.named_parameters()}
