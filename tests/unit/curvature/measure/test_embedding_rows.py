"""The embedding's rows by token frequency, against dense Gauss-Newton matrices and counts made by hand."""

from __future__ import annotations

import json
import math
from collections import Counter

import dense
import numpy as np
import pytest
import torch
from torch import nn

from sharpwatch import measure
from sharpwatch.blocks import classify
from sharpwatch.curvature.estimators.gnb import RowGroups, gnb_probe
from sharpwatch.curvature.measure.measure import Measurement, Settings
from sharpwatch.curvature.objective.batch import Batch

DRAWS = 96
VOCABULARY, WIDTH = 12, 3
# By hand: 3 occurs four times, 7 and 1 twice, 5 once.
IDS = torch.tensor([[3, 7, 3, 1], [1, 3, 7, 3], [5, 2, 2, 2]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]])


class Lookup(nn.Module):
    """A model of an embedding and a head."""

    def __init__(self, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, input_ids=None, labels=None, attention_mask=None, inputs_embeds=None):  # noqa: ARG002
        logits = self.lm_head(self.wte(input_ids) if inputs_embeds is None else inputs_embeds)
        return logits if labels is None else (logits, nn.functional.cross_entropy(logits.flatten(0, 1), labels.ravel()))


def batch(seed=1):
    ids, labels = dense.tokens(seed=seed)
    return {"input_ids": ids, "labels": labels}


def rows_of(model, *batches, **options):
    return measure(model, batches or [batch()], estimators=("gnb",), **options).embedding_rows


def looked_up(name, given):
    """All token ids that a model looks up."""
    ids = given["input_ids"].flatten().tolist()
    if name != "t5":
        return ids
    # The decoder begins with token 0 and is one behind its labels, where an ignored one is padding, which is 0.
    return ids + [max(0, token) for row in given["labels"].tolist() for token in [0, *row[:-1]]]


def deciles(ids, vocabulary=dense.VOCAB):
    """Token ids by group, with Python's own counts and sorting."""
    counts = Counter(ids)
    ordered = sorted(counts, key=lambda token: (-counts[token], token))
    groups = [group.tolist() for group in np.array_split(ordered, min(10, len(ordered)))]
    return [*groups, [token for token in range(vocabulary) if token not in counts]], counts


@pytest.mark.parametrize("name", dense.ZOO)
def test_every_group_is_within_four_standard_errors_of_the_dense_matrix(name):
    model, given = dense.ZOO[name](), batch()
    block_map = classify(model)
    exact = dense.Exact.of(model)
    root = dense.gauss_newton_root(exact, given["input_ids"], given["labels"])
    (part,) = [i for i, each in enumerate(block_map.parts) if each.type == "emb"]
    by_row = exact.by_part(block_map, root)[part].square().sum(0).view(dense.VOCAB, -1).sum(1)
    groups, counts = deciles(looked_up(name, given))

    found = rows_of(model, given, draws=DRAWS)
    assert list(found.groups) == [*map(str, range(1, 11)), "unseen"]
    for tokens, group in zip(groups, found.groups.values(), strict=True):
        truth = float(by_row[tokens].sum())
        assert abs(group.trace.value - truth) <= 4 * group.trace.stderr
        assert group.trace.stderr <= 0.35 * truth  # else 4 of them would hold nothing
        assert group.trace.draws == DRAWS
        assert group.trace.estimator == "gnb"
        assert (group.tokens, group.parameters) == (len(tokens), 16 * len(tokens))
        assert group.sharpness.value == group.trace.value / group.parameters
        assert group.sharpness.stderr == group.trace.stderr / group.parameters
        assert (group.min_count, group.max_count) == (counts[tokens[-1]], counts[tokens[0]])
        assert group.share == pytest.approx(sum(counts[token] for token in tokens) / counts.total())
    assert math.fsum(group.share for group in found.groups.values()) == pytest.approx(1)


@pytest.mark.parametrize("batches", [1, 2, 5])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_the_groups_add_up_to_the_block(name, batches):
    given = [batch(seed) for seed in range(batches)]
    report = measure(dense.ZOO[name](), given, estimators=("gnb",), draws=3)
    groups, block = report.embedding_rows.groups.values(), report.blocks["emb"]
    # A small block's norm is a sum in float32.
    assert math.fsum(group.trace.value for group in groups) == pytest.approx(block.trace.value, rel=1e-6)
    assert sum(group.parameters for group in groups) == block.parameters
    assert {group.trace.cost for group in groups} == {block.trace.cost}
    exact = measure(dense.ZOO[name]().double(), given, estimators=("gnb",), draws=3)
    total = math.fsum(group.trace.value for group in exact.embedding_rows.groups.values())
    assert total == pytest.approx(exact.blocks["emb"].trace.value, rel=1e-14)


def test_the_groups_are_of_draws_that_are_made_anyway():
    model, given = dense.gpt2(), Batch((), batch())
    block_map = classify(model)
    weight = model.transformer.wte.weight
    single = RowGroups("transformer.wte.weight", [torch.tensor([row]) for row in range(len(weight))])
    sampled = {
        groups: gnb_probe(
            model,
            block_map,
            given,
            draws=3,
            generator=torch.Generator().manual_seed(1),
            row_groups=single if groups else None,
        )
        for groups in (False, True)
    }
    assert torch.equal(sampled[False].traces, sampled[True].traces)
    assert sampled[False].row_traces is None
    assert sampled[True].row_traces.shape == (3, dense.VOCAB)
    emb = [block.type for block in block_map.layer_blocks].index("emb")
    torch.testing.assert_close(sampled[True].row_traces.sum(1), sampled[True].traces[:, emb], rtol=1e-6, atol=0)


def test_the_error_over_several_batches_is_that_of_the_blocks():
    # With one group of all tokens, group and block are the same numbers.
    ids = torch.zeros(2, 4, dtype=torch.int64)
    model = Lookup()
    model.wte = nn.Embedding(1, WIDTH)
    given = [{"input_ids": ids, "labels": labels} for labels in (ids, ids + 1, ids + 2, ids + 3)]
    for count in (1, 2, 4):
        report = measure(model, given[:count], estimators=("gnb",), draws=4)
        (group,) = report.embedding_rows.groups.values()
        assert group.trace.stderr == pytest.approx(report.blocks["emb"].trace.stderr, rel=1e-6)


def test_tokens_are_ordered_by_count_and_then_by_id():
    found = rows_of(Lookup(), {"input_ids": IDS, "labels": IDS, "attention_mask": MASK}, draws=2)
    assert {name: (g.tokens, g.max_count) for name, g in found.groups.items()} == {
        "1": (1, 4),
        "2": (1, 2),
        "3": (1, 2),
        "4": (1, 1),
        "unseen": (8, 0),
    }
    assert [g.share for g in found.groups.values()] == [4 / 9, 2 / 9, 2 / 9, 1 / 9, 0]
    # Without the mask 2 occurs three times, before 1 and 7, which are equally frequent. All tokens predict alike, so
    # a row's trace is from its own positions alone: without those of 1, its group's trace is zero.
    labels = IDS.masked_fill(IDS == 1, -100)
    found = rows_of(Lookup(), {"input_ids": IDS, "labels": labels}, draws=2)
    assert [g.max_count for g in found.groups.values()] == [4, 3, 2, 2, 1, 0]
    assert [g.trace.value == 0 for g in found.groups.values()] == [False, False, True, False, False, True]


def test_the_group_of_the_unseen_is_missing_where_every_token_occurs():
    ids = torch.arange(VOCABULARY)[None].repeat(2, 1)
    found = rows_of(Lookup(), {"input_ids": ids, "labels": ids}, draws=2)
    assert [g.tokens for g in found.groups.values()] == [2, 2, *[1] * 8]


@pytest.mark.parametrize("name", ["llama", "tied_llama", "gpt2"])
def test_a_tied_embedding_is_named_and_has_both_uses(name):
    found = rows_of(dense.ZOO[name](), draws=2)
    unseen = found.groups["unseen"].trace
    if name == "llama":
        assert found.tied == found.notes == ()
        assert (unseen.value, unseen.stderr) == (0, 0)
    else:
        assert found.tied == ("lm_head.weight",)
        assert found.notes == (f"{found.parameter} is also lm_head.weight: a row's trace is of both uses together",)
        assert unseen.value > 0


def test_other_parameters_of_the_block_are_named():
    model = Lookup()
    model.embed_norm = nn.Linear(WIDTH, WIDTH)
    report = measure(
        model,
        [{"input_ids": IDS, "labels": IDS}],
        estimators=("gnb",),
        draws=2,
        rules={"embed_norm.*": "emb", "wte.*": "emb"},
    )
    assert report.embedding_rows.others == ("embed_norm.weight", "embed_norm.bias")
    assert "the block emb also has embed_norm.weight, embed_norm.bias" in report.embedding_rows.notes


# Where there are no rows


def without_ids():
    return Lookup(), {"inputs_embeds": torch.randn(3, 4, WIDTH), "labels": IDS}


def frozen():
    model = Lookup()
    model.wte.weight.requires_grad_(False)
    return model, {"input_ids": IDS, "labels": IDS}


def computed():
    model = Lookup()
    nn.utils.parametrizations.weight_norm(model.wte)
    return model, {"input_ids": IDS, "labels": IDS}


def two_tables():
    model = Lookup()
    model.token_embedding = nn.Embedding(4, WIDTH)
    return model, {"input_ids": IDS, "labels": IDS}


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (without_ids, "a batch has no input_ids"),
        (frozen, "wte.weight is frozen"),
        (two_tables, "several embeddings are in the block emb: wte.weight, token_embedding.weight"),
        (computed, "no plain [vocabulary, width] weight of a torch.nn.Embedding is in the block emb"),
    ],
)
def test_the_reason_is_in_the_report(case, reason):
    model, given = case()
    # Another parameter stands for the block where the embedding is no part of it.
    report = measure(model, [given], estimators=("gnb",), draws=2, rules={"lm_head.*": "emb"})
    found = report.embedding_rows
    assert (found.reason, found.groups, found.parameter) == (reason, {}, "")
    assert f"embedding rows: not measured: {reason}" in str(report)
    assert report.blocks["emb"].trace.value > 0
    assert report.to_dict()["embedding_rows"]["reason"] == reason


def test_nothing_is_said_of_rows_that_were_not_asked_for():
    assert (
        measure(dense.gpt2(layers=1), [batch()], estimators=("hutchinson",), draws=2, blocks=["norm"]).embedding_rows
        is None
    )
    assert rows_of(dense.gpt2(), draws=2, blocks=["qk"]) is None


# Reports and states


def test_the_report_has_the_groups_as_text_and_as_plain_values():
    report = measure(dense.gpt2(), [batch()], estimators=("gnb",), draws=2)
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))["embedding_rows"]
    assert plain["parameter"] == "transformer.wte.weight"
    assert plain["tied"] == ["lm_head.weight"]
    for name, group in report.embedding_rows.groups.items():
        assert plain["groups"][name]["tokens"] == group.tokens
        assert plain["groups"][name]["share"] == group.share
        assert plain["groups"][name]["trace"]["value"] == group.trace.value
        assert plain["groups"][name]["sharpness"]["stderr"] == group.sharpness.stderr
    lines = str(report).splitlines()
    heading = next(i for i, line in enumerate(lines) if "tokens by frequency" in line)
    assert [line.split()[0] for line in lines[heading + 1 : heading + 12]] == list(report.embedding_rows.groups)


def half_done(draws):
    return Measurement(dense.gpt2(), [batch(), batch(2)], None, Settings(("gnb",), draws=draws, seed=3))


def test_the_groups_go_on_where_they_were_stopped():
    first, whole = half_done(2), half_done(2)
    for each in (first, whole):
        list(each.run())
    second = half_done(5)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.report().embedding_rows == whole.report().embedding_rows
    list(second.run())
    report = second.report()
    total = math.fsum(group.trace.value for group in report.embedding_rows.groups.values())
    assert total == pytest.approx(report.blocks["emb"].trace.value, rel=1e-6)
    assert {group.trace.draws for group in report.embedding_rows.groups.values()} == {5}


def test_a_state_without_rows_is_gone_on_from():
    first = half_done(2)
    list(first.run())
    old = first.state_dict()
    del old["found"]["gnb_rows"]
    second = half_done(4)
    second.load_state_dict(old)
    list(second.run())
    report = second.report()
    assert report.blocks["emb"].trace.draws == 4
    assert report.embedding_rows.reason == "the state was written by a version of sharpwatch that did not keep them"
