"""Which slices of a model's parameters are the queries and keys of its attention, head by head.

Only what is certain is used: matrices that the block map knows as `qk`, and a number of heads that the attention module
or its config states and that fits their shapes. All else is left out with a reason.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sharpwatch.blocks.blockmap import BlockMap, Part
from sharpwatch.blocks.module_kinds import is_conv1d
from sharpwatch.blocks.vocabulary import NORM, role, terms

_HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads", "nhead")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "n_head_kv", "num_query_groups")
_WIDTHS = ("head_dim", "head_size", "attention_head_size", "d_head")
_NORMED = {"q", "k", "query", "key", "qk"}
# As in `q, k = norm(q), norm(k)`: a norm without weights is no module. One that is, `self.q_norm(q)`, may be off.
_NORM_CALL = re.compile(
    r"(?<![\w.])(?:(?:F|(?:torch\.)?(?:nn\.)?functional)\.)?\w*norm\w*\(\s*"
    r"(?:q|k|xq|xk|query|key|queries|keys)(?:_\w+)?\b"
)


class _UnknownError(Exception):
    """Why the heads of an attention are not known."""


@dataclass(frozen=True, slots=True)
class Projection:
    """A matrix that computes queries, keys, or each head's queries and then its keys.

    Attributes:
        part: Its part of a parameter.
        is_transposed: Whether the last dimension of the parameter has the outputs, as transformers' Conv1D.
    """

    part: Part
    is_transposed: bool

    def rows(self, weight: Tensor) -> Tensor:
        """Its rows, as a view where that is possible.

        Args:
            weight: The whole parameter.

        Returns:
            [stretches, outputs, inputs].
        """
        view = self.part.view(weight)
        view = view.movedim(0, -1) if self.is_transposed else view
        return view.unsqueeze(0) if view.dim() == 2 else view


@dataclass(frozen=True, slots=True)
class AttentionHeads:
    """The queries and keys of one attention.

    Attributes:
        layer_block: The index of its layer block.
        query: Its queries; with `key` None each stretch has its queries first, then its keys.
        key: Its keys.
        heads: The number of query heads.
        key_heads: The number of key heads; each serves as many consecutive query heads.
        width: Entries of a query or key of one head.
    """

    layer_block: int
    query: Projection
    key: Projection | None
    heads: int
    key_heads: int
    width: int

    def matrices(self, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The queries' matrices [key heads, heads / key heads, width, inputs] and the keys' [key heads, width, inputs].

        Args:
            weights: The parameters by name.
        """
        queries = self.query.rows(weights[self.query.part.parameter])
        if self.key is None:
            count = self.heads * self.width // len(queries)
            queries, keys = queries[:, :count], queries[:, count:]
        else:
            keys = self.key.rows(weights[self.key.part.parameter])
        grouped = queries.reshape(self.key_heads, -1, self.width, queries.shape[-1])
        return grouped, keys.reshape(self.key_heads, self.width, keys.shape[-1])


def find_attention_heads(model: nn.Module, block_map: BlockMap) -> tuple[list[AttentionHeads], dict[int, str]]:
    """Find the queries and keys of all attentions.

    Args:
        model: The model.
        block_map: Its blocks.

    Returns:
        The heads of each attention whose every part is known, and why the others are left out by the index of their
        layer block: a layer block with several attentions is known only if all of them are.
    """
    matrices: dict[int, dict[str, list[Part]]] = {}  # by layer block and name of the attention module
    for part, index in zip(block_map.parts, block_map.layer_block_of, strict=True):
        if part.type == "qk" and (part.adapter or len(block_map.shapes[part.parameter]) > 1):
            place = _attention_of(part.parameter)
            matrices.setdefault(index, {}).setdefault(place, []).append(part)
    found: list[AttentionHeads] = []
    left_out: dict[int, str] = {}
    for index, attentions in matrices.items():
        try:
            found += [_heads(index, model, place, parts, block_map.shapes) for place, parts in attentions.items()]
        except _UnknownError as reason:
            left_out[index] = str(reason)
        except AttributeError as error:  # the model names its parameters otherwise than its modules
            left_out[index] = f"the attention is not found: {error}"
    return [each for each in found if each.layer_block not in left_out], left_out


def why_not_read(parameter: Tensor, shape: tuple[int, ...]) -> str:
    """Why the entries of a parameter can't be read as its matrix here; empty if they can.

    Args:
        parameter: The parameter.
        shape: The shape of the whole parameter.
    """
    if type(parameter).__name__ == "DTensor" or tuple(parameter.shape) != shape:
        return "the weights are sharded, or packed"
    if type(parameter) not in (Tensor, nn.Parameter):
        return f"the weights are kept as {type(parameter).__name__}"
    return "" if parameter.is_floating_point() else "the weights are quantised"


def _attention_of(parameter: str) -> str:
    """The name of the module that holds the projection, or that holds the matrix itself."""
    module, _, leaf = parameter.rpartition(".")
    return module.rpartition(".")[0] if leaf == "weight" else module


def _heads(
    layer_block: int, model: nn.Module, place: str, parts: list[Part], shapes: Mapping[str, tuple[int, ...]]
) -> AttentionHeads:
    if any(part.adapter for part in parts):
        raise _UnknownError("an adapter changes the weights")
    for part in parts:
        if reason := why_not_read(model.get_parameter(part.parameter), shapes[part.parameter]):
            raise _UnknownError(reason)
        if len(shapes[part.parameter]) != 2 or "parametrizations" in part.parameter:
            raise _UnknownError(f"{part.parameter} is no plain matrix")
    query, key = _query_and_key(parts, model)
    attention = model.get_submodule(place)
    if norm := _norm_of_queries(attention):
        raise _UnknownError(f"queries and keys are normalised ({norm}): logits don't depend on the size of the weights")
    return _fitted(layer_block, attention, query, key, shapes)


def _norm_of_queries(attention: nn.Module) -> str:
    """The module that normalises queries or keys, or the code that does; empty if there is none."""
    for name, child in attention.named_children():
        if terms(name) & NORM and terms(name) & _NORMED and not isinstance(child, nn.Identity):
            return name
    try:
        code = inspect.getsource(type(attention).forward)
    except (OSError, TypeError):
        return ""
    call = _NORM_CALL.search(code)
    return f"{call[0]})" if call is not None else ""


def _query_and_key(parts: list[Part], model: nn.Module) -> tuple[Projection, Projection | None]:
    by_role: dict[str | None, list[Projection]] = {}
    for part in parts:
        module, _, leaf = part.parameter.rpartition(".")
        name = module.rpartition(".")[2] if leaf == "weight" else leaf
        projection = Projection(part, is_transposed=leaf == "weight" and is_conv1d(model.get_submodule(module)))
        by_role.setdefault(role(name), []).append(projection)
    kinds = {kind: len(each) for kind, each in by_role.items()}
    fused = next((by_role[kind] for kind in ("fused", "in") if kind in kinds), [])
    if kinds == {"q": 1, "k": 1}:
        return by_role["q"][0], by_role["k"][0]
    if set(kinds) == {"q", "fused"} and len(fused) == kinds["q"] == 1:
        return by_role["q"][0], fused[0]
    if len(kinds) == 1 and fused and len({each.part.parameter for each in fused}) == 1 and len(fused) <= 2:
        # Of two slices of one matrix the first has the queries, as in CodeGen.
        return fused[0], fused[1] if len(fused) == 2 else None
    raise _UnknownError("no single trained matrix of queries with one of keys")


def _fitted(
    layer_block: int,
    attention: nn.Module,
    query: Projection,
    key: Projection | None,
    shapes: Mapping[str, tuple[int, ...]],
) -> AttentionHeads:
    """The heads, if the sizes that the attention states fit the shapes of its matrices."""
    heads = _stated(attention, _HEADS)
    if heads is None:
        raise _UnknownError("the number of heads is not known")
    outputs = _outputs(query, shapes)
    if key is not None:
        width = outputs // heads
        key_heads = _outputs(key, shapes) // width if width else 0
        fits = heads * width == outputs and key_heads * width == _outputs(key, shapes)
    else:
        width = _stated(attention, _WIDTHS) or outputs // (heads + (_stated(attention, _KEY_HEADS) or heads))
        key_heads = outputs // width - heads if width else 0
        fits = (heads + key_heads) * width == outputs
    stretches = max(each.part.repeats for each in (query, key) if each is not None)
    if not fits or key_heads < 1 or heads % key_heads or (key is None and key_heads % stretches):
        raise _UnknownError(f"{heads} heads don't fit the shape of the matrices")
    if key is not None:
        _require_as_stated(attention, width, key_heads)
    return AttentionHeads(layer_block, query, key, heads, key_heads, width)


def _require_as_stated(attention: nn.Module, width: int, key_heads: int) -> None:
    """Raises `_UnknownError` where the attention states other sizes, as of matrices that are one rank's part."""
    # A config's number of key heads may be that of other layers (MiMo-V2), which a module's own width outweighs.
    holders = _holders(attention)[: 1 if _stated_by([attention], _WIDTHS) == width else None]
    for what, found, names in (("entries a head", width, _WIDTHS), ("key heads", key_heads, _KEY_HEADS)):
        stated = _stated_by(holders, names)
        if stated is not None and stated != found:
            raise _UnknownError(f"the matrices have {found} {what}, the attention states {stated}")


def _outputs(projection: Projection, shapes: Mapping[str, tuple[int, ...]]) -> int:
    shape = shapes[projection.part.parameter]
    return projection.part.numel // shape[0 if projection.is_transposed else 1]


def _stated(attention: Any, names: Sequence[str]) -> int | None:
    """The first of `names` that the attention, or its config, has as a positive number."""
    return _stated_by(_holders(attention), names)


def _holders(attention: Any) -> list[Any]:
    return [attention, getattr(attention, "config", None)]


def _stated_by(holders: Iterable[Any], names: Sequence[str]) -> int | None:
    for holder in holders:
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None
