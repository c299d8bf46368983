"""What an answer about a run holds, however much there is of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hellos import run_hello

from sharpwatch.daemon.api.conversions import detail_message
from sharpwatch.daemon.ingest.samples import HealthReading
from sharpwatch.daemon.records import Checkpoint, Incident
from sharpwatch.daemon.runs.snapshot import RunSnapshot

MOST = 4 * 2**20  # bytes that a gRPC client takes, unless it is told otherwise
WIDE = "\U0001f600"  # 4 bytes
HELLO = run_hello({("emb", ""): 64, **{("qk", f"{WIDE * 240}{layer}"): 8 for layer in range(16_383)}})
SMALL = RunSnapshot(HELLO, "running", 1, "observe", 0, {}, step=7)


def incident(number: int, *, active: bool = False, evidence: str = "", layers: int = 1) -> Incident:
    return Incident(
        id=f"i{number}",
        run="run",
        name="LossSpike",
        names=("LossSpike",),
        cause="data",
        severity="critical",
        blocks=("qk",),
        layer_blocks=tuple(f"layers.{layer}.qk" for layer in range(layers)),
        evidence=(evidence,),
        onset=number,
        first_step=number,
        last_step=number,
        active=active,
    )


def test_what_fits_is_told_whole_and_in_its_order():
    incidents = tuple(incident(number, active=number == 3) for number in range(1_000))
    checkpoints = tuple(Checkpoint(step, f"file:///checkpoints/{step}") for step in range(1_000))
    detail = detail_message(replace(SMALL, incidents=incidents, incidents_in_all=1_234), checkpoints, ("twin",))
    assert [each.id for each in detail.alerts] == [each.id for each in incidents]
    assert [each.uri for each in detail.checkpoints] == [each.uri for each in checkpoints]
    assert (detail.alerts_total, detail.checkpoints_total, list(detail.twins)) == (1_234, 1_000, ["twin"])


def test_the_most_of_everything_stays_within_what_a_client_takes():
    text = WIDE * 4_096
    health = HealthReading(
        0.1,
        0.1,
        {WIDE * 250 + str(n): n for n in range(256)},
        (text,) * 256,
        0,
        objective=text[:300],
        objective_state=text[:300],
    )
    snapshot = replace(
        SMALL,
        health=health,
        incidents=tuple(incident(n, active=n % 100 == 0, evidence="x" * 4_000, layers=16_384) for n in range(1_000)),
        incidents_in_all=5_000,
        attention=np.ones(len(HELLO.layer_blocks)),
        attention_steps=(7,),
        failures={f"{name}: ZeroDivisionError": 3 for name in ("gnb", "direction")},
        cut_windows={"gnb": 9},
    )
    checkpoints = [Checkpoint(step, f"{WIDE * 4_000}{step}") for step in range(1_000)]
    detail = detail_message(snapshot, checkpoints, [WIDE * 250 + str(n) for n in range(999)])
    assert detail.ByteSize() < MOST
    assert (detail.alerts_total, detail.checkpoints_total) == (5_000, 1_000)
    # The newest of each, in their order; and what is open before what is closed.
    assert detail.checkpoints[-1].step == 999
    steps = [each.step for each in detail.checkpoints]
    assert steps == list(range(1_000 - len(steps), 1_000))
    told = [int(each.id[1:]) for each in detail.alerts]
    assert told == sorted(told)
    assert set(told) >= set(range(0, 1_000, 100))
    closed = [n for n in told if n % 100]
    assert closed == [n for n in range(closed[0], 1_000) if n % 100]
    assert len(closed) > 50
    # Of the daemon's own failures none is left out for those of the agent.
    assert list(detail.probe_failures)[:3] == [
        "gnb: ZeroDivisionError, in the daemon, whose log has it (×3)",
        "direction: ZeroDivisionError, in the daemon, whose log has it (×3)",
        "gnb: too large for its window in the daemon, which has lost 9 readings to keep its limit",
    ]
