"""A fault in a real run comes back as an alert: daemon, Prometheus' rule, Alertmanager, webhook, policy, trainer."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "alert_round_trip.py"


@pytest.fixture
def benchmark(program):
    for name in ("prometheus", "prometheus-alertmanager"):
        program(name)
    spec = importlib.util.spec_from_file_location("alert_round_trip", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_what_prometheus_says_of_a_run_changes_its_rates_through_a_policy(benchmark):
    found = benchmark.round_trip(times=50)
    assert found["applied_step"] > found["fault_step"]
    assert set(found["multipliers"].values()) == {0.05}
    own, foreign = found["incidents"]
    if own["cause"] == "foreign":
        own, foreign = foreign, own
    assert (own["name"], own["severity"]) == ("RateRaise", "critical")
    assert (foreign["name"], foreign["cause"], foreign["severity"]) == (
        "SharpwatchIncidentCritical",
        "foreign",
        "critical",
    )
    assert "critical: learning-rate in the whole model" in foreign["evidence"]
    (made,) = (one for one in found["audit"]["decisions"] if one["outcome"] == "applied")
    assert (made["policy"], made["alert_id"], made["alert_name"]) == (
        "answer-prometheus",
        foreign["id"],
        "SharpwatchIncidentCritical",
    )
    states = [one["outcome"] for one in found["audit"]["transitions"] if one["decision_id"] == made["id"]]
    assert states == ["sent", "applied"]
    assert 'sharpwatch_foreign_alert{alert="SharpwatchIncidentCritical"' in found["metrics"]
    assert 'name="ForeignAlert"' not in found["metrics"]
