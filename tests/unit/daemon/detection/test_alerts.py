"""Findings that hang together are one alert."""

from __future__ import annotations

import itertools

from sharpwatch.daemon.detection.alerts import UPDATE_EVERY, AlertBook
from sharpwatch.daemon.records import Alert, Finding


def book() -> AlertBook:
    counter = itertools.count(1)
    return AlertBook("run", {"A": 3, "B": 3}, lambda: f"a{next(counter)}")


def found(name: str, step: int, *blocks: str, severity: str = "warning") -> Finding:
    return Finding(name, blocks, severity, f"at {step}", step)


def test_findings_of_a_name_are_one_alert_until_it_was_quiet_for_long_enough():
    alerts = book()
    assert alerts.see([found("A", 1, "qk")], "A") == (Alert("a1", "run", "A", ("qk",), "warning", "at 1", 1, 1, True),)
    for step, here in enumerate([False, False, True, False, False], start=2):
        assert alerts.see([found("A", step, "qk")] if here else [], "A") == ()
    (closed,) = alerts.see([], "A")
    assert (closed.first_step, closed.last_step, closed.active) == (1, 4, False)
    assert alerts.see([found("A", 9, "qk")], "A")[0].id == "a2"


def test_steps_without_a_signal_are_not_quiet():
    alerts = book()
    alerts.see([found("A", 1)], "A")
    for _ in range(10):
        assert alerts.see([], "B") == ()
    assert alerts.active("A").active


def test_news_is_recorded_and_a_mere_continuation_now_and_then():
    alerts = book()
    alerts.see([found("A", 1, "qk")], "A")
    (wider,) = alerts.see([found("A", 2, "ffn", "qk")], "A")
    assert wider.blocks == ("qk", "ffn")
    (worse,) = alerts.see([found("A", 3, "qk", severity="critical")], "A")
    assert (worse.severity, worse.evidence) == ("critical", "at 3")
    assert alerts.see([found("A", 4, "qk")], "A") == ()
    assert alerts.active("A").severity == "critical"
    assert [len(alerts.see([found("A", step, "qk")], "A")) for step in range(5, 4 + UPDATE_EVERY)] == [0] * 8 + [1]


def test_replay_carries_open_alerts_on_and_opens_none():
    lived = book()
    lived.see([found("A", 1, "qk")], "A")
    restarted = book()
    restarted.restore(lived.all)
    for alerts in (lived, restarted):
        go_on = alerts.see if alerts is lived else alerts.replay
        go_on([found("A", 2, "qk")], "A")
        go_on([], "A")
        go_on([], "A")
    assert restarted.all == lived.all
    restarted.replay([found("B", 3)], "AB")
    assert restarted.active("B") is None
    (closed,) = restarted.see([], "A")
    assert closed == lived.see([], "A")[0]
