"""MODEL on the command line to a model: a Hugging Face folder, or a user's own function."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sharpwatch.cli.measure.factory import call, is_factory
from sharpwatch.cli.measure.files import need
from sharpwatch.errors import SharpwatchError

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
# Transformers' class to load with, by what the model was trained to do, and its table of the models it knows.
_AUTO = {
    "seq2seq": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "causal": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "masked": ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
}


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A model on its device. `task` is a key of `_AUTO` for a folder; a user's function has neither task nor folder."""

    model: nn.Module
    device: torch.device
    optimizer: Optimizer | None = None
    folder: Path | None = None
    task: str = ""


def find_device(text: str) -> torch.device:
    """The device that `text` names; raises `SharpwatchError` where this machine or this torch has no such one."""
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        count = torch.cuda.device_count()
        there = ", ".join(["cpu", *(f"cuda:{index}" for index in range(count))])
        raise SharpwatchError(f"--device {text}: is not there; this machine has {there}") from error
    return device


def load(model: str, device: str | None, dtype: str | None) -> Loaded:
    """The model that MODEL names.

    A folder's is put on `device`, else on the GPU where there is one, in `dtype`, else in float32: curvature in half
    precision is mostly rounding. A function's stays as it is, but for what is given. Raises `SharpwatchError`.
    """
    to = None if device is None else find_device(device)
    if Path(model).is_dir():
        return _from_folder(Path(model), to or _default_device(), _dtype(dtype) or torch.float32)
    if is_factory(model):
        return _from_factory(model, to, _dtype(dtype))
    what = "is a file" if Path(model).is_file() else "is not there"
    raise SharpwatchError(
        f"MODEL {model}: {what}; allowed: a folder with config.json and weights on this machine "
        "(nothing is downloaded), or module:function"
    )


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


def _from_factory(factory: str, device: torch.device | None, dtype: torch.dtype | None) -> Loaded:
    made = call(factory)
    model, optimizer = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module) or not (optimizer is None or isinstance(optimizer, Optimizer)):
        got = f"({', '.join(type(item).__name__ for item in made)})" if isinstance(made, tuple) else type(made).__name__
        raise SharpwatchError(f"{factory} returned {got}; expected a torch.nn.Module, or (model, optimizer)")
    # Module.to changes the parameters in place, so that the optimizer keeps them.
    model = model.to(device=device, dtype=dtype)
    first = next(model.parameters(), torch.empty(0))
    return Loaded(model, first.device, optimizer)


def _from_folder(folder: Path, device: torch.device, dtype: torch.dtype) -> Loaded:
    task = _task(folder)
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        raise SharpwatchError(f"{folder}: has config.json but no weights; looked for {', '.join(_WEIGHTS)}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = need("transformers", f"{folder}: a checkpoint folder")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    auto = getattr(transformers, _AUTO[task][0])
    try:
        model, told = auto.from_pretrained(folder, local_files_only=True, dtype=dtype, output_loading_info=True)
    except Exception as error:
        raise SharpwatchError(f"{folder}: can't be loaded: {type(error).__name__}: {error}") from error
    _check_complete(folder, told)
    return Loaded(model.to(device), device, folder=folder, task=task)


def _task(folder: Path) -> str:
    """What the model in `folder` was trained to do, from its config.json."""
    architectures = _config(folder).get("architectures") or []
    transformers = need("transformers", f"{folder}: a checkpoint folder")
    tables = need("transformers.models.auto.modeling_auto", f"{folder}: a checkpoint folder")
    for task, (_, table) in _AUTO.items():
        if set(architectures) & set(getattr(tables, table).values()):
            return task
    named = ", ".join(map(str, architectures)) or "none"
    raise SharpwatchError(
        f"{folder}/config.json: architectures: {named}: no language model that transformers {transformers.__version__} "
        "knows; write a function that returns the model, and give module:function"
    )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SharpwatchError(f"{folder}: has no config.json, so it is no Hugging Face checkpoint") from error
    except (OSError, ValueError) as error:
        raise SharpwatchError(f"{path}: can't be read: {error}") from error
    if not isinstance(config, dict):
        raise SharpwatchError(f"{path}: is not a JSON object")
    return config


def _check_complete(folder: Path, told: dict[str, Any]) -> None:
    """Transformers only warns of weights that are not in the files, and makes random ones up."""
    missing = sorted(str(key) for key in told.get("missing_keys") or ())
    if missing:
        named = f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        raise SharpwatchError(f"{folder}: the weight files lack {len(missing)} of the model's parameters: {named}")
