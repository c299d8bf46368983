"""How scripts/newer_transformers.py compares two tables of model families."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "newer_transformers.py"


def script():
    spec = importlib.util.spec_from_file_location("newer_transformers", SCRIPT)
    module = sys.modules["newer_transformers"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


newer = script()
HEAD = "Written by `python docs/families.py` with transformers {}. 4 of 5\n\n| family | class | kind |\n|---|---|---|"
BEFORE = "\n".join(
    [
        HEAD.format("5.1.0"),
        "| bert | BertForMaskedLM | masked |  | 23 | 14 |",
        "| bert | BertLMHeadModel | causal |  | 23 | 14 |",
        "| gpt2 | GPT2LMHeadModel | causal | `c_attn` (qk 1536, vo 768) | 38 |",
        "| llama | LlamaForCausalLM | causal |  | 131 |",
        "| timm | TimmForCausalLM | causal | not built: ImportError: no timm | |",
    ]
)
NOW = "\n".join(
    [
        HEAD.format("5.2.0"),
        "| bert | BertForMaskedLM | masked |  | 23 | 14 |",
        "| bert | BertLMHeadModel | causal |  | 23 | 15 |",
        "| gpt2 | GPT2LMHeadModel | causal | not classified: BlockError: c_attn (768, 2304) | |",
        "| gpt3 | GPT3LMHeadModel | causal |  | 38 |",
        "| gpt4 | GPT4LMHeadModel | causal | not built: ValueError: head_dim | |",
        "| timm | TimmForCausalLM | causal | not built: ImportError: no timm | |",
    ]
)


def test_each_class_that_is_classified_otherwise_is_a_difference():
    assert [(found.kind, found.model) for found in newer.compare(BEFORE, NOW)] == [
        ("changed", "bert BertLMHeadModel"),
        ("failing", "gpt2 GPT2LMHeadModel"),
        ("added", "gpt3 GPT3LMHeadModel"),
        ("failing", "gpt4 GPT4LMHeadModel"),
        ("gone", "llama LlamaForCausalLM"),
    ]


def test_a_table_does_not_differ_from_itself():
    assert newer.compare(BEFORE, BEFORE) == []


def test_the_report_shows_both_rows_and_the_counts():
    lines = newer.report(newer.compare(BEFORE, NOW)).splitlines()
    assert lines[:3] == ["changed: bert BertLMHeadModel", "  - causal |  | 23 | 14 |", "  + causal |  | 23 | 15 |"]
    assert lines[-1] == "1 added, 1 gone, 1 changed, 2 failing"


def test_the_shipped_table_is_read_whole():
    table = newer.TABLE.read_text(encoding="utf-8")
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(newer.compare("", table)) == len(rows)
