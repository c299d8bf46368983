"""The HTML page of a report: one file that needs nothing else, neither scripts nor fonts nor a network."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass

from sharpwatch._version import __version__
from sharpwatch.cli.commands.decisions import decision_table, transition_table
from sharpwatch.cli.commands.incidents import incident_table
from sharpwatch.cli.commands.runs import blocks, failures, sources, state
from sharpwatch.cli.output import ABSENT, Grid, clean, number, timestamp
from sharpwatch.cli.report.chart import timeline
from sharpwatch.cli.report.costs import costs
from sharpwatch.v1.operator_pb2 import Decision, GetHistoryResponse, ListTransitionsResponse, RunDetail

_STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1f2328;--faint:#59636e;--rule:#d1d9e0;--accent:#0969da;
--critical:#cf222e;--warning:#bf8700}
@media (prefers-color-scheme:dark){:root{--page:#0d1117;--ink:#f0f6fc;--faint:#9198a1;--rule:#2f363d;--accent:#4493f8;
--critical:#f85149;--warning:#d29922}}
body{margin:2rem auto;max-width:72rem;padding:0 1.5rem;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;margin-bottom:0} h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid var(--rule)}
p.about,p.note{color:var(--faint);margin-top:.3rem} .wide{overflow-x:auto}
table{border-collapse:collapse;font-size:13px} th{color:var(--faint);font-weight:600;text-align:left}
td,th{padding:.25rem .9rem .25rem 0;vertical-align:top;border-bottom:1px solid var(--rule)}
td{overflow-wrap:break-word;max-width:34rem} .right{text-align:right;font-variant-numeric:tabular-nums}
td.critical,td.worse,td.failed{color:var(--critical);font-weight:600} td.warning{color:var(--warning)}
svg{max-width:100%;height:auto} svg text{font:12px system-ui,sans-serif;fill:var(--ink)} svg .faint{fill:var(--faint)}
.grid{stroke:var(--rule)} .mark{stroke:var(--ink);stroke-dasharray:4 3} .checkpoint{fill:var(--faint)}
.band{fill-opacity:.22} .band.critical{fill:var(--critical)} .band.warning{fill:var(--warning)}
.line{fill:none;stroke-width:1.5;stroke-linejoin:round} .of-model{stroke:var(--accent)} .of-emb{stroke:#2da44e}
.of-qk{stroke:#e16f24} .of-vo{stroke:#a475f9} .of-ffn{stroke:#1b9aaa} .of-norm{stroke:#e85aad} .of-head{stroke:#b88a2e}
.of-other{stroke:#8c959f}
@media print{body{margin:0;max-width:none}}
"""
_MARKED = frozenset({"critical", "warning", "worse", "failed"})  # words in cells that have a colour


@dataclass(frozen=True, slots=True)
class Report:
    """What is known of a run, as the daemon has answered it.

    Attributes:
        detail: The run.
        decisions: Its decisions, oldest first.
        audit: What became of them.
        history: Its samples and estimates.
        now: When, in unix seconds.
    """

    detail: RunDetail
    decisions: Sequence[Decision]
    audit: ListTransitionsResponse
    history: GetHistoryResponse
    now: float


def page(report: Report) -> str:
    """The text of the HTML file.

    Args:
        report: What is known of the run.
    """
    run = report.detail.run
    html = ET.Element("html", lang="en")
    head = ET.SubElement(html, "head")
    ET.SubElement(head, "meta", charset="utf-8")
    # So that nothing that a name may hold, and no mistake of this page, can reach the network or run.
    policy = {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'"}
    ET.SubElement(head, "meta", policy)
    ET.SubElement(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
    _text(head, "title", f"{run.run}: sharpwatch report")
    ET.SubElement(head, "style").text = _STYLE
    body = ET.SubElement(html, "body")
    _text(body, "h1", run.run)
    made = timestamp(round(report.now * 1e9))
    _text(body, "p", f"sharpwatch {__version__}, made at {made}, at step {run.step} of the run", "about")
    _section(body, "The run", state(report.detail, report.now))
    _timeline(body, report)
    _section(
        body, "Incidents", incident_table(report.detail.alerts), "Onset: where it began; opened: where it was found."
    )
    _section(body, "Decisions", decision_table(report.decisions))
    _section(body, "Audit", transition_table(report.audit), "Every outcome of each decision: when, by whom and why.")
    _section(body, "Steps and hours", _balance(report))
    _section(body, "Checkpoints", _checkpoints(report.detail))
    _section(body, "Blocks at the last step", blocks(report.detail.blocks))
    _section(body, "Where the estimates come from", sources(report.detail))
    _section(body, "Failures of the monitoring", failures(report.detail))
    ET.indent(html)
    return "<!DOCTYPE html>\n" + ET.tostring(html, encoding="unicode", method="html") + "\n"


def _text(parent: ET.Element, tag: str, text: str, style: str = "") -> ET.Element:
    found = ET.SubElement(parent, tag, {"class": style} if style else {})
    found.text = clean(text)
    return found


def _timeline(body: ET.Element, report: Report) -> None:
    points = report.history.points
    _text(body, "h2", "Timeline")
    drawn = timeline(report.detail, points, report.history.estimates, report.decisions)
    if not drawn:
        _text(body, "p", "there are fewer than two samples to draw", "note")
        return
    first, last = min(point.step for point in points), max(point.step for point in points)
    about = (
        f"{len(points)} samples that the journal keeps, steps {first} to {last}. Shaded: incidents from onset to last "
        "finding, critical ones red. Dashed: actions that were applied. Triangles: checkpoints. Of close samples the "
        "lowest and the highest are drawn; values that are not finite are left out."
    )
    _text(body, "p", about, "note")
    body.append(ET.fromstring(drawn))  # noqa: S314 - as above


def _section(body: ET.Element, title: str, grid: Grid, note: str = "") -> None:
    _text(body, "h2", title)
    if note and grid.rows:
        _text(body, "p", note, "note")
    if not grid.rows:
        _text(body, "p", grid.empty or "nothing", "note")
        return
    table = ET.SubElement(ET.SubElement(body, "div", {"class": "wide"}), "table")
    if grid.headings:
        _row(ET.SubElement(table, "thead"), "th", grid.headings, grid.align)
    rows = ET.SubElement(table, "tbody")
    for row in grid.rows:
        _row(rows, "td", row, grid.align)


def _row(parent: ET.Element, tag: str, cells: Sequence[str], align: str) -> None:
    row = ET.SubElement(parent, "tr")
    for cell, side in zip(cells, align, strict=True):
        styles = ["right"] * (side == "r") + [cell] * (cell in _MARKED)
        _text(row, tag, cell, " ".join(styles))


def _balance(report: Report) -> Grid:
    rows = tuple(
        (
            each.what,
            ABSENT if each.steps is None else f"{each.steps:,}",
            ABSENT if each.hours is None else number(each.hours, 3),
            each.how,
        )
        for each in costs(report.detail, report.history.points, report.decisions)
    )
    return Grid("lrrl", rows, ("what", "steps", "hours", "how it is computed"))


def _checkpoints(detail: RunDetail) -> Grid:
    saved = sorted(detail.checkpoints, key=lambda each: each.step)
    rows = tuple((str(each.step), each.uri) for each in saved)
    return Grid("rl", rows, ("step", "place"), empty="no checkpoint is known")
