"""Groups consecutive findings of one detector into an alert, which closes after a quiet period."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from sharpwatch.daemon.records import Alert, Finding

UPDATE_EVERY = 10  # steps between records of an alert that merely goes on


@dataclass(slots=True)
class _Open:
    alert: Alert
    quiet: int = 0  # clear steps in a row
    recorded: int = 0  # last step of the newest record


class AlertBook:
    """The alerts of one run. An alert is closed after `quiet` steps in a row at which its detector could judge."""

    def __init__(self, run: str, quiet: Mapping[str, int], new_id: Callable[[], str]) -> None:
        self._run = run
        self._quiet = quiet
        self._new_id = new_id
        self.open: dict[str, _Open] = {}  # by name
        self._all: dict[str, Alert] = {}

    @property
    def all(self) -> tuple[Alert, ...]:
        """Every alert, oldest first."""
        return tuple(self._all.values())

    def active(self, name: str) -> Alert | None:
        """The open alert of that name."""
        return self.open[name].alert if name in self.open else None

    def restore(self, alerts: Iterable[Alert]) -> None:
        """Take up journalled alerts."""
        self._all = {alert.id: alert for alert in alerts}
        self.open = {alert.name: _Open(alert, recorded=alert.last_step) for alert in self._all.values() if alert.active}

    def see(self, findings: Sequence[Finding], judged: Iterable[str]) -> tuple[Alert, ...]:
        """Fold one step's findings; `judged` are the names that had a signal. Returns the alerts to record."""
        changed = [alert for finding in findings if (alert := self._find(finding)) is not None]
        found = {finding.name for finding in findings}
        for name in judged:
            if name in self.open and name not in found:
                self.open[name].quiet += 1
                if self.open[name].quiet >= self._quiet[name]:
                    changed.append(self._close(name))
        return tuple(changed)

    def replay(self, findings: Sequence[Finding], judged: Iterable[str]) -> None:
        """Carry open alerts on, as `see` does; open and close none."""
        found = {finding.name: finding for finding in findings}
        for name, entry in self.open.items():
            finding = found.get(name)
            if finding is not None:
                self._carry_on(entry, finding)
            elif name in judged:
                entry.quiet += 1

    def close_all(self) -> tuple[Alert, ...]:
        """Close what is open: the run went back to before it."""
        return tuple(self._close(name) for name in tuple(self.open))

    def _find(self, finding: Finding) -> Alert | None:
        entry = self.open.get(finding.name)
        if entry is None:
            alert = Alert(
                id=self._new_id(),
                run=self._run,
                name=finding.name,
                blocks=finding.blocks,
                severity=finding.severity,
                evidence=finding.evidence,
                first_step=finding.step,
                last_step=finding.step,
                active=True,
            )
            self.open[finding.name] = _Open(alert, recorded=finding.step)
            self._all[alert.id] = alert
            return alert
        before = entry.alert
        self._carry_on(entry, finding)
        alert = entry.alert
        news = alert.blocks != before.blocks or alert.severity != before.severity
        if not news and alert.last_step - entry.recorded < UPDATE_EVERY:
            return None
        entry.recorded = alert.last_step
        return alert

    def _carry_on(self, entry: _Open, finding: Finding) -> None:
        alert = entry.alert
        # Blocks stay in the order in which trouble reached them: the first to show it is the likeliest cause.
        blocks = tuple(dict.fromkeys((*alert.blocks, *finding.blocks)))
        worse = finding.severity == "critical" and alert.severity == "warning"
        entry.quiet = 0
        entry.alert = replace(
            alert,
            blocks=blocks,
            severity="critical" if worse else alert.severity,
            evidence=finding.evidence if worse else alert.evidence,
            last_step=max(alert.last_step, finding.step),
        )
        self._all[alert.id] = entry.alert

    def _close(self, name: str) -> Alert:
        closed = replace(self.open.pop(name).alert, active=False)
        self._all[closed.id] = closed
        return closed
