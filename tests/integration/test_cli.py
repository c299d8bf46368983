"""The command line as a process, against an operator service over a real socket."""

# ruff: noqa: ARG002, N802 - a servicer's methods have the names and arguments of the service

from __future__ import annotations

import asyncio
import json
import os
import pty
import socket
import sys
from dataclasses import dataclass, field

import grpc
import pytest
import pytest_asyncio

from sharpwatch._version import __version__
from sharpwatch.cli.client import DaemonConnection, connected
from sharpwatch.errors import OperatorError
from sharpwatch.v1 import operator_pb2 as pb
from sharpwatch.v1.operator_pb2_grpc import OperatorServiceServicer, add_OperatorServiceServicer_to_server
from sharpwatch.v1.types_pb2 import Checkpoint, Estimate, Rollback

TOKEN = "opaque"  # noqa: S105 - of a daemon that lives as long as a test
NAMES = ("gpt2-a1", "gpt2-b7", "llama-c3")


def sent(id_, run, **fields):
    return pb.Decision(id=id_, run=run, outcome="sent", mode="operator", guard="ok", **fields)


@dataclass
class Operator(OperatorServiceServicer):
    """Three runs, and a trainer whose answer a test gives."""

    requests: list = field(default_factory=list)
    decisions: dict = field(default_factory=dict)
    answer: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    watched: asyncio.Event = field(default_factory=asyncio.Event)
    abandoned: asyncio.Event = field(default_factory=asyncio.Event)
    dry_runs: bool = False
    waits: str = ""  # that no trainer is there, in what is sent
    closed: set = field(default_factory=set)  # names of runs
    gone: set = field(default_factory=set)  # names of runs that the daemon has dropped by the time they are set

    async def _authorized(self, context):
        if ("authorization", f"Bearer {TOKEN}") not in context.invocation_metadata():
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "commands need the operator's token")

    def _keep(self, request, decision):
        self.requests.append(request)
        self.decisions[decision.id] = decision
        return decision

    async def GetDaemon(self, request, context):
        return pb.GetDaemonResponse(
            version=__version__,
            device="cpu",
            store="sqlite:///x.db",
            store_error="disk full",
            store_writable=False,
            runs=3,
            role="viewer",
            takes_dry_run=self.dry_runs,
        )

    async def ListRuns(self, request, context):
        runs = [
            pb.Run(
                run=name,
                training_job=name[:4],
                mode="observe",
                control="lr",
                step=2**40,
                phase=pb.RUN_PHASE_CLOSED if name in self.closed else pb.RUN_PHASE_SILENT,
            )
            for name in NAMES
        ]
        return pb.ListRunsResponse(runs=runs)

    async def GetRun(self, request, context):
        estimate = Estimate(quantity="sharpness", block="qk", value=3.4e-9, stderr=2e-10, draws=64, estimator="gnb")
        block = pb.Block(block="qk", parameters=64, learning_rate=3e-4, lr_multiplier=0.5, estimates=[estimate])
        run = pb.Run(run=request.run, training_job="job", mode="observe", lr_revision=2)
        return pb.GetRunResponse(detail=pb.RunDetail(run=run, blocks=[block]))

    async def SetLearningRates(self, request, context):
        await self._authorized(context)
        if "nope" in request.multipliers:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "block 'nope': the run has emb, qk, vo")
        decision = sent(
            "d1", request.run, action="set_lr", revision=3, multipliers=request.multipliers, waits=self.waits
        )
        return pb.SetLearningRatesResponse(decision=self._keep(request, decision))

    async def UndoLearningRates(self, request, context):
        await self._authorized(context)
        decision = sent("d2", request.run, action="set_lr", revision=4)
        return pb.UndoLearningRatesResponse(decision=self._keep(request, decision))

    async def RequestRollback(self, request, context):
        await self._authorized(context)
        back = Rollback(
            checkpoint=Checkpoint(step=400, uri="/c/400"),
            skip_from_step=request.skip_from_step,
            skip_to_step=request.skip_to_step,
        )
        decision = sent("d3", request.run, action="rollback", rollback=back)
        return pb.RequestRollbackResponse(decision=self._keep(request, decision))

    async def ListRevisions(self, request, context):
        new = pb.Revision(revision=2, multipliers={"qk": 0.5}, author="ada", reason="spikes", applied_step=9)
        return pb.ListRevisionsResponse(revisions=[new, pb.Revision(revision=1, author="bob")])

    async def SetMode(self, request, context):
        await self._authorized(context)
        if request.run in self.gone:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no run {request.run!r}")
        self.requests.append(request)
        return pb.SetModeResponse(run=pb.Run(run=request.run, mode=request.mode))

    async def ListDecisions(self, request, context):
        self.requests.append(request)
        reason = "r" * 1000
        found = [sent(f"d{n}", request.run or "any", reason=reason) for n in range(request.limit)]
        return pb.ListDecisionsResponse(decisions=found)

    async def ApproveDecision(self, request, context):
        await self._authorized(context)
        decision = sent(request.id, "gpt2-a1", action="scale_lr", revision=5, multipliers={"vo": 0.25})
        return pb.ApproveDecisionResponse(decision=self._keep(request, decision))

    async def RejectDecision(self, request, context):
        await self._authorized(context)
        decision = pb.Decision(id=request.id, action="scale_lr", outcome="rejected", multipliers={"vo": 0.25})
        return pb.RejectDecisionResponse(decision=self._keep(request, decision))

    async def WatchDecision(self, request, context):
        decision = self.decisions[request.id]
        yield pb.WatchDecisionResponse(decision=decision)
        self.watched.set()
        try:
            decision.MergeFrom(await self.answer)
        except asyncio.CancelledError:
            self.abandoned.set()
            raise
        yield pb.WatchDecisionResponse(decision=decision)


@pytest_asyncio.fixture
async def operator(tmp_path):
    """A service on loopback (`.address`) and on a socket (`.socket`)."""
    service = Operator()
    server = grpc.aio.server()
    add_OperatorServiceServicer_to_server(service, server)
    service.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    service.socket = f"unix:{tmp_path}/operator.sock"
    server.add_insecure_port(service.socket)
    await server.start()
    yield service
    await server.stop(None)


@pytest.fixture
def environ(tmp_path):
    token = tmp_path / "token"
    token.write_text(f"{TOKEN}\n")
    token.chmod(0o600)
    return {
        **os.environ,
        "HOME": str(tmp_path),
        "SHARPWATCH_AUTHOR": "ada@node3",
        "SHARPWATCH_TOKEN_FILE": str(token),
        "PYTHONWARNINGS": "error",
        "http_proxy": "http://127.0.0.1:1",  # nothing there: whoever obeys it fails
    }


@pytest.fixture
def start(operator, environ):
    """Starts `sharpwatch ARGS` against the service."""

    async def run(*args, **changes):
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sharpwatch", *args),
            env={**environ, "SHARPWATCH_ADDRESS": operator.address, **changes},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    return run


@pytest.fixture
def cli(start):
    """Runs `sharpwatch ARGS` to its end -> (status, stdout, stderr)."""

    async def run(*args, **changes):
        process = await start(*args, **changes)
        out, err = await process.communicate()
        return process.returncode, out.decode(), err.decode()

    return run


async def test_jobs_as_text_and_as_json(cli):
    status, out, err = await cli("jobs")
    assert (status, err) == (0, "")
    assert [line.split()[1] for line in out.splitlines()] == ["job", *NAMES]
    for argv in (("--json", "jobs"), ("jobs", "--json")):
        status, out, err = await cli(*argv)
        assert (status, err) == (0, "")
        assert [run["step"] for run in json.loads(out)["runs"]] == [2**40] * 3


async def test_lr_set_waits_for_the_trainer_and_says_what_it_did(operator, start):
    process = await start(
        "lr", "set", "gpt2-a1", "qk=0.5", "--reason", "spikes", "vo=1", "--ramp", "20", "--at-step", "410"
    )
    await operator.watched.wait()
    assert process.returncode is None
    operator.answer.set_result(pb.Decision(outcome="applied", applied_step=412, detail="unchanged: vo"))
    out, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert out.decode() == "revision 3 applied at step 412: qk 0.5, vo 1\nunchanged: vo\n"
    (request,) = operator.requests
    assert request == pb.SetLearningRatesRequest(
        run="gpt2-a1",
        multipliers={"qk": 0.5, "vo": 1.0},
        ramp_steps=20,
        apply_at_step=410,
        author="ada@node3",
        reason="spikes",
    )


async def test_a_trainer_that_has_just_started_is_waited_for(operator, start):
    operator.waits = "run gpt2-a1 has no trainer now: its next one gets it"
    process = await start("lr", "set", "gpt2-a1", "qk=0.5")
    await operator.watched.wait()
    operator.answer.set_result(pb.Decision(outcome="applied", applied_step=1))
    out, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert out.startswith(b"revision 3 applied at step 1: qk 0.5\n")


async def test_a_trainer_that_refuses_is_a_failure_that_says_why(operator, cli):
    operator.answer.set_result(pb.Decision(outcome="refused", detail="control is none"))
    status, out, err = await cli("lr", "set", "gpt2-a1", "qk=0.5", "--json")
    assert status == 1
    assert json.loads(out)["outcome"] == "refused"
    assert err == "sharpwatch: decision d1 refused: control is none\n"


async def test_a_trainer_that_never_answers_is_not_waited_for_for_ever(operator, cli):
    status, out, err = await cli("lr", "set", "gpt2-a1", "qk=0.5", "--timeout", "0.5")
    assert (status, out) == (3, "")
    assert err == (
        "sharpwatch: no answer from the trainer of gpt2-a1 within 0.5 s; decision d1 stays sent: "
        "see sharpwatch decisions gpt2-a1\n"
    )
    await operator.abandoned.wait()


async def test_interrupted_waiting_says_that_the_decision_stands(operator, start):
    process = await start("lr", "set", "gpt2-a1", "qk=0.5")
    await operator.watched.wait()
    process.send_signal(2)
    out, err = await process.communicate()
    assert (process.returncode, out) == (3, b"")
    assert err.decode().startswith("sharpwatch: stopped waiting; decision d1 stays sent")
    await operator.abandoned.wait()


async def test_no_wait_returns_at_once(operator, cli):
    status, out, _ = await cli("lr", "undo", "llama-c3", "--no-wait", "--reason", "enough")
    assert (status, out) == (0, "revision 4 sent: every block 1 (decision d2)\n")
    assert operator.requests == [pb.UndoLearningRatesRequest(run="llama-c3", author="ada@node3", reason="enough")]
    assert not operator.watched.is_set()


async def test_rollback(operator, cli):
    operator.answer.set_result(pb.Decision(outcome="applied", applied_step=431))
    status, out, err = await cli("rollback", "gpt2-b7", "--reason", "bad data", "--skip", "405:421", "--to-step", "0")
    assert (status, err) == (0, "")
    assert out == "rollback applied at step 431: back to step 400 (/c/400), skipping steps 405 to 420\n"
    (request,) = operator.requests
    assert request.HasField("to_step")
    assert (request.to_step, request.skip_from_step, request.skip_to_step) == (0, 405, 421)
    await cli("rollback", "gpt2-b7", "--reason", "again")
    assert not operator.requests[-1].HasField("to_step")


async def test_approve_reject_and_mode(operator, cli):
    operator.answer.set_result(pb.Decision(outcome="applied", applied_step=7))
    assert await cli("approve", "d5") == (0, "revision 5 applied at step 7: vo 0.25\n", "")
    assert await cli("reject", "d6", "--reason", "no") == (0, "scale_lr rejected: vo 0.25 (decision d6)\n", "")
    assert await cli("mode", "llama") == (0, "llama-c3: observe, by the configuration\n", "")
    assert await cli("mode", "llama-c3", "enforce") == (0, "llama-c3: enforce\n", "")
    assert [request.author for request in operator.requests] == ["ada@node3"] * 3


async def test_mode_all_sets_every_run_also_a_closed_one(operator, cli):
    operator.closed = {"gpt2-b7"}
    out = "gpt2-a1: observe\ngpt2-b7: observe\nllama-c3: observe\n"
    assert await cli("mode", "--all", "observe", "--reason", "hands off") == (0, out, "")
    assert sorted((request.run, request.mode, request.author, request.reason) for request in operator.requests) == [
        (name, "observe", "ada@node3", "hands off") for name in NAMES
    ]


async def test_mode_all_names_the_runs_that_it_could_not_set(operator, cli):
    operator.gone = {"gpt2-a1"}
    status, out, err = await cli("mode", "--all", "advise")
    assert (status, out) == (1, "gpt2-b7: advise\nllama-c3: advise\n")
    assert err == "sharpwatch: mode advise not set for 1 of 3 runs: gpt2-a1: no run 'gpt2-a1'\n"
    status, out, _ = await cli("mode", "--all", "advise", "--json")
    assert status == 1
    answer = json.loads(out)
    assert [run["run"] for run in answer["runs"]] == ["gpt2-b7", "llama-c3"]
    assert answer["failed"] == {"gpt2-a1": "no run 'gpt2-a1'"}
    # One reason for all is told once.
    status, out, err = await cli("mode", "--all", "observe", SHARPWATCH_TOKEN_FILE="")
    assert (status, out) == (1, "")
    assert err.startswith(f"sharpwatch: mode observe not set for 3 of 3 runs: {', '.join(NAMES)}: not allowed at ")
    assert err.count("no token was shown") == 1


async def test_a_daemon_that_would_make_the_change_of_a_dry_run_is_not_asked(operator, cli):
    """An earlier version does not know the field."""
    refused = f"sharpwatch: daemon at {operator.address} is an earlier version, which takes no --dry-run\n"
    assert await cli("mode", "llama-c3", "enforce", "--dry-run") == (1, "", refused)
    assert operator.requests == []


async def test_a_dry_run_says_so_in_its_request_and_is_refused_as_the_command_is(operator, cli):
    operator.dry_runs = True
    status, out, _ = await cli("mode", "llama-c3", "enforce", "--dry-run", "--json")
    assert (status, [each.dry_run for each in operator.requests]) == (0, [True])
    assert "dry_run" not in json.loads(out)["calls"][0]["request"]
    command = ("mode", "llama-c3", "enforce")
    refused = await cli(*command, SHARPWATCH_TOKEN_FILE="")
    assert (refused[0], "no token was shown" in refused[2]) == (1, True)
    assert await cli(*command, "--dry-run", SHARPWATCH_TOKEN_FILE="") == refused


async def test_lr_show_and_history(cli):
    status, out, _ = await cli("lr", "show", "llama", "--json")
    assert status == 0
    assert json.loads(out)["blocks"] == [
        {"block": "qk", "learning_rate": 3e-4, "lr_multiplier": 0.5, "update_every": None}
    ]
    assert json.loads(out)["newest_revision"]["applied_step"] == 9
    _, out, _ = await cli("lr", "history", "llama")
    assert [line.split()[0] for line in out.splitlines()] == ["revision", "1", "2"]
    assert "ada" in out
    assert "spikes" in out


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("show", "gpt2"), "run 'gpt2' may be any of gpt2-a1, gpt2-b7; write more of it"),
        (("show", "bert"), "no run 'bert'; the daemon knows gpt2-a1, gpt2-b7, llama-c3"),
        (("lr", "set", "llama", "nope=2"), "block 'nope': the run has emb, qk, vo"),
    ],
)
async def test_a_refusal_is_one_line_on_stderr_and_exit_1(cli, args, expected):
    assert await cli(*args) == (1, "", f"sharpwatch: {expected}\n")


async def test_without_the_token_commands_are_refused_and_looking_is_not(cli, tmp_path):
    bare = {"SHARPWATCH_TOKEN_FILE": ""}
    status, _, _ = await cli("show", "llama", **bare)
    assert status == 0
    status, out, err = await cli("mode", "llama", "enforce", **bare)
    assert (status, out) == (1, "")
    missing = tmp_path / ".config/sharpwatch/operator.token"
    shown = f"no token was shown ({missing} is not there; --token-file or $SHARPWATCH_TOKEN_FILE names yours)"
    assert err.endswith(f": commands need the operator's token; {shown}\n")


async def test_a_socket_is_an_address(operator, cli):
    status, out, _ = await cli(
        "--address", operator.socket, "mode", "llama-c3", "advise", SHARPWATCH_ADDRESS="127.0.0.1:1"
    )
    assert (status, out) == (0, "llama-c3: advise\n")


async def test_no_daemon_is_one_line_that_says_where_and_what_to_do(cli):
    expected = "daemon not reachable at 127.0.0.1:1; is it running? start it with: sharpwatch serve"
    assert await cli("jobs", "--address", "127.0.0.1:1") == (1, "", f"sharpwatch: {expected}\n")


def test_a_daemon_that_hangs(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel connects; nobody speaks
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with (
            pytest.raises(OperatorError, match=f"daemon at {address} did not answer in time"),
            connected(DaemonConnection(address, "", tmp_path)) as stub,
        ):
            stub.ListRuns(pb.ListRunsRequest(), timeout=0.3)


async def test_a_reader_that_stops_reading_is_no_error(operator, environ):
    # 6 MB of decisions into a reader of one line: the pipe is closed under the writer.
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", f"set -o pipefail; {sys.executable} -m sharpwatch decisions --limit 6000 | head -n 1"),
        env={**environ, "SHARPWATCH_ADDRESS": operator.address},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert out.startswith(b"id ")


async def test_client_commands_never_load_torch_or_numpy(operator, environ):
    script = (
        "import sys; from sharpwatch.cli.main import main\n"
        "for argv in (['jobs'], ['show', 'llama'], ['lr', 'show', 'llama'], ['decisions'], ['mode', 'llama']):\n"
        "    assert main(argv) == 0, argv\n"
        "print([name for name in ('torch', 'numpy', 'rich', 'aiohttp', 'pydantic') if name in sys.modules])\n"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script),
        env={**environ, "SHARPWATCH_ADDRESS": operator.address},
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    assert out.splitlines()[-1] == b"[]"


async def test_on_a_terminal_the_run_view_is_drawn_and_fits(operator, environ):
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sharpwatch", "show", "llama"),
        env={**environ, "SHARPWATCH_ADDRESS": operator.address, "COLUMNS": "80", "TERM": "xterm-256color"},
        stdout=theirs,
    )
    assert await process.wait() == 0
    os.close(theirs)
    out = os.read(ours, 2**16).decode()
    os.close(ours)
    assert "\x1b[" in out
    assert "3.4e-09 ± 2e-10" in out


async def test_doctor_finds_what_is_wrong_and_says_what_to_do(cli):
    status, out, _ = await cli("doctor", "--json")
    assert status == 1
    checks = {check["check"]: check for check in json.loads(out)["checks"]}
    assert checks["python"]["state"] == checks["torch"]["state"] == checks["wire code"]["state"] == "ok"
    assert checks["token file"]["state"] == checks["daemon"]["state"] == "ok"
    assert checks["role"]["state"] == checks["metrics"]["state"] == "warn"
    assert checks["store"] == {
        "check": "store",
        "state": "fail",
        "found": "sqlite:///x.db: disk full",
        "remedy": "free space or fix permissions there; agents keep a limited spool until then",
    }


async def test_doctor_of_an_open_token_file(cli, environ, tmp_path):
    (tmp_path / "token").chmod(0o644)
    status, out, _ = await cli("doctor")
    assert status == 1
    assert f"chmod 600 {environ['SHARPWATCH_TOKEN_FILE']}" in out
