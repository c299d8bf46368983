"""Whether the parameters that a watch knows are still the model's."""

from __future__ import annotations

import logging

from torch import nn

from sharpwatch.agent.optimizers.support import is_flat
from sharpwatch.curvature.parameters.shards import is_sharded

_EVERY = 64  # steps
_LOG = logging.getLogger("sharpwatch")


class ParameterIdentity:
    """The parameters of `model` as they are now, against those that it has later."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known = _names(model)
        # FSDP puts others in their place, and back, as it goes.
        self._stands = not (is_sharded(model) or any(map(is_flat, model.parameters())))

    def replaced(self, step: int) -> str:
        """The first parameter that is not the model's any more, empty where all are; looks at every 64th `step`.

        Parameters that came later are told to the log once: they are not seen.
        """
        if not self._stands or step % _EVERY:
            return ""
        now = _names(self._model)
        gone = [name for key, name in self._known.items() if key not in now]
        if not gone and now.keys() != self._known.keys():
            new = [name for key, name in now.items() if key not in self._known]
            _LOG.warning("not watched, as they came after attach: %s", ", ".join(new))
            self._known |= now
        return gone[0] if gone else ""


def _names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}
