"""DeepSpeed's own optimizers are none of torch's: they are watched through their `step()`, and left to themselves."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch
from missing import missing
from small_llama import RATE, backward, llama, order, same

import sharpwatch
from sharpwatch.agent.optimizers import stepping
from sharpwatch.errors import AttachError

REASON = "DeepSpeed keeps gradients, master weights and their groups to itself"


class DeepSpeedOptimizer:
    """DeepSpeed's base class."""


class Zero(DeepSpeedOptimizer):
    """Steps copies of the weights once for each group, as ZeRO does, and copies them back."""

    def __init__(self, model, rates=(RATE, RATE)):
        parameters = list(model.parameters())
        self.pairs = [(p, p.detach().clone().requires_grad_()) for p in parameters]
        masters = [master for _, master in self.pairs]
        groups = [{"params": masters[:4], "lr": rates[0]}, {"params": masters[4:], "lr": rates[1]}]
        self.optimizer = torch.optim.SGD(groups)

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, *_):
        for parameter, master in self.pairs:
            master.grad, parameter.grad = parameter.grad, None
        whole = self.optimizer.param_groups
        for group in whole:
            self.optimizer.param_groups = [group]
            self.optimizer.step()
        self.optimizer.param_groups = whole
        with torch.no_grad():
            for parameter, master in self.pairs:
                parameter.copy_(master)


def trained(model, optimizer, steps=4):
    for number in range(1, steps + 1):
        backward(model, number)
        optimizer.step()


def test_a_step_is_one_however_often_torchs_optimizer_inside_steps(wires):
    ours, theirs = llama(), llama()
    optimizer = Zero(ours)
    with sharpwatch.attach(ours, optimizer, training_job="zero", probes=()) as watch:
        order(wires[0], {"ffn": 0.5}, at=2)
        trained(ours, optimizer)
        assert watch.step == 4
        with pytest.raises(AttachError, match="watched already"):
            sharpwatch.attach(ours, optimizer, training_job="zero")
    trained(theirs, Zero(theirs))
    assert same(ours, theirs) == []
    assert wires[0].hello.optimizer == "Zero"
    assert [result.detail for result in wires[0].results] == [f"learning rates can't be changed: Zero: {REASON}"]


@pytest.mark.parametrize(("rates", "seen"), [((RATE, RATE), RATE), ((RATE, 3e-3), None)])
def test_its_rate_is_shown_where_it_has_one(rates, seen):
    model = llama()
    driven = stepping(Zero(model, rates), model)
    driven.register_step_pre_hook(lambda *_: None)
    trained(model, driven, steps=1)
    assert [group["lr"] for group in driven.param_groups] == [seen]


def test_once_the_watch_is_closed_its_step_is_its_own_again_in_effect():
    ours, theirs = llama(), llama()
    optimizer = Zero(ours)
    sharpwatch.attach(ours, optimizer, training_job="zero", probes=(), address="127.0.0.1:9").close()
    trained(ours, optimizer)
    trained(theirs, Zero(theirs))
    assert same(ours, theirs) == []


def test_disabled_it_is_not_touched(monkeypatch):
    monkeypatch.setenv("SHARPWATCH_DISABLED", "1")
    model = llama()
    optimizer = Zero(model)
    sharpwatch.attach(model, optimizer, training_job="zero").close()
    assert "step" not in vars(optimizer)


# Each line: stage, the optimizer said in the hello, steps, taps, steps with a gnb probe, whether the bits are the same.
REAL = """
import os, sys, torch
os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
import deepspeed, sharpwatch
deepspeed.ops.__compatible_ops__.clear()  # else it compiles its own all-reduce for this machine
import torch.distributed as dist
sys.path[:0] = sys.argv[1:]
import stand_ins
from sharpwatch.agent import attach as attach_module
from small_llama import llama, loss_of, order, same
wires = []
def wire(hello, **options):
    wires.append(stand_ins.Wire(hello, **options))
    return wires[-1]
attach_module.CourierPipe = wire
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
def made(stage):
    model = llama()
    groups = [{"params": [p for p in model.parameters() if (p.ndim == 2) == decayed]} for decayed in (True, False)]
    return deepspeed.initialize(model=model, model_parameters=groups, config={
        "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 1.0, "zero_optimization": {"stage": stage},
        "bf16": {"enabled": stage == 2}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}})
for stage in (0, 1, 2, 3):
    (ours, optimizer, *_), (theirs, *_) = made(stage), made(stage)
    try:
        watch = sharpwatch.attach(ours.module, optimizer, training_job="real", probe_every=2)
    except sharpwatch.SharpwatchError as error:
        print("#", stage, error)
        continue
    order(wires[-1], {"ffn": 0.5}, at=3)
    torch.manual_seed(1)
    for number in range(1, 6):
        for engine in (ours, theirs):
            engine.backward(loss_of(engine, number))
            engine.step()
    taken = watch.step
    watch.close()
    samples = wires[-1].samples
    print("#", stage, wires[-1].hello.optimizer, taken, sum(sample.HasField("tap") for sample in samples),
        sum(sample.HasField("gnb") for sample in samples), "same" if not same(ours.module, theirs.module) else "differ")
"""


def test_deepspeed_itself_is_watched_to_the_bit(tmp_path, request):
    if importlib.util.find_spec("deepspeed") is None:
        missing("deepspeed")
    path = tmp_path / "real.py"
    path.write_text(REAL)
    here = request.path.parent
    command = [sys.executable, str(path), str(here), str(here.parents[1])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("# ") for line in done.stdout.splitlines() if line.startswith("# ")]
    assert lines == [
        "0 AdamW 5 5 2 differ",  # torch's own optimizer: it took the multiplier
        "1 DeepSpeedZeroOptimizer 5 5 2 same",
        "2 DeepSpeedZeroOptimizer 5 5 2 same",
        "3 model: DeepSpeed's ZeRO-3 holds its parameters; with stages up to 2 it can be watched",
    ]
