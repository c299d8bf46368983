"""The agent's state in a run's own checkpoint: made of the parts of a run, and loaded into all of them or none."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from sharpwatch.agent.reporting import Identity

_VERSION = 1
_LOG = logging.getLogger("sharpwatch")


class Part(Protocol):
    """A part of a run that has a state; if one can't be loaded, the part is as before."""

    def state_dict(self) -> dict[str, Any]:
        """Its state, as plain values."""

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Continue from `state`."""


def run_state(identity: Identity, step: int, parts: Mapping[str, Part]) -> dict[str, Any]:
    """The state of the run `identity` after `step`, as plain values."""
    return {
        "version": _VERSION,
        "training_job": identity.training_job,
        "run": identity.run,
        "step": step,
        **{name: part.state_dict() for name, part in parts.items()},
    }


def load_run_state(
    state: Mapping[str, Any], identity: Identity, parts: Mapping[str, Part], *, is_named: bool
) -> Identity | None:
    """Load `state` into the parts of a run.

    Args:
        state: What `run_state` returned.
        identity: The run that is to go on.
        parts: The same parts.
        is_named: Whether the user named this run, which then takes no other run's state.

    Returns:
        The run to go on as; None if the state is another run's.

    Raises:
        ValueError: The agent that made it is too new.
        Exception: What a part raises where the state is damaged. Nothing is changed then.
    """
    version = state.get("version")
    if version != _VERSION:
        raise ValueError(
            f"cannot load agent state version {version}: this version of sharpwatch reads version {_VERSION}"
        )
    name, step = str(state["run"]), int(state["step"])
    if state["training_job"] != identity.training_job or (is_named and name != identity.run):
        _LOG.info("agent state not loaded: it is of run %s of %s", name, state["training_job"])
        return None
    before = {each: part.state_dict() for each, part in parts.items()}
    try:
        for each, part in parts.items():
            part.load_state_dict(state[each])
    except Exception:
        for each, part in parts.items():
            part.load_state_dict(before[each])
        raise
    return replace(identity, run=name, initial_step=step)
