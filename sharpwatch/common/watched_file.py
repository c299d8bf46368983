"""A file that is read again whenever it has changed on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from sharpwatch.errors import SharpwatchError

Content = TypeVar("Content")
_Stamp = tuple[int, ...]


class WatchedFile(Generic[Content]):
    """The content of a file, as it is on disk now.

    Its status is asked at each use, which takes some microseconds: contents, mode and owner count, and a file that was
    replaced by another one.

    Args:
        path: The file.
        read: Reads and checks it; raises a `SharpwatchError` where it can't be used.
        on_change: Told each time that it has changed: the error, or None where it can be used. Told of the first time
            only if it can't.
    """

    def __init__(
        self,
        path: Path,
        read: Callable[[Path], Content],
        on_change: Callable[[SharpwatchError | None], None] = lambda _: None,
    ) -> None:
        self._path = path
        self._read = read
        self._on_change = on_change
        self._stamp: _Stamp | None = None
        self._found: Content | SharpwatchError = SharpwatchError(f"{path} was not read yet")

    def current(self) -> Content:
        """The content now.

        Raises:
            SharpwatchError: The file can't be used as it is now.
        """
        stamp = self._status()
        if stamp != self._stamp:
            is_first, self._stamp = self._stamp is None, stamp
            try:
                self._found = self._read(self._path)
            except SharpwatchError as error:
                self._found = error
            except OSError as error:  # it has changed again in between
                self._found = SharpwatchError(f"{self._path}: {error.strerror}")
            wrong = self._found if isinstance(self._found, SharpwatchError) else None
            if wrong is not None or not is_first:
                self._on_change(wrong)
        if isinstance(self._found, SharpwatchError):
            raise self._found
        return self._found

    def _status(self) -> _Stamp:
        try:
            found = self._path.stat()
        except OSError:
            return ()
        return found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size, found.st_mode, found.st_uid
