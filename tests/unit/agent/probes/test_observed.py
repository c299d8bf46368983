"""Loops whose targets are outside of the model's call: their batch reaches `loss_fn`, cut to rows."""

from __future__ import annotations

import dataclasses
import gc
import logging
import weakref
from collections import UserDict
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import sharpwatch

ROWS, PROBES = 16, ("gnb", "direction", "hutchinson", "lanczos", "linesearch", "gradient_noise", "preconditioned")


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Linear(6, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.patch_embed(x)))


@dataclasses.dataclass(frozen=True)
class Frozen:
    images: Tensor
    labels: Tensor
    names: list[str]


class Named(NamedTuple):
    images: Tensor
    labels: Tensor


class Encoding(UserDict):
    def __getattr__(self, name):
        return self.data[name]


def inputs(batch):
    """Images and labels, however they are held."""
    match batch:
        case Frozen() | Named() | Encoding():
            return batch.images, batch.labels
        case dict():
            return batch["images"], batch["deep"][0]
    return batch


def loss_fn(model, batch):
    images, labels = inputs(batch)
    return functional.cross_entropy(model(images), labels)


SEEN = []  # by a loss_fn; what its closure holds, a probe restores


@pytest.fixture(autouse=True)
def _unseen():
    SEEN.clear()


KINDS = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "dict": lambda x, y: {"images": x, "deep": (y, "text", None), "table": torch.ones(3, 3)},
    "named tuple": Named,
    "dataclass": lambda x, y: Frozen(x, y, ["a"] * ROWS),
    "mapping": lambda x, y: Encoding(images=x, labels=y),
}


class Loop:
    """A classifier in training; the body of its step can be changed."""

    def __init__(self, transport, **options):
        torch.manual_seed(0)
        self.transport = transport
        self.model = Classifier()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        options = {"loss_fn": loss_fn, "probe_every": 2, "probes": ("gnb", "direction")} | options
        self.watch = sharpwatch.attach(self.model, self.optimizer, training_job="job", transport=transport, **options)

    def data(self):
        labels = torch.randint(0, 4, (ROWS,))
        return torch.randn(ROWS, 6) + labels.view(-1, 1), labels

    def step(self, batch, *, observe=True):
        loss = loss_fn(self.model, batch)
        loss.backward()
        if observe:
            self.watch.observe(loss=loss, batch=batch)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def probes(self, kind):
        return [getattr(sample, kind) for sample in self.transport.samples if sample.HasField(kind)]

    @property
    def reasons(self):
        failures = (failure for sample in self.transport.samples for failure in sample.health.probe_failures)
        return {failure.probe: failure.reason for failure in failures}

    def close(self):
        self.watch.close()
        assert self.transport.samples[-1].health.swallowed_errors == 0


@pytest.fixture
def loop(transports):
    return Loop(transports.new())


@pytest.mark.parametrize("kind", KINDS)
def test_every_probe_runs_on_rows_of_the_observed_batch(transports, kind):
    loop = Loop(transports.new(), probes=PROBES)
    for _ in range(6):
        loop.step(KINDS[kind](*loop.data()))
    loop.close()
    assert set(loop.reasons) <= {"gradient_noise"}  # a step of one micro-batch has none
    assert all(len(loop.probes(each)) == 3 for each in PROBES)
    assert {probe.rows for probe in loop.probes("direction")} == {ROWS // 4}


def test_loss_fn_gets_the_same_rows_of_every_tensor_in_the_loops_own_nest(transports):
    def looking(model, batch):
        SEEN.append(batch)
        return functional.cross_entropy(model(batch["x"]), batch["y"])

    loop = Loop(transports.new(), loss_fn=looking, probes=("direction",))
    x, y = loop.data()
    x[:, 0] = torch.arange(ROWS)
    batch = {"x": x, "y": y, "number": torch.arange(ROWS), "weights": torch.rand(4), "scale": torch.tensor(2.0), "n": 7}
    for _ in range(2):
        functional.cross_entropy(loop.model(x), y).backward()
        loop.watch.observe(batch=batch)
        loop.optimizer.step()
    loop.close()
    assert loop.reasons == {}
    assert len(SEEN) >= 3
    for rows in SEEN[2:]:  # after a trial on two rows and on one
        kept = rows["number"]
        assert len(kept) == ROWS // 4
        assert torch.equal(rows["x"][:, 0], kept.float())
        assert torch.equal(rows["y"], y[kept])
        assert torch.equal(rows["weights"], batch["weights"])
        assert (rows["scale"], rows["n"]) == (2.0, 7)


def test_probes_leave_the_training_as_it_is(transports):
    def trained(**options):
        loop = Loop(transports.new(), **options)
        for _ in range(6):
            loop.step(loop.data())
        loop.close()
        return [*loop.model.parameters(), torch.rand(3)]

    assert all(map(torch.equal, trained(probes=PROBES), trained(probes=())))


def test_a_batch_observed_before_the_forward_counts(loop):
    for _ in range(4):
        batch = loop.data()
        loop.watch.observe(batch=batch)
        loop.step(batch, observe=False)
    loop.close()
    assert loop.reasons == {}
    assert len(loop.probes("gnb")) == len(loop.probes("direction")) == 2


def test_the_newest_batch_of_a_step_is_probed(transports):
    def looking(model, batch):
        SEEN.append(batch[1])
        return loss_fn(model, batch)

    loop = Loop(transports.new(), loss_fn=looking, probes=("direction",), probe_every=1)
    for label in (0, 1, 2):
        x, y = loop.data()
        loss_fn(loop.model, (x, y)).backward()
        loop.watch.observe(batch=(x, torch.full_like(y, label)))
    loop.optimizer.step()
    loop.close()
    assert loop.reasons == {}
    assert {label for labels in SEEN for label in labels.tolist()} == {2}


def test_a_batch_observed_after_the_step_is_refused_with_the_reason(loop, caplog):
    with caplog.at_level(logging.WARNING, "sharpwatch"):
        for _ in range(8):
            batch = loop.data()
            loss = loss_fn(loop.model, batch)
            loss.backward()
            loop.optimizer.step()
            loop.optimizer.zero_grad()
            loop.watch.observe(loss=loss, batch=batch)
    loop.close()
    assert not loop.probes("direction")
    assert "came after optimizer.step()" in loop.reasons["direction"]
    assert sum(record.message.startswith("observe(batch=...) came after") for record in caplog.records) == 1
    assert [sample.HasField("loss") for sample in loop.transport.samples[1:-1]] == [True] * 7


def test_a_batch_that_the_loop_changed_in_place_is_refused_with_the_reason(loop):
    for _ in range(2):
        x, y = loop.data()
        loss_fn(loop.model, (x, y)).backward()
        loop.watch.observe(batch=(x, y))
        x.copy_(loop.data()[0])  # the next batch, into the same memory
        loop.optimizer.step()
    loop.close()
    assert not loop.probes("direction")
    assert "changed in place" in loop.reasons["direction"]


def test_what_the_loop_takes_out_of_its_dict_stays_in_the_observed_batch(loop):
    for _ in range(2):
        x, y = loop.data()
        batch = {"images": x, "deep": [y]}
        loss_fn(loop.model, batch).backward()
        loop.watch.observe(batch=batch)
        batch.clear()
        loop.optimizer.step()
    loop.close()
    assert loop.reasons == {}
    assert loop.probes("direction")


def test_a_batch_is_held_only_until_the_probe_and_only_where_one_is_due(loop):
    held = []
    for step in range(1, 5):
        batch = loop.data()
        reference = weakref.ref(batch[0].untyped_storage())
        loss_fn(loop.model, batch).backward()
        loop.watch.observe(batch=batch)
        held.append(
            sum(batch[0].data_ptr() == each.data_ptr() for each in gc.get_objects() if type(each) is Tensor) > 1
        )
        loop.optimizer.step()
        loop.optimizer.zero_grad()
        del batch
        gc.collect()
        assert reference() is None, step
    loop.close()
    assert held == [False, True, False, True]


def test_without_loss_fn_the_batch_is_of_no_use_and_the_log_says_so_once(transports, caplog):
    loop = Loop(transports.new(), loss_fn=None, probes=("gnb",))
    with caplog.at_level(logging.WARNING, "sharpwatch"):
        for _ in range(4):
            loop.step(loop.data())
    loop.close()
    assert sum("observe(batch=...) needs attach(loss_fn=...)" in record.message for record in caplog.records) == 1
    assert len(loop.probes("gnb")) == 2  # on the model's own call, as without


@pytest.mark.parametrize("batch", ["text", (), {"x": torch.tensor(1.0)}])
def test_a_batch_without_rows_is_refused_with_the_reason(loop, batch):
    for _ in range(2):
        loss_fn(loop.model, loop.data()).backward()
        loop.watch.observe(batch=batch)
        loop.optimizer.step()
    loop.close()
    assert loop.reasons["direction"] == "the batch given to observe() has no tensor that has a batch dimension"


def test_a_step_whose_batch_is_not_observed_is_not_probed(loop):
    for number in range(1, 7):
        loop.step(loop.data(), observe=number != 4)
    loop.close()
    assert loop.reasons == {}
    assert [sample.step for sample in loop.transport.samples if sample.HasField("direction")] == [2, 6]


def test_logits_fn_gets_the_observed_batch_too(transports):
    def logits_fn(model, batch):
        logits = model(batch[0])
        return logits, batch[1] != 0

    loop = Loop(transports.new(), logits_fn=logits_fn)
    batches = [loop.data() for _ in range(2)]
    for batch in batches:
        loop.step(batch)
    loop.close()
    assert loop.reasons == {}
    (probe,) = loop.probes("gnb")
    assert probe.tokens <= probe.rows == ROWS // 8


def test_a_loss_fn_that_calls_the_model_twice_has_no_gnb(transports):
    def twice(model, batch):
        return loss_fn(model, batch) + loss_fn(model, (-batch[0], batch[1]))

    loop = Loop(transports.new(), loss_fn=twice)
    for _ in range(2):
        loop.step(loop.data())
    loop.close()
    assert loop.reasons == {"gnb": "loss_fn must call the model once for its logits, got 2 calls; pass logits_fn"}
    assert loop.probes("direction")


def test_a_loss_fn_may_call_the_model_that_it_closes_over(transports):
    model = Classifier()

    def closed(_, batch):
        return functional.cross_entropy(model(batch[0]), batch[1])

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    transport = transports.new()
    watch = sharpwatch.attach(model, optimizer, training_job="job", transport=transport, loss_fn=closed, probe_every=1)
    batch = torch.randn(ROWS, 6), torch.randint(0, 4, (ROWS,))
    closed(None, batch).backward()
    watch.observe(batch=batch)
    optimizer.step()
    watch.close()
    assert not transport.samples[-1].health.probe_failures
    assert transport.samples[0].HasField("gnb")
    assert not model._forward_hooks


def test_random_numbers_of_a_loss_fn_are_the_same_in_each_of_a_probes_calls(transports):
    """A diffusion loss draws noise: with new noise at every call a line search would compare different losses."""

    def noisy(model, batch):
        loss = functional.cross_entropy(model(batch[0] + torch.randn_like(batch[0])), batch[1])
        SEEN.append(loss.item())
        return loss

    loop = Loop(transports.new(), loss_fn=noisy, probes=("linesearch",), probe_every=1)
    loop.optimizer.param_groups[0]["lr"] = 0.0  # every point of the line is the same
    loop.step(loop.data())
    loop.close()
    assert len(SEEN) > 3
    assert len(set(SEEN[4:])) == 1  # after those of training and of the trial: on two rows, and twice on one


class OwnLoss(Classifier):
    def forward(self, x, y):
        logits = super().forward(x)
        return {"logits": logits, "loss": functional.cross_entropy(logits, y)}


@pytest.mark.parametrize("first", [True, False])
def test_a_loss_in_a_tuple_that_is_not_trained_on_is_not_measured(transports, first):
    class Pair(OwnLoss):
        def forward(self, x, y):
            found = super().forward(x, y)
            return (found["loss"], found["logits"]) if first else (found["logits"], found["loss"])

    torch.manual_seed(0)
    model, transport = Pair(), transports.new()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    watch = sharpwatch.attach(model, optimizer, training_job="job", transport=transport, probe_every=1)
    found = []
    for own in (True, False, False):
        loss, logits = sorted(model(torch.randn(ROWS, 6), torch.randint(0, 4, (ROWS,))), key=torch.Tensor.dim)
        (loss if own else logits.sigmoid().square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(watch.status.objective.rpartition("(")[2])
    watch.close()
    assert found == ["verified)", "undecided)", "undecided)"]
    assert [sample.HasField("direction") for sample in transport.samples] == [True, False, False, False]
    assert [sample.HasField("gnb") for sample in transport.samples] == [True, False, False, False]


def test_a_model_whose_own_loss_is_not_trained_on_is_not_probed_by_it(transports):
    torch.manual_seed(0)
    model, transport = OwnLoss(), transports.new()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    watch = sharpwatch.attach(model, optimizer, training_job="job", transport=transport, probe_every=1)
    found = []
    for own in (True, False, False, True):
        x, y = torch.randn(ROWS, 6), torch.randint(0, 4, (ROWS,))
        output = model(x, y)
        (output["loss"] if own else functional.cross_entropy(output["logits"], (y + 1) % 4, reduction="sum")).backward()
        optimizer.step()
        found.append(str(watch.status.objective))
    watch.close()
    assert [sample.HasField("direction") for sample in transport.samples] == [True, False, False, True, False]
    # What the loop trains on is read off its backward.
    assert [sample.HasField("gnb") for sample in transport.samples] == [True, True, True, True, False]
    assert found[0] == found[3] == "mean cross-entropy of logits, y as they stand (verified)"
    assert found[1] == found[2] == "summed cross-entropy of logits (verified)"
    reasons = {failure.probe: failure.reason for failure in transport.samples[-1].health.probe_failures}
    assert reasons == {"direction": "the loop does not train on the loss that the model returns: pass loss_fn"}
