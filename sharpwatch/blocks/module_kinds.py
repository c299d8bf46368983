"""What a module is, from its class, its parts and its name: a matrix, an embedding, attention, feed-forward."""

from __future__ import annotations

from torch import nn

from sharpwatch.blocks.adapters import bare_children, bare_modules
from sharpwatch.blocks.vocabulary import ATTENTION, FEED_FORWARD, RECURRENCE, is_plain, role, terms, words

_NOT_ATTENTION = {"intermediate", "intermediate_query", "fc1", "fc2", "linear1", "lin1", "c_fc", "fc_in"}
_FRAME = {"block", "layer", "module"}


def is_linear(module: nn.Module) -> bool:
    """Whether it is a matrix: a linear layer (also Conv1D, or a quantized or wrapped one), or a 1 x 1 convolution."""
    if isinstance(module, nn.Linear) or is_conv1d(module) or words(type(module).__name__)[-1:] == ("linear",):
        return True
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.modules.conv._ConvNd) and weight is not None and weight[0, 0].numel() == 1  # noqa: SLF001


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is Hugging Face's Conv1D, a linear layer with its weight as [in, out].

    It is recognized by name, so transformers need not be installed.
    """
    return any(
        cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils" for cls in type(module).__mro__
    )


def is_convolution(module: nn.Module) -> bool:
    """Whether it is a convolution with any kernel."""
    return isinstance(module, nn.modules.conv._ConvNd)  # noqa: SLF001 - what all of torch's are


def is_embedding(module: nn.Module) -> bool:
    """Whether it is an embedding, also one quantized by transformers."""
    if isinstance(module, nn.Embedding):
        return True
    return words(type(module).__name__)[-1:] == ("embedding",) and "weight" in module._parameters  # noqa: SLF001


def module_terms(segment: str, module: nn.Module) -> frozenset[str]:
    """The terms of a module's name and of the last two words of its class name; the family's name comes before them."""
    return terms(segment, "".join(word.capitalize() for word in words(type(module).__name__)[-2:]))


def is_feed_forward(segment: str, module: nn.Module) -> bool:
    """Whether its name or class name says so: mlp, FeedForward, DenseReluDense, experts.

    Only the end of a class name counts: "Qwen3MoeSparseMoeBlock" is feed-forward, "Qwen3MoeAttention" is not.
    """
    ending = [word for word in words(type(module).__name__) if word not in _FRAME][-2:]
    return bool((terms(segment) | {"_".join(ending), *ending[-1:]}) & FEED_FORWARD)


def is_attention(module: nn.Module) -> bool:
    """Whether `module` contains query, key and value, and no feed-forward part."""
    inside = list(bare_modules(module))
    # A layer holds attention somewhere inside too, but is no attention module.
    if any(name in _NOT_ATTENTION or is_feed_forward(name, child) for name, child in inside):
        return False
    return any(holds_qkv(child) for _, child in inside)


def is_multilayer(module: nn.Module) -> bool:
    """Whether `module` is a perceptron of several layers that ends with as many features as it begins with."""
    inside = list(bare_modules(module))
    matrices = [child for _, child in inside if is_linear(child)]
    if len(matrices) < 2 or any(module_terms(name, child) & ATTENTION for name, child in inside):
        return False
    ends = getattr(matrices[0], "in_features", None), getattr(matrices[-1], "out_features", None)
    return ends[0] is not None and ends[0] == ends[1]


def is_mixer(module: nn.Module) -> bool:
    """Whether `module` contains a recurrence, recognized by the parameters that only recurrences have."""
    return any(RECURRENCE.intersection(name.split(".")) for name, _ in module.named_parameters())


def holds_qkv(module: nn.Module) -> bool:
    """Whether attention matrices are directly in `module`; keys and values may come from elsewhere."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    held = roles(module)
    return "fused" in held or ("q" in held and bool({"k", "v", "o"} & held)) or {"qk", "v"} <= held


def roles(module: nn.Module) -> set[str | None]:
    """The attention roles of the matrices directly in `module`; matrices with generic names are left out."""
    matrices = (name for name, child in bare_children(module) if holds_matrix(name, child))
    names = {*module._parameters, *matrices}  # noqa: SLF001
    return {role(name) for name in names if not is_plain(name)}


def holds_matrix(name: str, module: nn.Module) -> bool:
    """Whether `module` is a matrix, or wraps the matrix that projects queries, keys or values."""
    if is_linear(module):
        return True
    wraps = role(name) in {"q", "k", "v"}
    return wraps and any(is_plain(inner) and is_linear(child) for inner, child in bare_children(module))
