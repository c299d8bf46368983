"""The journal on a thread of its own, so that a slow disk never holds up the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from sharpwatch.daemon.storage.journal import Batch, Journal, StoredRun

Result = TypeVar("Result")


class Store:
    """An open journal. Every method raises `StoreError` with path and cause."""

    def __init__(self, journal: Journal, thread: ThreadPoolExecutor) -> None:
        self._journal = journal
        self._thread = thread

    @classmethod
    async def open(cls, url: str, *, retain_samples: int) -> Store:
        """Open or create the journal that `url` names and take it for this process alone."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        opening = partial(Journal, url, retain_samples=retain_samples)
        try:
            journal = await asyncio.get_running_loop().run_in_executor(thread, opening)
        except BaseException:
            thread.shutdown()
            raise
        return cls(journal, thread)

    @property
    def path(self) -> Path:
        """The journal's file."""
        return self._journal.path

    async def write(self, batch: Batch) -> None:
        """Journal `batch` in one transaction; returns once it would survive power loss."""
        await self._call(partial(self._journal.write, batch))

    async def runs(self) -> tuple[str, ...]:
        """The names of all runs, the one that began its newest attempt last at the end."""
        return await self._call(self._journal.runs)

    async def load(self, run: str, *, samples: int) -> StoredRun:
        """All records of a run, and its newest `samples` samples."""
        return await self._call(partial(self._journal.load, run, samples=samples))

    async def close(self) -> None:
        """Finish what is under way and close."""
        await self._call(self._journal.close)
        self._thread.shutdown()

    async def _call(self, function: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)
