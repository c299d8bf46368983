"""The dashboard is what Grafana takes: its structure, without a Grafana."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from sharpwatch.blocks import BLOCKS

GRAFANA = Path(__file__).parents[4] / "grafana"
FILE = GRAFANA / "sharpwatch-run.json"
DASHBOARD = json.loads(FILE.read_text(encoding="utf-8"))
PANELS = DASHBOARD["panels"]
CHARTS = [panel for panel in PANELS if panel["type"] != "row"]
VARIABLE = {"type": "prometheus", "uid": "${datasource}"}
# The unit ids of Grafana's registry that the dashboard uses; a misspelt one shows as text behind the number.
UNITS = {"short", "sci", "s", "percentunit"}


JOB = 'training_job="$training_job"'
OF_THE_JOB = {"Open incidents", "Incidents by run"}  # who looks may not know yet which run is in trouble


def titled(title: str) -> dict:
    (panel,) = (panel for panel in CHARTS if panel["title"] == title)
    return panel


def test_file_is_what_the_generator_prints():
    done = subprocess.run([sys.executable, str(GRAFANA / "generate.py")], capture_output=True, text=True, check=True)
    assert done.stdout == FILE.read_text(encoding="utf-8"), "python grafana/generate.py > grafana/sharpwatch-run.json"


def test_ids_are_unique():
    ids = [panel["id"] for panel in PANELS]
    assert len(set(ids)) == len(ids)
    assert all(identity > 0 for identity in ids)


def test_panels_lie_on_the_grid_and_do_not_overlap():
    places = [panel["gridPos"] for panel in PANELS]
    for place in places:
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= 24
        assert place["h"] >= 1
    for one, other in combinations(places, 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)


@pytest.mark.parametrize("panel", CHARTS, ids=lambda panel: panel["title"])
def test_panel_says_what_is_normal_and_asks_the_chosen_source(panel):
    assert len(panel["description"]) > 30
    assert panel["datasource"] == VARIABLE
    assert panel["targets"]
    assert all(target["datasource"] == VARIABLE for target in panel["targets"])
    references = [target["refId"] for target in panel["targets"]]
    assert len(set(references)) == len(references)
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS


@pytest.mark.parametrize("panel", CHARTS, ids=lambda panel: panel["title"])
def test_every_query_asks_for_the_chosen_run_alone(panel):
    for target in panel["targets"]:
        metrics = target["expr"].count("sharpwatch_")
        assert metrics
        chosen = JOB if panel["title"] in OF_THE_JOB else f'{JOB}, run="$run"'
        assert target["expr"].count(chosen) == metrics


def test_variables_stand_in_the_order_in_which_they_need_each_other():
    variables = DASHBOARD["templating"]["list"]
    assert [variable["name"] for variable in variables] == ["datasource", "training_job", "run"]
    assert all(variable["datasource"] == VARIABLE for variable in variables[1:])


def test_every_band_has_both_its_edges_and_a_colour_of_its_own():
    panel = titled("Average sharpness by block, ± 2 standard errors")
    legends = [target["legendFormat"] for target in panel["targets"]]
    overrides = {rule["matcher"]["options"]: rule["properties"] for rule in panel["fieldConfig"]["overrides"]}
    colours = set()
    for block in BLOCKS:
        line, upper, lower = (legend.replace("{{block}}", block) for legend in legends)
        properties = {rule["id"]: rule["value"] for rule in overrides[upper]}
        assert properties["custom.fillBelowTo"] == lower
        assert lower in overrides
        painted = {
            json.dumps(rule) for name in (line, upper, lower) for rule in overrides[name] if rule["id"] == "color"
        }
        assert len(painted) == 1
        colours |= painted
    assert len(colours) == len(BLOCKS)


def test_the_first_screen_names_the_block_in_trouble_and_nothing_that_has_ended():
    trouble, table = (panel for panel in CHARTS if panel["gridPos"]["y"] == 0)
    assert (trouble["title"], table["title"]) == ("Block in trouble", "Open incidents")
    assert trouble["options"]["textMode"] == "name"  # the block, not a number
    for panel in (trouble, table):
        (target,) = panel["targets"]
        assert target["instant"]
        assert not target["range"]


def test_the_table_of_incidents_has_critical_ones_first():
    table = titled("Open incidents")
    (organize,) = table["transformations"]
    order = sorted(organize["options"]["indexByName"].items(), key=lambda item: item[1])
    shown = [organize["options"]["renameByName"].get(name, name) for name, _ in order]
    assert shown == ["severity", "culprit", "cause", "since step", "run", "alert"]
    assert not organize["options"]["excludeByName"].keys() & dict(order).keys()
    (by,) = table["options"]["sortBy"]
    assert by == {"displayName": "severity", "desc": False}
    assert sorted(["warning", "critical"]) == ["critical", "warning"]


def test_a_log_scale_where_blocks_differ_by_orders_of_magnitude():
    for title in ("Update RMS by block", "Gradient norm by block", "Top eigenvalue by block", "Learning rates"):
        assert titled(title)["fieldConfig"]["defaults"]["custom"]["scaleDistribution"]["type"] == "log", title


def test_grafana_of_today_takes_the_schema():
    assert DASHBOARD["schemaVersion"] >= 39
    assert DASHBOARD["uid"] == "sharpwatch-run"
    assert "id" not in DASHBOARD  # Grafana gives it


def test_provisioning_files_name_a_folder_and_a_source():
    provider = yaml.safe_load((GRAFANA / "provisioning/dashboards/sharpwatch.yml").read_text())["providers"][0]
    assert provider["type"] == "file"
    assert provider["options"]["path"].startswith("/")
    source = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"][0]
    assert source["type"] == "prometheus"
    scrape = yaml.safe_load((GRAFANA.parent / "deploy/prometheus/prometheus.yml").read_text())["global"]
    assert source["jsonData"]["timeInterval"] == scrape["scrape_interval"]
