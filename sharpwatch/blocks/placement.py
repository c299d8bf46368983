"""What is known of transformers: where a parameter belongs, read from the module tree, module types and names."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from torch import nn

from sharpwatch.blocks import fused
from sharpwatch.blocks.rules import Split
from sharpwatch.blocks.structure import (
    holds_qkv,
    is_attention,
    is_conv1d,
    is_convolution,
    is_embedding,
    is_feed_forward,
    is_linear,
    is_mixer,
    named,
    roles,
)
from sharpwatch.blocks.tree import Place, Tree
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


def place(tree: Tree, name: str) -> Placement:
    """The block of parameter `name`, or how it is split; raises `BlockError` where that is not known.

    A parameter shared between modules is what its embedding is: a tied head is the embedding.
    """
    places = tree.places(tree.parameters[name])
    for candidate in sorted(places, key=lambda at: (not is_embedding(at.owner), not is_linear(at.owner))):
        placement = _place_at(tree, candidate)
        if placement is not None:
            return placement
    raise _unplaced(name, tree.shapes[name], places[0].owner)


def _place_at(tree: Tree, at: Place) -> Placement | None:
    if at.leaf == "_flat_param":  # FSDP's: parameters of several blocks, end to end
        return "other"
    if is_embedding(at.owner):
        return _embedding(at)
    if _is_norm(at):
        return "norm"
    known = BY_CLASS.get((type(at.above[-1][1]).__name__, at.name)) if at.above else None
    part = known or _part(tree, at)
    placement = _attention(at) if part == "attention" else part or _beside_the_parts(tree, at)
    if placement is None and (is_convolution(at.owner) or _is_loose(at)):
        return "other"
    return placement


def _embedding(at: Place) -> str | None:
    """Token tables are `emb`; tables added at every token (positions, token types) are `other`."""
    names = terms(at.segment, type(at.owner).__name__, *(segment for segment, _ in at.path[-2:-1]))
    if names & (POSITION | KIND):
        return "other"
    listed = at.path[-2][0] if at.segment.isdigit() and len(at.path) > 1 else at.segment
    return "emb" if terms(listed) & TOKEN else None


def _is_norm(at: Place) -> bool:
    if is_linear(at.owner) or is_convolution(at.owner) or any(True for _ in _parameters_below(at.owner)):
        return False
    one_by_one = at.owner.get_parameter(at.leaf).ndim == 1
    return bool(terms(type(at.owner).__name__, *([at.segment, at.leaf] if one_by_one else [])) & NORM)


def _parameters_below(module: nn.Module) -> Iterator[nn.Parameter]:
    return itertools.chain.from_iterable(child.parameters() for child in module.children())


def _is_loose(at: Place) -> bool:
    """A vector or matrix of its own that is none of the blocks', by its name or by where it is."""
    return at.alone and (bool(terms(at.leaf) & (LOOSE | POSITION | KIND)) or _is_connector(at))


def _part(tree: Tree, at: Place) -> str | None:
    """What `at` is a part of, seen from the inside out: "attention", "ffn", "other" or None."""
    if terms(at.name) & ROUTER:
        return "other"
    depth = tree.layer_depth(at)
    for here in range(len(at.path) - 1, max(depth, 1) - 1, -1):
        segment, module = at.path[here]
        if _is_router(at.path[here - 1][1], segment, module):
            return "other"
        if here < len(at.above) and (found := _part_of(tree, at, here, in_layer=bool(depth))):
            return "other" if found == "ffn" and not depth and _is_connector(at) else found
    return "attention" if not depth and holds_qkv(at.path[0][1]) else None


def _is_router(parent: nn.Module, segment: str, module: nn.Module) -> bool:
    if named(segment, module) & ROUTER:
        return True
    if words(segment)[-1:] != ("gate",):
        return False
    return any({"expert", "experts"}.intersection(words(name)) for name, _ in parent.named_children())


def _part_of(tree: Tree, at: Place, here: int, *, in_layer: bool) -> str | None:
    segment, module = at.path[here]
    names = named(segment, module)
    if names & MIXER or terms(segment) & CONVOLUTION or (in_layer and tree.ask(is_mixer, module)):
        return "other"
    if here == len(at.above) - 1 and _is_beside_queries(at):
        return "attention"
    if names & CONNECTOR:
        return "other"
    if tree.ask(is_attention, module):
        return "attention"
    return "ffn" if is_feed_forward(segment, module) else None


def _is_beside_queries(at: Place) -> bool:
    """Whether `at` is one of the matrices of attention that are directly in a module, perhaps with others."""
    return role(at.name) is not None and at.name not in FEED_FORWARD_LINEAR and holds_qkv(at.above[-1][1])


def _is_connector(at: Place) -> bool:
    return any(named(segment, module) & CONNECTOR for segment, module in at.path[1:])


def _attention(at: Place) -> Placement | None:
    name, attention = _in_attention(at)
    found, rows = role(name), _rows(at)
    if found == "k" and not {"v", "fused"} & roles(attention):
        return "vo"  # the only key matrix where values have none: keys are the values
    if found == "q":
        return _along_rows(at, fused.queries(attention, name, rows))
    if found == "latent":
        return _along_rows(at, fused.latent(attention, rows))
    if found in {"fused", "in"}:
        return _along_rows(at, fused.keys_and_values(attention, name, rows, _inputs(at)))
    if found is None and terms(name) & (POSITION | LOOSE | CONVOLUTION):
        return "other"
    return _BLOCK_OF_ROLE.get(found or "")


def _in_attention(at: Place) -> tuple[str, nn.Module]:
    """The matrix's name and the module that holds it, seen through a projection that is a module of its own."""
    if is_plain(at.name) and len(at.above) > 1:
        wrapper = at.above[-1][0]
        if role(wrapper) in {"q", "k", "v"} or (role(wrapper) is None and terms(wrapper) & POSITION):
            return wrapper, at.above[-2][1]
    return at.name, at.above[-1][1]


def _rows(at: Place) -> int:
    """Outputs of the matrix that `at` is, or is the bias of."""
    parameter = at.owner.get_parameter(at.leaf)
    return parameter.shape[1] if is_conv1d(at.owner) and parameter.ndim > 1 else parameter.shape[0]


def _inputs(at: Place) -> int:
    weight = at.owner.get_parameter(at.leaf if at.alone else "weight")
    return weight.shape[0] if is_conv1d(at.owner) else weight.shape[-1]


def _along_rows(at: Place, placement: Placement | None) -> Placement | None:
    """`placement` as it is for this parameter: Conv1D keeps its outputs in dimension 1 of the weight."""
    if isinstance(placement, Split) and is_conv1d(at.owner) and at.owner.get_parameter(at.leaf).ndim > 1:
        return dataclasses.replace(placement, dim=1)
    return placement


def _beside_the_parts(tree: Tree, at: Place) -> Placement | None:
    """A matrix of no part that is a module of its own: directly in a layer, or outside of all layers."""
    if at.alone or not at.above:
        return None
    if not tree.layer_depth(at):
        return _outside(tree, at)
    return _attention(at) if _is_beside_queries(at) else _in_layer(at)


def _in_layer(at: Place) -> str | None:
    parent = at.above[-1][0]
    qualified = {at.name, f"{parent}.{at.name}"}
    if terms(parent) & NORM:
        return "other"  # a norm whose scale is computed
    if qualified & ATTENTION_LINEAR:
        return "vo"
    if qualified & FEED_FORWARD_LINEAR or is_feed_forward(at.segment, at.owner):
        return "ffn"
    return "other" if _is_connector(at) else None


def _outside(tree: Tree, at: Place) -> str | None:
    if any(named(segment, module) & TOWER for segment, module in at.above[1:]):
        return "other"
    if (at.name in HEAD and is_linear(at.owner)) or any(terms(segment) & HEAD_PART for segment, _ in at.path[1:]):
        return _head(tree, at.owner)
    return "other" if terms(at.name) & CONNECTOR else None


def _head(tree: Tree, owner: nn.Module) -> str:
    """What predicts tokens; a bias goes with its (perhaps tied) matrix."""
    weight = getattr(owner, "weight", None)
    owners = tree.places(weight) if isinstance(weight, nn.Parameter) else []
    return "emb" if any(is_embedding(place.owner) for place in owners) else "head"


def _unplaced(name: str, shape: tuple[int, ...], owner: nn.Module) -> BlockError:
    return BlockError(
        f"{name} {shape} in {type(owner).__module__}.{type(owner).__name__}: no known rule says which block it is. "
        f'Write one for classify(model, rules=...): [{{match: "{name}", block: other}}], or, for a fused parameter, '
        f'[{{match: "{name}", split: {{dim: 0, parts: [{{block: qk, size: ...}}, {{block: vo, size: ...}}]}}}}]'
    )
