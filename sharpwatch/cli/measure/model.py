"""Load the argument MODEL: a Hugging Face folder, or a user's function."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sharpwatch.cli.extras import need
from sharpwatch.errors import SharpwatchError

_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
# By task: the transformers class that loads a model, and the table of the models that it knows.
_AUTO = {
    "seq2seq": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "causal": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "masked": ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
}


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model on its device.

    Attributes:
        model: The model.
        device: The device of its parameters.
        optimizer: The optimizer, if a user's function returned one.
        folder: The checkpoint's folder; None for a user's function.
        task: What it was trained for, a key of `_AUTO`; empty for a user's function.
        trust_remote_code: Whether Python code in the folder may run.
    """

    model: nn.Module
    device: torch.device
    optimizer: Optimizer | None = None
    folder: Path | None = None
    task: str = ""
    trust_remote_code: bool = False


def find_device(text: str) -> torch.device:
    """Find a device.

    Args:
        text: Its name, such as `cuda:1`.

    Raises:
        SharpwatchError: This machine or this torch has no such device.
    """
    try:
        device = torch.device(text)
        # By using it: `torch.device` takes the name of a GPU that is not there.
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        count = torch.cuda.device_count()
        there = ", ".join(["cpu", *(f"cuda:{index}" for index in range(count))])
        raise SharpwatchError(f"--device {text}: is not there; this machine has {there}") from error
    return device


def load(model: str, device: str | None, dtype: str | None, *, trust_remote_code: bool = False) -> LoadedModel:
    """Load a model.

    Args:
        model: A Hugging Face folder, or module:function.
        device: Where to put it. Default: for a folder the GPU if there is one; a function's model stays where it is.
        dtype: The type of its weights. Default: for a folder float32, since curvature in half precision is mostly
            rounding error; a function's model keeps its own.
        trust_remote_code: Whether Python code in a folder may run.

    Raises:
        SharpwatchError: The model cannot be loaded.
    """
    to = None if device is None else find_device(device)
    if Path(model).is_dir():
        return _from_folder(Path(model), to or _default_device(), _dtype(dtype) or torch.float32, trust_remote_code)
    if is_factory(model):
        return _from_factory(model, to, _dtype(dtype))
    what = "is a file" if Path(model).is_file() else "is not there"
    raise SharpwatchError(
        f"MODEL {model}: {what}; expected a folder with config.json and weights on this machine "
        "(nothing is downloaded), or module:function"
    )


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


def _from_factory(factory: str, device: torch.device | None, dtype: torch.dtype | None) -> LoadedModel:
    made = call(factory)
    model, optimizer = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module) or not (optimizer is None or isinstance(optimizer, Optimizer)):
        got = f"({', '.join(type(item).__name__ for item in made)})" if isinstance(made, tuple) else type(made).__name__
        raise SharpwatchError(f"{factory} returned {got}; expected a torch.nn.Module, or (model, optimizer)")
    # Module.to changes the parameters in place, so that the optimizer keeps them.
    model = model.to(device=device, dtype=dtype)
    first = next(model.parameters(), torch.empty(0))
    return LoadedModel(model, first.device, optimizer)


def _from_folder(folder: Path, device: torch.device, dtype: torch.dtype, trust_remote_code: bool) -> LoadedModel:
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported, which `_task` does
    task = _task(folder, trust_remote_code=trust_remote_code)
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        raise SharpwatchError(f"{folder}: has config.json but no weights; expected {', '.join(_WEIGHTS)}")
    transformers = need("transformers", f"{folder}: a checkpoint folder")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    auto = getattr(transformers, _AUTO[task][0])
    try:
        model, loading_info = auto.from_pretrained(
            folder,
            local_files_only=True,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,  # without a value, transformers asks on a terminal
        )
    except Exception as error:
        # Any exception, because the files decide what is raised: by safetensors, json, torch or the model's own code.
        raise SharpwatchError(f"{folder}: can't be loaded: {type(error).__name__}: {error}") from error
    _check_complete(folder, loading_info)
    return LoadedModel(model.to(device), device, folder=folder, task=task, trust_remote_code=trust_remote_code)


def _task(folder: Path, *, trust_remote_code: bool) -> str:
    """What the model in `folder` was trained for, from its config.json."""
    config = _config(folder)
    architectures = config.get("architectures") or []
    brought = config.get("auto_map")
    own = [task for task, (auto, _) in _AUTO.items() if isinstance(brought, dict) and auto in brought]
    if own and trust_remote_code:
        return own[0]
    transformers = need("transformers", f"{folder}: a checkpoint folder")
    tables = need("transformers.models.auto.modeling_auto", f"{folder}: a checkpoint folder")
    for task, (_, table) in _AUTO.items():
        if set(architectures) & set(getattr(tables, table).values()):
            return task
    named = ", ".join(map(str, architectures)) or "none"
    if own:
        raise SharpwatchError(
            f"{folder}/config.json: architectures: {named}: is Python code in the folder, which is run with "
            "--trust-remote-code alone"
        )
    raise SharpwatchError(
        f"{folder}/config.json: architectures: {named}: not a language model that transformers "
        f"{transformers.__version__} knows; write a function that returns the model, and name it as module:function"
    )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SharpwatchError(f"{folder}: has no config.json, so it is not a Hugging Face checkpoint") from error
    except (OSError, ValueError) as error:
        raise SharpwatchError(f"{path}: can't be read: {error}") from error
    if not isinstance(config, dict):
        raise SharpwatchError(f"{path}: is not a JSON object")
    return config


def _check_complete(folder: Path, loading_info: dict[str, Any]) -> None:
    """Refuse missing weights, which transformers would replace by random ones with only a warning."""
    missing = sorted(str(key) for key in loading_info.get("missing_keys") or ())
    if missing:
        named = f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        raise SharpwatchError(f"{folder}: the weight files lack {len(missing)} of the model's parameters: {named}")


# A user's function


def is_factory(text: str) -> bool:
    """Whether `text` has the form `module:function`."""
    return _FACTORY.fullmatch(text) is not None


def call(factory: str) -> Any:
    """Call a user's function without arguments.

    Args:
        factory: `module:function`; modules in the current directory come first.

    Returns:
        What the function returns.

    Raises:
        SharpwatchError: There is no such function, or it failed; the message says in which line.
    """
    function = _find(factory)
    try:
        return function()
    except Exception as error:
        raise SharpwatchError(f"{factory} raised {_describe(error)}") from error


def _find(factory: str) -> Callable[[], Any]:
    name, _, attribute = factory.partition(":")
    here = str(Path.cwd())
    # The installed script has its own folder first in `sys.path`, not the current one as `python -m` has.
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        # The user's module may exist and import another that does not; the error must name the right one.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise SharpwatchError(f"{factory}: importing {name} raised {_describe(error)}") from error
        raise SharpwatchError(f"{factory}: no module {error.name} in {here}, and none is installed") from error
    except Exception as error:
        raise SharpwatchError(f"{factory}: importing {name} raised {_describe(error)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        problem = "is not a function" if hasattr(module, attribute) else "does not exist"
        raise SharpwatchError(f"{factory}: {attribute} {problem}, in {module.__file__}")
    return function  # type: ignore[no-any-return]


def _describe(error: Exception) -> str:
    """The error and the line that raised it, in place of a traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    # A single frame is the call in this file, which tells the user nothing.
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {error}{where}"
