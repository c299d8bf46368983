"""`sharpwatch report` of a run in a real daemon: one HTML file whose numbers are those of the journal."""

from __future__ import annotations

import asyncio
import json
import math
import re
import sqlite3
from html.parser import HTMLParser

import numpy as np
import pytest

from sharpwatch import wire
from sharpwatch.cli.main import main
from sharpwatch.v1 import operator_pb2 as pb
from sharpwatch.v1 import types_pb2

pytestmark = pytest.mark.usefixtures("as_operator")

POLICIES = """
policies:
  - name: back
    match: {alert: NonFinite}
    mode: enforce
    action: {kind: rollback}
"""
SCRIPT = "<script>alert('now')</script> & \"more\""
CHECKPOINT, FAULT, END = 100, 131, 190


VOID = {"meta", "br"}


class Page(HTMLParser):
    """The tags of a page with their attributes, and by heading the rows of its table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.heading, self.tables = "", {}
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "h2":
            self.heading = ""
        if tag == "tr":
            self.tables.setdefault(self.heading, []).append([])
        if tag in ("td", "th"):
            self.tables[self.heading][-1].append("")

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data
        if "h2" in self.open:
            self.heading += data
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[self.heading][-1][-1] += data


@pytest.fixture
async def report(running, build, tmp_path):
    """The text of the report of a run that was rolled back, and the journal that it is from."""
    async with running(policies=POLICIES) as daemon:
        trainer = await daemon.train()
        sequence = 0

        async def step(number: int, **parts) -> None:
            nonlocal sequence
            sequence += 1
            if number % 20 == 0:
                parts |= {"gnb": build.gnb(number), "direction": build.direction(0.2 + number / 1000)}
            await trainer.send(build.sample(sequence, number, **parts))

        async def answer(at: int) -> dict:
            made = (await trainer.next("command")).id
            return {"results": [types_pb2.CommandResult(command_id=made, outcome="COMMAND_OUTCOME_APPLIED", step=at)]}

        parts = {}
        for number in range(1, FAULT):
            saved = [types_pb2.Checkpoint(step=number, uri=f"/c/{number}<i>")] if number == CHECKPOINT else []
            await step(number, checkpoints=saved, **parts)
            parts = {}
            if number == 30:
                await trainer.acknowledged(sequence)
                change = pb.SetLearningRatesRequest(run="run", multipliers={"qk": 0.5}, author="ann", reason=SCRIPT)
                await daemon.operator.SetLearningRates(change, metadata=daemon.credentials)
                parts = await answer(31)
        bad = build.tap()
        bad.non_finite.CopyFrom(wire.encode(np.ones(5), "int64"))
        await step(FAULT, tap=bad)
        parts = await answer(CHECKPOINT + 1)
        await step(CHECKPOINT + 1, restored=True, **parts)
        for number in range(CHECKPOINT + 2, END + 1):
            await step(number)
        await trainer.acknowledged(sequence)
        made = tmp_path / "report.html"
        words = ["report", "run", "--address", daemon.grpc, "--output", str(made)]
        await daemon.shown("run", lambda detail: detail.run.step == END and len(detail.estimates) > 0)
        assert await asyncio.to_thread(main, words) == 0
        yield made.read_text(), sqlite3.connect(f"file:{tmp_path}/journal.db?mode=ro", uri=True)


async def test_the_page_is_whole_needs_nothing_else_and_escapes_what_users_wrote(report):
    text, _ = report
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "i", "b", "object", "base", "form"}
    for _, attributes in page.tags:
        assert not {"src", "href", "action", "onload", "onclick", "style"} & attributes.keys()
    assert not re.search(r"https?://|url\(|@import", text)
    policy = next(attributes["content"] for _, attributes in page.tags if attributes.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert SCRIPT in page.words  # as text
    assert f"/c/{CHECKPOINT}<i>" in page.words


async def test_its_numbers_are_those_of_the_journal(report):
    text, journal = report
    tables = Page(text).tables

    def column(title: str, name: str) -> list[str]:
        heading, *rows = tables[title]
        return [row[heading.index(name)] for row in rows]

    incidents = [json.loads(record) for (record,) in journal.execute("SELECT record FROM alerts ORDER BY first_step")]
    assert sorted(column("Incidents", "id")) == sorted(one["id"] for one in incidents)
    assert sorted(column("Incidents", "onset")) == sorted(str(one["onset"]) for one in incidents)
    fault = next(one for one in incidents if one["name"] == "NonFinite")
    assert fault["onset"] == FAULT
    decisions = [json.loads(record) for (record,) in journal.execute("SELECT record FROM decisions ORDER BY rowid")]
    assert column("Decisions", "id") == [one["id"] for one in decisions]
    assert column("Decisions", "outcome") == [one["outcome"] for one in decisions]
    assert decisions[0]["author"] in column("Decisions", "by")
    audit = journal.execute("SELECT decision, outcome FROM transitions ORDER BY id").fetchall()
    assert list(zip(column("Audit", "id"), column("Audit", "outcome"), strict=True)) == audit
    saved = journal.execute("SELECT step, uri FROM checkpoints").fetchall()
    assert column("Checkpoints", "step") == [str(step) for step, _ in saved]
    samples = journal.execute("SELECT count(*) FROM samples").fetchone()[0]
    balance = dict(zip(column("Steps and hours", "what"), column("Steps and hours", "steps"), strict=True))
    assert balance["recorded"] == str(samples)
    rollback = next(one for one in decisions if one["action"] == "rollback")
    assert balance[f"lost: done again after rollback {rollback['id']}"] == str(FAULT - CHECKPOINT)
    hours = dict(zip(column("Steps and hours", "what"), column("Steps and hours", "hours"), strict=True))
    # Steps of 0.2 s, of which the agent takes 0.5 %, as the samples tell.
    assert float(hours["recorded"]) == pytest.approx(samples * 0.2 / 3600, rel=1e-2)
    assert float(hours["monitoring: the agent's own time"]) == pytest.approx(samples * 0.2 * 0.005 / 3600, rel=1e-2)


async def test_the_chart_has_the_losses_at_their_steps(report):
    text, _ = report
    page = Page(text)
    lines = [attributes["points"] for tag, attributes in page.tags if tag == "polyline"]
    losses = lines[0].split()
    assert len(losses) == FAULT  # one part until the run went back
    assert len(lines[1].split()) == END - CHECKPOINT
    places = [float(point.split(",")[0]) for point in losses]
    left, right = 84.0, 760.0 - 24.0
    for number, place in zip(range(1, FAULT + 1), places, strict=True):
        assert math.isclose(place, left + (right - left) * (number - 1) / (END - 1), abs_tol=0.06)
    heights = [float(point.split(",")[1]) for point in losses]
    by_loss = sorted(zip([4.0 + 0.01 * (step % 7) for step in range(1, FAULT + 1)], heights, strict=True))
    assert [height for _, height in by_loss] == sorted(heights, reverse=True)  # upwards
    assert {f"of-{block}" for block in ("emb", "qk", "vo", "ffn", "norm")} <= set(
        " ".join(attributes.get("class") or "" for _, attributes in page.tags).split()
    )


async def test_a_run_without_a_sample_has_a_report_that_says_so(running, capsys):
    async with running() as daemon:
        await daemon.train()
        await daemon.shown("run", lambda detail: detail.run.run)
        assert await asyncio.to_thread(main, ["report", "run", "--address", daemon.grpc, "--output", "-"]) == 0
    page = Page(capsys.readouterr().out)
    assert "there are fewer than two samples to draw" in page.words
    assert "not known: no sample tells the agent's own time" in page.words
