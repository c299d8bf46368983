"""Writes docs/families.md, the table of the families that block maps are made for: `python docs/families.py [FILE]`.

Each family of transformers is built as its configuration stands by default, on the meta device: no weights, no memory.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sharpwatch.blocks import BLOCKS, BlockMap, classify
from sharpwatch.errors import BlockError

TABLE = Path(__file__).with_name("families.md")

_MAPPINGS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "encoder-decoder": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "image to text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}

# What a family's configuration needs where its defaults make no model, or one without the attention that it is for.
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_COMPASS = {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}
_INDEXER = {"n_heads": 4, "kv_heads": 1, "head_dim": 256, "budget": 1024, "compress_ratio": 4}
_QWEN4 = {f"indexer_{name}": value for name, value in _INDEXER.items()}
_OPTIONS: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model"}},
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "chameleon": {"vocabulary_map": {"<image>": 1}},
    "cohere_compass": {"text_config": _COMPASS},
    "cohere_compass_text": _COMPASS,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 8}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense"] + 31 * ["sparse"]}},
    "diffusion_gemma": {"text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 1024}},
    "dots1": {"n_shared_experts": 2, "n_routed_experts": 8},
    "emu3": {"vocabulary_map": {"<image>": 1}},
    "esm": {"vocab_size": 33},
    "granite4_vision": {"deepstack_layer_map": [(3, 6), (7, 9)], "downsample_rate": "4/8"},
    "granitemoehybrid": {"layer_types": 8 * ["mamba", "mamba", "mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "lfm2_moe": {"layer_types": 8 * ["conv", "conv", "conv", "full_attention"], "num_hidden_layers": 32},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"is_decoder": True},
}
# Causal models that take the text part of their family's configuration.
_PART_OF_SEVERAL = {
    "dots3_note",
    "emu3",
    "llama4",
    "musicgen",
    "musicgen_melody",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen4_exp",
}


@dataclass(frozen=True)
class Family:
    """One model class of one model type, and what it is registered for."""

    name: str
    model: str
    kinds: tuple[str, ...]

    @property
    def id(self) -> str:
        """What tells it from all others."""
        return f"{self.name}-{self.model}"


def families() -> list[Family]:
    """All that the installed transformers has, by name."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for kind, mapping in _MAPPINGS.items():
        for name, model in mapping.items():
            kinds.setdefault((name, model if isinstance(model, str) else model[0]), []).append(kind)
    return [Family(name, model, tuple(found)) for (name, model), found in sorted(kinds.items())]


def build(family: Family) -> nn.Module:
    """The family's model without weights. Raises whatever transformers raises."""
    options = _OPTIONS.get(family.name, {})
    if family.name == "reformer" and "masked" in family.kinds:
        options = {}
    config = CONFIG_MAPPING[family.name](**options)
    if family.kinds == ("causal",) and family.name in _PART_OF_SEVERAL:
        config = config.get_text_config(decoder=True)
    with torch.device("meta"):
        return getattr(transformers, family.model)(config)


def _divided(family: Family) -> BlockMap | Exception:
    try:
        model = build(family)
    except Exception as error:  # noqa: BLE001 - whatever stops transformers is the reason
        return error
    try:
        return classify(model, strict=True)
    except BlockError as error:
        return error


def splits(block_map: BlockMap) -> Iterator[str]:
    """How each fused matrix is laid out: one line for each name and layout."""
    fused: dict[str, list[str]] = {}
    repeats: dict[str, int] = {}
    for part in block_map.parts:
        if part.dim is not None and part.parameter.endswith("weight"):
            fused.setdefault(part.parameter, []).append(f"{part.type} {part.stop - part.start}")
            repeats[part.parameter] = part.repeats
    layouts = {}
    for parameter, sizes in fused.items():
        times = f"{repeats[parameter]} × " if repeats[parameter] > 1 else ""
        layouts[f"`{parameter.split('.')[-2]}` {times}({', '.join(sizes)})"] = None
    yield from layouts


def row(family: Family, block_map: BlockMap | Exception) -> str:
    """The family's line of the table: its blocks, or what stopped transformers."""
    start = f"| {family.name} | {family.model} | {', '.join(family.kinds)} |"
    if isinstance(block_map, Exception):
        error = block_map
        what = "not classified" if isinstance(error, BlockError) else "not built"
        reason = " ".join(str(error).split()).replace("|", "/")[:90]
        return f"{start} {what}: {type(error).__name__.removeprefix('StrictDataclass')}: {reason} |" + " |" * 7
    sizes = Counter(block_map.numel)
    return f"{start} {'; '.join(splits(block_map))} |" + "".join(f" {_millions(sizes[block])} |" for block in BLOCKS)


def _millions(count: int) -> str:
    return f"{count / 1e6:,.0f}" if count >= 1e9 else f"{count / 1e6:.4g}" if count else ""


def main(table: Path = TABLE) -> None:
    """Write the table to this file."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = [row(family, _divided(family)) for family in families()]
    built = sum("| not " not in line for line in rows)
    names = "".join(f" {block} |" for block in BLOCKS)
    head = _HEAD.format(version=transformers.__version__, built=built, total=len(rows))
    lines = [
        head,
        f"| family | class | kind | fused matrices |{names}",
        "|---|---|---|---|" + "---:|" * len(BLOCKS),
        *rows,
    ]
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")


_HEAD = """# Model families

Written by `python docs/families.py` with transformers {version}. {built} of {total} model classes were built on the
meta device, with their configurations' defaults, and divided into blocks. Numbers are millions of parameters. A
fused matrix shows its parts along the outputs, in order; `12 × (qk 128, vo 64)` means once for each of 12 heads.

Where parameters go that are not plain embeddings, attention, feed-forward or norms:

- **Latent attention** (DeepSeek-V2 and later). `q_a` and `q_b` are qk. In `kv_b`, each head's key without position is
  qk and its value vo. In `kv_a`, the rows of the latent, from which both keys and values are made, are vo, and the
  rotated key that all heads share is qk. A matrix that serves both gets the block of the sharper one, since it bears
  no larger learning rate than that. For the same reason, keys that are also the values (DeepSeek-V4, Gemma 4's global
  layers) are vo.
- **Gates of attention's output** are other, also where they are fused with the queries (Qwen3-Next).
- **Recurrences and short convolutions** (Mamba, gated delta nets, RWKV's time mixing, lightning attention, xLSTM) are
  other as a whole, whatever their matrices are called; their norms are norm.
- **Experts** are ffn. Routers, their bias corrections, gates of shared experts, and the indexers of sparse attention
  are other. JetMoE's experts of attention are qk and vo.
- **Positions**, relative or absolute, token types, attention sinks, residual scales and learned queries are other,
  and so are the projections of positions to keys (`r`, `pos_key_proj`).
- **Vision and audio towers**: attention, feed-forward and norms of their layers are qk, vo, ffn and norm, in layers
  named after the tower. Patch embeddings and convolutional frontends are other: they are matrices that all patches
  pass through, not rows that a token looks up. The projectors between towers are other too.
- **Heads**: everything between the last layer and the matrix that predicts tokens is head. A tied matrix is emb, with
  its bias.
"""


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
