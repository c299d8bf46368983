"""Whether batches fit a model: it is called once, and a vocabulary it does not tell is read off its blocks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.objective.outputs import find_labels
from sharpwatch.curvature.state.isolation import isolated
from sharpwatch.errors import SharpwatchError

_IGNORED = -100  # the only label below 0 that Hugging Face's losses leave out


def check_batches(model: nn.Module, blocks: BlockMap, batches: Sequence[Mapping[str, Any]], source: str) -> None:
    """Raise `SharpwatchError` for the first token id or label that the model has no place for, before it sees it.

    On a GPU an id out of range would end the process' use of the device; on a CPU it would be a bare IndexError.
    """
    known = _size(model, blocks, "emb", nn.Embedding, "num_embeddings")
    answers = _size(model, blocks, "head", nn.Linear, "out_features")
    for index, batch in enumerate(batches):
        where = f"DATA {source}: batch {index}"
        _check_ids(model, batch, known, where)
        _check_labels(model, batch, answers, where)
    _call(model, batches[0], f"DATA {source}: batch 0")


def _call(model: nn.Module, batch: Mapping[str, Any], where: str) -> None:
    """Raise `SharpwatchError` where the model does not take the batch: what it raises is its own affair."""
    try:
        with isolated(model) as live, torch.no_grad():
            live(**batch)
    except Exception as error:
        raise SharpwatchError(f"{where}: the model can't be called with it: {type(error).__name__}: {error}") from error


def _size(model: nn.Module, blocks: BlockMap, block: str, kind: type[nn.Module], size: str) -> int | None:
    """What the one module of `kind` in `block` says of its `size`; None where there is not one alone."""
    names = dict.fromkeys(part.parameter.rpartition(".")[0] for part in blocks.parts if part.type == block)
    sizes = {getattr(module, size) for name in names if isinstance(module := model.get_submodule(name), kind)}
    return sizes.pop() if len(sizes) == 1 else None


def _check_ids(model: nn.Module, batch: Mapping[str, Any], known: int | None, where: str) -> None:
    name = next((name for name in inspect.signature(model.forward).parameters if name in batch), None)
    ids = None if name is None else batch[name]
    if known is None or not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool:
        return
    wrong = ids[(ids < 0) | (ids >= known)]
    if wrong.numel():
        raise SharpwatchError(f"{where}: {name}: token {int(wrong[0])} is outside the model's vocabulary of {known}")


def _check_labels(model: nn.Module, batch: Mapping[str, Any], answers: int | None, where: str) -> None:
    labels = find_labels(model, Batch(kwargs=batch))
    if labels is None:
        return
    below = labels.values[labels.values < 0]
    if "labels" in batch and (below != _IGNORED).any():
        wrong = int(below[below != _IGNORED][0])
        raise SharpwatchError(f"{where}: label {wrong}: below 0 only {_IGNORED}, which is ignored, is allowed")
    largest = int(labels.values.max())
    # A head that is tied, or has layers of its own, has a size that says nothing of the labels.
    if answers is not None and not hasattr(model, "config") and largest >= answers:
        raise SharpwatchError(f"{where}: label {largest} is outside the {answers} that the model has logits for")
