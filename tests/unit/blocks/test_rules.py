from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from sharpwatch.blocks import BLOCKS, Rule, Rules, classify, load_rules
from sharpwatch.blocks.blockmap import Split
from sharpwatch.errors import BlockError, ConfigError

D = 8
EXAMPLE = Path(__file__).parents[3] / "examples" / "block-rules.yaml"


def gpt2():
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=D, n_head=2, vocab_size=11, n_positions=6, **ids))


def types(block_map):
    return {row.parameter: row.type for row in block_map.rows}


def test_rules_override_in_order():
    rules = Rules((Rule("*.mlp.c_proj.bias", block="other"), Rule("*.mlp.*", block="norm")))
    found = types(classify(gpt2(), rules))
    assert found["transformer.h.0.mlp.c_proj.bias"] == "other"
    assert found["transformer.h.0.mlp.c_proj.weight"] == "norm"
    assert found["transformer.h.0.attn.c_proj.bias"] == "vo"


def test_a_rule_splits_what_is_not_known():
    model = nn.ModuleDict({"c_attn": nn.Linear(D, 2 * D)})  # three parts of it do not make 2 * D
    split = Split(-1, (("qk", D + 4), ("vo", D - 4)))
    rules = Rules((Rule("*c_attn.bias", split=split), Rule("*c_attn.weight", split=Split(0, split.parts))))
    fused = [part for part in classify(model, rules).parts if "c_attn" in part.parameter]
    assert [(p.type, p.dim, p.start, p.stop, p.numel) for p in fused] == [
        ("qk", 0, 0, 12, 96),
        ("vo", 0, 12, 16, 32),
        ("qk", 0, 0, 12, 12),
        ("vo", 0, 12, 16, 4),
    ]


def test_a_rule_splits_each_of_several_heads():
    model = nn.ModuleDict({"qkv": nn.Linear(D, 4 * 6)})
    split = Split(0, (("qk", 4), ("vo", 2)), repeats=4)
    block_map = classify(model, Rules((Rule("qkv.*", split=split),)))
    assert [(p.type, p.dim, p.start, p.stop, p.repeats, p.numel) for p in block_map.parts] == [
        ("qk", 0, 0, 4, 4, 16 * D),
        ("vo", 0, 4, 6, 4, 8 * D),
        ("qk", 0, 0, 4, 4, 16),
        ("vo", 0, 4, 6, 4, 8),
    ]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Rule("*.attn.q_proj.*", block="qk")], "applies to nothing: no parameter matches"),
        (
            [Rule("*", block="emb"), Rule("*.bias", block="norm")],
            "applies to nothing: earlier rules apply to all 7 parameters",
        ),
        ([Rule("*c_attn.bias", split=Split(1, (("qk", 16), ("vo", 8))))], "has no dimension 1"),
        ([Rule("*c_attn.bias", split=Split(0, (("qk", 16), ("vo", 9))))], "c_attn.bias (24,), got 25"),
        ([Rule("*c_attn.bias", split=Split(0, (("qk", 16), ("vo", 8)), repeats=2))], "c_attn.bias (24,), got 48"),
    ],
)
def test_rules_that_do_not_fit_the_model_are_refused(rules, message):
    with pytest.raises(BlockError, match=re.escape(message)):
        classify(gpt2(), Rules(tuple(rules)))


@pytest.mark.parametrize(
    "fields", [{}, {"block": "qk", "split": Split(0, (("qk", 1), ("vo", 1)))}, {"block": "attention"}]
)
def test_a_rule_that_can_not_be(fields):
    with pytest.raises(BlockError, match=re.escape("rule '*'")):
        Rule("*", **fields)


def test_the_example_is_read():
    grouped = (("qk", 640), ("vo", 128))
    assert load_rules(EXAMPLE) == Rules(
        (
            Rule("*.attention.scale", block="norm"),
            Rule("*.attention.qkv.weight", split=Split(0, grouped)),
            Rule("*.attention.qkv.bias", split=Split(0, grouped)),
            Rule("*.cross.qkv.*", split=Split(0, (("qk", 128), ("vo", 64)), repeats=12)),
        )
    )


SPLIT = {"dim": 0, "parts": [{"block": "qk", "size": 16}, {"block": "vo", "size": 8}]}


@pytest.mark.parametrize(
    "rules",
    [
        {"*.wpe.*": "emb", "*c_attn.bias": {"split": SPLIT}},
        [{"match": "*.wpe.*", "block": "emb"}, {"match": "*c_attn.bias", "split": SPLIT}],
        ({"match": "*.wpe.*", "block": "emb"}, Rule("*c_attn.bias", split=Split(0, (("qk", 16), ("vo", 8))))),
        Rules((Rule("*.wpe.*", block="emb"), Rule("*c_attn.bias", split=Split(0, (("qk", 16), ("vo", 8)))))),
    ],
    ids=["dict", "list", "mixed", "Rules"],
)
def test_rules_may_be_given_in_several_forms(rules):
    found = classify(gpt2(), rules)
    assert types(found)["transformer.wpe.weight"] == "emb"
    assert [(p.type, p.numel) for p in found.parts if p.parameter.endswith("c_attn.bias")] == [("qk", 16), ("vo", 8)]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"*.wpe.*": "embedding"}, "rules[0].block: 'embedding' is not a block type; allowed: emb, qk, vo, ffn"),
        ({"*.wpe.*": 3}, "rules[0].block: expected a string"),
        ({3: "emb"}, "rules[0].match: expected a string"),
        ({"*.wpe.*": {"dim": 0, "parts": []}}, "rules[0].dim: unknown key; allowed: block, match, split"),
        ({"*.wpe.*": {"split": {"dim": 0, "parts": []}}}, "rules[0].split.parts: expected two parts or more"),
        ([{"match": "*"}], "rules[0]: give either block or split"),
        (["*.wpe.*"], "rules[0]: expected a mapping with keys block, match, split"),
        (7, "rules must be a dict by glob, a list of rules or the path of a file, got int"),
    ],
)
def test_rules_that_can_not_be_name_their_place(rules, message):
    with pytest.raises(BlockError, match=re.escape(message)):
        classify(gpt2(), rules)


def test_classify_takes_the_path_of_a_file(tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text('- {match: "transformer.wpe.weight", block: emb}\n')
    assert types(classify(gpt2(), rules=str(path)))["transformer.wpe.weight"] == "emb"


@pytest.mark.parametrize(
    ("text", "line", "key", "message"),
    [
        ("", 1, "rules", "expected a list of rules"),
        ("match: a\nblock: qk\n", 1, "rules", "expected a list"),
        ("- match: a\n  block: qk\n- [1]\n", 3, "rules[1]", "expected a mapping with keys block, match, split"),
        ("- match: a\n  blok: qk\n", 2, "rules[0].blok", "unknown key; allowed: block, match, split"),
        ("- match: a\n  block: attention\n", 2, "rules[0].block", f"allowed: {', '.join(BLOCKS)}"),
        ("- match: a\n  block: 3\n", 2, "rules[0].block", "expected a string"),
        ("- match: a\n  block: qk\n  block: vo\n", 3, "rules[0].block", "given twice"),
        ("- block: qk\n", 1, "rules[0].match", "is missing"),
        ("- match: a\n", 1, "rules[0]", "give either block or split"),
        (
            "- match: a\n  split:\n    repeats: 0\n    dim: 0\n    parts: [{block: qk, size: 1}, {block: vo, size: 2}]",
            3,
            "rules[0].split.repeats",
            "expected an integer of 1 or more",
        ),
        ("- match: a\n  split: {dim: x, parts: []}\n", 2, "rules[0].split.parts", "expected two parts or more"),
        (
            "- match: a\n  split:\n    dim: x\n    parts: [{block: qk, size: 1}, {block: vo, size: 1}]\n",
            3,
            "rules[0].split.dim",
            "expected an integer",
        ),
        (
            "- match: a\n  split:\n    dim: 0\n    parts:\n    - {block: qk, size: 1}\n    - {block: vo, size: 0}\n",
            6,
            "rules[0].split.parts[1].size",
            "expected an integer of 1 or more",
        ),
        ("- match: 'a\n  block: qk\n", 3, "rules", "is not YAML"),
        ("- match: *a\n", 1, "rules", "is not YAML"),
    ],
)
def test_a_file_that_can_not_be_names_line_key_and_what_is_allowed(tmp_path, text, line, key, message):
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_rules(path)
    assert (caught.value.file, caught.value.line, caught.value.key) == (str(path), line, key)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_rules(tmp_path / "none.yaml")


def test_a_file_nested_too_deeply_is_refused_like_all_else(tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text("[" * 2000)
    with pytest.raises(ConfigError, match="rules: is nested too deep"):
        load_rules(path)
