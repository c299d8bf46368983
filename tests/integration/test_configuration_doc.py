"""docs/reference/configuration.md has every key of the configuration, as the refusal of an unknown key lists them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCUMENT = (Path(__file__).parents[2] / "docs/reference/configuration.md").read_text(encoding="utf-8")
# A configuration with the unknown key `nope` in each of its sections.
UNKNOWN = {
    "## daemon": "daemon: {nope: 1}",
    "### tls": "daemon: {tls: {certificate: c, key: k, nope: 1}}",
    "## detection": "detection: {nope: 1}",
    "### overrides": "detection: {overrides: [{match: {team: nlp}, nope: 1}]}",
    "## notifications": "notifications: {nope: 1}",
    "## policies": "policies: [{name: a, match: {alert: LossSpike}, action: {kind: notify}, nope: 1}]",
    "### action": "policies: [{name: a, match: {alert: LossSpike}, action: {kind: notify, nope: 1}}]",
    "### guard": "policies: [{name: a, match: {alert: LossSpike}, action: {kind: notify}, guard: {nope: 1}}]",
    "## autopilot": "autopilot: {nope: 1}",
    "### curvature_share": "autopilot: {curvature_share: {nope: 1}}",
    "### stability_cap": "autopilot: {stability_cap: {target: 1, nope: 1}}",
    "## maintenance": "maintenance: [{from: '22:00', to: '06:00', nope: 1}]",
    "## gate": "gate: {nope: 1}",
}


@pytest.mark.parametrize("title", UNKNOWN)
def test_a_section_has_every_key(tmp_path, title):
    path = tmp_path / "sharpwatch.yaml"
    path.write_text(UNKNOWN[title])
    command = (sys.executable, "-m", "sharpwatch", "check-config", str(path))
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    keys = re.search(r"nope\b.*?allowed: ((?:\w+, )*\w+)", done.stderr)[1].split(", ")
    section = re.split(r"^#", DOCUMENT.partition(f"\n{title}\n")[2], flags=re.MULTILINE)[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == keys
