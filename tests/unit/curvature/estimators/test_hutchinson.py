from __future__ import annotations

import itertools

import dense
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from sharpwatch.blocks import BlockMap, Part, Rule, Rules, classify
from sharpwatch.curvature.estimators.hutchinson import (
    BaseLoss,
    Deflation,
    LossDifferences,
    hutchinson_probe,
    quadratic_forms,
)
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.objective.hessian import open_hessian
from sharpwatch.curvature.parameters.parameter_space import ParameterSpace
from sharpwatch.errors import ProbeError


def flat_weights(space):
    """The parameters of a space, as one of its vectors."""
    return space.flatten({name: space.leaves[name].detach() for name in space.names})


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gpt2():
    """As dense.gpt2, narrower: its Hessian takes a second."""
    config = dense.gpt2().config
    config.n_embd = config.n_inner = 8
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).train()


def llama():
    """As dense.llama, narrower."""
    config = dense.llama().config
    config.hidden_size = config.intermediate_size = 8
    config.num_attention_heads, config.num_key_value_heads = 2, 1
    torch.manual_seed(0)
    return LlamaForCausalLM(config).train()


@pytest.fixture(scope="module", params=[gpt2, llama], ids=["gpt2", "llama"])
def case(request):
    """A model, its batch, and its Hessian at its weights in float64."""
    model = request.param()
    ids, labels = dense.tokens()
    exact = dense.Exact.of(model)
    _, hessian = dense.gradient_and_hessian(exact, ids, labels)
    return model, Batch((), {"input_ids": ids, "labels": labels}), exact, hessian


DRAWS = 100


def drawn(model, block_map, batch, block, *, seed=0, draws=DRAWS):
    return hutchinson_probe(
        model, block_map, batch, block=block, draws=draws, generator=generator(seed), method="autograd"
    )


def within_colours(model, block_map, block, own):
    """`own`, a block's part of H, without the products of different colours and without its diagonal."""
    space = ParameterSpace(block_map, block, dict(model.named_parameters()))
    turned = space.mirrored(torch.ones(space.size)).double()
    alike = (turned.T @ turned / len(turned)).round()
    return (own * alike).fill_diagonal_(0.0)


def test_draws_scatter_about_the_trace_as_much_as_theory_says(case):
    model, batch, exact, hessian = case
    block_map = classify(model)
    for block in block_map.blocks:
        own = hessian[entries := exact.entries(block_map, block)][:, entries]
        traces = drawn(model, block_map, batch, block).traces.sum(1)
        deviation = float((2 * within_colours(model, block_map, block, own).square().sum()).sqrt())
        # Five standard errors of the mean, and five of a standard deviation whose draws have a kurtosis up to 9.
        assert abs(float(traces.mean() - own.trace())) < 5 * deviation / DRAWS**0.5, block
        assert abs(float(traces.std()) / deviation - 1) < 5 * (8 / DRAWS) ** 0.5 / 2, block
        # Independent: the correlation of successive draws has a standard error of n^-1/2.
        centred = traces - traces.mean()
        assert abs(float((centred[1:] * centred[:-1]).sum() / centred.square().sum())) < 5 / DRAWS**0.5, block


def test_layers_have_their_own_traces_and_other_blocks_none(case):
    model, batch, exact, hessian = case
    block_map = classify(model)
    diagonal = torch.cat(exact.by_part(block_map, hessian.diagonal()))
    for block in ("vo", "norm"):
        traces = drawn(model, block_map, batch, block, seed=1).traces
        assert traces.shape == (DRAWS, len(block_map.layer_blocks))
        assert traces.dtype == torch.float64
        position = 0
        truth = torch.zeros(len(block_map.layer_blocks), dtype=torch.float64)
        for part, layer_block in zip(block_map.parts, block_map.layer_block_of, strict=True):
            truth[layer_block] += diagonal[position : position + part.numel].sum()
            position += part.numel
        for index, layer_block in enumerate(block_map.layer_blocks):
            if layer_block.type != block:
                assert not traces[:, index].any()
                continue
            stderr = float(traces[:, index].std()) / DRAWS**0.5
            assert abs(float(traces[:, index].mean() - truth[index])) < 5 * stderr


def test_a_draw_is_the_quadratic_forms_of_its_patterns(case):
    model, batch, exact, hessian = case
    block_map = classify(model)
    with open_hessian(model, block_map, [batch]) as found:
        for block in block_map.blocks:
            own = hessian[entries := exact.entries(block_map, block)][:, entries]
            space = ParameterSpace(block_map, block, found.objective.live.leaves)
            patterns = space.mirrored(space.random_signs(generator(4)))
            draw = quadratic_forms(found, space, patterns, 0).sum()
            truth = torch.einsum("ki,ij,kj->k", patterns.double(), own, patterns.double()).mean()
            # float32 products: 1e-5 of the terms before they cancel.
            scale = float((patterns.double() * (patterns.double() @ own)).abs().sum(1).mean())
            assert float(draw) == pytest.approx(float(truth), abs=1e-5 * scale)


def test_the_generator_alone_decides():
    model = llama()
    ids, labels = dense.tokens()
    batch = Batch((), {"input_ids": ids, "labels": labels})
    block_map = classify(model)
    one, same, other = (drawn(model, block_map, batch, "qk", seed=seed, draws=3).traces for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    differences = hutchinson_probe(
        model, block_map, batch, block="qk", draws=3, generator=generator(1), method="differences"
    )
    assert differences.method == "gradient differences"
    assert differences.tokens == int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(differences.traces, one, rtol=0.01, atol=0.01 * float(one.abs().max()))


def test_a_frozen_block_is_refused_by_name():
    model = gpt2()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("ln" in name)
    ids, labels = dense.tokens()
    with pytest.raises(ProbeError, match="vo"):
        drawn(model, classify(model), Batch((), {"input_ids": ids, "labels": labels}), "vo", draws=2)


MAP = BlockMap(
    (Part("a", "vo", "0", None, 0, 0, 4), Part("b", "vo", "0", None, 0, 0, 4), Part("c", "vo", "1", None, 0, 0, 2)),
    {"a": (2, 2), "b": (2, 2), "c": (2,)},
)


def small_space():
    return ParameterSpace(
        MAP, "vo", {name: torch.ones(shape, requires_grad=True) for name, shape in MAP.shapes.items()}
    )


def every_sign(size):
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=size)))


def test_what_a_krylov_space_takes_off_a_draw_is_zero_in_the_mean_over_all_signs():
    # All 1024 of them: exact, whatever the basis is, per layer, with patterns and without.
    space = small_space()
    root = torch.randn(10, 10, generator=generator(1))
    hessian = root + root.T
    basis = torch.linalg.qr(torch.randn(10, 3, generator=generator(2)))[0].T
    deflation = Deflation(space, basis, basis @ hessian @ basis.T)
    signs = every_sign(10)
    plain = torch.stack([deflation.control_variate(each[None]) for each in signs])
    patterned = torch.stack([deflation.control_variate(space.mirrored(each)) for each in signs])
    assert float(plain.mean(0).abs().max()) < 1e-5
    assert float(patterned.mean(0).abs().max()) < 1e-5
    assert deflation.numel == 30


def test_a_krylov_space_of_the_extreme_vectors_takes_their_variance():
    # H = 50 uu' + noise, u spread over all entries: the draws less what is known have only the noise's variance left.
    space = small_space()
    u = torch.ones(10) / 10**0.5
    noise = torch.randn(10, 10, generator=generator(1))
    hessian = 50 * torch.outer(u, u) + (noise + noise.T) / 20
    values, vectors = torch.linalg.eigh(hessian)
    deflation = Deflation(space, vectors[:, -1:].T, values[-1:, None])
    signs = every_sign(10)
    draws = torch.einsum("ki,ij,kj->k", signs, hessian, signs).double()
    known = torch.stack([deflation.control_variate(each[None]) for each in signs]).sum(1)
    assert float((draws - known).mean()) == pytest.approx(float(hessian.trace()), rel=1e-5)
    assert float((draws - known).std()) < 0.05 * float(draws.std())
    diagonal = Deflation(space, torch.eye(10)[:2], torch.diag(torch.tensor([7.0, -3.0])))
    assert float(torch.stack([diagonal.control_variate(each[None]) for each in signs[:50]]).abs().max()) < 1e-5


def differences(found, block_map, block, *, gradients=True, signs=None):
    """Loss differences of a block, scaled as a measurement would, and the exact pilot that scales them."""
    objective = found.objective
    whole = ParameterSpace(block_map, None, objective.live.leaves)
    space = ParameterSpace(block_map, block, objective.live.leaves)
    bases = [BaseLoss.of(objective, index, whole, generator(9)) for index in range(len(objective))]
    own = [space.flatten(found.gradient(index)) for index in range(len(objective))] if gradients else None
    signs = space.random_signs(generator(8)) if signs is None else signs
    image = found.products(space, signs[None])[0]
    quadratic = float((signs.double() * image.double()).sum())
    curvature = max(abs(quadratic), 2**0.5 * float(image.norm()))
    smooth = LossDifferences.scaled(objective, space, bases=bases, gradients=own, curvature=curvature)
    return space, smooth, signs, quadratic, curvature


@pytest.mark.parametrize("gradients", [True, False])
def test_loss_differences_are_the_quadratic_forms_of_the_same_signs(case, gradients):
    model, batch, exact, hessian = case
    block_map = classify(model)
    count = 24
    with open_hessian(model, block_map, [batch]) as found:
        for block in block_map.blocks:
            own = hessian[entries := exact.entries(block_map, block)][:, entries]
            space, smooth, _, _, _ = differences(found, block_map, block, gradients=gradients)
            patterns = [space.mirrored(space.random_signs(generator(100 + index))) for index in range(count)]
            losses = torch.tensor([smooth.draw(space, each, 0) for each in patterns], dtype=torch.float64)
            truth = torch.stack([torch.einsum("ki,ij,kj->k", p.double(), own, p.double()).mean() for p in patterns])
            off = losses - truth
            # A bias of 0.2 %, five standard errors of what the third order adds, and what the base loss's error does.
            scale = max(abs(float(own.trace())), float(truth.std()))
            bound = 0.002 * scale + 5 * float(off.std()) / count**0.5 + 4 * smooth.stderr
            assert abs(float(off.mean())) < bound, block
            # The draws' own scatter hides what each one is off by.
            assert float(off.std()) < 0.35 * float(truth.std()), block


def test_loss_differences_agree_with_a_smooth_models_products(case):
    model, batch, _, _ = case
    block_map = classify(model)
    with open_hessian(model, block_map, [batch]) as found:
        for block in block_map.blocks:
            space, smooth, signs, quadratic, curvature = differences(found, block_map, block)
            assert smooth.agrees(space, signs, quadratic, curvature), block
            wrong = quadratic + 0.1 * curvature + 8 * smooth.stderr
            assert not smooth.agrees(space, signs, wrong, curvature), block


def test_of_several_batches_each_has_its_own_form_and_agreement_is_of_their_mean():
    model = gpt2()
    block_map = classify(model)
    ids, labels = dense.tokens(rows=4)
    cut = zip(torch.split(ids, [1, 3]), torch.split(labels, [1, 3]), strict=True)
    parts = [Batch((), {"input_ids": i, "labels": each}) for i, each in cut]
    with open_hessian(model, block_map, parts) as found:
        space, smooth, signs, quadratic, curvature = differences(found, block_map, "vo")
        assert smooth.agrees(space, signs, quadratic, curvature)
        for index in range(2):
            exact = float(quadratic_forms(found, space, signs[None], index).sum())
            pair = (smooth.draw(space, signs[None], index) + smooth.draw(space, -signs[None], index)) / 2
            assert pair == pytest.approx(exact, abs=0.05 * curvature + 8 * smooth.stderr)


class Routed(nn.Module):
    """Each token goes to the first of three experts by argmax: nothing in the graph says so, and the loss jumps."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(512, 8)
        self.router = nn.Linear(8, 3)
        self.experts = nn.Parameter(torch.randn(3, 8, 20))

    def forward(self, idx, targets):
        x = self.wte(idx).flatten(0, 1)
        chosen = self.experts[self.router(x).argmax(-1)]
        return F.cross_entropy((x[:, None] @ chosen).squeeze(1), targets.flatten())


def test_loss_differences_disagree_where_the_loss_jumps():
    torch.manual_seed(0)
    model = Routed()
    ids, targets = torch.arange(512).view(8, 64), torch.randint(0, 20, (8, 64))
    block_map = classify(model, Rules((Rule("router.*", block="other"), Rule("experts", block="ffn"))))
    with open_hessian(model, block_map, [Batch((ids, targets))]) as found:
        assert found.method == "autograd"
        for block, expected in (("emb", False), ("ffn", True)):
            agreed = []
            for seed in range(6):
                signs = ParameterSpace(block_map, block, found.objective.live.leaves).random_signs(generator(seed))
                space, smooth, signs, quadratic, curvature = differences(found, block_map, block, signs=signs)
                agreed.append(smooth.agrees(space, signs, quadratic, curvature))
            assert all(agreed) if expected else not any(agreed)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_the_base_losss_error_is_what_it_says(make):
    # Against float64, over 24 batches: of a mean of three with its own stderr, Student's t of 2 degrees has a median
    # size of 0.82. Rounding common to all of them adds to that.
    model = make()
    block_map = classify(model)
    twin = make().eval().double()
    scores = []
    for seed in range(24):
        ids, labels = dense.tokens(seed=seed)
        ids = ids.clamp(min=1)  # padding's embedding is zero, where a nudge turns what a norm makes of it
        with torch.no_grad():
            logits = twin(input_ids=ids).logits[:, :-1].flatten(0, 1)
            truth = float(F.cross_entropy(logits, labels[:, 1:].flatten()))
        with open_hessian(
            model, block_map, [Batch((), {"input_ids": ids, "labels": labels})], method="differences"
        ) as found:
            whole = ParameterSpace(block_map, None, found.objective.live.leaves)
            base = BaseLoss.of(found.objective, 0, whole, generator(seed))
        assert 0 < base.stderr < 1e-6 * truth  # float32: 1.2e-7
        scores.append(abs(base.value - truth) / base.stderr)
    assert float(torch.tensor(scores).median()) < 1.5
    assert max(scores) < 30  # 24 of t with 2 degrees: beyond 30 once in 40 runs


def test_the_step_is_a_share_of_the_weights_at_most():
    model = gpt2()
    block_map = classify(model)
    ids, labels = dense.tokens()
    with open_hessian(model, block_map, [Batch((), {"input_ids": ids, "labels": labels})]) as found:
        space = ParameterSpace(block_map, "ffn", found.objective.live.leaves)
        largest = 0.1 * float(flat_weights(space).square().mean().sqrt())
        bases = [BaseLoss(4.0, 1e-7)]
        for curvature in (0.0, -1.0, 1e-12):
            scaled = LossDifferences.scaled(found.objective, space, bases=bases, gradients=None, curvature=curvature)
            assert scaled.step == pytest.approx(largest)
        steep = LossDifferences.scaled(found.objective, space, bases=bases, gradients=None, curvature=1e6)
        # Half of the square of the step times the curvature is 256 of float32's roundings of the loss.
        assert steep.step**2 * 1e6 / 2 == pytest.approx(256 * 4.0 * torch.finfo(torch.float32).eps, rel=1e-6)
        assert steep.stderr == pytest.approx(2 * 1e-7 / steep.step**2)
