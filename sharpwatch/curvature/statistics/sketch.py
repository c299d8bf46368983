"""CountSketch: a short linear projection of gradients and Hessian-vector products, one for each block.

Charikar, Chen and Farach-Colton, "Finding frequent items in data streams" (2002), with a faster bucket hash. Sketches
are linear, so the sketches of shards add up to the sketch of the whole.

Lay all parameters end to end, each starting at a multiple of `size`. Entry i is in row c = i // size and column l = i %
size. Its sign s(i) is one bit of a hash of i // 64. Its bucket is (l + r(c)) % size, where the rotation r(c) is a hash
of the row. Both hashes are splitmix64 under keys derived from the seed, used in place of a random function.

The inner product is unbiased: <Sx, Sy> = <x, y> + the sum over i != j in one bucket of s(i) s(j) x_i y_j, and E s(i)
s(j) = 0 for any buckets. Two entries of one row never share a bucket. Entries of rows c != c' do if r(c) - r(c') takes
one value, which has probability 1/size. Since the signs are independent,

    Var <Sx, Sy> = (|x|^2 |y|^2 + <x, y>^2 - the same summed over single rows) / size.

This is never more than the variance of a CountSketch with fully random buckets, for any x and y, even if all rows are
equal.

A rotation moves a row as a whole. So rows with the same rotation are summed, `size` floats at a time, and rotated once
at the end. Hashing and adding single entries takes about seven times as long.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpwatch.blocks import BlockMap, Part
from sharpwatch.errors import BlockError

_HASH_BITS = 64  # one hash gives the signs of 64 entries
_SIGN_BIT = -(2**31)


class CountSketch:
    """Sketches tensors of the parameters' shapes to `size` float32 numbers for each block of `block_map`.

    The same seed, size and block map give the same projection on every rank and device.

    Args:
        block_map: The division of the parameters into blocks.
        size: Numbers for each block, a positive multiple of 64.
        seed: Seed of the hashes.

    Raises:
        ValueError: `size` is not a positive multiple of 64.
    """

    def __init__(self, block_map: BlockMap, size: int = 256, seed: int = 0) -> None:
        if size < _HASH_BITS or size % _HASH_BITS:
            raise ValueError(f"size must be a positive multiple of {_HASH_BITS}, got {size}")
        self.block_map = block_map
        self.size = size
        self.seed = seed
        self._hashes = _Hashes(
            size,
            sign_key=_splitmix64_int(_splitmix64_int(seed) + 1),
            rotation_key=_splitmix64_int(_splitmix64_int(seed) + 2),
        )
        # Rows are counted through all parameters, so no two of them share their signs.
        self._first_row = {}
        row = 0
        for name, shape in block_map.shapes.items():
            self._first_row[name] = row
            row += -(-math.prod(shape) // size)
        # A part takes at most the rows of its parameter, so a small model gets a small buffer.
        self._staged_rows = sum(math.prod(block_map.shapes[part.parameter]) // size + 2 for part in block_map.parts)

    @torch.no_grad()
    def sketch(self, gradients: Mapping[str, Tensor], offsets: Mapping[str, int] | None = None) -> Tensor:
        """Sketch one gradient.

        Args:
            gradients: Tensors by parameter name, all on one device; a missing parameter counts as zero.
            offsets: For shards: the flat index of the parameter's entry at which the tensor starts. A shard is a
                contiguous run of flat entries, in a tensor of any shape.

        Returns:
            Float32 [B, size] on the device of `gradients`, in the order of `block_map.blocks`, computed asynchronously.

        Raises:
            BlockError: A name is unknown, or a tensor does not fit its parameter.
        """
        ranges = {name: self._range(name, values, offsets or {}) for name, values in gradients.items()}
        device = next(iter(gradients.values())).device if gradients else torch.device("cpu")
        stage = _StagingBuffer(self._hashes, self._staged_rows, len(self.block_map.blocks), device)
        for part, block in zip(self.block_map.parts, self.block_map.block_of, strict=True):
            if part.parameter not in gradients:
                continue
            low, high = ranges[part.parameter]
            values = gradients[part.parameter].reshape(-1)
            for piece in _index_ranges(part, self.block_map.shapes[part.parameter], low, high, stage.limit):
                stage.put(piece, values, low, self._first_row[part.parameter], block)
        return stage.result()

    def _range(self, name: str, values: Tensor, offsets: Mapping[str, int]) -> tuple[int, int]:
        if name not in self.block_map.shapes:
            raise BlockError(f"{name} is not a parameter of the block map")
        whole = math.prod(self.block_map.shapes[name])
        low = offsets.get(name, 0)
        if low < 0 or low + values.numel() > whole or (name not in offsets and values.numel() != whole):
            raise BlockError(f"{name} has {whole} entries, got {values.numel()} from entry {low} on")
        return low, low + values.numel()


@dataclass(frozen=True, slots=True)
class _Hashes:
    """The hash functions: signs of entries and rotations of rows, by row number."""

    size: int
    sign_key: int
    rotation_key: int

    def signs(self, rows: Tensor) -> Tensor:
        """Sign bits of the entries of `rows`, int32 [R * size]."""
        words = rows[:, None] * (self.size // _HASH_BITS) + torch.arange(self.size // _HASH_BITS, device=rows.device)
        halves = _splitmix64(words + self.sign_key).view(torch.int32).view(-1, 1)
        return (halves << torch.arange(32, dtype=torch.int32, device=rows.device)).bitwise_and_(_SIGN_BIT).view(-1)

    def rotations(self, rows: Tensor) -> Tensor:
        """Rotations in [0, size), int64 [R]; taken from 31 bits, so they are uniform up to size / 2^31."""
        return ((_splitmix64(rows + self.rotation_key) >> 33) & 0x7FFFFFFF) % self.size


@dataclass(frozen=True, slots=True)
class _IndexRange:
    """Entries start + t * stride + u of a parameter, for t < count and u < width."""

    start: int
    count: int
    stride: int
    width: int

    @property
    def span(self) -> int:
        return (self.count - 1) * self.stride + self.width

    def view(self, flat: Tensor, at: int) -> Tensor:
        """View of these entries in `flat`, whose index `at` is the first one; [count, width]."""
        return flat.as_strided((self.count, self.width), (self.stride, 1), flat.storage_offset() + at)


class _StagingBuffer:
    """A bounded buffer of rows to be hashed and summed: many small parameters share one round of hashing."""

    def __init__(self, hashed: _Hashes, rows: int, blocks: int, device: torch.device) -> None:
        # CPU: the fastest of 512 to 8192 rows (2 MiB, about an L2 cache). GPU: large enough to hide kernel launches.
        capacity = max(2, min(rows, 2048 if device.type == "cpu" else 16384))
        self.limit = (capacity - 1) * hashed.size
        self._hashes = hashed
        self._values = torch.zeros(capacity * hashed.size, dtype=torch.float32, device=device)
        self._rows = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._blocks = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._sums = torch.zeros(blocks * hashed.size, hashed.size, dtype=torch.float32, device=device)
        self._used = 0

    def put(self, piece: _IndexRange, source: Tensor, low: int, first_row: int, block: int) -> None:
        """Copy the entries `piece` from `source`, whose first entry is entry `low` of the parameter."""
        size = self._hashes.size
        column = piece.start % size
        count = -(-(column + piece.span) // size)
        if self._used + count > len(self._rows):
            self._flush()
        taken = slice(self._used, self._used + count)
        piece.view(self._values, self._used * size + column).copy_(piece.view(source, piece.start - low))
        row = first_row + piece.start // size
        torch.arange(row, row + count, out=self._rows[taken], device=self._rows.device)
        self._blocks[taken].fill_(block * size)
        self._used += count

    def result(self) -> Tensor:
        """The sums by rotation, each rotated back and added up; float32 [B, size]."""
        self._flush()
        size = self._hashes.size
        # Rotation by a view: laid twice end to end, a row holds all of its own rotations.
        twice = torch.cat([self._sums, self._sums], -1)
        # rotated[b, r, j] is column (j - r) % size of the sum of the rows with rotation r.
        rotated = twice.as_strided((len(twice) // size, size, size), (2 * size * size, 2 * size - 1, 1), size)
        return rotated.sum(1)

    def _flush(self) -> None:
        values = self._values[: self._used * self._hashes.size]
        rows = self._rows[: self._used]
        # A sign is the top bit of a float: xor sets it without a product, and without a tensor of ±1.
        values.view(torch.int32).bitwise_xor_(self._hashes.signs(rows))
        into = self._hashes.rotations(rows) + self._blocks[: self._used]
        self._sums.index_add_(0, into, values.view(-1, self._hashes.size))
        values.zero_()
        self._used = 0


def _index_ranges(part: Part, shape: tuple[int, ...], low: int, high: int, limit: int) -> Iterator[_IndexRange]:
    """Split the entries of `part` within [low, high) of its parameter into ranges that span at most `limit` entries.

    A part along dimension `dim` is the run [first, last) of each period. A period is `shape[dim:]` entries, divided by
    the number of repeats within them.
    """
    if low == high:
        return
    if part.dim is None:
        period, first, last = math.prod(shape), 0, math.prod(shape)
    else:
        inner = math.prod(shape[part.dim + 1 :])
        period, first, last = shape[part.dim] // part.repeats * inner, part.start * inner, part.stop * inner
    turn = low // period
    while turn * period + first < high:
        begin, end = max(low, turn * period + first), min(high, turn * period + last)
        if end - begin == last - first <= limit:
            whole = (high - last) // period + 1 - turn  # number of periods from here whose run ends before `high`
            count = min(whole, max(1, limit // period))
            yield _IndexRange(begin, count, period, last - first)
            turn += count
        else:
            yield from (_IndexRange(at, 1, limit, min(limit, end - at)) for at in range(begin, end, limit))
            turn += 1


def _to_int64(value: int) -> int:
    """The int64 with the same 64 bits as `value`."""
    return (value + 2**63) % 2**64 - 2**63


def _splitmix64_int(value: int) -> int:
    """The output function of splitmix64 on a Python integer, as an int64."""
    z = (value + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return _to_int64(z ^ (z >> 31))


def _splitmix64(values: Tensor) -> Tensor:
    """The same for int64 tensors. They wrap around; their right shift extends the sign, hence the masks."""
    z = values * _to_int64(0x9E3779B97F4A7C15)
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _to_int64(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _to_int64(0x94D049BB133111EB)
    return z ^ ((z >> 31) & (2**33 - 1))
