"""What is known of transformers: where a parameter belongs, read from the module tree, module types and shapes."""

from __future__ import annotations

import itertools

from torch import nn

from sharpwatch.blocks.rules import Split
from sharpwatch.blocks.tree import Place, Tree, words
from sharpwatch.errors import BlockError

Placement = str | Split
Path = tuple[tuple[str, nn.Module], ...]

_POSITION = {"wpe", "pos", "position", "positions", "positional", "relative"}
_TOKEN = {"wte", "tok", "token", "tokens", "word", "vocab", "emb", "embed", "embedding", "embeddings", "shared"}
_NORM = {"norm", "ln", "layernorm", "rmsnorm"}
_FFN = {"mlp", "ffn", "ff", "ffwd", "feedforward", "moe", "expert", "experts"}
_HEAD = {"lm_head", "head", "output", "embed_out", "unembed", "unembedding", "output_projection", "to_logits"}
# Linear layers of a feed-forward part that has no module of its own, or one with a general name.
_FFN_LINEAR = {"fc1", "fc2", "linear1", "linear2", "lin1", "lin2", "c_fc", "fc_in", "fc_out", "up_proj", "down_proj"}
_FFN_LINEAR |= {"gate_proj", "gate_up_proj", "w1", "w2", "w3", "wi", "wi_0", "wi_1", "wo"}
_FFN_LINEAR |= {"dense_h_to_4h", "dense_4h_to_h", "intermediate.dense", "output.dense"}
_FILLER = {"proj", "projection", "lin", "linear", "w", "c", "to", "weight", "bias", "dense"}
_ROLES = {"q": "q", "wq": "q", "query": "q", "k": "k", "wk": "k", "key": "k", "v": "v", "wv": "v", "value": "v"}
_ROLES |= {"o": "o", "wo": "o", "out": "o", "output": "o", "": "o"}
_ROLES |= dict.fromkeys(("attn", "qkv", "wqkv", "query_key_value", "in"), "fused")
_BLOCK_OF_ROLE = {"q": "qk", "k": "qk", "v": "vo", "o": "vo"}


def place(tree: Tree, name: str) -> Placement:
    """The block of parameter `name`, or how it is split; raises `BlockError` where that is not known.

    A parameter shared between modules is what its embedding is: a tied head is the embedding.
    """
    places = tree.places(tree.parameters[name])
    for candidate in sorted(places, key=lambda p: not isinstance(p.owner, nn.Embedding)):
        placement = _place_at(tree, candidate)
        if placement is not None:
            return placement
    raise _unplaced(name, tree.shapes[name], places[0].owner)


def _place_at(tree: Tree, at: Place) -> Placement | None:
    parameter = at.owner.get_parameter(at.leaf)
    if isinstance(at.owner, nn.Embedding):
        return _embedding(at)
    if _is_norm(at, parameter):
        return "norm"
    if _is_position(at, parameter) or _is_state_space(at) or _is_router(at):
        return "other"
    region = _region(tree, at)
    if region == "attention":
        return _attention(at, parameter)
    return region or _head(tree, at)


def _embedding(at: Place) -> str | None:
    """Token tables are `emb`; tables added at every token (positions, token types) are `other`."""
    named = {*words(at.segment), *words(type(at.owner).__name__)} - {"embedding"}
    if named & (_POSITION | {"type", "segment"}):
        return "other"
    return "emb" if set(words(at.segment)) & _TOKEN else None


def _is_norm(at: Place, parameter: nn.Parameter) -> bool:
    if parameter.ndim > 1 or _is_linear(at.owner):
        return False
    return bool({*words(type(at.owner).__name__), *words(at.segment), *words(at.leaf)} & _NORM) and not list(
        at.owner.children()
    )


def _is_position(at: Place, parameter: nn.Parameter) -> bool:
    """A table of positions kept as a bare parameter, [T, d] or [1, T, d]."""
    return parameter.ndim > 1 and not _is_linear(at.owner) and bool(set(words(at.leaf)) & _POSITION)


def _is_state_space(at: Place) -> bool:
    """Inside a module that owns a state matrix (A_log, as in Mamba)."""
    return any("A_log" in dict(module.named_parameters(recurse=False)) for _, module in at.path)


def _is_router(at: Place) -> bool:
    if "router" in {*words(at.segment), *words(type(at.owner).__name__)}:
        return True
    beside = dict(at.path[-2][1].named_children()) if len(at.path) > 1 else {}
    return "experts" in beside and "gate" in words(at.segment)


def _multihead(at: Place, parameter: nn.Parameter) -> Placement | None:
    """`nn.MultiheadAttention` keeps q, k and v in one parameter, or in three of its own."""
    if at.leaf in {"in_proj_weight", "in_proj_bias"}:
        return _thirds(0, parameter.shape[0])
    return _BLOCK_OF_ROLE.get(_role(at.leaf) or "")


def _attention(at: Place, parameter: nn.Parameter) -> Placement | None:
    if isinstance(at.owner, nn.MultiheadAttention):
        return _multihead(at, parameter)
    role = _role(at.segment)
    if role == "fused":
        return _fused(at, parameter)
    return _BLOCK_OF_ROLE.get(role or "")


def _fused(at: Place, parameter: nn.Parameter) -> Placement | None:
    """Query, key and value as three equal slices of the output, the layout of GPT-2 and nanoGPT (`c_attn`).

    Others interleave them by head (GPT-NeoX, GPT-BigCode) or share keys between heads: not known here.
    """
    if at.segment != "c_attn" or not _is_linear(at.owner):
        return None
    conv1d = _is_conv1d(at.owner)
    if type(at.path[-2][1]).__module__.startswith("transformers.models.") and not conv1d:
        return None
    weight = at.owner.get_parameter("weight")
    inputs, outputs = weight.shape if conv1d else reversed(weight.shape)
    if outputs != 3 * inputs:
        return None
    return _thirds(1 if conv1d and parameter.ndim > 1 else 0, outputs)


def _thirds(dim: int, size: int) -> Split:
    return Split(dim, (("qk", 2 * size // 3), ("vo", size // 3)))


def _head(tree: Tree, at: Place) -> str | None:
    """A linear layer outside all layers with an output head's name; a bias goes with its (perhaps tied) matrix."""
    if not _is_linear(at.owner) or tree.in_layer(at) != at.path[1:] or at.segment not in _HEAD:
        return None
    owners = tree.places(at.owner.get_parameter("weight"))
    return "emb" if any(isinstance(place.owner, nn.Embedding) for place in owners) else "head"


def _region(tree: Tree, at: Place) -> str | None:
    """The part of the layer that `at` is in, seen from the inside out: "attention", "ffn" or None."""
    if isinstance(at.owner, nn.MultiheadAttention):
        return "attention"
    inside = tree.in_layer(at)
    if not inside or not (_is_linear(at.owner) or "experts" in words(at.segment)):
        return None
    for segment, module in reversed(inside[:-1] if _is_linear(at.owner) else inside):
        if _is_feed_forward(segment, module):
            return "ffn"
        if _is_attention(module):
            return "attention"
    if _holds_qkv(at.path[-2][1]) and _role(at.segment) is not None and at.segment != "wo":
        return "attention"  # q, k, v and o directly in the layer
    in_layer = tree.in_layer(at) != at.path[1:]
    return "ffn" if in_layer and {at.segment, f"{at.path[-2][0]}.{at.segment}"} & _FFN_LINEAR else None


def _is_feed_forward(segment: str, module: nn.Module) -> bool:
    """Named so, in words of its own: mlp, FeedForward, DenseReluDense, experts."""
    named = words(segment), words(type(module).__name__)
    if set().union(*named) & _FFN or named[0] == ("dense", "relu", "dense"):
        return True
    return any(pair == ("feed", "forward") for name in named for pair in itertools.pairwise(name))


def _is_attention(module: nn.Module) -> bool:
    """Whether query, key and value are in `module`, and no feed-forward part is."""
    inside = list(module.named_modules())
    if any(_is_feed_forward(name.rpartition(".")[2], child) for name, child in inside):
        return False
    return any(_holds_qkv(child) for _, child in inside)


def _holds_qkv(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return True
    roles = {_role(name) for name, child in module.named_children() if _is_linear(child)}
    return {"q", "k", "v"} <= roles or "fused" in roles


def _role(name: str) -> str | None:
    """What a linear layer of attention is to it: q, k, v, o or fused; None if its name says nothing known."""
    return _ROLES.get("_".join(word for word in words(name) if word not in _FILLER))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """Hugging Face's Conv1D: a linear layer with its weight [in, out]. Known by name, transformers is not required."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils" for cls in type(module).__mro__
    )


def _unplaced(name: str, shape: tuple[int, ...], owner: nn.Module) -> BlockError:
    return BlockError(
        f"{name} {shape} in {type(owner).__module__}.{type(owner).__name__}: no known rule says which block it is. "
        f'Write one for classify(model, rules=...): [{{match: "{name}", block: other}}], or, for a fused parameter, '
        f'[{{match: "{name}", split: {{dim: 0, parts: [{{block: qk, size: ...}}, {{block: vo, size: ...}}]}}}}]'
    )
