"""What a model was called with, as a value: its rows, and a part of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sharpwatch.errors import ProbeError


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The arguments of one forward, `model(*args, **kwargs)`; this is what `loss_fn` and `logits_fn` are handed."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """The leading dimension that most tensors of two or more dimensions share, the larger where two are tied.

        So position ids of shape [1, T] or [T] don't hide the batch. Raises `ProbeError` where there is no tensor.
        """
        tensors = list(self.tensors())
        sizes = Counter(tensor.shape[0] for tensor in tensors if tensor.dim() >= 2)
        sizes = sizes or Counter(tensor.shape[0] for tensor in tensors if tensor.dim() == 1)
        if not sizes:
            raise ProbeError("the model was called without a tensor that has rows")
        return max(sizes, key=lambda size: (sizes[size], size))

    def slice(self, rows: Tensor) -> Batch:
        """The batch of `rows` (int64 [n]): every tensor whose first dimension is `self.rows` is cut.

        A one-dimensional tensor passed by a name with "position" in it goes along the sequence and is left whole. All
        tensors are copies, what is no tensor passes.
        """
        whole = self.rows

        def cut(tensor: Tensor, name: str) -> Tensor:
            if tensor.dim() == 0 or tensor.shape[0] != whole or (tensor.dim() == 1 and "position" in name):
                return tensor.clone()
            return tensor.index_select(0, rows.to(tensor.device))

        return _transform(self, cut)

    def prepared(self) -> Batch:
        """The same call, fit for a probe.

        Tensors made in inference mode are copied, for they can't be saved for a backward, and Hugging Face's
        `num_items_in_batch`, which counts tokens of other rows and ranks too, is left out.
        """
        kwargs = {name: value for name, value in self.kwargs.items() if name != "num_items_in_batch"}
        return _transform(
            Batch(self.args, kwargs), lambda tensor, _: tensor.clone() if tensor.is_inference() else tensor
        )

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same call with `change` made to every tensor."""
        return _transform(self, lambda tensor, _: change(tensor))

    def tensors(self) -> Iterator[Tensor]:
        """All tensors among the arguments, through dicts, lists and tuples."""
        return _tensors([self.args, dict(self.kwargs)])


def _transform(batch: Batch, change: Callable[[Tensor, str], Tensor]) -> Batch:
    args = tuple(_transform_value(value, "", change) for value in batch.args)
    return Batch(args, {name: _transform_value(value, name, change) for name, value in batch.kwargs.items()})


def _transform_value(value: Any, name: str, change: Callable[[Tensor, str], Tensor]) -> Any:
    """`value` with its tensors changed, through dicts, lists and tuples; `name` is the nearest key above."""
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
