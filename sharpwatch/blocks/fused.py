"""Splits fused attention matrices (QKV): their layouts, which hold several of query, key, value and gate.

They are known by the attention's class and the sizes it keeps, or else read from its code. The shape alone is
ambiguous: [3 · heads · width, inputs] is three thirds in one model, and three slices of every head in another. A layout
that neither tells is not guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from sharpwatch.blocks.blockmap import Split
from sharpwatch.blocks.fused_source import division_of
from sharpwatch.blocks.module_kinds import Node
from sharpwatch.blocks.vocabulary import plain, role

# Attention classes of transformers by the layout of their fused matrix. Query, key, value:
_THIRDS = {
    *("Attention", "GPT2Attention", "MptAttention", "ModernBertAttention", "BlipAttention", "Blip2Attention"),
    *("InstructBlipAttention", "InstructBlipVideoAttention", "VisionAttention", "Qwen2_5_VLVisionAttention"),
    *("Qwen3VLVisionAttention", "Qwen3VLMoeVisionAttention", "Qwen3_5VisionAttention", "Qwen3_5MoeVisionAttention"),
    *("Qwen3OmniMoeVisionAttention", "Qwen4ExpVisionAttention"),
    *("Glm4vVisionAttention", "Glm4vMoeVisionAttention", "Glm5NextVisionAttention", "GlmOcrVisionAttention"),
    *("Ernie4_5_VLMoeVisionAttention", "Dots3NoteVisionAttention", "CohereCompassVisionAttention"),
    *("SamVisionAttention", "GotOcr2VisionAttention", "PPFormulaNetVisionAttention", "DeepseekOcr2SamVisionAttention"),
    *("UnlimitedOcrSamVisionAttention", "Florence2VisionChannelAttention", "Florence2VisionWindowAttention"),
}
# The same, with fewer heads for keys and values than for queries:
_GROUPED = {"Phi3Attention", "Phi4MultimodalAttention", "DbrxAttention", "Exaone4_5_VisionAttention"}
# Query, key, value of the first head, then of the next:
_BY_HEAD = {"GPTNeoXAttention", "GPTNeoXJapaneseAttention", "BloomAttention", "PersimmonAttention"}
_BY_HEAD |= {"DisentangledSelfAttention"}
# Keys, then values:
_HALVES = {"GraniteSpeechConformerAttention", "GraniteSpeechPlusConformerAttention", "JetMoeAttention"}
_HALVES |= {"EvollaSequenceCompressorAttention"}
# One matrix that serves as both keys and values:
_SHARED = {"DeepseekV4Attention", "DeepseekV4CSACompressor", "DeepseekV4HCACompressor"}
# Query of the first head and the gate of its output, then those of the next head:
_GATED_QUERY = {"Qwen3NextAttention", "Qwen3_5Attention", "Qwen3_5MoeAttention", "Qwen4ExpTextAttention"}


def split_fused(attention: Node, name: str, rows: int, inputs: int) -> Split | str | None:
    """The layout of a fused key-value or query-key-value matrix along its rows.

    Args:
        attention: The attention module.
        name: Name of the matrix in it.
        rows: Number of rows, its outputs.
        inputs: Number of inputs.

    Returns:
        The split, one block, or None if the layout is not known.
    """
    module: Any = attention.module
    known = _classes(module)
    own = not known and name == "c_attn" and rows == 3 * inputs  # a user's model: nanoGPT has the layout of GPT-2
    if own or isinstance(module, nn.MultiheadAttention):
        return _values_last(rows, rows // 3)
    if known & _SHARED:
        return "vo"  # counted with the values, as in split_latent
    for classes, layout in _LAYOUTS:
        if known & classes:
            return _values_last(rows, *layout(module, rows))
    if "CodeGenAttention" in known:  # query, value, key for each of four tensor-parallel ranks
        third = rows // 12
        return Split(0, (("qk", third), ("vo", third), ("qk", third)), 4)
    if known and hasattr(module, "qk_nope_head_dim"):  # for each head its key without position, then its value
        return _by_head(rows, module.qk_nope_head_dim, module.v_head_dim, "vo")
    return _by_code(attention, name, rows)


def _by_code(attention: Node, name: str, rows: int) -> Split | None:
    """The layout as the code of `attention` divides what the matrix gives; None if it can't be read from it."""
    parts = 2 if plain(name) == "kv" else 3
    # The features of a convolution are not the last dimension of what it gives.
    convolves = any(child.is_convolution for child in attention.children if child.name == name)
    division = "" if convolves else division_of(attention.module, name, parts)
    if division == "equal" and rows % parts == 0:
        return _values_last(rows, rows // parts)
    queries = _output_inputs(attention)
    # Keys are as wide as values, and all heads of the queries together as the output projection's inputs.
    return _values_last(rows, (rows - queries) // 2) if division == "sizes" and parts == 3 and queries else None


def _output_inputs(attention: Node) -> int:
    """Number of inputs of the output projection; 0 if it is not the only matrix beside the fused one."""
    matrices = [child.module for child in attention.children if child.is_linear and role(child.name) == "o"]
    inputs = [getattr(each, "in_features", 0) for each in matrices]
    return int(inputs[0]) if len(inputs) == 1 else 0


def split_queries(attention: Node, name: str, rows: int) -> Split | str | None:
    """The layout of a query matrix; in some models each head's query is followed by the gate of its output."""
    module: Any = attention.module
    if _classes(module) & _GATED_QUERY:
        return _by_head(rows, module.head_dim, module.head_dim, "other")
    if name == "q_gate_proj" and "AXK2Attention" in _classes(module):
        return _by_head(rows, module.qk_head_dim, module.v_head_dim, "other")
    return "qk"


def split_joint_output(layer: Node, inputs: int) -> Split | None:
    """The layout of an output projection that attention and feed-forward share: what attention gives comes first.

    The layers of diffusers that do so (Flux) keep the feed-forward part's first matrix beside it.
    """
    features = getattr(getattr(layer.module, "proj_mlp", None), "out_features", 0)
    return Split(1, (("vo", inputs - features), ("ffn", features))) if 0 < features < inputs else None


def split_latent(attention: Node, rows: int) -> Split | str:
    """The layout of the latent projection: the latent of keys and values, then the rotary key that the heads share.

    The latent is counted with the values: everything that leaves attention has passed through it. If one matrix serves
    both, its learning rate must suit the sharper of the two.
    """
    module: Any = attention.module
    rank = int(module.kv_lora_rank)
    return Split(0, (("vo", rank), ("qk", rows - rank))) if rows > rank else "vo"


def _classes(module: nn.Module) -> set[str]:
    # Only transformers' own classes: a user's class of the same name may have another layout.
    return {cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("transformers.models.")}


def _head_width(attention: Any) -> int:
    names = ("head_dim", "head_size", "attention_head_size")
    return int(next(getattr(attention, name) for name in names if hasattr(attention, name)))


def _by_head(rows: int, first: int, second: int, block: str) -> Split | None:
    heads = rows // (first + second)
    return Split(0, (("qk", first), (block, second)), heads) if heads * (first + second) == rows else None


def _values_last(rows: int, values: int, repeats: int = 1) -> Split | None:
    """A split of `repeats` stretches, each of queries and keys followed by `values` rows of values."""
    before = rows // repeats - values if repeats else 0
    fits = before > 0 and values > 0 and rows % repeats == 0
    return Split(0, (("qk", before), ("vo", values)), repeats) if fits else None


def _thirds(attention: Any, rows: int) -> tuple[int, int]:
    encoded = getattr(attention, "is_cross_attention", False)  # holds only keys and values, of the encoder
    return rows // 2 if encoded else rows // 3, 1


def _grouped(attention: Any, _rows: int) -> tuple[int, int]:
    return attention.num_key_value_heads * attention.head_dim, 1


def _thirds_by_head(attention: Any, rows: int) -> tuple[int, int]:
    return _head_width(attention), rows // (3 * _head_width(attention))


def _halves(_attention: Any, rows: int) -> tuple[int, int]:
    return rows // 2, 1


def _falcon(attention: Any, _rows: int) -> tuple[int, int]:
    """[groups, queries of the group + 2, width]; multi-query attention is one group."""
    if attention.new_decoder_architecture:
        return attention.head_dim, attention.num_kv_heads
    return attention.head_dim, 1 if attention.multi_query else attention.num_heads


def _big_code(attention: Any, _rows: int) -> tuple[int, int]:
    if attention.is_cross_attention:
        return 0, 1  # the forward in transformers does not match its matrix here
    return attention.head_dim, 1 if attention.multi_query else attention.num_heads


# For each layout: a function of the attention and its number of rows, to the rows of values in a stretch and repeats.
_LAYOUTS: tuple[tuple[set[str], Callable[[Any, int], tuple[int, int]]], ...] = (
    (_THIRDS, _thirds),
    (_GROUPED, _grouped),
    (_BY_HEAD, _thirds_by_head),
    (_HALVES, _halves),
    ({"FalconAttention"}, _falcon),
    ({"GPTBigCodeAttention"}, _big_code),
)
