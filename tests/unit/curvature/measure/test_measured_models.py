"""Models that `measure` takes or refuses: complex parameters, weights made by hooks, forwards under cuDNN's flags."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import sharpwatch
from sharpwatch.blocks import Rule, Rules
from sharpwatch.errors import ProbeError

RULES = Rules((Rule("head.*", block="head"),))
FOURIER_RULES = Rules((*RULES.rules, Rule("spec", block="other")))


class LM(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(7, 8)
        self.head = nn.Linear(8, 7)

    def logits(self, x):
        return self.head(torch.tanh(self.emb(x)))

    def forward(self, x, targets):
        logits = self.logits(x)
        return {"logits": logits, "loss": functional.cross_entropy(logits.flatten(0, 1), targets.flatten())}


class Fourier(LM):
    """A complex parameter, as FNO and S4 have them."""

    def __init__(self, *, real=False):
        super().__init__()
        spec = torch.randn(5, 8, dtype=torch.cfloat) * 0.3
        self.spec = nn.Parameter(torch.view_as_real(spec) if real else spec)

    def logits(self, x):
        spec = self.spec if self.spec.is_complex() else torch.view_as_complex(self.spec)
        return self.head(torch.fft.irfft(torch.fft.rfft(self.emb(x), dim=1) * spec, n=x.shape[1], dim=1))


class UnderFlags(LM):
    def forward(self, x, targets):
        with torch.backends.cudnn.flags(enabled=False):
            return super().forward(x, targets)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randint(7, (3, 8), generator=generator) for name in ("x", "targets")}


def measured(model, batch, **options):
    rules = FOURIER_RULES if isinstance(model, Fourier) else RULES
    options = {"draws": 2, "rules": rules, "estimators": ("gnb", "lanczos")} | options
    return sharpwatch.measure(model, [batch], **options)


@pytest.mark.parametrize("method", ["autograd", "differences", "auto"])
@pytest.mark.parametrize("estimator", ["gnb", "hutchinson", "lanczos", "spectrum"])
def test_a_complex_parameter_is_refused_before_anything_runs(batch, method, estimator):
    model = Fourier()
    model.forward = lambda *_, **__: pytest.fail("it ran")
    with pytest.raises(ProbeError, match=r"spec is complex.*view_as_complex"):
        measured(model, batch, method=method, estimators=(estimator,))


@pytest.mark.filterwarnings("ignore:Casting complex")
def test_the_same_model_with_a_real_parameter_is_measured_right(batch):
    model = Fourier(real=True)

    def loss(spec):
        return torch.func.functional_call(model, {"spec": spec}, (batch["x"], batch["targets"]))["loss"]

    hessian = torch.autograd.functional.hessian(loss, model.spec.detach()).reshape(80, 80)
    report = measured(model, batch, estimators=("lanczos",), blocks=["other"])
    true = float(torch.linalg.eigvalsh(hessian)[-1])
    assert report.blocks["other"].top_eigenvalue.value == pytest.approx(true, rel=0.01)


def test_a_frozen_complex_parameter_is_no_obstacle(batch):
    model = Fourier()
    model.spec.requires_grad_(False)
    assert measured(model, batch, blocks=["head"]).blocks["head"].top_eigenvalue.value > 0


def test_a_forward_under_cudnn_flags_is_measured_as_without(batch):
    with_flags, without = (measured(model, batch) for model in (UnderFlags(), LM()))
    for block in ("emb", "head"):
        ours, theirs = with_flags.blocks[block], without.blocks[block]
        assert ours.top_eigenvalue.value == theirs.top_eigenvalue.value


def scaled(module, _):
    module.weight = module.weight_orig * 0.5


def equalized(model):
    """As StyleGAN's equalized learning rate: a hook makes the weight before each forward."""
    weight = model.head.weight
    del model.head._parameters["weight"]
    model.head.register_parameter("weight_orig", nn.Parameter(weight.detach() * 2))
    scaled(model.head, ())
    model.head.register_forward_pre_hook(scaled)
    return model


class Halving(nn.Module):
    def forward(self, weight):
        return weight * 0.5

    def right_inverse(self, weight):
        return weight * 2


def parametrized(model):
    nn.utils.parametrize.register_parametrization(model.head, "weight", Halving())
    return model


def test_a_weight_made_by_a_hook_is_measured_through_it(batch):
    model = equalized(LM())
    model(**batch)["loss"].backward()
    kept = model.head.weight
    ours = measured(model, batch)
    theirs = measured(parametrized(LM()), batch)
    for block in ("emb", "head"):
        assert ours.blocks[block].top_eigenvalue.value == pytest.approx(theirs.blocks[block].top_eigenvalue.value)
        assert ours.blocks[block].estimates["gnb"].value == pytest.approx(theirs.blocks[block].estimates["gnb"].value)
    assert model.head.weight is kept


class Gained(nn.Linear):
    """Its gain takes part in the forward only by way of a hook."""

    def __init__(self):
        super().__init__(8, 7)
        self.gain = nn.Parameter(torch.zeros(()))
        self.kept = []

    def forward(self, x):
        return super().forward(x) * (self.kept.pop() if self.kept else 1.0)


def test_a_weight_made_by_a_hook_that_is_bypassed_is_refused(batch):
    model = LM()
    model.head = Gained()
    model.head.register_forward_pre_hook(lambda module, _: module.kept.append(module.gain.exp()))
    with pytest.raises(ProbeError, match=r"does not depend on head\.gain without the forward pre-hook"):
        measured(model, batch)


@pytest.mark.parametrize("estimator", ["gnb", "lanczos"])
def test_hooks_beside_parameters_that_take_part_are_no_reason(batch, estimator):
    model, seen = LM(), []
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: seen.append(1))
    measured(model, batch, estimators=(estimator,))
    assert not seen
