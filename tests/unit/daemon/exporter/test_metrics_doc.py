"""docs/metrics.md names what the daemon can export: every metric, with its labels, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client import CollectorRegistry

from sharpwatch.daemon.exporter.metrics import RunCollector
from sharpwatch.daemon.exporter.own_metrics import OwnMetrics

DOCUMENT = (Path(__file__).parents[4] / "docs/metrics.md").read_text(encoding="utf-8")
SUFFIXES = {"counter": "_total", "info": "_info"}


def documented() -> dict[str, set[str]]:
    rows = re.findall(r"^\| `(sharpwatch_\w+)` \|([^|]*)\|", DOCUMENT, re.MULTILINE)
    names = [name for name, _ in rows]
    assert len(set(names)) == len(names)
    return {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows}


def exported() -> dict[str, set[str]]:
    registry = CollectorRegistry()
    OwnMetrics(registry, queue_depth=lambda: 0, queue_capacity=1, shards_held=[lambda: True])
    found = {}
    for collector in registry._collector_to_names:
        (family,) = collector.describe()
        found[family.name + SUFFIXES.get(family.type, "")] = set(collector._labelnames)
    for family in RunCollector(lambda: (), lambda: 0.0, stale_after=1.0).collect():
        assert {"training_job", "run"} <= set(family._labelnames)
        found[family.name + SUFFIXES.get(family.type, "")] = set(family._labelnames) - {"training_job", "run"}
    return found


def test_document_names_every_metric_with_its_labels_and_no_other():
    assert documented() == exported()


def test_every_row_says_what_the_metric_means():
    rows = [line.split("|") for line in DOCUMENT.splitlines() if line.startswith("| `sharpwatch_")]
    assert all(len(row) == 8 for row in rows)
    assert all(row[3].strip() and row[4].strip() for row in rows)  # unit and meaning
