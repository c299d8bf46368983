"""Listens to the gradients of a model's outputs in the training loop's own backward."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sharpwatch.agent.hooks import Hook, is_accumulating
from sharpwatch.agent.safety import ExceptionBarrier
from sharpwatch.curvature.objective.direct_gradients import listen
from sharpwatch.curvature.objective.outputs import all_outputs, find_loss
from sharpwatch.curvature.objective.samples import KEPT_ENTRIES, OutputSample, SeenForward
from sharpwatch.curvature.parameters.shards import is_dtensor

_MAX_FORWARDS = 16  # of a step: the newest, and the first ones


class OutputListener:
    """Samples the outputs of the forwards of a step, and their gradients.

    Gradients are left as they are. Copies are taken of some positions only: the output is not kept alive, and the
    backward needs little more memory.

    Args:
        barrier: Ends errors of the hooks.
        model: The model; a backward that adds to none of its gradients trains nothing, and is not listened to.

    Attributes:
        seconds: How long listening took since the last `take`.
    """

    def __init__(self, barrier: ExceptionBarrier, model: nn.Module) -> None:
        self.seconds = 0.0
        self._model = model
        self._barrier = barrier
        self._source = torch.Generator(device="cpu").manual_seed(0)
        self._forwards: list[SeenForward] = []
        self._handles: list[list[RemovableHandle]] = []  # of each of these forwards

    def returned(self, output: Any) -> None:
        """The model returned `output` in training."""
        started = time.perf_counter()
        if len(self._forwards) == _MAX_FORWARDS:
            self._forget(_MAX_FORWARDS - 1)
        elif self._forwards:
            for sample in self._forwards[-1].samples:
                sample.shorten()
        loss, _ = find_loss(output)
        found = all_outputs(output)
        # The last of all hidden states is often returned once more by itself.
        first = {id(tensor): name for name, tensor in reversed(found.items())}
        tensors = {
            name: tensor
            for name, tensor in found.items()
            if first[id(tensor)] == name and tensor is not loss and _can_be_heard(tensor)
        }
        kept = KEPT_ENTRIES // max(1, len(tensors))
        samples = [OutputSample(name, tensor, self._source, kept) for name, tensor in tensors.items()]
        with_loss = isinstance(loss, Tensor) and loss.grad_fn is not None
        heard = list(zip(tensors.values(), samples, strict=True))
        self._handles.append(listen(heard, loss if with_loss else None, self._hook))
        self._forwards.append(SeenForward(samples, with_loss))
        self.seconds += time.perf_counter() - started

    def take(self) -> list[SeenForward]:
        """Remove the hooks and return what was sampled in the step."""
        forwards = self._forwards
        self._forwards = []
        self.remove()
        return forwards

    def remove(self) -> None:
        """Remove the hooks and forget the samples."""
        while self._handles:
            self._forget(-1)
        self._forwards = []

    def _forget(self, index: int) -> None:
        for handle in self._handles.pop(index):
            handle.remove()
        if self._forwards:
            self._forwards.pop(index)

    def _hook(self, call: Callable[..., None]) -> Hook:
        return Hook(partial(self._guarded, call))

    def _guarded(self, call: Callable[..., None], *gradients: Any) -> None:
        started = time.perf_counter()
        with self._barrier.guard("reading the gradient of an output"), torch.no_grad():
            if is_accumulating(self._model, or_returning=True):
                call(*gradients)
        self.seconds += time.perf_counter() - started


def _can_be_heard(tensor: Tensor) -> bool:
    # Not a weight that is returned as well, as a scale or a tied embedding: its consumers are older than the outputs.
    return tensor.grad_fn is not None and not is_dtensor(tensor)
