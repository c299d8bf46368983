"""The command line with the daemon it starts: serve, doctor, and a learning rate that reaches a trainer."""

from __future__ import annotations

import asyncio
import json
import re
import time

import grpc
import pytest
import pytest_asyncio

from sharpwatch import wire
from sharpwatch.v1 import agent_pb2
from sharpwatch.v1.agent_pb2_grpc import AgentServiceStub
from sharpwatch.v1.types_pb2 import COMMAND_OUTCOME_APPLIED, Checkpoint, CommandResult, LayerBlock

HELLO = agent_pb2.Hello(
    protocol=wire.PROTOCOL,
    training_job="job",
    run="gpt2-a1",
    attempt="first",
    layer_blocks=[LayerBlock(block=block, layer="layers.0", parameters=64) for block in ("qk", "vo")],
    blocks=["qk", "vo"],
    optimizer="AdamW",
    control="lr",
    min_multiplier=0.1,
    max_multiplier=10.0,
    can_roll_back=True,
)


async def train(address, registered):
    """A trainer on the wire: one step a sample; it applies every command at the step after the newest."""
    async with grpc.aio.insecure_channel(address) as channel:
        session = AgentServiceStub(channel).Session()
        await session.write(agent_pb2.SessionRequest(hello=HELLO))
        step = 0

        async def sample(*results):
            nonlocal step
            step += 1
            taken = agent_pb2.Sample(
                sequence=step,
                step=step,
                taken_at_unix_ns=time.time_ns(),
                loss=3.5,
                results=results,
                checkpoints=[Checkpoint(step=1, uri=uri) for uri in ("/c/1a", "/c/1b") if step == 1],
            )
            await session.write(agent_pb2.SessionRequest(sample=taken))

        await sample()
        async for response in session:
            if response.HasField("ack"):
                registered.set()
            if response.HasField("command"):
                applied = CommandResult(
                    command_id=response.command.id,
                    outcome=COMMAND_OUTCOME_APPLIED,
                    step=step + 1,
                    unchanged_blocks=["vo"],
                )
                await sample(applied)


@pytest_asyncio.fixture
async def trainer(served, environ):
    assert served.returncode is None
    registered = asyncio.Event()
    task = asyncio.create_task(train(environ["SHARPWATCH_ADDRESS"], registered))
    await registered.wait()
    yield
    task.cancel()
    await asyncio.wait([task])


@pytest.mark.usefixtures("trainer")
async def test_a_learning_rate_reaches_the_trainer_and_is_undone(cli):
    status, out, err = await cli("lr", "set", "gpt2-a1", "qk=0.5", "vo=0.8", "--reason", "spikes")
    assert (status, err) == (0, "")
    assert out == "revision 1 applied at step 2: qk 0.5, vo 0.8\nunchanged: vo\n"
    status, out, err = await cli("lr", "undo", "gpt2-a1", "--reason", "calm again")
    assert (status, err) == (0, "")
    assert out.startswith("revision 2 applied at step 3: every block 1")
    status, out, _ = await cli("lr", "history", "gpt2", "--json")
    assert status == 0
    first, second = json.loads(out)["revisions"]
    assert (first["author"], first["reason"], first["applied_step"]) == ("ada@node3", "spikes", 2)
    assert (second["undoes"], second["reason"], second["applied_step"]) == (1, "calm again", 3)
    status, out, _ = await cli("decisions", "gpt2", "--json")
    assert status == 0
    assert [decision["revision"] for decision in json.loads(out)["decisions"]] == [2, 1]
    status, out, err = await cli("show", "gpt2")
    assert (status, err) == (0, "")
    assert "job, AdamW" in out
    status, out, err = await cli("mode", "gpt2-a1", "enforce", "--reason", "on call")
    assert (status, out, err) == (0, "gpt2-a1: enforce\n", "")
    status, out, _ = await cli("mode", "gpt2")
    assert (status, re.sub(r" at \S+Z", " at T", out)) == (0, "gpt2-a1: enforce, set by ada@node3 at T: on call\n")


@pytest.mark.usefixtures("trainer")
async def test_the_mode_observe_lists_what_stays_in_force(cli):
    """No policy gives a cut back any more."""
    await cli("lr", "set", "gpt2-a1", "qk=0.5")
    kept = "stays in force until somebody changes it: qk 0.5"
    _, out, _ = await cli("mode", "--all", "observe", "--dry-run")
    assert out.endswith(f"SetMode run gpt2-a1, mode observe, author ada@node3; {kept}\n")
    for which in (("--all",), ("gpt2-a1",)):
        assert await cli("mode", *which, "observe") == (0, f"gpt2-a1: observe; {kept}\n", "")
        assert await cli("mode", *which, "advise") == (0, "gpt2-a1: advise\n", "")
    await cli("lr", "undo", "gpt2-a1")
    assert await cli("mode", "gpt2-a1", "observe") == (0, "gpt2-a1: observe\n", "")


@pytest.mark.usefixtures("trainer")
async def test_the_audit_lists_what_became_of_every_decision(cli):
    assert await cli("decisions", "--audit") == (0, "no decision yet\n", "")
    for change in (("set", "gpt2-a1", "qk=0.5", "--reason", "spikes"), ("undo", "gpt2-a1")):
        assert (await cli("lr", *change))[0] == 0
    status, out, err = await cli("decisions", "gpt2", "--audit")
    assert (status, err) == (0, "")
    heading = out.splitlines()[0].split()
    assert heading == ["at", "step", "id", "run", "action", "outcome", "by", "why"]
    assert [" ".join(line[line.index("set_lr") :].split()) for line in out.splitlines()[1:]] == [
        "set_lr sent ada@node3 spikes",
        "set_lr applied ada@node3 spikes; unchanged: vo; applied at step 2",
        "set_lr sent ada@node3 undo of revision 1",
        "set_lr applied ada@node3 undo of revision 1; unchanged: vo; applied at step 3",
    ]
    status, out, _ = await cli("decisions", "gpt2", "--audit", "--limit", "1", "--json")
    answer = json.loads(out)
    (decision,) = answer["decisions"]
    assert [(one["decision_id"], one["outcome"], one["author"]) for one in answer["transitions"]] == [
        (decision["id"], outcome, "ada@node3") for outcome in ("sent", "applied")
    ]
    assert all(one["at_unix_ns"] >= decision["made_at_unix_ns"] for one in answer["transitions"])


@pytest.mark.usefixtures("trainer")
async def test_what_the_daemon_refuses_is_one_line_and_exit_1(cli):
    for args, expected in (
        (("lr", "set", "gpt2-a1", "nope=0.5"), "nope"),
        (("lr", "set", "gpt2-a1", "qk=100"), "10"),
        (("lr", "undo", "gpt2-a1"), "revision"),
        (("rollback", "gpt2-a1", "--reason", "r", "--to-step", "0"), "checkpoint"),
        (("approve", "nothing"), "no decision 'nothing'"),
        (("lr", "set", "gpt2", "qk=0.5"), "got 'gpt2'; say which one is meant: gpt2-a1"),
        (("lr", "set", "bert", "qk=0.5"), "no run 'bert'"),
    ):
        status, out, err = await cli(*args)
        assert (status, out) == (1, ""), args
        assert err.startswith("sharpwatch: ")
        assert err.count("\n") == 1
        assert expected in err


@pytest.mark.usefixtures("trainer")
async def test_what_changes_a_run_takes_its_whole_name(cli):
    """Also where it is the only run: `RUN=; sharpwatch rollback "$RUN"` must not roll it back."""
    for command, given in (
        ("lr set RUN qk=0.5", "gpt2"),
        ("lr undo RUN", "g"),
        ("rollback RUN --reason r", ""),
        ("mode RUN enforce", "gpt2-a"),
    ):
        status, out, err = await cli(*(given if word == "RUN" else word for word in command.split()))
        assert (status, out) == (1, ""), command
        assert f"got {given!r}; say which one is meant: gpt2-a1" in err
    assert json.loads((await cli("decisions", "--json"))[1])["decisions"] == []
    assert await cli("mode", "gpt2") == (
        0,
        "gpt2-a1: observe, by the configuration\n",
        "",
    )  # to read, the beginning of a name is enough


@pytest.mark.usefixtures("trainer")
async def test_a_dry_run_prints_what_would_be_sent_and_changes_nothing(cli, environ, tmp_path):
    where = f"dry run at {environ['SHARPWATCH_ADDRESS']}, nothing is changed: "
    ada, back = "author ada@node3", "back to step 1 (/c/1b), skipping steps 1 to 2"
    log = tmp_path / "good.csv"
    log.write_text("step,loss\n1,3.0\n5,2.5\n")
    await cli("lr", "set", "gpt2-a1", "vo=0.9")
    await cli("lr", "set", "gpt2-a1", "qk=0.8", "--reason", "spikes")
    for args, expected in (
        (
            ("lr", "set", "gpt2-a1", "qk=0.5", "--ramp", "20", "--reason", "spikes"),
            (
                "SetLearningRates run gpt2-a1, multipliers qk 0.5, ramp_steps 20, author ada@node3, reason spikes; "
                "then in force: qk 0.5, vo 0.9"
            ),
        ),
        (
            ("lr", "undo", "gpt2-a1"),
            (
                "UndoLearningRates run gpt2-a1, author ada@node3; takes back revision 2 (qk 0.8, vo 0.9), by "
                "ada@node3: spikes; then in force: vo 0.9"
            ),
        ),
        (
            ("lr", "undo", "gpt2-a1", "--revision", "1"),
            (
                "UndoLearningRates run gpt2-a1, revision 1, author ada@node3; takes back revision 1 (vo 0.9), by "
                "ada@node3; then in force: every block 1"
            ),
        ),
        (
            ("reference", "gpt2-a1", str(log), "--reason", "trains"),
            f"SetReference run gpt2-a1, reference {log}, steps 2 from 1 to 5, {ada}, reason trains",
        ),
        (("reference", "gpt2-a1", "--clear"), f"SetReference run gpt2-a1, {ada}"),
        (
            ("rollback", "gpt2-a1", "--reason", "r", "--skip", "1:3", "--to-step", "1"),
            f"RequestRollback run gpt2-a1, to_step 1, skip_from_step 1, skip_to_step 3, {ada}, reason r; {back}",
        ),
        (("mode", "gpt2-a1", "enforce"), "SetMode run gpt2-a1, mode enforce, author ada@node3"),
        (("mode", "--all", "advise"), "SetMode run gpt2-a1, mode advise, author ada@node3"),
    ):
        assert await cli(*args, "--dry-run") == (0, f"{where}{expected}\n", ""), args
    status, out, _ = await cli("mode", "gpt2-a1", "enforce", "--dry-run", "--json")
    assert status == 0
    assert json.loads(out) == {
        "dry_run": True,
        "address": environ["SHARPWATCH_ADDRESS"],
        "calls": [
            {
                "call": "SetMode",
                "request": {"run": "gpt2-a1", "mode": "enforce", "author": "ada@node3", "reason": ""},
                "effect": "",
            }
        ],
    }
    assert await cli("mode", "gpt2") == (0, "gpt2-a1: observe, by the configuration\n", "")
    assert await cli("reference", "gpt2") == (0, "gpt2-a1: no reference\n", "")
    assert len(json.loads((await cli("decisions", "--json"))[1])["decisions"]) == 2


@pytest.mark.usefixtures("trainer")
async def test_a_dry_run_of_a_silence_shows_it_and_adds_or_ends_none(cli):
    add = ("silence", "add", "gpt2-a1", "--for", "2h", "--comment", "moving")
    status, out, err = await cli(*add, "--dry-run")
    assert (status, err) == (0, "")
    assert "AddSilence run gpt2-a1, duration_seconds 7200, author ada@node3, reason moving; until 20" in out
    assert await cli("silence", "list") == (0, "no silence\n", "")
    added = json.loads((await cli(*add, "--json"))[1])["id"]
    status, out, _ = await cli("silence", "expire", added, "--dry-run")
    assert (status, f"ExpireSilence id {added}, author ada@node3; it holds until 20" in out) == (0, True)
    (kept,) = json.loads((await cli("silence", "list", "--json"))[1])["silences"]
    assert (kept["id"], kept["active"]) == (added, True)
    assert (await cli("silence", "expire", added))[0] == 0
    refused = await cli("silence", "expire", added)
    assert (refused[0], "has ended already" in refused[2]) == (1, True)
    assert await cli("silence", "expire", added, "--dry-run") == refused


@pytest.mark.usefixtures("trainer")
async def test_an_undo_says_what_it_takes_back(cli):
    await cli("lr", "set", "gpt2-a1", "qk=0.5", "--reason", "spikes")
    _, out, _ = await cli("lr", "undo", "gpt2-a1")
    assert out.splitlines()[-1] == "takes back revision 1 (qk 0.5), by ada@node3: spikes"
    status, _, err = await cli("lr", "undo", "gpt2-a1")
    assert (status, "has taken revision 1 back already, with revision 2" in err) == (1, True)
    _, out, _ = await cli("lr", "undo", "gpt2-a1", "--revision", "2")
    assert out.splitlines()[-1] == (
        "takes back revision 2 (every block 1), by ada@node3: undo of revision 1; it undid revision 1, which holds "
        "again"
    )


@pytest.mark.usefixtures("trainer")
async def test_a_dry_run_is_refused_as_the_command_itself_is(cli):
    """The same words where the daemon itself says them."""
    for args in (
        ("lr", "set", "gpt2-a1", "nope=0.5"),
        ("lr", "set", "gpt2", "qk=0.5"),
        ("lr", "set", "bert", "qk=0.5"),
        ("mode", "", "enforce"),
        ("mode", "bert", "enforce"),
        ("rollback", "gpt2-a1", "--reason", "r", "--to-step", "0"),
        ("approve", "nothing"),
        ("reject", ""),
        ("ack", "nothing"),
        ("silence", "add", "gpt2-a1", "--cause", "dat", "--for", "1h", "--comment", "c"),
        ("silence", "expire", "nothing"),
        ("reference", "bert", "--clear"),
        ("lr", "set", "gpt2-a1", "qk=100"),  # out of the run's lr_bounds
        ("lr", "undo", "gpt2-a1"),
        ("lr", "pause", "gpt2-a1"),
    ):
        refused = await cli(*args)
        assert refused[0] == 1
        assert await cli(*args, "--dry-run") == refused, args
    made = json.loads((await cli("lr", "set", "gpt2-a1", "qk=0.5", "--json"))[1])["id"]
    await cli("lr", "undo", "gpt2-a1")
    for args in (
        ("lr", "undo", "gpt2-a1", "--revision", "1"),  # what was before it is in force
        ("approve", made),
        ("reject", made[:-1]),
        ("cancel", made),
    ):
        refused = await cli(*args)
        assert refused[0] == 1
        assert await cli(*args, "--dry-run") == refused, args


@pytest.mark.usefixtures("trainer")
async def test_a_shell_completes_the_names_that_the_daemon_knows(cli, environ):
    environ |= {"_SHARPWATCH_COMPLETE": "bash_complete", "COMP_WORDS": "sharpwatch lr set gp", "COMP_CWORD": "3"}
    assert await cli() == (0, "plain,gpt2-a1\n", "")
    environ["SHARPWATCH_ADDRESS"] = "unix:/nowhere"
    assert await cli() == (0, "\n", "")


@pytest.mark.usefixtures("served")
async def test_doctor_of_a_healthy_daemon(cli):
    status, out, err = await cli("doctor", "--json")
    assert (status, err) == (0, "")
    checks = {check["check"]: check["state"] for check in json.loads(out)["checks"]}
    wanted = ("token file", "daemon", "role", "store", "metrics", "clock")
    assert {name: checks[name] for name in wanted} == dict.fromkeys(wanted, "ok")


async def test_check_config_names_file_line_and_key(cli, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("daemon:\n  grpc: 127.0.0.1:7741\n  grcp: x\n")
    status, out, err = await cli("check-config", str(config))
    assert (status, out) == (1, "")
    assert err.startswith(f"sharpwatch: {config}:3: daemon.grcp: ")
    config.write_text("daemon: {grpc: '127.0.0.1:7741'}\n")
    status, out, _ = await cli("check-config", str(config), "--json")
    assert status == 0
    assert json.loads(out)["daemon"]["grpc"] == "127.0.0.1:7741"
