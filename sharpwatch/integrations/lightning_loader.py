"""A training loader of Lightning's whose position is saved in Lightning's checkpoints."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sharpwatch.checkpointing.resumable_loader import Range, ResumableLoader

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class LightningLoader(ResumableLoader):
    """A training loader whose position Lightning saves in its checkpoints. All else is passed on to the loader."""

    def __init__(self, loader: Any, trainer: Trainer, left_out: Sequence[Range]) -> None:
        super().__init__(loader)
        self._left_out_by_rollbacks = left_out
        self._trainer = trainer
        self._prefetched: deque[dict[str, Any]] = deque()  # the positions after batches that were not started yet
        self._started: dict[str, Any] = {}  # the position after the newest batch that was started

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    @property
    def worker_init_fn(self) -> Any:
        """The loader's own; Lightning sets it."""
        return self.loader.worker_init_fn

    @worker_init_fn.setter
    def worker_init_fn(self, value: Any) -> None:
        self.loader.worker_init_fn = value

    @property
    def _iterator(self) -> Any:
        """The loader's own; Lightning shuts down its workers."""
        return self.loader._iterator  # noqa: SLF001 - Lightning reads it

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        self.loader._iterator = value  # noqa: SLF001 - as above

    def length(self) -> int | None:
        """The length of an epoch in Lightning, which may be limited, and repeats the shorter of several loaders."""
        count, own = self._trainer.num_training_batches, super().length()
        return own if math.isinf(count) else int(count) if own is None else min(int(count), own)

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the epoch; if the loader has no length, keep the position of each prefetched batch."""
        self._prefetched.clear()
        batches = super().__iter__()
        if self.length() is not None:
            return batches
        self._started = self.position()
        return self._prefetch(batches)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the position of `state`, and leave out what rollbacks have left out since it was saved."""
        super().load_state_dict(state)
        self.leave_out(*self._left_out_by_rollbacks)

    def batch_started(self) -> None:
        """Training has started on the next batch."""
        if self._prefetched:
            self._started = self._prefetched.popleft()

    def position(self) -> dict[str, Any]:
        """The position of training, which is before that of prefetching."""
        return self._started if self._prefetched else super().position()

    def mark(self, step: int, taken: int | None = None) -> None:
        """Note that optimizer step `step` is done, with all batches started so far."""
        super().mark(step, self.position()["taken"] if taken is None else taken)

    def _prefetch(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self._prefetched.append(super().position())
            yield batch
