"""What a made-up run shows at a step, and incidents of it, for tests of what the daemon makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sharpwatch.daemon.detection.run_detection import RunDetection
from sharpwatch.daemon.records import Incident, LayerTap, Observation, OptimizerGroup

_HEALTHY = {
    "gradient_norm": np.float32(1),
    "weight_norm": np.float32(10),
    "update_rms": np.float32(1),
    "non_finite": np.int64(0),
    "learning_rate": np.float32(1e-3),
    "lr_multiplier": np.float32(1),
    "second_moment": np.float32(np.nan),
}


def layer_tap(rows: int, *, clip_factor: float = np.nan, **changes: Any) -> LayerTap:
    """Healthy statistics of so many layer blocks; `changes` are one number for all of them, or an array."""
    if unknown := changes.keys() - _HEALTHY.keys():
        raise TypeError(f"no statistics of that name: {', '.join(sorted(unknown))}")
    values = {name: np.broadcast_to(value, rows) for name, value in (_HEALTHY | changes).items()}
    return LayerTap(**values, clip_factor=clip_factor)


def incident(identity: str = "i1", **changes: Any) -> Incident:
    """A spike of the loss at step 100, open and of no block; `changes` are its fields that matter."""
    usual = {
        "run": "run",
        "name": "LossSpike",
        "cause": "data",
        "severity": "warning",
        "layer_blocks": (),
        "evidence": ("z 9",),
        "first_step": 100,
        "active": True,
    }
    fields = usual | changes
    follow = {
        "names": (fields["name"],),
        "blocks": tuple(dict.fromkeys(name.rpartition(".")[2] for name in fields["layer_blocks"])),
        "onset": fields["first_step"],
        "last_step": fields["first_step"],
    }
    return Incident(identity, **follow | fields)


PARAMETERS, WEIGHT_NORM, RATE = 1_000_000, 20.0, 1e-3  # of each layer block of `healthy_run`
SETTINGS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


def healthy_run(
    steps: int, rows: int = 8, *, seed: int = 0, warm_up: int = 20, shares: Sequence[float] = ()
) -> list[Observation]:
    """Steps 1 to `steps` of a run under Adam that stands at its level, with normal noise.

    Its rate has a warm-up; or else `shares` says how much of the usual rate each step has.
    """
    rng = np.random.default_rng(seed)
    rate = RATE * np.asarray(shares if len(shares) else np.minimum(np.arange(1, steps + 1) / warm_up, 1.0))
    loss = 3.0 + 0.03 * rng.standard_normal(steps)
    gradient, update = np.exp(0.1 * rng.standard_normal((2, steps, rows)))
    unit = np.append(0.0, rate)[:-1, None] * np.sqrt(PARAMETERS) / WEIGHT_NORM  # of the step before
    weight = WEIGHT_NORM * np.exp(np.cumsum(0.02 * unit * rng.standard_normal((steps, rows)), axis=0))
    return [
        Observation(
            i + 1,
            float(i),
            float(loss[i]),
            layer_tap(
                rows,
                gradient_norm=gradient[i].astype(np.float32),
                update_rms=update[i].astype(np.float32),
                weight_norm=weight[i].astype(np.float32),
                learning_rate=np.float32(rate[i]),
                second_moment=np.float32(1e-4),
            ),
            {} if i else {(0, 0): OptimizerGroup(SETTINGS, 0)},
        )
        for i in range(steps)
    ]


def scaled(seen: Observation, where: int | slice = slice(None), **factors: float) -> Observation:
    """An observation whose statistics `factors` names are so many times as large, in one layer block or in all."""
    changes = {}
    for name, factor in factors.items():
        values = np.array(getattr(seen.layers, name))
        values[where] = values[where] * factor
        changes[name] = values
    return replace(seen, layers=replace(seen.layers, **changes))


class Ids:
    """Makes ids; a copy goes on by itself."""

    def __init__(self) -> None:
        self._made = 0

    def __call__(self) -> str:
        self._made += 1
        return f"i{self._made}"


def detection(
    rows: int = 8, parameters: int = PARAMETERS, parameter_names: Sequence[Sequence[str]] = ()
) -> RunDetection:
    """Detection for a run of that many layer blocks: layers.0.qk, layers.0.vo, layers.0.ffn, layers.0.norm, …"""
    names = [(("qk", "vo", "ffn", "norm")[i % 4], f"layers.{i // 4}") for i in range(rows)]
    return RunDetection("run", names, np.full(rows, parameters), Ids(), parameter_names=parameter_names)
