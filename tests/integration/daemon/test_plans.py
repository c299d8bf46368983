"""`sharpwatch lr plan` where the first stage has to wait for a command that the trainer has not answered yet."""

from __future__ import annotations

import asyncio
import json

import pytest

from sharpwatch.cli.main import main
from sharpwatch.v1 import operator_pb2 as pb

WAITS = (
    "stage 1 (vo) waits until no policy's change of rates is in force or judged, and no command is under way; it "
    "follows by itself"
)


@pytest.fixture
async def cli(running, build, tmp_path, capsys):
    """Run a command against a daemon with a run at step 1 whose trainer answers nothing: its status and its output."""
    async with running() as daemon:
        trainer = await daemon.train()
        await trainer.send(build.sample(1))
        await trainer.acknowledged(1)
        where = ("--address", daemon.grpc, "--token-file", str(tmp_path / "operator.token"))

        async def run(*words: str) -> tuple[int, str]:
            capsys.readouterr()  # the daemon's log
            status = await asyncio.to_thread(main, [*words, *where])
            return status, capsys.readouterr().out

        run.daemon = daemon
        yield run
        trainer.call.cancel()


PLAN = ("lr", "plan", "run", "--set", "vo=2,emb=4", "--no-wait")


async def test_a_plan_whose_first_stage_waits_says_so_and_for_what(cli):
    assert (await cli("lr", "set", "run", "qk=0.5", "--no-wait"))[0] == 0
    status, out = await cli(*PLAN, "--dry-run")
    assert (status, out.splitlines()[-1]) == (0, f"nothing would be sent yet: {WAITS}")
    assert json.loads((await cli(*PLAN, "--dry-run", "--json"))[1])["waits"] is True
    status, out = await cli(*PLAN)
    assert (status, out.splitlines()[-1]) == (0, f"nothing was sent yet: {WAITS}; see sharpwatch lr show run")
    made = (await cli.daemon.operator.ListDecisions(pb.ListDecisionsRequest(run="run"))).decisions
    assert [dict(one.multipliers)["vo"] for one in made] == [1.0]  # the set alone


async def test_one_whose_first_stage_is_sent_says_nothing_of_waiting(cli):
    draft = json.loads((await cli(*PLAN, "--dry-run", "--json"))[1])
    assert (draft["waits"], draft["plan"]["under_way"], draft["plan"]["state"]) == (False, "", "running")
    assert not (await cli.daemon.operator.ListDecisions(pb.ListDecisionsRequest(run="run"))).decisions
    status, out = await cli(*PLAN)
    assert (status, "nothing was sent" in out, "sent" in out) == (0, False, True)
