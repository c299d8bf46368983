"""The arguments of a model call as a value, with its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sharpwatch.errors import ProbeError


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The arguments of one forward, `model(*args, **kwargs)`; `loss_fn` and `logits_fn` are called with it.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Number of rows: the first dimension shared by most tensors with two or more dimensions; in a tie the larger.

        So position ids of shape [1, T] or [T] do not hide the batch size.

        Raises:
            ProbeError: There is no tensor with rows.
        """
        tensors = list(self.tensors())
        sizes = Counter(tensor.shape[0] for tensor in tensors if tensor.dim() >= 2)
        sizes = sizes or Counter(tensor.shape[0] for tensor in tensors if tensor.dim() == 1)
        if not sizes:
            raise ProbeError("the model was called without any tensor that has a batch dimension")
        return max(sizes, key=lambda size: (sizes[size], size))

    def slice(self, rows: Tensor) -> Batch:
        """Select rows.

        Every tensor whose first dimension equals `self.rows` is indexed. A one-dimensional tensor with "position" in
        its name runs along the sequence and is kept whole.

        Args:
            rows: Int64 [n], row indices.

        Returns:
            The batch of these rows. All tensors are copies; other values are passed on.
        """
        whole = self.rows

        def cut(tensor: Tensor, name: str) -> Tensor:
            if tensor.dim() == 0 or tensor.shape[0] != whole or (tensor.dim() == 1 and "position" in name):
                return tensor.clone()
            return tensor.index_select(0, rows.to(tensor.device))

        return _transform(self, cut)

    def prepared(self) -> Batch:
        """The same call, prepared for a probe.

        Tensors created in inference mode are copied, since a backward cannot save them. Hugging Face's
        `num_items_in_batch` is removed, since it counts tokens of other rows and ranks.
        """
        kwargs = {name: value for name, value in self.kwargs.items() if name != "num_items_in_batch"}
        return _transform(
            Batch(self.args, kwargs), lambda tensor, _: tensor.clone() if tensor.is_inference() else tensor
        )

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same call with `change` applied to every tensor."""
        return _transform(self, lambda tensor, _: change(tensor))

    def tensors(self) -> Iterator[Tensor]:
        """All tensors among the arguments, including those in dicts, lists and tuples."""
        return _tensors([self.args, dict(self.kwargs)])


def _transform(batch: Batch, change: Callable[[Tensor, str], Tensor]) -> Batch:
    args = tuple(_transform_value(value, "", change) for value in batch.args)
    return Batch(args, {name: _transform_value(value, name, change) for name, value in batch.kwargs.items()})


def _transform_value(value: Any, name: str, change: Callable[[Tensor, str], Tensor]) -> Any:
    """`value` with `change` applied to its tensors, in dicts, lists and tuples; `name` is the nearest key above."""
    match value:
        case Tensor():
            return change(value, name)
        case dict():
            return {key: _transform_value(item, str(key), change) for key, item in value.items()}
        case list():
            return [_transform_value(item, name, change) for item in value]
        case tuple():
            items = [_transform_value(item, name, change) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    match value:
        case Tensor():
            yield value
        case dict():
            for item in value.values():
                yield from _tensors(item)
        case list() | tuple():
            for item in value:
                yield from _tensors(item)
