"""A real Prometheus scrapes the daemon of a run that went wrong, and answers a query for each metric."""

from __future__ import annotations

import asyncio
import re
import signal
import socket

import pytest

from sharpwatch import wire
from sharpwatch.v1 import operator_pb2 as pb
from sharpwatch.v1 import types_pb2

POLICY = """
policies:
  - name: cut
    match: {alert: NonFinite}
    mode: enforce
    action: {kind: scale_lr, blocks: alert, factor: 0.5}
"""
SCRAPE = """
global: {{scrape_interval: 200ms, scrape_timeout: 200ms}}
scrape_configs:
  - job_name: sharpwatch
    static_configs: [{{targets: ["{target}"]}}]
"""
# DESIGN: every name that this daemon has a quantity for.
RUN_METRICS = [
    "run_info",
    "run_step",
    "run_loss",
    "run_last_sample_timestamp_seconds",
    "block_parameters",
    "block_sharpness",
    "block_sharpness_stderr",
    "block_hessian_trace",
    "block_hessian_trace_stderr",
    *(
        f"{of}{end}_eigenvalue{what}"
        for of in ("block_", "")
        for end in ("top", "bottom")
        for what in ("", "_stderr", "_residual")
    ),
    "stability_ratio",
    "stability_ratio_stderr",
    "block_stability_ratio",
    "block_stability_ratio_stderr",
    "block_effective_rank",
    "block_effective_rank_stderr",
    "block_drift",
    "block_drift_stderr",
    "block_gradient_alignment",
    "block_gradient_alignment_stderr",
    "block_gradient_norm",
    "block_weight_norm",
    "block_update_ratio",
    "block_update_rms",
    "block_learning_rate",
    "block_lr_multiplier",
    "block_order_correlation",
    "run_loss_max",
    "block_gradient_norm_max",
    "block_update_rms_max",
    "excursions_total",
    "incident",
    "incident_onset_step",
    "critical_incidents_total",
    "alert_active",
    "alerts_total",
    "decisions_total",
    "lr_revision",
    "agent_overhead_ratio",
    "agent_dropped_samples_total",
    "layer_sharpness",
    "layer_sharpness_stderr",
]
OWN_METRICS = [
    "samples_received_total",
    "samples_refused_total",
    "queue_depth",
    "queue_capacity",
    "ingest_to_metric_seconds_bucket",
    "estimate_seconds_bucket",
    "store_seconds_bucket",
    "sessions",
    "build_info",
    "store_writable",
]


@pytest.fixture
async def prometheus(program, tmp_path):
    """Start a Prometheus that scrapes `target`; returns its address."""
    started, readers = [], []

    async def start(target: str) -> str:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        config = tmp_path / "prometheus.yml"
        config.write_text(SCRAPE.format(target=target))
        command = (
            program("prometheus"),
            f"--config.file={config}",
            f"--storage.tsdb.path={tmp_path}/tsdb",
            f"--web.listen-address={address}",
        )
        process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        started.append(process)
        async for line in process.stderr:
            if b"Server is ready" in line:
                break
        readers.append(asyncio.create_task(process.stderr.read()))  # or the pipe fills
        return address

    yield start
    for process in started:  # none where it is not installed
        process.send_signal(signal.SIGTERM)
        await process.wait()
    await asyncio.gather(*readers)


async def in_trouble(daemon, build) -> None:
    """Train a run until every metric has a value: probes, a refused sample, an alert, a cut, its result."""
    trainer = await daemon.train()
    for sequence in range(1, 13):
        probes = {"gnb": build.gnb(sequence, along=0.9), "direction": build.direction(), **build.hessian(sequence)}
        await trainer.send(build.sample(sequence, **probes))
    await trainer.send(build.sample(13, taken_at_unix_ns=2**63))
    broken = build.tap()
    broken.non_finite.CopyFrom(wire.encode([0, 3, 0, 0, 0], "int64"))
    await trainer.send(build.sample(14, tap=broken))
    command = await trainer.next("command")
    assert command.set_multipliers.multipliers["qk"] == 0.5
    result = types_pb2.CommandResult(command_id=command.id, outcome=types_pb2.COMMAND_OUTCOME_APPLIED, step=15)
    await trainer.send(build.sample(15, results=[result]))
    await trainer.acknowledged(15)
    await daemon.shown("run", lambda detail: detail.run.step == 15)


async def query(daemon, address: str, expression: str) -> list[dict]:
    async with daemon.web.get(f"http://{address}/api/v1/query", params={"query": expression}) as response:
        answer = await response.json()
    assert answer["status"] == "success", answer
    return answer["data"]["result"]


async def test_prometheus_answers_for_every_metric(running, build, prometheus):
    async with running(policies=POLICY) as daemon:
        await in_trouble(daemon, build)
        address = await prometheus(daemon.http)
        _, text = await daemon.get("/metrics")
        families = re.findall(r"^# TYPE (sharpwatch_\w+) (\w+)$", text, re.MULTILINE)
        exported = {name for name, _ in families if re.search(rf"^{name}[{{_ ]", text, re.MULTILINE)}
        exported |= {f"sharpwatch_{name}" for name in (*RUN_METRICS, *OWN_METRICS)}
        for name in exported:
            suffix = "_bucket" if (name, "histogram") in families else ""
            async with asyncio.timeout(60):
                # Another process's clockwork: there is no event to wait on.
                while not await query(daemon, address, f"{name}{suffix}"):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)

        (step,) = await query(daemon, address, "sharpwatch_run_step")
        assert step["value"][1] == "15"
        (labels,) = [step["metric"]]
        assert (labels["training_job"], labels["run"], labels["job"]) == ("job", "run", "sharpwatch")
        (decision,) = await query(daemon, address, 'sharpwatch_decisions_total{outcome="applied"}')
        assert (decision["metric"]["action"], decision["metric"]["mode"]) == ("scale_lr", "enforce")
        (alert,) = await query(daemon, address, 'sharpwatch_alert_active{alert="NonFinite"}')
        assert (alert["metric"]["block"], alert["value"][1]) == ("qk", "1")
        for estimator in ("gnb", "hutchinson"):
            query_of = f'sharpwatch_block_sharpness{{estimator="{estimator}"}}'
            assert len(await query(daemon, address, query_of)) == 5
        kinds = await query(daemon, address, "sharpwatch_stability_ratio")
        assert {one["metric"]["kind"]: float(one["value"][1]) for one in kinds} == pytest.approx(
            {"directional": 0.25, "linesearch": 0.25, "preconditioned": 0.75}
        )


async def test_a_spike_of_one_step_is_there_at_the_next_scrape(running, build):
    async with running() as daemon:
        trainer = await daemon.train()
        usual = build.tap()
        spike = build.tap()
        spike.gradient_norm.CopyFrom(wire.encode([1, 1, 64, 1, 1], "float32"))
        for sequence, (tap, loss) in enumerate([(usual, 2.0), (spike, 9.0), (usual, 2.0)], 1):
            await trainer.send(build.sample(sequence, tap=tap, loss=loss))
        await trainer.acknowledged(3)
        await daemon.shown("run", lambda detail: detail.run.step == 3)
        assert await daemon.metric("sharpwatch_run_loss{") == 2.0
        for _ in range(2):  # a server's scrape takes nothing from another's
            assert await daemon.metric("sharpwatch_run_loss_max{") == 9.0
            _, text = await daemon.get("/metrics")
            norms = re.findall(r"^sharpwatch_block_gradient_norm_max\{.*\} (\S+)$", text, re.MULTILINE)
            assert max(map(float, norms)) == 64.0


async def test_promtool_checks_a_real_exposition(running, build, program):
    async with running(policies=POLICY) as daemon:
        await in_trouble(daemon, build)
        _, text = await daemon.get("/metrics")
    process = await asyncio.create_subprocess_exec(
        program("promtool"), "check", "metrics",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await process.communicate(text.encode())
    assert (process.returncode, output) == (0, b"")


async def test_an_alert_and_its_decision_survive_a_restart(running, build):
    async with running(policies=POLICY) as daemon:
        await in_trouble(daemon, build)
        before = (await daemon.operator.GetRun(pb.GetRunRequest(run="run"))).detail
    async with running(policies=POLICY) as daemon:
        after = (await daemon.operator.GetRun(pb.GetRunRequest(run="run"))).detail
        assert after.alerts == before.alerts
        assert len(after.alerts) == 1
        assert await daemon.metric('sharpwatch_alerts_total{alert="NonFinite"') == 1
        assert await daemon.metric("sharpwatch_critical_incidents_total{") == 1
        assert await daemon.metric("sharpwatch_lr_revision{") == 1
