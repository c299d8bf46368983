"""Load the argument DATA as batches: a text file, a file of tensors, or a user's function."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharpwatch.cli.extras import need
from sharpwatch.cli.measure.model import LoadedModel, call, is_factory
from sharpwatch.errors import SharpwatchError

Batches = list[dict[str, Any]]
_TENSOR_SUFFIXES = (".pt", ".pth", ".safetensors")
_IGNORED = -100  # Hugging Face's label of a position that does not count
_ROWS, _LENGTH, _BATCHES = 8, 256, 1  # of a text, by default: small enough for a laptop
# Of the tokens, 15 % are to be predicted: 80 % of these are masked, 10 % random, 10 % unchanged.
# Devlin et al., "BERT" (2019), section 3.1.
_PREDICTED = 0.15
_MASKED, _RANDOM = 0.8, 0.9


@dataclass(frozen=True, slots=True)
class TextWindows:
    """How to cut a text; None for a size that was not given."""

    rows: int | None = None
    length: int | None = None
    batches: int | None = None


def load_batches(data: str, windows: TextWindows, loaded: LoadedModel, seed: int) -> Batches:
    """Load batches onto the model's device.

    Args:
        data: A text file, a file of tensors, or module:function.
        windows: How to cut a text; for other data, `batches` is the number to take.
        loaded: The model.
        seed: Chooses the tokens of a text that a masked language model has to predict.

    Raises:
        SharpwatchError: There are no batches, or not enough.
    """
    path = Path(data)
    if path.is_file() and path.suffix not in _TENSOR_SUFFIXES:
        return _placed(_from_text(path, windows, loaded, seed), loaded.device)
    if windows.rows is not None or windows.length is not None:
        raise SharpwatchError(f"DATA {data}: --rows and --length cut a text; batches are taken as they are")
    if path.is_file():
        return _placed(_take(_read_tensors(path), windows.batches, data), loaded.device)
    if is_factory(data):
        return _placed(_take(call(data), windows.batches, data), loaded.device)
    problem = "is a folder" if path.is_dir() else "does not exist"
    raise SharpwatchError(
        f"DATA {data}: {problem}; expected a text file, a batch file ({', '.join(_TENSOR_SUFFIXES)}) or module:function"
    )


def _read_tensors(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return need("safetensors.torch", f"{path}: a .safetensors file").load_file(path)
        # Tensors alone: a pickle can run any code. On the CPU, because the file may name a GPU that is not here.
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SharpwatchError, MemoryError):
        raise
    except Exception as error:  # the content decides which: those of pickle, zip or safetensors
        message = str(error).partition("\n")[0]
        raise SharpwatchError(f"{path}: is not a file of tensors: {type(error).__name__}: {message}") from error


def _take(found: Any, wanted: int | None, source: str) -> Batches:
    """The first `wanted` batches, all for None; a single mapping is one batch."""
    if isinstance(found, Mapping):
        found = [found]
    if isinstance(found, Tensor | str) or not isinstance(found, Iterable):
        raise SharpwatchError(
            f"{source}: holds a {type(found).__name__}; expected a dict of the model's arguments, or a list of them"
        )
    # A generator may be endless, and all of its batches would be loaded before the first piece of work.
    if wanted is None and not isinstance(found, Sized):
        raise SharpwatchError(f"{source}: has no known number of batches; set the number with --batches")
    batches = [_batch(batch, f"{source}: batch {index}") for index, batch in enumerate(islice(found, wanted))]
    if wanted is not None and len(batches) < wanted:
        raise SharpwatchError(f"{source}: has {len(batches)} batches, --batches asks for {wanted}")
    if not batches:
        raise SharpwatchError(f"{source}: is empty: no batch to measure on")
    return batches


def _batch(batch: Any, where: str) -> dict[str, Any]:
    if not isinstance(batch, Mapping):
        raise SharpwatchError(f"{where}: is a {type(batch).__name__}; expected a dict of the model's arguments")
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    if not tensors:
        raise SharpwatchError(f"{where}: is empty: no tensor among {', '.join(map(str, batch)) or 'no arguments'}")
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            raise SharpwatchError(f"{where}: is empty: {name} has the shape {tuple(tensor.shape)}")
    return dict(batch)


def _placed(batches: Batches, device: torch.device) -> Batches:
    def to(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    return [{name: to(value) for name, value in batch.items()} for batch in batches]


# Text


@dataclass(frozen=True, slots=True)
class _SpecialTokens:
    """The tokens that a tokenizer puts around a row, such as [CLS] and [SEP]."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return len(self.before) + len(self.after)


def _from_text(path: Path, windows: TextWindows, loaded: LoadedModel, seed: int) -> Batches:
    """Cut a text into batches, with the checkpoint's tokenizer and the labels that the model was trained with."""
    if loaded.folder is None:
        raise SharpwatchError(
            f"DATA {path}: a text needs a tokenizer, and a model made by a function has none; "
            "use a batch file or a function that returns batches"
        )
    if loaded.task == "seq2seq":
        raise SharpwatchError(
            f"DATA {path}: an encoder-decoder is trained on pairs of texts, which one text does not have; "
            "use a batch file with input_ids and labels"
        )
    tokenizer = _tokenizer(loaded.folder, trust_remote_code=loaded.trust_remote_code)
    # A masked model was trained on rows within special tokens.
    special = _special_tokens(tokenizer) if loaded.task == "masked" else _SpecialTokens()
    ids = tokenizer(_read_text(path), add_special_tokens=False, verbose=False)["input_ids"]
    rows = _rows(path, ids, windows, _longest(loaded.model, tokenizer), special)
    if loaded.task == "masked":
        rows, labels = _mask(rows, tokenizer, special, seed)
    else:
        labels = rows
    batches = windows.batches or _BATCHES
    return [
        {"input_ids": part, "labels": label}
        for part, label in zip(rows.chunk(batches), labels.chunk(batches), strict=True)
    ]


def _read_text(path: Path) -> str:
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


def _tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise SharpwatchError(
            f"{folder}: has no tokenizer (tokenizer.json), which a text needs; save the model's own there with "
            "tokenizer.save_pretrained, or use a batch file"
        )
    transformers = need("transformers", f"{folder}: a tokenizer")
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the files decide which
        raise SharpwatchError(f"{folder}: the tokenizer can't be loaded: {type(error).__name__}: {error}") from error


def _special_tokens(tokenizer: Any) -> _SpecialTokens:
    """The special tokens, taken from an example, since no method of all tokenizers returns them."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = [at for at in range(len(full) - len(bare) + 1) if full[at : at + len(bare)] == bare]
    return (
        _SpecialTokens(tuple(full[: starts[0]]), tuple(full[starts[0] + len(bare) :])) if starts else _SpecialTokens()
    )


def _longest(model: Any, tokenizer: Any) -> int:
    """The most tokens in a row: the model's positions, or the tokenizer's limit if it is lower (RoBERTa: by 2)."""
    positions = getattr(model.config, "max_position_embeddings", None)
    known = positions if isinstance(positions, int) and positions > 0 else sys.maxsize
    return min(known, int(tokenizer.model_max_length))


def _rows(path: Path, ids: Sequence[int], windows: TextWindows, longest: int, special: _SpecialTokens) -> Tensor:
    """int64 [batches * rows, length]: windows without overlap, spread evenly over the text, whatever the seed."""
    least = special.size + 2  # one token to read, one to predict
    if len(ids) < 2:
        raise SharpwatchError(f"DATA {path}: is too short: {len(ids)} tokens leave nothing to predict")
    length = windows.length or min(longest, _LENGTH, len(ids) + special.size)
    if not least <= length <= longest:
        raise SharpwatchError(f"--length {length}: this model takes {least} to {longest} tokens")
    batches = windows.batches or _BATCHES
    text = length - special.size  # tokens of the text in a row
    available = len(ids) // text
    rows = windows.rows or max(1, min(_ROWS, available // batches))
    if available < rows * batches:
        raise SharpwatchError(
            f"DATA {path}: is too short: --batches {batches} of --rows {rows} need {rows * batches} "
            f"windows of {text} tokens, and its {len(ids)} tokens are {available}"
        )
    # The same windows for every seed, so that two seeds differ by their draws and not by the text.
    starts = torch.arange(rows * batches) * available // (rows * batches) * text
    taken = torch.tensor(ids)[starts[:, None] + torch.arange(text)]
    before, after = (
        torch.tensor(side, dtype=torch.int64).expand(len(taken), -1) for side in (special.before, special.after)
    )
    return torch.cat([before, taken, after], dim=1)


def _mask(rows: Tensor, tokenizer: Any, special: _SpecialTokens, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels for a masked language model; special tokens are never masked."""
    if tokenizer.mask_token_id is None:
        raise SharpwatchError("the tokenizer has no mask token, which a masked language model's text needs")
    # A generator of its own, on the CPU: the same tokens are masked on every device.
    generator = torch.Generator().manual_seed(seed)
    predicted = torch.rand(rows.shape, generator=generator) < _PREDICTED
    predicted[:, : len(special.before)] = False
    predicted[:, rows.shape[1] - len(special.after) :] = False
    fate = torch.rand(rows.shape, generator=generator)
    random = torch.randint(int(rows.max()) + 1, rows.shape, generator=generator)  # these ids are in the vocabulary
    inputs = torch.where(predicted & (fate < _MASKED), tokenizer.mask_token_id, rows)
    inputs = torch.where(predicted & (fate >= _MASKED) & (fate < _RANDOM), random, inputs)
    return inputs, rows.masked_fill(~predicted, _IGNORED)
