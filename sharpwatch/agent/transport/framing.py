"""Frames on the pipe, both ways: a 4-byte little-endian length, then that many bytes."""

from __future__ import annotations

from sharpwatch.errors import WireError

_HEADER = 4


def frame(payload: bytes) -> bytes:
    """One frame."""
    return len(payload).to_bytes(_HEADER, "little") + payload


class Unframer:
    """Cuts a stream of bytes back into payloads."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads that `data` completes.

        Raises `WireError("oversized")` at a length above the limit: the stream is none of ours, or lost its place.
        """
        self._buffer += data
        payloads = []
        start = 0
        while len(self._buffer) - start >= _HEADER:
            length = int.from_bytes(self._buffer[start : start + _HEADER], "little")
            if length > self._limit:
                raise WireError("oversized", f"a frame of {length} bytes, at most {self._limit}")
            end = start + _HEADER + length
            if len(self._buffer) < end:
                break
            payloads.append(bytes(self._buffer[start + _HEADER : end]))
            start = end
        del self._buffer[:start]
        return payloads
