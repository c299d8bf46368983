"""Listens to the gradients of a model's outputs in the training loop's own backward."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from sharpwatch.agent.hooks import Hook
from sharpwatch.agent.safety import ExceptionBarrier
from sharpwatch.curvature.objective.outputs import named_outputs
from sharpwatch.curvature.objective.seen import OutputSample
from sharpwatch.curvature.parameters.shards import is_dtensor


class OutputListener:
    """Samples the outputs of the newest forward of a step, and their gradients.

    Gradients are left as they are. Copies are taken of some positions only: the output is not kept alive, and the
    backward needs little more memory.

    Args:
        barrier: Ends errors of the hooks.

    Attributes:
        seconds: How long listening took since the last `take`.
    """

    def __init__(self, barrier: ExceptionBarrier) -> None:
        self.seconds = 0.0
        self._barrier = barrier
        self._source = torch.Generator(device="cpu").manual_seed(0)
        self._samples: list[OutputSample] = []
        self._handles: list[RemovableHandle] = []

    def returned(self, output: Any) -> None:
        """The model returned `output` in training."""
        started = time.perf_counter()
        self.remove()
        for name, tensor in named_outputs(output).items():
            if tensor.requires_grad and not is_dtensor(tensor):
                sample = OutputSample(name, tensor, self._source)
                self._samples.append(sample)
                # By the graph's node, which is not kept: it would keep the whole graph of a forward without backward.
                edge = get_gradient_edge(tensor)
                hook = Hook(partial(self._arrives, sample, edge.output_nr))
                self._handles.append(edge.node.register_prehook(hook))
        self.seconds += time.perf_counter() - started

    def take(self) -> list[OutputSample]:
        """Remove the hooks and return the samples of the newest forward."""
        samples = self._samples
        self.remove()
        return samples

    def remove(self) -> None:
        """Remove the hooks and forget the samples."""
        while self._handles:
            self._handles.pop().remove()
        self._samples = []

    def _arrives(self, sample: OutputSample, number: int, gradients: tuple[Tensor | None, ...]) -> None:
        started, gradient = time.perf_counter(), gradients[number]
        with self._barrier.guard("reading the gradient of an output"):
            if gradient is not None:
                sample.take(gradient)
        self.seconds += time.perf_counter() - started
