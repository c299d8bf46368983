"""Loss and logits of a model whose loop calls another method of it than its forward, or a module inside of it."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from sharpwatch.agent.calls import OtherCall
from sharpwatch.curvature.objective.batch import Batch, LogitsFn, LossFn, predict, training_loss
from sharpwatch.curvature.state.isolation import Functional


def loss_of(call: OtherCall) -> LossFn:
    """Returns a function that takes the loss from the output of `call`."""

    def loss_fn(model: Functional, batch: Batch) -> Tensor:
        by = partial(model.call, call.path, call.method)
        return training_loss(by, model.inner.get_submodule(call.path), batch, None)

    return loss_fn


def logits_of(call: OtherCall) -> LogitsFn:
    """Returns a function that takes the logits from the output of `call`."""

    def logits_fn(model: Functional, batch: Batch) -> tuple[Tensor, Tensor]:
        by = partial(model.call, call.path, call.method)
        return predict(by, model.inner.get_submodule(call.path), batch, None)

    return logits_fn
