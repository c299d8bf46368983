"""The way from trainer to daemon: a real courier process, a real gRPC server, and everything that can go wrong."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest
from daemons import PATIENCE, ack, await_end, free_port, honest, response, silent_after, welcome

from sharpwatch.agent.transport import courier, courier_launcher
from sharpwatch.agent.transport.base import Connection, Destination
from sharpwatch.agent.transport.courier_handle import CourierHandle
from sharpwatch.agent.transport.courier_launcher import frame
from sharpwatch.agent.transport.trainer_writer import TrainerWriter
from sharpwatch.v1 import agent_pb2, types_pb2

HELLO = agent_pb2.Hello(protocol=1, run="run", training_job="job", attempt="attempt")


@pytest.fixture
def attach():
    clients = []

    def start(daemon, **options):
        address = daemon if isinstance(daemon, str) else daemon.address
        clients.append(CourierHandle(address=address, **options))
        clients[-1].send_hello(HELLO)
        clients[-1].flush()  # the first use starts the courier
        return clients[-1]

    yield start
    for client in clients:
        client.close()


def request(sequence, size=0, **fields):
    sample = agent_pb2.Sample(sequence=sequence, step=sequence, **fields)
    if size:
        sample.gnb.sketches.data = bytes(size)
    return agent_pb2.SessionRequest(sample=sample)


def result(name):
    return types_pb2.CommandResult(command_id=name, outcome=types_pb2.COMMAND_OUTCOME_APPLIED)


def result_ids(samples):
    return [each.command_id for sample in samples for each in sample.results]


def send(client, sequences, **fields):
    for sequence in sequences:
        client.send(request(sequence, **fields))


def await_new_courier(client, old):
    deadline = time.monotonic() + PATIENCE
    while client.courier_pid in (old, None):
        assert time.monotonic() < deadline, "no new courier"
        client.flush()
        select.select([], [], [], 0.01)


# In order.


def test_samples_arrive_in_order_and_close_leaves_nothing(serve, attach):
    daemon = serve()
    client = attach(daemon)
    await_new_courier(client, None)  # on a busy machine the first one may be given up
    process = client.courier_pid
    send(client, range(1, 201))
    client.send(request(201, closing=True))
    client.close()
    assert daemon.sequences == list(range(1, 202))
    assert daemon.samples[-1].closing
    assert daemon.hellos == [HELLO]
    assert client.dropped == {}
    await_end(process)


def test_commands_come_back_and_nothing_else_does(serve, attach):
    def commanding(_, samples):
        yield welcome()
        for sample in samples:
            yield ack(sample.sequence)
            yield response(command=types_pb2.Command(id=f"c{sample.sequence}"))

    daemon = serve(commanding)
    client = attach(daemon)
    send(client, [1, 2, 3])
    received = []
    daemon.wait(lambda: received.extend(client.receive()) or len(received) == 3, client)
    assert [each.command.id for each in received] == ["c1", "c2", "c3"]
    assert client.receive() == []


def test_a_daemon_that_asks_for_it_hears_of_a_trainer_in_a_long_step_and_of_its_end(serve, attach):
    def asking(_, samples):
        yield welcome(heartbeat_seconds=1e-9)  # less often than it asks for
        yield from (ack(sample.sequence) for sample in samples)

    daemon = serve(asking)
    client = attach(daemon)
    send(client, [1])
    daemon.wait(lambda: len(daemon.heartbeats) == 2, client)
    client.close()
    assert [beat.last for beat in daemon.heartbeats] == [*[False] * (len(daemon.heartbeats) - 1), True]
    assert daemon.sequences == [1]


def test_a_daemon_that_does_not_ask_for_it_gets_no_heartbeat(serve, attach):
    daemon = serve()
    client = attach(daemon)
    send(client, [1])
    daemon.wait(lambda: daemon.sequences == [1], client)
    client.close()
    assert daemon.heartbeats == []


def test_the_trainer_knows_whether_the_daemon_is_reached(serve, attach):
    first = serve(silent_after(2))
    client = attach(first)
    assert client.connection == Connection(first.address)
    send(client, [1, 2, 3])
    first.wait(lambda: client.connection.acknowledged == 2, client)
    connected = client.connection
    assert connected.connected
    assert connected.since_unix_ns > 0
    assert connected.reason == ""
    first.stop()
    first.wait(lambda: not client.connection.connected, client)
    first.wait(lambda: "refused" in client.connection.reason, client)
    assert client.connection.since_unix_ns > connected.since_unix_ns
    assert client.connection.acknowledged == 2
    second = serve(lambda daemon, samples: honest(daemon, samples, acknowledged=2), address=first.address)
    second.wait(lambda: client.connection.acknowledged == 3, client)
    assert client.connection.connected
    client.close()
    assert (client.connection.connected, client.connection.reason) == (False, "closed")


def test_a_daemon_that_goes_away_says_why(serve, attach):
    def draining(_, __):
        yield welcome()
        yield response(drain=agent_pb2.Drain(reason="restarting"))

    daemon = serve(draining)
    client = attach(daemon)
    daemon.wait(lambda: client.connection.reason == "drained: restarting", client)
    assert not client.connection.connected


def test_a_courier_that_died_is_no_connection(serve, attach):
    daemon = serve()
    client = attach(daemon)
    daemon.wait(lambda: client.connection.connected, client)
    os.kill(client.courier_pid, signal.SIGKILL)
    daemon.wait(lambda: client.connection.reason.startswith("the courier is gone"), client)
    daemon.wait(lambda: client.connection.connected, client)


def test_a_unix_socket_and_a_token(serve, attach, tmp_path):
    daemon = serve(address=f"unix:{tmp_path}/daemon.sock")
    client = attach(daemon, token="the-token")  # noqa: S106 - a test's own
    send(client, [1])
    daemon.wait(lambda: daemon.sequences == [1], client)
    assert daemon.metadata[0]["authorization"] == "Bearer the-token"
    assert b"the-token" not in Path(f"/proc/{client.courier_pid}/cmdline").read_bytes()


def test_mutual_tls(serve, attach, tmp_path, program):
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = f"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -keyout {key} -out {cert}"
    command = [program("openssl"), *made.split(), "-subj", "/CN=here", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    pair = [(key.read_bytes(), cert.read_bytes())]
    credentials = grpc.ssl_server_credentials(pair, root_certificates=cert.read_bytes(), require_client_auth=True)
    daemon = serve(credentials=credentials)
    client = attach(daemon, tls={"ca": str(cert), "cert": str(cert), "key": str(key)})
    send(client, [1])
    daemon.wait(lambda: daemon.sequences == [1], client)


def test_a_proxy_of_the_environment_is_not_used(serve, attach, monkeypatch):
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    daemon = serve()
    client = attach(daemon)
    send(client, [1])
    daemon.wait(lambda: daemon.sequences == [1], client)


def test_a_working_directory_full_of_traps(serve, attach, tmp_path, monkeypatch):
    for name in ("queue", "types", "asyncio", "grpc", "select"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError")
    monkeypatch.chdir(tmp_path)
    daemon = serve()
    client = attach(daemon)
    send(client, [1])
    daemon.wait(lambda: daemon.sequences == [1], client)


def test_ctrl_c_and_argv_are_the_trainers_own(serve, attach):
    client = attach(serve())
    assert os.getsid(client.courier_pid) != os.getsid(0)


# Daemons.


def test_a_restarted_daemon_gets_what_it_had_not_acknowledged(serve, attach):
    first = serve(silent_after(50))
    client = attach(first)
    send(client, range(1, 101))
    first.wait(lambda: first.sequences == list(range(1, 101)), client)
    first.stop()
    send(client, range(101, 151))
    second = serve(lambda daemon, samples: honest(daemon, samples, acknowledged=50), address=first.address)
    second.wait(lambda: len(second.sequences) >= 100, client)
    assert second.sequences == list(range(51, 151))
    assert second.hellos == [HELLO]
    assert client.dropped == {}


def test_a_daemon_that_was_never_started(attach):
    client = attach(f"127.0.0.1:{free_port()}")
    process = client.courier_pid
    send(client, range(1, 301))
    assert client.receive() == []
    client.close()
    await_end(process)
    assert client.dropped == {"undelivered": 300}


def test_a_daemon_that_comes_late_gets_all(serve, attach):
    address = f"127.0.0.1:{free_port()}"
    client = attach(address)
    send(client, range(1, 101))
    daemon = serve(address=address)
    daemon.wait(lambda: daemon.sequences == list(range(1, 101)), client)


def test_a_host_that_accepts_and_never_answers(attach):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        client = attach(f"127.0.0.1:{mute.getsockname()[1]}")
        mute.settimeout(PATIENCE)
        first, _ = mute.accept()
        send(client, range(1, 11))
        second, _ = mute.accept()  # it gave up on the first
        process = client.courier_pid
        client.close()
        await_end(process)
        first.close()
        second.close()
    assert client.dropped == {"undelivered": 10}


def test_a_daemon_that_never_welcomes_is_tried_again(serve, attach):
    def hung(daemon, samples):
        del samples
        daemon.closing.wait()
        yield from ()

    daemon = serve(hung, honest)
    client = attach(daemon)
    send(client, [1, 2])
    daemon.wait(lambda: daemon.sequences == [1, 2], client)
    assert daemon.hellos == [HELLO, HELLO]


async def test_a_connection_that_falls_silent_is_given_up(serve, monkeypatch):
    def silent(daemon, samples):
        yield welcome()
        next(samples)
        daemon.closing.wait()

    monkeypatch.setattr(courier, "SILENCE_SECONDS", 0.2)
    daemon = serve(silent, honest)
    inward, outward = os.pipe()
    own = courier.Courier(Destination((daemon.address,), "", None, 2**20, os.getpid()), TrainerWriter(outward))
    own._accept(agent_pb2.SessionRequest(hello=HELLO).SerializeToString())
    own._accept(request(1).SerializeToString())
    delivering = asyncio.create_task(own._deliver())
    await asyncio.to_thread(daemon.wait, lambda: daemon.sequences == [1, 1])
    delivering.cancel()
    await asyncio.wait({delivering})
    os.close(inward)
    os.close(outward)


def garbage(_, samples):
    yield b"\xff\xff\xff"
    yield ack(3)
    yield welcome()
    yield b"\x00garbage"
    next(samples)


def lying(_, samples):
    yield welcome(acknowledged=2**63)
    next(samples)
    yield ack(2**64 - 1)
    yield response(refusal=agent_pb2.Refusal(sequence=2**40, code="?\n" * 1000))
    yield welcome(acknowledged=2**64 - 1)
    yield response()


def drained_for_ever(_, samples):
    yield welcome()
    next(samples)
    yield response(drain=agent_pb2.Drain(reason="go away", retry_after_seconds=1e12))


def drained_for_nan(_, samples):
    del samples
    yield response(drain=agent_pb2.Drain(retry_after_seconds=float("nan")))


@pytest.mark.parametrize("script", [garbage, lying, drained_for_ever, drained_for_nan])
def test_a_lying_daemon_costs_no_sample(serve, attach, script):
    daemon = serve(script, honest)
    client = attach(daemon)
    process = client.courier_pid
    send(client, [1, 2, 3])
    daemon.wait(lambda: len(daemon.streams) == 2 and len(daemon.streams[1]) == 3, client)
    assert [sample.sequence for sample in daemon.streams[1]] == [1, 2, 3]
    assert client.receive() == []
    client.close()
    assert client.dropped == {}
    await_end(process)


@pytest.mark.parametrize("size", [2**20 + 1, 8 * 2**20, 63 * 2**20])
def test_a_response_that_is_too_long_is_refused_once_and_the_stream_goes_on(serve, attach, size):
    def huge(_, samples):
        yield response(command=types_pb2.Command(id="early", reason="x" * size))  # before the welcome: no command
        yield welcome()
        yield ack(next(samples).sequence)
        yield response(command=types_pb2.Command(id="huge", reason="x" * size))
        yield response(command=types_pb2.Command(id="good"))
        for sample in samples:
            yield ack(sample.sequence)

    daemon = serve(huge)
    client = attach(daemon)
    send(client, [1, 2, 3])
    received = []
    daemon.wait(lambda: received.extend(client.receive()) or len(received) == 2, client)
    refused, good = (each.command for each in received)
    assert refused.refusal.startswith("a response must have at most 1048576 bytes, got ")
    assert (good.id, good.refusal) == ("good", "")
    daemon.wait(lambda: client.connection.acknowledged == 3, client)
    assert len(daemon.streams) == 1


def test_a_command_beyond_the_limits_reaches_the_trainer_only_as_refused(serve, attach):
    def commanding(_, samples):
        yield welcome()
        next(samples)
        yield response(command=types_pb2.Command(id="x" * 60_000, reason="y" * 3_000))
        yield response(command=types_pb2.Command(id="good"))

    daemon = serve(commanding)
    client = attach(daemon)
    send(client, [1])
    received = []
    daemon.wait(lambda: received.extend(client.receive()) or len(received) == 2, client)
    refused, good = (each.command for each in received)
    reason = "id must have 1 to 253 printable characters, got 60000"
    assert refused == types_pb2.Command(id="x" * 252 + "…", refusal=reason)
    assert good == types_pb2.Command(id="good")


def test_a_refused_sample_is_counted_and_not_sent_again(serve, attach):
    codes = {2: "malformed", 4: "overflow"}

    def refusing(_, samples):
        yield welcome()
        for sample in samples:
            if sample.sequence in codes:
                yield response(refusal=agent_pb2.Refusal(sequence=sample.sequence, code=codes[sample.sequence]))
            if sample.sequence == 5:
                return

    daemon = serve(refusing, honest)
    client = attach(daemon)
    client.send(request(1))
    client.send(request(2, results=[result("guilty")]))
    client.send(request(3))
    client.send(request(4, results=[result("innocent")]))
    daemon.wait(lambda: client.dropped == {"malformed": 1, "overflow": 1}, client)
    client.send(request(5))
    daemon.wait(lambda: len(daemon.streams) == 2 and len(daemon.streams[1]) == 3, client)
    assert [sample.sequence for sample in daemon.streams[1]] == [1, 3, 5]
    assert result_ids(daemon.streams[1]) == ["innocent"]


def test_the_couriers_own_spool_is_bounded_and_loses_no_event(serve, attach):
    address = f"127.0.0.1:{free_port()}"
    client = attach(address, spool_bytes=10_000)
    for sequence in range(1, 101):
        client.send(request(sequence, size=1_000, results=[result(f"r{sequence}")] if sequence % 10 == 0 else []))
    deadline = time.monotonic() + PATIENCE
    while client.dropped.get("spool_full", 0) < 90:
        assert time.monotonic() < deadline, client.dropped
        client.flush()
        select.select([], [], [], 0.01)
    daemon = serve(address=address)
    daemon.wait(lambda: daemon.sequences[-1:] == [100], client)
    assert len(daemon.sequences) + client.dropped["spool_full"] == 100
    assert daemon.sequences == list(range(101 - len(daemon.sequences), 101))
    assert result_ids(daemon.samples) == [f"r{sequence}" for sequence in range(10, 101, 10)]


# Couriers.


def test_a_killed_courier_is_replaced_and_loses_nothing_that_was_pending(serve, attach):
    daemon = serve(silent_after(20), honest)
    client = attach(daemon)
    send(client, range(1, 51))
    daemon.wait(lambda: len(daemon.sequences) == 50, client)
    old = client.courier_pid
    os.kill(old, signal.SIGKILL)
    await_end(old)
    send(client, range(51, 101))
    await_new_courier(client, old)
    daemon.wait(lambda: daemon.sequences[-1] == 100, client)
    again = [sample.sequence for sample in daemon.streams[1]]
    assert again == list(range(again[0], 101))
    assert again[0] <= 21
    assert daemon.hellos == [HELLO, HELLO]
    assert client.dropped == {}


def test_what_died_with_a_courier_is_counted(serve, attach):
    daemon = serve(silent_after(0), honest)
    client = attach(daemon, pending_bytes=20_000)
    send(client, range(1, 101), size=1_000)
    daemon.wait(lambda: len(daemon.sequences) == 100, client)
    old = client.courier_pid
    os.kill(old, signal.SIGKILL)
    await_end(old)
    await_new_courier(client, old)
    daemon.wait(lambda: daemon.sequences[100:][-1:] == [100], client)
    assert 0 < len(daemon.streams[1]) < 100
    assert client.dropped == {"courier_died": 100 - len(daemon.streams[1])}


def test_a_courier_killed_at_the_end_costs_nothing(serve, attach):
    daemon = serve(silent_after(0), honest)
    client = attach(daemon)
    send(client, range(1, 11))
    daemon.wait(lambda: len(daemon.sequences) == 10, client)
    os.kill(client.courier_pid, signal.SIGKILL)
    await_end(client.courier_pid)
    client.close()
    assert [sample.sequence for sample in daemon.streams[1]] == list(range(1, 11))
    assert client.dropped == {}


def test_a_stopped_courier_never_blocks_the_trainer(serve, attach):
    daemon = serve()
    limit = 100_000
    client = attach(daemon, pending_bytes=limit)
    os.kill(client.courier_pid, signal.SIGSTOP)
    samples = 2_000
    for sequence in range(1, samples + 1):  # 4 MB; the pipe takes 1 MiB
        news = sequence % 100 == 0
        fields = {
            "results": [result(f"r{sequence}")] if news else [],
            "checkpoints": [types_pb2.Checkpoint(step=sequence, uri=f"/c/{sequence}")] if news else [],
        }
        client.send(request(sequence, size=2_000, **fields))
        assert client._spool.size <= limit + 10_000
    lost = client.dropped["outbox_full"]
    assert lost > 0
    os.kill(client.courier_pid, signal.SIGCONT)
    daemon.wait(lambda: daemon.sequences[-1:] == [samples], client)
    assert client.dropped == {"outbox_full": lost}
    assert len(daemon.sequences) == samples - lost
    assert daemon.sequences == sorted(daemon.sequences)
    news = list(range(100, samples + 1, 100))
    assert result_ids(daemon.samples) == [f"r{sequence}" for sequence in news]
    assert [each.step for sample in daemon.samples for each in sample.checkpoints] == news


def test_close_kills_a_courier_that_takes_nothing_more(serve, attach, monkeypatch):
    monkeypatch.setattr(courier_launcher, "_COURIER_CODE", "import signal; signal.pause()")
    client = attach(serve(), pending_bytes=100_000)
    process = client.courier_pid
    send(client, range(1, 1_001), size=2_000)
    client.close()
    await_end(process)
    assert sum(client.dropped.values()) == 1_000


def test_close_wakes_a_courier_that_was_stopped(serve, attach):
    daemon = serve()
    client = attach(daemon)
    process = client.courier_pid
    send(client, [1])
    daemon.wait(lambda: daemon.samples, client)
    os.kill(process, signal.SIGSTOP)
    send(client, range(2, 1_001), size=2_000)  # more than the pipe takes
    client.close()
    await_end(process)
    assert daemon.sequences == list(range(1, 1_001))


INTERRUPT = """
import json, select, signal
def interrupt():
    os.kill(json.loads(os.environ["SHARPWATCH_COURIER"])["trainer"], signal.SIGINT)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCONT})
os.write(1, READY)
"""
WHEN_WOKEN = """
signal.sigwait({signal.SIGCONT})
interrupt()
for _ in iter(lambda: os.read(0, 2**20), b""):
    pass
"""
AT_THE_END = """
for _ in iter(lambda: os.read(0, 2**20), b""):
    pass
interrupt()
trainer = select.poll()
trainer.register(1, 0)
trainer.poll()  # until it has closed its end
"""


@pytest.mark.parametrize("moment", [WHEN_WOKEN, AT_THE_END], ids=["woken", "at the end"])
def test_an_interrupted_close_leaves_nothing_open(attach, monkeypatch, moment):
    ready = frame(response(command=types_pb2.Command(id="ready")))
    monkeypatch.setattr(courier_launcher, "_COURIER_CODE", INTERRUPT.replace("READY", repr(ready)) + moment)
    gc.collect()  # what an earlier test has left may close its descriptors at any time
    before = descriptors()
    client = attach(f"127.0.0.1:{free_port()}")
    process = client.courier_pid
    received = []
    while not received:
        received = client.receive()
    sent = 100 if moment is AT_THE_END else 1_000  # which is more than the pipe takes
    send(client, range(1, sent + 1), size=2_000)
    with pytest.raises(KeyboardInterrupt):
        client.close()
    await_end(process)
    assert client.courier_pid is None
    assert descriptors() == before
    assert client.dropped == {"undelivered": sent}


def test_a_sample_larger_than_pending_bytes_keeps_all_but_its_arrays(serve, attach):
    daemon = serve()
    client = attach(daemon, pending_bytes=10_000)
    client.send(request(1, size=20_000, loss=1.5, results=[result("r")], closing=True))
    daemon.wait(lambda: daemon.sequences == [1], client)
    assert daemon.samples == [agent_pb2.Sample(sequence=1, step=1, loss=1.5, results=[result("r")], closing=True)]
    assert client.dropped == {"oversized": 1}


@pytest.mark.parametrize(
    "code",
    [
        "os.write(1, b'\\xff' * 100_000)",  # no frame
        "os.write(1, b'\\x03\\0\\0\\0\\xff\\xff\\xff' * 100); os.read(0, 1)",  # frames of garbage
        "raise SystemExit(3)",
        "os.close(0); os.read(1, 1)",
    ],
)
def test_a_courier_gone_mad_is_replaced(serve, attach, monkeypatch, caplog, tmp_path, code):  # noqa: PLR0917 - fixtures
    daemon = serve()
    known = tmp_path / "pid"
    monkeypatch.setattr(courier_launcher, "_COURIER_CODE", f"open({str(known)!r}, 'w').write(str(os.getpid())); {code}")
    client = attach(daemon)
    sent = 1
    client.send(request(1))
    while "the courier is gone" not in caplog.text:
        sent += 1
        client.send(request(sent))
        assert client.receive() == []
    monkeypatch.undo()
    daemon.wait(lambda: daemon.sequences[-1:] == [sent], client)
    assert daemon.sequences == list(range(1, sent + 1))
    await_end(int(known.read_text()))


def test_no_courier_can_be_started(serve, attach, monkeypatch, caplog):
    daemon = serve()
    with monkeypatch.context() as broken:
        broken.setattr(sys, "executable", "/nowhere/python")
        client = attach(daemon)
        send(client, [1, 2])
        assert client.courier_pid is None
    daemon.wait(lambda: daemon.sequences == [1, 2], client)
    assert [record.message for record in caplog.records] == [
        "no courier could be started: [Errno 2] No such file or directory: '/nowhere/python'"
    ]


@pytest.fixture
def program_for_python(monkeypatch, tmp_path):
    """Let `sys.executable` be a program that does `act`; the processes that it was."""
    known, program = tmp_path / "pids", tmp_path / "program"
    monkeypatch.setattr(sys, "executable", str(program))

    def write(act):
        program.write_text(f"#!/bin/sh\necho $$ >> {known}\n{act}\n")
        program.chmod(0o755)
        return lambda: list(map(int, known.read_text().split()))

    return write


@pytest.mark.parametrize("act", ["echo hello; exec sleep 1000", "sleep 1000", "exit 3"])
def test_what_is_no_python_is_ended_and_not_started_again(attach, monkeypatch, caplog, program_for_python, act):
    started = program_for_python(act)
    monkeypatch.setattr(courier_launcher, "_REPORT_SECONDS", 0.1)
    client = attach(f"127.0.0.1:{free_port()}")
    send(client, [1, 2])
    assert "no courier in this program" in caplog.text
    (process,) = started()
    await_end(process)
    client.close()
    assert started() == [process]
    assert len(caplog.records) == 1
    assert client.dropped == {"undelivered": 2}


def test_close_ends_what_has_not_shown_itself_to_be_a_courier(attach, program_for_python, tmp_path):
    started = program_for_python(f"sleep 1000 & echo $! >> {tmp_path}/pids; wait")
    client = attach(f"127.0.0.1:{free_port()}")
    send(client, [1, 2])
    client.close()
    assert len(started()) == 2
    for process in started():
        await_end(process)
    assert client.dropped == {"undelivered": 2}


def descriptors():
    """What is open in this process, and whether a child started by exec would inherit it."""
    found = {}
    for end in (int(entry.name) for entry in Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError):  # the listing's own
            found[end] = os.get_inheritable(end)
    return found


def children():
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii")


def test_nothing_is_left_open(attach):
    before = (children(), descriptors())
    threads = set(threading.enumerate())  # those of earlier tests may end meanwhile
    for _ in range(3):
        client = attach(f"127.0.0.1:{free_port()}")
        os.kill(client.courier_pid, signal.SIGKILL)
        await_end(client.courier_pid)
        await_new_courier(client, client.courier_pid)
        send(client, [1])
        ours = descriptors().keys() - before[1].keys()
        assert len(ours) == 2
        assert not any(os.get_inheritable(end) for end in ours)
        client.close()
        client.close()
        client.send(request(2))
        assert client.receive() == []
    assert (children(), descriptors()) == before
    assert not set(threading.enumerate()) - threads


# Trainers, in processes of their own: gRPC's server and forks don't go together.


def trainer(code, address):
    """A trainer that runs `code` with a client to `address`, its output line by line."""
    prelude = f"""
import os, signal, sys, threading
from sharpwatch.agent.transport.courier_handle import CourierHandle
from sharpwatch.v1 import agent_pb2
def send(client, sequence):
    client.send(agent_pb2.SessionRequest(sample=agent_pb2.Sample(sequence=sequence)))
def say(word):
    print(word, flush=True)
client = CourierHandle(address={address!r})
client.send_hello(agent_pb2.Hello(run="run"))
client.flush()
"""
    return subprocess.Popen(
        [sys.executable, "-c", prelude + code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@contextlib.contextmanager
def finishing(process):
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_in_a_forks_copy_all_is_inert(serve):
    daemon = serve()
    code = """
before = set(os.listdir("/proc/self/fd"))
send(client, 1)
if (worker := os.fork()) == 0:
    left = set(os.listdir("/proc/self/fd"))
    send(client, 2)
    assert client.receive() == []
    client.flush()
    client.close()
    del client
    os._exit(0 if len(left) == len(before) - 2 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 0
send(client, 3)
client.close()
say(client.dropped)
"""
    with finishing(trainer(code, daemon.address)) as process:
        assert process.stdout.readline() == "{}\n"
        assert process.wait(PATIENCE) == 0
    assert daemon.sequences == [1, 3]
    assert len(daemon.hellos) == 1


def test_a_killed_trainers_samples_arrive_though_a_worker_lives_on(serve):
    daemon = serve()
    code = """
send(client, 1)
if (worker := os.fork()) == 0:
    signal.pause()
say(f"{worker} {client.courier_pid}")
send(client, 2)
say("ready")
signal.pause()
"""
    with finishing(trainer(code, daemon.address)) as process:
        worker, process_id = map(int, process.stdout.readline().split())
        assert process.stdout.readline() == "ready\n"
        process.kill()
        process.wait(PATIENCE)
        await_end(process_id)
        os.kill(worker, signal.SIGKILL)
    assert daemon.sequences == [1, 2]


def test_a_worker_that_holds_the_pipe_does_not_hold_the_courier(serve):
    """Forked by other means than Python's: no hook runs there, so only the trainer's death tells."""
    daemon = serve()
    code = """
import ctypes
send(client, 1)
libc = ctypes.PyDLL(None)
if (worker := libc.fork()) == 0:
    libc.pause()
say(f"{worker} {client.courier_pid}")
signal.pause()
"""
    with finishing(trainer(code, daemon.address)) as process:
        worker, process_id = map(int, process.stdout.readline().split())
        process.kill()
        process.wait(PATIENCE)
        await_end(process_id)
        os.kill(worker, signal.SIGKILL)
    assert daemon.sequences == [1]


def test_a_deadly_sigpipe_does_not_reach_the_trainer(serve):
    daemon = serve()
    code = """
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
import select
send(client, 1)
courier, gone = client._courier, os.pidfd_open(client.courier_pid)
courier.read = lambda: b""  # it would tell before the write does
os.kill(client.courier_pid, signal.SIGKILL)
select.select([gone], [], [])  # or thousands of samples go into the pipe before, more than close() waits for
os.close(gone)
sequence = 1
while client._courier is courier:
    sequence += 1
    send(client, sequence)
assert signal.SIGPIPE not in signal.sigpending()
assert signal.SIGPIPE not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
client.close()
say(sequence)
"""
    with finishing(trainer(code, daemon.address)) as process:
        last = int(process.stdout.readline())
        assert process.wait(PATIENCE) == 0
    assert daemon.sequences[-1] == last


def test_with_closed_standard_streams_the_pipes_stay_clear_of_them(serve):
    daemon = serve()
    code = """
client.close()
for stream in range(3):
    os.close(stream)
client = CourierHandle(address=client._destination.targets[0])
client.send_hello(agent_pb2.Hello(run="run"))
client.flush()
ends = client._courier._from_courier.fileno(), client._courier._to_courier.fileno()
send(client, 1)
client.close()
os._exit(0 if min(ends) > 2 else 1)
"""
    with finishing(trainer(code, daemon.address)) as process:
        assert process.wait(PATIENCE) == 0
    assert daemon.sequences == [1]
