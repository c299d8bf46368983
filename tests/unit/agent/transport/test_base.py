from __future__ import annotations

import pytest

from sharpwatch.agent.transport.base import (
    Destination,
    check_secrecy,
    find_token_file,
    parse_daemon_addresses,
    parse_tls,
    parse_token,
)
from sharpwatch.agent.transport.courier_handle import CourierHandle
from sharpwatch.common.tls import Tls
from sharpwatch.errors import AttachError


def test_an_address_that_is_none_is_an_error_of_attach():
    with pytest.raises(AttachError, match=r"^address: expected HOST:PORT or unix:PATH, .*, got 'localhost'$"):
        parse_daemon_addresses("localhost")


def test_tls_names_what_is_wrong():
    assert parse_tls(None) is None
    with pytest.raises(AttachError, match="tls must map any of ca, cert, key"):
        parse_tls({"certificate": "x"})
    with pytest.raises(AttachError, match="tls must have both cert and key, or neither, got cert"):
        parse_tls({"cert": "x"})
    with pytest.raises(AttachError, match=r"tls\['ca'\] must be a file, and there is none at /nowhere/ca\.pem"):
        parse_tls({"ca": "/nowhere/ca.pem"})


def test_a_token_goes_into_a_header_and_never_into_an_error():
    assert parse_token(None) == ""
    assert parse_token(" secret\n") == "secret"
    with pytest.raises(AttachError) as caught:
        parse_token("sec\nret")
    assert "sec" not in str(caught.value).replace("allowed", "")


def test_a_destination_survives_the_environment():
    destination = Destination(("unix:/a b",), "t", Tls(ca="/ca", cert=None, key=None), 7, 8)
    assert Destination.from_json(destination.to_json()) == destination
    plain = Destination(("h:1", "h:2"), "", None, 7, 8)
    assert Destination.from_json(plain.to_json()) == plain


@pytest.mark.parametrize("address", ["10.0.0.5:7741", "node17:7741", "0.0.0.0:7741"])
def test_a_token_never_crosses_the_network_in_the_clear(address):
    reason = rf"token: it would cross the network to {address} unencrypted; give tls=.*, or use an SSH tunnel"
    with pytest.raises(AttachError, match=reason):
        check_secrecy(parse_daemon_addresses(address), has_token=True, tls=None)
    with pytest.raises(AttachError, match=reason):
        CourierHandle(address=address, token="s3cret")  # noqa: S106 - not a secret
    check_secrecy(parse_daemon_addresses(address), has_token=True, tls=Tls())
    check_secrecy(parse_daemon_addresses(address), has_token=False, tls=None)


@pytest.mark.parametrize("address", ["127.0.0.1:7741", "[::1]:7741", "localhost:7741", "unix:/run/s.sock"])
def test_a_token_may_go_to_this_machine(address):
    check_secrecy(parse_daemon_addresses(address), has_token=True, tls=None)


def test_the_token_is_in_the_file_that_the_environment_names(tmp_path, monkeypatch):
    assert find_token_file(None) == ""
    path = tmp_path / "agent.token"
    path.touch(mode=0o600)
    path.write_text("s3cret\n")
    monkeypatch.setenv("SHARPWATCH_TOKEN_FILE", str(path))
    assert find_token_file(None) == str(path)
    assert find_token_file("given") == ""
    with pytest.raises(AttachError, match="token: it would cross the network to node17:7741"):
        CourierHandle(address="node17:7741")
    path.chmod(0o644)
    with pytest.raises(AttachError, match=r"^\$SHARPWATCH_TOKEN_FILE: token file .* has mode 0644: others can read it"):
        find_token_file(None)


def test_the_environment_names_the_files_of_tls(tmp_path, monkeypatch):
    ca = tmp_path / "ca.pem"
    ca.touch()
    monkeypatch.setenv("SHARPWATCH_TLS_CA", str(ca))
    assert parse_tls(None) == Tls(ca=str(ca))
    monkeypatch.setenv("SHARPWATCH_TLS_CERT", str(ca))
    with pytest.raises(AttachError, match="tls must have both cert and key"):
        parse_tls(None)
