"""The block of each parameter in known transformers, from the module tree, module types and names."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache

from torch import nn

from sharpwatch.blocks import fused
from sharpwatch.blocks.blockmap import Placement, Split
from sharpwatch.blocks.module_tree import Occurrence, Tree
from sharpwatch.blocks.vocabulary import (
    ATTENTION_LINEAR,
    BY_CLASS,
    CONNECTOR,
    CONVOLUTION,
    FEED_FORWARD,
    FEED_FORWARD_LINEAR,
    FILLER,
    HEAD,
    HEAD_PART,
    KIND,
    LOOSE,
    MIXER,
    NORM,
    POSITION,
    RECURRENCE,
    ROLES,
    ROUTER,
    TOKEN,
    TOWER,
)
from sharpwatch.errors import BlockError

_NOT_ATTENTION = {"intermediate", "intermediate_query", "fc1", "fc2", "linear1", "lin1", "c_fc", "fc_in"}
_FRAME = {"block", "layer", "module"}
_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")
_BLOCK_OF_ROLE = {"k": "qk", "qk": "qk", "v": "vo", "o": "vo", "gate": "other"}


def classify_parameters(tree: Tree, names: Iterable[str]) -> dict[str, Placement]:
    """Find the blocks of parameters.

    A parameter shared between modules counts as an embedding if one of them is: a tied head is the embedding.

    Args:
        tree: The model.
        names: Names of the parameters.

    Returns:
        By name a block type, or how the parameter is split.

    Raises:
        BlockError: The block of a parameter is not known.
    """
    return {name: _classify(tree, name) for name in names}


def _classify(tree: Tree, name: str) -> Placement:
    occurrences = tree.occurrences[id(tree.parameters[name])]
    for candidate in sorted(occurrences, key=lambda at: (not _is_embedding(at.owner), not _is_linear(at.owner))):
        placement = _classify_at(tree, candidate)
        if placement is not None:
            return placement
    raise _unplaced_error(name, tree.shapes[name], occurrences[0].owner)


def _classify_at(tree: Tree, at: Occurrence) -> Placement | None:
    if at.leaf == "_flat_param":  # FSDP1 joins parameters of several blocks in it
        return "other"
    if _is_embedding(at.owner):
        return _embedding(at)
    # Before attention: q_norm and k_norm are norms, wherever they are.
    if _is_norm(at):
        return "norm"
    known = BY_CLASS.get((type(at.enclosing[-1][1]).__name__, at.name)) if at.enclosing else None
    part = known or _enclosing_kind(tree, at)
    placement = _attention(at) if part == "attention" else part or _outside_submodules(tree, at)
    if placement is None and (_is_convolution(at.owner) or _is_loose(at)):
        return "other"
    return placement


def _embedding(at: Occurrence) -> str | None:
    """Token embeddings are `emb`; embeddings that are added to every token (positions, token types) are `other`."""
    names = _terms(at.segment, type(at.owner).__name__, *(segment for segment, _ in at.path[-2:-1]))
    if names & (POSITION | KIND):
        return "other"
    listed = at.path[-2][0] if at.segment.isdigit() and len(at.path) > 1 else at.segment
    return "emb" if _terms(listed) & TOKEN else None


def _is_norm(at: Occurrence) -> bool:
    if _is_linear(at.owner) or _is_convolution(at.owner) or any(True for _ in _parameters_below(at.owner)):
        return False
    one_by_one = at.owner.get_parameter(at.leaf).ndim == 1
    return bool(_terms(type(at.owner).__name__, *([at.segment, at.leaf] if one_by_one else [])) & NORM)


def _parameters_below(module: nn.Module) -> Iterator[nn.Parameter]:
    return itertools.chain.from_iterable(child.parameters() for child in module.children())


def _is_loose(at: Occurrence) -> bool:
    """Whether it is a vector or matrix outside of all blocks, by its name or by its position."""
    return at.is_named_itself and (bool(_terms(at.leaf) & (LOOSE | POSITION | KIND)) or _is_connector(at))


def _enclosing_kind(tree: Tree, at: Occurrence) -> str | None:
    """What encloses `at`, searched from the inside out: "attention", "ffn", "other" or None."""
    if _terms(at.name) & ROUTER:
        return "other"
    depth = at.layer_depth
    for here in range(len(at.path) - 1, max(depth, 1) - 1, -1):
        segment, module = at.path[here]
        if _is_router(at.path[here - 1][1], segment, module):
            return "other"
        if here < len(at.enclosing) and (found := _kind_of(tree, at, here, in_layer=bool(depth))):
            return "other" if found == "ffn" and not depth and _is_connector(at) else found
    return "attention" if not depth and _holds_qkv(at.path[0][1]) else None


def _is_router(parent: nn.Module, segment: str, module: nn.Module) -> bool:
    if _module_terms(segment, module) & ROUTER:
        return True
    if _words(segment)[-1:] != ("gate",):
        return False
    # Beside experts a gate chooses among them; elsewhere it is a matrix of a gated feed-forward part.
    return any({"expert", "experts"}.intersection(_words(name)) for name, _ in parent.named_children())


def _kind_of(tree: Tree, at: Occurrence, here: int, *, in_layer: bool) -> str | None:
    segment, module = at.path[here]
    names = _module_terms(segment, module)
    if names & MIXER or _terms(segment) & CONVOLUTION or (in_layer and _cached(tree, _is_mixer, module)):
        return "other"
    if here == len(at.enclosing) - 1 and _is_beside_queries(at):
        return "attention"
    if names & CONNECTOR:
        return "other"
    if _cached(tree, _is_attention, module):
        return "attention"
    return "ffn" if _is_feed_forward(segment, module) else None


def _is_beside_queries(at: Occurrence) -> bool:
    """Whether `at` is an attention matrix that is directly in a module, perhaps beside others."""
    return _role(at.name) is not None and at.name not in FEED_FORWARD_LINEAR and _holds_qkv(at.enclosing[-1][1])


def _is_connector(at: Occurrence) -> bool:
    return any(_module_terms(segment, module) & CONNECTOR for segment, module in at.path[1:])


def _attention(at: Occurrence) -> Placement | None:
    name, attention = _in_attention(at)
    found_role, rows = _role(name), _rows(at)
    if found_role == "k" and not {"v", "fused"} & _roles(attention):
        return "vo"  # there is no value matrix: the keys serve as values
    if found_role == "q":
        return _along_rows(at, fused.split_queries(attention, name, rows))
    if found_role == "latent":
        return _along_rows(at, fused.split_latent(attention, rows))
    if found_role in {"fused", "in"}:
        return _along_rows(at, fused.split_fused(attention, name, rows, _inputs(at)))
    if found_role is None and _terms(name) & (POSITION | LOOSE | CONVOLUTION):
        return "other"
    return _BLOCK_OF_ROLE.get(found_role or "")


def _in_attention(at: Occurrence) -> tuple[str, nn.Module]:
    """The name of the matrix and the attention module, also if the projection is a module of its own."""
    if _is_plain(at.name) and len(at.enclosing) > 1:
        wrapper = at.enclosing[-1][0]
        if _role(wrapper) in {"q", "k", "v"} or (_role(wrapper) is None and _terms(wrapper) & POSITION):
            return wrapper, at.enclosing[-2][1]
    return at.name, at.enclosing[-1][1]


def _rows(at: Occurrence) -> int:
    """Number of outputs of the matrix that `at` is, or is the bias of."""
    parameter = at.owner.get_parameter(at.leaf)
    return parameter.shape[1] if _is_conv1d(at.owner) and parameter.ndim > 1 else parameter.shape[0]


def _inputs(at: Occurrence) -> int:
    weight = at.owner.get_parameter(at.leaf if at.is_named_itself else "weight")
    return weight.shape[0] if _is_conv1d(at.owner) else weight.shape[-1]


def _along_rows(at: Occurrence, placement: Placement | None) -> Placement | None:
    """`placement` for this parameter: Conv1D has its outputs in dimension 1 of the weight."""
    if isinstance(placement, Split) and _is_conv1d(at.owner) and at.owner.get_parameter(at.leaf).ndim > 1:
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
    if _terms(parent) & NORM:
        return "other"  # it computes the scale of a norm
    if qualified & ATTENTION_LINEAR:
        return "vo"
    if qualified & FEED_FORWARD_LINEAR or _is_feed_forward(at.segment, at.owner):
        return "ffn"
    return "other" if _is_connector(at) else None


def _outside_layers(tree: Tree, at: Occurrence) -> str | None:
    if any(_module_terms(segment, module) & TOWER for segment, module in at.enclosing[1:]):
        return "other"
    if (at.name in HEAD and _is_linear(at.owner)) or any(_terms(segment) & HEAD_PART for segment, _ in at.path[1:]):
        return _head(tree, at.owner)
    return "other" if _terms(at.name) & CONNECTOR else None


def _head(tree: Tree, owner: nn.Module) -> str:
    """The block of a matrix that predicts tokens; a bias goes with its matrix, which may be tied to the embedding."""
    weight = getattr(owner, "weight", None)
    occurrences = tree.occurrences[id(weight)] if isinstance(weight, nn.Parameter) else []
    return "emb" if any(_is_embedding(occurrence.owner) for occurrence in occurrences) else "head"


def _unplaced_error(name: str, shape: tuple[int, ...], owner: nn.Module) -> BlockError:
    return BlockError(
        f"{name} {shape} in {type(owner).__module__}.{type(owner).__name__} belongs to no known block. "
        f'Add a rule for classify(model, rules=...): [{{match: "{name}", block: other}}], or, for a fused parameter, '
        f'[{{match: "{name}", split: {{dim: 0, parts: [{{block: qk, size: ...}}, {{block: vo, size: ...}}]}}}}]'
    )


def _cached(tree: Tree, question: Callable[[nn.Module], bool], module: nn.Module) -> bool:
    """`question(module)`, computed once for each module of the tree."""
    if (question, module) not in tree.answers:
        tree.answers[question, module] = question(module)
    return tree.answers[question, module]


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a matrix: a linear layer (also Conv1D, or a quantized or wrapped one), or a 1 x 1 convolution."""
    if isinstance(module, nn.Linear) or _is_conv1d(module) or _words(type(module).__name__)[-1:] == ("linear",):
        return True
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.modules.conv._ConvNd) and weight is not None and weight[0, 0].numel() == 1  # noqa: SLF001


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is Hugging Face's Conv1D, a linear layer with its weight as [in, out].

    It is recognized by name, so transformers need not be installed.
    """
    return any(
        cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils" for cls in type(module).__mro__
    )


def _is_convolution(module: nn.Module) -> bool:
    """Whether it is a convolution with any kernel."""
    return isinstance(module, nn.modules.conv._ConvNd)  # noqa: SLF001 - what all of torch's are


def _is_embedding(module: nn.Module) -> bool:
    """Whether it is an embedding, also one quantized by transformers."""
    if isinstance(module, nn.Embedding):
        return True
    return _words(type(module).__name__)[-1:] == ("embedding",) and "weight" in module._parameters  # noqa: SLF001


def _module_terms(segment: str, module: nn.Module) -> frozenset[str]:
    """The terms of a module's name and of the last two words of its class name; the family's name comes before them."""
    return _terms(segment, "".join(word.capitalize() for word in _words(type(module).__name__)[-2:]))


def _is_feed_forward(segment: str, module: nn.Module) -> bool:
    """Whether its name or class name says so: mlp, FeedForward, DenseReluDense, experts.

    Only the end of a class name counts: "Qwen3MoeSparseMoeBlock" is feed-forward, "Qwen3MoeAttention" is not.
    """
    ending = [word for word in _words(type(module).__name__) if word not in _FRAME][-2:]
    return bool((_terms(segment) | {"_".join(ending), *ending[-1:]}) & FEED_FORWARD)


def _is_attention(module: nn.Module) -> bool:
    """Whether `module` contains query, key and value, and no feed-forward part."""
    inside = [(name.rpartition(".")[2], child) for name, child in module.named_modules()]
    # A layer holds attention somewhere inside too, but is no attention module.
    if any(name in _NOT_ATTENTION or _is_feed_forward(name, child) for name, child in inside):
        return False
    return any(_holds_qkv(child) for _, child in inside)


def _is_mixer(module: nn.Module) -> bool:
    """Whether `module` contains a recurrence, recognized by the parameters that only recurrences have."""
    return any(RECURRENCE.intersection(name.split(".")) for name, _ in module.named_parameters())


def _holds_qkv(module: nn.Module) -> bool:
    """Whether attention matrices are directly in `module`; keys and values may come from elsewhere."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    held = _roles(module)
    return "fused" in held or ("q" in held and bool({"k", "v", "o"} & held)) or {"qk", "v"} <= held


def _roles(module: nn.Module) -> set[str | None]:
    """The attention roles of the matrices directly in `module`; matrices with generic names are left out."""
    matrices = (name for name, child in module.named_children() if _holds_matrix(name, child))
    names = {*module._parameters, *matrices}  # noqa: SLF001
    return {_role(name) for name in names if not _is_plain(name)}


def _holds_matrix(name: str, module: nn.Module) -> bool:
    """Whether `module` is a matrix, or wraps the matrix that projects queries, keys or values."""
    if _is_linear(module):
        return True
    wraps = _role(name) in {"q", "k", "v"}
    return wraps and any(_is_plain(inner) and _is_linear(child) for inner, child in module.named_children())


@cache
def _words(name: str) -> tuple[str, ...]:
    """Split `name` into lower-case words: "T5LayerNorm" is (t, 5, layer, norm), "q_proj" is (q, proj)."""
    return tuple(word.lower() for word in _WORD.findall(name))


@cache
def _terms(*names: str) -> frozenset[str]:
    """The words of `names`, and the pairs of adjacent words in each."""
    each = [_words(name) for name in names]
    pairs = ("_".join(pair) for name in each for pair in itertools.pairwise(name))
    return frozenset(itertools.chain(*each, pairs))


@cache
def _role(name: str) -> str | None:
    """The role of an attention matrix by its name: q, k, v, o, qk, gate, latent or fused; None if unknown."""
    return ROLES.get(_plain(name))


def _is_plain(name: str) -> bool:
    """Whether `name` is generic, such as proj, dense or linear."""
    return not _plain(name)


def _plain(name: str) -> str:
    return "_".join(word for word in _words(name) if word not in FILLER)
