"""Probes in the loops that people write. A probe runs there and is right, or tells why it does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import MixtralConfig, MixtralForCausalLM

import sharpwatch
from sharpwatch.testing import InMemoryTransport

SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 2}


def values(array):
    return np.frombuffer(array.data, array.dtype).reshape(array.shape)


class Watched:
    """A watched model and what the watch sends."""

    def __init__(self, model, optimizer=None, **options):
        self.model = model
        self.optimizer = optimizer or torch.optim.AdamW(model.parameters(), 1e-3)
        self.transport = InMemoryTransport()
        options = {"probe_every": 2} | options
        self.watch = sharpwatch.attach(model, self.optimizer, training_job="loops", transport=self.transport, **options)

    def step(self, *losses):
        for loss in losses:
            loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self, steps, loss):
        for _ in range(steps):
            self.step(loss)
        self.watch.close()
        return self

    def probes(self, kind):
        return [getattr(sample, kind) for sample in self.transport.samples if sample.HasField(kind)]

    def losses(self):
        return [sample.loss for sample in self.transport.samples if sample.HasField("loss")]

    @property
    def reasons(self):
        failures = (failure for sample in self.transport.samples for failure in sample.health.probe_failures)
        return {failure.probe: failure.reason for failure in failures}


@pytest.fixture
def rules(tmp_path, monkeypatch):
    """Place parameters that no known rule places, as `rules({"match": "block"})`."""

    def write(blocks):
        path = tmp_path / "rules.yaml"
        path.write_text("".join(f'- {{match: "{match}", block: {block}}}\n' for match, block in blocks.items()))
        monkeypatch.setenv("SHARPWATCH_BLOCK_RULES", str(path))

    return write


def tokens(seed=0, shape=(8, 6), size=9):
    return torch.randint(0, size, shape, generator=torch.Generator().manual_seed(seed))


class LM(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(9, 8)
        self.head = nn.Linear(8, 9)

    def forward(self, x):
        return self.head(torch.tanh(self.emb(x)))

    def compute_loss(self, x):
        return functional.cross_entropy(self.forward(x).flatten(0, 1), x.flatten())


class WithLoss(LM):
    def forward(self, x, targets):
        logits = super().forward(x)
        return {"logits": logits, "loss": functional.cross_entropy(logits.flatten(0, 1), targets.flatten())}


def seeded(kind):
    torch.manual_seed(0)
    return kind()


class TestHooks:
    """Hooks that are part of the computation."""

    @pytest.mark.parametrize("masked", [False, True])
    def test_a_mixture_of_experts_with_router_logits_is_probed(self, masked):
        torch.manual_seed(0)
        size = SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2}
        model = MixtralForCausalLM(MixtralConfig(**size, output_router_logits=True)).train()
        ids = tokens(0, (4, 16), 64)
        batch = {"input_ids": ids, "labels": ids} | ({"attention_mask": torch.ones_like(ids)} if masked else {})
        run = Watched(model).train(6, lambda: model(**batch).loss)
        assert run.reasons == {}
        assert run.probes("gnb")
        assert run.probes("direction")

    def test_a_weight_that_a_users_hook_makes_is_measured_through_it(self, rules):
        """As the equalized learning rate of StyleGAN: a hook scales the parameter before each forward."""
        rules({"head.*": "head"})

        def scaled(module, _):
            module.weight = module.weight_orig * 0.5

        def equalized(model):
            weight = model.head.weight
            del model.head._parameters["weight"]
            model.head.register_parameter("weight_orig", nn.Parameter(weight.detach() * 2))
            model.head.register_forward_pre_hook(scaled)
            scaled(model.head, ())
            return model

        traces = []
        for make in (lambda model: model, equalized):
            model = make(seeded(WithLoss))
            run = Watched(model, torch.optim.SGD(model.parameters(), 0.0), probes=("gnb",))
            run.train(8, lambda model=model: model(tokens(), tokens())["loss"])
            assert run.reasons == {}
            blocks = [row.block for row in run.transport.hello.layer_blocks]
            rows = np.mean([values(probe.traces).mean(0) for probe in run.probes("gnb")], axis=0)
            traces.append(dict(zip(blocks, rows.tolist(), strict=True)))
        plain, hooked = traces
        assert hooked["emb"] == pytest.approx(plain["emb"], rel=1e-4)
        bias = plain["head"] - 4 * (plain["head"] - hooked["head"]) / 3  # the weight's share is a quarter
        assert 0 < bias < plain["head"]


class UnderFlags(WithLoss):
    """Its forward runs under cuDNN's flags: all CTC models of transformers, and PyTorch's advice for RNNs."""

    def forward(self, x, targets):
        with torch.backends.cudnn.flags(enabled=False):
            return super().forward(x, targets)


def test_a_forward_under_cudnn_flags_is_probed():
    model = seeded(UnderFlags)
    kinds = ("gnb", "direction", "lanczos")
    before = torch.backends.cudnn.allow_tf32
    run = Watched(model, probes=kinds).train(8, lambda: model(tokens(), tokens())["loss"])
    assert run.reasons == {}
    assert all(run.probes(kind) for kind in kinds)
    assert torch.backends.cudnn.allow_tf32 == before
