"""What detectors see of a run: its newest samples, scored, and names for what stands out in them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sharpwatch.daemon.detection.signals import Scores
from sharpwatch.daemon.detection.thresholds import Limit
from sharpwatch.daemon.records import Finding
from sharpwatch.wire import Doubles, Ints

_TO_LAYER = re.compile(r"^(?:.*?\.)?\d+\.")


@dataclass(slots=True)
class Judged:
    """The newest samples of a run, for detectors.

    Attributes:
        now: The newest scores.
        step: The newest step.
        recent: The newest scores and those before, the newest last.
        probes: The newest scores with a stability ratio, the newest last.
        sharp_probes: The newest scores with a trace, the newest last.
        names: Of the layer blocks, as "layers.3.qk".
        blocks: The block types.
        statistics: Of the newest sample, as `thresholds.statistics`.
        limits: By statistic, what is worth a warning, and what a page.
        exceeded: The statistics that are worth a warning.
        parameters: The names of the parameters of each layer block; empty where they are not known.
    """

    now: Scores
    step: int
    recent: Sequence[Scores]
    probes: Sequence[Scores]
    sharp_probes: Sequence[Scores]
    names: Sequence[str]
    blocks: Sequence[str]
    statistics: Doubles
    limits: Mapping[str, Limit]
    exceeded: Sequence[str]
    parameters: Sequence[Sequence[str]] = ()

    def named(self, badness: Doubles, where: np.ndarray) -> tuple[str, ...]:
        """The layer blocks `where`, worst first."""
        order = np.argsort(-np.nan_to_num(badness, nan=-math.inf, posinf=1e300), kind="stable")
        return tuple(self.names[i] for i in order if where[i])

    def changed_parameter(self, scores: Scores, layer_block: str) -> str:
        """The name of the parameter whose weights moved a layer block's norm; empty where it is not known."""
        layers = scores.observation.layers
        return "" if layers is None else self.parameter(layer_block, layers.changed_parameter)

    def parameter(self, layer_block: str, indices: Ints) -> str:
        """The name of the parameter that `indices` [L] say of a layer block; empty where it is not known."""
        place = self.names.index(layer_block)
        if not indices.size or not self.parameters:
            return ""
        # Of the newest samples some may be of an attempt whose agent has told other names, or none.
        index, names = int(indices[place]), self.parameters[place]
        return names[index] if 0 <= index < len(names) else ""


Detector = Callable[[Judged], Iterable[Finding]]


def listed(names: Sequence[str], most: int = 4) -> str:
    """The first of `names`, so many at most, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def with_parameter(layer_block: str, parameter: str) -> str:
    """A layer block and which of its parameters, by the name that this has within the layer."""
    if not parameter:
        return layer_block
    return f"{layer_block} ({_TO_LAYER.sub('', parameter, count=1) if '.' in layer_block else parameter})"
