"""A text to batches: the checkpoint's own tokenizer, windows spread over the text, labels as the model was trained."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharpwatch.cli.measure.files import need
from sharpwatch.cli.measure.model import Loaded
from sharpwatch.errors import SharpwatchError

_IGNORED = -100  # Hugging Face's label of a position that does not count
_ROWS, _LENGTH = 8, 256  # where neither is said: small enough for a laptop
_SHARE = 0.15  # of tokens that a masked language model guesses; of these 80 % masked, 10 % random, 10 % left alone:
_MASKED, _RANDOM = 0.8, 0.9  # Devlin et al., "BERT" (2019), section 3.1


@dataclass(frozen=True, slots=True)
class Windows:
    """How a text is cut; `rows` and `length` None take what fits."""

    rows: int | None
    length: int | None
    batches: int


@dataclass(frozen=True, slots=True)
class _Frame:
    """The special tokens that the tokenizer puts around a row, such as [CLS] and [SEP]."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return len(self.before) + len(self.after)


def from_text(path: Path, windows: Windows, loaded: Loaded, seed: int) -> list[dict[str, Tensor]]:
    """Batches of `path`; raises `SharpwatchError` for a text, a tokenizer or a model that can't give any."""
    if loaded.folder is None:
        raise SharpwatchError(
            f"DATA {path}: a text needs a tokenizer, and a model made by a function brings none; "
            "give a batch file or a function that returns batches"
        )
    if loaded.task == "seq2seq":
        raise SharpwatchError(
            f"DATA {path}: an encoder-decoder is trained on pairs of texts, which one text does not have; "
            "give a batch file with input_ids and labels"
        )
    tokenizer = _tokenizer(loaded.folder)
    frame = _frame(tokenizer) if loaded.task == "masked" else _Frame()
    ids = tokenizer(_read(path), add_special_tokens=False, verbose=False)["input_ids"]
    rows = _rows(path, ids, windows, _longest(loaded.model, tokenizer), frame)
    if loaded.task == "masked":
        rows, labels = _mask(rows, tokenizer, frame, seed)
    else:
        labels = rows
    return [
        {"input_ids": part, "labels": label}
        for part, label in zip(rows.chunk(windows.batches), labels.chunk(windows.batches), strict=True)
    ]


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SharpwatchError(
            f"DATA {path}: is not UTF-8 text, at byte {error.start}; batch files end in .pt or .safetensors"
        ) from error
    except OSError as error:
        raise SharpwatchError(f"DATA {path}: can't be read: {error.strerror}") from error
    if not text.strip():
        raise SharpwatchError(f"DATA {path}: is empty")
    return text


def _tokenizer(folder: Path) -> Any:
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise SharpwatchError(
            f"{folder}: has no tokenizer (tokenizer.json), which a text needs; save the model's own there with "
            "tokenizer.save_pretrained, or give a batch file"
        )
    transformers = need("transformers", f"{folder}: a tokenizer")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the files decide what is raised
        raise SharpwatchError(f"{folder}: the tokenizer can't be loaded: {type(error).__name__}: {error}") from error


def _frame(tokenizer: Any) -> _Frame:
    """Read off an example: no method that all tokenizers have says it."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = [at for at in range(len(full) - len(bare) + 1) if full[at : at + len(bare)] == bare]
    return _Frame(tuple(full[: starts[0]]), tuple(full[starts[0] + len(bare) :])) if starts else _Frame()


def _longest(model: Any, tokenizer: Any) -> int:
    """How many tokens a row can have: the model's positions, and what the tokenizer says of it (RoBERTa: 2 less)."""
    positions = getattr(model.config, "max_position_embeddings", None)
    known = positions if isinstance(positions, int) and positions > 0 else sys.maxsize
    return min(known, int(tokenizer.model_max_length))


def _rows(path: Path, ids: Sequence[int], windows: Windows, longest: int, frame: _Frame) -> Tensor:
    """int64 [batches * rows, length]: windows that don't overlap, spread evenly over the text; no seed moves them."""
    least = frame.size + 2  # one token to see, one to predict
    if len(ids) < 2:
        raise SharpwatchError(f"DATA {path}: is too short: {len(ids)} tokens leave nothing to predict")
    length = windows.length or min(longest, _LENGTH, len(ids) + frame.size)
    if not least <= length <= longest:
        raise SharpwatchError(f"--length {length}: this model takes {least} to {longest} tokens")
    text = length - frame.size  # tokens of a row that are the text's
    there = len(ids) // text
    rows = windows.rows or max(1, min(_ROWS, there // windows.batches))
    if there < rows * windows.batches:
        raise SharpwatchError(
            f"DATA {path}: is too short: --batches {windows.batches} of --rows {rows} need {rows * windows.batches} "
            f"windows of {text} tokens, and its {len(ids)} tokens are {there}"
        )
    starts = torch.arange(rows * windows.batches) * there // (rows * windows.batches) * text
    taken = torch.tensor(ids)[starts[:, None] + torch.arange(text)]
    before, after = (
        torch.tensor(side, dtype=torch.int64).expand(len(taken), -1) for side in (frame.before, frame.after)
    )
    return torch.cat([before, taken, after], dim=1)


def _mask(rows: Tensor, tokenizer: Any, frame: _Frame, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels of a masked language model, from rows whose frame is never masked."""
    if tokenizer.mask_token_id is None:
        raise SharpwatchError("the tokenizer has no mask token, which a masked language model's text needs")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(rows.shape, generator=generator) < _SHARE
    chosen[:, : len(frame.before)] = False
    chosen[:, rows.shape[1] - len(frame.after) :] = False
    fate = torch.rand(rows.shape, generator=generator)
    random = torch.randint(int(rows.max()) + 1, rows.shape, generator=generator)  # ids known to be of this vocabulary
    inputs = torch.where(chosen & (fate < _MASKED), tokenizer.mask_token_id, rows)
    inputs = torch.where(chosen & (fate >= _MASKED) & (fate < _RANDOM), random, inputs)
    return inputs, rows.masked_fill(~chosen, _IGNORED)
