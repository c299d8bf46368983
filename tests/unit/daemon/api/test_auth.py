"""What may be served without credentials."""

from __future__ import annotations

import pytest

from sharpwatch.daemon.api.auth import check_grpc_address
from sharpwatch.errors import SharpwatchError


@pytest.mark.parametrize("address", ["127.0.0.1:7741", "127.8.8.8:1", "[::1]:7741", "localhost:0", "unix:/run/s.sock"])
def test_this_machine_is_served(address):
    check_grpc_address(address)


@pytest.mark.parametrize("address", ["0.0.0.0:7741", "[::]:7741", "10.0.0.5:7741", "node17:7741", ":7741"])
def test_anything_else_is_refused_with_what_is_allowed(address):
    with pytest.raises(SharpwatchError, match=r"no credentials are configured, so only loopback .* unix:PATH"):
        check_grpc_address(address)
