"""How long an alert takes round: from a fault in a run to the step whose rates a policy has changed.

    python benchmarks/alert_round_trip.py [--rounds 3] [--faster 1]

Everything on the way is real and as `deploy/` ships it: a trainer whose schedule multiplies the rate by 20, the daemon
and its `/metrics`, Prometheus with the scrape job and the rules, Alertmanager with the receiver, the webhook with the
operator's token, the policy, the command, and the trainer's own step with the multipliers. Printed are the seconds from
the first step with the raised rate to the first with the multipliers. `--faster N` divides the intervals by N, for
tests.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]
_DEPLOY = _ROOT / "deploy/prometheus"
_ALERT = "SharpwatchIncidentCritical"
_FAULT_AT, _RAISE, _FACTOR = 150, 20.0, 0.05
_PATIENCE = 240.0
_POLICIES = f"""
policies:
  - name: answer-prometheus
    match: {{foreign: {_ALERT}, severity: critical}}
    mode: enforce
    action: {{kind: scale_lr, factor: {_FACTOR}}}
"""
_TRAINER = f"""
import json, sys, threading, time, torch, sharpwatch
from transformers import GPT2Config, GPT2LMHeadModel
torch.manual_seed(0)
torch.set_num_threads(1)
model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0,
    eos_token_id=0))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: {_RAISE} if step >= {_FAULT_AT} else 1.0)
watch = sharpwatch.attach(model, optimizer, training_job="round-trip", run="round-trip", probes=())
over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
while not over.is_set():
    ids = torch.randint(64, (4, 16))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    watch.observe(loss=loss)
    print(json.dumps({{"step": watch.step, "time": time.time(), "rate": schedule.get_last_lr()[0],
        "multipliers": dict(watch.status.multipliers)}}), flush=True)
    schedule.step()
    optimizer.zero_grad()
    over.wait(0.02)
watch.close()
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _faster(text: str, times: float) -> str:
    """Divides the intervals of a configuration of Prometheus or Alertmanager."""
    units = {"s": 1000, "m": 60_000, "h": 3_600_000}
    pattern = r"((?:scrape|evaluation|group|repeat)_(?:interval|wait)): (\d+)([smh])"
    return re.sub(pattern, lambda m: f"{m[1]}: {max(1, round(int(m[2]) * units[m[3]] / times))}ms", text)


@contextlib.contextmanager
def _running(command: list[str], log: Path, ready: Callable[[str], Any]) -> Iterator[Any]:
    """A program for the length of a `with`, from when a line of its stderr says that it is ready."""
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stderr=stderr)
        try:
            yield _awaited(process, log, ready)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)


def _awaited(process: Any, log: Path, ready: Callable[[str], Any]) -> Any:
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        if found := next(filter(None, map(ready, log.read_text().splitlines())), None):
            return found
        time.sleep(0.05)
    raise SystemExit(f"{process.args[0]} is not ready:\n{log.read_text()}")


def _serving(line: str) -> dict[str, str] | None:
    event: dict[str, str] = json.loads(line) if line.startswith("{") else {}
    return event if event.get("event") == "serving" else None


def _daemon(folder: Path) -> list[str]:
    settings = {
        "grpc": "127.0.0.1:0",
        "http": "127.0.0.1:0",
        "device": "cpu",
        "store": f"sqlite:///{folder}/sharpwatch.db",
        "token_file": f"{folder}/operator.token",
    }
    path = folder / "sharpwatch.yaml"
    path.write_text(f"daemon: {json.dumps(settings)}\n{_POLICIES}")
    return [sys.executable, "-m", "sharpwatch", "serve", "--config", str(path)]


def _alertmanager(folder: Path, webhook: str, times: float) -> tuple[list[str], str]:
    """The shipped receiver, with this daemon's address and token, and the alert that its policy names."""
    text = (_DEPLOY / "alertmanager.yml").read_text()
    text = text.replace("127.0.0.1:9741", webhook).replace("NodeHot|NodeDown", _ALERT)
    text = text.replace("/etc/prometheus/sharpwatch.token", f"{folder}/operator.token")
    path, address = folder / "alertmanager.yml", f"127.0.0.1:{_free_port()}"
    path.write_text(_faster(text, times))
    command = [shutil.which("prometheus-alertmanager") or "alertmanager", f"--config.file={path}"]
    return [
        *command,
        f"--storage.path={folder}/alertmanager",
        f"--web.listen-address={address}",
        "--cluster.listen-address=",
    ], address


def _prometheus(folder: Path, scraped: str, alertmanager: str, times: float) -> list[str]:
    """The shipped scrape job and rules, with this daemon's address, and the Alertmanager."""
    text = (_DEPLOY / "prometheus.yml").read_text().replace("127.0.0.1:9741", scraped)
    text = text.replace("rules/", f"{_DEPLOY}/rules/")
    text += f'\nalerting: {{alertmanagers: [{{static_configs: [{{targets: ["{alertmanager}"]}}]}}]}}\n'
    path = folder / "prometheus.yml"
    path.write_text(_faster(text, times))
    return [
        "prometheus",
        f"--config.file={path}",
        f"--storage.tsdb.path={folder}/prometheus",
        f"--web.listen-address=127.0.0.1:{_free_port()}",
    ]


def _asked(served: dict[str, str], folder: Path, *words: str) -> dict[str, Any]:
    """What a command of the operator's prints."""
    daemon = ("--address", served["grpc"], "--token-file", f"{folder}/operator.token")
    command = [sys.executable, "-m", "sharpwatch", "--json", *daemon, *words]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def _trained(trainer: Any, until: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first of the trainer's steps for which `until` holds."""
    deadline = time.time() + _PATIENCE
    for line in trainer.stdout:
        step: dict[str, Any] = json.loads(line)
        if until(step):
            return step
        if step["time"] > deadline:
            break
    raise SystemExit("the trainer ended, or no alert came back in time")


def round_trip(times: float = 1.0) -> dict[str, Any]:
    """Goes round once.

    Args:
        times: How many times shorter than shipped the intervals are.

    Returns:
        The seconds, and what the operator sees afterwards.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        served = stack.enter_context(_running(_daemon(folder), folder / "daemon.log", _serving))
        command, address = _alertmanager(folder, served["http"], times)
        stack.enter_context(_running(command, folder / "alertmanager.log", lambda line: "Listening on" in line))
        command = _prometheus(folder, served["http"], address, times)
        stack.enter_context(_running(command, folder / "prometheus.log", lambda line: "Server is ready" in line))
        script = folder / "train.py"
        script.write_text(_TRAINER)
        trainer = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "SHARPWATCH_ADDRESS": served["grpc"]},
        )
        stack.callback(trainer.communicate, timeout=60)  # the end of its input ends it; its output has to be read on
        raised = _trained(trainer, lambda step: step["rate"] > 1e-3)
        applied = _trained(trainer, lambda step: any(value != 1.0 for value in step["multipliers"].values()))
        with urllib.request.urlopen(f"http://{served['http']}/metrics", timeout=10) as response:
            metrics = response.read().decode()
        return {
            "seconds": applied["time"] - raised["time"],
            "fault_step": raised["step"],
            "applied_step": applied["step"],
            "multipliers": applied["multipliers"],
            "incidents": _asked(served, folder, "incidents", "round-trip", "--all")["incidents"],
            "audit": _asked(served, folder, "decisions", "round-trip", "--audit"),
            "metrics": metrics,
        }


def main() -> None:
    """Goes round some times and prints the seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="Default: 3.")
    parser.add_argument("--faster", type=float, default=1.0, help="Divides the shipped intervals. Default: 1.")
    given = parser.parse_args()
    seconds = []
    for _ in range(given.rounds):
        seconds.append(round_trip(given.faster)["seconds"])
        print(f"{seconds[-1]:.1f} s", flush=True)
    print(f"median {statistics.median(seconds):.1f} s, longest {max(seconds):.1f} s")


if __name__ == "__main__":
    main()
