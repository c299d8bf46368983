"""Known faults: each test states what is right and fails today; a fix removes its mark.

Here: probes in the loops that people write. A probe runs there and is right, or tells why it does not.
"""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel


def train(optimizer, steps: int, loss) -> None:
    for _ in range(steps):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="embeddings resized after attach break the probes for good, while the watch goes on",
)
def test_parameters_whose_data_was_swapped_end_the_watch(recorded, caplog):
    torch.manual_seed(0)
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM"))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    recorded.attach(model, optimizer, probe_every=2)
    weight = model.transformer.wte.weight
    model.resize_token_embeddings(48)
    if model.transformer.wte.weight is not weight:
        pytest.fail("the parameter itself was replaced")
    ids = torch.randint(0, 48, (8, 12))
    with caplog.at_level(logging.WARNING, "sharpwatch"):
        train(optimizer, 140, lambda: model(input_ids=ids, labels=ids).loss)
        text = caplog.text  # before the loop closes the watch
    recorded.close()
    assert "attach again" in text
