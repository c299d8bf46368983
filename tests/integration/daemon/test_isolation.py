"""What one run sends costs no other run its memory, its estimates or its acknowledgements."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from contextlib import closing

import numpy as np
import pytest

from sharpwatch import wire
from sharpwatch.daemon.estimation import estimator
from sharpwatch.v1 import agent_pb2, types_pb2
from sharpwatch.v1 import operator_pb2 as pb

PATIENCE = 30  # seconds until a test is held to hang
ROWS = 5_000
MANY_LAYERS = [
    types_pb2.LayerBlock(block=block, layer=f"layers.{number}", parameters=64)
    for number in range(ROWS // 5)
    for block in ("emb", "qk", "ffn", "vo", "norm")
]


def drawn(detail) -> set[int]:
    """The steps of the estimates by gnb."""
    return {one.step for block in detail.blocks for one in block.estimates if one.estimator == "gnb"}


async def test_a_run_that_floods_probes_keeps_nobody_waiting(daemon, build, monkeypatch):
    """While one batch is estimated, however long it takes, all else goes on; each run's newest window is next."""
    begun, release = threading.Event(), threading.Event()
    batches = []

    def held(requests, device):
        batches.append([request.hello.run for request in requests if "gnb" in request.windows])
        begun.set()
        release.wait(PATIENCE)
        return estimate_all(requests, device)

    estimate_all = estimator.estimate_all
    monkeypatch.setattr(estimator, "estimate_all", held)
    flood, quiet = await daemon.train("flood", "f1"), await daemon.train("quiet", "q1")
    for sequence in range(1, 1_501):
        await flood.send(build.sample(sequence, gnb=build.gnb(sequence)))
    await asyncio.to_thread(begun.wait, PATIENCE)
    await flood.acknowledged(1_500)
    for sequence in range(1, 4):
        await quiet.send(build.sample(sequence, gnb=build.gnb(sequence)))
    await quiet.acknowledged(3)
    assert batches == [["flood"]]
    release.set()
    detail = await daemon.shown("quiet", lambda detail: 3 in drawn(detail))
    assert drawn(detail) == {3}
    await daemon.shown("flood", lambda detail: 1_500 in drawn(detail))
    # The second and last batch is of both runs' newest windows.
    assert sorted(name for batch in batches[1:] for name in batch) == ["flood", "quiet"]
    flood.call.cancel()
    quiet.call.cancel()


async def test_the_journal_has_an_estimate_of_each_window_that_was_estimated(running, build, monkeypatch, tmp_path):
    begun, release = threading.Event(), threading.Event()

    def held(requests, device):
        begun.set()
        release.wait(PATIENCE)
        return estimate_all(requests, device)

    estimate_all = estimator.estimate_all
    monkeypatch.setattr(estimator, "estimate_all", held)
    async with running() as daemon:
        trainer = await daemon.train()
        await trainer.send(build.sample(1, **build.hessian(0)))
        await asyncio.to_thread(begun.wait, PATIENCE)
        for sequence in range(2, 7):
            await trainer.send(build.sample(sequence, **build.hessian(sequence - 1), direction=build.direction()))
        await trainer.acknowledged(6)
        release.set()
        await daemon.shown("run", lambda detail: {one.step for one in detail.estimates} == {6})
        trainer.call.cancel()
    with closing(sqlite3.connect(tmp_path / "journal.db")) as journal:
        rows = journal.execute("SELECT estimator, block, step FROM estimates WHERE quantity != 'bottom_eigenvalue'")
        found = sorted(rows)
    # Blocks take turns, so that each has its own newest probe in the newest window, and none is left out or told twice.
    assert [each for each in found if each[0] == "lanczos"] == sorted(
        ("lanczos", block, step) for step, block in enumerate((*build.blocks, ""), 1)
    )
    # Of what all samples have, only the newest window is estimated.
    assert {step for name, block, step in found if (name, block) == ("direction", "")} == {6}


@pytest.mark.parametrize("curvature", [1e200, 1.7e308])
async def test_a_number_without_a_square_costs_its_run_alone_also_after_a_restart(running, build, curvature):
    async with running() as daemon:
        bad, good = await daemon.train("bad", "b1"), await daemon.train("good", "g1")
        for sequence in range(1, 6):
            probe = build.direction()
            probe.curvature = curvature * (-1) ** sequence
            await bad.send(build.sample(sequence, direction=probe))
            await good.send(build.sample(sequence, gnb=build.gnb(sequence), direction=build.direction()))
        await bad.acknowledged(5)
        await good.acknowledged(5)
        await daemon.shown("good", lambda detail: drawn(detail) == {5} and any(detail.estimates))
        assert await daemon.metric('sharpwatch_internal_errors_total{where="fold"}') is None
        assert await daemon.metric('sharpwatch_internal_errors_total{where="estimate"}') is None
        bad.call.cancel()
        good.call.cancel()
    async with running() as daemon:
        detail = await daemon.shown("good", lambda detail: drawn(detail) == {5})
        assert any(one.quantity == "stability_ratio" for one in detail.estimates)
        assert await daemon.metric('sharpwatch_internal_errors_total{where="estimate"}') is None


async def test_a_run_whose_estimates_fail_is_named_once_and_the_others_have_theirs(daemon, build, monkeypatch, capfd):
    def failing(requests, device):
        if any(request.hello.run == "bad" for request in requests):
            raise ZeroDivisionError("a defect")
        return estimate_all(requests, device)

    estimate_all = estimator.estimate_all
    monkeypatch.setattr(estimator, "estimate_all", failing)
    bad, good = await daemon.train("bad", "b1"), await daemon.train("good", "g1")
    for sequence in range(1, 6):
        for trainer in (bad, good):
            await trainer.send(build.sample(sequence, gnb=build.gnb(sequence)))
            await trainer.acknowledged(sequence)
        await daemon.shown("good", lambda detail, step=sequence: drawn(detail) == {step} or step == 1)
    detail = await daemon.shown("bad", lambda detail: any("×" in failure for failure in detail.probe_failures))
    (failure,) = detail.probe_failures
    assert failure.startswith("gnb: ZeroDivisionError, in the daemon, whose log has it")
    assert await daemon.metric('sharpwatch_internal_errors_total{where="estimate"}') >= 1
    out = "".join(capfd.readouterr())
    assert out.count("estimate_failed") == 1
    assert "a defect" in out
    bad.call.cancel()
    good.call.cancel()


async def test_a_window_that_is_too_large_is_cut_and_said_to_be(running):
    async with running(run_window_bytes=2**20) as daemon:
        trainer = await daemon.train("wide", "w1", layer_blocks=MANY_LAYERS)
        traces = np.random.default_rng(0).chisquare(4, (8, ROWS))  # 320 kB
        for sequence in range(1, 6):
            probe = agent_pb2.GnbProbe(tokens=8, rows=1, traces=wire.encode(traces * sequence, "float64"))
            await trainer.send(agent_pb2.Sample(sequence=sequence, step=sequence, loss=1.0, gnb=probe))
        await trainer.acknowledged(5)
        detail = await daemon.shown("wide", lambda detail: drawn(detail) == {5})
        (trace,) = [one for one in detail.blocks[0].estimates if (one.quantity, one.estimator) == ("trace", "gnb")]
        assert trace.draws == 3 * 8
        own = [row for row in range(ROWS) if row % 5 == 0]
        assert trace.value == pytest.approx(4 * traces[:, own].sum(1).mean())  # of the probes 3, 4 and 5
        expected = "gnb: too large for its window in the daemon, which has lost 2 readings to keep its limit"
        assert list(detail.probe_failures) == [expected]
        assert await daemon.metric('sharpwatch_window_readings_dropped_total{probe="gnb"}') == 2
        trainer.call.cancel()


async def test_a_run_that_saves_without_end_has_an_answer_that_a_client_takes(daemon, build):
    trainer = await daemon.train()
    for sequence in range(1, 21):
        saved = [types_pb2.Checkpoint(step=sequence, uri=f"/{'x' * 200}/{sequence}/{number}") for number in range(256)]
        await trainer.send(build.sample(sequence, checkpoints=saved))
    await trainer.acknowledged(20)
    # The channel is an ordinary one, which takes 4 MB.
    answer = await daemon.operator.GetRun(pb.GetRunRequest(run="run"))
    assert answer.detail.checkpoints_total == 1_000
    assert answer.detail.checkpoints[-1].uri == f"/{'x' * 200}/20/255"
    trainer.call.cancel()
