"""The configuration's rules, which a daemon takes up anew at SIGHUP: policies, detection, autopilot, maintenance.

What the daemon has opened or begun with, such as its addresses and its journal, stays until it is started again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace

import structlog

from sharpwatch.daemon.config.settings import Config
from sharpwatch.daemon.detection.thresholds import Budget
from sharpwatch.daemon.runs.run import Runs
from sharpwatch.errors import SharpwatchError

log = structlog.get_logger(__name__)

_FIXED = ("daemon", "notifications", "gate")  # sections


class Rules:
    """The configuration in force.

    Args:
        config: The one that the daemon starts with.
        load: Reads it anew; raises `SharpwatchError` where it can't be used.
    """

    def __init__(self, config: Config, load: Callable[[], Config]) -> None:
        self.config = config
        self._load = load
        self._followers: list[Callable[[Config], None]] = []

    def follow(self, take_up: Callable[[Config], None]) -> None:
        """Has `take_up` called with the configuration in force, and with each that comes into force."""
        self._followers.append(take_up)
        take_up(self.config)  # a daemon that upgrades its journal starts for long, and this may have changed meanwhile

    def reload(self) -> None:
        """Reads the configuration and puts its rules in force; one that can't be used changes nothing."""
        try:
            loaded = self._load()
        except SharpwatchError as error:
            log.error("configuration_refused", reason=str(error))  # noqa: TRY400  the message is the reason
            return
        waiting = list(_changed(self.config, loaded))
        self.config = replace(loaded, **{name: getattr(self.config, name) for name in _FIXED})
        for take_up in self._followers:
            take_up(self.config)
        policies = [policy.name for policy in self.config.policies]
        log.info("configuration_reloaded", policies=policies, needs_restart=waiting)


def _changed(before: Config, after: Config) -> Iterator[str]:
    """The keys that differ and need a restart, such as "daemon.grpc"."""
    for section in _FIXED:
        old, new = getattr(before, section), getattr(after, section)
        yield from (f"{section}.{key.name}" for key in fields(old) if getattr(old, key.name) != getattr(new, key.name))


def configure_runs(runs: Runs, config: Config) -> None:
    """Has all runs in memory go by the rules of a configuration; others do once they come back."""
    for run in runs:
        detection = config.detection.of(run.attempt.hello.all_labels)
        run.controller.configure(config.policies, Budget.of(detection), config.maintenance, config.autopilot)
        run.publish(mode=run.controller.mode)
