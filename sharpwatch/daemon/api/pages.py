"""Long answers come page by page: a client takes 4 MB at most, unless it is told otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

PAGE_BYTES = 3 * 2**20
_TOKEN = re.compile(r"([0-9]{1,18})(?:@([0-9]{1,18}\.[0-9]{1,9}))?")
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Page:
    """Where a page begins.

    Attributes:
        start: How many items the pages before it have.
        until: Unix seconds of the newest item when the first page was made; what came later would move the others. None
            on the first page, and where items come at the end.
    """

    start: int = 0
    until: float | None = None

    @classmethod
    def of(cls, token: str) -> Page:
        """The page of a token; the first one of an empty token.

        Raises:
            ValueError: It is no token.
        """
        found = _TOKEN.fullmatch(token or "0")
        if found is None:
            raise ValueError(f"page_token must be of a page, got {token[:40]!r}")
        start, until = found.groups()
        return cls(int(start), None if until is None else float(until))

    def before(self, items: Iterable[Item], at: Callable[[Item], float]) -> list[Item]:
        """The items that were there when the first page was made; `at` tells when one came, in unix seconds."""
        return [item for item in items if self.until is None or at(item) <= self.until]

    def token(self, taken: int, total: int, until: float | None = None) -> str:
        """The token of the next page; empty for none.

        Args:
            taken: How many items this one has.
            total: How many all pages have.
            until: Of the first page: when the newest item came.
        """
        start = self.start + taken
        if start >= total:
            return ""
        until = until if self.until is None else self.until
        return str(start) if until is None else f"{start}@{until:.9f}"


def fitting(items: Iterable[Item], size: Callable[[Item], int], limit: int = PAGE_BYTES) -> list[Item]:
    """The first items that take at most `limit` bytes together; the first one in any case, or no page would follow."""
    found: list[Item] = []
    taken = 0
    for item in items:
        taken += size(item)
        if found and taken > limit:
            break
        found.append(item)
    return found
