"""Known faults: each test states what is right and fails today; a fix removes its mark.

Here: probes in the loops that people write. A probe runs there and is right, or tells why it does not.
"""

from __future__ import annotations

import pytest
import torch
from recorded_watch import values
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import sharpwatch
from sharpwatch.errors import ProbeError

SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 2}


class LM(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(9, 8)
        self.head = nn.Linear(8, 9)

    def forward(self, x):
        return self.head(torch.tanh(self.emb(x)))

    def compute_loss(self, x):
        return functional.cross_entropy(self.forward(x).flatten(0, 1), x.flatten())


def train(optimizer, steps: int, loss) -> None:
    for _ in range(steps):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()


def no_rate(model) -> torch.optim.Optimizer:
    """An optimizer under which all steps' gradients are drawn alike."""
    return torch.optim.SGD(model.parameters(), 0.0)


@pytest.mark.parametrize(
    "sizes",
    [
        (20, 20),
        pytest.param(
            (36, 4),
            marks=pytest.mark.xfail(
                strict=True,
                raises=AssertionError,
                reason="gradient noise takes micro-batches for equal ones: weighted by tokens it is far too high",
            ),
        ),
    ],
)
def test_gradient_noise_of_token_weighted_micro_batches_is_right_or_absent(recorded, sizes):
    torch.manual_seed(0)
    model, gradients = LM(), []
    optimizer = no_rate(model)
    recorded.attach(model, optimizer, probe_every=1, probes=("gradient_noise",))
    for _ in range(150):
        for size in sizes:
            x = torch.randint(0, 9, (1, size))
            y = torch.where(torch.rand(1, size) < 0.8, 0, x)
            loss = functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum") / sum(sizes)
            loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        optimizer.step()
        optimizer.zero_grad()
    recorded.close()
    noise = [values(probe.noise).sum() for probe in recorded.probes("gradient_noise") if probe.HasField("noise")]
    true = float(torch.stack(gradients).var(0).sum())
    assert not noise or 0.7 * true < sum(noise) / len(noise) < 1.4 * true


class Fourier(nn.Module):
    """A complex parameter, as FNO and S4 have them."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(7, 8)
        self.spec = nn.Parameter(torch.randn(5, 8, dtype=torch.cfloat) * 0.3)
        self.head = nn.Linear(8, 7)

    def forward(self, x, targets):
        spectrum = torch.fft.rfft(self.emb(x), dim=1) * self.spec
        logits = self.head(torch.fft.irfft(spectrum, n=x.shape[1], dim=1))
        return {"logits": logits, "loss": functional.cross_entropy(logits.flatten(0, 1), targets.flatten())}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(
            "autograd",
            marks=pytest.mark.xfail(
                strict=True,
                raises=AssertionError,
                reason="eigenvalues over a complex parameter are wrong, with a residual of 0",
            ),
        ),
        pytest.param(
            "auto",
            marks=pytest.mark.xfail(
                strict=True,
                raises=RuntimeError,
                reason="a complex parameter ends the measurement midway in one of torch's own errors",
            ),
        ),
    ],
)
def test_complex_parameters_are_measured_right_or_refused(method, rules):
    torch.manual_seed(0)
    model, x, y = Fourier(), torch.randint(0, 7, (3, 8)), torch.randint(0, 7, (3, 8))

    def loss(spec):
        return torch.func.functional_call(model, {"spec": torch.view_as_complex(spec)}, (x, y))["loss"]

    hessian = torch.autograd.functional.hessian(loss, torch.view_as_real(model.spec.detach())).reshape(80, 80)
    true = torch.linalg.eigvalsh(hessian)
    try:
        report = sharpwatch.measure(
            model,
            [{"x": x, "targets": y}],
            method=method,
            rules=rules({"spec": "other"}),
            blocks=["other"],
            draws=8,
            estimators=("hutchinson", "lanczos"),
        )
    except sharpwatch.SharpwatchError:
        return
    assert report.blocks["other"].top_eigenvalue.value == pytest.approx(true[-1].item(), rel=0.05)


class UnderFlags(LM):
    """Its forward runs under cuDNN's flags: all CTC models of transformers, and PyTorch's advice for RNNs."""

    def forward(self, x, targets):
        with torch.backends.cudnn.flags(enabled=False):
            logits = super().forward(x)
            return {"logits": logits, "loss": functional.cross_entropy(logits.flatten(0, 1), targets.flatten())}


@pytest.mark.xfail(strict=True, raises=ProbeError, reason="a forward under cudnn.flags can't be measured")
def test_a_forward_under_cudnn_flags_is_measured():
    torch.manual_seed(0)
    x = torch.randint(0, 9, (8, 6))
    report = sharpwatch.measure(UnderFlags(), [{"x": x, "targets": x}], draws=2)
    assert report.blocks["head"].top_eigenvalue.value > 0


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="probes of a forward under cudnn.flags fail")
def test_a_forward_under_cudnn_flags_is_probed(recorded):
    torch.manual_seed(0)
    model, x = UnderFlags(), torch.randint(0, 9, (8, 6))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    recorded.attach(model, optimizer, probe_every=2, probes=("gnb", "direction"))
    train(optimizer, 8, lambda: model(x, x)["loss"])
    recorded.close()
    assert recorded.reasons == {}
    assert recorded.probes("direction")


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="a loop that calls another method than forward gets no probe, and is not told why",
)
def test_a_loop_that_calls_another_method_is_probed_or_gets_the_reason(recorded):
    model = LM()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    recorded.attach(model, optimizer, probe_every=2)
    train(optimizer, 200, lambda: model.compute_loss(torch.randint(0, 9, (8, 6))))
    recorded.close()
    assert recorded.probes("gnb") or recorded.reasons


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="a model that trains in eval mode, as from_pretrained leaves it, gets no probe, and nothing says so",
)
def test_a_model_in_eval_mode_is_probed(recorded):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    recorded.attach(model, optimizer, probe_every=5)
    ids = torch.randint(0, 64, (4, 16))
    train(optimizer, 30, lambda: model(input_ids=ids, labels=ids).loss)
    recorded.close()
    assert recorded.probes("gnb")
    assert recorded.probes("direction")


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="router logits, which transformers collects by hooks, are missing in a probe's forward: every probe fails",
)
@pytest.mark.parametrize("masked", [False, True])
def test_a_mixture_of_experts_with_router_logits_is_probed(recorded, masked):
    torch.manual_seed(0)
    size = SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = MixtralForCausalLM(MixtralConfig(**size, output_router_logits=True)).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    recorded.attach(model, optimizer, probe_every=3)
    ids = torch.randint(0, 64, (4, 16))
    batch = {"input_ids": ids, "labels": ids} | ({"attention_mask": torch.ones_like(ids)} if masked else {})
    train(optimizer, 12, lambda: model(**batch).loss)
    recorded.close()
    assert recorded.reasons == {}
    assert recorded.probes("gnb")
    assert recorded.probes("direction")


class Classifier(nn.Module):
    """As timm's or DiT's: the targets are no argument of its forward."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Linear(12, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.patch_embed(x)))


@pytest.mark.xfail(
    strict=True,
    raises=TypeError,
    reason="loss_fn can't get at targets that are outside of the model's call",
)
def test_loss_fn_gets_the_rows_of_a_batch_that_the_loop_observed(recorded):
    """The loss of a plain classifier is outside of the model; the loop hands its batch to `observe`."""
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    def loss_fn(model, batch):
        return functional.cross_entropy(model(batch["x"]), batch["y"])

    probes = ("gnb", "direction", "hutchinson")
    watch = recorded.attach(model, optimizer, probe_every=2, loss_fn=loss_fn, probes=probes)
    for _ in range(12):
        y = torch.randint(0, 4, (64,))
        batch = {"x": torch.randn(64, 12) + y.view(-1, 1), "y": y}
        loss = loss_fn(model, batch)
        loss.backward()
        watch.observe(loss=loss, batch=batch)
        optimizer.step()
        optimizer.zero_grad()
    recorded.close()
    assert recorded.reasons == {}
    assert all(recorded.probes(kind) for kind in probes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="the callback shows the model's own loss where Trainer trains on compute_loss",
)
def test_the_loss_that_trainer_shows_is_the_one_it_trains_on(recorded, tmp_path):
    from transformers import Trainer, TrainingArguments  # noqa: PLC0415 - with Accelerate, for this test alone

    from sharpwatch.integrations.huggingface import SharpwatchCallback, train  # noqa: PLC0415 - as above

    trained_on = []

    class Mine(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **_):
            output = model(**inputs)
            loss = output.logits.square().mean()  # as DPO, distillation or class weights would have another
            trained_on.append(loss.item())
            return (loss, output) if return_outputs else loss

    torch.manual_seed(0)
    ids = torch.randint(0, 64, (32, 16))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", logging_steps=6,
    )  # fmt: skip
    callback = SharpwatchCallback(training_job="faults", address=recorded.daemon.address, probe_every=2)
    data = [{"input_ids": row, "labels": row} for row in ids]
    train(Mine(LlamaForCausalLM(LlamaConfig(**SMALL)), arguments, train_dataset=data, callbacks=[callback]))
    recorded.daemon.wait(lambda: any(sample.closing for sample in recorded.samples))
    shown = [sample.loss for sample in recorded.samples if sample.HasField("loss")]
    assert shown == pytest.approx(trained_on, rel=1e-4)
