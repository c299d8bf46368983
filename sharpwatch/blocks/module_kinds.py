"""What each module of a model is, from its class, its parts and its name: a matrix, an embedding, attention."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from sharpwatch.blocks.adapters import Path, bare_children
from sharpwatch.blocks.vocabulary import ATTENTION, FEED_FORWARD, RECURRENCE, is_plain, role, terms, words

_NOT_ATTENTION = {"intermediate", "intermediate_query", "fc1", "fc2", "linear1", "lin1", "c_fc", "fc_in"}
_FRAME = {"block", "layer", "module"}
_Convolution = nn.modules.conv._ConvNd  # noqa: SLF001 - what all of torch's are


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Node:
    """A module of the module tree, and what it is: found once, for all of its parameters.

    Attributes:
        name: Its name in its parent; "" for the model itself.
        module: The module.
        children: The modules directly in it, without their wrappers.
        inside: All modules in it, each before those in it.
        terms: The terms of its name and of the last two words of its class name; the family's name comes before them.
        is_linear: It is a matrix: a linear layer (also Conv1D, or a quantized or wrapped one), or a 1 x 1 convolution.
        is_conv1d: It is Hugging Face's Conv1D, a linear layer with its weight as [in, out].
        is_convolution: It is a convolution with any kernel.
        is_embedding: It is an embedding, also one quantized by transformers.
        is_feed_forward: Its name or class name says so: mlp, FeedForward, DenseReluDense, experts.
        is_multilayer: It is a perceptron of several layers that ends with as many features as it begins with.
        is_mixer: It contains a recurrence.
        is_attention: It contains query, key and value, and no feed-forward part.
        holds_qkv: Attention matrices are directly in it; keys and values may come from elsewhere.
        roles: The attention roles of the matrices directly in it; matrices with generic names are left out.
    """

    name: str
    module: nn.Module
    children: tuple[Node, ...]
    inside: tuple[Node, ...]
    terms: frozenset[str]
    is_linear: bool
    is_conv1d: bool
    is_convolution: bool
    is_embedding: bool
    is_feed_forward: bool
    is_multilayer: bool
    is_mixer: bool
    is_attention: bool
    holds_qkv: bool
    roles: frozenset[str | None]


def nodes_of(model: nn.Module, paths: Iterable[Path]) -> dict[tuple[str, nn.Module], Node]:
    """Find what each module of a model is.

    Args:
        model: The model.
        paths: Paths to its parameters; some lead to copies of modules that an adapter trains.

    Returns:
        The nodes by name and module.
    """
    places = dict.fromkeys([("", model), *itertools.chain.from_iterable(paths)])
    children = bare_children(module for _, module in places)
    nodes: dict[tuple[str, nn.Module], Node] = {}

    def node_at(place: tuple[str, nn.Module]) -> Node:
        if place not in nodes:
            nodes[place] = _node(*place, tuple(node_at(child) for child in children[place[1]]))
        return nodes[place]

    for place in places:
        node_at(place)
    return nodes


def _node(name: str, module: nn.Module, children: tuple[Node, ...]) -> Node:
    inside = tuple(itertools.chain.from_iterable((child, *child.inside) for child in children))
    roles = _roles(module, children)
    holds_qkv = isinstance(module, nn.MultiheadAttention) or _has_qkv(roles)
    return Node(
        name,
        module,
        children,
        inside,
        terms=_terms(name, module),
        is_linear=_is_linear(module),
        is_conv1d=is_conv1d(module),
        is_convolution=isinstance(module, _Convolution),
        is_embedding=_is_embedding(module),
        is_feed_forward=_is_feed_forward(name, module),
        is_multilayer=_is_multilayer(module, inside),
        is_mixer=_is_mixer(module, children),
        is_attention=(holds_qkv or any(node.holds_qkv for node in inside)) and not _has_feed_forward(module, inside),
        holds_qkv=holds_qkv,
        roles=roles,
    )


def _terms(name: str, module: nn.Module) -> frozenset[str]:
    return terms(name) | terms("".join(word.capitalize() for word in words(type(module).__name__)[-2:]))


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear) or is_conv1d(module) or words(type(module).__name__)[-1:] == ("linear",):
        return True
    return isinstance(module, _Convolution) and math.prod(module.kernel_size) == 1


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is Hugging Face's Conv1D."""
    # By name, so that transformers need not be installed.
    return any(
        cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils" for cls in type(module).__mro__
    )


def _is_embedding(module: nn.Module) -> bool:
    if isinstance(module, nn.Embedding):
        return True
    return words(type(module).__name__)[-1:] == ("embedding",) and "weight" in module._parameters  # noqa: SLF001


def _is_feed_forward(name: str, module: nn.Module) -> bool:
    """Only the end of a class name counts: "Qwen3MoeSparseMoeBlock" is feed-forward, "Qwen3MoeAttention" is not."""
    ending = [word for word in words(type(module).__name__) if word not in _FRAME][-2:]
    return bool((terms(name) | {"_".join(ending), *ending[-1:]}) & FEED_FORWARD)


def _has_feed_forward(module: nn.Module, inside: Sequence[Node]) -> bool:
    """Whether it is a feed-forward part by its class, or contains one, as a whole layer does."""
    return _is_feed_forward("", module) or any(node.name in _NOT_ATTENTION or node.is_feed_forward for node in inside)


def _is_multilayer(module: nn.Module, inside: Sequence[Node]) -> bool:
    matrices = [*([module] if _is_linear(module) else []), *(node.module for node in inside if node.is_linear)]
    if len(matrices) < 2 or _terms("", module) & ATTENTION or any(node.terms & ATTENTION for node in inside):
        return False
    ends = getattr(matrices[0], "in_features", None), getattr(matrices[-1], "out_features", None)
    return ends[0] is not None and ends[0] == ends[1]


def _is_mixer(module: nn.Module, children: Sequence[Node]) -> bool:
    """Whether it, or a module in it, has the parameters that only recurrences have."""
    names = {*module._parameters, *(child.name for child in children)}  # noqa: SLF001
    return bool(names & RECURRENCE) or any(child.is_mixer for child in children)


def _roles(module: nn.Module, children: Sequence[Node]) -> frozenset[str | None]:
    names = {*module._parameters, *(child.name for child in children if _holds_matrix(child))}  # noqa: SLF001
    return frozenset(role(name) for name in names if not is_plain(name))


def _holds_matrix(node: Node) -> bool:
    """Whether it is a matrix, or wraps the matrix that projects queries, keys or values."""
    wraps = role(node.name) in {"q", "k", "v"}
    return node.is_linear or (wraps and any(is_plain(child.name) and child.is_linear for child in node.children))


def _has_qkv(roles: frozenset[str | None]) -> bool:
    return "fused" in roles or ("q" in roles and bool({"k", "v", "o"} & roles)) or {"qk", "v"} <= roles
