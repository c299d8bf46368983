from __future__ import annotations

import gc
import random
import weakref

import dense
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import nn
from torch.nn.modules import module as torch_module

from sharpwatch.blocks import Rule, Rules, classify
from sharpwatch.curvature.estimators.directional import direction_probe
from sharpwatch.curvature.estimators.gnb import gnb_probe
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.state.isolation import isolated

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def generator():
    return torch.Generator().manual_seed(0)


def displacement(model):
    return {name: 0.01 * parameter.detach() for name, parameter in model.named_parameters()}


class BoomError(Exception):
    pass


class Raising:
    """A sketcher that fails in the second draw."""

    def __init__(self):
        self.calls = 0

    def sketch(self, gradients):
        self.calls += 1
        if self.calls == 2:
            raise BoomError
        return torch.zeros(len(gradients), 64)


def probe(model, ids, labels, kind):
    batch, block_map = Batch((ids,), {"labels": labels}), classify(model)
    if kind == "gnb":
        gnb_probe(model, block_map, batch, draws=2, generator=generator())
    elif kind == "direction":
        direction_probe(model, block_map, batch, displacement(model), blocks=block_map.blocks)
    elif kind == "gnb raises":
        with pytest.raises(BoomError):
            gnb_probe(model, block_map, batch, draws=3, generator=generator(), sketcher=Raising())
    elif kind == "direction raises":

        def loss_fn(called, given):
            called(*given.args, **given.kwargs)
            torch.rand(3)
            raise BoomError

        with pytest.raises(BoomError):
            direction_probe(model, block_map, batch, displacement(model), blocks=(), loss_fn=loss_fn)


KINDS = ("gnb", "direction", "gnb raises", "direction raises")


def train(kind, steps=4):
    """Training with dropout, gradient accumulation over two batches, and a probe between backward and step."""
    model = dense.gpt2(dropout=0.3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(7)
    losses = []
    for step in range(steps):
        for half in range(2):
            ids, labels = dense.tokens(seed=2 * step + half)
            loss = model(ids, labels=labels).loss
            loss.backward()
            losses.append(loss.detach())
        probe(model, ids, labels, kind)
        optimizer.step()
        probe(model, ids, labels, kind)
        optimizer.zero_grad()
    return torch.stack(losses), model.state_dict(), torch.get_rng_state()


@pytest.fixture(scope="module")
def alone():
    return train(None)


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_bit_identical(alone, kind):
    losses, state, random = train(kind)
    assert torch.equal(losses, alone[0])
    assert all(torch.equal(state[name], values) for name, values in alone[1].items())
    assert torch.equal(random, alone[2])


class Odd(nn.Module):
    """Buffers it updates, attributes it sets, a norm with running statistics, a torch hook that computes its weight."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(dense.VOCAB, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.lm_head = nn.utils.spectral_norm(nn.Linear(8, dense.VOCAB))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("lazy", None)
        self.calls = 0
        self.last = None

    def forward(self, idx, labels=None):
        self.seen += 1
        self.calls += 1
        if not hasattr(self, "cache"):
            self.cache = torch.ones(8)
            self.lazy = torch.ones(8)
        self.last = self.drop(self.norm(self.wte(idx).transpose(1, 2))).transpose(1, 2) * self.cache
        logits = self.lm_head(self.last)
        return logits, None if labels is None else F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        )


def blocks_of(model):
    return classify(model, Rules((Rule("norm.*", block="norm"), Rule("lm_head.*", block="head"))))


def run_odd(model, kind, ids, labels):
    batch = Batch((ids,), {"labels": labels})
    if kind == "gnb":
        return gnb_probe(model, blocks_of(model), batch, draws=2, generator=generator()).traces
    step = displacement(model)
    return direction_probe(model, blocks_of(model), batch, step, blocks=("norm",)).block_descent


@pytest.mark.parametrize("kind", ["gnb", "direction"])
def test_every_flag_buffer_attribute_and_gradient_is_as_before(kind):
    torch.manual_seed(0)
    model = Odd()
    ids, labels = dense.tokens()
    model(ids, labels)[1].backward()
    model.drop.eval()  # a flag of its own
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    copies = {name: grad.clone() for name, grad in gradients.items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    attributes = [dict(vars(module)) for module in model.modules()]
    parameters = dict(model.named_parameters())
    random = torch.get_rng_state()
    run_odd(model, kind, ids, labels)
    assert torch.equal(torch.get_rng_state(), random)
    for module, saved in zip(model.modules(), attributes, strict=True):
        assert list(vars(module)) == list(saved)
        assert all(vars(module)[name] is value for name, value in saved.items())
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in parameters.items())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert all(parameter.grad is gradients[name] for name, parameter in model.named_parameters())
    assert all(torch.equal(parameter.grad, copies[name]) for name, parameter in model.named_parameters())
    assert [module.training for module in (model, model.norm, model.drop)] == [True, True, False]


def test_what_a_first_forward_sets_up_is_taken_away_again():
    torch.manual_seed(0)
    model = Odd()
    run_odd(model, "gnb", *dense.tokens())
    assert not hasattr(model, "cache")
    assert model.lazy is None
    assert model.calls == 0


def test_no_graph_is_kept_alive():
    model = dense.gpt2()
    ids, labels = dense.tokens()
    kept = []

    def loss_fn(called, given):
        loss = called(*given.args, **given.kwargs).loss
        kept.extend([weakref.ref(loss), *(weakref.ref(leaf) for leaf in called.leaves.values())])
        return loss

    direction_probe(
        model, classify(model), Batch((ids,), {"labels": labels}), displacement(model), blocks=("qk",), loss_fn=loss_fn
    )
    gc.collect()
    assert kept
    assert not any(reference() is not None for reference in kept)


# Of torch, about the hooks that this test lays on every module, whose outputs and inputs are not all tensors.
@pytest.mark.filterwarnings("ignore:For backward hooks to be called", "ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_are_bypassed_and_restored(kind):
    model = dense.gpt2()
    ids, labels = dense.tokens()
    calls = []

    def count(*_):
        calls.append(1)

    layer = model.transformer.h[0].mlp
    handles = [
        layer.register_forward_hook(count),
        layer.register_forward_pre_hook(count),
        layer.register_full_backward_hook(count),
        layer.register_full_backward_pre_hook(count),
        torch_module.register_module_forward_hook(count),
        torch_module.register_module_forward_pre_hook(count),
        torch_module.register_module_full_backward_hook(count),
        model.transformer.wte.weight.register_hook(count),
        model.transformer.wte.weight.register_post_accumulate_grad_hook(count),
    ]
    node = model.transformer.h[0].mlp.c_fc.weight.view(-1).grad_fn.next_functions[0][0]
    handles.append(node.register_hook(count))
    registries = [vars(layer)[name] for name in HOOKS]
    try:
        probe(model, ids, labels, kind)
        assert calls == []
        assert all(vars(layer)[name] is registry for name, registry in zip(HOOKS, registries, strict=True))
        model(ids, labels=labels).loss.backward()
        assert len(calls) > len(handles)
    finally:
        for handle in handles:
            handle.remove()
    assert not any(vars(layer)[name] for name in HOOKS)


def test_a_hook_of_torchs_own_is_kept():
    # Spectral norm makes the weight in a hook: without it the head would see a stale one, and its own no gradient.
    torch.manual_seed(0)
    model = Odd()
    traces = run_odd(model, "gnb", *dense.tokens())
    head = [block.type == "head" for block in blocks_of(model).layer_blocks]
    assert (traces[:, head] > 0).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("kind", KINDS)
def test_the_grad_mode_around_it_does_not_matter_and_stays(mode, kind):
    model = dense.gpt2()
    with mode():
        ids, labels = dense.tokens()
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        probe(model, ids, labels, kind)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_and_attention_settings_stay(kind):
    model = dense.gpt2()
    ids, labels = dense.tokens()
    seen = []

    def settings():
        return (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        )

    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = settings()
        probe(model, ids, labels, kind)
        assert settings() == before
        with isolated(model) as live:
            seen.append(live(ids).logits.dtype)
            assert not torch.is_autocast_cache_enabled()
    assert seen == [torch.bfloat16]


def test_autocast_keeps_no_cast_of_a_probe():
    # A cast in autocast's cache would be used by the next training forward: its gradients would go astray.
    model = dense.gpt2(dropout=0.0)
    ids, labels = dense.tokens()
    found = []
    for probed in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if probed:
                probe(model, ids, labels, "gnb")
                probe(model, ids, labels, "direction")
            model(ids, labels=labels).loss.backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_dropout_is_off_inside():
    model = dense.gpt2(dropout=0.5)
    ids, _ = dense.tokens()
    with isolated(model) as live:
        assert torch.equal(live(ids).logits, live(ids).logits)
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_a_tied_head_stays_tied():
    model = dense.gpt2()
    ids, _ = dense.tokens()
    assert model.lm_head.weight is model.transformer.wte.weight
    with isolated(model) as live:
        assert "lm_head.weight" not in live.leaves
        wte = live.leaves["transformer.wte.weight"]
        unused = (~torch.isin(torch.arange(dense.VOCAB), ids)).nonzero().flatten()
        (gradient,) = torch.autograd.grad(live(ids).logits.square().sum(), wte)
        assert (gradient[unused].abs().sum(1) > 0).all()  # rows that only the head's use of it reaches
    assert model.lm_head.weight is model.transformer.wte.weight


# A gloo process group joins its worker thread where it is freed, while it holds the interpreter's lock, for which that
# worker may still be waiting after a backward: a deadlock inside torch. Kept to the end, it is freed when all is idle.
_KEPT: list[nn.Module] = []


def test_a_wrapped_model_runs_without_its_wrapper():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = dense.gpt2()
        wrapped = nn.parallel.DistributedDataParallel(model)
        _KEPT.append(wrapped)
        ids, labels = dense.tokens()
        batch = Batch((ids,), {"labels": labels})
        bare = gnb_probe(model, classify(model), batch, draws=1, generator=generator())
        found = gnb_probe(wrapped, classify(wrapped), batch, draws=1, generator=generator())
        direction_probe(wrapped, classify(wrapped), batch, displacement(wrapped), blocks=())
        assert torch.equal(found.traces.sum(1), bare.traces.sum(1))
        assert all(parameter.grad is None for parameter in wrapped.parameters())
        wrapped(ids, labels=labels).loss.backward()
        assert all(parameter.grad is not None for parameter in wrapped.parameters())
    finally:
        torch.distributed.destroy_process_group()


class Busy(nn.Module):
    """Its forward draws from every random source there is, and keeps books in attributes of every kind."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(11, 8)
        self.lm_head = nn.Linear(8, 11)
        self.source = torch.Generator().manual_seed(5)
        self.seen, self.counts, self.names, self.total = [], {"calls": 0}, set(), torch.zeros(())

    def forward(self, ids, targets):
        noise = random.random() + np.random.rand() + torch.rand((), generator=self.source)  # noqa: NPY002, S311
        self.seen.append(float(noise))
        self.counts["calls"] += 1
        self.names.add(self.counts["calls"])
        self.total.add_(noise)
        logits = self.lm_head(self.wte(ids))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten()) * (1 + self.total)

    def books(self):
        return [*self.seen], dict(self.counts), set(self.names), float(self.total), self.source.get_state().tolist()


@pytest.mark.parametrize("take", [gnb_probe, direction_probe])
def test_every_random_source_and_what_modules_keep_in_place_are_restored(take):
    model = Busy()
    ids = torch.randint(11, (2, 5))
    model(ids, ids)
    kept = model.seen, model.counts, model.names, model.total, model.source
    before = model.books(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    block_map = classify(model)
    if take is gnb_probe:
        gnb_probe(model, block_map, Batch((ids, ids)), draws=2, generator=generator())
    else:
        direction_probe(model, block_map, Batch((ids, ids)), displacement(model), blocks=())
    assert (model.books(), random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002
    assert all(
        one is other
        for one, other in zip(kept, (model.seen, model.counts, model.names, model.total, model.source), strict=True)
    )
