"""Things that go wrong in real runs, on purpose: injected at a named step."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

Fault = Literal["none", "lr-jump", "weight-corruption", "bad-batches"]
FAULTS: tuple[Fault, ...] = get_args(Fault)

# A jump by 10 heals by itself within 100 steps, so it would prove nothing; after one by 30 neither model gets back
# to where it was (docs/log.md). The rate stays up to the end of the run, as a wrong schedule would leave it.
LR_JUMP = 30.0
# What a flipped exponent bit makes of a weight of order 0.02.
CORRUPT_WEIGHT = 300.0
BAD_BATCHES = 3


def rate_factor(fault: Fault, step: int, fault_step: int) -> float:
    """By how much the schedule is wrong at `step`."""
    return LR_JUMP if fault == "lr-jump" and step >= fault_step else 1.0


def corrupt_weight(model: nn.Module) -> str:
    """Overwrite one weight of the third layer's feed-forward block; returns the parameter's name."""
    for name, parameter in model.named_parameters():
        if ".2.mlp." in name and parameter.dim() == 2:
            with torch.no_grad():
                parameter[parameter.shape[0] // 2, parameter.shape[1] // 2] = CORRUPT_WEIGHT
            return name
    raise ValueError("no feed-forward matrix in a third layer")


def spoil_batch(tokens: Tensor, vocabulary: int, generator: torch.Generator) -> Tensor:
    """Noise in the shape of `tokens`, as a broken shard would deliver."""
    return torch.randint(vocabulary, tokens.shape, generator=generator)
