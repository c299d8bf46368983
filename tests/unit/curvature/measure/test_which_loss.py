"""Whether `measure` measures the loss that is trained on: models whose name, labels or outputs suggest another."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import sharpwatch

BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
BERT |= {"max_position_embeddings": 40, "initializer_range": 0.4}
V = 9


class NeoBERTLMHead(BertForMaskedLM):
    """A masked language model whose class is not named so, as remote code has them."""


def exact_trace(model, ids, predicting) -> float:
    """Tr G of the mean cross-entropy: the mean over `predicting` positions of Tr(Jᵀ (diag p − ppᵀ) J)."""
    logits = model(input_ids=ids).logits[predicting]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = 0.0
    for row in logits:
        p = row.softmax(-1).detach()
        weights, vectors = torch.linalg.eigh(torch.diag(p) - torch.outer(p, p))
        for weight, vector in zip(weights, vectors.T, strict=True):
            gradients = torch.autograd.grad(row @ vector, parameters, retain_graph=True, allow_unused=True)
            total += float(weight) * sum(float(each.square().sum()) for each in gradients if each is not None)
    return total / len(logits)


def bart():
    size = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "init_std": 0.4}
    return BartForCausalLM(BartConfig(**size, vocab_size=20, max_position_embeddings=16, dropout=0.0))


def llama():
    return LlamaForCausalLM(LlamaConfig(**BERT))


@pytest.mark.parametrize(
    ("make", "labels"),
    [(bart, "labels"), (lambda: NeoBERTLMHead(BertConfig(**BERT)), "labels"), (llama, "shift_labels")],
    ids=["a decoder whose labels are not shifted", "a masked model by another name", "shift_labels"],
)
def test_the_positions_that_predict_are_those_of_the_models_loss(make, labels):
    torch.manual_seed(0)
    model = make().eval()
    ids = torch.randint(3, 20, (2, 8))
    targets = torch.full_like(ids, -100)
    targets[0, :3] = ids[0, 1:4]
    batch = {"input_ids": ids, "labels": targets} | ({labels: targets} if labels != "labels" else {})
    report = sharpwatch.measure(model, [batch], estimators=("gnb",), draws=400)
    assert report.tokens == 3
    trace = sum(block.trace.value for block in report.blocks.values())
    assert trace == pytest.approx(exact_trace(model, ids, targets != -100), rel=0.2)


@pytest.fixture
def rules(tmp_path):
    """Write block rules, `rules({"classifier*": "head"})`; returns the file's path."""

    def write(blocks: dict[str, str]) -> str:
        path = tmp_path / "rules.yaml"
        path.write_text("".join(f'- {{match: "{match}", block: {block}}}\n' for match, block in blocks.items()))
        return str(path)

    return write


@pytest.fixture
def regression():
    """A model of one score a row, and two batches of three rows; some targets lie below 0."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**BERT, num_labels=1)).eval()
    ids, scores = torch.randint(3, 20, (6, 6)), torch.tensor([1.5, 0.3, 2.0, 0.2, -0.4, -2.0])
    return model, [{"input_ids": ids[i : i + 3], "labels": scores[i : i + 3]} for i in (0, 3)]


def test_negative_targets_of_a_regression_count(regression, rules):
    model, batches = regression
    report = sharpwatch.measure(
        model, batches, estimators=("hutchinson",), draws=2, blocks=["head"], rules=rules({"classifier*": "head"})
    )
    true = sum(float(model(**batch).loss.detach()) for batch in batches) / 2  # as many rows in each
    assert report.loss == pytest.approx(true, abs=1e-3)


def test_a_regression_on_negative_targets_alone_is_measured(regression, rules):
    model, batches = regression
    batch = {name: values[1:] for name, values in batches[1].items()}
    report = sharpwatch.measure(
        model, [batch], estimators=("hutchinson",), draws=2, blocks=["head"], rules=rules({"classifier*": "head"})
    )
    assert report.loss == pytest.approx(float(model(**batch).loss.detach()), abs=1e-3)


def test_gnb_of_a_regression_is_that_of_the_mean_square(regression, rules):
    model, batches = regression
    options = {"blocks": ["head"], "rules": rules({"classifier*": "head", "bert.pooler*": "other"})}
    report = sharpwatch.measure(model, batches, estimators=("gnb",), draws=64, **options)
    hidden = torch.cat([model.bert(batch["input_ids"]).pooler_output.detach() for batch in batches])
    true = float(2 * (1 + hidden.square().sum(-1)).mean())  # 2/M JᵀJ, of the linear classifier
    assert report.blocks["head"].trace.value == pytest.approx(true, rel=0.2)


def test_batches_of_question_answering_weigh_by_rows(rules):
    torch.manual_seed(0)
    model = BertForQuestionAnswering(BertConfig(**BERT)).eval()
    positions = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    batches = [{"input_ids": torch.randint(3, 20, (2, length)), **positions} for length in (6, 36)]
    report = sharpwatch.measure(
        model, batches, estimators=("hutchinson",), draws=2, blocks=["head"], rules=rules({"qa_outputs*": "head"})
    )
    true = sum(float(model(**batch).loss.detach()) for batch in batches) / 2  # two rows in each
    assert report.loss == pytest.approx(true, abs=1e-3)


class LM(nn.Module):
    """Its head is linear: there the Gauss-Newton matrix of its loss is the Hessian."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss
        self.emb = nn.Embedding(V, 8, padding_idx=0)
        self.head = nn.Linear(8, V)

    def forward(self, x, targets):
        logits = self.head(torch.tanh(self.emb(x)))
        return {"logits": logits, "loss": self.loss(logits.flatten(0, 1), targets.flatten())}


def one_hot_mse(logits, targets):
    return functional.mse_loss(logits, functional.one_hot(targets, V).float())


def pad_ignored(logits, targets):
    return functional.cross_entropy(logits, targets, ignore_index=0)


def summed(logits, targets):
    return functional.cross_entropy(logits, targets, reduction="sum")


@pytest.mark.parametrize(
    "loss",
    [
        functional.cross_entropy,
        pad_ignored,
        summed,
        one_hot_mse,
    ],
)
def test_gnb_is_of_the_models_own_loss(loss):
    torch.manual_seed(0)
    model = LM(loss)
    x = torch.randint(1, V, (4, 10))
    x[:, 4:] = 0
    batch = {"x": x, "targets": x}
    gnb = sharpwatch.measure(model, [batch], draws=64, estimators=("gnb",), blocks=["head"])
    hessian = sharpwatch.measure(model, [batch], draws=64, estimators=("hutchinson",), blocks=["head"])
    assert gnb.blocks["head"].trace.value == pytest.approx(hessian.blocks["head"].trace.value, rel=0.2)


class ChannelsFirst(nn.Module):
    """Logits of [B, C, T], as `cross_entropy` wants them."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(V, 8)
        self.head = nn.Conv1d(8, V, 1)

    def forward(self, x):
        return self.head(self.emb(x).transpose(1, 2))


def test_classes_in_the_second_dimension():
    torch.manual_seed(0)
    model, x = ChannelsFirst(), torch.randint(1, V, (4, 10))
    p, hidden = model(x).softmax(1).detach(), model.emb(x).detach()
    true = float(((1 - p.square().sum(1)) * (1 + hidden.square().sum(-1))).mean())
    report = sharpwatch.measure(model, [{"x": x}], draws=64, estimators=("gnb",), blocks=["head"])
    assert report.blocks["head"].trace.value == pytest.approx(true, rel=0.1)
