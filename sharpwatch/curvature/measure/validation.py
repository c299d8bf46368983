"""Checks of the arguments of `measure`, made before anything runs."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.estimators.preconditioned import preconditioner, require_adam
from sharpwatch.curvature.objective.batch import IGNORED_LABEL, Batch, LogitsFn, count_tokens, find_labels
from sharpwatch.curvature.objective.hessian import METHODS, Method
from sharpwatch.curvature.parameters.parameter_space import require_real
from sharpwatch.curvature.parameters.shards import is_dtensor
from sharpwatch.curvature.state.isolation import isolated
from sharpwatch.errors import EmptyBatchError, ProbeError

ESTIMATOR_NAMES = ("gnb", "hutchinson", "lanczos", "spectrum", "direction", "linesearch", "preconditioned")
_OPTIMIZER_ESTIMATORS = {"direction", "linesearch", "preconditioned"}


def check_model(given: nn.Module) -> None:
    """Check that the model is a module with parameters that have values, and that some require a gradient."""
    if not isinstance(given, nn.Module):
        raise ProbeError(f"model must be a torch.nn.Module, got {type(given).__name__}")
    parameters = dict(given.named_parameters())
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ProbeError("model must have a parameter that requires a gradient")
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise ProbeError(f"model: {name} is on the meta device, so it has no values")
        if is_dtensor(parameter):
            # Draws would be zero without a word: its gradients do not come to the stand-ins that draws are taken on.
            raise ProbeError(
                f"model: {name} is a DTensor; `measure` needs whole parameters. Load the gathered state into a model "
                "that is not sharded (torch.distributed.checkpoint.state_dict, full_state_dict=True); `attach` "
                "measures sharded models while they train"
            )
    require_real(given)


def check_estimators(estimators: Sequence[str]) -> None:
    """Check the names of the estimators."""
    if not _are_names_of(estimators, ESTIMATOR_NAMES) or len(set(estimators)) < len(estimators):
        raise ProbeError(
            f"estimators must be one or more of {', '.join(ESTIMATOR_NAMES)}, each at most once, got {estimators!r}"
        )


def check_method(name: str) -> Method:
    """Check how derivatives are to be computed."""
    for known in METHODS:
        if known == name:
            return known
    raise ProbeError(f"method must be one of {', '.join(map(repr, METHODS))}, got {name!r}")


def check_numbers(draws: int, seed: int, precision: float | None, max_draws: int) -> None:
    """Check the numeric arguments."""
    if not (_is_integer(draws) and draws >= 2):
        raise ProbeError(f"draws must be an integer of at least 2 (a standard error needs two draws), got {draws!r}")
    if not (_is_integer(seed) and 0 <= seed < 2**63):
        raise ProbeError(f"seed must be an integer with 0 <= seed < 2**63, got {seed!r}")
    if precision is not None and not (isinstance(precision, float) and 0 < precision < 1):
        raise ProbeError(
            f"precision must be a float with 0 < precision < 1, a relative standard error, got {precision!r}"
        )
    if not (_is_integer(max_draws) and max_draws >= 2):
        raise ProbeError(f"max_draws must be an integer of at least 2, got {max_draws!r}")


def check_optimizers(
    given: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
    estimators: Sequence[str],
) -> tuple[torch.optim.Optimizer, ...]:
    """Check that optimizers are given if an estimator needs them, and that they fit.

    Returns:
        The optimizers as a tuple.
    """
    several = _as_tuple(optimizer)
    asked = sorted(_OPTIMIZER_ESTIMATORS & set(estimators))
    if asked and not several:
        raise ProbeError(f"optimizer must be given for the estimators {', '.join(asked)}")
    if "preconditioned" in asked:
        # Computed and dropped: whether there is a second moment must be known before the first probe.
        require_adam(several)
        preconditioner(given, several)
    return several


def _as_tuple(optimizer: Any) -> tuple[torch.optim.Optimizer, ...]:
    """The optimizers that were given: one, several or none."""
    one = isinstance(optimizer, torch.optim.Optimizer | str) or not isinstance(optimizer, Iterable)
    several = () if optimizer is None else (optimizer,) if one else tuple(optimizer)
    for each in several:
        if not isinstance(each, torch.optim.Optimizer):
            raise ProbeError(f"optimizer must be one torch.optim.Optimizer, several or None, got {type(each).__name__}")
    return several


def check_batches(given: nn.Module, several: Sequence[Mapping[str, Any]], logits_fn: LogitsFn | None) -> list[int]:
    """Check each batch.

    Returns:
        Number of predicting positions of each batch.
    """
    if not isinstance(several, Sequence) or not several:
        raise ProbeError("batches must be a non-empty list of dicts with the model's arguments")
    return [_check_batch(given, f"batches[{index}]", batch, logits_fn) for index, batch in enumerate(several)]


def check_blocks(names: Sequence[str] | None, block_map: BlockMap) -> tuple[str, ...]:
    """Check the names of the blocks.

    Returns:
        The blocks to measure, in the order of the block map.
    """
    if names is None:
        return block_map.blocks
    if not _are_names_of(names, block_map.blocks):
        raise ProbeError(f"blocks must be among those that are trained, {', '.join(block_map.blocks)}, got {names!r}")
    return tuple(block for block in block_map.blocks if block in names)


def _check_batch(given: nn.Module, where: str, values: Mapping[str, Any], logits_fn: LogitsFn | None) -> int:
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise ProbeError(f"{where} must be a dict with the model's arguments by name, got {_described(values)}")
    batch = Batch((), dict(values))
    tensors = batch.tensors()
    if not tensors or any(tensor.numel() == 0 for tensor in tensors):
        raise ProbeError(f"{where} is empty")
    _check_vocabulary(given, where, batch)
    # A user's `logits_fn` shows the positions only in a forward, and none may run yet: rows stand for them.
    if logits_fn is not None:
        return batch.rows
    labels = find_labels(given, batch)
    # In floating point they are targets of a regression.
    classes = labels is not None and not labels.values.is_floating_point()
    if labels is not None and classes and bool((labels.values < 0).all()):
        raise ProbeError(f"{where}: every label is ignored, so no position predicts")
    try:
        return count_tokens(given, batch)
    except EmptyBatchError:  # the labels may not be shifted after all
        return batch.rows


def _check_vocabulary(given: nn.Module, where: str, batch: Batch) -> None:
    table = find_input_embedding(given)
    ids = batch.kwargs.get("input_ids")
    if table is not None and isinstance(ids, Tensor) and not ids.is_floating_point():
        _check_ids(f"{where}.input_ids", ids, table.num_embeddings)
    labels = find_labels(given, batch)
    classes = getattr(getattr(given, "config", None), "vocab_size", None)
    # Labels of one dimension are classes of rows, and no tokens.
    if labels is not None and isinstance(classes, int) and labels.values.dim() > 1:
        # A head may be padded to more outputs than the configuration's vocabulary.
        _check_ids(f"{where}.labels", labels.values[labels.values >= 0], max(classes, _head_outputs(given)))


def _check_ids(where: str, ids: Tensor, size: int) -> None:
    if ids.numel() and not 0 <= (outside := int(ids.max() if ids.min() >= 0 else ids.min())) < size:
        raise ProbeError(f"{where}: token {outside} is outside the model's vocabulary of {size}")


def find_input_embedding(given: nn.Module) -> nn.Embedding | None:
    """The embedding that `get_input_embeddings()` returns; None if it is no plain one, or there is no such method."""
    find = getattr(given, "get_input_embeddings", None)
    try:
        table = find() if callable(find) else None
    except (NotImplementedError, AttributeError):
        return None
    return table if isinstance(table, nn.Embedding) else None


def _head_outputs(given: nn.Module) -> int:
    find = getattr(given, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return head.out_features if isinstance(head, nn.Linear) else 0


def _described(values: object) -> str:
    return f"one with the keys {', '.join(map(repr, values))}" if isinstance(values, Mapping) else type(values).__name__


def check_functions(**given: object) -> None:
    """Check that each of the arguments `given` is a function or None."""
    for name, value in given.items():
        if value is not None and not callable(value):
            raise ProbeError(f"{name} must be a callable or None, got {type(value).__name__}")


def _are_names_of(names: object, known: Collection[str]) -> bool:
    """Whether `names` lists one or more of `known`."""
    if not isinstance(names, Collection) or isinstance(names, str) or len(names) == 0:
        return False
    return all(isinstance(name, str) and name in known for name in names)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_values(given: nn.Module, block_map: BlockMap, several: Sequence[Mapping[str, Any]], source: str) -> None:
    """Check that a model takes batches whose origin is unknown, before it is measured on them.

    A token id out of range would make the device unusable on a GPU, and raise a bare IndexError on a CPU. Sizes that
    the model does not state are read from its blocks. Labels follow Hugging Face's losses, which ignore only -100.

    Args:
        given: The model.
        block_map: Its blocks.
        several: The batches.
        source: Where the batches are from, the beginning of the error message.

    Raises:
        ProbeError: A token id or a label is out of range, or a call with the first batch fails.
    """
    tokens = _size(given, block_map, "emb", nn.Embedding, "num_embeddings")
    classes = _size(given, block_map, "head", nn.Linear, "out_features")
    for index, batch in enumerate(several):
        where = f"{source}: batch {index}"
        _check_tokens(given, batch, tokens, where)
        _check_labels(given, batch, classes, where)
    _check_call(given, several[0], f"{source}: batch 0")


def _check_call(given: nn.Module, batch: Mapping[str, Any], where: str) -> None:
    try:
        with isolated(given) as live, torch.no_grad():
            live(**batch)
    except Exception as error:  # whatever the model raises
        raise ProbeError(f"{where}: the model can't be called with it: {type(error).__name__}: {error}") from error


def _size(given: nn.Module, block_map: BlockMap, block: str, kind: type[nn.Module], size: str) -> int | None:
    """The `size` of the only module of `kind` in `block`; None unless there is exactly one size."""
    names = dict.fromkeys(part.parameter.rpartition(".")[0] for part in block_map.parts if part.type == block)
    sizes = {getattr(module, size) for name in names if isinstance(module := given.get_submodule(name), kind)}
    # With several sizes, such as of tokens and of positions, it is not known which one the ids are held against.
    return sizes.pop() if len(sizes) == 1 else None


def _check_tokens(given: nn.Module, batch: Mapping[str, Any], size: int | None, where: str) -> None:
    name = next((name for name in inspect.signature(given.forward).parameters if name in batch), None)
    ids = None if name is None else batch[name]
    if size is not None and isinstance(ids, Tensor) and not ids.is_floating_point() and ids.dtype != torch.bool:
        _check_ids(f"{where}: {name}", ids, size)


def _check_labels(given: nn.Module, batch: Mapping[str, Any], classes: int | None, where: str) -> None:
    labels = find_labels(given, Batch(kwargs=batch))
    if labels is None or labels.values.is_floating_point():
        return
    below = labels.values[labels.values < 0]
    if "labels" in batch and (below != IGNORED_LABEL).any():
        wrong = int(below[below != IGNORED_LABEL][0])
        raise ProbeError(f"{where}: label {wrong}: a label below 0 must be {IGNORED_LABEL}, which is ignored")
    largest = int(labels.values.max())
    # The size of a head that is tied, or has layers of its own, says nothing about the labels.
    if classes is not None and not hasattr(given, "config") and largest >= classes:
        raise ProbeError(f"{where}: label {largest} is outside the {classes} that the model has logits for")


def fingerprint(given: nn.Module, block_map: BlockMap, batches: Sequence[Batch]) -> dict[str, str]:
    """Hashes by which a saved state's blocks, weights and batches are known again."""
    shapes = hashlib.sha256(repr(block_map.parts).encode())
    weights, values = hashlib.sha256(), hashlib.sha256()
    for parameter in given.parameters():
        # The head of each parameter tells one training state from another, without a copy of all weights.
        weights.update(_tensor_bytes(parameter.detach().reshape(-1)[:1024]))
    for batch in batches:
        for tensor in batch.tensors():
            values.update(_tensor_bytes(tensor))
    hashes = {"block map": shapes, "weights": weights, "batches": values}
    return {name: each.hexdigest()[:16] for name, each in hashes.items()}


def _tensor_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
