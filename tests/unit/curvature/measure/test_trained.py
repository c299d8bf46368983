"""`measure` is over what is trained: frozen parameters are no part of any block."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import sharpwatch
from sharpwatch.errors import BlockError, ProbeError

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 16}
IDS = torch.arange(40).view(4, 10) % 16
BATCHES = [{"input_ids": IDS, "labels": IDS.flip(0)}]


def llama(training=lambda _: True):
    """A model that trains the parameters whose names say so."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZE, initializer_range=0.3))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(training(name))
    return model


def queries_and_values(name):
    return "q_proj" in name or "v_proj" in name


@pytest.fixture(scope="module")
def frozen():
    return sharpwatch.measure(
        llama(queries_and_values), BATCHES, draws=4, estimators=("gnb", "hutchinson"), method="autograd"
    )


def test_a_block_of_which_nothing_is_trained_is_absent(frozen):
    assert list(frozen.blocks) == ["qk", "vo"]
    assert list(frozen.layers) == [f"layers.{layer}.{block}" for layer in range(2) for block in ("qk", "vo")]
    assert frozen.whole.parameters == 4 * 16 * 16
    assert "norm" not in str(frozen)


@pytest.mark.parametrize("block", ["qk", "vo"])
def test_sharpness_is_over_what_is_trained(frozen, block):
    found = frozen.blocks[block]
    trained = 2 * 16 * 16  # one of two matrices, in two layers
    assert found.parameters == trained
    assert found.sharpness.value == pytest.approx(found.trace.value / trained)


@pytest.mark.parametrize("block", ["qk", "vo"])
@pytest.mark.parametrize("estimator", ["gnb", "hutchinson"])
def test_traces_are_those_of_the_trained_matrices_of_a_model_that_trains_all(frozen, block, estimator):
    rules = {"*.k_proj.*": "other", "*.o_proj.*": "other"}  # the block then has the same matrices
    options = {"estimators": (estimator,), "blocks": ("qk", "vo"), "rules": rules, "method": "autograd"}
    whole = sharpwatch.measure(llama(), BATCHES, draws=4, **options)
    expected, found = whole.blocks[block].estimates[estimator], frozen.blocks[block].estimates[estimator]
    assert found.value == pytest.approx(expected.value, rel=1e-4)


def test_a_block_that_is_frozen_cannot_be_asked_for():
    with pytest.raises(ProbeError, match=r"blocks must be among those that are trained, qk, vo, got \['ffn'\]"):
        sharpwatch.measure(llama(queries_and_values), BATCHES, draws=2, estimators=("gnb",), blocks=["ffn"])


class Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)
        self.gizmo = nn.Parameter(torch.eye(8))

    def forward(self, input_ids, labels):
        logits = self.head(self.emb(input_ids) @ self.gizmo)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def test_a_parameter_of_no_known_block_is_measured_as_other(caplog):
    with caplog.at_level(logging.WARNING, "sharpwatch"):
        report = sharpwatch.measure(Strange(), BATCHES, draws=2, estimators=("gnb",))
    assert report.blocks["other"].parameters == 64
    assert caplog.text.count('rules={"gizmo": "other"}') == 1
    caplog.clear()
    placed = sharpwatch.measure(Strange(), BATCHES, draws=2, estimators=("gnb",), rules={"gizmo": "ffn"}, strict=True)
    assert placed.blocks["ffn"].parameters == 64
    assert not caplog.text
    with pytest.raises(BlockError, match="gizmo"):
        sharpwatch.measure(Strange(), BATCHES, draws=2, estimators=("gnb",), strict=True)
