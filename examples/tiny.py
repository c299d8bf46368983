"""A small model and a text, in place of your own: bytes of Python's documentation, no download."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

LENGTH = 64  # tokens in a row


def gpt2() -> GPT2LMHeadModel:
    """Make a GPT-2 of 0.1 million parameters that reads bytes."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
        )
    )


def rows(count: int = 800) -> list[dict[str, torch.Tensor]]:
    """Cut the first `count` rows of the text; each is the arguments of one call of the model."""
    text = torch.tensor(list(Path(pydoc_data.topics.__file__).read_bytes()[: count * LENGTH]))
    return [{"input_ids": ids, "labels": ids} for ids in text.view(-1, LENGTH)]
