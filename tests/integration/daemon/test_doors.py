"""Who comes in: tokens and their roles, TLS, and both replaced while the daemon runs. Over real sockets."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import sys
import tempfile
import time
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
import grpc
import pytest
from certificates import Authority
from structlog.testing import capture_logs

from sharpwatch.common.credentials import Credential, make_credential, read_credentials, write_credentials
from sharpwatch.daemon.api import agent_service
from sharpwatch.daemon.api.limits import ConnectionLimits
from sharpwatch.errors import SharpwatchError
from sharpwatch.v1 import agent_pb2
from sharpwatch.v1 import operator_pb2 as pb
from sharpwatch.v1.agent_pb2_grpc import AgentServiceStub
from sharpwatch.v1.operator_pb2_grpc import OperatorServiceStub

UNKNOWN, FORBIDDEN = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
OBSERVE = pb.SetModeRequest(run="run", mode="observe", author="ann", reason="why")


class Holders:
    """A file of credentials, and the tokens that it has the hashes of."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Credential] = {}
        self.tokens: dict[str, str] = {}

    def add(self, name, role, jobs=(), expires=None) -> None:
        self.tokens[name], self.known[name] = make_credential(name, role, jobs, expires)
        write_credentials(self.path, [*self.known.values()])

    def revoke(self, name) -> None:
        del self.known[name]
        write_credentials(self.path, [*self.known.values()])

    def shown(self, name) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.tokens[name]}"),)


@pytest.fixture
def holders(tmp_path):
    made = Holders(tmp_path / "credentials.yaml")
    made.add("gpt2", "agent", ["job"])
    made.add("grafana", "viewer")
    made.add("ann", "operator")
    return made


@pytest.fixture
def guarded(running, holders):
    """A daemon with these credentials, on loopback."""
    return lambda **changes: running(credentials=str(holders.path), **changes)


async def status(call) -> tuple[grpc.StatusCode, str]:
    """How a call ends that the daemon refuses."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details()


async def turned_away(daemon, build, metadata=None, **changes) -> tuple[grpc.StatusCode, str]:
    """How a session that is not opened ends."""
    trainer = daemon.connect(metadata)
    with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # it may have ended by then
        await trainer.send(build.hello(**changes))
    ended = await trainer.ended()
    assert "welcome" not in trainer.received
    return ended


async def test_without_credentials_reading_over_loopback_needs_the_operators_token(daemon):
    trainer = await daemon.train()
    stub = OperatorServiceStub(daemon.channel)
    for call in (
        stub.GetDaemon(pb.GetDaemonRequest()),
        stub.ListRuns(pb.ListRunsRequest()),
        stub.GetRun(pb.GetRunRequest(run="run")),
        stub.GetHistory(pb.GetHistoryRequest(run="run")),
        stub.ListDecisions(pb.ListDecisionsRequest()),
        stub.WatchRun(pb.WatchRunRequest(run="run")).read(),
    ):
        code, details = await status(call)
        assert code is UNKNOWN
        assert details.startswith("reading needs the operator's token, or one of role viewer: no token was shown")
    assert (await daemon.get("/metrics"))[0] == 200
    assert (await daemon.get("/-/healthy"))[0] == 200
    trainer.call.cancel()


ANOTHER_USER = """
import json, os, sys
import grpc
from sharpwatch.v1 import agent_pb2, operator_pb2 as pb
from sharpwatch.v1.agent_pb2_grpc import AgentServiceStub
from sharpwatch.v1.operator_pb2_grpc import OperatorServiceStub

os.setgroups([])  # only now: another user may not be allowed to read the interpreter
os.setgid(65534)
os.setuid(65534)
address, token_file, hello = sys.argv[1:]
found = {}
with grpc.insecure_channel(address) as channel:
    operator = OperatorServiceStub(channel)
    for name, request in {
        "GetRun": pb.GetRunRequest(run="run"),
        "GetHistory": pb.GetHistoryRequest(run="run"),
        "SetLearningRates": pb.SetLearningRatesRequest(run="run", multipliers={"qk": 0.5}, author="eve"),
    }.items():
        try:
            getattr(operator, name)(request, timeout=30)
            found[name] = "OK"
        except grpc.RpcError as error:
            found[name] = error.code().name
    try:
        request = agent_pb2.SessionRequest(hello=agent_pb2.Hello.FromString(bytes.fromhex(hello)))
        found["Session"] = next(AgentServiceStub(channel).Session(iter([request]), timeout=30)).WhichOneof("message")
    except grpc.RpcError as error:
        found["Session"] = error.code().name
try:
    found["token"] = open(token_file).read()
except PermissionError:
    found["token"] = "PermissionError"
print(json.dumps(found))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("door", ["loopback", "socket", "credentials"])
async def test_what_another_user_of_the_machine_can_do_without_a_token(running, holders, build, door):
    with tempfile.TemporaryDirectory() as folder:
        # So that the socket's own mode keeps others out.
        for path in (Path(folder), *holders.path.parents[:3]):
            path.chmod(0o755)
        doors = {"socket": {"grpc": f"unix:{folder}/daemon.sock"}, "credentials": {"credentials": str(holders.path)}}
        async with running(**doors.get(door, {})) as daemon:
            trainer = await daemon.train(metadata=holders.shown("gpt2") if door == "credentials" else None)
            await trainer.send(build.sample(1))
            await trainer.acknowledged(1)
            token_file = holders.path.parent / "operator.token"
            hello = build.hello("eves", "e1").SerializeToString().hex()
            other = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", ANOTHER_USER, daemon.grpc, token_file, hello),
                stdout=asyncio.subprocess.PIPE,
            )
            told, _ = await other.communicate()
            found = json.loads(told)
    refused = "UNAVAILABLE" if door == "socket" else "UNAUTHENTICATED"
    assert found == {
        **dict.fromkeys(("GetRun", "GetHistory", "SetLearningRates"), refused),
        # Of a run of their own: nobody can tell users apart over loopback.
        "Session": "welcome" if door == "loopback" else refused,
        "token": "PermissionError",
    }


async def test_every_method_is_for_a_role(guarded, holders):
    """No method of any service but health is open to whoever has no token, also none that was added later."""
    from sharpwatch.v1 import agent_pb2, operator_pb2  # noqa: PLC0415 - for their descriptors

    async with guarded() as daemon:
        for file in (agent_pb2, operator_pb2):
            for service in file.DESCRIPTOR.services_by_name.values():
                for method in service.methods:
                    call = daemon.channel.stream_stream(f"/{service.full_name}/{method.name}")()
                    assert await call.code() is UNKNOWN, method.full_name
        agents = daemon.channel.stream_stream("/sharpwatch.v1.OperatorService/GetDaemon")(
            metadata=holders.shown("gpt2")
        )
        assert await agents.code() is FORBIDDEN


async def test_refusals_do_not_fill_the_log(daemon):
    stub = OperatorServiceStub(daemon.channel)
    with capture_logs() as logs:
        for _ in range(50):
            await status(stub.ListRuns(pb.ListRunsRequest()))
            await status(stub.GetRun(pb.GetRunRequest(run="x" * 10_000)))
    assert [each["method"].rpartition("/")[2] for each in logs] == ["ListRuns", "GetRun"]
    assert await daemon.metric('sharpwatch_calls_ended_total{reason="unauthorized"}') == 100


async def test_a_role_may_do_what_it_is_for_and_no_more(guarded, holders, build):
    async with guarded() as daemon:
        assert (await turned_away(daemon, build))[0] is UNKNOWN
        assert (await turned_away(daemon, build, holders.shown("grafana")))[0] is FORBIDDEN
        trainer = await daemon.train(metadata=holders.shown("gpt2"))
        stub = OperatorServiceStub(daemon.channel)
        listed = await stub.ListRuns(pb.ListRunsRequest(), metadata=holders.shown("grafana"))
        assert [run.run for run in listed.runs] == ["run"]
        assert await status(stub.ListRuns(pb.ListRunsRequest(), metadata=holders.shown("gpt2"))) == (
            FORBIDDEN,
            "reading needs the operator's token, or one of role viewer; gpt2 has the role agent",
        )
        assert await status(stub.SetMode(OBSERVE, metadata=holders.shown("grafana"))) == (
            FORBIDDEN,
            "a change needs the operator's token, or one of role operator; grafana has the role viewer",
        )
        assert (await stub.SetMode(OBSERVE, metadata=holders.shown("ann"))).run.mode == "observe"
        assert (await stub.SetMode(OBSERVE, metadata=daemon.credentials)).run.mode == "observe"
        trainer.call.cancel()


async def test_an_agent_speaks_for_its_own_job_only(guarded, holders, build):
    async with guarded() as daemon:
        code, reason = await turned_away(daemon, build, holders.shown("gpt2"), training_job="other")
        assert (code, reason) == (FORBIDDEN, "the token of gpt2 is not for training job other")
        assert await daemon.metric('sharpwatch_sessions_refused_total{reason="other_job"}') == 1
        holders.add("any", "agent")
        (await daemon.train("other", "a9", metadata=holders.shown("any"), training_job="other")).call.cancel()


async def test_a_token_that_is_revoked_or_replaced_ends_its_session_without_a_restart(guarded, holders, monkeypatch):
    monkeypatch.setattr(agent_service, "_REVOKED_SECONDS", 0.01)
    async with guarded() as daemon:
        first = await daemon.train(metadata=holders.shown("gpt2"))
        old = holders.shown("gpt2")
        holders.add("gpt2", "agent", ["job"])
        assert await first.ended() == (UNKNOWN, "the token of gpt2 is valid no more")
        stub = AgentServiceStub(daemon.channel)
        assert await stub.Session(metadata=old).code() is UNKNOWN
        second = await daemon.train(metadata=holders.shown("gpt2"))
        holders.revoke("gpt2")
        assert (await second.ended())[0] is UNKNOWN
        assert await stub.Session(metadata=holders.shown("gpt2")).code() is UNKNOWN


async def test_a_token_ends_when_it_expires(guarded, holders, monkeypatch):
    monkeypatch.setattr(agent_service, "_REVOKED_SECONDS", 0.01)
    holders.add("gpt2", "agent", ["job"], datetime(2100, 1, 1, tzinfo=UTC))
    async with guarded() as daemon:
        trainer = await daemon.train(metadata=holders.shown("gpt2"))
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 80 * 365 * 86_400)
        assert (await trainer.ended())[0] is UNKNOWN
        call = AgentServiceStub(daemon.channel).Session(metadata=holders.shown("gpt2"))
        assert await call.code() is UNKNOWN
        assert "the token of gpt2 has expired, at 2100-01-01T00:00:00Z" in await call.details()


async def test_a_token_file_that_others_can_read_by_now_is_refused_and_that_is_said(daemon, tmp_path):
    path, stub = tmp_path / "operator.token", OperatorServiceStub(daemon.channel)
    await stub.GetDaemon(pb.GetDaemonRequest(), metadata=daemon.credentials)
    with capture_logs() as logs:
        path.chmod(0o640)
        code, details = await status(stub.GetDaemon(pb.GetDaemonRequest(), metadata=daemon.credentials))
        assert code is UNKNOWN
        assert details.endswith("the file of the operator's token can't be used, as the daemon's log says")
    (said,) = (each for each in logs if each["event"] == "file_refused")
    assert said["reason"] == f"token file {path} has mode 0640: others can read it; run: chmod 600 {path}"
    path.chmod(0o600)
    await stub.GetDaemon(pb.GetDaemonRequest(), metadata=daemon.credentials)
    path.write_text("another\n")
    assert (await status(stub.GetDaemon(pb.GetDaemonRequest(), metadata=daemon.credentials)))[0] is UNKNOWN
    await stub.GetDaemon(pb.GetDaemonRequest(), metadata=(("authorization", "Bearer another"),))


async def test_credentials_that_others_can_change_by_now_let_nobody_in(guarded, holders):
    async with guarded() as daemon:
        stub, shown = OperatorServiceStub(daemon.channel), holders.shown("grafana")
        await stub.GetDaemon(pb.GetDaemonRequest(), metadata=shown)
        with capture_logs() as logs:
            holders.path.chmod(0o620)
            assert (await status(stub.GetDaemon(pb.GetDaemonRequest(), metadata=shown)))[0] is UNKNOWN
        (said,) = (each for each in logs if each["event"] == "file_refused")
        assert said["reason"].endswith(f"others can change it; run: chmod go-w {holders.path}")


async def test_tokens_are_hashed_at_rest(holders):
    text = holders.path.read_text()
    assert all(token not in text for token in holders.tokens.values())
    assert {each.name for each in read_credentials(holders.path)} == set(holders.tokens)


async def test_metrics_are_for_a_token_where_that_is_configured(guarded, holders):
    async with guarded(metrics_auth="token") as daemon:
        url = f"http://{daemon.http}/metrics"

        async def answered(name=None) -> int:
            headers = {} if name is None else {"Authorization": f"Bearer {holders.tokens[name]}"}
            async with daemon.web.get(url, headers=headers) as response:
                return response.status

        assert [await answered(name) for name in (None, "gpt2", "grafana", "ann")] == [401, 401, 200, 200]
        assert (await daemon.get("/-/healthy"))[0] == 200  # kubelet has no token


# TLS.


@pytest.fixture
def authority(tmp_path, program):
    program("openssl")
    return Authority(tmp_path)


@pytest.fixture
def secured(holders, authority, serving_of):
    """A daemon with TLS and credentials, on every address of this machine."""

    @asynccontextmanager
    async def serve(**tls):
        signed = authority.sign("daemon")
        files = {"certificate": str(signed.certificate), "key": str(signed.key), **tls}
        async with serving_of(grpc="0.0.0.0:0", credentials=str(holders.path), tls=files) as daemon:
            yield f"localhost:{daemon.grpc.rpartition(':')[2]}", f"localhost:{daemon.http.rpartition(':')[2]}"

    return serve


def reached(address: str, authority: Authority, client=None) -> grpc.aio.Channel:
    files = (client.key.read_bytes(), client.certificate.read_bytes()) if client else (None, None)
    credentials = grpc.ssl_channel_credentials(authority.own.certificate.read_bytes(), *files)
    return grpc.aio.secure_channel(address, credentials, options=[("grpc.use_local_subchannel_pool", 1)])


def served_certificate(address: str, authority: Authority) -> bytes:
    """What a new connection is shown."""
    host, _, port = address.rpartition(":")
    return ssl.get_server_certificate((host, int(port)), ca_certs=str(authority.own.certificate)).encode()


async def test_other_addresses_are_served_by_tls_with_credentials(secured, holders, authority):
    async with secured() as (address, http):
        async with reached(address, authority) as channel:
            stub = OperatorServiceStub(channel)
            assert (await stub.GetDaemon(pb.GetDaemonRequest(), metadata=holders.shown("grafana"))).role == "viewer"
            assert (await status(stub.GetDaemon(pb.GetDaemonRequest())))[0] is UNKNOWN
        async with grpc.aio.insecure_channel(address) as plain:
            call = OperatorServiceStub(plain).GetDaemon(pb.GetDaemonRequest(), metadata=holders.shown("grafana"))
            assert (await status(call))[0] is grpc.StatusCode.UNAVAILABLE
        context = ssl.create_default_context(cafile=str(authority.own.certificate))
        async with aiohttp.ClientSession() as web, web.get(f"https://{http}/metrics", ssl=context) as response:
            (left,) = (
                line for line in (await response.text()).splitlines() if line.startswith("sharpwatch_certificate")
            )
        assert 9.9 < float(left.rpartition(" ")[2]) / 86_400 <= 10  # days, as `sign` was told


async def test_a_client_shows_a_certificate_where_one_is_asked_for(secured, holders, authority, tmp_path):
    (tmp_path / "other").mkdir()
    client, stranger = authority.sign("client"), Authority(tmp_path / "other").sign("client")
    async with secured(client_ca=str(authority.own.certificate)) as (address, _):
        for shown, comes_in in ((client, True), (None, False), (stranger, False)):
            async with reached(address, authority, shown) as channel:
                call = OperatorServiceStub(channel).GetDaemon(
                    pb.GetDaemonRequest(), metadata=holders.shown("grafana"), timeout=10
                )
                if comes_in:
                    assert (await call).role == "viewer"
                else:
                    assert (await status(call))[0] is grpc.StatusCode.UNAVAILABLE


async def test_a_certificate_has_the_role_of_its_name_where_no_token_is_shown(secured, authority, build):
    roles = {"trainer-7": "agent", "grafana.example": "viewer", "ann": "operator"}
    own, viewer = authority.sign("ann"), authority.sign("dashboards", host="grafana.example")
    trainer, unknown = authority.sign("trainer-7"), authority.sign("eve")
    async with secured(client_ca=str(authority.own.certificate), client_roles=roles) as (address, _):
        async with reached(address, authority, trainer) as channel:
            call = AgentServiceStub(channel).Session()
            await call.write(agent_pb2.SessionRequest(hello=build.hello()))
            assert (await call.read()).WhichOneof("message") == "welcome"
            refused = OperatorServiceStub(channel).GetDaemon(pb.GetDaemonRequest())
            assert await status(refused) == (
                FORBIDDEN,
                "reading needs the operator's token, or one of role viewer; trainer-7 has the role agent",
            )
            call.cancel()
        for shown, role in ((own, "operator"), (viewer, "viewer")):
            async with reached(address, authority, shown) as channel:
                assert (await OperatorServiceStub(channel).GetDaemon(pb.GetDaemonRequest())).role == role
        async with reached(address, authority, unknown) as channel:
            assert (await status(OperatorServiceStub(channel).GetDaemon(pb.GetDaemonRequest())))[0] is UNKNOWN
        async with reached(address, authority, own) as channel:  # what is shown counts, also beside a name with a role
            wrong = (("authorization", "Bearer wrong"),)
            assert (await status(OperatorServiceStub(channel).GetDaemon(pb.GetDaemonRequest(), metadata=wrong)))[
                0
            ] is UNKNOWN


async def test_a_new_certificate_is_shown_without_a_restart(secured, authority):
    async with secured() as (address, http):
        first = await asyncio.to_thread(served_certificate, address, authority)
        second = authority.sign("daemon", days=20).certificate.read_bytes()
        for side in (address, http):
            found = await asyncio.to_thread(served_certificate, side, authority)
            assert found.split() == second.split() != first.split()
        with capture_logs() as logs:
            (authority.folder / "daemon.key").write_text("no key")
            await asyncio.to_thread(served_certificate, http, authority)
            assert (await asyncio.to_thread(served_certificate, address, authority)).split() == second.split()
        assert [each["event"] for each in logs] == ["certificate_refused"]  # once


async def test_handshakes_that_never_end_leave_metrics_working(secured, authority, monkeypatch):
    monkeypatch.setattr(ConnectionLimits, "of", classmethod(lambda cls, _: cls(http=8, grpc=64)))
    context = ssl.create_default_context(cafile=str(authority.own.certificate))
    async with secured() as (_, http), aiohttp.ClientSession() as web:
        port = int(http.rpartition(":")[2])
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(50)]
        async with web.get(f"https://{http}/metrics", ssl=context) as response:
            assert response.status == 200
        async with asyncio.timeout(30):
            for reader, _ in opened[:40]:
                assert await reader.read() == b""
        for _, writer in opened:
            writer.close()


async def test_a_key_that_all_users_can_read_is_refused(secured, authority):
    sign = authority.sign

    def careless(name, **options):
        signed = sign(name, **options)
        signed.key.chmod(0o644)
        return signed

    authority.sign = careless
    with pytest.raises(SharpwatchError, match=r"daemon\.key has mode 0644: all users can read the key; run: chmod o="):
        async with secured():
            pass
