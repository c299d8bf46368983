"""What a module is, whatever the model: a matrix, a convolution, a table, attention, a feed-forward part."""

from __future__ import annotations

from torch import nn

from sharpwatch.blocks.vocabulary import FEED_FORWARD, RECURRENCE, is_plain, role, terms, words

_NOT_ATTENTION = {"intermediate", "intermediate_query", "fc1", "fc2", "linear1", "lin1", "c_fc", "fc_in"}
_FRAME = {"block", "layer", "module"}


def is_linear(module: nn.Module) -> bool:
    """A matrix, also one of transformers' own make (Conv1D, a quantized or wrapped Linear), or a 1 x 1 convolution."""
    if isinstance(module, nn.Linear) or is_conv1d(module) or words(type(module).__name__)[-1:] == ("linear",):
        return True
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.modules.conv._ConvNd) and weight is not None and weight[0, 0].numel() == 1  # noqa: SLF001


def is_conv1d(module: nn.Module) -> bool:
    """Hugging Face's Conv1D: a linear layer with its weight [in, out]. Known by name, transformers is not required."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils" for cls in type(module).__mro__
    )


def is_convolution(module: nn.Module) -> bool:
    """A convolution of any kernel."""
    return isinstance(module, nn.modules.conv._ConvNd)  # noqa: SLF001 - what all of torch's are


def is_embedding(module: nn.Module) -> bool:
    """A table of vectors, also one that transformers quantizes itself."""
    if isinstance(module, nn.Embedding):
        return True
    return words(type(module).__name__)[-1:] == ("embedding",) and "weight" in module._parameters  # noqa: SLF001


def named(segment: str, module: nn.Module) -> frozenset[str]:
    """The terms of a module's name and of the end of its class's name; before that stands the family's."""
    return terms(segment, "".join(word.capitalize() for word in words(type(module).__name__)[-2:]))


def is_feed_forward(segment: str, module: nn.Module) -> bool:
    """Named so, in words of its own: mlp, FeedForward, DenseReluDense, experts.

    Of a class name the end counts: "Qwen3MoeAttention" is none, "Qwen3MoeSparseMoeBlock" is one.
    """
    ending = [word for word in words(type(module).__name__) if word not in _FRAME][-2:]
    return bool((terms(segment) | {"_".join(ending), *ending[-1:]}) & FEED_FORWARD)


def is_attention(module: nn.Module) -> bool:
    """Whether query, key and value are in `module`, and no feed-forward part is."""
    inside = [(name.rpartition(".")[2], child) for name, child in module.named_modules()]
    if any(name in _NOT_ATTENTION or is_feed_forward(name, child) for name, child in inside):
        return False
    return any(holds_qkv(child) for _, child in inside)


def is_mixer(module: nn.Module) -> bool:
    """Whether a recurrence is in `module`, known by what only such parts own."""
    return any(RECURRENCE.intersection(name.split(".")) for name, _ in module.named_parameters())


def holds_qkv(module: nn.Module) -> bool:
    """Whether the matrices of attention are directly in `module`; keys and values may come from elsewhere."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    held = roles(module)
    return "fused" in held or ("q" in held and bool({"k", "v", "o"} & held)) or {"qk", "v"} <= held


def roles(module: nn.Module) -> set[str | None]:
    """Of the matrices directly in `module` that have a name of their own."""
    matrices = (name for name, child in module.named_children() if _holds_matrix(name, child))
    names = {*module._parameters, *matrices}  # noqa: SLF001
    return {role(name) for name in names if not is_plain(name)}


def _holds_matrix(name: str, module: nn.Module) -> bool:
    """Whether `module` is a matrix, or the queries', keys' or values' projection with a matrix in it."""
    if is_linear(module):
        return True
    wraps = role(name) in {"q", "k", "v"}
    return wraps and any(is_plain(inner) and is_linear(child) for inner, child in module.named_children())
