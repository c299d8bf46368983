from __future__ import annotations

import random

import pytest

from sharpwatch.agent.transport.courier import FIRST_WAIT_SECONDS, LAST_WAIT_SECONDS
from sharpwatch.common.endpoint import Backoff, parse_address, parse_addresses, without_password

NO_ADDRESS = """
localhost localhost: :7741 localhost:0 localhost:65536 localhost:-1 http://localhost:7741 dns:///a:1 ::1:7741 [::1]
a:1,b:2 unix: host!:7741
"""


@pytest.mark.parametrize("text", [*NO_ADDRESS.split(), "", "a b:1", "localhost:7741\n", "localhost:\u0661", 7741])
def test_what_is_no_address_says_what_is_valid(text):
    with pytest.raises(ValueError, match=r"expected HOST:PORT .*unix:PATH.*, got "):
        parse_address(text)


def test_a_socket_path_that_the_kernel_would_cut_is_refused():
    with pytest.raises(ValueError, match="107 bytes"):
        parse_address("unix:/" + "x" * 107)


def test_port_0_is_only_to_listen_on():
    assert str(parse_address("localhost:0", listen=True)) == "localhost:0"
    with pytest.raises(ValueError, match="from 1 to 65535"):
        parse_address("localhost:0")


def test_a_socket_is_no_http_address():
    with pytest.raises(ValueError, match="expected HOST:PORT, the port"):
        parse_address("unix:/x", sockets=False)


def test_the_path_of_a_socket_survives_a_chdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_address("unix:s").target == f"unix:{tmp_path / 's'}"


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.8.0.1:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("10.0.0.1:1", False),
        ("localhost.example.com:1", False),
        ("[2001:db8::1]:1", False),
    ],
)
def test_loopback(address, loopback):
    assert parse_address(address).is_loopback is loopback


def test_a_list_may_have_spaces():
    assert [each.target for each in parse_addresses("a:1, b:2 ,unix:/run/s.sock")] == ["a:1", "b:2", "unix:/run/s.sock"]
    with pytest.raises(ValueError, match="a different address for each shard"):
        parse_addresses("a:1, a:1")


def test_waits_double_up_to_the_last_and_fall_back():
    backoff = Backoff(FIRST_WAIT_SECONDS, LAST_WAIT_SECONDS, random.Random(0))  # noqa: S311 - a test's own
    full = [min(FIRST_WAIT_SECONDS * 2**i, LAST_WAIT_SECONDS) for i in range(10)]
    waits = [backoff.next() for _ in full]
    assert all(wait / 2 <= got <= wait for wait, got in zip(full, waits, strict=True))
    assert full[-1] == LAST_WAIT_SECONDS < 5
    backoff.reset()
    assert backoff.next() <= FIRST_WAIT_SECONDS


def test_waits_differ_between_couriers():
    firsts = {Backoff(0.2, 4.0, random.Random(seed)).next() for seed in range(20)}  # noqa: S311 - a test's own
    assert len(firsts) > 10


def test_without_jitter_waits_are_whole():
    backoff = Backoff(1.0, 5.0)
    assert [backoff.next() for _ in range(4)] == [1.0, 2.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql+psycopg://ann@host/db", "postgresql+psycopg://ann@host/db"),
        ("postgresql+psycopg://ann:secret@host:5432/db", "postgresql+psycopg://ann:***@host:5432/db"),
        ("postgresql+psycopg://ann:se/cr@et@host/db", "postgresql+psycopg://ann:***@host/db"),
        ("postgresql+psycopg://:secret@host/db", "postgresql+psycopg://:***@host/db"),
        (
            "postgresql+psycopg://host/db?user=ann&password=secret&x=1",
            "postgresql+psycopg://host/db?user=ann&password=***&x=1",
        ),
        ("postgres://ann:secret@host:port", "postgres://ann:***@host:port"),
        ("sqlite:////a/b:c@d.db", "sqlite:////a/b:c@d.db"),
    ],
)
def test_a_url_is_shown_without_its_password(url, shown):
    assert without_password(url) == shown
