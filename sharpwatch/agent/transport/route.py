"""Which of several daemons the courier connects to: that of its run's shard, or whoever holds that shard meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

from sharpwatch.common.shards import holder_in, shard_order


class Route:
    """The daemons that a courier tries, one at a time. With one daemon it is always that one.

    Args:
        targets: Their addresses, in the order of their shards.
    """

    def __init__(self, targets: Sequence[str]) -> None:
        self._targets = targets
        self._order = list(targets)
        self._place = 0
        self._holder = ""  # that was named last
        self.target = targets[0]

    def of_run(self, run: str) -> None:
        """Begins with the daemon of the run's shard."""
        self._order = [self._targets[shard] for shard in shard_order(run, len(self._targets))]
        self.restart()

    def restart(self) -> None:
        """Returns to the daemon of the run's shard, after a session with any."""
        self._place, self._holder = 0, ""
        self.target = self._order[0]

    def unlisted(self, reason: str) -> str:
        """Says that the daemon named in `reason` is none of those that were given; empty where it is, or none is."""
        holder = holder_in(reason)
        return "" if holder in {"", *self._targets} else f", which is not in address={','.join(self._targets)}"

    def turned_away(self, reason: str) -> bool:
        """Goes on to another daemon: the one named in `reason`, or the next one.

        Args:
            reason: Why there was no session. An address in it that is not among the daemons is not gone to: the token
                would go with it.

        Returns:
            Whether another daemon than before was named, so that it can be tried soon.
        """
        before, holder = self._holder, holder_in(reason)
        if holder in self._order:
            self._holder = self.target = holder
            return holder != before
        self._place = (self._place + 1) % len(self._order)
        self.target = self._order[self._place]
        return False
