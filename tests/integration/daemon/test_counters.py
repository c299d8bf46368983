"""What counts for a run goes on after a restart where it was, in what Prometheus scrapes."""

from __future__ import annotations

import signal
import sqlite3
from contextlib import closing

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sharpwatch.v1 import operator_pb2 as pb
from sharpwatch.v1 import types_pb2


async def counters(daemon) -> dict[tuple, float]:
    """Every counter of the run, by its name and labels, but for the traffic, which is counted since the start."""
    _, text = await daemon.get("/metrics")
    return {
        (one.name, *sorted(one.labels.items())): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
        if family.type == "counter" and "run" in one.labels and family.name != "sharpwatch_received_bytes"
    }


def of(found: dict[tuple, float], name: str) -> float:
    return sum(value for key, value in found.items() if key[0] == f"sharpwatch_{name}_total")


@pytest.mark.parametrize("ended", [signal.SIGTERM, signal.SIGKILL])
async def test_the_counters_of_a_run_go_on_where_they_were(start, build, tmp_path, ended):
    first = await start()
    daemon = first.client
    trainer = await daemon.train()
    for sequence in range(1, 271):  # beyond a state of the run that is journalled
        spikes = {200: 1.15, 260: 1.15}
        await trainer.send(build.sample(sequence, tap=build.tap(spikes.get(sequence, 1.0 + 0.01 * (sequence % 5)))))
    for sequence in range(271, 276):
        await trainer.send(build.sample(sequence, loss=40.0))
    await trainer.acknowledged(275)
    rates = pb.SetLearningRatesRequest(run="run", multipliers={"qk": 0.5}, author="ann", reason="too sharp")
    await daemon.operator.SetLearningRates(rates, metadata=daemon.credentials)
    done = types_pb2.CommandResult(command_id=(await trainer.next("command")).id, outcome=1, step=276)
    await trainer.send(build.sample(276, results=[done]))
    await trainer.acknowledged(276)
    await daemon.shown("run", lambda detail: detail.run.step == 276 and detail.run.lr_revision == 1)
    await daemon.metric_reaches('sharpwatch_decisions_total{action="set_lr",mode="operator",outcome="applied"', 1)
    before = await counters(daemon)
    counted = {name: of(before, name) for name in ("alerts", "critical_incidents", "decisions", "excursions")}
    assert all(counted.values()), counted
    assert counted["decisions"] == 2  # sent, then applied
    assert await daemon.metric("sharpwatch_samples_received_total") == 276
    await first.exit(ended)
    if ended == signal.SIGKILL:  # also what lies after the newest state is folded again
        with closing(sqlite3.connect(tmp_path / "journal.db")) as journal:
            assert journal.execute("SELECT sequence FROM baselines").fetchone() == (250,)

    daemon = (await start()).client
    assert await counters(daemon) == before
    # What passes through the daemon.
    assert await daemon.metric("sharpwatch_samples_received_total") == 0
    assert await daemon.metric("sharpwatch_received_bytes_total") == 0
