"""Wherever two plain runs agree bit for bit, a plain and a watched one do: ranks × optimizer × execution × precision.

Every pair of levels is trained by default; all that there is by `make test-matrix`.
"""

from __future__ import annotations

import itertools
import os
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from stand_ins import LLAMA

import sharpwatch
from sharpwatch.agent.probes.builtin import PROBES, sharded_probes
from sharpwatch.testing import InMemoryTransport

STEPS = 11
PROBE_EVERY = 5
NO_NOISE = {  # why there is no gradient noise in a process of its own
    "the step had one micro-batch: gradient noise takes two, or ranks under DDP",
    "the step's forwards and backwards were not one to one",  # after a step that raised
}
PROCESSES = {"1 process": 1, "DDP 2": 2, "FSDP2 2": 2}
FACTORS = (tuple(PROCESSES), ("adamw", "sgd", "muon"), ("eager", "compiled"), ("fp32", "bf16"))
PAIRWISE = [
    ("1 process", "adamw", "eager", "bf16"),
    ("1 process", "sgd", "compiled", "fp32"),
    ("1 process", "muon", "eager", "bf16"),
    ("DDP 2", "adamw", "compiled", "fp32"),
    ("DDP 2", "sgd", "eager", "bf16"),
    ("DDP 2", "muon", "eager", "fp32"),
    ("FSDP2 2", "adamw", "eager", "fp32"),
    ("FSDP2 2", "sgd", "eager", "fp32"),
    ("FSDP2 2", "muon", "compiled", "bf16"),
]


def test_the_default_ones_have_every_pair_of_levels():
    for (i, some), (j, others) in itertools.combinations(enumerate(FACTORS), 2):
        assert {(row[i], row[j]) for row in PAIRWISE} == set(itertools.product(some, others))


def model_of(placement, execution):
    """A small LLaMA with dropout in its attention and its gates; and what the loop calls."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, attention_dropout=0.2)).train()
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Sequential(layer.mlp.act_fn, nn.Dropout(0.1))
    if placement == "FSDP2 2":  # compiled block by block: its gathering stays outside
        for i, layer in enumerate(model.model.layers):
            model.model.layers[i] = fully_shard(torch.compile(layer) if execution == "compiled" else layer)
        return fully_shard(model)
    whole = nn.parallel.DistributedDataParallel(model) if placement == "DDP 2" else model
    return torch.compile(whole) if execution == "compiled" else whole


def optimizers_of(kind, model):
    """One, or Muon for the matrices inside the layers beside AdamW for the rest, which two groups share."""
    parts = {True: [], False: []}
    for name, parameter in model.named_parameters():
        parts[parameter.ndim == 2 and ".layers." in name].append(parameter)
    inner, outer = parts[True], parts[False]
    decayed = [parameter for parameter in outer if parameter.ndim == 2]
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [parameter for parameter in outer if parameter.ndim != 2], "weight_decay": 0.0},
    ]
    if kind == "muon":
        return [torch.optim.Muon(inner, lr=0.02), torch.optim.AdamW(groups, lr=0.01)]
    decayed += inner
    return [torch.optim.AdamW(groups, lr=0.01) if kind == "adamw" else torch.optim.SGD(groups, lr=0.1, momentum=0.9)]


class Training:
    """One run, to the bit in `record`; what a watched one sent in `samples`."""

    def __init__(self, combination, *, watched, prepare):
        placement, kind, execution, precision = combination
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        self.samples, self.failures = [], 0
        self.autocast = precision == "bf16"
        self.model = model_of(placement, execution)
        self.optimizers = optimizers_of(kind, self.model)
        self.schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(each, 2 * STEPS) for each in self.optimizers]
        watch = self._attach(probes_of(placement, kind)) if watched else None
        calls = prepare(self)
        torch.manual_seed(10 + dist.get_rank())  # ranks have data of their own
        losses = [self.step() for _ in range(STEPS)]
        if watch is not None:
            watch.close()
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert (graphs > 0) == (execution == "compiled")
        self.record = {"calls": calls, "graphs": graphs} | bits(
            {"losses": torch.stack(losses), "random": torch.get_rng_state()}
            | self.model.state_dict()
            | {
                (i, name, key): torch.as_tensor(value)
                for i, optimizer in enumerate(self.optimizers)
                for name, state in optimizer.state_dict()["state"].items()
                for key, value in state.items()
            }
            | {
                (i, j): torch.as_tensor(group["lr"])
                for i, optimizer in enumerate(self.optimizers)
                for j, group in enumerate(optimizer.param_groups)
            }
        )

    def _attach(self, probes):
        transport = InMemoryTransport()
        self.samples = transport.samples
        options = {"training_job": "matrix", "probe_every": PROBE_EVERY, "probes": probes, "transport": transport}
        return sharpwatch.attach(self.model, self.optimizers, **options)

    def step(self):
        tokens = torch.randint(32, (8, 8))  # from the source that dropout draws from, too
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            try:
                optimizer.step()
            except TypeError:
                self.failures += 1
            schedule.step()
            optimizer.zero_grad()
        return loss.detach()


def probes_of(placement, kind):
    if placement == "FSDP2 2":
        return sharded_probes()
    return PROBES if kind == "adamw" else tuple(probe for probe in PROBES if probe != "preconditioned")


def bits(tensors):
    """Of each tensor what this rank holds, as bytes."""
    held = {name: each.to_local() if hasattr(each, "to_local") else each for name, each in tensors.items()}
    return {name: each.contiguous().numpy().tobytes() for name, each in held.items()}


def differing(one, other):
    return [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)]


def compare(combination, prepare=lambda _: None):
    """In what two plain runs differ, and a plain and a watched one; what the latter sent; its failed steps."""
    plain, again, watched = (
        Training(combination, watched=watched, prepare=prepare) for watched in (False, False, True)
    )
    sent = [
        {
            "step": sample.step,
            "probes": [probe for probe in PROBES if sample.HasField(probe)],
            "swallowed": sample.health.swallowed_errors,
            "failures": [failure.reason for failure in sample.health.probe_failures],
        }
        for sample in watched.samples
    ]
    return differing(plain.record, again.record), differing(plain.record, watched.record), sent, watched.failures


def assert_identical(compared, placement, kind, steps=STEPS):
    for again, watched, *_ in compared:
        assert (again, watched) == ([], [])  # on CPUs two plain runs agree everywhere
    sent = compared[0][2]
    assert [sample["step"] for sample in sent] == [*range(1, steps + 1), steps]
    assert not any(sample["swallowed"] for sample in sent)
    failures = {failure for sample in sent for failure in sample["failures"]}
    assert failures <= (NO_NOISE if placement == "1 process" else set())
    probed = [sample["step"] for sample in sent if sample["probes"] == list(probes_of(placement, kind))]
    # Where all ranks probe, the message of an earlier step announces the probe.
    assert len(probed) == 1 if placement == "FSDP2 2" else probed == [PROBE_EVERY, 2 * PROBE_EVERY]


def require_headers():
    """What inductor compiles includes Python's."""
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("Python.h is not installed")


@pytest.mark.parametrize(
    "combination",
    [
        pytest.param(row, id=", ".join(row), marks=() if row in PAIRWISE else pytest.mark.matrix)
        for row in itertools.product(*FACTORS)
    ],
)
def test_a_watched_run_is_bit_identical_to_a_plain_one(combination, ranks, program, monkeypatch, tmp_path_factory):
    placement, kind, execution, _ = combination
    if execution == "compiled":
        program("g++")
        require_headers()
        # One for all workers: what is common, as what the processor can, is compiled once.
        base = tmp_path_factory.getbasetemp()
        shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(shared / "inductor"))
        monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    compared = ranks(compare, PROCESSES[placement], combination, timeout=240)
    assert_identical(compared, placement, kind)


def disturb(training):
    """Hooks of the user's that change what is computed, and a `step()` that raises half-way; their calls, in order."""
    calls = []

    def counted(name, hook):
        def call(*args):
            calls.append(name)
            return hook(*args)

        return call

    def rates(factor):
        def scale(optimizer, *_):
            for group in optimizer.param_groups:
                group["lr"] *= factor

        return scale

    def halt(optimizer, *_):
        """At a step that is probed the second group has no betas: it raises when the first has been stepped."""
        if calls.count("halt") == PROBE_EVERY:
            optimizer.param_groups[1]["betas"] = None

    def mend(*_):
        training.optimizers[-1].param_groups[1]["betas"] = (0.9, 0.999)

    mlp, head = training.model.get_submodule("model.layers.0.mlp"), training.model.get_submodule("lm_head")
    mlp.register_forward_pre_hook(counted("before", lambda _, args: (0.9 * args[0],)))
    mlp.register_forward_hook(counted("after", lambda _, __, output: nn.functional.dropout(output, 0.1)))
    head.register_full_backward_hook(counted("backward", lambda _, given, __: (2 * given[0],)))
    for optimizer in training.optimizers:
        optimizer.register_step_pre_hook(counted("halve", rates(0.5)))
        optimizer.register_step_post_hook(counted("double", rates(2.0)))
    training.optimizers[-1].register_step_pre_hook(counted("halt", halt))
    training.model.register_forward_pre_hook(counted("mend", mend))
    return calls


def compare_disturbed(combination):
    return compare(combination, disturb)


@pytest.mark.parametrize(
    ("placement", "kind", "steps"),
    [("1 process", "muon", STEPS), ("FSDP2 2", "adamw", STEPS - 1)],  # that counts in which one of them stepped
)
def test_under_hooks_that_change_values_and_a_step_that_raises_half_way(placement, kind, steps, ranks):
    compared = ranks(compare_disturbed, PROCESSES[placement], (placement, kind, "eager", "fp32"))
    assert_identical(compared, placement, kind, steps)
    assert all(failures == 1 for *_, failures in compared)
