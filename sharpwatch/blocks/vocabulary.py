"""The words by which transformers name their modules, and what each says about a parameter.

A name stands for its words and its pairs of adjacent words: "FeedForward" is feed, forward and feed_forward.
"""

from __future__ import annotations

import itertools
import re
from functools import cache

# Embeddings: of tokens they are `emb`; of positions or kinds, which are added to every token, they are `other`.
TOKEN = {
    "wte",
    "tok",
    "token",
    "tokens",
    "word",
    "vocab",
    "emb",
    "embed",
    "embeds",
    "embedding",
    "embeddings",
    "shared",
}
POSITION = {"wpe", "pos", "position", "positions", "positional", "relative", "rel", "r", "row", "column", "tile"}
KIND = {"type", "segment", "seg", "bias", "biases", "ngram", "global", "query"}

NORM = {"norm", "ln", "layernorm", "rmsnorm"}
# Matrices that compute the scales and shifts of norms from a condition.
MODULATION = {"modulation", "modulations", "modulate", "mod", "adaln", "ada_ln"}

FEED_FORWARD = {"mlp", "ffn", "ff", "ffwd", "feedforward", "feed_forward", "moe", "mo_e", "expert", "experts"}
FEED_FORWARD |= {"dense_relu"}  # T5's DenseReluDense
# Linear layers of a feed-forward part without a module of its own, or in one with a generic name.
FEED_FORWARD_LINEAR = {"fc1", "fc2", "linear1", "linear2", "lin1", "lin2", "c_fc", "fc_in", "fc_out", "w1", "w2", "w3"}
FEED_FORWARD_LINEAR |= {"up_proj", "down_proj", "gate_proj", "gate_up_proj", "wi", "wi_0", "wi_1", "wo"}
FEED_FORWARD_LINEAR |= {"dense_h_to_4h", "dense_4h_to_h", "intermediate.dense", "output.dense", "ffn_output"}
FEED_FORWARD_LINEAR |= {"intermediate_query.dense", "output_query.dense", "intermediate.conv1d", "output.conv1d"}
# Words of attention, in the names of modules and matrices.
ATTENTION = {"attn", "attention", "msa", "qkv", "q", "k", "v", "kv", "query", "key", "value", "wqkv"}
# Output projections of attention without a module of its own.
ATTENTION_LINEAR = {"post_attention.conv1d"}

# The matrix that predicts tokens, and the parts between it and the last layer.
HEAD = {"lm_head", "head", "output", "embed_out", "unembed", "unembedding", "output_projection", "to_logits", "decoder"}
HEAD_PART = {"head", "lm_heads", "predictions", "vocab_transform", "pred_layer", "lm_loss", "decoder_head"}

# Matrices that are recognized by the class of their module: (class, name).
BY_CLASS = {("ZambaHybridLayer", "linear"): "other", ("Zamba2HybridLayer", "linear"): "other"}
BY_CLASS |= {("InklingVisionEncoderLayer", "projection"): "other"}
BY_CLASS |= {("Apertus1p5VisionTokenizerVectorQuantizer", "embedding"): "other"}  # scores patches; not a lookup table
BY_CLASS |= {("Kosmos2ImageToTextProjection", "dense"): "other", ("Kosmos2_5ImageToTextProjection", "dense"): "other"}
BY_CLASS |= {("JetMoeMoA", "input_linear"): "qk", ("JetMoeMoA", "output_linear"): "vo"}  # experts of attention

# Choose experts, or the keys to attend to.
ROUTER = {"router", "routers", "indexer", "correction_bias", "expert_bias"}
# Mix tokens by a recurrence or a convolution: recognized by name, or by their parameters.
MIXER = {"mamba", "lightning_attention", "recurrent_block", "short_conv", "short_convolution"}
CONVOLUTION = {"conv", "sconv", "convs", "depthwise"}
RECURRENCE = {"A_log", "time_decay", "igate_preact", "weight_hh_l0"}
GATE = {"gate", "gates"}  # of a stream of features
STREAM = {"proj_in", "proj_out"}  # lead into and out of the layers within a layer, as in UNets
# Connect the towers of a model, two widths, or layers, or precede the first layer.
CONNECTOR = {"projector", "merger", "aligner", "connector", "adapter", "resampler", "neck", "pooler", "bottleneck"}
CONNECTOR |= {"patch", "embedding", "embeddings", "embedder", "embed", "per_layer", "altup", "laurel", "residual"}
CONNECTOR |= {"hyper_connection", "hyper_head", "hc", "language_projection", "vision_projection", "visual_projection"}
CONNECTOR |= {"time_emb", "time_embed", "time_embedding", "time_proj", "time_projection", "timestep", "shortcut"}
CONNECTOR |= {"embeds", *MODULATION}
CONNECTOR |= {"action", "conditioning", "projectors", "message_gate", "pre_projection", "post_projection"}
# Towers for inputs other than text: outside of their layers nothing predicts tokens.
TOWER = {"vision", "visual", "image", "video", "audio", "speech", "ctc", "protein"}
# Vectors and small matrices on their own: learned inputs, gates, scales, attention sinks.
LOOSE = {"sink", "sinks", "gate", "scale", "lambda", "lambdas", "alpha", "gamma", "latents", "latent", "residual"}
LOOSE |= {"token", "tokens", "class_embedding", "newline", "separator", "mask_emb", "silence", "init", "probe"}
LOOSE |= {"temperature", "modulation", "hidden_states", "scaling", "a", "dt", "sqk"}

# Roles of attention matrices. `latent`: keys and values of several heads are both computed from it.
ROLES = {"q": "q", "wq": "q", "query": "q", "k": "k", "wk": "k", "key": "k", "v": "v", "wv": "v", "value": "v"}
ROLES |= {"o": "o", "wo": "o", "out": "o", "output": "o", "": "o"}
ROLES |= dict.fromkeys(("attn", "qkv", "wqkv", "query_key_value", "kv"), "fused")
ROLES |= {"in": "in"}  # fused; within attention nothing else has that name
ROLES |= {"query_key": "qk"}  # one matrix serves as both
ROLES |= {"q_a": "q", "q_b": "q", "kv_a_with_mqa": "latent", "kv_b": "fused", "o_a": "o", "o_b": "o"}
ROLES |= dict.fromkeys(("gate", "g", "output_gate"), "gate")
ROLES |= {"q_attn": "q", "q_gate": "q", "v_current": "v", "v_delayed": "v", "key_protein": "k", "value_protein": "v"}
ROLES |= {"attention_out": "o", "post": "o", "layer": "o", "out_layer": "o"}
# LUKE's queries between words and entities; "w" is filler.
ROLES |= dict.fromkeys(("2_e_query", "e_2_query", "e_2_e_query"), "q")
FILLER = {"proj", "projection", "project", "lin", "linear", "w", "c", "to", "weight", "bias", "dense"}
FILLER |= {"head", "global", "add"}

_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")


@cache
def words(name: str) -> tuple[str, ...]:
    """Split `name` into lower-case words: "T5LayerNorm" is (t, 5, layer, norm), "q_proj" is (q, proj)."""
    return tuple(word.lower() for word in _WORD.findall(name))


@cache
def terms(*names: str) -> frozenset[str]:
    """The words of `names`, and the pairs of adjacent words in each."""
    each = [words(name) for name in names]
    pairs = ("_".join(pair) for name in each for pair in itertools.pairwise(name))
    return frozenset(itertools.chain(*each, pairs))


@cache
def role(name: str) -> str | None:
    """The role of an attention matrix by its name: q, k, v, o, qk, gate, latent or fused; None if unknown."""
    return ROLES.get(plain(name))


@cache
def is_plain(name: str) -> bool:
    """Whether `name` is generic, such as proj, dense or linear."""
    return not plain(name)


@cache
def plain(name: str) -> str:
    """`name` without its generic words: "q_proj" is q."""
    return "_".join(word for word in words(name) if word not in FILLER)
