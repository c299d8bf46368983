"""Known faults: each test states what is right and fails today; a fix removes its mark.

Here: which parameters are placed without a rule, and that frozen ones are part of no block.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import sharpwatch
from sharpwatch.errors import AttachError, BlockError

LLAMA = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 16}


def llama(training=lambda _: True) -> LlamaForCausalLM:
    """A model that trains the parameters whose names say so."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, initializer_range=0.3))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(training(name))
    return model


def queries_and_values(name: str) -> bool:
    return "q_proj" in name or "v_proj" in name


@pytest.fixture(scope="module")
def frozen_report():
    model, ids = llama(queries_and_values), torch.randint(0, 16, (4, 10))
    return sharpwatch.measure(model, [{"input_ids": ids, "labels": ids}], draws=4, estimators=("gnb",))


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="a block of frozen parameters, of which nothing was measured, is shown as 0 ± 0",
)
@pytest.mark.parametrize("block", ["emb", "ffn", "norm", "head"])
def test_a_frozen_block_is_absent(frozen_report, block):
    assert block not in frozen_report.blocks or frozen_report.blocks[block].trace is None


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="average sharpness is the trace over all parameters of a block, frozen ones included",
)
@pytest.mark.parametrize("block", ["qk", "vo"])
def test_sharpness_is_over_what_is_trained(frozen_report, block):
    found = frozen_report.blocks[block]
    trained = 2 * 16 * 16  # one of two matrices, in two layers
    assert found.sharpness.value == pytest.approx(found.trace.value / trained)


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="frozen parameters count in a run's blocks, whose sharpness they dilute",
)
def test_frozen_parameters_are_no_part_of_a_runs_blocks(recorded):
    model = llama(lambda name: "down_proj" in name or "norm" in name)
    recorded.attach(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0))
    recorded.close()
    parameters = dict.fromkeys(recorded.hello.blocks, 0)
    for row in recorded.hello.layer_blocks:
        parameters[row.block] += row.parameters
    assert parameters == {"ffn": 2 * 16 * 16, "norm": 5 * 16}


class Lora(nn.Module):
    """The names that `peft.get_peft_model` gives: base_layer, lora_A.default, lora_B.default."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


@pytest.fixture
def adapted():
    model = llama(lambda _: False)
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.q_proj, attention.v_proj = Lora(attention.q_proj), Lora(attention.v_proj)
    return model


@pytest.mark.xfail(strict=True, raises=BlockError, reason="a LoRA model's parameters are not placed")
def test_adapters_are_placed_by_what_they_adapt(adapted):
    placed = {row.parameter: row.type for row in sharpwatch.classify(adapted).rows if "lora" in row.parameter}
    assert placed == {
        name: "qk" if "q_proj" in name else "vo" for name, _ in adapted.named_parameters() if "lora" in name
    }


@pytest.mark.xfail(strict=True, raises=AttachError, reason="attach refuses a LoRA model over its parameters' names")
def test_a_model_with_adapters_is_watched(adapted, recorded):
    recorded.attach(adapted, torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad]))
    recorded.close()
    assert set(recorded.hello.blocks) == {"qk", "vo"}  # what is trained


class Named(nn.Module):
    """A model with a parameter that no rule knows."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(9, 8)
        self.gizmo = nn.Parameter(torch.zeros(8, 8))
        self.head = nn.Linear(8, 9)

    def forward(self, x):
        return self.head(self.emb(x) @ self.gizmo)


@pytest.mark.xfail(strict=True, raises=AttachError, reason="one parameter that no rule knows stops the whole job")
def test_attach_stops_no_job_over_a_name(recorded):
    model = Named()
    recorded.attach(model, torch.optim.AdamW(model.parameters()))
    recorded.close()
    assert "other" in recorded.hello.blocks


BERT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 12}
BERT |= {"max_position_embeddings": 16}
LLAMA_HEADS = LLAMA | {"pad_token_id": 0}
GPT2 = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 12, "n_positions": 16}
GPT2 |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
VIT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
VIT |= {"image_size": 8, "patch_size": 4}
T5 = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 12}
T5 |= {"decoder_start_token_id": 0}

unplaced = pytest.mark.xfail(strict=True, raises=BlockError, reason="the task's head is not placed without a rule")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model", "config", "size"),
    [
        pytest.param("BertForSequenceClassification", "BertConfig", BERT, marks=unplaced),
        pytest.param("BertForTokenClassification", "BertConfig", BERT, marks=unplaced),
        pytest.param("BertForQuestionAnswering", "BertConfig", BERT, marks=unplaced),
        pytest.param("BertForMultipleChoice", "BertConfig", BERT, marks=unplaced),
        pytest.param("RobertaForSequenceClassification", "RobertaConfig", BERT, marks=unplaced),
        pytest.param("LlamaForSequenceClassification", "LlamaConfig", LLAMA_HEADS, marks=unplaced),
        pytest.param("LlamaForTokenClassification", "LlamaConfig", LLAMA_HEADS, marks=unplaced),
        pytest.param("GPT2ForSequenceClassification", "GPT2Config", GPT2, marks=unplaced),
        pytest.param("ViTForImageClassification", "ViTConfig", VIT, marks=unplaced),
        pytest.param("Dinov2ForImageClassification", "Dinov2Config", VIT, marks=unplaced),
        ("T5ForSequenceClassification", "T5Config", T5),
        ("GPT2DoubleHeadsModel", "GPT2Config", GPT2),
    ],
)
def test_task_heads_of_transformers_are_placed(model, config, size):
    blocks = sharpwatch.classify(getattr(transformers, model)(getattr(transformers, config)(**size))).blocks
    assert {"qk", "vo", "ffn", "norm", "head"} <= set(blocks)


@pytest.mark.parametrize(
    ("model", "config", "size"), [("ViTForMaskedImageModeling", "ViTConfig", VIT), ("BertModel", "BertConfig", BERT)]
)
def test_transformers_without_a_task_head_are_placed(model, config, size):
    blocks = sharpwatch.classify(getattr(transformers, model)(getattr(transformers, config)(**size))).blocks
    assert {"qk", "vo", "ffn", "norm"} <= set(blocks)
