"""How many of the package's files one operation runs through: `python benchmarks/crossings.py [-v]`.

Records every call of a function of sharpwatch, by `sys.setprofile`, over `attach`, a step, a step with a `gnb` probe,
and a sample's way through a daemon in a process of its own. It uses public names alone. For each operation it prints
calls, functions, files, changes of file from one call to the next, and how many of those went back to an earlier file;
`-v` adds the files in their order. tests/integration/test_crossings.py holds the counts.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import sharpwatch
from sharpwatch.cli.main import main as command_line

Call = tuple[str, str]  # file and function
PACKAGE = str(Path(sharpwatch.__file__).parent) + os.sep
STEPS = {23: "step", 25: "step with a gnb probe"}  # probes run at every 5th
SAMPLE = "sample with a gnb probe, at the daemon"


class Recorder:
    """Calls of functions inside the package; generated code, comprehensions and class bodies are left out."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.recording = False

    def profile(self, frame: FrameType, event: str, _: object) -> None:
        """What `sys.setprofile` takes."""
        if not (self.recording and event == "call" and frame.f_code.co_flags & inspect.CO_OPTIMIZED):
            return
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE) and f"{os.sep}v1{os.sep}" not in name and not frame.f_code.co_name.startswith("<"):
            self.calls.append((name.removeprefix(PACKAGE), frame.f_code.co_qualname))

    def record(self, act: Callable[[], Any]) -> tuple[Any, list[Call]]:
        """What `act()` returned, and the calls it made."""
        self.calls, self.recording = [], True
        sys.setprofile(self.profile)
        try:
            made = act()
        finally:
            sys.setprofile(None)
            self.recording = False
        return made, self.calls


class Net(nn.Module):
    """A small transformer."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True)
        self.wte = nn.Embedding(16, 32)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.lm_head = nn.Linear(32, 16)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Logits and loss."""
        logits = self.lm_head(self.blocks(self.wte(ids)))
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def count_crossings(seen: Sequence[Call]) -> dict[str, Any]:
    """The counts of one recording."""
    path = [name for name, _ in itertools.groupby(name for name, _ in seen)]
    return {
        "calls": len(seen),
        "functions": len(set(seen)),
        "files": len(set(path)),
        "changes": max(0, len(path) - 1),
        "back": sum(name in path[:index] for index, name in enumerate(path)),
        "order": list(dict.fromkeys(path)),
    }


def serve(config: str, kept: str) -> None:
    """The daemon; it records from SIGUSR1 to SIGUSR2, and writes its calls to `kept` then."""
    recorder = Recorder()

    def begin(*_: object) -> None:
        recorder.recording = True

    def end(*_: object) -> None:
        recorder.recording = False
        draft = Path(kept + ".draft")
        draft.write_text(json.dumps(recorder.calls), encoding="utf-8")
        draft.replace(kept)

    signal.signal(signal.SIGUSR1, begin)
    signal.signal(signal.SIGUSR2, end)
    threading.setprofile(recorder.profile)
    sys.setprofile(recorder.profile)
    command_line(["serve", "--config", config])


def start_daemon(folder: Path) -> tuple[subprocess.Popen[str], str]:
    """A daemon that serves, and its address."""
    config = folder / "sharpwatch.yaml"
    config.write_text(
        f'daemon: {{grpc: "127.0.0.1:0", http: "127.0.0.1:0", device: cpu, store: "sqlite:///{folder}/journal.db", '
        f'token_file: "{folder}/token"}}\n',
        encoding="utf-8",
    )
    command = [sys.executable, __file__, "serve", str(config), str(folder / "calls.json")]
    daemon = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert daemon.stderr is not None
    for line in daemon.stderr:
        event = json.loads(line) if line.startswith("{") else {}
        if event.get("event") == "serving":
            return daemon, str(event["grpc"])
    raise RuntimeError("the daemon did not start")


def measured() -> dict[str, dict[str, Any]]:
    """The counts of each operation."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Net().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(16, (8, 12))
    recorder, found = Recorder(), {}
    with tempfile.TemporaryDirectory() as folder:
        daemon, address = start_daemon(Path(folder))
        try:
            watch, calls = recorder.record(
                lambda: sharpwatch.attach(
                    model, optimizer, training_job="crossings", address=address, probe_every=5, probes=("gnb",)
                )
            )
            found["attach"] = count_crossings(calls)
            for step in range(1, max(STEPS) + 1):
                if step == max(STEPS):
                    time.sleep(1.0)  # nothing of earlier samples is under way; only its silence could tell
                    daemon.send_signal(signal.SIGUSR1)
                    time.sleep(0.5)
                output, forward = recorder.record(lambda: model(ids, labels=ids))
                output["loss"].backward()
                _, stepped = recorder.record(optimizer.step)
                if step in STEPS:
                    found[STEPS[step]] = count_crossings([*forward, *stepped])
                optimizer.zero_grad()
                time.sleep(0.05)
            time.sleep(2.0)
            found[SAMPLE] = count_crossings(_daemon_calls(daemon, Path(folder) / "calls.json"))
            watch.close()
        finally:
            daemon.terminate()
            daemon.communicate(timeout=120)
    return found


def _daemon_calls(daemon: subprocess.Popen[str], kept: Path) -> list[Call]:
    daemon.send_signal(signal.SIGUSR2)
    while not kept.exists():
        time.sleep(0.05)
    return [(name, function) for name, function in json.loads(kept.read_text(encoding="utf-8"))]


def main() -> None:
    """Measure all four and print them."""
    for name, counts in measured().items():
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in counts.items() if key != "order"))
        if "-v" in sys.argv:
            print("   " + " ".join(counts["order"]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(*sys.argv[2:4])
    else:
        main()
