"""`sharpwatch incidents`, `ack` and `show` with a daemon that has found something."""

from __future__ import annotations

import asyncio
import json
import math
import time

import grpc
import numpy as np
import pytest_asyncio

from sharpwatch import wire
from sharpwatch.v1 import agent_pb2
from sharpwatch.v1.agent_pb2_grpc import AgentServiceStub
from sharpwatch.v1.types_pb2 import LayerBlock

HELLO = agent_pb2.Hello(
    protocol=wire.PROTOCOL,
    training_job="job",
    run="gpt2-a1",
    attempt="first",
    layer_blocks=[
        LayerBlock(block=block, layer="layers.0", parameters=64, parameter_names=[f"h.0.{block}.{i}" for i in range(2)])
        for block in ("qk", "vo")
    ],
    blocks=["qk", "vo"],
    optimizer="AdamW",
    control="lr",
    min_multiplier=0.1,
    max_multiplier=10.0,
)


def sample(step):
    """A sample of a healthy step; the gradient of qk, and the loss of rank 2, are not finite at step 2."""
    tap = agent_pb2.Tap()
    for name in ("gradient_norm", "weight_norm", "update_rms", "learning_rate", "lr_multiplier"):
        getattr(tap, name).CopyFrom(wire.encode(np.ones(2), "float32"))
    tap.non_finite.CopyFrom(wire.encode(np.array([3 if step == 2 else 0, 0]), "int64"))
    if step == 2:
        tap.non_finite_parameter.CopyFrom(wire.encode([1, -1], "int32"))
    loss, broken = (math.nan, math.inf) if step == 2 else (3.5, 3.5)
    return agent_pb2.Sample(
        sequence=step,
        step=step,
        taken_at_unix_ns=time.time_ns(),
        loss=loss,
        tap=tap,
        rank_losses=wire.encode([3.5, 3.5, broken], "float32"),
    )


async def train(address, steps, journalled):
    async with grpc.aio.insecure_channel(address) as channel:
        session = AgentServiceStub(channel).Session()
        await session.write(agent_pb2.SessionRequest(hello=HELLO))
        for step in range(1, steps + 1):
            await session.write(agent_pb2.SessionRequest(sample=sample(step)))
        async for response in session:
            if response.HasField("ack") and response.ack.sequence >= steps:
                journalled.set()


@pytest_asyncio.fixture
async def trained(served, environ):
    """Trains so many steps; the session stays open."""
    assert served.returncode is None
    tasks = []

    async def run(steps):
        journalled = asyncio.Event()
        tasks.append(asyncio.create_task(train(environ["SHARPWATCH_ADDRESS"], steps, journalled)))
        await journalled.wait()

    yield run
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_an_incident_is_listed_and_acknowledged(trained, cli):
    await trained(3)
    status, out, err = await cli("incidents", "gpt2")
    assert (status, err) == (0, "")
    heading, row = out.splitlines()
    assert heading.split() == [
        *("id", "onset", "opened", "severity", "cause", "name", "culprit", "evidence", "acknowledged"),
    ]
    id_, onset, opened, *rest = row.split()
    assert (onset, opened) == ("2", "2")
    assert rest[:4] == ["critical", "non-finite", "NonFinite", "layers.0.qk"]
    assert row.endswith("–")

    status, out, err = await cli("ack", id_[:-1])
    assert (status, out) == (1, "")
    assert id_ in err
    status, out, err = await cli("ack", id_, "--reason", "bad shard", "--dry-run")
    assert (status, err) == (0, "")
    what = f"AcknowledgeIncident incident_id {id_}, author ada@node3, reason bad shard"
    assert out.endswith(f"{what}; incident NonFinite of run gpt2-a1\n")
    assert (await cli("incidents", "gpt2"))[1].splitlines()[1].endswith("–")
    status, out, err = await cli("ack", id_, "--reason", "bad shard")
    assert (status, err) == (0, "")
    assert out == f"incident {id_} of gpt2-a1 (NonFinite) acknowledged: ada@node3: bad shard\n"

    status, out, _ = await cli("incidents", "gpt2-a1", "--json")
    assert status == 0
    listed = json.loads(out)
    assert listed["run"] == "gpt2-a1"
    (incident,) = listed["incidents"]
    assert (incident["id"], incident["onset"], incident["first_step"]) == (id_, 2, 2)
    assert (incident["cause"], incident["layer_blocks"], incident["active"]) == ("non-finite", ["layers.0.qk"], True)
    assert (incident["parameter"], incident["rank"]) == ("h.0.qk.1", 2)
    assert incident["acknowledged"] == "ada@node3: bad shard"

    status, out, _ = await cli("show", "gpt2-a1")
    assert status == 0
    (shown,) = [line for line in out.splitlines() if line.startswith("NonFinite")]
    assert shown.split()[:5] == ["NonFinite", "critical", "non-finite", "layers.0.qk", "(h.0.qk.1);"]
    assert shown.split()[5:9] == ["rank", "2", "2", "2"]


async def test_a_closed_incident_is_listed_with_all(trained, cli):
    await trained(40)
    assert await cli("incidents", "gpt2-a1") == (0, "no open incident; 1 closed, see --all\n", "")
    status, out, _ = await cli("incidents", "gpt2-a1", "--all")
    assert status == 0
    assert "(closed: no finding for 20 samples)" in out


async def test_no_such_run_and_no_such_incident(trained, cli):
    await trained(1)
    assert await cli("incidents", "gpt2-a1") == (0, "no incident\n", "")
    assert await cli("incidents", "llama") == (
        1,
        "",
        "sharpwatch: no run 'llama'; the daemon knows gpt2-a1\n",
    )
    status, out, err = await cli("ack", "nothing", "--json")
    assert (status, out) == (1, "")
    assert "nothing" in err


async def test_a_silence_is_added_listed_and_expired(trained, cli):
    await trained(1)
    assert await cli("silence", "list") == (0, "no silence\n", "")
    status, out, err = await cli(
        "silence", "add", "gpt2-a1", "--cause", "data", "--for", "2h", "--comment", "moving it"
    )
    assert (status, err) == (0, "")
    _, id_, *matched, until, at = out.split()
    assert (" ".join(matched), until) == ("(run gpt2-a1, cause data)", "until")
    status, out, _ = await cli("silence", "list")
    assert (status, out.splitlines()[1].split()[:5]) == (0, [id_, "run", "gpt2-a1,", "cause", "data"])
    assert out.splitlines()[1].split()[6:] == [at, "active", "ada@node3", "moving", "it"]

    status, out, err = await cli("silence", "add", "gpt2", "--for", "2h", "--comment", "c")
    assert (status, out, "must be named in full" in err) == (1, "", True)
    assert await cli("silence", "expire", id_, "--reason", "moved") == (
        0,
        f"silence {id_} (run gpt2-a1, cause data) has ended\n",
        "",
    )
    assert await cli("silence", "list") == (0, "no silence\n", "")
    status, out, _ = await cli("silence", "list", "--all", "--json")
    (kept,) = json.loads(out)["silences"]
    assert (kept["id"], kept["active"], kept["comment"]) == (id_, False, "moving it")
    assert (kept["expired_by"], kept["expired_reason"]) == ("ada@node3", "moved")


async def test_a_reference_is_set_printed_and_cleared(trained, cli, tmp_path):
    await trained(40)
    assert await cli("reference", "gpt2") == (0, "gpt2-a1: no reference\n", "")
    log = tmp_path / "good.csv"
    log.write_text("step,loss\n" + "".join(f"{step},{3.0}\n" for step in range(1, 32)))  # of which step 2 has no loss
    shown = f"{log}: loss 0.5 ± 0 from it over the newest of 30 common steps"
    assert await cli("reference", "gpt2-a1", str(log), "--reason", "trains") == (0, f"gpt2-a1: {shown}\n", "")
    assert await cli("reference", "gpt2") == (0, f"gpt2-a1: {shown}\n", "")
    status, out, _ = await cli("show", "gpt2-a1")
    assert status == 0
    assert any(line.split()[:2] == ["held", "against"] and shown in line for line in out.splitlines())
    status, out, _ = await cli("reference", "gpt2-a1", "--json")
    assert json.loads(out)["reference"]["common_steps"] == 30

    status, _, err = await cli("reference", "gpt2", str(log))  # what is changed is named in full
    assert (status, "must be named in full" in err) == (1, True)
    status, _, err = await cli("reference", "gpt2-a1", "gpt2-b")
    assert (status, "neither a run of the daemon nor a file that can be read" in err) == (1, True)
    status, _, err = await cli("reference", "gpt2-a1", "gpt2-a1")
    assert (status, "must be another run" in err) == (1, True)
    status, _, err = await cli("reference", "gpt2-a1", "x", "--clear")
    assert (status, "--clear goes without REFERENCE" in err) == (2, True)
    assert await cli("reference", "gpt2-a1", "--clear") == (0, "gpt2-a1: no reference\n", "")
    assert await cli("reference", "gpt2") == (0, "gpt2-a1: no reference\n", "")
