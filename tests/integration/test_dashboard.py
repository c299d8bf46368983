"""Every query of the dashboard, asked as Grafana asks it, of a Prometheus that scrapes a daemon with a real run."""

from __future__ import annotations

import contextlib
import json
import math
import re
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import yaml

from sharpwatch.v1.agent_pb2 import AgentHealth, Hello, Sample, SessionRequest
from sharpwatch.v1.agent_pb2_grpc import AgentServiceStub
from sharpwatch.v1.types_pb2 import LayerBlock
from sharpwatch.wire import PROTOCOL, SKETCH_SIZE

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "grafana/sharpwatch-run.json").read_text(encoding="utf-8"))
CHARTS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
STEPS, BREAKS = 180, 150
BLOCKS = {"emb", "qk", "vo", "ffn", "norm", "other"}  # of GPT-2: positions are `other`, the head is tied

# A run in which something happens: a weight breaks, a policy cuts the rate. The last line is the loss at the end.
SCRIPT = """
import torch, sharpwatch
from transformers import GPT2Config, GPT2LMHeadModel
torch.set_num_threads(1)
torch.manual_seed(0)
config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
probes = ("gnb", "direction", "gradient_noise", "hutchinson", "lanczos", "linesearch", "preconditioned")
watch = sharpwatch.attach(model, optimizer, training_job="dashboard", run="broken", probe_every=4, probes=probes)
for step in range(STEPS):
    if step == BREAKS:
        with torch.no_grad():
            model.transformer.h[0].mlp.c_fc.weight[0, 0] = 300.0
    ids = torch.randint(64, (4, 16)).cummax(1).values  # rising numbers: there is something to learn
    losses = []
    for rows in ids.chunk(2):
        losses.append(model(input_ids=rows, labels=rows).loss)
        (losses[-1] / 2).backward()
    optimizer.step()
    optimizer.zero_grad()
watch.close()
print(sum(losses).item() / 2)
""".replace("STEPS", str(STEPS)).replace("BREAKS", str(BREAKS))

POLICIES = """
policies:
  - name: cut
    match: {alert: WeightJump}
    mode: enforce
    action: {kind: scale_lr, blocks: all, factor: 0.5}
    guard: {min_multiplier: 0.1, cooldown_steps: 2, max_actions_per_hour: 20}
"""


@dataclass
class Prometheus:
    """A running server."""

    url: str

    def api(self, path: str, **parameters: str) -> dict | list:
        query = urllib.parse.urlencode(parameters)
        try:
            url = f"{self.url}/api/v1/{path}?{query}"
            with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310 -- our own server, by http
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    def query(self, expression: str) -> list[dict]:
        return self.api("query", query=expression)["result"]

    def over_time(self, expression: str, end: float) -> list[dict]:
        """The ten minutes before `end`, as a panel sees them."""
        return self.api("query_range", query=expression, start=str(end - 600), end=str(end), step="1")["result"]

    def wait_for(self, expression: str) -> list[dict]:
        """What `expression` gives once it gives something; Prometheus tells nobody when it has scraped."""
        for _ in range(300):
            if result := self.query(expression):
                return result
            time.sleep(0.1)
        raise AssertionError(f"nothing after 30 s: {expression}")


@contextlib.contextmanager
def serve_prometheus(program: Callable[[str], str], target: str, folder: Path):
    """Prometheus under the configuration that we ship, but for the target and the pace."""
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(ROOT / "deploy/prometheus" / path) for path in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    folder.mkdir()
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    process = subprocess.Popen(
        [
            program("prometheus"),
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            "--web.listen-address=127.0.0.1:0",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        log, address = [], None
        for line in process.stderr:
            log.append(line)
            if found := re.search(r'msg="Listening on".* address=(\S+)', line):
                address = found[1]
            if "Server is ready" in line:
                break
        assert address, "".join(log)
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        process.wait(timeout=20)
        process.stderr.close()


def feed_dropping_run(address: str) -> None:
    """A run whose agent says that it has lost samples: a healthy one on this machine loses none."""
    layer_blocks = [LayerBlock(block="ffn", layer="layers.0", parameters=10)]
    hello = Hello(
        protocol=PROTOCOL,
        training_job="dashboard",
        run="dropping",
        attempt="1" * 32,
        layer_blocks=layer_blocks,
        blocks=["ffn"],
        control="none",
        min_multiplier=0.1,
        max_multiplier=10,
        sketch_size=SKETCH_SIZE,
    )
    health = AgentHealth(overhead_ratio=0.005, step_seconds=0.1, dropped={"spool_full": 7})
    sample = Sample(sequence=1, step=1, taken_at_unix_ns=time.time_ns(), loss=1.0, health=health)
    journalled = threading.Event()

    def requests():
        yield SessionRequest(hello=hello)
        yield SessionRequest(sample=sample)
        journalled.wait(timeout=20)

    with grpc.insecure_channel(address) as channel:
        for response in AgentServiceStub(channel).Session(requests()):
            assert response.WhichOneof("message") != "refusal", response
            if response.ack.sequence == 1:
                journalled.set()
    assert journalled.is_set()


def substituted(expression: str, run: str = "broken") -> str:
    """As Grafana fills in its variables."""
    for name, value in {"$training_job": "dashboard", "$run": run}.items():
        expression = expression.replace(name, value)
    assert not re.search(r"\$[^\d]", expression)  # "$1" is a group of label_replace
    return expression


def legend(template: str, series: dict) -> str:
    return re.sub(r"{{(\w+)}}", lambda found: series["metric"].get(found[1], ""), template)


def numbers(series: dict) -> list[float]:
    return [float(value) for _, value in series["values"]]


@pytest.mark.timeout(240)
def test_dashboard_shows_a_run(program, make_daemon, script, tmp_path, subtests):
    daemon = make_daemon(POLICIES)
    with serve_prometheus(program, daemon.http, tmp_path / "prometheus") as prometheus:
        loss = float(script(SCRIPT, daemon))
        feed_dropping_run(daemon.grpc)
        prometheus.wait_for('sharpwatch_run_info{run="broken", phase="closed"}')
        prometheus.wait_for('sharpwatch_run_step{run="dropping"}')
        now = time.time()
        drawn = {
            (panel["title"], target["refId"]): prometheus.over_time(substituted(target["expr"]), now)
            for panel in CHARTS
            for target in panel["targets"]
        }

        for panel in CHARTS:
            with subtests.test("every query returns data", panel=panel["title"]):
                check_panel(panel, drawn)
        with subtests.test("the numbers are the run's"):
            check_truth(drawn, loss)
        with subtests.test("the error bands lie about their lines"):
            check_bands(drawn)
        with subtests.test("what an agent dropped is shown"):
            (target,) = next(panel for panel in CHARTS if panel["title"] == "Dropped samples")["targets"]
            (series,) = prometheus.over_time(substituted(target["expr"], run="dropping"), now)
            assert (series["metric"], numbers(series)[-1]) == ({"reason": "spool_full"}, 7)
        with subtests.test("the variables offer the run"):
            check_variables(prometheus)
        with subtests.test("the alert reaches Prometheus"):
            rule = 'alertname=~"SharpwatchIncident(Critical|Missed)", alertstate="firing", severity="critical"'
            assert prometheus.query(f'max_over_time(ALERTS{{{rule}, run="broken"}}[10m])')
            assert not prometheus.query('ALERTS{alertname!~"SharpwatchIncident.*|SharpwatchOrderInverted"}')
        with subtests.test("all that is exported is documented"):
            exported = set(re.findall(r"^# TYPE (sharpwatch_\w+)", daemon.get("/metrics"), re.MULTILINE))
            documented = set(re.findall(r"^\| `(\w+)`", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE))
            assert exported <= documented


def check_panel(panel: dict, drawn: dict) -> None:
    names = []
    for target in panel["targets"]:
        found = drawn[panel["title"], target["refId"]]
        assert found, target["expr"]
        assert all(any(map(math.isfinite, numbers(series))) for series in found), target["expr"]
        by = target["legendFormat"] or "{{culprit}} {{name}} {{severity}} {{cause}}"  # a table has a row for each
        names += [legend(by, series) for series in found]
    # Colours and bands go by name; a name that stands twice or is empty gets none.
    assert len(set(names)) == len(names)
    assert all(names)


def check_truth(drawn: dict, loss: float) -> None:
    assert numbers(drawn["Loss", "A"][0])[-1] == pytest.approx(loss)
    assert numbers(drawn["Step", "A"][0])[-1] == STEPS
    by_block = {series["metric"]["block"]: numbers(series) for series in drawn["Learning-rate multipliers", "A"]}
    assert by_block.keys() == BLOCKS
    assert all(values[-1] < 1 for values in by_block.values())  # the policy has cut
    assert "WeightJump" in {series["metric"].get("alert") for series in drawn["Alerts", "A"]}
    culprits = {series["metric"]["culprit"]: max(numbers(series)) for series in drawn["Block in trouble", "A"]}
    assert culprits["layers.0.ffn"] == 2  # critical
    (incident,) = (series for series in drawn["Open incidents", "A"] if series["metric"]["culprit"] == "layers.0.ffn")
    assert incident["metric"].items() >= {"run": "broken", "cause": "damaged-weight", "severity": "critical"}.items()
    assert set(numbers(incident)) == {BREAKS + 1}
    states = {series["metric"]["run"]: max(numbers(series)) for series in drawn["Incidents by run", "A"]}
    assert states == {"broken": 2, "dropping": 0}
    assert "scale_lr" in {series["metric"].get("action") for series in drawn["Decisions", "A"]}


def check_bands(drawn: dict) -> None:
    title = "Average sharpness by block, ± 2 standard errors"
    lines, uppers, lowers = (
        {series["metric"]["block"]: dict(series["values"]) for series in drawn[title, reference]} for reference in "ABC"
    )
    assert lines.keys() == uppers.keys() == lowers.keys() == BLOCKS
    for block, line in lines.items():
        for moment, value in line.items():
            assert 0 < float(lowers[block][moment]) <= float(value) <= float(uppers[block][moment])


def check_variables(prometheus: Prometheus) -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    for name, values in (("training_job", ["dashboard"]), ("run", ["broken", "dropping"])):
        match, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variables[name]["definition"]).groups()
        assert label == name
        assert prometheus.api(f"label/{label}/values", **{"match[]": substituted(match)}) == values
