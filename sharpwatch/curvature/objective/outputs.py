"""What a model returns: its loss, the outputs that a loss may be taken of, and the classes where no loss is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from sharpwatch.curvature.objective.nested import tensors_by_path
from sharpwatch.errors import ObjectiveError, ProbeError

if TYPE_CHECKING:
    from sharpwatch.curvature.objective.batch import Batch


def named_outputs(output: Any) -> dict[str, Tensor]:
    """Find the outputs that a loss is most often taken of.

    Args:
        output: What the model returned.

    Returns:
        Its floating-point tensors by name, in order; only those named "logits" or "…_logits" if there are any.
    """
    found = {
        name: value
        for name, value in items(output)
        if isinstance(value, Tensor) and _may_have_loss(value) and value.dim() >= 1 and name != "loss"
    }
    logits = {name: value for name, value in found.items() if name.endswith("logits")}
    return logits or found


def all_outputs(output: Any) -> dict[str, Tensor]:
    """Find all outputs that a loss may be of.

    Args:
        output: What the model returned.

    Returns:
        `named_outputs` first, then its other floating-point tensors: numbers too, and what nested values hold, by path.
    """
    found = {path: value for name, one in items(output) for value, path in tensors_by_path(one, name)}
    floating = {path: value for path, value in found.items() if _may_have_loss(value) and path != "loss"}
    return named_outputs(output) | floating


def find_loss(output: Any) -> tuple[Any, bool]:
    """Find what stands in the place of a loss in a model's output.

    Args:
        output: What the model returned.

    Returns:
        The value, None if there is none; whether the model calls it so. A number in a tuple may be another one.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is not None:
        return loss, True
    # The first scalar: nanoGPT returns (logits, loss), Hugging Face (loss, logits).
    if isinstance(output, tuple | list):
        loss = next((item for item in output if isinstance(item, Tensor) and item.dim() == 0), None)
    if isinstance(output, Tensor) and output.dim() == 0:  # [1] is the output of one row
        loss = output
    return loss, False


def loss_in(output: Any) -> Tensor | None:
    """Find the loss in a model's output.

    Args:
        output: What the model returned.

    Returns:
        A scalar with its graph, or None.

    Raises:
        ProbeError: What stands in its place is no scalar that depends on the weights.
    """
    loss, _ = find_loss(output)
    return None if loss is None else require_scalar(loss, "the model's output")


def find_logits(output: Any) -> Tensor:
    """Find the logits in a model's output.

    Args:
        output: An object with `.logits`, a mapping with "logits", a tuple (its first float tensor with 3 or more
            dimensions counts), or the logits themselves.

    Returns:
        The logits [..., V].

    Raises:
        ProbeError: There are none; the message describes the output.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if logits is None and isinstance(output, tuple | list):
        logits = next((item for item in output if _is_logits(item, dimensions=3)), None)
    if logits is None and _is_logits(output, dimensions=2):
        logits = output
    if not isinstance(logits, Tensor):
        raise ProbeError(f"found no logits in the model's output, {_describe(output)}; pass logits_fn")
    return logits


def assumed_classes(logits: Tensor, batch: Batch) -> int:
    """The dimension that holds the classes, by shapes alone: used where no loss is known.

    Args:
        logits: The model's output.
        batch: The arguments of the call.

    Returns:
        -1 or 1.

    Raises:
        ObjectiveError: The output looks like no logits, or its shape leaves the classes open.
    """
    shape = tuple(logits.shape)
    hint = "its loss is not known: pass loss_fn, or logits_fn"
    for tensor in batch.tensors():
        if tensor.is_floating_point() and tensor.dim() > 1 and tensor.shape == logits.shape:
            raise ObjectiveError(f"the output {shape} has the shape of an argument, as an image has, and {hint}")
    if logits.dim() < 2 or logits.shape[-1] < 2:
        raise ObjectiveError(f"the output {shape} has one number for each row, as a regression has, and {hint}")
    if logits.dim() == 2:
        return -1
    leading = {tuple(tensor.shape[:2]) for tensor in batch.tensors() if tensor.dim() > 1}
    around = {tuple(tensor.shape) for tensor in batch.tensors() if not tensor.is_floating_point()}
    if logits.dim() == 3 and (not leading or shape[:2] in leading):
        return -1
    if (shape[0], *shape[2:]) in around:
        return 1
    raise ObjectiveError(f"which dimension of the output {shape} holds the classes can't be told, and {hint}")


def items(output: Any) -> Iterator[tuple[str, Any]]:
    """What a model returned, by name."""
    match output:
        case Tensor():
            yield "output", output
        case Mapping():
            yield from ((str(name), value) for name, value in output.items())
        case tuple() | list():
            names = getattr(output, "_fields", None) or [f"output[{index}]" for index in range(len(output))]
            yield from zip(names, output, strict=True)
        case _:
            yield from vars(output).items() if hasattr(output, "__dict__") else ()


def require_scalar(loss: Any, source: str) -> Tensor:
    """`loss` as a scalar; raises `ProbeError`, which names its `source`, if it is none that depends on the weights."""
    depends = isinstance(loss, Tensor) and (loss.requires_grad or not torch.is_grad_enabled())
    if not depends or loss.numel() != 1:
        raise ProbeError(f"{source} must give a scalar loss that depends on the weights, got {_describe(loss)}")
    return cast("Tensor", loss).reshape(())


def _may_have_loss(value: Tensor) -> bool:
    return value.is_floating_point() and value.layout == torch.strided and not value.is_nested


def _is_logits(value: Any, dimensions: int) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= dimensions


def _describe(value: Any) -> str:
    match value:
        case Tensor():
            return f"a {str(value.dtype).removeprefix('torch.')} tensor {tuple(value.shape)}"
        case Mapping():
            return f"a mapping of {', '.join(map(str, value)) or 'nothing'}"
        case tuple() | list():
            return f"a {type(value).__name__} of ({', '.join(map(_describe, value))})"
    return f"a {type(value).__name__}"
