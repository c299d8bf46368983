"""Commands of the daemon, their results, and the rollback that a training loop is asked for: plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["applied", "refused", "expired", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class SetMultipliers:
    """Set the learning-rate multiplier of every block type. A block that is not named returns to 1.

    Attributes:
        multipliers: The targets, by block type.
        revision: The daemon's number for this set of multipliers.
        ramp_steps: Optimizer steps over which the multipliers move to their targets, geometrically.
        ttl_steps: Optimizer steps after which multipliers above 1 return to 1, unless renewed; 0 means never.
        update_every: By block type, the number that must divide a step at which it is updated; 1 where it is not named.
    """

    multipliers: Mapping[str, float]
    revision: int = 0
    ramp_steps: int = 0
    ttl_steps: int = 0
    update_every: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RollBack:
    """Restore the checkpoint of `step` at `uri`, and skip the batches of steps [skip[0], skip[1])."""

    step: int
    uri: str
    skip: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Cancel:
    """Do not apply the command with the id `command_id` any more."""

    command_id: str


@dataclass(frozen=True, slots=True)
class Command:
    """A decision of the daemon, sent to the training loop.

    Attributes:
        id: Identifies the command; a second one with the same id only gets the result of the first.
        action: What to do; None is an action that this version of sharpwatch does not know.
        apply_at_step: The first optimizer step that may run under it; 0 means as soon as possible.
        expires_at_step: The last optimizer step before which it may be applied; 0 means no limit.
        expires_at_unix_ns: The time after which it is not applied; 0 means no limit.
        reason: Why the daemon decided it, in words.
        author: The operator or policy that decided it.
    """

    id: str
    action: SetMultipliers | RollBack | Cancel | None
    apply_at_step: int = 0
    expires_at_step: int = 0
    expires_at_unix_ns: int = 0
    reason: str = ""
    author: str = ""


@dataclass(frozen=True, slots=True)
class CommandResult:
    """The result of a command.

    Attributes:
        command_id: The command's id.
        outcome: How it ended.
        step: The first optimizer step that ran under it.
        detail: Why it was not applied, or how it was.
        unchanged_blocks: Blocks whose parameters all share a learning rate with a block of a smaller multiplier.
    """

    command_id: str
    outcome: Outcome
    step: int
    detail: str = ""
    unchanged_blocks: tuple[str, ...] = ()


def describe_multipliers(multipliers: Mapping[str, float], update_every: Mapping[str, int] | None = None) -> str:
    """The multipliers other than 1, and what is not updated at every step: "qk x 0.5, emb updated every 4 steps"."""
    changed = [f"{block} x {value:.4g}" for block, value in multipliers.items() if value != 1.0]
    rarely = [f"{block} updated every {steps} steps" for block, steps in (update_every or {}).items() if steps != 1]
    return ", ".join([*changed, *rarely]) or "every multiplier is 1"


@dataclass(frozen=True, slots=True)
class RollbackRequest:
    """A rollback for the training loop to do: restore a checkpoint, and skip some batches after it.

    Attributes:
        step: The optimizer step of the checkpoint.
        uri: The checkpoint, as it was given to `watch.saved_checkpoint`.
        skip: Skip the batches of the optimizer steps [skip[0], skip[1]); none if both are equal.
        reason: Why the daemon asks for it, in words.
    """

    step: int
    uri: str
    skip: tuple[int, int]
    reason: str
