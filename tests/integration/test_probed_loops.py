"""Probes in the loops that people write. A probe runs there and is right, or tells why it does not."""

from __future__ import annotations

import copy
import io
import logging
import math
from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import BatchEncoding, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

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


def micro_batch(model, seed):
    return model(tokens(seed), tokens(seed))["loss"] / 3


class TestEvaluationMode:
    """A model may be trained in evaluation mode, and evaluated with gradients enabled."""

    def test_a_model_in_eval_mode_is_probed(self):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
        ids = tokens(0, (4, 16), 64)
        run = Watched(model).train(8, lambda: model(input_ids=ids, labels=ids).loss)
        assert run.reasons == {}
        assert len(run.probes("gnb")) == len(run.probes("direction")) == 4
        assert len(run.losses()) == 8
        assert not model.training

    def test_it_trains_bit_identically_and_shows_what_training_mode_shows(self):
        runs = []
        for mode, watched in (("train", True), ("eval", True), ("eval", False)):
            model = seeded(WithLoss).train(mode == "train")
            optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
            run = Watched(model, optimizer, probe_every=1) if watched else None
            for seed in range(4):
                x = tokens(seed)
                model(x, x)["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
            if run is not None:
                run.watch.close()
            runs.append((run, model.state_dict()))
        (train, weights), (evaluated, same), (_, unwatched) = runs
        assert train.losses() == evaluated.losses()
        traces = [[values(probe.traces).tolist() for probe in run.probes("gnb")] for run in (train, evaluated)]
        assert traces[0] == traces[1]
        assert len(traces[0]) == 4
        assert all(torch.equal(weights[name], same[name]) for name in weights)
        assert all(torch.equal(unwatched[name], same[name]) for name in weights)

    @pytest.mark.parametrize("training", [True, False])
    def test_an_evaluation_with_gradients_enabled_is_no_part_of_it(self, training):
        model = seeded(WithLoss).train(training)
        run = Watched(model, probe_every=1)
        trained = []
        for seed in range(4):
            x = tokens(seed)
            loss = model(x, x)["loss"]
            trained.append(loss.item())
            run.step(lambda loss=loss: loss)
            model.eval()
            for _ in range(3):
                model(tokens(99), tokens(98))  # its author forgot torch.no_grad
            model.train(training)
        run.watch.close()
        assert run.losses() == pytest.approx(trained)
        assert all(probe.rows == 1 for probe in run.probes("gnb"))
        assert run.reasons == {}

    def test_the_batch_probed_is_the_one_that_was_trained_on(self):
        model, x = seeded(WithLoss).eval(), tokens(1)

        def loss_fn(model, batch):
            assert all(row in x.tolist() for row in batch.args[0].tolist())
            return model(*batch.args)["loss"]

        run = Watched(model, probe_every=1, probes=("direction",), loss_fn=loss_fn)
        for _ in range(2):
            loss = model(x, x)["loss"]
            model(tokens(99), tokens(98))
            run.step(lambda loss=loss: loss)
        run.watch.close()
        assert run.reasons == {}
        assert len(run.probes("direction")) == 2

    def test_a_loss_observed_before_the_backward_is_of_its_own_step(self):
        model = seeded(LM).eval()
        run, observed = Watched(model, probes=()), []
        for seed in range(5):
            loss = functional.cross_entropy(model(tokens(seed)).flatten(0, 1), tokens(seed).flatten())
            run.watch.observe(loss=loss)
            observed.append(loss.item())
            run.step(lambda loss=loss: loss)
        run.watch.close()
        by_step = {sample.step: sample.loss for sample in run.transport.samples if sample.HasField("loss")}
        assert [by_step[step] for step in range(1, 6)] == pytest.approx(observed)

    def test_gradient_noise_is_read_as_in_training_mode(self):
        noises = []
        for training in (True, False):
            model = seeded(WithLoss).train(training)
            run = Watched(model, probe_every=1, probes=("gradient_noise",))
            run.step(*(partial(micro_batch, model, seed) for seed in range(3)))
            run.watch.close()
            noises.append(values(run.probes("gradient_noise")[0].noise))
        assert (noises[0] > 0).all()
        assert (noises[0] == noises[1]).all()

    def test_nothing_of_an_evaluation_is_kept_when_its_graph_goes(self):
        model = seeded(WithLoss).eval()
        run = Watched(model, probe_every=1)
        output = model(tokens(), tokens())
        del output
        assert run.watch._watched.scheduler._captured is None
        run.watch.close()


class Container(nn.Module):
    """Like Lightning's modules: the model is inside, and the loop calls `training_step`."""

    def __init__(self):
        super().__init__()
        self.model = WithLoss()

    def training_step(self, batch):
        x, y = batch
        return self.model(x, y)["loss"]


class TwoParts(LM):
    def encode(self, x):
        return torch.tanh(self.emb(x))

    def decode(self, z):
        return self.head(z)


class SelfStepping(LM):
    optimizer = None

    def train_step(self, x):
        loss = self.compute_loss(x)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Rebinding(LM):
    """Its method changes what it is given, as `noise = default(noise, ...)` and `batch.pop("labels")` do."""

    def losses(self, batch, scale=None):
        y = batch.pop("y")
        scale = 1.0 if scale is None else scale
        return functional.cross_entropy(self.forward(batch["x"]).flatten(0, 1), y.flatten()) * scale


class TestOtherCalls:
    """Loops that call another method than the model's forward, or a module within it."""

    def test_compute_loss_is_probed_with_the_loss_that_it_returns(self):
        model, plain = seeded(LM), seeded(LM)
        run = Watched(model, probe_every=1, probes=("linesearch", "hutchinson", "direction")).train(
            8, lambda: model.compute_loss(tokens())
        )

        def loss_fn(model, batch):
            return functional.cross_entropy(model(*batch.args).flatten(0, 1), batch.args[0].flatten())

        told = Watched(plain, probe_every=1, probes=("linesearch", "hutchinson", "direction"), loss_fn=loss_fn)
        told.train(8, lambda: functional.cross_entropy(plain(tokens()).flatten(0, 1), tokens().flatten()))
        assert run.reasons == {}
        found = run.probes("hutchinson")
        assert len(found) == len(run.probes("direction")) == 6  # the first step misses it, the second searches
        traces = [np.mean([values(probe.traces).sum() for probe in each.probes("hutchinson")]) for each in (run, told)]
        assert traces[0] == pytest.approx(traces[1], rel=1)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))

    def test_gnb_says_that_such_a_method_returns_no_logits(self):
        model = seeded(LM)
        run = Watched(model).train(12, lambda: model.compute_loss(tokens()))
        assert run.probes("direction")
        assert list(run.reasons) == ["gnb"]
        assert "no logits" in run.reasons["gnb"]

    def test_a_method_that_changes_its_arguments_is_called_with_what_the_loop_gave(self):
        model = seeded(Rebinding)
        run = Watched(model, probes=("direction",)).train(12, lambda: model.losses({"x": tokens(), "y": tokens()}))
        assert run.reasons == {}
        assert run.probes("direction")

    def test_an_inner_module_is_captured_rather_than_a_method_around_it(self):
        model = seeded(Container)
        run = Watched(model).train(12, lambda: model.training_step((tokens(), tokens())))
        assert run.reasons == {}
        assert len(run.probes("gnb")) == len(run.probes("direction")) == 4

    def test_a_forward_called_without_its_module_is_captured(self):
        model = seeded(WithLoss)
        run = Watched(model).train(12, lambda: model.forward(tokens(), tokens())["loss"])
        assert run.reasons == {}
        assert run.probes("gnb")
        assert run.probes("direction")

    def test_in_evaluation_mode_too(self):
        model = seeded(WithLoss).eval()
        run = Watched(model).train(12, lambda: model.forward(tokens(), tokens())["loss"])
        assert run.reasons == {}
        assert run.probes("gnb")

    @pytest.mark.parametrize(
        ("kind", "call", "reason"),
        [
            (
                TwoParts,
                lambda model: model.decode(model.encode(tokens())).square().mean(),
                "model.encode, model.decode",
            ),
            (LM, lambda model: model.head(model.emb(tokens())).square().mean(), "model.emb, model.head"),
            (LM, lambda model: (model.head.weight @ model.emb.weight.T).square().mean(), "no module"),
        ],
    )
    def test_what_has_not_the_whole_loss_is_named(self, kind, call, reason, caplog):
        model = seeded(kind)
        with caplog.at_level(logging.WARNING, "sharpwatch"):
            run = Watched(model).train(24, lambda: call(model))
        assert set(run.reasons) == {"gnb", "direction"}
        assert all("no forward of the model was seen in" in each and reason in each for each in run.reasons.values())
        logged = [record.message for record in caplog.records]
        assert sum("probe gnb" in each for each in logged) == sum("probe direction" in each for each in logged) == 1

    def test_a_method_that_steps_itself_is_never_called_by_a_probe(self):
        model = seeded(SelfStepping)
        model.optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        run = Watched(model, model.optimizer)
        for _ in range(24):
            model.train_step(tokens())
        run.watch.close()
        assert all("takes the optimizer's step itself" in each for each in run.reasons.values())
        assert run.watch.step == 24

    def test_the_search_and_the_method_leave_no_trace(self):
        model, plain = seeded(LM), seeded(LM)
        run = Watched(model)
        for _ in range(8):
            run.step(lambda: model.compute_loss(tokens()))
        assert "compute_loss" in vars(model)
        copied = copy.deepcopy(model)
        saved = io.BytesIO()
        torch.save(model, saved)
        saved.seek(0)
        loaded = torch.load(saved, weights_only=False)
        for other in (copied, loaded):
            assert other.compute_loss.__self__ is other
            assert torch.equal(other.compute_loss(tokens()), model.compute_loss(tokens()))
        run.watch.close()
        assert vars(model).keys() == vars(plain).keys()
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())

    def test_a_loop_that_calls_forward_after_all_is_captured_there(self):
        model = seeded(WithLoss)
        run = Watched(model)
        for step in range(16):
            run.step(lambda step=step: (model.forward if step < 8 else model)(tokens(), tokens())["loss"])
        run.watch.close()
        assert run.reasons == {}
        assert len(run.probes("gnb")) > 5


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

    def test_weights_that_hooks_make_elsewhere_are_refused(self, rules):
        rules({"head.*": "head"})

        class Odd(nn.Linear):
            def __init__(self, width, size):
                super().__init__(width, size)
                self.gain = nn.Parameter(torch.ones(()))
                self.kept = [None]

            def forward(self, x):
                return super().forward(x) * (1.0 if self.kept[0] is None else self.kept[0])

        def keep(module, _):
            module.kept = [module.gain.exp()]

        model = seeded(WithLoss)
        model.head = Odd(8, 9)
        model.head.register_forward_pre_hook(keep)
        model.head.register_forward_hook(lambda module, *_: setattr(module, "kept", [None]))
        run = Watched(model).train(12, lambda: model(tokens(), tokens())["loss"])
        assert set(run.reasons) == {"gnb", "direction"}
        assert all("head.gain" in each and "keep" in each for each in run.reasons.values())
        assert not run.probes("gnb")

    def test_a_users_recording_hooks_are_still_bypassed(self):
        model, seen = seeded(WithLoss), []
        model.head.register_forward_pre_hook(lambda *_: seen.append(1))
        run = Watched(model, probe_every=1).train(6, lambda: model(tokens(), tokens())["loss"])
        assert run.reasons == {}
        assert run.probes("gnb")
        assert len(seen) == 6


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


class OfBatch(LM):
    """Takes a whole batch, and asks it for items or attributes."""

    def forward(self, batch):
        x = batch["x"] if isinstance(batch, Mapping) else batch.x
        y = batch["y"] if isinstance(batch, Mapping) else batch.y
        logits = super().forward(x)
        return {"logits": logits, "loss": functional.cross_entropy(logits.flatten(0, 1), y.flatten())}


class OfAttributes(OfBatch):
    def forward(self, batch):
        logits = LM.forward(self, batch.x)
        return {"logits": logits, "loss": functional.cross_entropy(logits.flatten(0, 1), batch.y.flatten())}


class Frozen(Mapping):
    """A mapping that is made of a dict and can't be changed."""

    def __init__(self, items):
        self._items = dict(items)

    def __getitem__(self, key):
        return self._items[key]

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)


class ByKeyword(Frozen):
    """One that is made in another way."""

    def __init__(self, **items):
        super().__init__(items)


@dataclass
class Record:
    x: torch.Tensor
    y: torch.Tensor


BATCHES = {
    "dict": (OfBatch, dict),
    "UserDict": (OfBatch, UserDict),
    "BatchEncoding": (OfAttributes, BatchEncoding),
    "Mapping": (OfBatch, Frozen),
    "by keyword": (OfBatch, lambda items: ByKeyword(**items)),
    "dataclass": (OfAttributes, lambda items: Record(**items)),
    "nested": (OfBatch, lambda items: UserDict({"x": items["x"], "y": items["y"], "more": Frozen(items)})),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_a_batch_of_any_kind_is_cut_to_rows(kind):
    of, make = BATCHES[kind]
    model = seeded(of)
    given = {"x": tokens(0), "y": tokens(1)}
    batch = make(given)
    run = Watched(model).train(8, lambda: model(batch)["loss"])
    assert run.reasons == {}
    assert [probe.rows for probe in run.probes("gnb")] == [1] * 4
    assert [probe.rows for probe in run.probes("direction")] == [2] * 4
    held = batch if isinstance(batch, Mapping) else vars(batch)
    assert all(held[name] is value for name, value in given.items())


class Fourier(nn.Module):
    """A complex parameter, as FNO and S4 have them."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(9, 8)
        self.other = nn.Parameter(torch.randn(4, 8, dtype=torch.cfloat) * 0.3)
        self.head = nn.Linear(8, 9)

    def forward(self, x, targets):
        spectrum = torch.fft.rfft(self.emb(x), dim=1) * self.other
        logits = self.head(torch.fft.irfft(spectrum, n=x.shape[1], dim=1))
        return {"logits": logits, "loss": functional.cross_entropy(logits.flatten(0, 1), targets.flatten())}


@pytest.mark.filterwarnings("ignore")
def test_complex_parameters_get_the_reason_before_anything_runs(rules, caplog):
    rules({"other": "other"})
    model = seeded(Fourier)
    with caplog.at_level(logging.WARNING, "sharpwatch"):
        run = Watched(model, probe_every=1)
        logged = [record.message for record in caplog.records if "complex" in record.message]
    assert len(logged) == 2
    assert all(probe.given_up and "other is complex" in probe.reason for probe in run.watch.status.probes)
    run.train(3, lambda: model(tokens(), tokens())["loss"])
    assert set(run.reasons) == {"gnb", "direction"}
    assert run.transport.samples[0].HasField("tap")
    assert run.watch.status.swallowed_errors == 0


@pytest.mark.filterwarnings("ignore")
def test_frozen_complex_parameters_are_no_obstacle(rules):
    rules({"other": "other"})
    model = seeded(Fourier)
    model.other.requires_grad_(False)
    run = Watched(model).train(8, lambda: model(tokens(), tokens())["loss"])
    assert run.reasons == {}
    assert run.probes("gnb")
    assert all(math.isfinite(probe.curvature) for probe in run.probes("direction"))


class TestGradientNoise:
    @pytest.mark.parametrize("sizes", [(20, 20), (36, 4)])
    def test_of_token_weighted_micro_batches_is_right(self, sizes):
        torch.manual_seed(0)
        model, gradients = LM(), []
        optimizer = torch.optim.SGD(model.parameters(), 0.0)  # all steps' gradients are drawn alike
        run = Watched(model, optimizer, probe_every=1, probes=("gradient_noise",))
        for _ in range(150):
            for size in sizes:
                x = torch.randint(0, 9, (1, size))
                y = torch.where(torch.rand(1, size) < 0.8, 0, x)
                loss = functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum") / sum(sizes)
                loss.backward()
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
            optimizer.step()
            optimizer.zero_grad()
        run.watch.close()
        noise = [values(probe.noise).sum() for probe in run.probes("gradient_noise") if probe.HasField("noise")]
        true = float(torch.stack(gradients).var(0).sum())
        assert len(noise) == 150
        assert 0.7 * true < sum(noise) / len(noise) < 1.4 * true

    def test_where_it_is_absent_the_reason_is_told_once(self, caplog):
        model = seeded(WithLoss)
        with caplog.at_level(logging.WARNING, "sharpwatch"):
            run = Watched(model, probe_every=1, probes=("gradient_noise",))
            run.train(5, lambda: model(tokens(), tokens())["loss"])
        assert "one micro-batch" in run.reasons["gradient_noise"]
        assert sum("gradient_noise" in record.message for record in caplog.records) == 1
        assert run.watch.status.probes[0].reason == run.reasons["gradient_noise"]
