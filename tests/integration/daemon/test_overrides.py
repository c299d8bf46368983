"""Thresholds of one run that are not those of all: by its labels, also after a restart."""

from __future__ import annotations

import asyncio

import pytest

from sharpwatch.cli.main import main
from sharpwatch.v1 import operator_pb2 as pb

DETECTION = {
    "stall_after": 3600,
    "overrides": [
        {"match": {"team": "nlp"}, "pages_per_10k_steps": 2, "stall_after": 1},
        {"match": {"run": "plain"}, "warnings_per_10k_steps": 5},
    ],
}


async def overrides(daemon, run: str) -> list[tuple[str, float, dict[str, str]]]:
    detail = (await daemon.operator.GetRun(pb.GetRunRequest(run=run))).detail
    return [(each.key, each.value, dict(each.match)) for each in detail.overrides]


@pytest.mark.usefixtures("as_operator")
async def test_a_run_with_the_label_stalls_by_its_own_threshold_and_says_so(running, build, capsys):
    async with running(detection=DETECTION) as daemon:
        labelled = await daemon.train("one", "one-1", labels={"team": "nlp"})
        plain = await daemon.train("plain", "plain-1")
        for trainer in (labelled, plain):
            await trainer.send(build.sample(1))
            await trainer.acknowledged(1)
        detail = await daemon.shown("one", lambda shown: [one.name for one in shown.alerts] == ["RunStalled"])
        assert detail.labels == {"team": "nlp"}
        other = (await daemon.operator.GetRun(pb.GetRunRequest(run="plain"))).detail
        assert list(other.alerts) == []
        await labelled.leave()
        await plain.leave()
    async with running(detection=DETECTION) as daemon:  # a restart, before any trainer has come back
        nlp = {"team": "nlp"}
        assert await overrides(daemon, "one") == [("pages_per_10k_steps", 2.0, nlp), ("stall_after", 1.0, nlp)]
        assert await overrides(daemon, "plain") == [("warnings_per_10k_steps", 5.0, {"run": "plain"})]
        assert await asyncio.to_thread(main, ["show", "one", "--address", daemon.grpc]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "labels team=nlp" in out
        assert "pages_per_10k_steps 2, by the override for team=nlp" in out


async def test_a_label_that_no_run_can_have_is_refused(running, build):
    async with running() as daemon:
        trainer = daemon.connect()
        await trainer.send(build.hello(labels={"run": "mine"}))
        _, details = await trainer.ended()
        assert "label 'run' is every run's own" in details
