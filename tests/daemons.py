"""Daemons for tests: the real one in a process of its own, and one that answers as a script says."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from forked import COMMAND_LINE, ForkedProcess

from sharpwatch.v1 import agent_pb2

METHOD = "/sharpwatch.v1.AgentService/Session"
PATIENCE = 60.0  # seconds until a test that waits for what never comes gives up


def response(**fields):
    return agent_pb2.SessionResponse(**fields).SerializeToString()


def welcome(acknowledged=0, heartbeat_seconds=0):
    fields = {"acknowledged_sequence": acknowledged, "heartbeat_seconds": heartbeat_seconds}
    return response(welcome=agent_pb2.Welcome(daemon_version="test", **fields))


def ack(sequence):
    return response(ack=agent_pb2.Ack(sequence=sequence))


class ScriptedDaemon(grpc.GenericRpcHandler):
    """AgentService as a script: each new stream is answered by the next of `scripts`, the last one from then on."""

    def __init__(self, *scripts, address="127.0.0.1:0", credentials=None):
        self.scripts = list(scripts) or [honest]
        self.hellos, self.metadata, self.streams, self.heartbeats = [], [], [], []
        self.changed = threading.Condition()
        self.closing = threading.Event()  # for scripts that hang
        self._server = grpc.server(futures.ThreadPoolExecutor(16), handlers=[self], options=[("grpc.so_reuseport", 0)])
        if credentials is None:
            port = self._server.add_insecure_port(address)
        else:
            port = self._server.add_secure_port(address, credentials)
        self.address = address if address.startswith("unix:") else f"127.0.0.1:{port}"
        self._server.start()

    def service(self, handler_call_details):
        assert handler_call_details.method == METHOD
        return grpc.stream_stream_rpc_method_handler(self._session)

    def _session(self, requests, context):
        hello = agent_pb2.SessionRequest.FromString(next(requests))
        with self.changed:
            number = len(self.streams)
            self.hellos.append(hello.hello)
            self.metadata.append(dict(context.invocation_metadata()))
            self.streams.append([])
            self.changed.notify_all()
        script = self.scripts[min(number, len(self.scripts) - 1)]
        yield from script(self, self._recorded(requests, number))

    def _recorded(self, requests, number):
        with contextlib.suppress(grpc.RpcError):  # how a broken stream ends the server's iterator
            for payload in requests:
                request = agent_pb2.SessionRequest.FromString(payload)
                is_sample = request.HasField("sample")
                with self.changed:
                    kept, message = self.heartbeats, request.heartbeat
                    if is_sample:
                        kept, message = self.streams[number], request.sample
                    kept.append(message)
                    self.changed.notify_all()
                if is_sample:
                    yield request.sample

    @property
    def samples(self):
        return [sample for stream in self.streams for sample in stream]

    @property
    def sequences(self):
        return [sample.sequence for sample in self.samples]

    def wait(self, condition, client=None):
        """Until `condition()`; with `client`, a training loop goes on in the meantime."""
        deadline = time.monotonic() + PATIENCE
        with self.changed:
            while not condition():
                assert time.monotonic() < deadline, f"in vain; streams: {[len(each) for each in self.streams]}"
                self.changed.wait(PATIENCE if client is None else 0.01)
                if client is not None:
                    client.flush()

    def stop(self):
        self.closing.set()
        self._server.stop(None).wait()


def honest(daemon, samples, acknowledged=0):
    del daemon
    yield welcome(acknowledged)
    for sample in samples:
        yield ack(sample.sequence)


def silent_after(last):
    """Takes every sample, acknowledges those up to `last`."""

    def script(daemon, samples):
        del daemon
        yield welcome()
        for sample in samples:
            if sample.sequence <= last:
                yield ack(sample.sequence)

    return script


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def await_end(pid):
    """Until process `pid`, which need not be ours, is gone."""
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([watched], [], [], PATIENCE)[0], f"process {pid} goes on"
    finally:
        os.close(watched)


@dataclass
class Daemon:
    """`sharpwatch serve` in a process of its own; `start` returns when it serves."""

    folder: Path
    policies: str = "policies: []"
    extra: str = ""
    grpc: str = "127.0.0.1:0"
    http: str = "127.0.0.1:0"
    process: ForkedProcess | None = None
    log: deque = field(default_factory=lambda: deque(maxlen=1000))

    @property
    def token_file(self) -> Path:
        return self.folder / "operator.token"

    def configure(self) -> Path:
        """Write its configuration, with the ports that it has had."""
        config = self.folder / "sharpwatch.yaml"
        config.write_text(
            f"daemon:\n"
            f'  grpc: "{self.grpc}"\n'
            f'  http: "{self.http}"\n'
            f'  store: "sqlite:///{self.folder}/sharpwatch.db"\n'
            f'  token_file: "{self.token_file}"\n'
            f"{self.extra}"
            f"{self.policies}\n"
        )
        return config

    def start(self) -> Daemon:
        arguments = ("serve", "--config", str(self.configure()))
        self.process = ForkedProcess(COMMAND_LINE, env=os.environ, stderr=subprocess.PIPE, arguments=arguments)
        for line in self.process.stderr:
            self.log.append(line)
            event = json.loads(line) if line.startswith("{") else {}
            if event.get("event") == "serving":
                # The same ports after a restart: that is what a trainer comes back to.
                self.grpc, self.http = event["grpc"], event["http"]
            if event.get("event") == "ready":
                self._reader = threading.Thread(target=self._pump, daemon=True)
                self._reader.start()
                return self
        raise AssertionError("the daemon did not start:\n" + "".join(self.log))

    def _pump(self) -> None:
        for line in self.process.stderr:
            self.log.append(line)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._reader.join(PATIENCE)  # what it has written last is read from a stream that is open
        self.process.close()

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        status = self.process.wait(timeout=20)
        self.process.close()
        return status

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://{self.http}{path}", timeout=10) as response:
            return response.read().decode()

    def command(self, *arguments: str) -> subprocess.CompletedProcess:
        """A `sharpwatch` command against this daemon."""
        target = ("--address", self.grpc, "--token-file", str(self.token_file))
        return subprocess.run(
            [sys.executable, "-m", "sharpwatch", *target, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def cli(self, *arguments: str) -> dict:
        """A `sharpwatch` command that must succeed; returns its JSON."""
        done = self.command("--json", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)
