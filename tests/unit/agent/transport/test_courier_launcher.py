from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharpwatch.agent.transport.courier_launcher import Unframer, frame
from sharpwatch.errors import WireError


def test_a_frame_is_its_length_in_little_endian_and_its_bytes():
    assert frame(b"abc") == b"\x03\x00\x00\x00abc"
    assert frame(b"x" * 258)[:4] == b"\x02\x01\x00\x00"


@given(st.lists(st.binary(max_size=50)), st.integers(1, 20))
def test_payloads_come_back_however_the_stream_is_cut(payloads, cut):
    stream = b"".join(map(frame, payloads))
    unframer = Unframer(limit=50)
    got = [payload for i in range(0, len(stream), cut) for payload in unframer.feed(stream[i : i + cut])]
    assert got == payloads


def test_a_length_above_the_limit_is_no_frame():
    unframer = Unframer(limit=10)
    assert unframer.feed(frame(b"x" * 10)) == [b"x" * 10]
    with pytest.raises(WireError, match="at most 10 bytes, got 11"):
        unframer.feed(frame(b"x" * 11))
