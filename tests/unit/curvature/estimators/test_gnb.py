from __future__ import annotations

import dense
import pytest
import torch
from torch import nn

from sharpwatch.blocks import BLOCKS, Rule, Rules, classify
from sharpwatch.curvature.estimators.gnb import gnb_probe
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.statistics.pooling import trace_estimates
from sharpwatch.curvature.statistics.sketch import CountSketch
from sharpwatch.errors import ProbeError

PROBES, WINDOW, DRAWS = 192, 8, 4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def summed(values, index, size):
    return values.new_zeros(*values.shape[:-1], size).index_add_(-1, torch.tensor(index), values)


@pytest.fixture(scope="module", params=dense.MODELS)
def measured(request):
    """A model's true traces by part, and many probes of it on the same rows."""
    model = dense.MODELS[request.param]()
    ids, labels = dense.tokens()
    block_map = classify(model)
    exact = dense.Exact.of(model)
    root = dense.gauss_newton_root(exact, ids, labels)
    truth = torch.stack([part.square().sum() for part in exact.by_part(block_map, root)])
    batch = Batch((ids,), {"labels": labels})
    source = generator()
    samples = [gnb_probe(model, block_map, batch, draws=DRAWS, generator=source) for _ in range(PROBES)]
    return block_map, truth, labels, samples


def test_the_mean_is_the_trace_of_every_layer_block(measured):
    block_map, parts, _, samples = measured
    truth = summed(parts, block_map.layer_block_of, len(block_map.layer_blocks))
    draws = torch.cat([sample.traces for sample in samples])
    stderr = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - truth).abs() < 4 * stderr).all()
    assert (stderr < 0.05 * truth).all()  # else 4 of them would hold nothing


def test_the_claimed_error_is_the_spread_of_windows(measured):
    block_map, parts, _, samples = measured
    truth = summed(parts, block_map.block_of, len(block_map.blocks))
    index = [block_map.blocks.index(block.type) for block in block_map.layer_blocks]
    traces = summed(torch.stack([sample.traces for sample in samples]), index, len(block_map.blocks))
    windows = traces.view(-1, WINDOW, DRAWS, len(block_map.blocks)).permute(3, 0, 1, 2).flatten(0, 1)
    found = trace_estimates(windows, torch.ones_like(windows, dtype=torch.bool))
    value, stderr = found.value.view(len(truth), -1), found.stderr.view(len(truth), -1)
    # 24 windows: the spread itself is known to 15 %, the mean of the claims to 6 %.
    claimed = stderr.square().mean(1).sqrt()
    assert ((claimed / value.std(1) < 1.5) & (claimed / value.std(1) > 1 / 1.5)).all()
    assert ((value.mean(1) - truth).abs() < 4 * claimed / value.shape[1] ** 0.5).all()


def test_counts_the_positions_that_predict(measured):
    _, _, labels, samples = measured
    assert {sample.tokens for sample in samples} == {int((labels[:, 1:] != -100).sum())}
    assert {sample.rows for sample in samples} == {len(labels)}


def test_sketches_are_of_the_gradients_whose_norms_are_the_traces():
    model = dense.gpt2()
    block_map = classify(model)
    sketcher = CountSketch(block_map, size=1024, seed=1)
    sample = gnb_probe(
        model, block_map, Batch((), {"input_ids": dense.tokens()[0]}), draws=3, generator=generator(), sketcher=sketcher
    )
    index = [block_map.blocks.index(block.type) for block in block_map.layer_blocks]
    traces = summed(sample.traces, index, len(block_map.blocks))
    assert sample.sketches.shape == (3, len(block_map.blocks), 1024)
    assert sample.sketches.dtype == torch.float32
    # Var |Sx|^2 <= 2 |x|^4 / size: 4.4 % standard deviation, 4 of them.
    torch.testing.assert_close(sample.sketches.double().square().sum(-1), traces, rtol=0.18, atol=0)


def test_draws_are_the_generators_alone():
    model = dense.gpt2()
    block_map = classify(model)
    batch = Batch((), {"input_ids": dense.tokens()[0]})
    first = gnb_probe(model, block_map, batch, draws=2, generator=generator(3)).traces
    torch.manual_seed(99)
    again = gnb_probe(model, block_map, batch, draws=2, generator=generator(3)).traces
    other = gnb_probe(model, block_map, batch, draws=2, generator=generator(4)).traces
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_true_labels_change_nothing_but_the_mask():
    model = dense.gpt2()
    block_map = classify(model)
    ids, labels = dense.tokens()
    other = torch.where(labels < 0, labels, (labels + 7) % dense.VOCAB)
    found = [
        gnb_probe(model, block_map, Batch((ids,), {"labels": each}), draws=2, generator=generator()).traces
        for each in (labels, other)
    ]
    assert torch.equal(*found)


def test_frozen_and_unused_parameters_count_as_zero():
    model = dense.gpt2()
    model.transformer.wpe.weight.requires_grad_(False)
    model.unused = nn.Linear(4, 4)
    block_map = classify(model, Rules((Rule("unused.*", block="other"),)))
    sample = gnb_probe(model, block_map, Batch((dense.tokens()[0],)), draws=2, generator=generator())
    other = [block.type == "other" for block in block_map.layer_blocks]
    assert (sample.traces[:, other] == 0).all()
    assert (sample.traces[:, [not each for each in other]] > 0).all()


def test_weights_of_half_the_precision_agree():
    model = dense.gpt2()
    block_map = classify(model)
    batch = Batch((dense.tokens(rows=8)[0],))
    exact = gnb_probe(model, block_map, batch, draws=2, generator=generator()).traces
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            half = gnb_probe(model, block_map, batch, draws=2, generator=generator()).traces
        # The same draws up to a label or two: bfloat16 rounds to 0.4 %, the network's depth makes some percent of it.
        torch.testing.assert_close(half, exact, rtol=0.3, atol=0)


def test_logits_fn_comes_first():
    model = dense.gpt2()
    block_map = classify(model)
    ids, labels = dense.tokens()
    batch = Batch((), {"input_ids": ids, "labels": labels})

    def logits_fn(called, given):
        assert called.config is model.config
        kept = torch.zeros(ids.shape, dtype=torch.bool)
        kept[:, 3] = True
        return called(input_ids=given.kwargs["input_ids"]).logits, kept

    sample = gnb_probe(model, block_map, batch, draws=1, generator=generator(), logits_fn=logits_fn)
    assert sample.tokens == len(ids)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sparse_gradients_are_taken():
    torch.manual_seed(0)

    class Tiny(nn.Module):
        def __init__(self, *, sparse):
            super().__init__()
            self.wte = nn.Embedding(9, 4, sparse=sparse)
            self.lm_head = nn.Linear(4, 9, bias=False)

        def forward(self, idx):
            return self.lm_head(self.wte(idx))

    dense_one, sparse_one = Tiny(sparse=False), Tiny(sparse=True)
    sparse_one.load_state_dict(dense_one.state_dict())
    ids = torch.arange(8).view(2, 4)
    found = [
        gnb_probe(each, classify(each), Batch((ids,)), draws=2, generator=generator()).traces
        for each in (dense_one, sparse_one)
    ]
    torch.testing.assert_close(*found)
    assert classify(dense_one).blocks == tuple(block for block in BLOCKS if block in {"emb", "head"})


def test_numbers_that_are_not_finite_come_through():
    model = dense.gpt2()
    with torch.no_grad():
        model.transformer.wte.weight[0, 0] = torch.nan
    sample = gnb_probe(model, classify(model), Batch((dense.tokens()[0],)), draws=1, generator=generator())
    assert not sample.traces.isfinite().all()


def test_says_that_nothing_predicts():
    model = dense.gpt2()
    ids, labels = dense.tokens()
    batch = Batch((), {"input_ids": ids, "labels": torch.full_like(labels, -100)})
    with pytest.raises(ProbeError, match="no position"):
        gnb_probe(model, classify(model), batch, draws=1, generator=generator())


def test_a_model_in_float64_is_probed_as_one_in_float32():
    model = dense.MODELS[next(iter(dense.MODELS))]()
    ids, labels = dense.tokens()
    block_map = classify(model)
    batch = Batch((ids,), {"labels": labels})
    # The same draws, unless a uniform number falls within float32's rounding of a boundary.
    single = gnb_probe(model.float(), block_map, batch, draws=2, generator=generator()).traces
    double = gnb_probe(model.double(), block_map, batch, draws=2, generator=generator()).traces
    assert torch.allclose(single, double, rtol=1e-4)
