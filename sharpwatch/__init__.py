"""sharpwatch: per-block sharpness of a transformer in training, watched and acted on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sharpwatch._version import __version__

if TYPE_CHECKING:
    from sharpwatch.agent.attach import attach
    from sharpwatch.agent.control.commands import RollbackRequest
    from sharpwatch.agent.status import WatchStatus
    from sharpwatch.agent.watch import Watch
    from sharpwatch.blocks import BlockMap, classify
    from sharpwatch.checkpointing.checkpoints import Checkpoints
    from sharpwatch.curvature.measure.measure import measure
    from sharpwatch.curvature.measure.report import SharpnessReport
    from sharpwatch.errors import SharpwatchError

__all__ = [
    "BlockMap",
    "Checkpoints",
    "RollbackRequest",
    "SharpnessReport",
    "SharpwatchError",
    "Watch",
    "WatchStatus",
    "__version__",
    "attach",
    "classify",
    "measure",
]

# Resolved on first use: the command line and the courier must start without loading torch.
_HOMES = {
    "BlockMap": "sharpwatch.blocks",
    "Checkpoints": "sharpwatch.checkpointing.checkpoints",
    "RollbackRequest": "sharpwatch.agent.control.commands",
    "SharpnessReport": "sharpwatch.curvature.measure.report",
    "SharpwatchError": "sharpwatch.errors",
    "Watch": "sharpwatch.agent.watch",
    "WatchStatus": "sharpwatch.agent.status",
    "attach": "sharpwatch.agent.attach",
    "classify": "sharpwatch.blocks",
    "measure": "sharpwatch.curvature.measure.measure",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'sharpwatch' has no attribute {name!r}; it has {', '.join(__all__)}")
    import importlib  # noqa: PLC0415 - only on first use

    return getattr(importlib.import_module(_HOMES[name]), name)
