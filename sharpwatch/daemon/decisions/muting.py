"""What keeps policies from acting, whatever their other guards say: silences, inhibition and alerts of others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime

from sharpwatch.daemon.decisions.guards import OK, guard_name
from sharpwatch.daemon.records import Decision, Incident, Silence
from sharpwatch.errors import OperatorError

_SILENCE, _INHIBITED, _BLOCKED = "silence", "inhibited", "blocked_by"  # the guards' names
_SAME_TROUBLE = 20  # steps between the onsets of wrong data and of the instability that they bring
ActiveSilences = Callable[[float], Iterable[Silence]]  # those at a time in unix seconds


class Silences:
    """The silences of all runs. They are few: an operator adds each by hand."""

    def __init__(self) -> None:
        self._all: dict[str, Silence] = {}
        self._active: dict[str, Silence] = {}  # those that had not ended when they were last asked for

    def __iter__(self) -> Iterator[Silence]:
        """All of them, oldest first."""
        return iter(tuple(self._all.values()))

    def restore(self, silences: Iterable[Silence]) -> None:
        """Take up the journalled silences."""
        self._all = {silence.id: silence for silence in silences}
        self._active = dict(self._all)

    def follow(self, silences: Iterable[Silence]) -> None:
        """Take up what other daemons have journalled; what this one has not journalled yet stays."""
        for silence in silences:
            known = self._all.get(silence.id)
            if known is None or (silence.expired_at and not known.expired_at):
                self.add(silence)

    def trial(self) -> Silences:
        """Returns silences like these, on which a request can be tried."""
        like = Silences()
        like.restore(self)
        return like

    def active(self, now: float) -> tuple[Silence, ...]:
        """Returns those that hold at `now`, in unix seconds, oldest first."""
        self._active = {key: silence for key, silence in self._active.items() if silence.is_active(now)}
        return tuple(self._active.values())

    def add(self, silence: Silence) -> Silence:
        """Have a silence hold from now on."""
        self._all[silence.id] = self._active[silence.id] = silence
        return silence

    def expire(self, identity: str, author: str, reason: str, now: float) -> Silence:
        """End a silence before its time.

        Args:
            identity: Its id.
            author: Who ends it.
            reason: Why.
            now: Unix seconds.

        Returns:
            The silence as it is now.

        Raises:
            OperatorError: It has ended already.
        """
        silence = self._all[identity]
        if not silence.is_active(now):
            raise OperatorError(
                f"silence {identity} has ended already, at {_time(silence.expired_at or silence.ends_at)}"
            )
        expired = replace(silence, expired_at=now, expired_by=author, expired_reason=reason)
        self._all[identity] = self._active[identity] = expired
        return expired


def no_silences(now: float) -> tuple[Silence, ...]:
    """For a run that has no operators."""
    del now
    return ()


def muted(policy: str, incident: Incident, silences: Iterable[Silence], incidents: Iterable[Incident]) -> str:
    """The verdict on any action of a policy on an incident: "ok", or what keeps it from acting.

    Args:
        policy: The policy's name.
        incident: The incident.
        silences: Those that hold now.
        incidents: The open ones of the run.
    """
    found = max(
        (each for each in silences if each.matches(incident, policy)), key=lambda each: each.ends_at, default=None
    )
    if found is not None:
        return f"{_SILENCE}: {found.id} by {found.author} until {_time(found.ends_at)}: {found.comment}"
    return next(
        (f"{_INHIBITED}: by incident {each.id} ({each.title})" for each in incidents if _inhibits(each, incident)), OK
    )


def _inhibits(other: Incident, incident: Incident) -> bool:
    """Whether an incident is the consequence of another: what is unstable by wrong data is cured with them."""
    return (other.cause, other.severity, incident.cause) == ("data", "critical", "instability") and abs(
        other.onset - incident.onset
    ) <= _SAME_TROUBLE


def was_muted(made: Decision) -> bool:
    """Whether a decision was kept from being carried out, so that its policy has not acted yet."""
    return guard_name(made.guard) in {_SILENCE, _INHIBITED, _BLOCKED}


def blocked(names: Collection[str], firing: Iterable[Incident]) -> str:
    """The verdict on any action of a policy that alerts of other systems block: "ok", or which of them fires.

    Args:
        names: Those that block it.
        firing: The alerts of other systems that fire on the run.
    """
    found = next((each for each in firing if each.title in names), None)
    return OK if found is None else f"{_BLOCKED}: {found.title} fires since step {found.onset} (incident {found.id})"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
