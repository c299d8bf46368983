"""The block of each parameter in known transformers, from the module tree, module types and names."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from torch import nn

from sharpwatch.blocks import fused
from sharpwatch.blocks.rules import Split
from sharpwatch.blocks.structure import (
    Occurrence,
    Tree,
    holds_qkv,
    is_attention,
    is_conv1d,
    is_convolution,
    is_embedding,
    is_feed_forward,
    is_linear,
    is_mixer,
    module_terms,
    roles,
)
from sharpwatch.blocks.vocabulary import (
    ATTENTION_LINEAR,
    BY_CLASS,
    CONNECTOR,
    CONVOLUTION,
    FEED_FORWARD_LINEAR,
    HEAD,
    HEAD_PART,
    KIND,
    LOOSE,
    MIXER,
    NORM,
    POSITION,
    ROUTER,
    TOKEN,
    TOWER,
    is_plain,
    role,
    terms,
    words,
)
from sharpwatch.errors import BlockError

Placement = str | Split

_BLOCK_OF_ROLE = {"k": "qk", "qk": "qk", "v": "vo", "o": "vo", "gate": "other"}


def classify_parameter(tree: Tree, name: str) -> Placement:
    """Find the block of a parameter.

    A parameter shared between modules counts as an embedding if one of them is: a tied head is the embedding.

    Args:
        tree: The model.
        name: Name of the parameter.

    Returns:
        A block type, or how the parameter is split.

    Raises:
        BlockError: The block is not known.
    """
    occurrences = tree.occurrences[id(tree.parameters[name])]
    for candidate in sorted(occurrences, key=lambda at: (not is_embedding(at.owner), not is_linear(at.owner))):
        placement = _classify_at(tree, candidate)
        if placement is not None:
            return placement
    raise _unplaced_error(name, tree.shapes[name], occurrences[0].owner)


def _classify_at(tree: Tree, at: Occurrence) -> Placement | None:
    if at.leaf == "_flat_param":  # FSDP1 joins parameters of several blocks in it
        return "other"
    if is_embedding(at.owner):
        return _embedding(at)
    if _is_norm(at):
        return "norm"
    known = BY_CLASS.get((type(at.enclosing[-1][1]).__name__, at.name)) if at.enclosing else None
    part = known or _enclosing_kind(tree, at)
    placement = _attention(at) if part == "attention" else part or _outside_submodules(tree, at)
    if placement is None and (is_convolution(at.owner) or _is_loose(at)):
        return "other"
    return placement


def _embedding(at: Occurrence) -> str | None:
    """Token embeddings are `emb`; embeddings that are added to every token (positions, token types) are `other`."""
    names = terms(at.segment, type(at.owner).__name__, *(segment for segment, _ in at.path[-2:-1]))
    if names & (POSITION | KIND):
        return "other"
    listed = at.path[-2][0] if at.segment.isdigit() and len(at.path) > 1 else at.segment
    return "emb" if terms(listed) & TOKEN else None


def _is_norm(at: Occurrence) -> bool:
    if is_linear(at.owner) or is_convolution(at.owner) or any(True for _ in _parameters_below(at.owner)):
        return False
    one_by_one = at.owner.get_parameter(at.leaf).ndim == 1
    return bool(terms(type(at.owner).__name__, *([at.segment, at.leaf] if one_by_one else [])) & NORM)


def _parameters_below(module: nn.Module) -> Iterator[nn.Parameter]:
    return itertools.chain.from_iterable(child.parameters() for child in module.children())


def _is_loose(at: Occurrence) -> bool:
    """Whether it is a vector or matrix outside of all blocks, by its name or by its position."""
    return at.is_named_itself and (bool(terms(at.leaf) & (LOOSE | POSITION | KIND)) or _is_connector(at))


def _enclosing_kind(tree: Tree, at: Occurrence) -> str | None:
    """What encloses `at`, searched from the inside out: "attention", "ffn", "other" or None."""
    if terms(at.name) & ROUTER:
        return "other"
    depth = at.layer_depth
    for here in range(len(at.path) - 1, max(depth, 1) - 1, -1):
        segment, module = at.path[here]
        if _is_router(at.path[here - 1][1], segment, module):
            return "other"
        if here < len(at.enclosing) and (found := _kind_of(tree, at, here, in_layer=bool(depth))):
            return "other" if found == "ffn" and not depth and _is_connector(at) else found
    return "attention" if not depth and holds_qkv(at.path[0][1]) else None


def _is_router(parent: nn.Module, segment: str, module: nn.Module) -> bool:
    if module_terms(segment, module) & ROUTER:
        return True
    if words(segment)[-1:] != ("gate",):
        return False
    return any({"expert", "experts"}.intersection(words(name)) for name, _ in parent.named_children())


def _kind_of(tree: Tree, at: Occurrence, here: int, *, in_layer: bool) -> str | None:
    segment, module = at.path[here]
    names = module_terms(segment, module)
    if names & MIXER or terms(segment) & CONVOLUTION or (in_layer and tree.cached(is_mixer, module)):
        return "other"
    if here == len(at.enclosing) - 1 and _is_beside_queries(at):
        return "attention"
    if names & CONNECTOR:
        return "other"
    if tree.cached(is_attention, module):
        return "attention"
    return "ffn" if is_feed_forward(segment, module) else None


def _is_beside_queries(at: Occurrence) -> bool:
    """Whether `at` is an attention matrix that is directly in a module, perhaps beside others."""
    return role(at.name) is not None and at.name not in FEED_FORWARD_LINEAR and holds_qkv(at.enclosing[-1][1])


def _is_connector(at: Occurrence) -> bool:
    return any(module_terms(segment, module) & CONNECTOR for segment, module in at.path[1:])


def _attention(at: Occurrence) -> Placement | None:
    name, attention = _in_attention(at)
    found_role, rows = role(name), _rows(at)
    if found_role == "k" and not {"v", "fused"} & roles(attention):
        return "vo"  # there is no value matrix: the keys serve as values
    if found_role == "q":
        return _along_rows(at, fused.split_queries(attention, name, rows))
    if found_role == "latent":
        return _along_rows(at, fused.split_latent(attention, rows))
    if found_role in {"fused", "in"}:
        return _along_rows(at, fused.split_fused(attention, name, rows, _inputs(at)))
    if found_role is None and terms(name) & (POSITION | LOOSE | CONVOLUTION):
        return "other"
    return _BLOCK_OF_ROLE.get(found_role or "")


def _in_attention(at: Occurrence) -> tuple[str, nn.Module]:
    """The name of the matrix and the attention module, also if the projection is a module of its own."""
    if is_plain(at.name) and len(at.enclosing) > 1:
        wrapper = at.enclosing[-1][0]
        if role(wrapper) in {"q", "k", "v"} or (role(wrapper) is None and terms(wrapper) & POSITION):
            return wrapper, at.enclosing[-2][1]
    return at.name, at.enclosing[-1][1]


def _rows(at: Occurrence) -> int:
    """Number of outputs of the matrix that `at` is, or is the bias of."""
    parameter = at.owner.get_parameter(at.leaf)
    return parameter.shape[1] if is_conv1d(at.owner) and parameter.ndim > 1 else parameter.shape[0]


def _inputs(at: Occurrence) -> int:
    weight = at.owner.get_parameter(at.leaf if at.is_named_itself else "weight")
    return weight.shape[0] if is_conv1d(at.owner) else weight.shape[-1]


def _along_rows(at: Occurrence, placement: Placement | None) -> Placement | None:
    """`placement` for this parameter: Conv1D has its outputs in dimension 1 of the weight."""
    if isinstance(placement, Split) and is_conv1d(at.owner) and at.owner.get_parameter(at.leaf).ndim > 1:
        return dataclasses.replace(placement, dim=1)
    return placement


def _outside_submodules(tree: Tree, at: Occurrence) -> Placement | None:
    """The block of a matrix that is in no attention or feed-forward module, but directly in a layer or in the model."""
    if at.is_named_itself or not at.enclosing:
        return None
    if not at.layer_depth:
        return _outside_layers(tree, at)
    return _attention(at) if _is_beside_queries(at) else _in_layer(at)


def _in_layer(at: Occurrence) -> str | None:
    parent = at.enclosing[-1][0]
    qualified = {at.name, f"{parent}.{at.name}"}
    if terms(parent) & NORM:
        return "other"  # it computes the scale of a norm
    if qualified & ATTENTION_LINEAR:
        return "vo"
    if qualified & FEED_FORWARD_LINEAR or is_feed_forward(at.segment, at.owner):
        return "ffn"
    return "other" if _is_connector(at) else None


def _outside_layers(tree: Tree, at: Occurrence) -> str | None:
    if any(module_terms(segment, module) & TOWER for segment, module in at.enclosing[1:]):
        return "other"
    if (at.name in HEAD and is_linear(at.owner)) or any(terms(segment) & HEAD_PART for segment, _ in at.path[1:]):
        return _head(tree, at.owner)
    return "other" if terms(at.name) & CONNECTOR else None


def _head(tree: Tree, owner: nn.Module) -> str:
    """The block of a matrix that predicts tokens; a bias goes with its matrix, which may be tied to the embedding."""
    weight = getattr(owner, "weight", None)
    occurrences = tree.occurrences[id(weight)] if isinstance(weight, nn.Parameter) else []
    return "emb" if any(is_embedding(occurrence.owner) for occurrence in occurrences) else "head"


def _unplaced_error(name: str, shape: tuple[int, ...], owner: nn.Module) -> BlockError:
    return BlockError(
        f"{name} {shape} in {type(owner).__module__}.{type(owner).__name__} belongs to no known block. "
        f'Add a rule for classify(model, rules=...): [{{match: "{name}", block: other}}], or, for a fused parameter, '
        f'[{{match: "{name}", split: {{dim: 0, parts: [{{block: qk, size: ...}}, {{block: vo, size: ...}}]}}}}]'
    )
