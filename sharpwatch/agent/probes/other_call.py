"""Loss and output of a model whose loop calls another method of it than its forward, or a module inside of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from sharpwatch.agent.calls import OtherCall
from sharpwatch.curvature.objective.batch import Batch, LossFn, training_loss
from sharpwatch.curvature.state.isolation import Functional


def loss_of(call: OtherCall) -> LossFn:
    """Returns a function that takes the loss from the output of `call`."""

    def loss_fn(model: Functional, batch: Batch) -> Tensor:
        by = partial(model.call, call.path, call.method)
        return training_loss(by, model.inner.get_submodule(call.path), batch, None)

    return loss_fn


def output_of(call: OtherCall) -> Callable[[Functional, Batch], Any]:
    """Returns a function that calls `call` on a batch."""

    def calling(model: Functional, batch: Batch) -> Any:
        return model.call(call.path, call.method, *batch.args, **batch.kwargs)

    return calling
