"""The daemon's configuration as frozen values, each with its default and what is valid for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Literal, get_args
from urllib.parse import urlsplit

from annotated_types import GroupedMetadata
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    WithJsonSchema,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from sharpwatch.blocks import BLOCKS
from sharpwatch.common.credentials import Role
from sharpwatch.common.endpoint import parse_address, without_password
from sharpwatch.common.shards import parse_shard
from sharpwatch.common.token_file import default_token_file
from sharpwatch.common.yaml_schema import nearest
from sharpwatch.daemon.records import DetectedAlert, DetectedCause, Incident, Mode, Severity
from sharpwatch.wire import RUN_LABELS, wrong_label

ALERT_NAMES: tuple[DetectedAlert, ...] = get_args(DetectedAlert)
CAUSES: tuple[DetectedCause, ...] = get_args(DetectedCause)
ActionKind = Literal["notify", "scale_lr", "rollback"]
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = get_args(Day)
_MANY = 10**9
_DAY = 86_400.0
# A mistyped key must be an error: pydantic would ignore it, and a guard would silently keep its default.
_FORBID = ConfigDict(extra="forbid")


def _expecting(expected: str) -> WrapValidator:
    """Replaces the error of any inner rule by one that says what is expected."""

    def validate(value: Any, inner: Any) -> Any:
        try:
            return inner(value)
        except ValidationError as error:
            shown = f"{value}: " if isinstance(value, str | int | float) and not isinstance(value, bool) else ""
            raise PydanticCustomError("expected", "{message}", {"message": f"{shown}expected {expected}"}) from error

    return WrapValidator(validate)


def _one_of(allowed: tuple[str, ...], *, expected: str = "", shown: Callable[[str], str] = str) -> WrapValidator:
    """Replaces the error by one that lists the valid words and names the nearest one; `shown` is what it says."""

    def validate(value: Any, inner: Any) -> Any:
        try:
            return inner(value)
        except ValidationError as error:
            word = shown(value) if isinstance(value, str) else ""
            message = f"{word or 'this'!r} is not allowed; allowed: {expected or ', '.join(allowed)}"
            raise PydanticCustomError("choice", "{message}", {"message": message + nearest(word, allowed)}) from error

    return WrapValidator(validate)


def _check_webhook(url: str) -> str:
    """Refuses, by a `ValueError`, an address that could not be asked at all."""
    parts = urlsplit(url)
    if not (parts.hostname and parts.hostname.encode("idna") and parts.port != 0):
        raise ValueError("no host, or port 0")
    return url


@dataclass(frozen=True)
class _Constraints(GroupedMetadata):
    """Several constraints on one value, which pydantic iterates over."""

    constraints: tuple[Any, ...]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.constraints)


def _integer(low: int, high: int) -> _Constraints:
    # Strict, because pydantic otherwise takes `true` for 1 and the text "5" for 5.
    return _Constraints((Field(strict=True, ge=low, le=high), _expecting(f"an integer from {low} to {high}")))


def _number(low: float, high: float) -> _Constraints:
    """A finite number within (low, high]."""
    rule = Field(strict=True, gt=low, le=high, allow_inf_nan=False)
    return _Constraints((rule, _expecting(f"a number above {low:g}, at most {high:g}")))


def _seconds(value: Any) -> Any:
    """Converts a duration such as `1.5m` to seconds."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": _DAY}
    # Text that is no number raises ValueError, which `_expecting` turns into the rule.
    if isinstance(value, str) and value[-1:] in units:
        return float(value[:-1]) * units[value[-1]]
    return value


_DURATION = f"a duration from 1s to {30 * _DAY:g}s: seconds, or a number with s, m, h or d, as in 5m"
Duration = Annotated[
    float,
    Field(strict=True, ge=1.0, le=30 * _DAY, allow_inf_nan=False),
    BeforeValidator(_seconds),
    _expecting(_DURATION),
    # The schema that pydantic derives has the number alone, and editors would mark `5m` as wrong.
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^[0-9.]+[smhd]$"}]}),
]
Text = Annotated[str, Field(strict=True, min_length=1), _expecting("a string that is not empty")]
Flag = Annotated[bool, Field(strict=True), _expecting("true or false")]
LogLevel = Annotated[Literal["debug", "info", "warning", "error"], _one_of(("debug", "info", "warning", "error"))]
MetricsAuth = Annotated[Literal["none", "token"], _one_of(("none", "token"))]
RoleName = Annotated[Role, _one_of(get_args(Role))]
Device = Annotated[
    str,
    Field(strict=True, pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$"),
    _one_of(("auto", "cpu", "cuda"), expected="auto, cpu, cuda, cuda:N"),
]
_STORE = "sqlite:///PATH (sqlite:////PATH for an absolute one), postgresql+psycopg://USER@HOST/DATABASE"
Store = Annotated[
    str,
    Field(strict=True, pattern=r"^(sqlite:///|postgresql\+psycopg://).+"),
    _one_of((), expected=_STORE, shown=without_password),
]
Webhook = Annotated[
    str,
    Field(strict=True, pattern=r"^https?://[^/\s]+"),
    AfterValidator(_check_webhook),
    _expecting("an URL: http://HOST[:PORT]... or https://HOST[:PORT]..., with a host's name or address"),
]
Alert = Annotated[DetectedAlert, _one_of(ALERT_NAMES)]
CauseName = Annotated[DetectedCause, _one_of(CAUSES)]
SeverityName = Annotated[Severity, _one_of(get_args(Severity))]
PolicyMode = Annotated[Mode, _one_of(get_args(Mode))]
_CLOCK = "a time of day in UTC from 00:00 to 23:59"
Time = Annotated[str, Field(strict=True, pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$"), _expecting(_CLOCK)]
EndTime = Annotated[
    str, Field(strict=True, pattern=r"^(([01][0-9]|2[0-3]):[0-5][0-9]|24:00)$"), _expecting(f"{_CLOCK}, or 24:00")
]
Kind = Annotated[ActionKind, _one_of(get_args(ActionKind))]


def _check_label(name: Any) -> Any:
    # Where a label is wrong in itself, no run can have it.
    wrong = "" if name in RUN_LABELS else wrong_label(name, "any")
    if wrong:
        raise ValueError(wrong)
    return name


LabelName = Annotated[str, BeforeValidator(_check_label)]
Pages = Annotated[float, _number(0.0, 100.0)]
Warnings = Annotated[float, _number(0.0, 1000.0)]
OVERRIDABLE = ("pages_per_10k_steps", "warnings_per_10k_steps", "stall_after")


def _check_block(value: Any) -> Any:
    if value not in BLOCKS:
        word = value if isinstance(value, str) else "this"
        raise ValueError(f"{word!r} is not allowed; allowed: {', '.join(BLOCKS)}{nearest(word, BLOCKS)}")
    return value


def _check_different(blocks: tuple[str, ...]) -> tuple[str, ...]:
    if not blocks or len(set(blocks)) < len(blocks):
        raise ValueError(f"expected alert, all, or a list of different blocks out of {', '.join(BLOCKS)}")
    return blocks


def _check_days(days: tuple[Day, ...]) -> tuple[Day, ...]:
    if not days or len(set(days)) < len(days):
        raise ValueError(f"expected a list of different days out of {', '.join(DAYS)}")
    return days


def _check_names(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("expected a list of different names of alerts of other systems")
    return names


def _check_factor(factor: float) -> float:
    if factor == 1.0:
        raise ValueError("1 changes nothing; expected a number above 0, at most 100, but not 1")
    return factor


def _check_shard(text: str) -> str:
    parse_shard(text)
    return text


def _check_address(*, sockets: bool, listen: bool = True) -> BeforeValidator:
    def validate(value: Any) -> Any:
        if isinstance(value, str):
            parse_address(value, sockets=sockets, listen=listen)
        return value

    return BeforeValidator(validate)


Block = Annotated[str, BeforeValidator(_check_block), Field(json_schema_extra={"enum": list(BLOCKS)})]
BlockList = Annotated[tuple[Block, ...], AfterValidator(_check_different)]
_FACTOR = "a number above 0, at most 100, but not 1; or auto"
Factor = Annotated[
    Annotated[Literal["auto"], _one_of(("auto",), expected=_FACTOR), Tag("word")]
    | Annotated[float, _number(0.0, 100.0), AfterValidator(_check_factor), Tag("number")],
    Discriminator(lambda value: "word" if isinstance(value, str) else "number"),
]
Blocks = Annotated[
    Annotated[Literal["alert", "all"], _one_of(("alert", "all")), Tag("word")] | Annotated[BlockList, Tag("list")],
    # Without it pydantic tries both branches and reports the errors of both, also of the one that was not meant.
    Discriminator(lambda value: "list" if isinstance(value, list | tuple) else "word"),
]
GrpcAddress = Annotated[str, Field(strict=True), _expecting("a string"), _check_address(sockets=True)]
HttpAddress = Annotated[str, Field(strict=True), _expecting("a string"), _check_address(sockets=False)]
AdvertisedAddress = Annotated[
    str, Field(strict=True), _expecting("a string"), _check_address(sockets=True, listen=False)
]
ShardName = Annotated[str, Field(strict=True), _expecting("a string"), AfterValidator(_check_shard)]


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """PEM files for TLS on both addresses; they are read again when they change.

    Attributes:
        certificate: The daemon's certificate, and those between it and the authority.
        key: Its key.
        client_ca: Authorities; with them, clients of gRPC must show a certificate of one of these.
        client_roles: By the common name, or an alternative name, of a client's certificate, the role of whoever shows
            it without a token.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    certificate: Text
    key: Text
    client_ca: Text | Literal[""] = ""
    client_roles: dict[Text, RoleName] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """Where the daemon listens, what it computes on and what it keeps. `stale_after` is in seconds."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    grpc: GrpcAddress = "127.0.0.1:7741"
    http: HttpAddress = "127.0.0.1:9741"
    device: Device = "auto"
    store: Store = "sqlite:///sharpwatch.db"
    # A factory, because platformdirs is slow to import and not needed where the file is named.
    token_file: Text = field(default_factory=lambda: str(default_token_file()))
    credentials: Text | Literal[""] = ""
    tls: TlsConfig | None = None
    metrics_auth: MetricsAuth = "none"
    stale_after: Duration = 900.0
    queue_capacity: Annotated[int, _integer(16, 1_000_000)] = 4096
    # What windows of probes take, to be estimated from: of one run, and of all.
    run_window_bytes: Annotated[int, _integer(2**20, _MANY)] = 8 * 2**20
    window_bytes: Annotated[int, _integer(2**20, 2**40)] = 256 * 2**20
    # At least 1,000, which is what a restart reads (`restore.REPLAYED_SAMPLES`).
    retain_samples: Annotated[int, _integer(1_000, _MANY)] = 10_000
    retain_days: Annotated[float, _number(0.0, 36_500.0)] | None = None
    retain_bytes: Annotated[int, _integer(1_000_000, 10**15)] | None = None
    layer_metrics: Flag = True
    reflection: Flag = False
    log_level: LogLevel = "info"
    # Which part of the runs of a journal on PostgreSQL that several daemons share, and where agents reach this one.
    shard: ShardName = "0/1"
    advertise: AdvertisedAddress = ""


@dataclass(frozen=True, slots=True)
class OverrideConfig:
    """Keys of `detection` that are others for the runs that have all labels of `match`; None leaves a key as it is.

    Attributes:
        match: Labels of `sharpwatch.attach(labels=...)`, and `training_job` and `run`, which every run has.
        pages_per_10k_steps: As of `DetectionConfig`.
        warnings_per_10k_steps: As above.
        stall_after: As above.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    match: dict[LabelName, Text]
    pages_per_10k_steps: Pages | None = None
    warnings_per_10k_steps: Warnings | None = None
    stall_after: Duration | None = None

    @property
    def changes(self) -> dict[str, float]:
        """The keys that it changes, with their values."""
        return {key: value for key in OVERRIDABLE if (value := getattr(self, key)) is not None}

    def fits(self, labels: Mapping[str, str]) -> bool:
        """Whether it is for a run with these labels."""
        return self.match.items() <= labels.items()


@dataclass(frozen=True, slots=True)
class DetectionConfig:
    """How many false alarms detectors may give in 10,000 healthy steps of a run, and when a run has stalled.

    Attributes:
        pages_per_10k_steps: Incidents of severity critical.
        warnings_per_10k_steps: Incidents of severity warning.
        stall_after: Seconds without a step, while the agent is connected, after which a run has stalled.
        overrides: Other values for some runs. Where several fit a run, the first one that has a key gives it.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    pages_per_10k_steps: Pages = 1.0
    warnings_per_10k_steps: Warnings = 10.0
    stall_after: Duration = 600.0
    overrides: tuple[OverrideConfig, ...] = ()

    def overridden(self, labels: Mapping[str, str]) -> dict[str, OverrideConfig]:
        """By key the override that gives it for a run with these labels; none for keys that are as for all runs."""
        found: dict[str, OverrideConfig] = {}
        for override in self.overrides:
            if override.fits(labels):
                found = dict.fromkeys(override.changes, override) | found
        return found

    def of(self, labels: Mapping[str, str]) -> DetectionConfig:
        """What holds for a run with these labels."""
        changes = {key: override.changes[key] for key, override in self.overridden(labels).items()}
        return replace(self, overrides=(), **changes)

    @property
    def shortest_stall(self) -> float:
        """The least `stall_after` of any run."""
        return min([self.stall_after, *(each.stall_after for each in self.overrides if each.stall_after is not None)])


@dataclass(frozen=True, slots=True)
class MatchConfig:
    """The incidents that a policy answers; with nothing given it runs only when another one escalates to it.

    Attributes:
        alert: An alert that is among theirs.
        cause: Their cause.
        foreign: The name of an alert of another system, which has neither of them.
        severity: Their least severity.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    alert: Alert | Literal[""] = ""
    cause: CauseName | Literal[""] = ""
    foreign: Text | Literal[""] = ""
    severity: SeverityName = "warning"

    @property
    def answered(self) -> str:
        """What it answers, in words; empty for nothing."""
        return " ".join(each for each in (self.alert, self.cause, self.foreign) if each)

    @property
    def anything(self) -> bool:
        """Whether it answers incidents by itself."""
        return bool(self.alert or self.cause or self.foreign)

    def answers(self, incident: Incident) -> bool:
        """Whether it answers this incident."""
        if self.severity == "critical" and incident.severity == "warning":
            return False
        if incident.foreign is not None or self.foreign:
            return incident.foreign is not None and incident.foreign.name == self.foreign
        return self.anything and self.alert in {"", *incident.names} and self.cause in {"", incident.cause}


@dataclass(frozen=True, slots=True)
class ActionConfig:
    """What a policy does.

    Attributes:
        kind: Which action.
        blocks: `alert` for the blocks of the alert, `all`, or a list of blocks (`scale_lr`).
        factor: The factor on their multipliers (`scale_lr`); `auto` for what is measured to be enough.
        ramp_steps: Steps over which the change is spread geometrically (`scale_lr`).
        ttl_steps: Steps after which a raise ends if the daemon falls silent (`scale_lr`).
        skip_margin: Steps of data left out on both sides of the alert (`rollback`).
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    kind: Kind = "notify"
    blocks: Blocks = "alert"
    factor: Factor = 1.0
    ramp_steps: Annotated[int, _integer(0, 1_000_000)] = 0
    ttl_steps: Annotated[int, _integer(0, _MANY)] = 0
    skip_margin: Annotated[int, _integer(0, 1_000_000)] = 10

    @property
    def cuts(self) -> bool:
        """Whether it lowers rates; else it raises them."""
        return self.factor == "auto" or self.factor < 1


@dataclass(frozen=True, slots=True)
class GuardConfig:
    """The limits on a policy's actions. Times are in optimizer steps, `approve_within` in seconds.

    `blocked_by` has names of alerts of other systems; while one of them fires on a run, the policy does nothing there.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    min_multiplier: Annotated[float, _number(0.0, 1.0)] = 0.01
    max_multiplier: Annotated[float, _number(0.0, 1000.0)] = 10.0
    cooldown_steps: Annotated[int, _integer(0, _MANY)] = 200
    max_actions_per_hour: Annotated[int, _integer(1, 3600)] = 4
    expires_after_steps: Annotated[int, _integer(1, _MANY)] = 100
    approve_within: Duration = 900.0
    recover_within_steps: Annotated[int, _integer(1, _MANY)] = 100
    hold_steps: Annotated[int, _integer(1, _MANY)] = 200
    rollback_window_steps: Annotated[int, _integer(1, _MANY)] = 1000
    max_worse: Annotated[int, _integer(1, 3600)] = 1
    max_no_effect: Annotated[int, _integer(1, 3600)] = 4
    max_inconclusive: Annotated[int, _integer(1, 3600)] = 1
    blocked_by: Annotated[tuple[Text, ...], AfterValidator(_check_names)] = ()


@dataclass(frozen=True, slots=True)
class EscalateConfig:
    """The policy that takes over, `to`, if an incident is open `after_steps` steps after the first action.

    It does so at once where that is known not to help.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    after_steps: Annotated[int, _integer(1, _MANY)]
    to: Text


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """A policy: the alert that it answers, its action, and the limits on that.

    Attributes:
        dry_run: It only records what it would do, also where the run's own mode goes further.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    name: Text
    match: MatchConfig = field(default_factory=MatchConfig)
    # A policy only records until somebody writes that it may act.
    mode: PolicyMode = "observe"
    action: ActionConfig = field(default_factory=ActionConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    escalate: EscalateConfig | None = None
    dry_run: Flag = False


@dataclass(frozen=True, slots=True)
class CurvatureShareConfig:
    """Raises of blocks by their small share s in the curvature along the step: clip((max s / s)^exponent, 1, max)."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    max: Annotated[float, _number(1.0, 100.0)] = 4.0
    exponent: Annotated[float, _number(0.0, 2.0)] = 0.5


@dataclass(frozen=True, slots=True)
class StabilityCapConfig:
    """Cuts of all rates alike, as far as the directional stability ratio is above `target`."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    target: Annotated[float, _number(0.0, 10.0)]


@dataclass(frozen=True, slots=True)
class AutopilotConfig:
    """Learning rates from measured curvature; off without a rule.

    Attributes:
        mode: How far it goes where the run has no mode of its own.
        curvature_share: The rule that raises blocks; None for none.
        stability_cap: The rule that cuts the whole; None for none.
        ramp_steps: Steps over which a change is spread geometrically.
        least_change: The factor by which a block's multiplier has to change at least for a new revision.
        ttl_steps: Steps after which raises end if the daemon falls silent; it renews them at half of that.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    # As a policy's: it only records until somebody writes that it may act.
    mode: PolicyMode = "observe"
    curvature_share: CurvatureShareConfig | None = None
    stability_cap: StabilityCapConfig | None = None
    ramp_steps: Annotated[int, _integer(0, 1_000_000)] = 3
    least_change: Annotated[float, _number(1.0, 10.0)] = 1.2
    ttl_steps: Annotated[int, _integer(2, _MANY)] = 2000

    @property
    def is_on(self) -> bool:
        """Whether it has a rule."""
        return self.curvature_share is not None or self.stability_cap is not None


@dataclass(frozen=True, slots=True)
class MaintenanceConfig:
    """A window of the week, in UTC, in which policies propose what they would otherwise enforce.

    Attributes:
        from_: When it begins. The key is `from`, which Python has for itself.
        to: When it ends; a time before that is one of the next day.
        days: The days on which it begins.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    from_: Annotated[Time, Field(alias="from")]
    to: EndTime
    days: Annotated[tuple[Annotated[Day, _one_of(DAYS)], ...], AfterValidator(_check_days)] = DAYS

    def contains(self, now: float) -> bool:
        """Whether it holds at `now`, in unix seconds."""
        at = datetime.fromtimestamp(now, UTC)
        clock, today, yesterday = f"{at:%H:%M}", DAYS[at.weekday()], DAYS[at.weekday() - 1]
        if self.from_ < self.to:  # as texts, which have two digits each
            return today in self.days and self.from_ <= clock < self.to
        return (today in self.days and clock >= self.from_) or (yesterday in self.days and clock < self.to)


@dataclass(frozen=True, slots=True)
class NotificationsConfig:
    """Whom the daemon tells of incidents and decisions.

    Attributes:
        webhook: Where messages are posted; empty for nowhere.
        severity: The least severity of incidents that are told.
        token_file: A file with a bearer token for the webhook.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    webhook: Webhook | Literal[""] = ""
    severity: SeverityName = "critical"
    token_file: Text | Literal[""] = ""


@dataclass(frozen=True, slots=True)
class GateConfig:
    """Whom the daemon asks before a policy raises rates.

    Attributes:
        webhook: Where decisions are posted; empty for nobody.
        token_file: A file with a bearer token for the webhook.
        timeout: Seconds until no answer means no.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    webhook: Webhook | Literal[""] = ""
    token_file: Text | Literal[""] = ""
    timeout: Duration = 10.0


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration; with the default one, the daemon only watches."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    daemon: DaemonConfig = field(default_factory=DaemonConfig)
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    notifications: NotificationsConfig = field(default_factory=NotificationsConfig)
    policies: tuple[PolicyConfig, ...] = ()
    autopilot: AutopilotConfig = field(default_factory=AutopilotConfig)
    maintenance: tuple[MaintenanceConfig, ...] = ()
    gate: GateConfig = field(default_factory=GateConfig)

    @property
    def foreign_alerts(self) -> frozenset[str]:
        """The names of alerts of other systems that a policy answers or is blocked by; no others are taken in."""
        blocking = (name for policy in self.policies for name in policy.guard.blocked_by)
        return frozenset((*blocking, *(policy.match.foreign for policy in self.policies if policy.match.foreign)))
