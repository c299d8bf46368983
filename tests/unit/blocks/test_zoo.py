"""Block maps of all that transformers has, held against what transformers itself says of its models."""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings
from collections import defaultdict
from pathlib import Path

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from sharpwatch.blocks import classify

SCRIPT = Path(__file__).parents[3] / "docs" / "families.py"


def script():
    spec = importlib.util.spec_from_file_location("families", SCRIPT)
    module = sys.modules["families"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


zoo = script()
TABLE = zoo.TABLE.read_text(encoding="utf-8").splitlines()
ROWS = {tuple(line.split(" | ")[:2]): line for line in TABLE if line.startswith("| ")}
OF_THIS_VERSION = f"with transformers {transformers.__version__}. " in "\n".join(TABLE)
# Families that need a library which is not installed, or whose configuration contradicts itself.
NOT_BUILT = {"fast_vlm", "gemma3n", "perception_lm", "gemma4_assistant"}
# No attention at all: state spaces, recurrences, a Fourier transform.
WITHOUT_ATTENTION = {"falcon_mamba", "fnet", "mamba", "mamba2", "rwkv", "xlstm"}
FEED_FORWARD = re.compile(r"(layers?|blocks?|h)\.\d+\.(.+\.)?(mlp|feed_forward|ffn|experts|shared_experts?)\.")
FEED_FORWARD_LEAF = re.compile(
    r"\.((gate|up|down|gate_up)_proj|fc1|fc2|c_fc|dense_h_to_4h|dense_4h_to_h|w1|w2|w3)(\.|$)"
)
ROUTER = re.compile(r"router|\.gate\.")
IDS = [pytest.param(family, id=family.id) for family in zoo.families()]


def test_the_table_lists_every_family():
    if not OF_THIS_VERSION:
        pytest.skip("the table is of another version of transformers")
    listed = [key for key in ROWS if key != ("| family", "class")]
    assert listed == [(f"| {family.name}", family.model) for family in zoo.families()]


@pytest.fixture
def unfilled(monkeypatch):
    """On the meta device linear layers have no weights to fill; that takes a fifth of what building models takes."""
    monkeypatch.setattr(nn.Linear, "reset_parameters", lambda _: None)


@pytest.mark.usefixtures("unfilled")
@pytest.mark.parametrize("family", IDS)
def test_family(family):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about its own defaults
        if family.name in NOT_BUILT:
            with pytest.raises((ImportError, ValueError, StrictDataclassError)):
                zoo.build(family)
            return
        model = zoo.build(family)
    block_map = classify(model, strict=True)
    types = defaultdict(set)
    for part in block_map.parts:
        types[part.parameter].add(part.type)
    assert sum(block_map.numel.values()) == model.num_parameters()
    norms_are_norm(model, types)
    embeddings_and_heads_are_recognised(model, types)
    feed_forward_is_ffn(types)
    projections_are_qk_and_vo(types)
    biases_go_with_their_matrix(model, block_map)
    assert {"qk", "vo"} <= set(block_map.blocks) or family.name in WITHOUT_ATTENTION
    if OF_THIS_VERSION:
        assert ROWS[f"| {family.name}", family.model] == zoo.row(family, block_map)


def owned(module, path):
    prefix = f"{path}." if path else ""
    return [prefix + name for name, _ in module.named_parameters(recurse=False)]


def norms_are_norm(model, types):
    for path, module in model.named_modules():
        kind = type(module)
        if issubclass(kind, nn.LayerNorm | nn.GroupNorm) or kind.__name__.endswith(("LayerNorm", "RMSNorm")):
            if any(True for child in module.children() for _ in child.parameters()):
                continue
            assert all(types[name] == {"norm"} for name in owned(module, path) if name in types), path


def embeddings_and_heads_are_recognised(model, types):
    """Transformers' own accessors say which are which."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    table, head = accessor(model.get_input_embeddings), accessor(model.get_output_embeddings)
    tied = {id(getattr(module, "weight", None)) for module in model.modules() if "Embedding" in type(module).__name__}
    if isinstance(table, nn.Embedding):
        assert types[names[id(table.weight)]] == {"emb"}
    if isinstance(head, nn.Linear):
        assert types[names[id(head.weight)]] == ({"emb"} if id(head.weight) in tied else {"head"})


def accessor(get):
    try:
        return get()
    except (AttributeError, NotImplementedError):
        return None  # some models have none


def feed_forward_is_ffn(types):
    for name, found in types.items():
        inside = FEED_FORWARD.search(name)
        if inside and FEED_FORWARD_LEAF.search(name, inside.end() - 1) and not ROUTER.search(name):
            assert found == {"ffn"}, name


def projections_are_qk_and_vo(types):
    """Where queries, keys and values have matrices of the usual names, they are what they are called.

    A recurrence may call its matrices so too; then none of them is of attention.
    """
    for name in types:
        if not re.search(r"\.q_proj(\.linear)?\.weight$", name):
            continue
        q, k, v = (types.get(name.replace(".q_proj", f".{letter}_proj"), set()) for letter in "qkv")
        if q and k and v:
            assert (q - {"other"} == {"qk"} and k == {"qk"} and v == {"vo"}) or q == k == v == {"other"}, name


def biases_go_with_their_matrix(model, block_map):
    parts = defaultdict(list)
    for part in block_map.parts:
        parts[part.parameter].append((part.type, part.start, part.stop, part.repeats))
    for path, module in model.named_modules():
        weight, bias = f"{path}.weight", f"{path}.bias"
        if isinstance(module, nn.Linear) and {weight, bias} <= parts.keys():
            assert parts[weight] == parts[bias], path
