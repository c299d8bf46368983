"""Tokens and TLS from end to end: the command makes a token, a courier and the command line show it to a daemon."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from certificates import Authority
from daemons import PATIENCE, Daemon, honest, welcome
from wire_trainer import whole_hello

from sharpwatch.agent.transport.courier_handle import CourierHandle
from sharpwatch.v1 import agent_pb2


def sharpwatch(*arguments, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "sharpwatch", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **environment},
    )


def write_token(path, text):
    path.touch(mode=0o600)
    path.write_text(text)
    return path


@pytest.fixture
def courier():
    started = []

    def start(address, **options):
        started.append(CourierHandle(address=address, **options))
        started[-1].send_hello(whole_hello("run", "attempt"))
        started[-1].flush()
        return started[-1]

    yield start
    for each in started:
        each.close()


@pytest.fixture
def authority(tmp_path, program):
    program("openssl")
    return Authority(tmp_path)


def test_a_token_is_shown_once_and_its_hash_is_kept(tmp_path):
    file = tmp_path / "credentials.yaml"
    create = ("token", "create", "--role", "agent", "--name", "gpt2", "--file", file)
    made = sharpwatch(*create, "--job", "gpt2-owt", "--days", "30")
    assert made.returncode == 0, made.stderr
    assert len(made.stdout.split()) == 1
    assert made.stdout.strip() not in file.read_text() + made.stderr
    again = sharpwatch(*create)
    assert again.returncode == 1
    assert again.stderr.endswith("has a token of 'gpt2' already; --replace makes a new one in its place\n")
    assert sharpwatch(*create, "--replace").stdout not in {made.stdout, ""}
    assert sharpwatch("token", "list", "--file", file).stdout.split()[4:7] == ["gpt2", "agent", "any"]
    assert sharpwatch("token", "revoke", "gpt2", "--file", file).returncode == 0
    assert sharpwatch("token", "list", "--file", file).stdout == "no token\n"


def test_a_courier_shows_the_token_that_its_file_has_by_then(serve, courier, tmp_path, monkeypatch):
    def ends_at_the_first_sample(daemon, samples):
        del daemon
        yield welcome()
        next(samples)

    file = write_token(tmp_path / "agent.token", "first\n")
    monkeypatch.setenv("SHARPWATCH_TOKEN_FILE", str(file))
    daemon = serve(ends_at_the_first_sample, honest)
    client = courier(daemon.address)
    daemon.wait(lambda: daemon.metadata, client)
    file.write_text("second\n")
    client.send(agent_pb2.SessionRequest(sample=agent_pb2.Sample(sequence=1, step=1)))
    daemon.wait(lambda: len(daemon.metadata) == 2, client)
    assert [each["authorization"] for each in daemon.metadata] == ["Bearer first", "Bearer second"]


def test_a_courier_says_that_its_token_file_is_open_to_others(serve, courier, tmp_path, monkeypatch):
    file = write_token(tmp_path / "agent.token", "first\n")
    monkeypatch.setenv("SHARPWATCH_TOKEN_FILE", str(file))

    def ends_at_once(daemon, samples):
        del samples
        file.chmod(0o644)
        with daemon.changed:
            daemon.changed.notify_all()
        yield welcome()

    daemon = serve(ends_at_once)
    client = courier(daemon.address)
    daemon.wait(lambda: "has mode 0644: others can read it" in client.connection.reason, client)
    assert client.connection.refused
    assert len(daemon.metadata) == 1


def test_the_trainers_own_log_says_that_its_token_is_missing(tmp_path, courier, caplog):
    file = tmp_path / "credentials.yaml"
    assert sharpwatch("token", "create", "--role", "agent", "--name", "gpt2", "--file", file).returncode == 0
    daemon = Daemon(tmp_path, extra=f'  credentials: "{file}"\n').start()
    try:
        client = courier(daemon.grpc)
        deadline = time.monotonic() + PATIENCE
        while not client.connection.refused:
            assert time.monotonic() < deadline, client.connection
            client.flush()
        (warning,) = [record.getMessage() for record in caplog.records]
        assert "a session needs a token of role agent: no token was shown" in warning
    finally:
        daemon.stop()


def test_agent_and_operator_over_tls(tmp_path, authority, courier, monkeypatch):
    file, signed, ca = tmp_path / "credentials.yaml", authority.sign("daemon"), authority.own.certificate
    tokens = {}
    for name, role in (("gpt2", "agent"), ("grafana", "viewer")):
        made = sharpwatch("token", "create", "--role", role, "--name", name, "--file", file)
        tokens[name] = write_token(tmp_path / f"{name}.token", made.stdout)
    tls = f'  credentials: "{file}"\n  tls: {{certificate: "{signed.certificate}", key: "{signed.key}"}}\n'
    daemon = Daemon(tmp_path, extra=tls, grpc="0.0.0.0:0").start()
    try:
        address = f"localhost:{daemon.grpc.rpartition(':')[2]}"
        monkeypatch.setenv("SHARPWATCH_TOKEN_FILE", str(tokens["gpt2"]))
        monkeypatch.setenv("SHARPWATCH_TLS_CA", str(ca))
        client = courier(address)

        def seen(*command, holder="grafana", **environment):
            return sharpwatch("--address", address, "--token-file", tokens[holder], *command, **environment)

        while '"run"' not in (listed := seen("jobs", "--json")).stdout:
            assert listed.returncode == 0, listed.stderr
            client.flush()
        refused = seen("mode", "run", "observe", "--reason", "x")
        assert refused.returncode == 1
        assert "grafana has the role viewer" in refused.stderr
        assert "gpt2 has the role agent" in seen("jobs", holder="gpt2").stderr
        (tmp_path / "other").mkdir()
        other = Authority(tmp_path / "other").own.certificate
        stranger = seen("jobs", SHARPWATCH_TLS_CA=str(other))
        assert f"no TLS with the daemon at {address}: its certificate is not one of --tls-ca" in stranger.stderr
        doctor = seen("doctor")
        assert "https://127.0.0.1:" in doctor.stdout, doctor.stdout + doctor.stderr
        assert "viewer: may look but not act" in doctor.stdout
    finally:
        daemon.stop()
