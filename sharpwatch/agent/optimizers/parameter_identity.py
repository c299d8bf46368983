"""Checks that the parameters a watch knows are still the model's."""

from __future__ import annotations

import logging

from torch import nn

from sharpwatch.agent.optimizers.support import is_flat
from sharpwatch.curvature.parameters.shards import is_sharded

_INTERVAL = 64  # steps
_LOG = logging.getLogger("sharpwatch")


class ParameterIdentity:
    """Remembers the parameters of `model`, and finds out when they are replaced by others."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known = _names(model)
        # FSDP itself replaces parameters by others and restores them during each step.
        self._can_check = not (is_sharded(model) or any(map(is_flat, model.parameters())))

    def replaced(self, step: int) -> str:
        """Compare the model's parameters with the known ones, at every 64th step.

        Parameters added since `attach` are not watched; each is logged once.

        Args:
            step: The number of the step just taken.

        Returns:
            The name of the first known parameter that the model no longer has; empty if it has all.
        """
        if not self._can_check or step % _INTERVAL:
            return ""
        now = _names(self._model)
        gone = [name for key, name in self._known.items() if key not in now]
        if not gone and now.keys() != self._known.keys():
            new = [name for key, name in now.items() if key not in self._known]
            _LOG.warning("parameters added after attach are not watched: %s", ", ".join(new))
            self._known |= now
        return gone[0] if gone else ""


def _names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}
