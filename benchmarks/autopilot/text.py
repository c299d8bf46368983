"""The real text that models train on, and the part of it that they are judged on."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.faults.training import SIZES, byte_pairs, text
from sharpwatch.demo.train import english

_CHUNK = 4096  # tokens; every so many chunks one is held out
_HELD_OUT = 16
_LARGE_BYTES = 60_000_000


@dataclass(frozen=True, slots=True)
class Corpus:
    """Tokens to train on and tokens to judge by, int64 [n] each, without a window in common."""

    train: Tensor
    held_out: Tensor

    def batch(self, rows: int, length: int, generator: torch.Generator) -> Tensor:
        """Windows of the training text from random places: int64 [rows, length + 1]."""
        starts = torch.randint(len(self.train) - length - 1, (rows, 1), generator=generator)
        return self.train[starts + torch.arange(length + 1)]

    def judged(self, windows: int, length: int) -> Tensor:
        """The same windows of the held-out text at each call, evenly spaced: int64 [windows, length + 1]."""
        starts = torch.linspace(0, len(self.held_out) - length - 1, windows).long()[:, None]
        return self.held_out[starts + torch.arange(length + 1)]


@cache
def corpus(size: str) -> Corpus:
    """The text for models of a size: what every Python brings along, and for large ones all installed sources."""
    vocabulary = SIZES[size].vocabulary
    if size == "gpt2-small":
        encoded = byte_pairs(vocabulary).encode_batch(list(_documents()))
        tokens = torch.cat([torch.tensor(each.ids) for each in encoded if each.ids])
    else:
        tokens = torch.cat([text(domain, vocabulary) for domain in ("english", "code")])
    chunks = tokens[: len(tokens) // _CHUNK * _CHUNK].view(-1, _CHUNK)
    held_out = torch.arange(len(chunks)) % _HELD_OUT == _HELD_OUT - 1
    return Corpus(chunks[~held_out].flatten(), chunks[held_out].flatten())


def _documents() -> Iterator[str]:
    yield from english()
    left = _LARGE_BYTES
    for folder in ("stdlib", "purelib"):
        for path in sorted(Path(sysconfig.get_path(folder)).rglob("*.py")):
            source = path.read_text(encoding="utf-8", errors="replace")
            left -= len(source)
            if left < 0:
                return
            yield source
