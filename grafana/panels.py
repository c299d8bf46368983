"""The kinds of panel that the dashboard is made of, as Grafana's classic JSON."""
# ruff: noqa: INP001 -- scripts beside the dashboard, not a package

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

DATASOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
JOB = 'training_job="$training_job"'
RUN = f'{JOB}, run="$run"'
# In the order of expected sharpness; a block keeps its colour in every panel.
COLOURS = {
    "emb": "blue",
    "qk": "green",
    "ffn": "yellow",
    "vo": "orange",
    "norm": "red",
    "head": "purple",
    "other": "#8e8e8e",
}
LOG: Json = {"type": "log", "log": 10}
LINEAR: Json = {"type": "linear"}
BY_BLOCK = "{{block}}"
WIDTH = 24  # of Grafana's grid


@dataclass(frozen=True)
class Panel:
    """One panel before it has a place; `queries` are (expression, legend)."""

    kind: str
    title: str
    description: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    defaults: Json = field(default_factory=dict)
    overrides: tuple[Json, ...] = ()
    options: Json = field(default_factory=dict)
    transformations: tuple[Json, ...] = ()
    is_instant: bool = False  # asks for the newest values alone: what has ended is not shown
    width: int = 0  # of Grafana's grid; 0 is an equal share of what the others leave of the row

    def render(self, number: int, position: Json) -> Json:
        """The panel as Grafana's JSON, at `position`."""
        targets = [
            {
                "refId": chr(ord("A") + index),
                "datasource": DATASOURCE,
                "editorMode": "code",
                "expr": expression,
                "legendFormat": legend,
                "range": not self.is_instant,
                **({"instant": True} if self.is_instant else {}),
                **({"format": "table"} if self.kind == "table" else {}),
            }
            for index, (expression, legend) in enumerate(self.queries)
        ]
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.description,
            "datasource": DATASOURCE,
            "gridPos": position,
            "fieldConfig": {"defaults": {"unit": self.unit, **self.defaults}, "overrides": list(self.overrides)},
            "options": self.options,
            "targets": targets,
            **({"transformations": list(self.transformations)} if self.transformations else {}),
        }


def latest(metric: str, by: str = "", matchers: str = RUN) -> str:
    """One series for each value of `by`: a daemon that moved to another instance must not double the lines."""
    return f"max by ({by}) ({metric}{{{matchers}}})" if by else f"max({metric}{{{matchers}}})"


def or_none(query: str, label: str) -> str:
    """`query`, or a line at 0 named "none" while there is nothing: an empty panel looks like a broken one."""
    return f'{query} or on () label_replace(0 * {latest("sharpwatch_run_step")}, "{label}", "none", "", "")'


def with_culprit(query: str) -> str:
    """`query` with a label `culprit`, of its labels `layer`, `block` and `rank`.

    It is "layers.2.ffn", "emb", "the whole model" or "rank 3".
    """
    joined = f'label_join({query}, "culprit", ".", "layer", "block")'
    without_layer = f'label_replace({joined}, "culprit", "$1", "culprit", "[.](.+)")'
    or_all = f'label_replace({without_layer}, "culprit", "the whole model", "culprit", "[.]")'
    return f'label_replace({or_all}, "culprit", "rank $1", "rank", "(.+)")'


def colour(shade: str) -> Json:
    """The property that gives a series its colour."""
    return {"id": "color", "value": {"mode": "fixed", "fixedColor": shade}}


def override(series: str, *properties: Json) -> Json:
    """`properties` for the series of that name alone."""
    return {"matcher": {"id": "byName", "options": series}, "properties": list(properties)}


def block_colours() -> tuple[Json, ...]:
    """Overrides that give every block its colour."""
    return tuple(override(block, colour(shade)) for block, shade in COLOURS.items())


def band(series: str, shade: str) -> tuple[Json, ...]:
    """Overrides for the line of `series`, and for the area between the two edges of its error band."""
    upper, lower = f"{series} + 2 stderr", f"{series} − 2 stderr"
    edge = (
        colour(shade),
        {"id": "custom.lineWidth", "value": 0},
        {"id": "custom.showPoints", "value": "never"},
        {"id": "custom.hideFrom", "value": {"legend": True, "tooltip": True, "viz": False}},
    )
    fill = ({"id": "custom.fillBelowTo", "value": lower}, {"id": "custom.fillOpacity", "value": 20})
    return override(series, colour(shade)), override(upper, *edge, *fill), override(lower, *edge)


def with_error(metric: str, by: str, matchers: str, *, scale: Json = LINEAR) -> tuple[tuple[str, str], ...]:
    """The queries of a metric and of its error band, a line for each value of `by`.

    A logarithmic axis ends above zero: where the band reaches zero its lower edge is a hundredth of the value.
    """
    value, error = f"{metric}{{{matchers}}}", f"{metric}_stderr{{{matchers}}}"
    lower = f"{value} - 2 * {error}"
    if scale is LOG:
        lower = f"({lower} > 0) or {value} / 100"
    name = f"{{{{{by}}}}}"
    return (
        (f"max by ({by}) ({value})", name),
        (f"max by ({by}) ({value} + 2 * {error})", f"{name} + 2 stderr"),
        (f"max by ({by}) ({lower})", f"{name} − 2 stderr"),
    )


def lines(  # noqa: PLR0913 -- a panel has this many sides, all named at the call
    title: str,
    description: str,
    *queries: tuple[str, str],
    unit: str = "short",
    scale: Json = LINEAR,
    limit: float | None = None,
    stepped: bool = False,
    overrides: tuple[Json, ...] = (),
) -> Panel:
    """A time series; `limit` draws a dashed line there, `stepped` holds each value until the next."""
    custom: Json = {
        "drawStyle": "line",
        "lineInterpolation": "stepAfter" if stepped else "linear",
        "lineWidth": 1,
        "fillOpacity": 0,
        "showPoints": "auto",
        "spanNulls": True,  # probes run now and then: what lies between two of them is not a gap
        "scaleDistribution": scale,
    }
    defaults: Json = {"custom": custom}
    if limit is not None:
        custom["thresholdsStyle"] = {"mode": "dashed"}
        steps = [{"color": "transparent", "value": None}, {"color": "red", "value": limit}]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
    options = {
        "legend": {"displayMode": "table", "placement": "right", "showLegend": True, "calcs": ["lastNotNull"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return Panel("timeseries", title, description, queries, unit, defaults, overrides, options)


def number(
    title: str, description: str, expression: str, *, unit: str = "short", red_from: float | None = None
) -> Panel:
    """The newest value as a big figure, red from `red_from` on."""
    steps: list[Json] = [{"color": "text", "value": None}]
    if red_from is not None:
        steps.append({"color": "red", "value": red_from})
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "value",
        "graphMode": "none",
        "textMode": "value",
    }
    defaults: Json = {"thresholds": {"mode": "absolute", "steps": steps}, "noValue": "–"}
    return Panel("stat", title, description, ((expression, title),), unit, defaults, (), options)


def by_block(title: str, description: str, metric: str, *, matchers: str = RUN, **style: Any) -> Panel:
    """A time series with one line for each block."""
    query = (latest(metric, "block", matchers), BY_BLOCK)
    return lines(title, description, query, overrides=block_colours(), **style)


def variable(name: str, label: str, query: str) -> Json:
    """A drop-down list that Prometheus fills."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"qryType": 1, "query": query, "refId": "PrometheusVariableQueryEditor-VariableQuery"},
        "refresh": 2,  # with the time range: runs come and go
        "sort": 2,  # names that begin with a date show the newest first
        "multi": False,
        "includeAll": False,
    }


def place(rows: list[tuple[str, int, list[Panel]]]) -> list[Json]:
    """Panels of (row title, height, panels) from left to right, rows from top to bottom."""
    placed: list[Json] = []
    top = 0
    for title, height, panels in rows:
        if title:
            position = {"x": 0, "y": top, "w": WIDTH, "h": 1}
            row = {"id": len(placed) + 1, "type": "row", "title": title, "gridPos": position}
            placed.append({**row, "collapsed": False, "panels": []})
            top += 1
        shared = [panel for panel in panels if not panel.width]
        share = (WIDTH - sum(panel.width for panel in panels)) // max(1, len(shared))
        left = 0
        for panel in panels:
            position = {"x": left, "y": top, "w": panel.width or share, "h": height}
            placed.append(panel.render(len(placed) + 1, position))
            left += panel.width or share
        top += height
    return placed
