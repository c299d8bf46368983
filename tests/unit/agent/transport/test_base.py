from __future__ import annotations

import pytest

from sharpwatch.agent.transport.base import Destination, Tls, parse_daemon_address, parse_tls, parse_token
from sharpwatch.errors import AttachError


def test_an_address_that_is_none_is_an_error_of_attach():
    with pytest.raises(AttachError, match=r"^address: expected HOST:PORT or unix:PATH, .*, got 'localhost'$"):
        parse_daemon_address("localhost")


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
    destination = Destination("unix:/a b", "t", Tls(ca="/ca", cert=None, key=None), 7, 8)
    assert Destination.from_json(destination.to_json()) == destination
    plain = Destination("h:1", "", None, 7, 8)
    assert Destination.from_json(plain.to_json()) == plain
