"""The records of the journal as JSON, and back; journals of earlier versions too."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from sharpwatch.daemon.records import (
    CAUSES,
    Checkpoint,
    Decision,
    ForeignAlert,
    Incident,
    LrPlan,
    Revision,
    RollbackPlan,
    Silence,
)


def record_of(value: Incident | Decision | Revision | Silence | LrPlan) -> str:
    """A record as JSON."""
    return json.dumps(asdict(value))


def revision_of(record: str) -> Revision:
    """A revision from its JSON."""
    return Revision(**json.loads(record))


def decision_of(record: str) -> Decision:
    """A decision from its JSON."""
    values: dict[str, Any] = json.loads(record)
    plan = values.pop("rollback")
    if plan is not None:
        plan = RollbackPlan(**{**plan, "checkpoint": Checkpoint(**plan["checkpoint"])})
    return Decision(**values, rollback=plan)


def incident_of(record: str) -> Incident:
    """An incident from its JSON."""
    values: dict[str, Any] = json.loads(record)
    if "cause" not in values:  # an alert of version 0.1, of one detector
        evidence, name = values.pop("evidence"), values["name"]
        values |= {"names": [name], "cause": CAUSES[name], "evidence": [evidence], "onset": values["first_step"]}
        values["layer_blocks"] = values["blocks"]
    if values.get("foreign") is not None:
        values["foreign"] = ForeignAlert(**values["foreign"])
    lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    return Incident(**{**values, **lists})


def plan_of(record: str) -> LrPlan:
    """A learning-rate plan from its JSON."""
    values: dict[str, Any] = json.loads(record)
    lists = {"stages": tuple(map(tuple, values["stages"])), "decisions": tuple(values["decisions"])}
    return LrPlan(**{**values, **lists})
