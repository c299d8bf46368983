"""The heads that transformers puts on its models for tasks other than predicting tokens are placed without a rule."""

from __future__ import annotations

import warnings

import pytest
import transformers

from sharpwatch.blocks import classify

BERT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 12}
BERT |= {"max_position_embeddings": 16}
LLAMA = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 12}
LLAMA |= {"pad_token_id": 0}
GPT2 = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 12, "n_positions": 16}
GPT2 |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
VIT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
VIT |= {"image_size": 8, "patch_size": 4}
T5 = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 12}
T5 |= {"decoder_start_token_id": 0}


def build(model, config, size):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about its own defaults
        return getattr(transformers, model)(getattr(transformers, config)(**size))


@pytest.mark.parametrize(
    ("model", "config", "size", "heads"),
    [
        ("BertForSequenceClassification", "BertConfig", BERT, {"classifier"}),
        ("BertForTokenClassification", "BertConfig", BERT, {"classifier"}),
        ("BertForQuestionAnswering", "BertConfig", BERT, {"qa_outputs"}),
        ("BertForMultipleChoice", "BertConfig", BERT, {"classifier"}),
        ("BertForNextSentencePrediction", "BertConfig", BERT, {"cls.seq_relationship"}),
        ("RobertaForSequenceClassification", "RobertaConfig", BERT, {"classifier.dense", "classifier.out_proj"}),
        ("LlamaForSequenceClassification", "LlamaConfig", LLAMA, {"score"}),
        ("LlamaForTokenClassification", "LlamaConfig", LLAMA, {"score"}),
        ("LlamaForQuestionAnswering", "LlamaConfig", LLAMA, {"qa_outputs"}),
        ("GPT2ForSequenceClassification", "GPT2Config", GPT2, {"score"}),
        ("ViTForImageClassification", "ViTConfig", VIT, {"classifier"}),
        ("Dinov2ForImageClassification", "Dinov2Config", VIT, {"classifier"}),
        (
            "T5ForSequenceClassification",
            "T5Config",
            T5,
            {"classification_head.dense", "classification_head.out_proj"},
        ),
        ("GPT2DoubleHeadsModel", "GPT2Config", GPT2, {"multiple_choice_head.summary"}),
    ],
)
def test_the_head_of_a_task_is_head(model, config, size, heads):
    block_map = classify(build(model, config, size), strict=True)
    placed = {row.parameter.rpartition(".")[0] for row in block_map.rows if row.type == "head"}
    assert placed == heads
    assert {"emb", "qk", "vo", "ffn", "norm"} - {"emb"} <= set(block_map.blocks)


@pytest.mark.parametrize(
    ("model", "config", "size"), [("ViTForMaskedImageModeling", "ViTConfig", VIT), ("BertModel", "BertConfig", BERT)]
)
def test_models_without_a_head_of_a_task_are_placed(model, config, size):
    block_map = classify(build(model, config, size), strict=True)
    assert {"qk", "vo", "ffn", "norm"} <= set(block_map.blocks)
