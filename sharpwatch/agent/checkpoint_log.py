"""The checkpoints that a loop reports, what of them the daemon was not told yet, and whether they are still there."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

_REMEMBERED = 256  # checkpoints, the newest; the daemon takes as many in one sample


@dataclass(slots=True)
class CheckpointLog:
    """Takes the loop's reports, and keeps what changed until a sample carries it.

    Where the URI of a checkpoint is the path of a file or folder, the log can look: one that was seen there once and is
    not there any more was deleted, by a library's own rotation or by hand. One that was never seen may still be in
    writing, or be elsewhere than on this machine.

    Attributes:
        new: The checkpoints to tell of, as (step, URI).
        gone: The URIs of those that were deleted, to tell of; none of them is in `new`.
    """

    new: deque[tuple[int, str]] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    gone: deque[str] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    _seen: dict[str, bool] = field(default_factory=dict)  # by URI, whether it was seen there

    def saved(self, step: int, uri: str, *, look: bool) -> None:
        """There is a checkpoint of `step` at `uri`. With `look` those reported before are looked for."""
        self._drop(uri)
        self.new.append((step, uri))
        self._seen[uri] = False
        if len(self._seen) > _REMEMBERED:
            del self._seen[next(iter(self._seen))]
        if look:
            self._look()

    def deleted(self, uri: str) -> None:
        """There is no checkpoint at `uri` any more."""
        self._drop(uri)
        self.gone.append(uri)

    def restored(self, step: int) -> None:
        """The run was put back to `step`: checkpoints of later steps, not told of yet, are of one it left."""
        for uri in [uri for saved_at, uri in self.new if saved_at > step]:
            self.deleted(uri)  # and not only untold: what was at its URI before was overwritten

    def is_gone(self, uri: str) -> bool:
        """Whether the checkpoint at `uri` was deleted, also one that an earlier attempt has reported."""
        if _exists(uri):
            return False
        # Of an earlier attempt only that much is known: its folder is here, and it is not in it.
        folder = _path(uri).parent
        earlier = folder.is_absolute() and folder != Path(folder.anchor) and folder.is_dir()
        return self._seen.get(uri, earlier)

    def take(self) -> tuple[tuple[tuple[int, str], ...], tuple[str, ...]]:
        """Remove and return `new` and `gone`."""
        taken = tuple(self.new), tuple(self.gone)
        self.new.clear()
        self.gone.clear()
        return taken

    def _look(self) -> None:
        for uri, seen in list(self._seen.items()):
            there = _exists(uri)
            if seen and not there:
                self.deleted(uri)
            else:
                self._seen[uri] = there

    def _drop(self, uri: str) -> None:
        """Forget what is known of `uri`, where something newer is known."""
        self._seen.pop(uri, None)
        for news in [one for one in self.new if one[1] == uri]:
            self.new.remove(news)
        if uri in self.gone:
            self.gone.remove(uri)


def _path(uri: str) -> Path:
    return Path(uri.removeprefix("file://"))


def _exists(uri: str) -> bool:
    """Whether there is something at `uri`, or it can't be looked for."""
    try:
        return _path(uri).exists()
    except (OSError, ValueError):  # permissions; a text that is no path
        return True
