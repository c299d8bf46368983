"""What may be served without credentials."""

from __future__ import annotations

import pytest

from sharpwatch.daemon.api.auth import check_doors
from sharpwatch.daemon.config.settings import DaemonConfig, TlsConfig
from sharpwatch.errors import SharpwatchError


@pytest.mark.parametrize("address", ["127.0.0.1:7741", "127.8.8.8:1", "[::1]:7741", "localhost:0", "unix:/run/s.sock"])
def test_this_machine_is_served(address):
    check_doors(DaemonConfig(grpc=address))


@pytest.mark.parametrize("address", ["0.0.0.0:7741", "[::]:7741", "10.0.0.5:7741", "node17:7741", ":7741"])
def test_anything_else_is_refused_with_what_is_allowed(address):
    with pytest.raises(SharpwatchError, match=r"no credentials are configured, so only loopback .* unix:PATH"):
        check_doors(DaemonConfig(grpc=address))
    tls = TlsConfig("/c.pem", "/k.pem")
    with pytest.raises(SharpwatchError, match=r"no credentials are configured"):
        check_doors(DaemonConfig(grpc=address, tls=tls))
    with pytest.raises(SharpwatchError, match=r"tokens would cross the network unencrypted; .* need daemon.tls"):
        check_doors(DaemonConfig(grpc=address, credentials="/c"))
    check_doors(DaemonConfig(grpc=address, credentials="/c", tls=tls))


def test_a_daemon_of_several_says_where_agents_reach_it():
    safe = {"credentials": "/c", "tls": TlsConfig("/c.pem", "/k.pem"), "shard": "1/2"}
    with pytest.raises(
        SharpwatchError, match=r"advertise: shard 1/2 needs it where grpc is 0\.0\.0\.0:7741: HOST:PORT"
    ):
        check_doors(DaemonConfig(grpc="0.0.0.0:7741", **safe))
    for fine in ({"advertise": "host-1:7741"}, {"grpc": "127.0.0.1:7741"}, {"shard": "0/1"}):
        check_doors(DaemonConfig(**{"grpc": "0.0.0.0:7741", **safe, **fine}))


def test_metrics_for_a_token_are_not_served_over_the_network_in_the_clear():
    asked = {"http": "0.0.0.0:9741", "metrics_auth": "token"}
    with pytest.raises(SharpwatchError, match=r"tokens would cross the network unencrypted; it needs daemon\.tls"):
        check_doors(DaemonConfig(**asked))
    check_doors(DaemonConfig(**asked | {"http": "127.0.0.1:9741"}))
    check_doors(DaemonConfig(**asked, tls=TlsConfig("/c.pem", "/k.pem")))


def test_roles_by_certificate_need_an_authority():
    files, roles = ("/c.pem", "/k.pem"), {"ann": "operator"}
    with pytest.raises(SharpwatchError, match=r"tls\.client_roles: it needs tls\.client_ca"):
        check_doors(DaemonConfig(tls=TlsConfig(*files, client_roles=roles)))
    check_doors(DaemonConfig(tls=TlsConfig(*files, client_ca="/ca.pem", client_roles=roles)))
