"""What the language models read: Python's documentation, one byte a token. Nothing is fetched."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

VOCABULARY = 256  # bytes
LENGTH = 16  # tokens in a row
ROWS = 8  # in a batch


@cache
def tokens() -> Tensor:
    """The text; int64 [tokens]."""
    return torch.tensor(list(Path(pydoc_data.topics.__file__).read_bytes()[:200_000]))


def windows(length: int = LENGTH, rows: int = ROWS) -> Iterator[Tensor]:
    """Batches without end, int64 [rows, length], the same at each call."""
    source, text = torch.Generator().manual_seed(1), tokens()
    while True:
        starts = torch.randint(len(text) - length, (rows, 1), generator=source)
        yield text[starts + torch.arange(length)]


def dataset(rows: int) -> list[dict[str, Tensor]]:
    """Rows of a causal language model's dataset, whose labels are its inputs."""
    return [{"input_ids": ids, "labels": ids} for ids in next(windows(rows=rows))]


def sentences(count: int) -> list[str]:
    """Pieces of the text, each of 20 characters."""
    pieces = next(windows(20, rows=count))
    return [bytes(piece.tolist()).decode("ascii", "replace") for piece in pieces]


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes: 256 of them, then "</s>", "<pad>" and "<unk>"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    of_bytes = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    of_bytes.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=of_bytes, model_max_length=64)
    fast.add_special_tokens({"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"})
    return fast
