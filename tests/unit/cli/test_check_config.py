"""What `sharpwatch check-config` says of a configuration: golden text."""

from __future__ import annotations

import pytest

from sharpwatch.cli.commands.serve import describe_config
from sharpwatch.cli.main import main
from sharpwatch.cli.output import plain
from sharpwatch.daemon.config.load import load_config

WHOLE = """
daemon: {store: "sqlite:///j.db"}
detection:
  overrides:
    - {match: {team: nlp}, pages_per_10k_steps: 2, stall_after: 1h}
    - {match: {run: a, training_job: b}, stall_after: 20s}
notifications: {webhook: "https://ann:secret@hooks.example/services/secret", severity: warning}
gate: {webhook: "http://127.0.0.1:9000/ask", timeout: 5s}
autopilot: {mode: advise, stability_cap: {target: 1}}
maintenance:
  - {from: "22:00", to: "06:00", days: [fri, sat]}
policies:
  - {name: cut, match: {alert: NonFinite}, mode: advise, action: {kind: scale_lr, factor: 0.5}}
"""
SHOWN = """\
config         FILE is valid
grpc           127.0.0.1:7741
http           127.0.0.1:9741
store          sqlite:///j.db
notifications  https://hooks.example, incidents of severity warning and up
gate           http://127.0.0.1, no answer in 5 s is no
autopilot      stability_cap, mode advise
maintenance    22:00 to 06:00 UTC on fri, sat

policy  answers    mode    action
cut     NonFinite  advise  scale_lr

detection of           pages_per_10k_steps  warnings_per_10k_steps  stall_after
team=nlp                                 2                               60 min
run=a, training_job=b                                                      20 s"""


@pytest.fixture
def described(tmp_path):
    def describe(text: str) -> str:
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return plain(describe_config(path, load_config(path))).replace(str(path), "FILE")

    return describe


def test_all_that_is_configured_is_said_without_what_may_be_secret(described):
    assert described(WHOLE) == SHOWN
    assert "secret" not in described(WHOLE)


def test_a_password_of_the_journal_is_not_printed(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(
        'daemon: {store: "postgresql+psycopg://ann:secret@db/x", retain_days: 7.5, retain_bytes: 50_000_000}'
    )
    for arguments in (["check-config", str(path)], ["check-config", str(path), "--json"]):
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        assert "postgresql+psycopg://ann:***@db/x" in printed
        assert "secret" not in printed


def test_what_is_not_configured_is_said_too(described):
    assert described("").splitlines()[4:] == [
        "notifications  none",
        "gate           none",
        "autopilot      off",
        "",
        "no policy",
    ]


@pytest.mark.parametrize(
    ("daemon", "refused"),
    [
        ('{grpc: "0.0.0.0:7741"}', "daemon.grpc 0.0.0.0:7741: no credentials are configured, so only loopback"),
        ('{grpc: "0.0.0.0:7741", credentials: "c.yaml"}', "daemon.grpc 0.0.0.0:7741: tokens would cross the network"),
        ('{http: "0.0.0.0:9741", metrics_auth: token}', "daemon.http 0.0.0.0:9741: with metrics_auth: token, tokens"),
        (
            '{grpc: "0.0.0.0:7741", credentials: "c.yaml", tls: {certificate: "c.pem", key: "k.pem"}}',
            "",
        ),
        (
            '{grpc: "0.0.0.0:1", credentials: c, tls: {certificate: c, key: k}, shard: "0/2"}',
            "daemon.advertise: shard 0/2 needs it where grpc is 0.0.0.0:1",
        ),
    ],
)
def test_an_address_that_the_daemon_would_not_serve_is_refused(tmp_path, capsys, daemon, refused):
    path = tmp_path / "c.yaml"
    path.write_text(f"daemon: {daemon}\n")
    assert main(["check-config", str(path)]) == bool(refused)
    error = capsys.readouterr().err
    assert error.startswith(f"sharpwatch: {path}: {refused}") if refused else not error
