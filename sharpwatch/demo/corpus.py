"""The demo's text: the documentation and sources that come with every Python, as BPE tokens."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

VOCABULARY = 2048
_END = "<|endoftext|>"
_SOURCE_BYTES = 3_000_000  # enough that a demo run never sees a window twice
_SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """The token ids of the whole text, and the size of the vocabulary."""

    tokens: Tensor  # int64 [tokens]
    vocabulary: int

    def batch(self, rows: int, length: int, generator: torch.Generator) -> Tensor:
        """Draw `rows` windows of `length` tokens from random places: int64 [rows, length]."""
        starts = torch.randint(len(self.tokens) - length, (rows, 1), generator=generator)
        return self.tokens[starts + torch.arange(length)]


def _documents() -> list[str]:
    from pydoc_data import topics  # noqa: PLC0415 - 700 kB of text, only when asked for

    library = Path(sysconfig.get_path("stdlib"))
    english = [text for _, text in sorted(topics.topics.items())]
    sources: list[str] = []
    size = 0
    for path in sorted(library.rglob("*.py")):
        if _SKIP & set(path.relative_to(library).parts) or "pydoc_data" in path.parts:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        sources.append(text)
        size += len(text)
        if size > _SOURCE_BYTES:
            break
    return english + sources


def load_corpus(cache: Path) -> Corpus:
    """Tokenise the text, or load the tokens of an earlier call.

    Args:
        cache: The folder that keeps the tokens, in a file named after a hash of the text.
    """
    documents = _documents()
    digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()[:16]
    path = cache / f"tokens-{digest}-{VOCABULARY}.pt"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        tokens = _encode(documents)
        partial = path.with_suffix(".partial")
        torch.save(tokens, partial)
        partial.replace(path)
    return Corpus(torch.load(path, weights_only=True), VOCABULARY)


def _encode(documents: list[str]) -> Tensor:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    end = tokenizer.encode(_END).ids
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    ids: list[int] = []
    for encoding in tokenizer.encode_batch([documents[index] for index in order]):
        ids.extend((*encoding.ids, *end))
    return torch.tensor(ids)
