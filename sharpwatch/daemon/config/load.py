"""Reads the daemon's configuration file. An error names the file, the line, the key and what is valid there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from sharpwatch.common.yaml_schema import Location, YamlDocument, nearest, read_yaml
from sharpwatch.daemon.config.settings import (
    ALERT_NAMES,
    CAUSES,
    OVERRIDABLE,
    ActionConfig,
    AutopilotConfig,
    Config,
    CurvatureShareConfig,
    DaemonConfig,
    DetectionConfig,
    EscalateConfig,
    GateConfig,
    GuardConfig,
    MaintenanceConfig,
    MatchConfig,
    NotificationsConfig,
    OverrideConfig,
    PolicyConfig,
    StabilityCapConfig,
    TlsConfig,
)
from sharpwatch.errors import ConfigError

_ADAPTER = TypeAdapter(Config)
_SECTIONS = {
    "daemon": DaemonConfig,
    "detection": DetectionConfig,
    "notifications": NotificationsConfig,
    "overrides": OverrideConfig,
    "match": MatchConfig,
    "action": ActionConfig,
    "guard": GuardConfig,
    "escalate": EscalateConfig,
    "autopilot": AutopilotConfig,
    "curvature_share": CurvatureShareConfig,
    "stability_cap": StabilityCapConfig,
    "maintenance": MaintenanceConfig,
    "gate": GateConfig,
    "tls": TlsConfig,
}
_EXPECTED = {
    "dict_type": "expected a mapping of labels, such as {team: nlp}",
    "tuple_type": "expected a list",
    "list_type": "expected a list",
}
_ACTION_KEYS: dict[str, tuple[str, ...]] = {
    "notify": (),
    "scale_lr": ("blocks", "factor", "ramp_steps", "ttl_steps"),
    "rollback": ("skip_margin",),
}


def load_config(path: str | Path | None = None) -> Config:
    """Read the daemon's configuration.

    Args:
        path: A YAML file; None or an empty file is the default configuration.

    Raises:
        ConfigError: The file cannot be read, or a key or a value in it is invalid.
    """
    document = YamlDocument("", None, {}) if path is None else read_yaml(Path(path))
    # An empty file, or one with comments alone, is None in YAML, and valid here.
    if document.data is None:
        return Config()
    try:
        config = _ADAPTER.validate_python(document.data)
    except ValidationError as error:
        raise _first_error(document, error.errors(include_url=False)) from error
    for index, override in enumerate(config.detection.overrides):
        _check_override(document, ("detection", "overrides", index), override)
    for index, policy in enumerate(config.policies):
        _check_match(document, ("policies", index, "match"), policy)
        _check_action(document, ("policies", index), policy)
        _check_guard(document, ("policies", index), policy.guard)
        _check_effect(document, ("policies", index, "action"), policy)
    _check_escalation(document, config.policies)
    if document.data.get("autopilot") and not config.autopilot.is_on:
        raise document.error(("autopilot",), "does nothing without curvature_share or stability_cap")
    for index, window in enumerate(config.maintenance):
        if window.from_ == window.to:
            raise document.error(
                ("maintenance", index), f"begins and ends at {window.to}; a whole day is from 00:00 to 24:00"
            )
    if not config.gate.webhook and document.at(("gate",)):
        raise document.error(("gate",), "webhook is missing: a gate that is not asked holds nothing back")
    return config


def json_schema() -> dict[str, Any]:
    """The JSON schema of the configuration file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_ADAPTER.json_schema()}


def _first_error(document: YamlDocument, found: Iterable[ErrorDetails]) -> ConfigError:
    """Returns the first error in the file."""
    errors = [_explained(document, each) for each in found]
    # pydantic reports in the order of the fields; people mend a file from its top.
    return min(errors, key=lambda error: error.line)


def _explained(document: YamlDocument, error: ErrorDetails) -> ConfigError:
    """Translates an error of pydantic to one with file, line and key."""
    location = _within(document, error["loc"])
    name = error["loc"][-1] if error["loc"] else ""
    match error["type"]:
        case "unexpected_keyword_argument" | "extra_forbidden":
            keys = _keys(location[:-1])
            return document.error(location, f"unknown key; allowed: {', '.join(keys)}{nearest(str(name), keys)}")
        case "missing" | "missing_argument":
            return document.error(location, f"{name} is missing; allowed: {', '.join(_keys(location))}")
        case "dataclass_type" | "dataclass_exact_type":
            return document.error(location, f"expected a mapping with keys {', '.join(_keys(location))}")
        case "dict_type" | "tuple_type" | "list_type" as kind:
            return document.error(location, _EXPECTED[kind])
        case "value_error":
            return document.error(location, str(error["ctx"]["error"]))
    return document.error(location, error["msg"])


def _within(document: YamlDocument, location: Sequence[str | int]) -> Location:
    """Returns `location` without the steps that pydantic adds for branches of a union, and without a missing key."""
    found: Location = ()
    for step in location:
        holder = document.at(found)
        if (isinstance(holder, dict) and step in holder) or (isinstance(holder, list) and isinstance(step, int)):
            found = (*found, step)
    return found


def _keys(location: Location) -> list[str]:
    """Returns the keys that are valid in the mapping at `location`."""
    section = next((step for step in reversed(location) if isinstance(step, str)), "")
    kind = PolicyConfig if section == "policies" else _SECTIONS.get(section, Config)
    return [field.name.removesuffix("_") for field in dataclasses.fields(kind)]


def _check_override(document: YamlDocument, at: Location, override: OverrideConfig) -> None:
    if not override.match:
        raise document.error((*at, "match"), "is empty: what is for every run stands in detection itself")
    if not override.changes:
        raise document.error(at, f"changes nothing; allowed: {', '.join(OVERRIDABLE)}")


def _check_match(document: YamlDocument, at: Location, policy: PolicyConfig) -> None:
    """Checks that a policy which answers an alert of another system can."""
    match = policy.match
    if not match.foreign:
        return
    for name in ("alert", "cause"):
        if getattr(match, name):
            raise document.error(
                (*at, name), f"no incident has both: {match.foreign} is another system's; allowed: foreign alone"
            )
    if match.foreign in policy.guard.blocked_by:
        raise document.error(
            (*at, "foreign"), f"can never act: guard.blocked_by names {match.foreign} too; allowed: one of both"
        )
    if policy.action.factor == "auto":
        raise document.error(
            (*at[:-1], "action", "factor"),
            "auto can never take effect: nothing is measured of an alert of another system; allowed: a number",
        )


def _check_action(document: YamlDocument, policy_at: Location, policy: PolicyConfig) -> None:
    """Checks that an action has a kind, and the keys of that kind alone."""
    at = (*policy_at, "action")
    # From the document, because the value has defaults and does not say which keys were written.
    given, kind = document.at(at), policy.action.kind
    if given is None:
        raise document.error(policy_at, f"action is missing; allowed: {', '.join(_keys(policy_at))}")
    if "kind" not in given:
        raise document.error(at, f"kind is missing; allowed: {', '.join(_keys(at))}")
    for name in given:
        # One class has the keys of all kinds, so `extra="forbid"` alone would let `factor` of a rollback pass.
        if name != "kind" and name not in _ACTION_KEYS[kind]:
            allowed = ", ".join(("kind", *_ACTION_KEYS[kind]))
            raise document.error((*at, name), f"means nothing to {kind}; allowed: {allowed}")
    if kind == "scale_lr" and "factor" not in given:
        raise document.error(at, "factor is missing; allowed: a number above 0, at most 100, but not 1; or auto")


def _check_guard(document: YamlDocument, policy_at: Location, guard: GuardConfig) -> None:
    at = (*policy_at, "guard")
    if guard.min_multiplier > guard.max_multiplier:
        given = document.at(at)
        name = next(name for name in ("min_multiplier", "max_multiplier") if name in given)
        raise document.error(
            (*at, name), f"min_multiplier {guard.min_multiplier:g} is above max_multiplier {guard.max_multiplier:g}"
        )
    if guard.max_multiplier < 1.0:
        raise document.error(
            (*at, "max_multiplier"),
            f"{guard.max_multiplier:g}: a run starts at 1, so expected a number from 1 to 1000",
        )


def _check_effect(document: YamlDocument, at: Location, policy: PolicyConfig) -> None:
    """Checks that the policy's own guard lets its factor through."""
    action, guard = policy.action, policy.guard
    if action.kind != "scale_lr":
        return
    if guard.min_multiplier == 1.0 and action.cuts:
        raise document.error(at, "a cut can never take effect: guard.min_multiplier is 1")
    if action.factor == "auto":
        return
    if action.factor < guard.min_multiplier:
        raise document.error(
            at,
            f"factor {action.factor:g} can never take effect: min_multiplier is {guard.min_multiplier:g}; "
            f"allowed: a factor of {guard.min_multiplier:g} or more, or a smaller guard.min_multiplier",
        )
    if action.factor > guard.max_multiplier:
        raise document.error(
            at,
            f"factor {action.factor:g} can never take effect: max_multiplier is {guard.max_multiplier:g}; "
            f"allowed: a factor of {guard.max_multiplier:g} or less, or a larger guard.max_multiplier",
        )
    if action.factor > 1.0 and action.ttl_steps == 0:
        raise document.error(at, "a raise needs ttl_steps of 1 or more, after which it ends if the daemon falls silent")


def _check_escalation(document: YamlDocument, policies: Sequence[PolicyConfig]) -> None:
    """Checks that names are unique, every `escalate.to` exists, no chain is a circle, and every policy can run."""
    by_name: dict[str, PolicyConfig] = {}
    for index, policy in enumerate(policies):
        if policy.name in by_name:
            raise document.error(
                ("policies", index, "name"), f"{policy.name!r} is taken by an earlier policy; names must differ"
            )
        by_name[policy.name] = policy
    targets = {policy.escalate.to for policy in policies if policy.escalate is not None}
    for index, policy in enumerate(policies):
        if policy.escalate is not None and policy.escalate.to not in by_name:
            raise document.error(
                ("policies", index, "escalate", "to"),
                f"there is no policy {policy.escalate.to!r}; allowed: {', '.join(by_name)}"
                f"{nearest(policy.escalate.to, by_name)}",
            )
        if not policy.match.anything and policy.name not in targets:
            raise document.error(
                ("policies", index),
                f"can never run: give it match: {{alert: ...}} ({', '.join(ALERT_NAMES)}), {{cause: ...}} "
                f"({', '.join(CAUSES)}) or {{foreign: ...}} (an alert of another system), or escalate to it",
            )
    for index, policy in enumerate(policies):
        _check_chain(document, index, policy, by_name)


def _check_chain(document: YamlDocument, index: int, policy: PolicyConfig, by_name: dict[str, PolicyConfig]) -> None:
    # Every target exists by now, and a circle ends the loop at its first repeated name.
    chain, current = [policy.name], policy
    while current.escalate is not None:
        current = by_name[current.escalate.to]
        if current.name in chain:
            raise document.error(
                ("policies", index, "escalate", "to"), f"goes in a circle: {' -> '.join((*chain, current.name))}"
            )
        chain.append(current.name)
