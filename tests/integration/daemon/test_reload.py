"""SIGHUP: a daemon takes up the rules of its configuration anew, or stays with those that it has."""

from __future__ import annotations

import signal

import pytest

from sharpwatch.v1 import operator_pb2 as pb

CUT = (
    "policies: [{name: cut, match: {alert: NonFinite}, mode: MODE, action: {kind: scale_lr, blocks: all, factor: 0.5}}]"
)


async def reloaded(process, event: str = "configuration_reloaded") -> dict:
    process.process.send_signal(signal.SIGHUP)
    return await process.event(event)


async def decided(daemon, build, trainer, sequence: int) -> list[tuple[str, str]]:
    """What policies decide on a loss that is not finite: their names and modes."""
    await trainer.send(build.sample(sequence, loss=float("inf")))
    await trainer.acknowledged(sequence)
    await daemon.shown("run", lambda detail: detail.run.step == sequence)
    made = (await daemon.operator.ListDecisions(pb.ListDecisionsRequest(run="run"))).decisions
    return [(one.policy, one.mode) for one in made]


async def shown_mode(daemon) -> str:
    return (await daemon.operator.GetRun(pb.GetRunRequest(run="run"))).detail.run.mode


async def test_policies_and_detection_are_taken_up_for_runs_that_go_on(start, build, configure):
    process = await start()
    daemon = process.client
    trainer = await daemon.train(labels={"team": "nlp"})
    await trainer.send(build.sample(1))
    await trainer.acknowledged(1)
    assert await shown_mode(daemon) == "observe"
    overrides = [{"match": {"team": "nlp"}, "pages_per_10k_steps": 0.5}]
    configure(policies=CUT.replace("MODE", "advise"), detection={"stall_after": 1, "overrides": overrides})
    assert await reloaded(process) | {"policies": ["cut"], "needs_restart": []} == process.log[-1]
    assert await shown_mode(daemon) == "advise"
    detail = (await daemon.operator.GetRun(pb.GetRunRequest(run="run"))).detail
    assert [(one.key, one.value) for one in detail.overrides] == [("pages_per_10k_steps", 0.5)]
    await daemon.shown("run", lambda detail: [one.name for one in detail.alerts if one.active] == ["RunStalled"])
    assert await decided(daemon, build, trainer, 2) == [("cut", "advise")]
    # A silence may name the new policy, and a run that begins now goes by it.
    silence = pb.AddSilenceRequest(policy="cut", duration_seconds=60, author="ann", reason="maintenance")
    await daemon.operator.AddSilence(silence, metadata=daemon.credentials)
    await daemon.train("other", "o1")
    other = await daemon.operator.GetRun(pb.GetRunRequest(run="other"))
    assert other.detail.run.mode == "advise"
    trainer.call.cancel()


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("policies: [{name: cut, match: {alert: NoSuch}, mode: advise, action: {kind: notify}}]\n", "NoSuch"),
        ("policies: [\n", "sharpwatch.yaml"),
        (None, "sharpwatch.yaml"),
    ],
)
async def test_a_file_that_can_not_be_used_is_refused_and_the_old_rules_stay(start, build, tmp_path, broken, says):
    process = await start(policies=CUT.replace("MODE", "advise"))
    daemon = process.client
    trainer = await daemon.train()
    await trainer.send(build.sample(1))
    file = tmp_path / "sharpwatch.yaml"
    if broken is None:
        file.unlink()
    else:
        file.write_text(broken)
    refused = await reloaded(process, "configuration_refused")
    assert (refused["level"], says in refused["reason"]) == ("error", True)
    assert await decided(daemon, build, trainer, 2) == [("cut", "advise")]
    trainer.call.cancel()


async def test_what_needs_a_restart_is_named_and_stays(start, configure, build):
    process = await start()
    daemon = process.client
    configure(
        policies=CUT.replace("MODE", "enforce"), http="127.0.0.1:1", store="sqlite:///elsewhere.db", log_level="debug"
    )
    reloaded_at = await reloaded(process)
    assert reloaded_at["needs_restart"] == ["daemon.http", "daemon.store", "daemon.log_level"]
    assert await daemon.get("/-/ready") == (200, "ready\n")
    about = await daemon.operator.GetDaemon(pb.GetDaemonRequest())
    assert (about.http_address, about.store.endswith("journal.db")) == (daemon.http, True)
    trainer = await daemon.train()
    await trainer.send(build.sample(1))
    await trainer.acknowledged(1)
    assert await shown_mode(daemon) == "enforce"
    trainer.call.cancel()


async def test_alerts_of_other_systems_are_those_that_the_new_policies_name(start, configure):
    process = await start()
    daemon = process.client
    alert = {
        "labels": {"alertname": "DiskSlow", "run": "run"},
        "startsAt": "2026-01-01T00:00:00Z",
        "endsAt": "0001-01-01T00:00:00Z",
        "fingerprint": "f1",
        "status": "firing",
    }

    async def told() -> str:
        url, message = f"http://{daemon.http}/api/v1/alerts", {"version": "4", "alerts": [alert]}
        async with daemon.web.post(url, json=message, headers=dict(daemon.credentials)) as response:
            return (await response.json())["alerts"][0]["result"]

    trainer = await daemon.train()
    assert await told() == "unnamed"
    configure(policies="policies: [{name: slow, match: {foreign: DiskSlow}, mode: observe, action: {kind: notify}}]")
    await reloaded(process)
    assert await told() == "begun"
    trainer.call.cancel()
