"""Whether the write-ahead log beside an SQLite file is whole.

SQLite reads it up to the first frame whose checksum is wrong and silently drops the rest, since a crash leaves such a
frame at the end. A frame that is damaged in the middle therefore loses every commit after it.

The format: https://www.sqlite.org/fileformat2.html#the_write_ahead_log
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_HEADER, _FRAME_HEADER = 32, 24
_MAGIC, _VERSION = 0x377F0682, 3_007_000  # the magic is odd where checksums are of big-endian words
_AT_ONCE = 1_000  # frames
Words = NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class WalState:
    """What SQLite would read from a log, and what is wrong with it.

    Attributes:
        pages: Numbers of the pages in its commits.
        size: Pages of the database after the last commit; 0 without one.
        damage: What is wrong; empty for nothing.
    """

    pages: frozenset[int] = frozenset()
    size: int = 0
    damage: str = ""


def read_wal(path: Path, page_size: int) -> WalState:
    """Read a log.

    Args:
        path: The log; it need not exist.
        page_size: The database's, in bytes.

    Raises:
        OSError: It can't be read.
    """
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER)
    except FileNotFoundError:
        return WalState()
    frame = np.dtype([("page", ">u4"), ("size", ">u4"), ("salt", "V8"), ("sum", ">u4", 2), ("data", "V1", page_size)])
    count = (path.stat().st_size - _HEADER) // frame.itemsize
    if count < 1:
        return WalState()
    # SQLite has the header on the disk before it writes the first frame, so that a crash is no excuse.
    if not _is_header(header, page_size):
        return WalState(damage="its header is damaged, or it belongs to another database")
    return _read(header, np.memmap(path, frame, "r", _HEADER, (count,)))


def _is_header(header: bytes, page_size: int) -> bool:
    magic, version, size = struct.unpack(">3I", header[:12])
    if magic & ~1 != _MAGIC or version != _VERSION or size != page_size:
        return False
    sums = _sums(np.frombuffer(header[:24], _order(header))[None])[0]
    return bool((sums == np.frombuffer(header, ">u4")[6:]).all())


def _order(header: bytes) -> str:
    return ">u4" if header[3] & 1 else "<u4"


def _read(header: bytes, frames: NDArray[np.void]) -> WalState:
    # A log is written from its start again once all of it is in the database. Older frames then follow, of other salts.
    ours = frames["salt"] == np.frombuffer(header, "V8")[2]
    last = int(np.flatnonzero(ours)[-1]) + 1 if ours.any() else 0
    frames, ours = frames[:last], ours[:last]
    whole = ours & _whole(frames, np.frombuffer(header, ">u4")[6:], _order(header))
    read = len(frames) if whole.all() else int(np.argmin(whole))
    commits = np.flatnonzero((frames["size"] != 0) & ours)
    # A crash may cut off one transaction, whose frames reach the disk in any order. No commit comes after its own.
    if (commits >= read).sum() > 1:
        return WalState(damage=f"frame {read + 1} of {len(frames)} is damaged")
    done = commits[commits < read]
    if not len(done):
        return WalState()
    newest = int(done[-1])
    return WalState(frozenset(frames["page"][: newest + 1].tolist()), int(frames["size"][newest]))


def _whole(frames: NDArray[np.void], first: NDArray[np.uint32], order: str) -> NDArray[np.bool_]:
    """Whether each frame has the checksum that follows from its content and the frame before."""
    sums = frames["sum"].astype(np.uint32)
    before = np.concatenate([first[None].astype(np.uint32), sums[:-1]])
    whole = np.empty(len(frames), bool)
    for start in range(0, len(frames), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        raw = np.frombuffer(frames[part].tobytes(), np.uint8).reshape(-1, frames.dtype.itemsize)
        content = np.concatenate([raw[:, :8], raw[:, _FRAME_HEADER:]], 1)
        whole[part] = (_sums(content.view(order), before[part]) == sums[part]).all(1)
    return whole


def _sums(words: NDArray[np.uint32], before: Words | None = None) -> Words:
    """SQLite's checksums, modulo 2**32, of rows of an even number of 32-bit words.

    It takes pairs (x, y) of words in turn: a += x + b, then b += y + a. That is linear, so that the sums of a row are a
    product with weights; those are Fibonacci numbers.
    """
    pairs = words.shape[1] // 2
    powers = _powers(pairs)
    x, y = words[:, ::2].astype(np.uint32), words[:, 1::2].astype(np.uint32)
    weights = powers[pairs - 1 :: -1] if pairs else powers[:0]
    a, b, d = weights[:, 0], weights[:, 1], weights[:, 2]
    sums = np.stack([(x * (a + b) + y * b).sum(1, dtype=np.uint32), (x * (b + d) + y * d).sum(1, dtype=np.uint32)], 1)
    if before is not None:
        a, b, d = powers[pairs]
        sums += np.stack([before[:, 0] * a + before[:, 1] * b, before[:, 0] * b + before[:, 1] * d], 1)
    return sums


@cache
def _powers(last: int) -> Words:
    """The powers 0 to `last` of the symmetric matrix [[1, 1], [1, 2]] as rows (a, b, d), modulo 2**32."""
    rows = [(1, 0, 1)]
    for _ in range(last):
        a, b, d = rows[-1]
        rows.append(((a + b) % 2**32, (b + d) % 2**32, (b + 2 * d) % 2**32))
    return np.array(rows, np.uint32)
