"""Twins and references in a daemon that is a process of its own, through a kill; trainers speak the wire by hand."""

from __future__ import annotations

import signal

import grpc
import numpy as np
import pytest

from sharpwatch.v1 import operator_pb2 as pb

AT = 200  # where runs have a bad batch


def losses(seed: int, spike: bool) -> np.ndarray:
    """Of steps 1 to 230."""
    made = 3.0 + 0.03 * np.random.default_rng(seed).standard_normal(230)
    made[AT - 1 : AT + 5] += 0.6 * spike
    return made


async def send(trainer, build, values: np.ndarray, first: int, last: int) -> None:
    """Send steps, and wait until they are journalled."""
    for step in range(first, last + 1):
        await trainer.send(build.sample(step, loss=float(values[step - 1])))
    await trainer.acknowledged(last)


def spike(detail: pb.RunDetail) -> pb.Alert | None:
    return next((alert for alert in detail.alerts if alert.name == "LossSpike"), None)


async def test_twins_tell_whose_doing_a_spike_is_also_after_a_kill(start, build):
    first = await start()
    daemon = first.client
    order = {"data_order": "seed 7"}
    run, calm, late = [await daemon.train(name, name, **order) for name in ("run", "calm", "late")]
    assert (await daemon.shown("run", lambda detail: detail.twins)).twins == ["calm", "late"]
    await send(calm, build, losses(2, spike=False), 1, 230)
    await send(late, build, losses(3, spike=True), 1, 150)
    await send(run, build, losses(1, spike=True), 1, AT + 5)
    found = spike(await daemon.shown("run", lambda detail: spike(detail) and "twin" in spike(detail).evidence))
    assert found.cause == "instability"
    assert found.evidence.endswith(f"not in its twin calm at step {found.onset}")
    await send(run, build, losses(1, spike=True), AT + 6, AT + 6)  # written with it, or after it
    assert await first.exit(signal.SIGKILL) == -signal.SIGKILL

    daemon = (await start()).client
    kept = spike((await daemon.operator.GetRun(pb.GetRunRequest(run="run"))).detail)
    assert (kept.id, kept.cause, kept.onset) == (found.id, found.cause, found.onset)
    assert kept.evidence.endswith(f"not in its twin calm at step {found.onset}")
    late = await daemon.train("late", "late", **order)
    await send(late, build, losses(3, spike=True), 151, AT + 5)
    judged = spike(await daemon.shown("run", lambda detail: spike(detail).cause == "data"))
    assert judged.evidence.endswith(f"also in run late at step {judged.onset}")
    detail = (await daemon.operator.GetRun(pb.GetRunRequest(run="run"))).detail
    assert (detail.data_order, list(detail.twins)) == ("seed 7", ["calm", "late"])
    late.call.cancel()


async def test_equal_first_losses_make_twins(daemon, build):
    one, other = [await daemon.train(name, name) for name in ("one", "other")]
    for trainer in (one, other):
        await send(trainer, build, losses(1, spike=False), 1, 3)
    detail = await daemon.shown("one", lambda detail: detail.twins)
    assert list(detail.twins) == ["other"]
    for trainer in (one, other):
        trainer.call.cancel()


async def test_a_reference_finds_a_silent_failure_also_after_a_kill(start, build):
    first = await start()
    daemon = first.client
    run, good = [await daemon.train(name, name) for name in ("run", "good")]
    await send(good, build, losses(2, spike=False), 1, 230)
    bad = losses(1, spike=False) + 0.3  # from its first step on: it never leaves its own band
    await send(run, build, bad, 1, 50)
    request = pb.SetReferenceRequest(run="run", reference="good", author="ann", reason="same recipe")
    answer = (await daemon.operator.SetReference(request, metadata=daemon.credentials)).reference
    assert (answer.name, answer.common_steps) == ("good", 50)
    assert await first.exit(signal.SIGKILL) == -signal.SIGKILL

    daemon = (await start()).client
    assert (await daemon.operator.GetRun(pb.GetRunRequest(run="run"))).detail.reference.common_steps == 50
    run = await daemon.train("run", "run")
    await send(run, build, bad, 51, 230)
    detail = await daemon.shown("run", lambda detail: detail.alerts and detail.alerts[0].severity == "critical")
    (found,) = detail.alerts
    assert (found.name, found.cause, found.onset, found.active) == ("SilentFailure", "silent", 1, True)
    assert "above the reference good from step 1 on" in found.evidence
    assert await daemon.metric('sharpwatch_alert_active{alert="SilentFailure"') == 1
    cleared = await daemon.operator.SetReference(
        pb.SetReferenceRequest(run="run", author="ann"), metadata=daemon.credentials
    )
    assert not cleared.HasField("reference")
    await daemon.shown("run", lambda detail: not detail.alerts[0].active and not detail.HasField("reference"))
    run.call.cancel()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"reference": "run"}, "reference must be another run than the one it is for, got 'run'"),
        ({"reference": "none"}, "no run 'none'"),
        ({"reference": "r"}, "must be named in full"),
        ({"reference": "", "steps": [1], "losses": [1.0]}, "steps must come with a reference"),
        ({"steps": [1, 2], "losses": [1.0]}, "got 2 steps and 1 losses"),
        ({"steps": [2, 1], "losses": [1.0, 1.0]}, r"steps must be 0 to 2\*\*53 and ascend"),
        ({"steps": [1], "losses": [float("nan")]}, "losses must be finite"),
        ({"steps": range(20_001), "losses": [1.0] * 20_001}, "at most 20000, got 20001 steps"),
        ({"author": ""}, "author must name who asks"),
    ],
)
async def test_a_reference_that_can_not_be_is_refused(daemon, changes, says):
    trainer = await daemon.train()
    request = pb.SetReferenceRequest(**{"run": "run", "reference": "old.csv", "author": "ann"} | changes)
    with pytest.raises(grpc.aio.AioRpcError, match=says):
        await daemon.operator.SetReference(request, metadata=daemon.credentials)
    with pytest.raises(grpc.aio.AioRpcError, match="token"):
        await daemon.operator.SetReference(request)
    trainer.call.cancel()
