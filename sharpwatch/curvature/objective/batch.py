"""A batch: the arguments of a model call, its labels, logits and predicting positions, and its training loss."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from sharpwatch.common.rng_state import rng_state_restored
from sharpwatch.curvature.objective.nested import map_tensors, named_tensors
from sharpwatch.curvature.objective.outputs import find_logits, loss_in, require_scalar
from sharpwatch.errors import EmptyBatchError, ObjectiveError, ProbeError

IGNORED_LABEL = -100  # Hugging Face's label of an ignored position
_TARGETS = ("targets", "target", "y")
# Hugging Face heads whose labels are at the position that predicts them; all others predict the next token.
_ALIGNED_HEADS = ("ForMaskedLM", "ForTokenClassification", "ForSequenceClassification", "ForPreTraining")


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The arguments of one forward, `model(*args, **kwargs)`, or a batch as the training loop holds it.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        observed: The one argument is a batch of the loop's, from `watch.observe(batch=...)`, for `loss_fn` and
            `logits_fn` alone: only they know how to call the model on it.
        axes: For each tensor, in the order of `tensors()`, the dimension that runs over the rows; None for one that has
            no rows. By default rows are the first dimension of every tensor that has `rows` entries there.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    observed: bool = False
    axes: tuple[int | None, ...] | None = None

    @property
    def passed(self) -> Any:
        """What `loss_fn` and `logits_fn` are called with: the batch that the loop observed, or else this call."""
        return self.args[0] if self.observed else self

    @property
    def rows(self) -> int:
        """Number of rows.

        Without `axes`, it is the first dimension shared by most tensors with two or more dimensions; in a tie the
        larger. So position ids of shape [1, T] or [T] do not hide the batch size.

        Raises:
            ProbeError: There is no tensor with rows.
        """
        tensors = self.tensors()
        if self.axes is not None:
            return next(t.shape[axis] for t, axis in zip(tensors, self.axes, strict=True) if axis is not None)
        sizes = Counter(tensor.shape[0] for tensor in tensors if tensor.dim() >= 2)
        sizes = sizes or Counter(tensor.shape[0] for tensor in tensors if tensor.dim() == 1)
        if not sizes:
            source = "the batch given to observe() has no" if self.observed else "the model was called without any"
            raise ProbeError(f"{source} tensor that has a batch dimension")
        return max(sizes, key=lambda size: (sizes[size], size))

    def slice(self, rows: Tensor) -> Batch:
        """Select rows.

        Every tensor is indexed along its dimension of `axes`. Without these, those whose first dimension equals
        `self.rows` are; a one-dimensional tensor with "position" in its name runs along the sequence and is kept whole.

        Args:
            rows: Int64 [n], row indices.

        Returns:
            The batch of these rows. All tensors are copies; other values are passed on.
        """
        whole, axes = self.rows, None if self.axes is None else iter(self.axes)

        def cut(tensor: Tensor, name: str) -> Tensor:
            axis = row_axis(tensor, name, whole, 0) if axes is None else next(axes)
            return tensor.clone() if axis is None else tensor.index_select(axis, rows.to(tensor.device))

        return _transform(self, cut)

    def named_tensors(self) -> list[tuple[Tensor, str]]:
        """All tensors with the nearest name above each."""
        return list(named_tensors((self.args, self.kwargs)))

    def prepared(self) -> Batch:
        """The same call, prepared for a probe.

        Tensors created in inference mode are copied, since a backward cannot save them. Hugging Face's
        `num_items_in_batch` is removed, since it counts tokens of other rows and ranks.
        """
        kwargs = {name: value for name, value in self.kwargs.items() if name != "num_items_in_batch"}
        return _transform(
            replace(self, kwargs=kwargs), lambda tensor, _: tensor.clone() if tensor.is_inference() else tensor
        )

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same call with `change` applied to every tensor."""
        return _transform(self, lambda tensor, _: change(tensor))

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, including those in mappings, lists, tuples and dataclasses."""
        return [tensor for tensor, _ in self.named_tensors()]


def row_axis(tensor: Tensor, name: str, rows: int, axis: int) -> int | None:
    """The dimension of a tensor that runs over `rows` rows: `axis`, or 0 of a one-dimensional one; None for none."""
    if tensor.dim() == 1:
        # Of `position_ids`; a question's answer in each row has `start_positions`.
        along_sequence = "position" in name and not name.startswith(("start_", "end_"))
        return 0 if tensor.shape[0] == rows and not along_sequence else None
    return axis if tensor.dim() > axis and tensor.shape[axis] == rows else None


# Both are called as f(model, batch.passed).
LossFn = Callable[[Any, Any], Tensor]  # -> scalar
# -> logits [..., V], bool [...]: True where a position predicts
LogitsFn = Callable[[Any, Any], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """Labels of a batch, [rows, positions].

    Attributes:
        values: The labels; negative ones are ignored, except in floating point, where they are targets of a regression.
        shifted: The label of position t is at t + 1, so the last position predicts nothing.
    """

    values: Tensor
    shifted: bool

    def aligned(self) -> Tensor:
        """Labels at the positions that predict them; -100 at positions that predict nothing."""
        if self.values.is_floating_point():
            return self.values
        values = self.values.masked_fill(self.values < 0, IGNORED_LABEL)
        return F.pad(values[:, 1:], (0, 1), value=IGNORED_LABEL) if self.shifted else values


def find_labels(model: nn.Module, batch: Batch) -> Labels | None:
    """Find the labels among the arguments of `model.forward`, by name, whether passed by position or by keyword.

    `labels` follow Hugging Face: shifted for a causal language model; aligned for an encoder-decoder, a masked language
    model or a classifier. `targets`, `target` and `y` are aligned, as in nanoGPT.

    Args:
        model: The model, or the module inside its wrappers.
        batch: The arguments.

    Returns:
        The labels, or None; for a batch that the loop observed always None.
    """
    if batch.observed:
        return None
    arguments = named_arguments(model, batch)
    labels = arguments.get("labels")
    if isinstance(labels, Tensor):
        aligned = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        # One label for a row is a classifier's; there is no next token to shift to.
        aligned = aligned or labels.dim() < 2 or type(model).__name__.endswith(_ALIGNED_HEADS)
        return Labels(labels, shifted=not aligned)
    return next(
        (Labels(arguments[name], shifted=False) for name in _TARGETS if isinstance(arguments.get(name), Tensor)), None
    )


def predict(
    call: Callable[..., Any],
    model: nn.Module,
    batch: Batch,
    logits_fn: LogitsFn | None,
    loss_fn: LossFn | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the logits of a batch.

    A Hugging Face causal model is called without its labels: the logits are the same, and its loss would only take
    memory.

    Args:
        call: Called in place of `model`.
        model: The model, for its signature and configuration.
        batch: The arguments.
        logits_fn: Computes both results; None to find the logits in the output, and the mask from the labels.
        loss_fn: Calls the model on a batch that the loop observed, where there is no `logits_fn`.

    Returns:
        Logits [..., V], and a bool mask [...] of the positions that predict; without labels, all do.

    Raises:
        ProbeError: The output has no logits, or they do not match the labels.
    """
    if logits_fn is not None:
        logits, mask = logits_fn(call, batch.passed)
    elif batch.observed:
        logits = find_logits(call_loss_fn(call, model, batch, loss_fn).output)
        mask = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    else:
        labels = find_labels(model, batch)
        logits = find_logits(call(*batch.args, **_without_labels(model, batch, labels)))
        mask = (
            torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
            if labels is None
            else labels.aligned() != IGNORED_LABEL
        )
    if mask.shape != logits.shape[:-1]:
        shapes = f"logits {tuple(logits.shape)}, mask or labels {tuple(mask.shape)}"
        raise ProbeError(f"{shapes}: expected one label for each position; pass logits_fn")
    return logits, mask.to(logits.device, torch.bool)


def training_loss(call: Callable[..., Any], model: nn.Module, batch: Batch, loss_fn: LossFn | None) -> Tensor:
    """Compute the loss that the run trains on, with the true labels.

    Args:
        call: Called in place of `model`.
        model: The model, for its signature and configuration.
        batch: The arguments.
        loss_fn: Computes the loss; None to take the loss in the model's output, or else the cross-entropy of its
            labels.

    Returns:
        A scalar with its graph.

    Raises:
        ProbeError: There is neither a loss nor labels.
    """
    if loss_fn is not None:
        return require_scalar(loss_fn(call, batch.passed), "loss_fn")
    output = call(*batch.args, **batch.kwargs)
    loss = loss_in(output)
    if loss is not None:
        return loss
    labels = find_labels(model, batch)
    if labels is None:
        raise ProbeError(
            "the model was called without labels and returns no loss: pass loss_fn, which all that differentiates the "
            "training loss needs then (not gnb, nor gradient_noise)"
        )
    # In float32: the mean over thousands of positions would have two digits in half precision.
    logits = find_logits(output)
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.aligned().flatten(), ignore_index=IGNORED_LABEL)


@dataclass(frozen=True, slots=True, eq=False)
class LossCall:
    """One call of a `loss_fn`, and the call of the model within it.

    Attributes:
        loss: The loss, a scalar with its graph.
        arguments: What the model was called with; the labels may be among it.
        output: What the model returned, with its graph.
    """

    loss: Tensor
    arguments: Batch
    output: Any


def call_loss_fn(call: Callable[..., Any], model: nn.Module, batch: Batch, loss_fn: LossFn | None) -> LossCall:
    """Compute the loss of a batch by `loss_fn`, and record how it calls the model.

    Args:
        call: Called in place of `model`.
        model: The module that runs when `call` is called.
        batch: The batch.
        loss_fn: The function.

    Returns:
        The loss, and the call of the model.

    Raises:
        ProbeError: There is no `loss_fn`, or it calls the model more than once or not at all.
    """
    if loss_fn is None:
        raise ProbeError("a batch given to observe() needs attach(loss_fn=...)")
    calls: list[tuple[Batch, Any]] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append((Batch(args, kwargs), output))

    # By a hook rather than around `call`: a loss_fn may call the model that it closes over.
    handle = model.register_forward_hook(record, with_kwargs=True)
    try:
        with rng_state_restored(model, loss_fn):
            loss = require_scalar(loss_fn(call, batch.passed), "loss_fn")
    finally:
        handle.remove()
    if len(calls) != 1:
        raise ObjectiveError(f"loss_fn must call the model once for its logits, got {len(calls)} calls; pass logits_fn")
    return LossCall(loss, *calls[0])


def count_tokens(model: nn.Module, batch: Batch) -> int:
    """Count the predicting positions by the labels; without labels, the positions of the first tensor with rows.

    Of a batch that the loop observed, the rows count.

    Raises:
        EmptyBatchError: Every label is ignored.
    """
    labels = find_labels(model, batch)
    if labels is not None:
        # A regression has no ignored labels.
        floating = labels.values.is_floating_point()
        return labels.values.numel() if floating else count_predicting(labels.aligned() != IGNORED_LABEL)
    if batch.observed:
        return batch.rows
    first = next((tensor for tensor in batch.tensors() if tensor.dim() >= 2), None)
    if first is None:
        return batch.rows
    # A float tensor [..., width] has a vector for each position, token ids have a number.
    return math.prod(first.shape[:-1]) if first.is_floating_point() else first.numel()


def count_predicting(mask: Tensor) -> int:
    """Number of positions in `mask` that predict; raises `EmptyBatchError` for none."""
    tokens = int(mask.sum())
    if tokens == 0:
        raise EmptyBatchError("every label of these rows is ignored: no position predicts")
    return tokens


def named_arguments(model: nn.Module, batch: Batch) -> Mapping[str, Any]:
    """The arguments by their names in the signature of `model.forward`."""
    try:
        bound = inspect.signature(model.forward).bind_partial(*batch.args, **batch.kwargs)
    except TypeError:  # forward does not accept this call: a pre-hook may change its arguments
        return batch.kwargs
    return {**batch.kwargs, **bound.arguments}


def _without_labels(model: nn.Module, batch: Batch, labels: Labels | None) -> Mapping[str, Any]:
    if labels is None or not labels.shifted or not hasattr(model, "config"):
        return batch.kwargs
    return {name: value for name, value in batch.kwargs.items() if name != "labels"}


def _transform(batch: Batch, change: Callable[[Tensor, str], Tensor]) -> Batch:
    args, kwargs = map_tensors((batch.args, batch.kwargs), change)
    return replace(batch, args=args, kwargs=kwargs)
