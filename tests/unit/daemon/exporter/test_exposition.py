"""Text that is kept of each run, against what prometheus_client makes of the same families every time."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from snapshots import FULL, HELLO, estimate

from sharpwatch.daemon.exporter.families import LAYER_SECTIONS, SECTIONS, Section
from sharpwatch.daemon.exporter.metrics import Exposition, RunCollector
from sharpwatch.daemon.ingest.samples import BlockTap, HealthReading
from sharpwatch.daemon.runs.snapshot import Maxima, RunSnapshot

TEXT, OPENMETRICS = "text/plain;version=1.0.0", "application/openmetrics-text;version=1.0.0"
ESCAPINGS = ("", ";escaping=allow-utf-8", ";escaping=underscores", ";escaping=dots", ";escaping=values")
ACCEPTS = ("", *(f"{accept}{escaping}" for accept in (TEXT, OPENMETRICS) for escaping in ESCAPINGS))


class Daemon:
    """Runs at one time, their `Exposition`, and a metric of the daemon's own."""

    def __init__(self, *snapshots: RunSnapshot) -> None:
        self.snapshots = snapshots
        self.now = 1000.5
        self.registry = CollectorRegistry()
        Gauge("own", "Of the daemon itself.", registry=self.registry).set(3)
        self.collector = RunCollector(lambda: self.snapshots, lambda: self.now, stale_after=60.0)
        self.exposition = Exposition(self.registry, self.collector)

    def shown(self, accept: str = "") -> bytes:
        """What is rendered, after a comparison with prometheus_client."""
        stock = CollectorRegistry()
        stock.register(self.registry)
        stock.register(self.collector)
        encoder, content_type = choose_encoder(accept)
        body, said = self.exposition.render(accept)
        assert (body.decode().splitlines(), said) == (encoder(stock).decode().splitlines(), content_type)
        assert body == encoder(stock)
        return body


def named(training_job: str, run: str, **changes: str) -> RunSnapshot:
    return replace(FULL, hello=replace(HELLO, training_job=training_job, run=run, **changes))


OTHER = replace(named("job é", 'run "\\ 2'), step=8)
BARE = RunSnapshot(
    hello=replace(HELLO, run="bare"), phase="running", attempts=1, mode="observe", lr_revision=0, multipliers={}
)


@pytest.mark.parametrize("accept", ACCEPTS)
def test_every_format_is_to_the_letter_as_by_prometheus_client(accept):
    daemon = Daemon(FULL, OTHER, BARE)
    assert daemon.shown(accept) == daemon.shown(accept)  # the second time by texts that are kept
    daemon.snapshots = (BARE, replace(OTHER, step=9))
    daemon.shown(accept)


@pytest.mark.parametrize("version", ["1.0.x", "x", "1..0", "\x00"])
def test_a_version_that_is_no_number_has_the_usual_format(version):
    registry = CollectorRegistry()
    exposition = Exposition(registry, RunCollector(tuple, lambda: 0.0, stale_after=1.0))
    for media in ("text/plain", "application/openmetrics-text"):
        assert exposition.render(f"{media}; version={version}")[1] in {choose_encoder(each)[1] for each in ("", media)}


def test_formats_take_turns():
    daemon = Daemon(FULL, OTHER)
    for step in range(10, 14):
        daemon.snapshots = (FULL, replace(OTHER, step=step))
        for accept in ACCEPTS:
            daemon.shown(accept)


TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)


@given(TEXTS, TEXTS, TEXTS, TEXTS)
def test_any_label_is_escaped_as_by_prometheus_client(job, run, optimizer, reason):
    health = HealthReading(None, None, {reason: 3}, (), 0)
    one = replace(named(job, run, optimizer=optimizer), health=health)
    for accept in (TEXT, f"{TEXT};escaping=allow-utf-8", OPENMETRICS):
        Daemon(one).shown(accept)


@given(st.floats() | st.integers(-(2**53), 2**53).map(float))
def test_any_number_is_written_as_by_prometheus_client(value):
    Daemon(replace(FULL, loss=value)).shown()


@pytest.mark.parametrize(("accept", "parse"), [("", parse_text), (TEXT, parse_text), (OPENMETRICS, parse_openmetrics)])
def test_prometheus_client_reads_the_samples_that_the_collector_gives(accept, parse):
    daemon = Daemon(FULL, OTHER, BARE)
    given = [sample for family in daemon.collector.collect() for sample in family.samples]
    read = [sample for family in parse(daemon.shown(accept).decode()) for sample in family.samples]
    assert read[0].name == "own"
    assert [(each.name, each.labels, each.value) for each in read[1:]] == [
        (each.name, each.labels, each.value) for each in given
    ]


CHANGED = {
    "hello": replace(HELLO, optimizer="SGD"),
    "phase": "silent",
    "mode": "enforce",
    "lr_revision": 3,
    "received_bytes": 5678,
    "step": 8,
    "loss": 2.25,
    "last_sample_at": 1001.5,
    "tap": BlockTap(*(np.array([1.5, math.nan]) for _ in range(3)), np.zeros(2, int), np.ones(2), np.ones(2)),
    "maxima": Maxima(5.0, np.array([0.875, 1.0]), np.array([1.5, 2.5])),
    "update_ratio": (0.5, 0.25),
    "gradient_noise": (math.nan, 0.5),
    "health": replace(FULL.health, swallowed_errors=2),
    "attention": np.array([math.nan, 2.5]),
    "estimates": {**FULL.estimates, ("trace", "qk", "gnb"): estimate(33.0, 8.0)},
    "layer_sharpness": (estimate(1.0), estimate(3.0)),
    "order_correlation": -0.5,
    "sharpness": replace(FULL.sharpness, order_since=5),
    "incidents": FULL.incidents[:1],
    "incidents_total": {"UpdateRmsSpike": 3},
    "excursions_total": {("loss", ""): 4},
    "decisions_total": {("scale_lr", "advise", "expired"): 1},
}


@pytest.mark.parametrize(
    "name", ["hello", *sorted({name for section in (*SECTIONS, *LAYER_SECTIONS) for name in section.fields})]
)
def test_a_change_of_any_field_is_shown_at_the_next_scrape(name):
    daemon = Daemon(FULL, OTHER)
    before = daemon.shown()
    daemon.snapshots = (replace(FULL, **{name: CHANGED[name]}), OTHER)
    assert daemon.shown() != before
    daemon.snapshots = (replace(FULL, **{name: getattr(BARE, name)}), OTHER)  # mostly: it is gone
    daemon.shown()


class Recorder:
    """A snapshot that records the fields which are read of it, also by its properties."""

    def __init__(self, snapshot: RunSnapshot) -> None:
        self._snapshot = snapshot
        self.read: set[str] = set()

    def __getattr__(self, name: str):
        attribute = getattr(RunSnapshot, name)
        if isinstance(attribute, property):
            return attribute.fget(self)
        self.read.add(name)
        return getattr(self._snapshot, name)


@pytest.mark.parametrize("section", [*SECTIONS, *LAYER_SECTIONS], ids=lambda section: section.rows.__name__)
def test_a_section_reads_the_fields_that_it_names_and_yields_its_own_families(section: Section):
    recorder = Recorder(FULL)
    rows = list(section.rows(recorder))
    assert recorder.read - {"hello"} == set(section.fields)
    assert {family for family, _, _ in rows} <= set(section.families)


def test_only_sections_that_changed_are_written_again():
    written: list[str] = []

    def counted(section: Section) -> Section:
        def rows(snapshot: RunSnapshot):
            written.append(f"{snapshot.hello.run} {section.rows.__name__}")
            return section.rows(snapshot)

        return replace(section, rows=rows)

    daemon = Daemon(FULL, OTHER)
    sections = tuple(map(counted, daemon.collector.sections))
    daemon.collector.sections = sections
    daemon.exposition.render("")
    assert len(written) == 2 * len(sections)
    written.clear()
    # A new snapshot with equal counts and the same objects, as a run makes one of every sample.
    daemon.snapshots = (replace(FULL, step=8, excursions_total=dict(FULL.excursions_total)), OTHER)
    daemon.exposition.render(OPENMETRICS)
    assert written == ["run _newest_rows"]


def test_a_run_goes_by_the_clock_though_nothing_of_it_changed():
    daemon = Daemon(replace(FULL, phase="silent"), OTHER)
    assert b'run="run"' in daemon.shown()
    daemon.now = 1060.6
    assert b'run="run"' not in daemon.shown()
    daemon.now = 1060.4  # as a clock that is set back
    assert b'run="run"' in daemon.shown()


def test_what_is_too_old_goes_though_its_own_fields_are_the_same():
    daemon = Daemon(FULL)
    assert b'estimator="gnb",layer="layers.0"' in daemon.shown()
    daemon.snapshots = (replace(FULL, step=1_000),)
    assert b'estimator="gnb"' not in daemon.shown()


def test_a_new_attempt_and_another_run_of_the_name_begin_anew():
    daemon = Daemon(FULL)
    daemon.shown()
    daemon.snapshots = (replace(FULL, hello=replace(HELLO, host="other")),)
    assert b'host="other"' in daemon.shown()
    daemon.snapshots = (replace(FULL, hello=replace(HELLO, training_job="another")),)
    assert b'training_job="job"' not in daemon.shown()
