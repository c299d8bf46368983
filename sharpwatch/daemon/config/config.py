"""The daemon's configuration: parsed once, here, into frozen values; what can't work is refused with its line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from sharpwatch.blocks import BLOCKS
from sharpwatch.common.yaml_lines import Field, compose, nearest
from sharpwatch.daemon.records import Mode

AlertName = Literal["LossSpike", "UpdateRmsSpike", "StabilityLimit", "NonFinite"]
ALERT_NAMES: tuple[AlertName, ...] = get_args(AlertName)
ActionKind = Literal["notify", "scale_lr", "rollback"]
Readers = Mapping[str, Callable[[Field], Any]]
_MANY = 10**9
_DAY = 86_400.0


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """Where the daemon listens, what it computes on and what it keeps. `stale_after` is in seconds."""

    grpc: str = "127.0.0.1:7741"
    http: str = "127.0.0.1:9741"
    device: str = "auto"
    store: str = "sqlite:///sharpwatch.db"
    token_file: str = "~/.config/sharpwatch/operator.token"  # noqa: S105  a path
    stale_after: float = 900.0
    queue_capacity: int = 4096
    retain_samples: int = 10_000
    layer_metrics: bool = True
    reflection: bool = False
    log_level: str = "info"


@dataclass(frozen=True, slots=True)
class MatchConfig:
    """Which alert a policy answers; none: it runs only where another policy escalates to it."""

    alert: str = ""


@dataclass(frozen=True, slots=True)
class ActionConfig:
    """What a policy does.

    `blocks`: those of the alert, all, or the ones named. `skip_margin`: steps of data left out on both sides of the
    alert when a rollback goes round it.
    """

    kind: ActionKind = "notify"
    blocks: Literal["alert", "all"] | tuple[str, ...] = "alert"
    factor: float = 1.0
    ramp_steps: int = 0
    ttl_steps: int = 0
    skip_margin: int = 10


@dataclass(frozen=True, slots=True)
class GuardConfig:
    """What a policy must keep to. Times in optimizer steps, `approve_within` in seconds."""

    min_multiplier: float = 0.1
    max_multiplier: float = 10.0
    cooldown_steps: int = 200
    max_actions_per_hour: int = 4
    expires_after_steps: int = 100
    approve_within: float = 900.0
    recover_within_steps: int = 100
    hold_steps: int = 200
    rollback_window_steps: int = 1000


@dataclass(frozen=True, slots=True)
class EscalateConfig:
    """The next rung: policy `to`, where the alert is still there `after_steps` after the first action."""

    after_steps: int
    to: str


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """One answer to one alert."""

    name: str
    match: MatchConfig = field(default_factory=MatchConfig)
    mode: Mode = "observe"
    action: ActionConfig = field(default_factory=ActionConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    escalate: EscalateConfig | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """All of the daemon's configuration; the default watches, and does nothing else."""

    daemon: DaemonConfig = field(default_factory=DaemonConfig)
    policies: tuple[PolicyConfig, ...] = ()


def load_config(path: str | Path | None = None) -> Config:
    """Read `path`; no path or an empty file is the default.

    Raises `ConfigError` with file, line, key and what is allowed.
    """
    if path is None:
        return Config()
    root = compose(Path(path))
    if root is None:
        return Config()
    fields = Field(str(path), "", root).mapping(("daemon", "policies"))
    daemon = _daemon(fields["daemon"]) if "daemon" in fields else DaemonConfig()
    items = fields["policies"].items() if "policies" in fields else []
    policies = tuple(_policy(item) for item in items)
    _check_ladders(items, policies)
    return Config(daemon, policies)


def _daemon(at: Field) -> DaemonConfig:
    read: Readers = {
        "grpc": lambda at: _address(at, sockets=True),
        "http": lambda at: _address(at, sockets=False),
        "device": _device,
        "store": _store,
        "token_file": Field.text,
        "stale_after": lambda at: at.seconds(1.0, 30 * _DAY),
        "queue_capacity": lambda at: at.integer(16, 1_000_000),
        "retain_samples": lambda at: at.integer(1_000, _MANY),
        "layer_metrics": Field.boolean,
        "reflection": Field.boolean,
        "log_level": lambda at: at.choice(("debug", "info", "warning", "error")),
    }
    return DaemonConfig(**{name: read[name](value) for name, value in at.mapping(tuple(read)).items()})


def _address(at: Field, *, sockets: bool) -> str:
    """HOST:PORT, or unix:PATH where `sockets`."""
    said = at.text()
    expected = "expected HOST:PORT" + (" or unix:PATH" if sockets else "")
    if sockets and said.startswith("unix:"):
        if said == "unix:":
            raise at.error(f"{said}: {expected}")
        return said
    host, _, port = said.rpartition(":")
    if (
        not host
        or not port.isascii()
        or not port.isdigit()
        or len(port) > 5
        or int(port) > 65_535
        or (":" in host and host[0] != "[")
    ):
        raise at.error(f"{said}: {expected}, port 0 to 65535, an IPv6 host in brackets")
    return said


def _device(at: Field) -> str:
    said = at.text()
    kind, _, index = said.partition(":")
    if said not in {"auto", "cpu", "cuda"} and not (kind == "cuda" and index.isdigit()):
        raise at.error(
            f"{said!r} is not allowed; allowed: auto, cpu, cuda, cuda:N{nearest(said, ('auto', 'cpu', 'cuda'))}"
        )
    return said


def _store(at: Field) -> str:
    said = at.text()
    if not said.startswith("sqlite:///") or said == "sqlite:///":
        raise at.error(f"{said!r} is not allowed; allowed: sqlite:///PATH (sqlite:////PATH for an absolute one)")
    return said


def _policy(at: Field) -> PolicyConfig:
    fields = at.mapping(("name", "match", "mode", "action", "guard", "escalate"), required=("name", "action"))
    action = _action(fields["action"])
    guard = _guard(fields["guard"], at) if "guard" in fields else GuardConfig()
    _check_effect(fields["action"], action, guard)
    return PolicyConfig(
        name=fields["name"].text(),
        match=_match(fields["match"]) if "match" in fields else MatchConfig(),
        mode=cast("Mode", fields["mode"].choice(get_args(Mode))) if "mode" in fields else "observe",
        action=action,
        guard=guard,
        escalate=_escalate(fields["escalate"]) if "escalate" in fields else None,
    )


def _match(at: Field) -> MatchConfig:
    return MatchConfig(at.mapping(("alert",), required=("alert",))["alert"].choice(ALERT_NAMES))


_ACTION_KEYS: dict[str, tuple[str, ...]] = {
    "notify": (),
    "scale_lr": ("blocks", "factor", "ramp_steps", "ttl_steps"),
    "rollback": ("skip_margin",),
}


def _action(at: Field) -> ActionConfig:
    every = ("kind", *(key for keys in _ACTION_KEYS.values() for key in keys))
    fields = at.mapping(every, required=("kind",))
    kind = cast("ActionKind", fields["kind"].choice(get_args(ActionKind)))
    for name, value in fields.items():
        if name != "kind" and name not in _ACTION_KEYS[kind]:
            allowed = ", ".join(("kind", *_ACTION_KEYS[kind]))
            raise value.error(f"means nothing to {kind}; allowed: {allowed}")
    if kind == "scale_lr" and "factor" not in fields:
        raise at.error("factor is missing; allowed: a number above 0, at most 100, but not 1")
    read: Readers = {
        "blocks": _blocks,
        "factor": _factor,
        "ramp_steps": lambda at: at.integer(0, 1_000_000),
        "ttl_steps": lambda at: at.integer(0, _MANY),
        "skip_margin": lambda at: at.integer(0, 1_000_000),
    }
    return ActionConfig(kind=kind, **{name: read[name](value) for name, value in fields.items() if name != "kind"})


def _blocks(at: Field) -> Literal["alert", "all"] | tuple[str, ...]:
    if isinstance(at.node.value, str):
        return cast("Literal['alert', 'all']", at.choice(("alert", "all")))
    blocks = tuple(item.choice(BLOCKS) for item in at.items())
    if not blocks or len(set(blocks)) < len(blocks):
        raise at.error(f"expected alert, all, or a list of different blocks out of {', '.join(BLOCKS)}")
    return blocks


def _factor(at: Field) -> float:
    factor = at.number(0.0, 100.0)
    if factor == 1.0:
        raise at.error("1 changes nothing; expected a number above 0, at most 100, but not 1")
    return factor


def _guard(at: Field, policy: Field) -> GuardConfig:
    read: Readers = {
        "min_multiplier": lambda at: at.number(0.0, 1.0),
        "max_multiplier": lambda at: at.number(0.0, 1000.0),
        "cooldown_steps": lambda at: at.integer(0, _MANY),
        "max_actions_per_hour": lambda at: at.integer(1, 3600),
        "expires_after_steps": lambda at: at.integer(1, _MANY),
        "approve_within": lambda at: at.seconds(1.0, 30 * _DAY),
        "recover_within_steps": lambda at: at.integer(1, _MANY),
        "hold_steps": lambda at: at.integer(1, _MANY),
        "rollback_window_steps": lambda at: at.integer(1, _MANY),
    }
    fields = at.mapping(tuple(read))
    guard = GuardConfig(**{name: read[name](value) for name, value in fields.items()})
    if guard.min_multiplier > guard.max_multiplier:
        where = fields.get("min_multiplier", fields.get("max_multiplier", policy))
        raise where.error(f"min_multiplier {guard.min_multiplier:g} is above max_multiplier {guard.max_multiplier:g}")
    if guard.max_multiplier < 1.0:
        raise fields["max_multiplier"].error(
            f"{guard.max_multiplier:g}: a run starts at 1, so expected a number from 1 to 1000"
        )
    return guard


def _check_effect(at: Field, action: ActionConfig, guard: GuardConfig) -> None:
    """A factor whose very first application would break its own guard never takes effect."""
    if action.kind != "scale_lr":
        return
    if action.factor < guard.min_multiplier:
        raise at.error(
            f"factor {action.factor:g} can never take effect: min_multiplier is {guard.min_multiplier:g}; "
            f"allowed: a factor of {guard.min_multiplier:g} or more, or a smaller guard.min_multiplier"
        )
    if guard.min_multiplier == 1.0 and action.factor < 1.0:
        raise at.error("a cut can never take effect: guard.min_multiplier is 1")
    if action.factor > guard.max_multiplier:
        raise at.error(
            f"factor {action.factor:g} can never take effect: max_multiplier is {guard.max_multiplier:g}; "
            f"allowed: a factor of {guard.max_multiplier:g} or less, or a larger guard.max_multiplier"
        )
    if action.factor > 1.0 and action.ttl_steps == 0:
        raise at.error("a raise needs ttl_steps of 1 or more, after which it ends if the daemon falls silent")


def _escalate(at: Field) -> EscalateConfig:
    fields = at.mapping(("after_steps", "to"), required=("after_steps", "to"))
    return EscalateConfig(fields["after_steps"].integer(1, _MANY), fields["to"].text())


def _check_ladders(items: Sequence[Field], policies: Sequence[PolicyConfig]) -> None:
    """Names are unique, every `escalate.to` exists, no ladder is a circle, and every policy can be reached."""
    by_name: dict[str, PolicyConfig] = {}
    for at, policy in zip(items, policies, strict=True):
        if policy.name in by_name:
            raise _at(at, "name").error(f"{policy.name!r} is taken by an earlier policy; names must differ")
        by_name[policy.name] = policy
    targets = {policy.escalate.to for policy in policies if policy.escalate is not None}
    for at, policy in zip(items, policies, strict=True):
        if policy.escalate is not None and policy.escalate.to not in by_name:
            names = ", ".join(by_name)
            raise _at(_at(at, "escalate"), "to").error(
                f"there is no policy {policy.escalate.to!r}; allowed: {names}{nearest(policy.escalate.to, by_name)}"
            )
        if not policy.match.alert and policy.name not in targets:
            raise at.error(f"can never run: give it match: {{alert: ...}} ({', '.join(ALERT_NAMES)}) or escalate to it")
    for at, policy in zip(items, policies, strict=True):
        climbed = [policy.name]
        rung = policy
        while rung.escalate is not None:
            rung = by_name[rung.escalate.to]
            if rung.name in climbed:
                raise _at(_at(at, "escalate"), "to").error(f"goes in a circle: {' -> '.join((*climbed, rung.name))}")
            climbed.append(rung.name)


def _at(at: Field, name: str) -> Field:
    """The field `name` of a mapping that was read before."""
    return next(Field(at.file, f"{at.key}.{name}", value) for key, value in at.node.value if key.value == name)
