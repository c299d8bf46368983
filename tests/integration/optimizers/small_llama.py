"""A small Llama and the optimizers that train it, each under attach and beside the truth: groups of the user's own."""

from __future__ import annotations

import importlib.util
import io

import pytest
import torch
from missing import missing
from stand_ins import LLAMA
from transformers import LlamaConfig, LlamaForCausalLM

import sharpwatch
from sharpwatch.v1 import types_pb2

MULTIPLIERS = {"emb": 0.5, "qk": 0.3, "ffn": 4.0, "norm": 0.25}  # vo and head stay at 1
FIRST, LAST = 3, 6  # steps under multipliers
RATE = 1e-2


def llama():
    """Wide enough for torchao to quantise the moments of its matrices."""
    torch.manual_seed(7)
    sizes = LLAMA | {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes)).train()


def blocks(model):
    """The block type of each parameter, by name; no parameter of this model is fused."""
    return {row.parameter: row.type for row in sharpwatch.classify(model).rows}


def loss_of(model, step):
    tokens = torch.randint(32, (4, 8), generator=torch.Generator().manual_seed(step))
    return model(input_ids=tokens, labels=tokens).loss


def backward(model, step):
    model.zero_grad()
    loss_of(model, step).backward()


def per_parameter(model, parameters=None):
    """One group for each parameter (of `parameters`), named by its block."""
    kinds, named = blocks(model), {id(parameter): name for name, parameter in model.named_parameters()}
    return [{"params": [each], "block": kinds[named[id(each)]]} for each in parameters or model.parameters()]


def matrices_and_rest(model):
    """What Muon takes, and what is left for AdamW."""
    parameters = dict(model.named_parameters())
    matrices = [p for name, p in parameters.items() if "layers" in name and p.ndim == 2]
    held = {id(p) for p in matrices}
    return matrices, [p for p in parameters.values() if id(p) not in held]


def order(transport, multipliers, *, at, **bounds):
    """Have the agent take `multipliers` from step `at` on."""
    chosen = types_pb2.MultiplierSet(multipliers=multipliers, revision=at)
    transport.command(id=f"{multipliers}@{at}", apply_at_step=at, set_multipliers=chosen, **bounds)


def same(ours, theirs):
    """Names of the parameters that differ in a bit."""
    pairs = zip(ours.named_parameters(), theirs.parameters(), strict=True)
    return [name for (name, a), b in pairs if not torch.equal(a, b)]


def saved(state):
    """A state dict as it comes back from a file: in memory of its own."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def imported(module, name):
    """A class of an optional package; without it the test fails in CI and is skipped elsewhere."""
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        missing(package)
    return getattr(importlib.import_module(module), name)


def torchs(name, **options):
    """An optimizer of torch's own; the test is skipped on a torch that has none of this name."""

    def make(params):
        if not hasattr(torch.optim, name):
            pytest.skip(f"this torch has no {name}")
        return getattr(torch.optim, name)(params, **{"lr": RATE} | options)

    return make


def lion(params):
    return imported("lion_pytorch", "Lion")(params, lr=1e-3, weight_decay=0.1)


def transformers_adafactor(params):
    options = {"relative_step": False, "beta1": 0.9, "weight_decay": 0.1}
    return imported("transformers", "Adafactor")(params, lr=RATE, **options)


def torchao_8bit(params):
    return imported("torchao.optim", "AdamW8bit")(params, lr=RATE, block_size=64)


def bitsandbytes_8bit(params):
    return imported("bitsandbytes.optim", "AdamW8bit")(params, lr=RATE, min_8bit_size=256)


# How each is made, from parameters or from groups.
ELEMENTWISE = {
    "adamw": torchs("AdamW", betas=(0.9, 0.95), weight_decay=0.1),
    "adam amsgrad": torchs("Adam", amsgrad=True),
    "adamw fused": torchs("AdamW", fused=True),
    "adamw foreach": torchs("AdamW", foreach=True),
    "adamw tensor rate": torchs("AdamW", lr=torch.tensor(RATE), foreach=False),
    "adamw maximize": torchs("AdamW", maximize=True),
    "adamax": torchs("Adamax"),
    "nadam": torchs("NAdam"),
    "radam": torchs("RAdam"),
    "adagrad": torchs("Adagrad", lr_decay=0.1),
    "adadelta": torchs("Adadelta", lr=1.0),
    "asgd": torchs("ASGD", t0=4),
    "rmsprop": torchs("RMSprop", centered=True, momentum=0.9),
    "sgd": torchs("SGD"),
    "sgd nesterov": torchs("SGD", momentum=0.9, nesterov=True, weight_decay=0.01),
    "adafactor": torchs("Adafactor"),
    "transformers' adafactor": transformers_adafactor,
    "lion": lion,
    "torchao 8 bit": torchao_8bit,
    "bitsandbytes 8 bit": bitsandbytes_8bit,
}


def _schedule_free(name, **options):
    return lambda params: imported("schedulefree", name)(params, lr=RATE, **options)


SCHEDULE_FREE = {
    "adamw": _schedule_free("AdamWScheduleFree", warmup_steps=5, weight_decay=0.1),
    "adamw one by one": _schedule_free("AdamWScheduleFree", foreach=False, r=1.0),
    "radam": _schedule_free("RAdamScheduleFree"),
    "sgd": _schedule_free("SGDScheduleFree", warmup_steps=5, weight_lr_power=1.0),
}
