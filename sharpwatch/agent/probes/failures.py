"""Why probes gave no estimate: counted, kept for the status and the daemon, and logged once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from sharpwatch.agent.safety import warn

IN_A_ROW = 3  # after which a failing probe is given up; the rows of a single draw may all be without labels


@dataclass(frozen=True, slots=True)
class ProbeFailure:
    """Why a probe failed last, how often it has failed, and whether it was given up."""

    probe: str
    reason: str
    count: int
    disabled: bool


class ProbeFailures:
    """The failures of a run's probes.

    Attributes:
        failures: One for each probe that ever failed.
        disabled: The probes that were given up.
    """

    def __init__(self) -> None:
        self.failures: tuple[ProbeFailure, ...] = ()
        self.disabled: tuple[str, ...] = ()
        self._newest: dict[str, ProbeFailure] = {}
        self._in_a_row: Counter[str] = Counter()
        self._warned: set[str] = set()

    def repeats(self, probe: str) -> bool:
        """Whether one more failure of `probe` is enough to give it up."""
        return self._in_a_row[probe] + 1 >= IN_A_ROW

    def succeeded(self, probe: str, reason: str) -> None:
        """The probe ran; a `reason` says why it gave no estimate all the same."""
        if reason:
            self.failed(probe, reason, gives_up=False)
        else:
            self._in_a_row[probe] = 0

    def failed(self, probe: str, reason: str, *, gives_up: bool) -> None:
        """The probe gave no estimate; it is logged where the probe is given up, or goes on without any."""
        self._in_a_row[probe] += 1
        known = self._newest.get(probe)
        failure = self._newest[probe] = ProbeFailure(probe, reason, known.count + 1 if known else 1, gives_up)
        if gives_up:
            warn("probe %s is given up after %d failures: %s", probe, failure.count, reason)
        elif self._in_a_row[probe] >= IN_A_ROW and probe not in self._warned:
            warn("probe %s gives no estimate, %d times in a row: %s", probe, self._in_a_row[probe], reason)
            self._warned.add(probe)
        self.failures = tuple(self._newest.values())
        self.disabled = tuple(each.probe for each in self.failures if each.disabled)
