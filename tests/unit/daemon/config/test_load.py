"""The daemon's configuration: what is taken, what is refused where and why, and the JSON schema for editors."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

import sharpwatch.daemon.config
from sharpwatch.daemon.config.load import json_schema, load_config
from sharpwatch.daemon.config.settings import (
    ActionConfig,
    Config,
    DaemonConfig,
    EscalateConfig,
    GuardConfig,
    MatchConfig,
)
from sharpwatch.errors import ConfigError

ROOT = Path(__file__).parents[4]
DESIGN = """\
daemon: {grpc: "127.0.0.1:7741", http: "127.0.0.1:9741", device: auto, store: "sqlite:///sharpwatch.db"}
policies:
  - name: cut-unstable-blocks
    match: {alert: StabilityLimit}
    mode: advise
    action: {kind: scale_lr, blocks: alert, factor: 0.5, ramp_steps: 20, ttl_steps: 500}
    guard: {min_multiplier: 0.1, cooldown_steps: 200, max_actions_per_hour: 4}
    escalate: {after_steps: 200, to: rollback-before-onset}
  - name: rollback-before-onset
    action: {kind: rollback}
"""
CUT = "{name: a, match: {alert: LossSpike}, action: {kind: scale_lr, factor: 0.5}"


@pytest.fixture
def load(tmp_path):
    def from_text(text: str) -> Config:
        path = tmp_path / "sharpwatch.yaml"
        path.write_text(text)
        return load_config(path)

    return from_text


def test_no_file_and_an_empty_one_watch_and_do_nothing(load):
    assert load_config() == load("") == load("# nothing\n") == Config()
    assert (Config().notifications.webhook, Config().policies) == ("", ())


def test_design_example(load):
    config = load(DESIGN)
    cut, rollback = config.policies
    assert config.daemon == DaemonConfig()
    assert cut.match.alert == "StabilityLimit"
    assert cut.mode == "advise"
    assert cut.action == ActionConfig("scale_lr", blocks="alert", factor=0.5, ramp_steps=20, ttl_steps=500)
    assert cut.guard == GuardConfig(min_multiplier=0.1, cooldown_steps=200, max_actions_per_hour=4)
    assert cut.escalate == EscalateConfig(200, "rollback-before-onset")
    assert (rollback.mode, rollback.match.alert, rollback.action.kind) == ("observe", "", "rollback")


def test_the_autopilot_is_off_by_default_and_observes_until_told_otherwise(load):
    assert not load("").autopilot.is_on
    config = load("autopilot: {curvature_share: {}, stability_cap: {target: 0.5}}").autopilot
    assert (config.mode, config.is_on) == ("observe", True)
    assert (config.curvature_share.max, config.curvature_share.exponent) == (4.0, 0.5)
    assert config.stability_cap.target == 0.5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("autopilot: {curvature_share: {max: 1}}", "above 1"),
        ("autopilot: {curvature_share: {exponent: 0}}", "above 0"),
        ("autopilot: {stability_cap: {}}", "target"),
        ("autopilot: {mode: on, stability_cap: {target: 1}}", "observe, advise, enforce"),
        ("autopilot: {mode: enforce}", "does nothing without curvature_share or stability_cap"),
        ("autopilot: {ttl_steps: 1}", "integer from 2"),
    ],
)
def test_what_the_autopilot_cannot_be_is_refused(load, text, says):
    with pytest.raises(ConfigError, match=says):
        load(text)


def test_a_policy_runs_dry_only_where_it_says_so(load):
    dry, other = load(f"policies:\n  - {CUT}, dry_run: true}}\n  - {CUT.replace('name: a', 'name: b')}}}\n").policies
    assert (dry.dry_run, other.dry_run) == (True, False)


@pytest.mark.parametrize(
    ("window", "times"),
    [
        # The 30th of November 2025 is a Sunday.
        ("{from: 09:00, to: 17:00}", {"30 08:59": False, "30 09:00": True, "30 16:59": True, "30 17:00": False}),
        ("{from: 09:00, to: 17:00, days: [sun]}", {"29 12:00": False, "30 12:00": True}),
        (
            "{from: 22:00, to: 06:00, days: [sat]}",
            {
                "29 21:59": False,
                "29 22:00": True,
                "30 05:59": True,
                "30 06:00": False,
                "30 22:00": False,
                "29 05:00": False,
            },
        ),
        ("{from: 22:00, to: 06:00, days: [sun]}", {"24 05:59": True, "24 22:00": False, "30 05:59": False}),
        ("{from: 00:00, to: 24:00, days: [sun]}", {"29 23:59": False, "30 00:00": True, "30 23:59": True}),
        ("{from: 22:00, to: 00:00, days: [sun]}", {"30 23:59": True, "24 00:00": False}),
    ],
)
def test_a_maintenance_window_holds_on_its_days_and_over_midnight(load, window, times):
    (found,) = load(f"maintenance: [{window}]").maintenance
    seconds = {time: datetime.strptime(f"2025-11-{time}", "%Y-%m-%d %H:%M").replace(tzinfo=UTC) for time in times}
    assert {time: found.contains(at.timestamp()) for time, at in seconds.items()} == times


def test_shipped_example_is_taken_and_enforces_nothing():
    policies = load_config(ROOT / "examples/sharpwatch.yaml").policies
    assert {"hold-the-rate", "rollback-before-onset"} <= {policy.name for policy in policies}
    assert "enforce" not in {policy.mode for policy in policies}


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), ("1d", 86400), ("12.5", 12.5)]
)
def test_durations(load, text, seconds):
    assert load(f"daemon: {{stale_after: {text}}}").daemon.stale_after == seconds


@pytest.mark.parametrize("address", ["localhost:0", "[::1]:7741", "unix:/run/s.sock"])
def test_addresses(load, address):
    assert load(f'daemon: {{grpc: "{address}"}}').daemon.grpc == address


@pytest.mark.parametrize(
    ("text", "line", "key", "expected"),
    [
        ("daemon:\n  grcp: x\n", 2, "daemon.grcp", "did you mean 'grpc'"),
        ("deamon: {}\n", 1, "deamon", "allowed: daemon, detection, notifications, policies"),
        ("daemon:\n  http: 9741\n", 2, "daemon.http", "expected a string"),
        ('daemon:\n  http: "unix:/x"\n', 2, "daemon.http", "HOST:PORT"),
        ('daemon:\n  grpc: "127.0.0.1"\n', 2, "daemon.grpc", "HOST:PORT or unix:PATH"),
        ('daemon:\n  grpc: "::1:80"\n', 2, "daemon.grpc", "brackets"),
        ('daemon:\n  grpc: "127.0.0.1:70000"\n', 2, "daemon.grpc", "65535"),
        ("daemon:\n  store: postgresql://x\n", 2, "daemon.store", "sqlite:///PATH"),
        (
            "daemon:\n  store: mysql://ann:s@h/d\n",
            2,
            "daemon.store",
            "'mysql://ann:***@h/d' is not allowed; allowed: sql",
        ),
        ("daemon:\n  retain_days: 0\n", 2, "daemon.retain_days", "a number above 0, at most 36500"),
        ("daemon:\n  retain_bytes: 1e6\n", 2, "daemon.retain_bytes", "an integer from 1000000 to"),
        ("daemon:\n  device: gpu\n", 2, "daemon.device", "auto, cpu, cuda"),
        ("daemon:\n  stale_after: 5 parsecs\n", 2, "daemon.stale_after", "as in 5m"),
        ("daemon:\n  stale_after: nan\n", 2, "daemon.stale_after", "as in 5m"),
        ("daemon:\n  layer_metrics: 1\n", 2, "daemon.layer_metrics", "true or false"),
        ("daemon:\n  reflection: 1\n", 2, "daemon.reflection", "true or false"),
        ("daemon:\n  queue_capacity: 2.5\n", 2, "daemon.queue_capacity", "an integer from 16"),
        ("daemon:\n  device: cpu\n  device: auto\n", 3, "daemon.device", "given twice"),
        ("daemon: [1]\n", 1, "daemon", "expected a mapping"),
        ("policies: {}\n", 1, "policies", "expected a list"),
        ('maintenance:\n  - {from: "09:00"}\n', 2, "maintenance[0]", "to is missing; allowed: from, to, days"),
        (
            "maintenance:\n  - {from: 9:00, to: 17:00}\n",
            2,
            "maintenance[0].from",
            "9:00: expected a time of day in UTC",
        ),
        ("maintenance:\n  - {from: 24:00, to: 17:00}\n", 2, "maintenance[0].from", "from 00:00 to 23:59"),
        ("maintenance:\n  - {from: 09:00, to: 24:01}\n", 2, "maintenance[0].to", "to 23:59, or 24:00"),
        ("maintenance:\n  - {from: 09:00, to: 09:00}\n", 2, "maintenance[0]", "a whole day is from 00:00 to 24:00"),
        ("maintenance:\n  - {from: 09:00, to: 10:00,\n     days: [sa]}\n", 3, "maintenance[0].days[0]", "'sat'"),
        ("maintenance:\n  - {from: 09:00, to: 10:00, days: []}\n", 2, "maintenance[0].days", "different days"),
        ("maintenance:\n  - {from: 09:00, to: 10:00, days: sat}\n", 2, "maintenance[0].days", "expected a list"),
        ("gate: {timeout: 5s}\n", 1, "gate", "webhook is missing"),
        ("gate: {webhook: example.org}\n", 1, "gate.webhook", "an URL"),
        ('gate: {webhook: "http://[::1/x"}\n', 1, "gate.webhook", "http://HOST"),
        ('gate: {webhook: "http://..:80/"}\n', 1, "gate.webhook", "http://HOST"),
        ('gate: {webhook: "http://:80/"}\n', 1, "gate.webhook", "http://HOST"),
        ('notifications:\n  webhook: "http://h:99999/"\n', 2, "notifications.webhook", "http://HOST"),
        ("policies:\n  - {name: a}\n", 2, "policies[0]", "action is missing"),
        ("policies:\n  - {name: a, action: {kind: scale_lr, factor: 0.5}}\n", 2, "policies[0]", "can never run"),
        (f"policies:\n  - {CUT.replace('LossSpike', 'LossSpikes')}}}\n", 2, "policies[0].match.alert", "'LossSpike'"),
        (f"policies:\n  - {CUT}, dry_run: 1}}\n", 2, "policies[0].dry_run", "true or false"),
        (f"policies:\n  - {CUT}, mode: enforced}}\n", 2, "policies[0].mode", "observe, advise, enforce"),
        (f"policies:\n  - {CUT.replace('0.5', '0')}}}\n", 2, "policies[0].action.factor", "above 0"),
        (f"policies:\n  - {CUT.replace('0.5', '-2')}}}\n", 2, "policies[0].action.factor", "above 0"),
        (f"policies:\n  - {CUT.replace('0.5', '1')}}}\n", 2, "policies[0].action.factor", "changes nothing"),
        (f"policies:\n  - {CUT.replace('0.5', '.inf')}}}\n", 2, "policies[0].action.factor", "above 0"),
        (
            f"policies:\n  - {CUT.replace('0.5', 'half')}}}\n",
            2,
            "policies[0].action.factor",
            "a number above 0, at most 100",
        ),
        (f"policies:\n  - {CUT.replace('0.5', '2')}}}\n", 2, "policies[0].action", "ttl_steps"),
        (f"policies:\n  - {CUT.replace('0.5', '0.005')}}}\n", 2, "policies[0].action", "min_multiplier is 0.01"),
        (
            f"policies:\n  - {CUT}, guard: {{min_multiplier: 1.5}}}}\n",
            2,
            "policies[0].guard.min_multiplier",
            "at most 1",
        ),
        (f"policies:\n  - {CUT}, guard: {{min_multiplier: 1}}}}\n", 2, "policies[0].action", "never take effect"),
        (
            f"policies:\n  - {CUT},\n     guard: {{min_multiplier: 0.9, max_multiplier: 0.5}}}}\n",
            3,
            "policies[0].guard.min_multiplier",
            "above max_multiplier 0.5",
        ),
        (f"policies:\n  - {CUT}, guard: {{max_multiplier: 0.5}}}}\n", 2, "policies[0].guard.max_multiplier", "from 1"),
        (f"policies:\n  - {CUT}, guard: {{cooldown_steps: -1}}}}\n", 2, "policies[0].guard.cooldown_steps", "from 0"),
        (
            f"policies:\n  - {CUT}, guard: {{max_actions_per_hour: 0}}}}\n",
            2,
            "policies[0].guard.max_actions_per_hour",
            "from 1",
        ),
        (f"policies:\n  - {CUT}, guard: {{cooldown: 5}}}}\n", 2, "policies[0].guard.cooldown", "'cooldown_steps'"),
        (f"policies:\n  - {CUT}}}\n  - {CUT}}}\n", 3, "policies[1].name", "taken"),
        (
            f"policies:\n  - {CUT}, escalate: {{after_steps: 5, to: b}}}}\n",
            2,
            "policies[0].escalate.to",
            "there is no policy 'b'; allowed: a",
        ),
        (
            f"policies:\n  - {CUT}, escalate: {{after_steps: 5, to: a}}}}\n",
            2,
            "policies[0].escalate.to",
            "a -> a",
        ),
        (
            "policies:\n  - {name: a, match: {alert: LossSpike}, action: {kind: rollback, factor: 0.5}}\n",
            2,
            "policies[0].action.factor",
            "means nothing to rollback",
        ),
        (
            "policies:\n  - name: a\n    match: {alert: LossSpike}\n    action: {kind: scale_lr}\n",
            4,
            "policies[0].action",
            "factor is missing",
        ),
        (
            (
                "policies:\n  - name: a\n    match: {alert: LossSpike}\n"
                "    action: {kind: scale_lr, factor: 0.5, blocks: [qk, kv]}\n"
            ),
            4,
            "policies[0].action.blocks[1]",
            "emb, qk, vo",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_its_place(load, text, line, key, expected):
    with pytest.raises(ConfigError) as refused:
        load(text)
    assert (refused.value.line, refused.value.key) == (line, key)
    assert expected in str(refused.value)
    assert str(refused.value).startswith(f"{refused.value.file}:{line}: {key}: ")


def test_a_circle_of_three_is_found(load):
    rungs = "".join(
        f"  - {CUT.replace('name: a', f'name: {name}')}, escalate: {{after_steps: 5, to: {to}}}}}\n"
        for name, to in ("ab", "bc", "cb")
    )
    with pytest.raises(ConfigError, match="a -> b -> c -> b"):
        load("policies:\n" + rungs)


def test_a_file_that_is_not_there(tmp_path):
    path = tmp_path / "none.yaml"
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    assert str(refused.value) == f"{path}: can't be read: No such file or directory"


def test_what_python_itself_gives_up_on_is_refused_like_all_else(load):
    with pytest.raises(ConfigError, match="is nested too deep"):
        load("[" * 2000)
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        load(f"daemon: {{http: '127.0.0.1:{'9' * 5000}'}}")


def test_a_file_that_is_no_yaml_is_reported_with_its_line(load):
    with pytest.raises(ConfigError, match=r"sharpwatch\.yaml:2: is not YAML: "):
        load("daemon:\n\tgrpc: x\n")


def test_a_policy_can_answer_a_cause_from_a_severity_on(load):
    (policy,) = load("policies: [{name: a, match: {cause: data, severity: critical}, action: {kind: notify}}]").policies
    assert policy.match == MatchConfig(cause="data", severity="critical")
    with pytest.raises(ConfigError, match=r"policies\[0].*can never run: give it match: \{alert: \.\.\.\}.*\{cause: "):
        load("policies: [{name: a, match: {severity: critical}, action: {kind: notify}}]")
    with pytest.raises(ConfigError, match=r"policies\[0]\.match\.cause.*data, learning-rate, .*did you mean 'data'"):
        load("policies: [{name: a, match: {cause: dta}, action: {kind: notify}}]")


FOREIGN = "{name: a, match: {foreign: NodeHot}, action: {kind: scale_lr, factor: 0.5}"


def test_alerts_of_other_systems_are_those_that_a_policy_names(load):
    config = load(f"policies:\n  - {FOREIGN}, guard: {{blocked_by: [NodeDown, GpuLost]}}}}\n")
    assert config.foreign_alerts == {"NodeHot", "NodeDown", "GpuLost"}
    assert load("").foreign_alerts == load(f"policies:\n  - {CUT}}}\n").foreign_alerts == set()


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        (FOREIGN.replace("NodeHot", "NodeHot, cause: data"), "match.cause", "allowed: foreign alone"),
        (FOREIGN.replace("NodeHot", "NodeHot, alert: LossSpike"), "match.alert", "allowed: foreign alone"),
        (FOREIGN.replace("NodeHot", "5"), "match.foreign", "a string that is not empty"),
        (FOREIGN.replace("0.5", "auto"), "action.factor", "allowed: a number"),
        (f"{FOREIGN}, guard: {{blocked_by: [NodeHot]}}", "match.foreign", "guard.blocked_by names NodeHot too"),
        (f"{FOREIGN}, guard: {{blocked_by: [A, A]}}", "guard.blocked_by", "different names"),
        (f"{FOREIGN}, guard: {{blocked_by: NodeDown}}", "guard.blocked_by", "expected a list"),
        (CUT.replace("LossSpike", "ForeignAlert"), "match.alert", "allowed: WeightJump"),
        (CUT.replace("alert: LossSpike", "cause: foreign"), "match.cause", "allowed: data"),
    ],
)
def test_what_cannot_work_on_them_is_refused(load, text, key, expected):
    with pytest.raises(ConfigError) as refused:
        load(f"policies:\n  - {text}}}\n")
    assert (refused.value.line, refused.value.key) == (2, f"policies[0].{key}")
    assert expected in str(refused.value)


SHIPPED = Path(sharpwatch.daemon.config.__file__).with_name("schema.json")


def test_the_shipped_schema_is_up_to_date():
    assert json.loads(SHIPPED.read_text(encoding="utf-8")) == json_schema()


def test_it_names_every_key_and_its_limits():
    schema = json_schema()
    daemon, guard, action = (schema["$defs"][f"{name}Config"]["properties"] for name in ("Daemon", "Guard", "Action"))
    assert daemon["queue_capacity"] == {"default": 4096, "maximum": 1_000_000, "minimum": 16} | {
        key: daemon["queue_capacity"][key] for key in ("title", "type")
    }
    assert guard["min_multiplier"]["exclusiveMinimum"] == 0.0
    assert action["kind"]["enum"] == ["notify", "scale_lr", "rollback"]
    assert schema["additionalProperties"] is False


OVERRIDES = """\
detection:
  pages_per_10k_steps: 1
  overrides:
    - {match: {team: nlp}, pages_per_10k_steps: 2, stall_after: 1h}
    - {match: {training_job: owt}, stall_after: 30m, warnings_per_10k_steps: 5}
    - {match: {team: nlp, tier: gold}, pages_per_10k_steps: 4}
"""


@pytest.mark.parametrize(
    ("labels", "pages", "warnings", "stall_after"),
    [
        ({}, 1.0, 10.0, 600.0),
        ({"team": "vision"}, 1.0, 10.0, 600.0),
        ({"team": "nlp"}, 2.0, 10.0, 3600.0),
        ({"training_job": "owt"}, 1.0, 5.0, 1800.0),
        ({"team": "nlp", "training_job": "owt"}, 2.0, 5.0, 3600.0),  # of each key the first
        ({"tier": "gold"}, 1.0, 10.0, 600.0),  # all of the labels must fit
    ],
)
def test_the_first_override_that_fits_and_has_a_key_gives_it(load, labels, pages, warnings, stall_after):
    detection = load(OVERRIDES).detection
    found = detection.of(labels)
    assert (found.pages_per_10k_steps, found.warnings_per_10k_steps) == (pages, warnings)
    assert (found.stall_after, found.overrides) == (stall_after, ())
    for key, override in detection.overridden(labels).items():
        assert override.changes[key] == getattr(found, key)
    assert detection.shortest_stall == 600.0


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("{pages_per_10k_steps: 2}", "overrides[0]: match is missing; allowed: match, pages_per_10k_steps"),
        ("{match: {}, stall_after: 60}", "overrides[0].match: is empty: what is for every run stands in detection"),
        ("{match: {team: nlp}}", "overrides[0]: changes nothing; allowed: pages_per_10k_steps, warnings_per_10k_steps"),
        ("{match: nlp, stall_after: 60}", "overrides[0].match: expected a mapping of labels, such as {team: nlp}"),
        ("{match: {team: 7}, stall_after: 60}", "overrides[0].match.team: 7: expected a string that is not empty"),
        ("{match: {Team: x}, stall_after: 60}", "overrides[0].match.Team: a label's name must be 1 to 63 of a-z"),
        ("{match: {team: x}, stall_after: 0}", "overrides[0].stall_after: 0: expected"),
        (
            "{match: {team: x}, pages_per_10k_steps: 0}",
            "overrides[0].pages_per_10k_steps: 0: expected a number above 0",
        ),
        ("{match: {team: x}, pages: 2}", "overrides[0].pages: unknown key; allowed: match, pages_per_10k_steps"),
    ],
)
def test_a_wrong_override_is_refused_with_file_line_and_key(load, override, says):
    with pytest.raises(ConfigError) as raised:
        load(f"detection:\n  overrides:\n    - {override}\n")
    assert f"sharpwatch.yaml:3: detection.{says}" in str(raised.value)
