from __future__ import annotations

import pytest

from sharpwatch import wire
from sharpwatch.agent.transport import response_limits
from sharpwatch.agent.transport.response_limits import too_long, within_limits
from sharpwatch.v1 import agent_pb2, types_pb2


def passed_on(command):
    """What the trainer gets of `command`."""
    message = types_pb2.Command(**command)
    payload = within_limits(agent_pb2.SessionResponse(command=message).SerializeToString(), message)
    return agent_pb2.SessionResponse.FromString(payload).command


@pytest.mark.parametrize(
    ("command", "shown", "reason"),
    [
        ({"id": "x" * 60_000}, "x" * 252 + "…", "id must have 1 to 253 printable characters, got 60000"),
        ({"id": ""}, "unnamed", "id must have 1 to 253 printable characters, got 0"),
        ({"id": "two\nlines"}, "'two\\nlines'", "id must have 1 to 253 printable characters, got 9"),
        ({"id": "c", "cancel": "x" * 254}, "c", "cancel must have 1 to 253 printable characters, got 254"),
        ({"id": "c", "author": "x" * 4_097}, "c", "author must have at most 4096 characters, got 4097"),
        ({"id": "c", "reason": "x" * 4_097}, "c", "reason must have at most 4096 characters, got 4097"),
        (
            {"id": "c", "rollback": {"checkpoint": {"step": 1, "uri": "x" * 4_097}}},
            "c",
            "rollback.checkpoint.uri must have at most 4096 characters, got 4097",
        ),
        (
            {"id": "c", "set_multipliers": {"multipliers": {"x" * 254: 0.5}}},
            "c",
            "a block must have at most 253 characters, got 254",
        ),
        (
            {"id": "c", "set_multipliers": {"update_every": {f"b{number}": 2 for number in range(257)}}},
            "c",
            "a set must name at most 256 blocks, got 257",
        ),
        (
            {"id": "c", "set_multipliers": {"multipliers": {f"{number:0200}": 0.5 for number in range(1_000)}}},
            "c",
            "a command must have at most 65536 bytes, got 215011",
        ),
        ({"id": "c", "refusal": "forged\nline"}, "c", "refusal must be empty"),
    ],
)
def test_a_command_beyond_the_limits_is_its_id_and_why_it_is_refused(command, shown, reason):
    refused = passed_on(command)
    assert refused == types_pb2.Command(id=shown, refusal=refused.refusal)
    assert refused.refusal.startswith(reason)
    wire.checked_name(refused.id, "result.command_id")  # the daemon takes its result


@pytest.mark.parametrize(
    "command",
    [
        {"id": "c", "cancel": "d" * 253},
        {"id": "c" * 253, "author": "é" * 4_096, "reason": "x\n" * 2_048},
        {"id": "c", "rollback": {"checkpoint": {"step": 1, "uri": "x" * 4_096}}},
        {"id": "c", "set_multipliers": {"multipliers": {f"{number:0200}": 0.5 for number in range(256)}}},
    ],
)
def test_a_command_at_the_limits_is_passed_on_as_it_came(command):
    assert passed_on(command) == types_pb2.Command(**command)


def test_the_limits_are_those_of_the_daemon():
    assert wire.MAX_NAME == response_limits._MAX_NAME
    assert wire.MAX_TEXT == response_limits._MAX_TEXT
    assert wire.MAX_ITEMS == response_limits._MAX_ITEMS


def test_a_response_that_is_too_long_is_a_refused_command():
    (refused,) = [agent_pb2.SessionResponse.FromString(too_long(2_000_000)).command]
    assert refused.id == "unnamed"
    assert refused.refusal == "a response must have at most 1048576 bytes, got 2000000"
