"""The block of each parameter in known transformers, from the module tree, module types and names."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

from torch import nn

from sharpwatch.blocks import fused
from sharpwatch.blocks.blockmap import Placement, Split
from sharpwatch.blocks.module_kinds import Node
from sharpwatch.blocks.module_tree import Occurrence, Tree
from sharpwatch.blocks.vocabulary import (
    ATTENTION,
    ATTENTION_LINEAR,
    BY_CLASS,
    CONNECTOR,
    CONVOLUTION,
    FEED_FORWARD_LINEAR,
    GATE,
    HEAD,
    HEAD_PART,
    KIND,
    LOOSE,
    MIXER,
    MODULATION,
    NORM,
    POSITION,
    ROUTER,
    STREAM,
    TOKEN,
    TOWER,
    is_plain,
    role,
    terms,
    words,
)

_BLOCK_OF_ROLE = {"k": "qk", "qk": "qk", "v": "vo", "o": "vo", "gate": "other"}
# A matrix that serves several blocks is counted with the sharpest of them, since it bears no larger learning rate.
_SHARPEST_FIRST = ("norm", "vo", "ffn", "qk", "head", "emb", "other")


def classify_parameters(tree: Tree, names: Iterable[str]) -> dict[str, Placement]:
    """Find the blocks of parameters.

    A parameter shared between modules counts as an embedding if one of them is: a tied head is the embedding. An
    adapter's parameter is placed by the parameter that it adapts.

    Args:
        tree: The model.
        names: Names of the parameters.

    Returns:
        By name a block type, or how the parameter is split. A parameter whose block is not known is left out.
    """
    placed = {name: _classify(tree, name) for name in names}
    return {name: placement for name, placement in placed.items() if placement is not None}


def _classify(tree: Tree, name: str) -> Placement | None:
    occurrences = tree.occurrences[id(tree.parameters[name])]
    found: list[Placement] = []
    for at in sorted(occurrences, key=lambda at: (not at.owner.is_embedding, not at.owner.is_linear)):
        placement = _classify_at(tree, at)
        if placement is not None:
            found.append(_fitted(placement, at.shape, tree.shapes[name]))
            if not at.adapter:  # an adapter's parameter may be shared by all that it adapts
                break
    return _sharpest(found) if len(set(found)) > 1 else next(iter(found), None)


def _fitted(placement: Placement, whole: tuple[int, ...], shape: tuple[int, ...]) -> Placement:
    """The placement of a parameter of `shape`, such as an adapter's, by that of the one of shape `whole`.

    The rows of a fused matrix are split if the parameter has them too, as LoRA's second factor.
    """
    if isinstance(placement, str) or whole == shape:
        return placement
    along = [dim for dim, size in enumerate(shape) if size == whole[placement.dim]]
    return dataclasses.replace(placement, dim=along[0]) if len(along) == 1 else _sharpest([placement])


def _sharpest(placements: Iterable[Placement]) -> str:
    blocks = [[each] if isinstance(each, str) else [block for block, _ in each.parts] for each in placements]
    return min(itertools.chain.from_iterable(blocks), key=_SHARPEST_FIRST.index)


def _classify_at(tree: Tree, at: Occurrence) -> Placement | None:
    if at.leaf == "_flat_param":  # FSDP1 joins parameters of several blocks in it
        return "other"
    if at.adapter and (found := _adapter(at)):
        return found
    if at.owner.is_embedding:
        return _embedding(at)
    # Before attention: q_norm and k_norm are norms, wherever they are.
    if _is_norm(at):
        return "norm"
    known = BY_CLASS.get((type(at.enclosing[-1].module).__name__, at.name)) if at.enclosing else None
    part = known or _enclosing_kind(at)
    placement = _attention(at) if part == "attention" else part or _outside_submodules(tree, at)
    if placement is None and (at.owner.is_convolution or _is_loose(at)):
        return "other"
    return placement


def _adapter(at: Occurrence) -> Placement | None:
    """The block of an adapter that adapts no single parameter."""
    names = [node.name for node in at.path]
    if "internal_xlora_classifier" in names:  # weighs adapters, as a router does experts
        return "other"
    if "prompt_encoder" in names:
        holder, name = at.path[names.index("prompt_encoder") - 1], names[names.index("prompt_encoder") + 1]
        return _virtual_tokens(at, getattr(holder.module, "peft_config", {}).get(name))
    # A prompt beside attention is read through its keys and values.
    return "vo" if at.leaf not in at.owner.module._parameters and at.owner.is_attention else None  # noqa: SLF001


def _virtual_tokens(at: Occurrence, config: object) -> Placement:
    """The block of virtual tokens: inputs of the model, or, as in prefix tuning, keys and values of every layer."""
    if not any(type(node.module).__name__ in {"PrefixEncoder", "CartridgeEncoder"} for node in at.path):
        return "emb"
    layers, width = getattr(config, "num_layers", 0), getattr(config, "token_dim", 0)
    along = [dim for dim, size in enumerate(at.shape) if size == 2 * layers * width]
    return Split(along[0], (("qk", width), ("vo", width)), layers) if along and width else "vo"


def _embedding(at: Occurrence) -> str | None:
    """Token embeddings are `emb`; embeddings that are added to every token (positions, token types) are `other`."""
    names = terms(at.owner.name, type(at.owner.module).__name__, *(node.name for node in at.path[-2:-1]))
    if names & (POSITION | KIND):
        return "other"
    listed = at.path[-2].name if at.owner.name.isdigit() and len(at.path) > 1 else at.owner.name
    return "emb" if terms(listed) & TOKEN else None


def _is_norm(at: Occurrence) -> bool:
    if at.owner.is_linear or at.owner.is_convolution or any(True for _ in _parameters_below(at.owner.module)):
        return False
    names = [type(at.owner.module).__name__, *([at.owner.name, at.leaf] if len(at.shape) == 1 else [])]
    return bool(terms(*names) & NORM)


def _parameters_below(module: nn.Module) -> Iterator[nn.Parameter]:
    return itertools.chain.from_iterable(child.parameters() for child in module.children())


def _is_loose(at: Occurrence) -> bool:
    """Whether it is a vector or matrix outside of all blocks, by its name or by its position."""
    return at.is_named_itself and (bool(terms(at.leaf) & (LOOSE | POSITION | KIND)) or _is_connector(at))


def _enclosing_kind(at: Occurrence) -> str | None:
    """What encloses `at`, searched from the inside out: "attention", "ffn", "other" or None."""
    if terms(at.name) & ROUTER:
        return "other"
    depth = at.layer_depth
    for here in range(len(at.path) - 1, max(depth, 1) - 1, -1):
        if _is_router(at.path[here], at.path[here - 1]):
            return "other"
        if here < len(at.enclosing) and (found := _kind_of(at, here, in_layer=bool(depth))):
            return "other" if found == "ffn" and not depth and _is_connector(at) else found
    return "attention" if not depth and at.path[0].holds_qkv else None


def _is_router(node: Node, parent: Node) -> bool:
    if node.terms & ROUTER:
        return True
    if words(node.name)[-1:] != ("gate",):
        return False
    # Beside experts a gate chooses among them; elsewhere it is a matrix of a gated feed-forward part.
    return any({"expert", "experts"}.intersection(words(child.name)) for child in parent.children)


def _kind_of(at: Occurrence, here: int, *, in_layer: bool) -> str | None:
    node = at.path[here]
    if node.terms & MIXER or terms(node.name) & CONVOLUTION or (in_layer and node.is_mixer):
        return "other"
    if here == len(at.enclosing) - 1 and _is_beside_queries(at):
        return "attention"
    if node.terms & CONNECTOR:
        return "other"
    if node.is_attention:
        return "attention"
    return "ffn" if node.is_feed_forward else None


def _is_beside_queries(at: Occurrence) -> bool:
    """Whether `at` is an attention matrix that is directly in a module, perhaps beside others."""
    return role(at.name) is not None and at.name not in FEED_FORWARD_LINEAR and at.enclosing[-1].holds_qkv


def _is_connector(at: Occurrence) -> bool:
    return any(node.terms & CONNECTOR for node in at.path[1:])


def _attention(at: Occurrence) -> Placement | None:
    name, attention = _in_attention(at)
    found_role, rows = role(name), _rows(at)
    if found_role == "k" and not {"v", "fused"} & attention.roles:
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


def _in_attention(at: Occurrence) -> tuple[str, Node]:
    """The name of the matrix and the attention module, also if the projection is a module of its own."""
    if is_plain(at.name) and len(at.enclosing) > 1:
        wrapper = at.enclosing[-1].name
        if role(wrapper) in {"q", "k", "v"} or (role(wrapper) is None and terms(wrapper) & POSITION):
            return wrapper, at.enclosing[-2]
    return at.name, at.enclosing[-1]


def _rows(at: Occurrence) -> int:
    """Number of outputs of the matrix that `at` is, or is the bias of."""
    return at.shape[1] if at.owner.is_conv1d and len(at.shape) > 1 else next(iter(at.shape), 1)


def _inputs(at: Occurrence) -> int:
    weight = at.owner.module._parameters.get("weight")  # noqa: SLF001 - not what a wrapper computes
    shape = at.shape if at.is_named_itself or at.leaf == "weight" or weight is None else tuple(weight.shape)
    return next(iter(shape if at.owner.is_conv1d else shape[::-1]), 1)


def _along_rows(at: Occurrence, placement: Placement | None) -> Placement | None:
    """`placement` for this parameter: Conv1D has its outputs in dimension 1 of the weight."""
    if isinstance(placement, Split) and at.owner.is_conv1d and len(at.shape) > 1:
        return dataclasses.replace(placement, dim=1)
    return placement


def _outside_submodules(tree: Tree, at: Occurrence) -> Placement | None:
    """The block of a matrix that is in no attention or feed-forward module, but directly in a layer or in the model."""
    if at.is_named_itself or not at.enclosing:
        return None
    if not at.layer_depth:
        return _outside_layers(tree, at)
    if _is_beside_queries(at):
        return _attention(at)
    if at.name == "proj_out" and (joint := fused.split_joint_output(at.enclosing[-1], _inputs(at))):
        return joint if len(at.shape) > 1 else "vo"
    return _in_layer(at)


def _in_layer(at: Occurrence) -> str | None:
    parent = at.enclosing[-1].name
    qualified = {at.name, f"{parent}.{at.name}"}
    if terms(parent, at.name) & (NORM | MODULATION):
        return "other"  # it computes the scale of a norm
    if qualified & ATTENTION_LINEAR:
        return "vo"
    if qualified & FEED_FORWARD_LINEAR or at.owner.is_feed_forward:
        return "ffn"
    if terms(at.name) & STREAM or _is_connector(at):
        return "other"
    parts = at.enclosing[at.layer_depth :] if at.owner.is_linear else ()
    if terms(at.name) & ATTENTION or any(node.terms & ATTENTION for node in (*parts, at.owner)):
        return None
    return "ffn" if any(part.is_multilayer for part in parts) else None


def _outside_layers(tree: Tree, at: Occurrence) -> str | None:
    if any(node.terms & TOWER for node in at.enclosing[1:]):
        return "other"
    if (at.name in HEAD and at.owner.is_linear) or any(terms(node.name) & HEAD_PART for node in at.path[1:]):
        return _head(tree, at.owner.module)
    if terms(at.name) & (CONNECTOR | GATE) or at.index < tree.layers_span[0]:  # an input of the first layer
        return "other"
    # What comes after the last layer predicts, whatever it is called: the head of a task.
    return _head(tree, at.owner.module) if at.owner.is_linear and 0 <= tree.layers_span[1] < at.index else None


def _head(tree: Tree, owner: nn.Module) -> str:
    """The block of a matrix that predicts tokens; a bias goes with its matrix, which may be tied to the embedding."""
    weight = getattr(owner, "weight", None)
    occurrences = tree.occurrences[id(weight)] if isinstance(weight, nn.Parameter) else []
    return "emb" if any(occurrence.owner.is_embedding for occurrence in occurrences) else "head"
