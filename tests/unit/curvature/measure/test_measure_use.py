"""What a user does with `measure`: every path of a model, every mistake, precision, and going on after a stop."""

from __future__ import annotations

import copy
import json
import math
from contextlib import contextmanager

import dense
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed import fake_pg
from torch.utils.checkpoint import checkpoint

from sharpwatch import measure
from sharpwatch.blocks import Rule, Rules
from sharpwatch.curvature.measure import second_order
from sharpwatch.curvature.measure.measure import Measurement, Settings
from sharpwatch.errors import BlockError, PrecisionError, ProbeError

ALL = ("gnb", "hutchinson", "lanczos", "spectrum", "direction", "linesearch", "preconditioned")


def batch(rows=3, seed=1):
    ids, labels = dense.tokens(rows=rows, seed=seed)
    return {"input_ids": ids, "labels": labels}


def stepped(model):
    """An AdamW that has taken a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(**batch()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def traces(report):
    return {block: found.trace.value for block, found in report.blocks.items()}


def close(one, other, relative):
    """The same within `relative` of the largest block, for traces of either sign."""
    scale = max(abs(value) for value in other.values())
    assert one.keys() == other.keys()
    for block, value in one.items():
        assert value == pytest.approx(other[block], rel=relative, abs=1e-3 * relative * scale), block


@pytest.fixture(scope="module")
def gpt2():
    """The traces of a GPT-2 by products, 4 draws."""
    model = dense.gpt2()
    return model, traces(measure(model, [batch()], estimators=("hutchinson",), draws=4, method="autograd"))


@pytest.fixture(scope="module")
def one_layer():
    """A GPT-2 for what holds of every model, however many layers it has: all blocks, at half of the cost."""
    return dense.gpt2(layers=1)


@contextmanager
def short_quadratures():
    """Spectra of a few products, for what no spectrum's accuracy matters to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(second_order, "_QUADRATURE_PRODUCTS", 6)
        yield


class Everything:
    """All of a process that a measurement could leave its mark on."""

    def __init__(self, model, optimizer):
        self.model = model
        self.tensors = {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=False).items()}
        self.gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        self.parameters = [id(parameter) for parameter in model.parameters()]
        self.flags = [module.training for module in model.modules()]
        self.requires = [parameter.requires_grad for parameter in model.parameters()]
        self.optimizer = copy.deepcopy(optimizer.state_dict())
        self.random = torch.get_rng_state()
        self.grad_mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()
        self.attention = model.config._attn_implementation
        self.sdpa = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()

    def assert_untouched(self, optimizer):
        now = Everything(self.model, optimizer)
        for name, tensor in self.tensors.items():
            assert torch.equal(tensor, now.tensors[name]), name
        for name, gradient in self.gradients.items():
            assert (gradient is None) == (now.gradients[name] is None)
            assert gradient is None or torch.equal(gradient, now.gradients[name])
        for own in ("parameters", "flags", "requires", "grad_mode", "autocast", "attention", "sdpa"):
            assert getattr(self, own) == getattr(now, own), own
        assert torch.equal(self.random, now.random)
        for one, other in zip(self.optimizer["state"].values(), now.optimizer["state"].values(), strict=True):
            assert all(torch.equal(one[key], other[key]) for key in one)
        assert type(next(iter(self.model.parameters()))) is nn.Parameter


@pytest.mark.parametrize("method", ["auto", "autograd", "differences"])
def test_leaves_no_trace(method):
    model = dense.gpt2(layers=1)
    optimizer = stepped(model)
    model(**batch(seed=2)).loss.backward()  # gradients under accumulation
    before = Everything(model, optimizer)
    with torch.no_grad(), short_quadratures():
        measure(model, [batch()], optimizer, ALL, draws=2, method=method)
    before.assert_untouched(optimizer)


@pytest.mark.parametrize("calls", [0, 1, 5, 20, 60])
def test_leaves_no_trace_where_it_raises_half_way(calls):
    model = dense.gpt2()
    optimizer = stepped(model)
    before = Everything(model, optimizer)
    made = 0

    class EnoughError(Exception):
        pass

    def loss_fn(called, given):
        nonlocal made
        made += 1
        if made > calls:
            raise EnoughError
        return called(**given.kwargs).loss

    # A spectrum's products go through a graph that is there, without a call of `loss_fn`.
    with pytest.raises(EnoughError), short_quadratures():
        measure(model, [batch()], optimizer, ALL, draws=4, loss_fn=loss_fn)
    before.assert_untouched(optimizer)


def test_leaves_no_trace_where_it_is_stopped():
    model = dense.gpt2()
    optimizer = stepped(model)
    before = Everything(model, optimizer)
    pieces = Measurement(model, [batch()], optimizer, Settings(ALL, draws=2)).run()
    for _ in range(9):
        next(pieces)
    pieces.close()
    before.assert_untouched(optimizer)


class Checkpointed(nn.Module):
    """A decoder with checkpoints of its own, whatever mode it is in."""

    def __init__(self, *, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.wte = nn.Embedding(dense.VOCAB, 16)
        self.layers = nn.ModuleList(nn.ModuleDict({"attn": Attention(), "mlp": FeedForward()}) for _ in range(2))
        self.lm_head = nn.Linear(16, dense.VOCAB, bias=False)

    def forward(self, input_ids, labels):
        x = self.wte(input_ids)
        for layer in self.layers:
            for part in ("attn", "mlp"):
                if self.reentrant is None:
                    x = x + layer[part](x)
                else:
                    x = x + checkpoint(layer[part], x, use_reentrant=self.reentrant)
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0])


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.down_proj(F.silu(self.up_proj(x)))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ["autograd", "differences", "auto"])
def test_checkpoints_change_nothing(reentrant, method):
    plain, checkpointed = Checkpointed(reentrant=None), Checkpointed(reentrant=reentrant)
    arguments = {"estimators": ("hutchinson",), "draws": 4, "method": method}
    close(traces(measure(checkpointed, [batch()], **arguments)), traces(measure(plain, [batch()], **arguments)), 1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_attentions_give_the_same(gpt2, attention):
    model, truth = gpt2
    model = copy.deepcopy(model)
    model.set_attn_implementation(attention)
    close(traces(measure(model, [batch()], estimators=("hutchinson",), draws=4, method="autograd")), truth, 1e-4)
    assert model.config._attn_implementation == attention


def test_autocast_is_left_out_of_second_derivatives(gpt2):
    model, truth = gpt2
    for method in ("autograd", "differences"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = measure(model, [batch()], estimators=("hutchinson",), draws=4, method=method)
        close(traces(found), truth, 1e-3)


def test_weights_of_half_precision_are_raised_for_second_derivatives():
    half = dense.gpt2(layers=1).bfloat16()
    same = copy.deepcopy(half).float()  # the same weights: every bfloat16 is a float32
    arguments = {"estimators": ("hutchinson", "lanczos"), "draws": 4}
    for method in ("autograd", "differences"):
        one, other = (measure(model, [batch()], method=method, **arguments) for model in (half, same))
        close(traces(one), traces(other), 1e-3)
        for block, found in one.blocks.items():
            assert found.top_eigenvalue.value == pytest.approx(other.blocks[block].top_eigenvalue.value, rel=1e-2)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_a_compiled_model_is_measured_as_it_is_eagerly(gpt2):
    model, truth = gpt2
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    close(traces(measure(compiled, [batch()], estimators=("hutchinson",), draws=4, method="autograd")), truth, 1e-4)


def test_dropout_is_off():
    quiet, noisy = dense.gpt2(dropout=0.0), dense.gpt2(dropout=0.5)
    one, other = (measure(m, [batch()], estimators=("gnb", "hutchinson"), draws=2) for m in (quiet, noisy))
    close(traces(one), traces(other), 1e-5)
    assert noisy.training


def test_a_kernel_with_one_derivative_leads_to_differences():
    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return F.silu(x)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            s = torch.sigmoid(x)
            return grad * s * (1 + x * (1 - s))

    plain, fused = Checkpointed(reentrant=None), Checkpointed(reentrant=None)
    for layer in fused.layers:
        mlp = layer["mlp"]
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(Fused.apply(mlp.up_proj(x)))
    arguments = {"estimators": ("hutchinson", "lanczos"), "draws": 4}
    found, truth = measure(fused, [batch()], **arguments), measure(plain, [batch()], **arguments)
    close(traces(found), traces(truth), 1e-2)
    for block, report in found.blocks.items():
        assert report.top_eigenvalue.method == "gradient differences"
        assert report.top_eigenvalue.value == pytest.approx(truth.blocks[block].top_eigenvalue.value, rel=1e-2)
    with pytest.raises(
        ProbeError, match=r"differentiated twice: .*Fused has no second derivative; method='differences', gnb"
    ):
        measure(fused, [batch()], method="autograd", **arguments)


def test_a_kernel_for_half_precision_alone_leaves_gnb():
    def kernel(x):
        if x.dtype == torch.float32:
            raise RuntimeError("only fp16 and bf16 are supported")
        return F.silu(x)

    model = Checkpointed(reentrant=None).bfloat16()
    for layer in model.layers:
        mlp = layer["mlp"]
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(kernel(mlp.up_proj(x)))
    with pytest.raises(ProbeError, match=r"cannot run in float32, .*gnb does not\): only fp16"):
        measure(model, [batch()], estimators=("lanczos",), method="differences")
    with pytest.raises(ProbeError, match=r"cannot run in float32"):
        measure(model, [batch()], estimators=("hutchinson",))
    assert measure(model, [batch()], estimators=("gnb",), draws=2).blocks["qk"].trace.value > 0


def test_several_batches_are_one(one_layer):
    # Rows of equal weight: the Hessian of two batches is that of both together; the draws differ.
    whole = batch(rows=4)
    halves = [{name: values[rows] for name, values in whole.items()} for rows in (slice(0, 1), slice(1, 4))]
    one = measure(one_layer, [whole], draws=32)
    two = measure(one_layer, halves, draws=32)
    assert one.loss == pytest.approx(two.loss, rel=1e-5)
    assert one.tokens == two.tokens
    for block, found in one.blocks.items():
        other = two.blocks[block]
        assert other.top_eigenvalue.value == pytest.approx(found.top_eigenvalue.value, rel=0.01)
        assert other.top_eigenvalue.draws == 2
        assert other.top_eigenvalue.stderr > 0
        off = abs(found.trace.value - other.trace.value)
        assert off < 4 * math.hypot(found.trace.stderr, other.trace.stderr)
        assert other.trace.stderr >= found.trace.stderr / 2  # the batches' spread comes on top


def test_more_batches_than_gradients_are_kept_of_give_the_same_spread_of_values(one_layer):
    batches = [batch(seed=seed) for seed in range(6)]
    report = measure(one_layer, batches, estimators=("hutchinson",), draws=8)
    exact = measure(one_layer, batches, estimators=("hutchinson",), draws=8, method="autograd")
    for block, found in report.blocks.items():
        assert found.trace.method == "loss differences"
        assert found.trace.value == pytest.approx(exact.blocks[block].trace.value, abs=found.trace.stderr)


def test_a_precision_is_reached_and_no_more_is_drawn(gpt2):
    model, _ = gpt2
    report = measure(
        model, [batch()], precision=0.2, max_draws=2000, estimators=("gnb", "hutchinson"), blocks=["emb", "vo"]
    )
    for found in report.blocks.values():
        for estimate in found.estimates.values():
            assert estimate.stderr <= 0.2 * abs(estimate.value)
    draws = {block: found.estimates["hutchinson"].draws for block, found in report.blocks.items()}
    # They go where the error is: one draw of emb scatters by 2.6 of its trace, of vo by 0.8 at most.
    assert draws["vo"] < draws["emb"] / 2
    assert not report.unreached


def test_a_precision_out_of_reach_says_which_and_loses_nothing(gpt2):
    model, _ = gpt2
    with pytest.raises(PrecisionError, match=r"qk: .*hutchinson's relative standard error is .*max_draws=6") as raised:
        measure(model, [batch()], precision=1e-4, draws=4, max_draws=6)
    assert raised.value.report.blocks["qk"].trace.draws == 6
    assert set(raised.value.report.unreached) == set(raised.value.report.blocks)


def test_batches_that_differ_too_much_are_not_drawn_from_for_ever(gpt2):
    model, _ = gpt2
    with pytest.raises(PrecisionError, match="the batches differ by more than that") as raised:
        measure(model, [batch(1, 1), batch(1, 2)], precision=0.01, draws=16, max_draws=10**6, estimators=("gnb",))
    assert max(found.trace.draws for found in raised.value.report.blocks.values()) < 10**5


def two_batches():
    estimators = ("gnb", "lanczos", "hutchinson", "spectrum")
    return Measurement(dense.gpt2(layers=1), [batch(), batch(seed=2)], None, Settings(estimators, draws=3, seed=5))


@pytest.fixture(scope="module")
def uninterrupted():
    """The report of `two_batches`, and the totals that it said it would come to."""
    whole = two_batches()
    with short_quadratures():
        totals = [progress.total for progress in whole.run()]
    return whole.report(), totals


@pytest.mark.parametrize("stop", [3, 14, 25])
def test_goes_on_where_it_was_stopped(stop, uninterrupted):
    whole, total = uninterrupted
    with short_quadratures():
        first = two_batches()
        pieces = first.run()
        for _ in range(stop):
            next(pieces)
        pieces.close()
        kept = json.loads(json.dumps(first.state_dict()))
        second = two_batches()
        second.load_state_dict(kept)
        list(second.run())
    assert total == [len(total)] * len(total)
    for block, found in whole.blocks.items():
        again = second.report().blocks[block]
        assert again.trace.value == pytest.approx(found.trace.value, rel=1e-6)
        assert again.trace.stderr == pytest.approx(found.trace.stderr, rel=1e-6)
        assert again.top_eigenvalue.value == pytest.approx(found.top_eigenvalue.value, rel=1e-6)
        assert again.spectrum.eigenvalues == pytest.approx(found.spectrum.eigenvalues, rel=1e-5, abs=1e-6)


def test_does_not_go_on_from_another_measurement():
    model = dense.gpt2()
    state = Measurement(model, [batch()], None, Settings(seed=1)).state_dict()
    with pytest.raises(ProbeError, match="its seed is 1, expected 2"):
        Measurement(model, [batch()], None, Settings(seed=2)).load_state_dict(state)
    with pytest.raises(ProbeError, match="its batches is"):
        Measurement(model, [batch(seed=3)], None, Settings(seed=1)).load_state_dict(state)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(ProbeError, match="its weights is"):
        Measurement(model, [batch()], None, Settings(seed=1)).load_state_dict(state)


def test_a_spectrum_has_the_moments_of_the_matrix(one_layer):
    # Of 64 starts the first moment, Tr H / n, has the error of 64 Hutchinson draws.
    report = measure(one_layer, [batch()], estimators=("spectrum", "hutchinson"), draws=64, blocks=["vo"])
    found = report.blocks["vo"]
    assert found.spectrum.draws == 64
    assert math.fsum(found.spectrum.weights) == pytest.approx(1)
    mean = math.fsum(w * x for w, x in zip(found.spectrum.weights, found.spectrum.eigenvalues, strict=True))
    assert abs(mean - found.sharpness.value) < 8 * found.sharpness.stderr  # patterns halve the latter's error


@torch.no_grad()
def smallest_scale(twin, before, step):
    """The first multiple of `step` that raises the loss, tried one percent after another."""
    sizes = [parameter.numel() for parameter in before]
    pieces = [piece.view_as(p).float() for piece, p in zip(step.split(sizes), before, strict=True)]

    def loss(scale):
        for parameter, start, piece in zip(twin.parameters(), before, pieces, strict=True):
            parameter.copy_(start - scale * piece)
        return float(twin(**batch()).loss)

    scale, start = 0.5, loss(0.0)
    while loss(scale) <= start:
        scale *= 1.01
    return scale


def test_the_stability_of_the_next_step():
    model = dense.llama()
    optimizer = stepped(model)
    names = ("direction", "linesearch", "preconditioned")
    report = measure(model, [batch()], optimizer, names)
    whole = report.whole.stability
    # The dense truth, for the step that a copy really takes.
    twin = copy.deepcopy(model)
    copied = torch.optim.AdamW(twin.parameters(), lr=1e-3)
    copied.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it would share the moments
    exact = dense.Exact.of(model)
    gradient, hessian = dense.gradient_and_hessian(exact, ids=batch()["input_ids"], labels=batch()["labels"])
    twin.eval()(**batch()).loss.backward()
    before = [parameter.detach().clone() for parameter in twin.parameters()]
    copied.step()
    step = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, twin.parameters(), strict=True)]).double()
    truth = float(step @ hessian @ step / (2 * gradient @ step))
    assert whole["direction"].value == pytest.approx(truth, rel=1e-3)
    assert abs(whole["linesearch"].value - 1 / smallest_scale(twin, before, step)) < 1.1 * whole["linesearch"].residual
    assert whole["linesearch"].residual < 0.07 * whole["linesearch"].value
    scale = []
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        root = (state["exp_avg_sq"] / (1 - 0.999)).sqrt() + 1e-8
        scale.append((1e-3 * 0.1 / 3.8 / root).sqrt().flatten().double())
    d = torch.cat(scale)
    top = dense.ends(d[:, None] * hessian * d)[1]
    assert abs(whole["preconditioned"].value - top) <= max(0.01 * top, whole["preconditioned"].residual)
    assert set(report.blocks["qk"].stability) == {"direction", "linesearch"}
    assert whole["linesearch"].cost.forwards > 4
    assert whole["linesearch"].cost.backwards == 0
    assert whole["preconditioned"].cost.backwards > 2


def test_costs_are_counted(gpt2):
    model, _ = gpt2
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    # The user's own hooks are bypassed, so the loss itself counts.
    def loss_fn(called, given):
        count()
        return called(**given.kwargs).loss

    report = measure(model, [batch()], estimators=("hutchinson", "lanczos"), draws=4, loss_fn=loss_fn)
    assert report.cost.forwards == calls
    own = sum(found.trace.cost.forwards for found in report.blocks.values())
    assert calls - 3 <= own < calls  # the rest are the loss itself and its graph
    for found in report.blocks.values():
        assert found.top_eigenvalue.cost.forwards == 0
        assert found.top_eigenvalue.cost.backwards > 2


def test_the_report_is_plain_values_and_a_table(gpt2):
    model, _ = gpt2
    report = measure(model, [batch()], draws=2)
    again = json.loads(json.dumps(report.to_dict()))
    assert again["blocks"]["qk"]["trace"]["value"] == report.blocks["qk"].trace.value
    assert again["blocks"]["qk"]["top_eigenvalue"]["stderr"] is None  # one batch has no spread
    assert again["whole"]["parameters"] == sum(p.numel() for p in model.parameters())
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines[1 : len(report.blocks) + 2]] == [*report.blocks, "whole"]
    assert lines[len(report.blocks) + 2].strip().startswith("tokens by frequency")
    assert lines[-1].startswith("loss ")
    assert "±" in lines[1]


MISTAKES = {
    "no batches": ({"batches": []}, "batches must be a non-empty list of dicts with the model's arguments"),
    "a tensor for a list": ({"batches": torch.ones(2, 5)}, "batches must be a non-empty list of dicts"),
    "a batch for a list": ({"batches": batch()}, "batches must be a non-empty list of dicts"),
    "an empty batch": ({"batches": [{"input_ids": torch.zeros(0, 5, dtype=torch.long)}]}, r"batches\[0\] is empty"),
    "a batch of nothing": ({"batches": [batch(), {}]}, r"batches\[1\] is empty"),
    "all labels ignored": (
        {"batches": [{"input_ids": batch()["input_ids"], "labels": torch.full_like(batch()["labels"], -100)}]},
        r"batches\[0\]: every label is ignored, so no position predicts",
    ),
    "another vocabulary": (
        {"batches": [{"input_ids": batch()["input_ids"] + 30, "labels": batch()["labels"]}]},
        r"batches\[0\].input_ids: token 69 is outside the model's vocabulary of 40",
    ),
    "labels of another": (
        {"batches": [{"input_ids": batch()["input_ids"], "labels": batch()["input_ids"] + 7}]},
        r"batches\[0\].labels: token 46 is outside the model's vocabulary of 40",
    ),
    "one draw": ({"draws": 1}, "draws must be an integer of at least 2 .*, got 1"),
    "an estimator": (
        {"estimators": ("hessian",)},
        r"estimators must be one or more of gnb, hutch.*, got \('hessian',\)",
    ),
    "a block": (
        {"blocks": ["mlp"]},
        r"blocks must be among those that are trained, emb, qk, vo, ffn, norm, other, got \['mlp'\]",
    ),
    "a precision": (
        {"precision": 5.0},
        "precision must be a float with 0 < precision < 1, a relative standard error, got 5.0",
    ),
    "a method": ({"method": "fast"}, "method must be one of 'auto', 'autograd', 'differences', got 'fast'"),
    "a seed": ({"seed": -1}, "seed must be an integer with 0 <= seed < 2\\*\\*63, got -1"),
    "no optimizer": ({"estimators": ("direction",)}, "optimizer must be given for the estimators direction"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_says_what_is_wrong_before_anything_starts(mistake):
    model = dense.gpt2()
    given, message = MISTAKES[mistake]
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    arguments = {"batches": [batch()], **given}
    with pytest.raises(ProbeError, match=message):
        Measurement(model, arguments.pop("batches"), None, Settings(**arguments))


def test_says_that_nothing_requires_a_gradient():
    model = dense.gpt2().requires_grad_(False)
    with pytest.raises(ProbeError, match="model must have a parameter that requires a gradient"):
        measure(model, [batch()])


def test_says_which_optimizer_has_no_second_moment():
    model = dense.gpt2()
    with pytest.raises(ProbeError, match=r"got SGD; direction and linesearch work"):
        measure(model, [batch()], torch.optim.SGD(model.parameters(), lr=0.1), ("preconditioned",))
    with pytest.raises(ProbeError, match=r"has no second moment of .* yet: take an optimizer step first"):
        measure(model, [batch()], torch.optim.AdamW(model.parameters()), ("preconditioned",))


def test_says_which_parameter_no_rule_places():
    model = dense.gpt2()
    model.gadget = nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(BlockError, match="gadget"):
        measure(model, [batch()], strict=True)
    frozen = Rules((Rule("gadget", block="other"),))
    report = measure(model, [batch()], rules=frozen, draws=2)
    assert report.blocks["other"].parameters == 192 + 12


def test_frozen_blocks_are_absent():
    model = dense.gpt2()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" not in name)
    report = measure(model, [batch()], draws=2)
    assert "ffn" not in report.blocks
    assert report.blocks["qk"].trace.value != 0.0


def test_a_sharded_model_is_refused_as_its_draws_would_be_zero():
    torch.distributed.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=1)
    try:
        model = fully_shard(dense.llama(), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ProbeError, match=r"model: \S+ is a DTensor; `measure` needs whole .*full_state_dict"):
            measure(model, [batch()], estimators=("gnb",), draws=2)
    finally:
        torch.distributed.destroy_process_group()
