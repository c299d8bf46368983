"""To whom the name of a run belongs: who is kept from it, who has it again after a restart, and how it is released."""

from __future__ import annotations

import hashlib
import sqlite3
from contextlib import closing

import grpc
import pytest

from sharpwatch.common.credentials import make_credential, write_credentials
from sharpwatch.daemon.ingest import hello as hellos
from sharpwatch.daemon.runs import run as runs
from sharpwatch.v1 import agent_pb2
from sharpwatch.v1 import operator_pb2 as pb

FORBIDDEN = grpc.StatusCode.PERMISSION_DENIED
RELEASE = pb.ReleaseRunRequest(run="run", author="ann", reason="its owner has left")


class Owners:
    """Credentials of agents by name, each for any job."""

    def __init__(self, path) -> None:
        self.path = path
        self.known, self.shown = {}, {}

    def add(self, name: str) -> None:
        token, self.known[name] = make_credential(name, "agent")
        self.shown[name] = (("authorization", f"Bearer {token}"),)
        write_credentials(self.path, [*self.known.values()])

    def revoke(self, name: str) -> None:
        del self.known[name]
        write_credentials(self.path, [*self.known.values()])


@pytest.fixture(autouse=True)
def _no_wait(monkeypatch):
    """A trainer whose stream has ended is not awaited; admission tests have that."""
    monkeypatch.setattr(hellos, "RECONNECT_SECONDS", 0.0)


@pytest.fixture
def owners(tmp_path):
    made = Owners(tmp_path / "credentials.yaml")
    for name in ("alice", "bob"):
        made.add(name)
    return made


@pytest.fixture
def guarded(running, owners):
    return lambda **changes: running(credentials=str(owners.path), **changes)


async def refused(daemon, build, metadata=None, attempt="a2", **changes) -> tuple[grpc.StatusCode, str]:
    trainer = daemon.connect(metadata)
    await trainer.send(build.hello(attempt=attempt, **changes))
    ended = await trainer.ended()
    assert "welcome" not in trainer.received
    return ended


async def trained(daemon, build, metadata=None, attempt="a1", leaves=True, **changes):
    """A trainer that has sent a sample, and is gone."""
    trainer = await daemon.train("run", attempt, metadata=metadata, **changes)
    await trainer.send(build.sample(1))
    await trainer.acknowledged(1)
    if leaves:
        await trainer.leave()
    return trainer


async def test_who_knows_an_attempts_id_alone_is_not_taken_for_its_trainer(daemon, build):
    trainer = await trained(daemon, build, secret=b"s" * 32, leaves=False)
    for secret in (b"", b"t" * 32):
        code, reason = await refused(daemon, build, attempt="a1", secret=secret)
        assert (code, reason) == (FORBIDDEN, "run run has another trainer, whose secret was not shown")
    assert await daemon.metric('sharpwatch_sessions_refused_total{reason="held_run"}') == 2
    trainer.call.cancel()
    again = await daemon.train(attempt="a1", secret=b"s" * 32)
    assert again.welcome.acknowledged_sequence == 1
    again.call.cancel()


async def test_a_secret_is_hashed_at_rest_and_what_an_agent_says_of_its_hash_is_ignored(daemon, build, tmp_path):
    forged = {"secret_sha256": b"forged", "credential": "alice"}
    trainer = await trained(daemon, build, secret=b"s" * 32, **forged)
    with closing(sqlite3.connect(tmp_path / "journal.db")) as journal:
        ((kept,),) = journal.execute("SELECT hello FROM attempts").fetchall()
    assert b"s" * 32 not in kept
    stored = agent_pb2.Hello.FromString(kept)
    assert (stored.secret, stored.secret_sha256, stored.credential) == (b"", hashlib.sha256(b"s" * 32).digest(), "")
    trainer.call.cancel()


async def test_without_credentials_a_restarted_trainer_has_its_run_again(running, build):
    """With a new secret, as each process has one: nobody who restarts a job may be kept from his run."""
    async with running() as daemon:
        await trained(daemon, build, secret=b"1" * 32)
        (await trained(daemon, build, attempt="a2", secret=b"2" * 32)).call.cancel()
    async with running() as daemon:  # from the journal
        (await trained(daemon, build, attempt="a3")).call.cancel()  # also an earlier agent, which has no secret


async def test_a_run_belongs_to_its_credential_also_while_it_has_no_trainer(guarded, owners, build):
    async with guarded() as daemon:
        await trained(daemon, build, owners.shown["alice"])
        code, reason = await refused(daemon, build, owners.shown["bob"])
        assert code is FORBIDDEN
        assert reason == (
            "run run belongs to alice; give this run another name, or have an operator release it: "
            "sharpwatch release run"
        )
        (await trained(daemon, build, owners.shown["alice"], attempt="a3")).call.cancel()
    async with guarded() as daemon:  # from the journal
        assert (await refused(daemon, build, owners.shown["bob"], attempt="a4"))[0] is FORBIDDEN
        owners.add("alice")  # another token of the same name
        (await trained(daemon, build, owners.shown["alice"], attempt="a5")).call.cancel()


async def test_a_run_of_a_credential_that_is_gone_is_free(guarded, owners, build):
    async with guarded() as daemon:
        await trained(daemon, build, owners.shown["alice"])
        owners.revoke("alice")
        (await trained(daemon, build, owners.shown["bob"], attempt="a2")).call.cancel()


async def test_a_run_from_before_there_were_credentials_goes_on_with_one(running, guarded, owners, build):
    async with running() as daemon:
        await trained(daemon, build)
    async with guarded() as daemon:
        await trained(daemon, build, owners.shown["alice"], attempt="a2")
        assert (await refused(daemon, build, owners.shown["bob"], attempt="a3"))[0] is FORBIDDEN
    async with running() as daemon:  # and without them again
        (await trained(daemon, build, attempt="a4")).call.cancel()


async def test_who_names_a_run_and_sends_nothing_does_not_keep_its_name(daemon, build):
    squatter = await daemon.train("run", "squat", training_job="other")
    code, _ = await refused(daemon, build)
    assert code is grpc.StatusCode.INVALID_ARGUMENT  # while it is there
    await squatter.leave()
    trainer = await trained(daemon, build, attempt="a3", leaves=False)
    assert await refused(daemon, build, attempt="squat", training_job="other") == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "wrong_run: run run belongs to training job job",
    )
    trainer.call.cancel()
    # Once trained, the name is the job's, also without a trainer.
    await daemon.shown("run", lambda detail: detail.run.phase == pb.RUN_PHASE_SILENT)
    assert (await refused(daemon, build, attempt="a5", training_job="other"))[0] is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_operator_releases_a_name(guarded, owners, build):
    async with guarded() as daemon:
        holder = await trained(daemon, build, owners.shown["alice"], secret=b"s" * 32, leaves=False)
        release, token = daemon.operator.ReleaseRun, {"metadata": daemon.credentials}
        asked = pb.ReleaseRunRequest(run="run", author="ann", dry_run=True)
        assert (await release(asked, **token)).run.run == "run"
        await holder.send(build.sample(2))  # a dry run has changed nothing
        await holder.acknowledged(2)
        assert (await release(RELEASE, **token)).run.training_job == "job"
        assert await holder.ended() == (FORBIDDEN, "run run was released by an operator")
        # Its courier tries again every few seconds, and must not have the name back before the next trainer comes.
        code, reason = await refused(daemon, build, owners.shown["alice"], attempt="a1", secret=b"s" * 32)
        assert (code, reason.partition(";")[0]) == (FORBIDDEN, "run run was released by an operator")
        trainer = await trained(daemon, build, owners.shown["bob"], attempt="a3")
        assert (await refused(daemon, build, owners.shown["alice"], attempt="a4"))[0] is FORBIDDEN
        events = (await daemon.operator.ListTransitions(pb.ListTransitionsRequest(run="run"))).events
        assert [(each.action, each.outcome, each.detail, each.author, each.reason) for each in events] == [
            ("release", "released", "alice", "ann", "its owner has left")
        ]
        trainer.call.cancel()


async def test_a_name_stays_released_over_a_restart_until_somebody_has_it(guarded, owners, build):
    async with guarded() as daemon:
        await trained(daemon, build, owners.shown["alice"])
        await daemon.operator.ReleaseRun(RELEASE, metadata=daemon.credentials)
    async with guarded() as daemon:
        await trained(daemon, build, owners.shown["bob"], attempt="a2")
    async with guarded() as daemon:
        assert (await refused(daemon, build, owners.shown["alice"], attempt="a3"))[0] is FORBIDDEN


@pytest.mark.parametrize("others", [1, runs.MAX_ATTEMPTS + 1])
async def test_who_was_released_does_not_come_back_once_the_next_has_left(running, build, others):
    secret = {"secret": b"s" * 32}
    async with running() as daemon:
        await trained(daemon, build, **secret)
        await daemon.operator.ReleaseRun(RELEASE, metadata=daemon.credentials)
        for number in range(others):
            await trained(daemon, build, attempt=f"next-{number}")
    async with running() as daemon:
        code, reason = await refused(daemon, build, attempt="a1", **secret)
        assert (code, reason.partition(";")[0]) == (FORBIDDEN, "run run was released by an operator")
        (await trained(daemon, build, attempt="next-0")).call.cancel()


async def test_a_run_whose_samples_were_too_old_to_keep_is_still_its_owners(guarded, owners, build, tmp_path):
    async with guarded() as daemon:
        trainer = await trained(daemon, build, owners.shown["alice"], leaves=False)
        rates = pb.SetLearningRatesRequest(run="run", multipliers={"qk": 0.5}, author="ann", reason="too sharp")
        await daemon.operator.SetLearningRates(rates, metadata=daemon.credentials)
        await trainer.leave()
    with closing(sqlite3.connect(tmp_path / "journal.db")) as journal, journal:
        journal.execute("DELETE FROM samples")  # as `retain_days` has it
    async with guarded() as daemon:
        assert (await refused(daemon, build, owners.shown["bob"]))[0] is FORBIDDEN
        code, _ = await refused(daemon, build, owners.shown["bob"], training_job="other")
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        (await trained(daemon, build, owners.shown["alice"], attempt="a3")).call.cancel()
        again = await daemon.operator.SetLearningRates(rates, metadata=daemon.credentials)
        kept = (await daemon.operator.ListRevisions(pb.ListRevisionsRequest(run="run"))).revisions
        assert [one.revision for one in kept] == [*range(1, again.decision.revision + 1)]
        assert (kept[0].multipliers["qk"], kept[0].reason) == (0.5, "too sharp")


async def test_only_an_operator_releases(guarded, owners, build):
    async with guarded() as daemon:
        await trained(daemon, build, owners.shown["alice"])
        for shown, code in ((None, grpc.StatusCode.UNAUTHENTICATED), (owners.shown["bob"], FORBIDDEN)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await daemon.operator.stub.ReleaseRun(RELEASE, metadata=shown)
            assert caught.value.code() is code
