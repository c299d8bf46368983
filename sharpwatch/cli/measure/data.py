"""DATA on the command line to batches: a text, a file of tensors, or a user's own function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharpwatch.cli.measure.factory import call, is_factory
from sharpwatch.cli.measure.files import need
from sharpwatch.cli.measure.model import Loaded
from sharpwatch.cli.measure.text import Windows, from_text
from sharpwatch.errors import SharpwatchError

Batches = list[dict[str, Any]]
_TENSORS = (".pt", ".pth", ".safetensors")
_DEFAULT_BATCHES = 1  # of a text


@dataclass(frozen=True, slots=True)
class Cut:
    """How much of DATA is wanted; None where it was not said."""

    rows: int | None = None
    length: int | None = None
    batches: int | None = None


def load_batches(data: str, cut: Cut, loaded: Loaded, seed: int) -> Batches:
    """The batches that DATA names, on the model's device; raises `SharpwatchError` that names what is wrong.

    `seed` chooses which tokens of a text a masked language model has to guess, nothing else.
    """
    path = Path(data)
    if path.is_file() and path.suffix not in _TENSORS:
        windows = Windows(cut.rows, cut.length, cut.batches or _DEFAULT_BATCHES)
        return _placed(from_text(path, windows, loaded, seed), loaded.device)
    if cut.rows is not None or cut.length is not None:
        raise SharpwatchError(f"DATA {data}: --rows and --length cut a text; batches are taken as they are")
    if path.is_file():
        return _placed(_take(_read(path), cut.batches, data), loaded.device)
    if is_factory(data):
        return _placed(_take(call(data), cut.batches, data), loaded.device)
    what = "is a folder" if path.is_dir() else "is not there"
    raise SharpwatchError(
        f"DATA {data}: {what}; allowed: a text file, a batch file ({', '.join(_TENSORS)}) or module:function"
    )


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return need("safetensors.torch", f"{path}: a .safetensors file").load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SharpwatchError, MemoryError):
        raise
    except Exception as error:  # what is in the file decides what is raised: pickle's, zip's, safetensors' own
        said = str(error).partition("\n")[0]
        raise SharpwatchError(f"{path}: is not a file of tensors: {type(error).__name__}: {said}") from error


def _take(found: Any, wanted: int | None, source: str) -> Batches:
    """The first `wanted` of the batches found (None: all); one mapping is one batch."""
    if isinstance(found, Mapping):
        found = [found]
    if isinstance(found, Tensor | str) or not isinstance(found, Iterable):
        raise SharpwatchError(
            f"{source}: holds a {type(found).__name__}; expected a dict of the model's arguments, or a list of them"
        )
    if wanted is None and not isinstance(found, Sized):
        raise SharpwatchError(f"{source}: gives batches without an end that can be seen; say how many with --batches")
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
