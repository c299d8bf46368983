"""A probe runs the model's own code: whatever that keeps, draws or is given is as if there had been no probe."""

import os
import random
import signal
import threading
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import sharpwatch

PROBES = ("gnb", "direction", "hutchinson", "lanczos", "linesearch")
VOCABULARY, WIDTH, ROWS = 17, 16, 8


class Model(nn.Module):
    """Its output depends on what `Kept` tells of the calls so far, `given` on what a caller does."""

    def __init__(self, kept):
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1), nn.Linear(WIDTH, WIDTH))
        self.kept = kept
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids, given=None):
        x = self.wte(ids)
        x = self.kept(x + self.mlp(x), given)
        logits = self.lm_head(x)
        return {"logits": logits, "loss": functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())}


class Kept(nn.Module):
    """Scales by what `change` brings about in `value`, a number below 1 or so."""

    def __init__(self, value, change):
        super().__init__()
        self.value, self.change = value, change
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x, given):
        return self.norm(x) * (1 + float(self.change(self.value if given is None else given)) % 1)


class Tally:
    def __init__(self):
        self.calls, self.seen = 0, {"last": torch.zeros(3)}

    def add(self):
        self.calls += 1
        self.seen["last"].add_(0.1)
        return 0.1 * self.calls + self.seen["last"].sum()


@dataclass(slots=True)
class Slotted:
    calls: int = 0


@dataclass(frozen=True, slots=True)
class Sealed:
    tally: Slotted = field(default_factory=Slotted)


def count(tally):
    tally.calls += 1
    return 0.1 * tally.calls


def grow(values):
    values += 0.07
    return values.sum()


def collect(container):
    container.append(0.1)
    return sum(container)


def nested(state):
    state["a"]["calls"] += 1
    return 0.1 * state["a"]["calls"]


def normalised(norm):
    return norm(torch.rand(4, 2)).sum() * 0 + norm.running_mean.sum()


VALUES = {
    "tensors in a dict": (lambda: {"ema": torch.zeros(3)}, lambda kept: grow(kept["ema"])),
    "tensors in a list": (lambda: [torch.zeros(3)], lambda kept: grow(kept[0])),
    "a tensor in a tuple": (lambda: (torch.zeros(3),), lambda kept: grow(kept[0])),
    "a nested dict": (lambda: {"a": {"calls": 0}}, nested),
    "a deque": (deque, collect),
    "an array": (lambda: np.zeros(3), grow),
    "an object": (Tally, Tally.add),
    "an object with slots": (Slotted, count),
    "a frozen object with slots": (Sealed, lambda kept: count(kept.tally)),
    "a module outside the model": (lambda: [nn.BatchNorm1d(2, affine=False)], lambda kept: normalised(kept[0])),
    "NumPy's Generator": (lambda: np.random.default_rng(3), lambda source: source.random()),
    "NumPy's RandomState": (lambda: np.random.RandomState(3), lambda source: source.rand()),
    "Python's Random": (lambda: random.Random(3), lambda source: source.random()),  # noqa: S311 - no secret
    "a generator in a dict": (
        lambda: {"mask": torch.Generator().manual_seed(3)},
        lambda sources: torch.rand((), generator=sources["mask"]),
    ),
}
GIVEN = {
    "a generator": (
        lambda: torch.Generator().manual_seed(3),
        lambda source: torch.rand((), generator=source),
    ),
    "a memory": (lambda: torch.zeros(3), grow),
    "a list": (list, collect),
    "an object": (Tally, Tally.add),
}


def train(kept, *, given=None, watched, batches=None, probes=PROBES, steps=6, loss_fn=None):
    """The losses and weights of a run; and the reasons of probes that failed."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - what the program draws from
    model = Model(kept)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    watch = None
    if watched:
        watch = sharpwatch.attach(
            model,
            optimizer,
            training_job="state",
            address="127.0.0.1:9",
            probes=probes,
            probe_every=2,
            loss_fn=loss_fn and (lambda called, batch: loss_fn(called(*batch.args), *batch.args)),
        )
    losses = []
    for _ in range(steps):
        ids = torch.randint(VOCABULARY, (ROWS, 6)) if batches is None else batches()
        output = model(ids, given)
        loss = loss_fn(output, ids) if loss_fn else output["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    failures = []
    if watch is not None:
        loop = watch._watched
        failures = [(failure.probe, failure.reason) for failure in loop.scheduler.runner.failures]
        assert loop.barrier.swallowed == 0
        watch.close()
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()]), failures


def same(plain, watched):
    assert watched[0] == plain[0]
    assert torch.equal(watched[1], plain[1])


@pytest.mark.parametrize("name", VALUES)
def test_what_a_model_keeps_is_as_without_a_probe(name):
    make, change = VALUES[name]
    plain = train(Kept(make(), change), watched=False)
    assert train(Kept(make(), lambda _: 0.0), watched=False)[0] != plain[0]  # it matters
    watched = train(Kept(make(), change), watched=True)
    same(plain, watched)
    assert watched[2] == []


@pytest.mark.parametrize("name", GIVEN)
def test_what_a_model_is_given_is_as_without_a_probe(name):
    make, change = GIVEN[name]
    plain = train(Kept(None, change), given=make(), watched=False)
    watched = train(Kept(None, change), given=make(), watched=True)
    same(plain, watched)
    assert watched[2] == []


class Centred(nn.Module):
    """A criterion with a running mean."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(VOCABULARY))

    def forward(self, output, ids, given=None):
        del given
        logits = output["logits"] - self.centre
        self.centre.mul_(0.9).add_(output["logits"].detach().mean((0, 1)), alpha=0.1)
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_what_a_loss_function_keeps_is_as_without_a_probe():
    plain = train(Kept(None, lambda _: 0.0), watched=False, loss_fn=Centred())
    watched = train(Kept(None, lambda _: 0.0), watched=True, loss_fn=Centred())
    same(plain, watched)
    # A cross-entropy of shifted logits, that is, of no output of the model.
    assert {probe for probe, _ in watched[2]} == {"gnb"}


class Noisy(nn.Module):
    """A hook of the user's that is a module, and changes what comes out by how often it was called."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, _module, _args, output):
        self.calls += 1
        return output * (1 + 0.1 * self.calls)


def test_a_hook_that_is_a_module_is_not_run_by_a_probe():
    def run(watched):
        kept = Kept(None, lambda _: 0.0)
        kept.register_forward_hook(Noisy())
        return train(kept, watched=watched)

    same(run(watched=False), run(watched=True))


def test_modes_and_hooks_around_the_loop_see_no_probe():
    def run(watched):
        packed = []

        def pack(tensor):
            packed.append(1)
            return tensor * (1 - 1e-3 * (len(packed) % 3)) if tensor.is_floating_point() else tensor

        counter = FlopCounterMode(display=False)
        with counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trained = train(Kept(None, lambda _: 0.0), watched=watched)
        return trained, len(packed), counter.get_total_flops()

    plain, watched = run(watched=False), run(watched=True)
    same(plain[0], watched[0])
    assert plain[1:] == watched[1:]
    assert watched[0][2] == []


@pytest.mark.parametrize(
    ("put", "value", "before"),
    [
        (torch.set_default_dtype, torch.float64, torch.float32),
        (torch.set_default_dtype, torch.bfloat16, torch.float32),
        (torch.set_default_device, "meta", "cpu"),  # as "cuda" would: elsewhere than the model
    ],
)
def test_probes_don_t_take_what_the_program_makes_new_tensors_as(put, value, before):
    def batches():
        put(value)
        return torch.randint(VOCABULARY, (ROWS, 6), device="cpu")

    try:
        watched = train(Kept(None, lambda _: 0.0), watched=True, batches=batches)
    finally:
        put(before)
    assert watched[2] == []
    same(train(Kept(None, lambda _: 0.0), watched=False), watched)


class Renormalised(nn.Module):
    """As `nn.Embedding(max_norm=...)` and nGPT do: a forward that writes into its weights."""

    def __init__(self, how):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.how = how

    def forward(self, x, given):
        del given
        if self.how == "data":
            self.norm.weight.data.mul_(0.99)
        else:
            with torch.no_grad():
                self.norm.weight.copy_(self.norm.weight / self.norm.weight.norm())
        return self.norm(x)


@pytest.mark.parametrize("how", ["data", "no_grad"])
def test_a_model_whose_forward_writes_into_its_weights_is_not_probed(how):
    plain, watched = train(Renormalised(how), watched=False), train(Renormalised(how), watched=True)
    same(plain, watched)
    assert {probe for probe, _ in watched[2]} == set(PROBES)
    reasons = {reason for _, reason in watched[2]}
    assert reasons == {"the model's forward writes into kept.norm.weight: no probe may run it"}


def test_what_another_thread_draws_during_a_probe_is_not_undone():
    drawn, steps = [], []

    def draw(_):
        """In a probe but the first, which finds that the model doesn't draw: as a thread that prepares a batch."""
        if not kept.training and len(steps) > 2:
            thread = threading.Thread(target=lambda: drawn.append(np.random.rand()))  # noqa: NPY002 - as loaders do
            thread.start()
            thread.join()
        return 0.0

    def batches():
        steps.append(1)
        return torch.randint(VOCABULARY, (ROWS, 6))

    kept, ended = Kept(None, draw), threading.Event()
    loader = threading.Thread(target=ended.wait)
    loader.start()
    try:
        train(kept, watched=True, batches=batches, probes=("gnb",))
    finally:
        ended.set()
        loader.join()
    np.random.seed(0)  # noqa: NPY002
    assert drawn == list(np.random.rand(len(drawn)))  # noqa: NPY002 - each number once
    assert len(drawn) > 1


@pytest.mark.parametrize("kind", ["gnb", "direction", "linesearch"])
def test_a_checkpoint_from_a_signal_handler_is_of_the_run_not_of_a_probe(kind):
    saved, probed = [], []

    def interrupt(_):
        if not kept.training and not probed:
            probed.append(True)
            os.kill(os.getpid(), signal.SIGUSR1)
        return 0.0

    kept = Kept(None, interrupt)
    models = []

    def save(*_):
        saved.append((models[0].training, {name: w.clone() for name, w in models[0].state_dict().items()}))

    class Watched(Model):
        def __init__(self, *args):
            super().__init__(*args)
            models.append(self)

    before = signal.signal(signal.SIGUSR1, save)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "Model", Watched)
            weights = train(kept, watched=True, probes=(kind,), steps=2)[1]
    finally:
        assert signal.signal(signal.SIGUSR1, before) is save
    ((training, state),) = saved
    assert training
    assert torch.equal(torch.cat([w.flatten() for w in state.values()]), weights)
