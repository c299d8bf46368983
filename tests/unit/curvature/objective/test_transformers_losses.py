"""Shipped classes whose loss is not what their name suggests, against the loss that each one's code states."""

from __future__ import annotations

import layouts
import pytest
import torch
import transformers
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

import sharpwatch
from sharpwatch.blocks import Rule, Rules
from sharpwatch.errors import ObjectiveError

IDS = torch.randint(3, 20, (2, 6), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([[5, 6, -100, -100, -100, 7], [-100, 8, -100, -100, -100, -100]])
DECODER = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "init_std": 0.4}
DECODER |= {"vocab_size": 20, "max_position_embeddings": 16, "dropout": 0.0, "pad_token_id": 0}
BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
BERT |= {"max_position_embeddings": 40, "initializer_range": 0.4}


RULES = Rules((Rule("*", block="other"),))  # traces of the whole model are compared


def made(name, config, **options):
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, f"{config}Config")(**options)).eval()


def aligned(logits):
    return cross_entropy(logits.flatten(0, 1), LABELS.flatten())


DECODERS = ("Bart", "MBart", "Pegasus", "Marian", "Blenderbot", "BlenderbotSmall", "PLBart", "BigBirdPegasus")


@pytest.mark.parametrize("family", DECODERS)
def test_decoders_alone_do_not_shift_their_labels(family):
    model = made(f"{family}ForCausalLM", family, **DECODER)
    batch = {"input_ids": IDS, "labels": LABELS}
    report = sharpwatch.measure(model, [batch], estimators=("gnb",), draws=300)
    assert report.objective == "mean cross-entropy of logits, labels as they stand (verified)"
    assert report.tokens == 4
    agrees(report, layouts.exact_trace(model, aligned, model(input_ids=IDS).logits))


def agrees(report, exact):
    trace = report.whole.estimates["gnb"]
    assert trace.stderr < 0.15 * exact
    assert abs(trace.value - exact) < 4 * trace.stderr


ROWS, PLACES = torch.tensor([1, 0]), torch.tensor([2, 4])
SCORES = torch.tensor([1.5, -0.4])
SEVERAL = torch.tensor([[1.0, 0, 1], [0, 0, 1]])
HEADS = {
    "BertForPreTraining": (
        {"labels": LABELS, "next_sentence_label": ROWS},
        ("prediction_logits", "seq_relationship_logits"),
        lambda tokens, pairs: aligned(tokens) + cross_entropy(pairs, ROWS),
        {},
    ),
    "BertForQuestionAnswering": (
        {"start_positions": PLACES, "end_positions": PLACES + 1},
        ("start_logits", "end_logits"),
        lambda start, end: (cross_entropy(start, PLACES) + cross_entropy(end, PLACES + 1)) / 2,
        {},
    ),
    "BertForNextSentencePrediction": ({"labels": ROWS}, ("logits",), lambda z: cross_entropy(z, ROWS), {}),
    "BertForTokenClassification": (
        {"labels": LABELS.clamp(max=2)},
        ("logits",),
        lambda z: cross_entropy(z.flatten(0, 1), LABELS.clamp(max=2).flatten()),
        {"num_labels": 3},
    ),
    "BertForSequenceClassification": ({"labels": ROWS}, ("logits",), lambda z: cross_entropy(z, ROWS), {}),
    "BertForSequenceClassification, regression": (
        {"labels": SCORES},
        ("logits",),
        lambda z: mse_loss(z.squeeze(), SCORES),
        {"num_labels": 1},
    ),
    "BertForSequenceClassification, several labels": (
        {"labels": SEVERAL},
        ("logits",),
        lambda z: binary_cross_entropy_with_logits(z, SEVERAL),
        {"num_labels": 3},
    ),
    "ElectraForPreTraining": (
        {"labels": (LABELS > 0).long(), "attention_mask": torch.ones_like(IDS)},
        ("logits",),
        lambda z: binary_cross_entropy_with_logits(z, (LABELS > 0).float()),
        {},
    ),
    "BertLMHeadModel": (
        {"labels": LABELS},
        ("logits",),
        lambda z: cross_entropy(z[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten()),
        {"is_decoder": True},
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_with_losses_of_their_own(name):
    targets, names, loss, options = HEADS[name]
    kind = name.partition(",")[0]
    model = made(kind, "Electra" if kind.startswith("Electra") else "Bert", **BERT | options)
    batch = {"input_ids": IDS, **targets}
    report = sharpwatch.measure(model, [batch], estimators=("gnb",), draws=400, rules=RULES)
    assert report.objective.endswith("(verified)")
    output = model(**{key: value for key, value in batch.items() if key in {"input_ids", "attention_mask"}})
    agrees(report, layouts.exact_trace(model, loss, *(output[each] for each in names)))


def test_choices_are_classes_of_a_row():
    model = made("BertForMultipleChoice", "Bert", **BERT)
    ids = IDS[:, None].expand(2, 3, 6).clone()
    ids[:, 1] = ids[:, 1].flip(-1)
    report = sharpwatch.measure(
        model, [{"input_ids": ids, "labels": ROWS}], estimators=("gnb",), draws=200, rules=RULES
    )
    assert report.tokens == 2
    agrees(report, layouts.exact_trace(model, lambda z: cross_entropy(z, ROWS), model(input_ids=ids).logits))


def test_a_loss_over_alignments_is_refused():
    options = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    options |= {
        "conv_dim": (8,),
        "conv_kernel": (4,),
        "conv_stride": (4,),
        "vocab_size": 8,
        "num_feat_extract_layers": 1,
    }
    model = made("Wav2Vec2ForCTC", "Wav2Vec2", **options)
    batch = {"input_values": torch.randn(2, 64), "labels": torch.randint(1, 8, (2, 3))}
    with pytest.raises(ObjectiveError, match="the loss is none that gnb knows"):
        sharpwatch.measure(model, [batch], estimators=("gnb",), draws=2, rules=RULES)


def test_router_losses_are_named():
    torch.manual_seed(0)
    options = {"num_key_value_heads": 1, "num_local_experts": 3, "output_router_logits": True}
    config = transformers.MixtralConfig(**BERT | options, router_aux_loss_coef=0.05)
    model = transformers.MixtralForCausalLM(config).eval()
    batch = {"input_ids": IDS, "labels": LABELS}
    report = sharpwatch.measure(model, [batch], estimators=("gnb",), draws=2)
    assert report.objective == "mean cross-entropy of logits, labels shifted by one + 0.05 x aux_loss (verified)"
