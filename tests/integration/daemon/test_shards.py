"""Several daemons that share a journal on PostgreSQL: who has which runs, and what becomes of those of a dead one."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import grpc
import pytest
from certificates import Authority
from daemons import free_port
from forked import COMMAND_LINE
from postgresql import postgresql_server
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from sharpwatch.agent.transport.courier_handle import CourierHandle
from sharpwatch.common.shards import Shard, held_by, shard_of
from sharpwatch.daemon.storage import shards
from sharpwatch.daemon.storage.journal import Journal
from sharpwatch.daemon.storage.schema import AttemptRow, PendingWrites, SampleRow
from sharpwatch.errors import JournalInUseError, ShardLostError, StoreError
from sharpwatch.v1 import agent_pb2
from sharpwatch.v1 import operator_pb2 as pb

PAGE = Path(__file__).parents[3] / "docs/scale.md"
# As in production, but sooner.
SOON = f"""
from sharpwatch.daemon import shard_keeper
shard_keeper.LOOK_SECONDS, shard_keeper.SILENT_SECONDS = 0.1, 1.0
{COMMAND_LINE}
"""


def rows(url: str, query: str) -> list[tuple]:
    with create_engine(url, poolclass=NullPool).begin() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(query)]


def name_on(shard: int, of: int) -> str:
    """The name of a run of that shard."""
    return next(name for name in (f"run-{number}" for number in count()) if shard_of(name, of) == shard)


def journal(url: str, shard: int, of: int) -> Journal:
    return Journal(url, retain_samples=1000, shard=Shard(shard, of))


@pytest.fixture
def url(postgresql):
    return postgresql.url()


@pytest.fixture
def place(start, url):
    """Starts daemons of shards, each at an address that is known before."""
    ports = [free_port() for _ in range(3)]

    class Placed:
        addresses = tuple(f"127.0.0.1:{port}" for port in ports)

        async def start(self, shard: int, of: int = 2, code: str = SOON, **changes):
            return await start(code, store=url, shard=f"{shard}/{of}", grpc=self.addresses[shard], **changes)

    return Placed()


@pytest.fixture
def command_line(place, tmp_path):
    """Runs a command with the addresses of the first daemons."""

    async def run(*arguments: str, of: int = 2) -> tuple[int, str, str]:
        target = ("--address", ", ".join(place.addresses[:of]), "--token-file", str(tmp_path / "operator.token"))
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        done = await asyncio.create_subprocess_exec(sys.executable, "-m", "sharpwatch", *target, *arguments, **options)
        out, err = await done.communicate()
        return done.returncode, out.decode(), err.decode()

    return run


class Agent:
    """A trainer's own transport, with its courier."""

    def __init__(self, addresses, run, build):
        self.client = CourierHandle(address=", ".join(addresses))
        self.client.send_hello(build.hello(run, f"attempt of {run}", secret=b"its own"))
        self._build = build
        self._sent = 0

    async def deliver(self, last: int) -> None:
        """Send the samples up to `last`, and wait until all are acknowledged."""
        self.send(last)
        while len(self.client._spool) or self.client._entrusted:
            await self._hear()
            self.client.flush()

    def send(self, last: int) -> None:
        """Send the samples up to `last`."""
        for sequence in range(self._sent + 1, last + 1):
            self.client.send(agent_pb2.SessionRequest(sample=self._build.sample(sequence)))
        self._sent = last

    async def commands(self) -> list[int]:
        """The revisions of the next commands that come."""
        while not (found := self.client.receive()):
            await self._hear()
        return [each.command.set_multipliers.revision for each in found]

    async def _hear(self) -> None:
        """Wait until the courier says something."""
        await asyncio.to_thread(self.client._courier.wait_ready, write=False, seconds=30.0)


@pytest.fixture
def train(place, build):
    agents = []

    def trained(run, of=2):
        agents.append(Agent(place.addresses[:of], run, build))
        return agents[-1]

    yield trained
    for agent in agents:
        agent.client.close()


async def shown(daemon, run: str, step: int) -> pb.RunDetail:
    return await daemon.client.shown(run, lambda detail: detail.run.step == step)


def sequences(url: str, run: str) -> list[int]:
    return [number for of, number in rows(url, "SELECT run, sequence FROM samples ORDER BY id") if of == run]


async def state(daemon, run: str) -> tuple:
    """What must be the same wherever the run is served."""
    operator = daemon.client.operator
    found = (await operator.GetRun(pb.GetRunRequest(run=run))).detail.run
    revisions = (await operator.ListRevisions(pb.ListRevisionsRequest(run=run))).revisions
    decisions = (await operator.ListDecisions(pb.ListDecisionsRequest(run=run))).decisions
    return found.lr_revision, found.mode, list(revisions), list(decisions)


async def test_runs_of_a_dead_daemon_go_on_with_another_one_and_come_back_to_it(place, train, url):
    first, second = await place.start(0), await place.start(1)
    mine, other = name_on(0, 2), name_on(1, 2)
    agent, neighbour = train(mine), train(other)
    await agent.deliver(20)
    await neighbour.deliver(20)
    await shown(first, mine, 20)
    await shown(second, other, 20)
    rates = pb.SetLearningRatesRequest(run=mine, multipliers={"qk": 0.5}, author="ann", reason="too sharp")
    mode = pb.SetModeRequest(run=mine, mode="enforce", author="ann", reason="night")
    await first.client.operator.SetMode(mode, metadata=first.client.credentials)
    await first.client.operator.SetLearningRates(rates, metadata=first.client.credentials)
    assert await agent.commands() == [1]
    before = await state(first, mine)
    assert before[:2] == (1, "enforce")
    assert [each.multipliers["qk"] for each in before[2]] == [0.5]
    agent.send(40)  # some are under way when it dies
    assert await first.exit(signal.SIGKILL) == -signal.SIGKILL
    assert (await second.event("shard_taken_over"))["shard"] == 0
    await agent.deliver(60)
    await shown(second, mine, 60)
    assert await state(second, mine) == before
    assert await agent.commands() == [1]  # again: nobody has said what became of it
    await neighbour.deliver(40)
    await shown(second, other, 40)
    assert sequences(url, mine) == list(range(1, 61))
    assert await second.client.metric('sharpwatch_shard_held{shard="0"}') == 1

    third = await place.start(0)
    agent.send(80)  # some are under way when it is handed over
    assert (await second.event("shard_handed_over"))["shard"] == 0
    await agent.deliver(100)
    await shown(third, mine, 100)
    assert await state(third, mine) == before
    assert sequences(url, mine) == list(range(1, 101))
    assert sequences(url, other) == list(range(1, 41))
    assert await second.client.metric('sharpwatch_shard_held{shard="0"}') == 0
    assert agent.client.dropped == neighbour.client.dropped == {}
    with pytest.raises(grpc.aio.AioRpcError, match=held_by(0, place.addresses[0])):
        await second.client.operator.GetRun(pb.GetRunRequest(run=mine))


async def test_a_shard_is_taken_by_one_of_several_and_agents_find_out_which(place, train, url):
    daemons = [await place.start(shard, 3) for shard in range(3)]
    run = name_on(2, 3)
    agent = train(run, 3)
    await agent.deliver(5)
    killed_at = datetime.now(UTC).isoformat()

    async def taken_over(daemon) -> dict:
        # They may have had the shard before its own daemon came.
        while (event := await daemon.event("shard_taken_over"))["timestamp"] < killed_at:
            pass
        return event

    assert await daemons[2].exit(signal.SIGKILL) == -signal.SIGKILL
    events = [asyncio.create_task(taken_over(each)) for each in daemons[:2]]
    (done,), (waiting,) = await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
    assert done.result()["shard"] == 2
    await agent.deliver(10)
    await shown(daemons[events.index(done)], run, 10)
    assert sequences(url, run) == list(range(1, 11))
    assert not waiting.done()
    for each in daemons[:2]:
        await each.exit(signal.SIGKILL)
    with pytest.raises(AssertionError, match="no shard_taken_over in"):
        await waiting


async def test_the_shard_of_a_daemon_that_stops_is_taken_without_waiting_for_its_silence(place, train, url):
    never = SOON.replace("1.0", "1e9")
    first, second = [await place.start(shard, code=never) for shard in range(2)]
    run = name_on(0, 2)
    agent = train(run)
    await agent.deliver(5)
    assert await first.exit(signal.SIGTERM) == 0
    assert (await second.event("shard_taken_over"))["shard"] == 0
    await agent.deliver(10)
    third = await place.start(0, code=never)
    assert (await second.event("shard_handed_over"))["shard"] == 0
    await agent.deliver(15)
    await shown(third, run, 15)
    assert sequences(url, run) == list(range(1, 16))


def failing_once(error: str) -> str:
    """A daemon whose second restore fails at first: that of a shard which it takes over."""
    return f"""
from sharpwatch.daemon.run_loader import RunLoader
from sharpwatch.errors import StoreError
bring_back_live, calls = RunLoader.bring_back_live, []
async def bring_back(*given):
    calls.append(given)
    if len(calls) == 2:
        raise {error}
    return await bring_back_live(*given)
RunLoader.bring_back_live = bring_back
{SOON}
"""


async def test_runs_of_another_shard_are_brought_back_once_the_journal_can_be_read(place, train):
    first = await place.start(0)
    run = name_on(0, 2)
    await train(run).deliver(5)
    second = await place.start(1, code=failing_once("StoreError('the journal is away')"))
    assert await first.exit(signal.SIGKILL) == -signal.SIGKILL
    assert (await second.event("not_restored"))["reason"] == "the journal is away"
    assert (await second.event("ready"))["runs"] == 1


async def test_an_error_in_bringing_back_another_shard_is_logged_and_counted(place):
    first = await place.start(0)
    second = await place.start(1, code=failing_once("KeyError('a bug')"))
    assert await first.exit(signal.SIGKILL) == -signal.SIGKILL
    assert "KeyError: 'a bug'" in (await second.event("not_restored"))["exception"]
    assert await second.client.metric('sharpwatch_internal_errors_total{where="restore"}') == 1


async def test_after_a_restart_of_the_database_each_daemon_has_its_own_shard_again(start, build):
    with postgresql_server(durable=True) as server:
        url, code = server.url(), SOON.replace("1.0", "8.0")  # as in production: longer than they need to reconnect
        daemons = [await start(code, store=url, shard=f"{shard}/2") for shard in range(2)]
        trainers = [await daemon.client.train(name_on(shard, 2), f"a{shard}") for shard, daemon in enumerate(daemons)]
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        for trainer in trainers:
            await trainer.send(build.sample(1))
            await trainer.acknowledged(1)
        for shard, daemon in enumerate(daemons):
            held = [await daemon.client.metric(f'sharpwatch_shard_held{{shard="{each}"}}') for each in range(2)]
            assert held == [shard == 0, shard == 1]
            await daemon.exit(signal.SIGKILL)  # one that stops in order is followed at once
            assert not [line for line in daemon.log if line["event"] == "shard_taken_over" and line["shard"] != 1]
        assert sequences(url, name_on(0, 2)) == sequences(url, name_on(1, 2)) == [1]


async def test_a_run_of_another_daemon_is_refused_with_the_address_of_that_one(place, build):
    first, second = await place.start(0), await place.start(1)
    run = name_on(1, 2)

    async def refused() -> tuple[grpc.StatusCode, str]:
        trainer = first.client.connect()
        await trainer.send(build.hello(run))
        return await trainer.ended()

    while (answer := await refused())[1] == f"run {run}: {held_by(1, '')}":
        pass  # it looks for the others every moment
    assert answer == (grpc.StatusCode.UNAVAILABLE, f"run {run}: shard 1 is held by {place.addresses[1]}")
    assert await first.client.metric('sharpwatch_sessions_refused_total{reason="other_shard"}')
    trainer = await second.client.train(run)
    await trainer.send(build.sample(1))
    await trainer.acknowledged(1)
    for daemon, names in ((first, []), (second, [run])):
        listed = await daemon.client.operator.ListRuns(pb.ListRunsRequest())
        assert [each.run for each in listed.runs] == names
    about = await first.client.operator.GetDaemon(pb.GetDaemonRequest())
    assert (about.shard, about.shards, about.shards_held) == (0, 2, [0])
    assert [await second.client.metric(f'sharpwatch_shard_held{{shard="{shard}"}}') for shard in (0, 1)] == [0, 1]
    mode = pb.SetModeRequest(run=run, mode="enforce", author="ann")
    forget = pb.ForgetRunRequest(run=run, author="ann")
    for call, request in ((first.client.operator.SetMode, mode), (first.client.operator.ForgetRun, forget)):
        with pytest.raises(grpc.aio.AioRpcError, match=held_by(1, place.addresses[1])):
            await call(request, metadata=first.client.credentials)


async def test_a_trainer_whose_list_lacks_the_daemon_of_its_run_says_so(place, train, caplog):
    for shard in range(2):
        await place.start(shard)
    run = name_on(1, 2)
    agent = train(run, 1)
    agent.send(1)
    while not agent.client.connection.refused:
        await agent._hear()
        agent.client.flush()
    listed, holder = place.addresses[:2]
    reason = f"UNAVAILABLE: run {run}: shard 1 is held by {holder}, which is not in address={listed}"
    assert agent.client.connection.reason == reason
    assert f"the daemon at {listed} does not take this run, which is not watched until it does: {reason}" in caplog.text


async def test_only_the_daemon_of_a_run_says_that_it_has_no_trainer(place):
    first, second = await place.start(0), await place.start(1)
    run = name_on(1, 2)
    trainer = await second.client.train(run)
    rates = pb.SetLearningRatesRequest(run=run, multipliers={"qk": 0.5}, author="ann", reason="too sharp")
    await second.client.operator.SetLearningRates(rates, metadata=second.client.credentials)

    async def waits(daemon) -> str:
        return (await daemon.client.operator.ListDecisions(pb.ListDecisionsRequest())).decisions[0].waits

    assert [await waits(daemon) for daemon in (first, second)] == ["", ""]
    await trainer.leave()
    while not await waits(second):
        pass  # until the session has ended there, too
    assert await waits(first) == ""


async def test_the_configuration_of_the_page_and_its_commands_work_as_printed(url, tmp_path):
    page = PAGE.read_text(encoding="utf-8")
    signed = Authority(tmp_path).sign("daemon")
    # The page's hosts are this one, at different ports.
    ports = {f"host-{shard}": free_port() for shard in range(2)}
    replaced = {
        "/etc/sharpwatch": str(tmp_path),
        "postgresql+psycopg://sharpwatch@db.example/sharpwatch": url,
        "0.0.0.0:9741": "0.0.0.0:0",
        "sharpwatch.yaml": str(tmp_path / "sharpwatch.yaml"),
        **{f"{host}:7741": f"127.0.0.1:{port}" for host, port in ports.items()},
    }

    def here(text: str) -> str:
        for there, ours in replaced.items():
            text = text.replace(there, ours)
        return text

    (tmp_path / "sharpwatch.yaml").write_text(here(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1]))
    assert (tmp_path / "daemon.pem", tmp_path / "daemon.key") == (signed.certificate, signed.key)
    made = re.findall(r"^    ((?:sharpwatch token|chmod) .*)$", page, re.MULTILINE)
    served = re.findall(r"^    (sharpwatch serve .*)$", page, re.MULTILINE)
    used = re.findall(r"^    ((?:export|sharpwatch doctor).*)$", page, re.MULTILINE)
    environment = {**os.environ, "PYTHON": sys.executable, "XDG_CONFIG_HOME": str(tmp_path)}

    async def shell(*lines: str):
        code = "\n".join(['set -e; sharpwatch() { "$PYTHON" -m sharpwatch "$@"; }', *map(here, lines)])
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "env": environment, "cwd": tmp_path}
        return await asyncio.create_subprocess_exec("bash", "-c", code, **pipes, start_new_session=True)

    assert await (await shell(*made)).wait() == 0
    daemons = []
    try:
        for line, port in zip(served, ports.values(), strict=True):
            daemons.append(await shell(f"{line} --grpc 0.0.0.0:{port}"))
        for daemon in daemons:
            while b'"ready"' not in (line := await daemon.stdout.readline()):
                assert line
        done = await shell(*used, "sharpwatch mode --all observe")
        out = (await done.communicate())[0].decode()
        assert (out.count("operator: may send commands"), out.endswith("there is no run\n")) == (2, True), out
        assert done.returncode == 0
    finally:
        for daemon in daemons:
            os.killpg(daemon.pid, signal.SIGTERM)
            await daemon.communicate()


async def test_a_silence_at_one_daemon_holds_at_all(place):
    first, second = await place.start(0), await place.start(1)
    request = pb.AddSilenceRequest(author="ann", reason="night", duration_seconds=600, cause="data")
    added = (await first.client.operator.AddSilence(request, metadata=first.client.credentials)).silence

    async def silences(daemon) -> list[str]:
        return [each.id for each in (await daemon.client.operator.ListSilences(pb.ListSilencesRequest())).silences]

    async with asyncio.timeout(30):
        while await silences(second) != [added.id]:
            pass
    expired = pb.ExpireSilenceRequest(id=added.id, author="bob", reason="day")
    await second.client.operator.ExpireSilence(expired, metadata=second.client.credentials)
    async with asyncio.timeout(30):
        while await silences(first):
            pass


async def test_a_silence_is_ended_at_a_daemon_that_has_not_looked_since_it_was_added(place):
    blind = SOON.replace("0.1, 1.0", "1e9, 1e9")
    first, second = [await place.start(shard, code=blind) for shard in range(2)]
    request = pb.AddSilenceRequest(author="ann", reason="night", duration_seconds=600, cause="data")
    added = (await first.client.operator.AddSilence(request, metadata=first.client.credentials)).silence
    expired = pb.ExpireSilenceRequest(id=added.id, author="bob", reason="day")
    answer = await second.client.operator.ExpireSilence(expired, metadata=second.client.credentials)
    assert (answer.silence.id, answer.silence.expired_by) == (added.id, "bob")
    expired.id = "none"
    with pytest.raises(grpc.aio.AioRpcError, match="no silence 'none'"):
        await second.client.operator.ExpireSilence(expired, metadata=second.client.credentials)


async def test_commands_find_the_daemon_of_a_run_and_say_what_is_missing(place, build, command_line):
    never = SOON.replace("1.0", "1e9")  # no shard is taken over
    daemons = [await place.start(shard, code=never) for shard in range(2)]
    runs = [name_on(shard, 2) for shard in range(2)]
    for daemon, run in zip(daemons, runs, strict=True):
        trainer = await daemon.client.train(run, run)
        await trainer.send(build.sample(1))
        await trainer.acknowledged(1)

    status, out, _ = await command_line("jobs", "--json")
    assert (status, [run["run"] for run in json.loads(out)["runs"]]) == (0, sorted(runs))
    assert (await command_line("mode", "--all", "observe"))[::2] == (0, "")
    for run in runs:
        assert await command_line("mode", run, "enforce") == (0, f"{run}: enforce\n", "")
        status, out, _ = await command_line("show", run, "--json")
        assert (status, json.loads(out)["run"]["mode"]) == (0, "enforce")
    status, out, _ = await command_line("decisions", "--audit")
    assert (status, all(run in out for run in runs)) == (0, True)
    status, out, _ = await command_line("silence", "add", runs[1], "--for", "1h", "--comment", "night", "--json")
    assert (status, json.loads(out)["run"]) == (0, runs[1])

    assert await daemons[1].exit(signal.SIGKILL) == -signal.SIGKILL
    for arguments in (("jobs",), ("top", "--once"), ("mode", "--all", "observe")):
        status, out, err = await command_line(*arguments)
        assert status == 1
        assert runs[0] in out
        assert f"no answer for shard 1, whose runs are missing ({place.addresses[1]} UNAVAILABLE)" in err
    assert (await command_line("show", runs[0]))[0] == 0
    status, _, err = await command_line("mode", runs[1], "observe")
    assert status == 1
    assert f"no daemon holds shard 1, which run {runs[1]} is of; {place.addresses[1]} did not answer" in err
    assert (await command_line("silence", "list"))[0] == 0


async def test_doctor_says_where_the_list_spells_an_address_otherwise_than_its_daemon(place, command_line):
    await place.start(0)
    advertised = place.addresses[1].replace("127.0.0.1", "localhost")
    await place.start(1, advertise=advertised)
    status, out, _ = await command_line("doctor", "--json")
    found = [(each["state"], each["found"]) for each in json.loads(out)["checks"] if each["check"] == "shard"]
    assert (status, found) == (
        0,
        [
            ("ok", f"0/2, advertised as {place.addresses[0]}"),
            ("warn", f"1/2, advertised as {advertised}, listed as {place.addresses[1]}"),
        ],
    )


async def test_a_list_without_all_daemons_is_refused_once_those_of_it_are_done(place, build, command_line):
    never = SOON.replace("1.0", "1e9")  # no shard is taken over
    daemons = [await place.start(shard, 3, code=never) for shard in range(3)]
    runs = [name_on(shard, 3) for shard in range(3)]
    for daemon, run in zip(daemons, runs, strict=True):
        trainer = await daemon.client.train(run, run)
        await trainer.send(build.sample(1))
        await trainer.acknowledged(1)
        assert (await command_line("mode", run, "enforce", of=3))[0] == 0
    for listed in (2, 1):
        wrong = f"the daemons have 3 shards, --address lists {listed}: list all, in the order of their shards"
        status, out, err = await command_line("mode", "--all", "observe", of=listed)
        assert (status, [run in out for run in runs]) == (1, [shard < listed for shard in range(3)])
        assert f"mode observe not set for all runs: {wrong}; no answer for shard" in err
        for arguments in (("jobs",), ("top", "--once"), ("show", runs[2])):
            status, _, err = await command_line(*arguments, of=listed)
            assert (status, wrong in err) == (1, True)
    for arguments in (("mode", runs[2], "observe"), ("lr", "set", runs[2], "qk=0.5", "--reason", "too sharp")):
        status, _, err = await command_line(*arguments, of=2)
        assert (status, f"run {runs[2]}: the daemons have 3 shards, --address lists 2: list all" in err) == (1, True)
        status, _, err = await command_line(*arguments, of=1)
        assert (status, held_by(2, place.addresses[2]) in err) == (1, True)
    modes = [(await state(daemon, run))[1] for daemon, run in zip(daemons, runs, strict=True)]
    assert modes == ["observe", "observe", "enforce"]


# The journal alone.


def test_daemons_of_another_number_of_shards_are_refused_while_any_runs(url, monkeypatch):
    monkeypatch.setattr(shards, "_LOCK_SECONDS", 0.1)
    with closing(journal(url, 0, 2)), closing(journal(url, 1, 2)):
        with pytest.raises(JournalInUseError, match=r"daemons of 2 shards, this one is shard 2/3; .* stop all of them"):
            journal(url, 2, 3)
        with pytest.raises(JournalInUseError, match="another daemon is using it"):
            Journal(url, retain_samples=1000)
    with closing(journal(url, 2, 3)), closing(journal(url, 0, 3)):
        assert [shard for (shard,) in rows(url, "SELECT shard FROM shards ORDER BY shard")] == [0, 1, 2]
    with (
        closing(Journal(url, retain_samples=1000)),
        pytest.raises(JournalInUseError, match="another daemon is using it"),
    ):
        journal(url, 0, 3)


def test_a_file_is_not_shared(tmp_path):
    with pytest.raises(StoreError, match=r"shard 0/2: the daemons share a journal on postgresql\+psycopg://"):
        journal(f"sqlite:///{tmp_path}/journal.db", 0, 2)


def test_a_second_daemon_of_a_shard_is_refused(url, monkeypatch):
    monkeypatch.setattr(shards, "_CLAIM_SECONDS", 0.1)
    with closing(journal(url, 0, 2)) as first:
        first.look("host-0:7741")
        with pytest.raises(
            JournalInUseError, match=r"shard 0/2 is held by host-0:7741, .*another daemon serve the same"
        ):
            journal(url, 0, 2)
        assert first.look("host-0:7741")[0].wanted


def test_only_a_shard_whose_daemon_is_gone_can_be_taken(url):
    with closing(journal(url, 0, 2)) as first:
        second = journal(url, 1, 2)
        assert not first.take(1, "host-0:7741")
        second._database._drop()  # as a process does that is killed
        while not first.take(1, "host-0:7741"):
            pass  # until the server has noticed
        assert [row.address for row in first.look("host-0:7741")] == ["host-0:7741"] * 2
        with pytest.raises(ShardLostError, match="another daemon has held shard 1 meanwhile"):
            second.write(PendingWrites())
        first.give(1)
        with closing(journal(url, 1, 2)):
            with pytest.raises(ShardLostError):
                second.write(PendingWrites())
            assert not first.take(1, "host-0:7741")


def test_a_daemon_that_leaves_says_that_it_holds_nothing(url):
    with closing(journal(url, 1, 2)) as second:
        with closing(journal(url, 0, 2)) as first:
            first.look("host-0:7741")
            assert all(row.holder for row in second.look("host-1:7741"))
        assert [(row.address, bool(row.holder)) for row in second.look("host-1:7741")] == [
            ("", False),
            ("host-1:7741", True),
        ]
        assert second.take(0, "host-1:7741")


def test_daemons_write_side_by_side_and_find_their_own_commits_again(url):
    with closing(journal(url, 0, 2)) as first, closing(journal(url, 1, 2)) as second:
        for number in range(1, 4):
            for each, run in ((first, "a"), (second, "b")):
                attempt = AttemptRow(run, run, b"hello", 100.0)
                sample = SampleRow(run, run, number, number, b"x", 100.0)
                each.write(PendingWrites(attempts={run: attempt}), [sample])
        first._database._drop()
        first.write(PendingWrites(), [SampleRow("a", "a", 4, 4, b"x", 100.0)])
        assert rows(url, "SELECT run, max(sequence) FROM samples GROUP BY run ORDER BY run") == [("a", 4), ("b", 3)]
        assert rows(url, "SELECT shard, number FROM commits ORDER BY shard") == [(0, 4), (1, 3)]
