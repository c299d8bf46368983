from __future__ import annotations

import pytest

from sharpwatch.common.endpoint import Destination, Tls, parse_address, parse_tls, parse_token
from sharpwatch.errors import AttachError

NO_ADDRESS = """
localhost localhost: :7741 localhost:0 localhost:65536 localhost:-1 http://localhost:7741 dns:///a:1 ::1:7741 [::1]
a:1,b:2 unix:
"""


@pytest.mark.parametrize("text", [*NO_ADDRESS.split(), "", "a b:1", "localhost:7741\n", "localhost:\u0661"])
def test_what_is_no_address_says_what_is_allowed(text):
    with pytest.raises(AttachError, match=r"allowed is HOST:PORT .*unix:PATH"):
        parse_address(text)


def test_a_socket_path_that_the_kernel_would_cut_is_refused():
    with pytest.raises(AttachError, match="107 bytes"):
        parse_address("unix:/" + "x" * 107)


def test_tls_names_what_is_wrong():
    assert parse_tls(None) is None
    with pytest.raises(AttachError, match="allowed is a mapping of ca, cert, key"):
        parse_tls({"certificate": "x"})
    with pytest.raises(AttachError, match="needs its key"):
        parse_tls({"cert": "x"})
    with pytest.raises(AttachError, match=r"tls ca: no file at /nowhere/ca\.pem"):
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
