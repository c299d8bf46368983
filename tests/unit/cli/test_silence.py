"""The table of `sharpwatch silence list`: golden text."""

from __future__ import annotations

from sharpwatch.cli.commands.silence import silence_table
from sharpwatch.cli.output import plain
from sharpwatch.v1.operator_pb2 import Silence

NOON = 1_764_504_000  # 2025-11-30T12:00:00Z
ACTIVE = Silence(
    id="3f9c01d2ab47",
    run="gpt2-a1",
    cause="data",
    author="ada@node3",
    comment="moving data",
    made_at_unix_ns=NOON * 10**9,
    ends_at_unix_ns=(NOON + 7200) * 10**9,
    active=True,
)
ENDED = Silence(
    id="0a",
    policy="cut",
    author="bob",
    comment="night",
    made_at_unix_ns=(NOON - 86400) * 10**9,
    ends_at_unix_ns=NOON * 10**9,
)
EXPIRED = Silence(
    id="0b",
    alert="LossSpike",
    author="bob",
    comment="night",
    made_at_unix_ns=(NOON - 86400) * 10**9,
    ends_at_unix_ns=NOON * 10**9,
    expired_by="ada@node3",
    expired_reason="day",
    expired_at_unix_ns=(NOON - 3600) * 10**9,
)
SHOWN = """\
id            matches                  added at              until                 state                    author     \
comment
3f9c01d2ab47  run gpt2-a1, cause data  2025-11-30T12:00:00Z  2025-11-30T14:00:00Z  active                   ada@node3  \
moving data
0a            policy cut               2025-11-29T12:00:00Z  2025-11-30T12:00:00Z  ended                    bob        \
night
0b            alert LossSpike          2025-11-29T12:00:00Z  2025-11-30T11:00:00Z  ended by ada@node3: day  bob        \
night"""


def test_silences_with_what_they_match_and_how_they_ended():
    assert plain([silence_table([ACTIVE, ENDED, EXPIRED])]) == SHOWN


def test_no_silence():
    assert plain([silence_table([])]) == "no silence"
