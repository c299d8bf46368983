"""What an action without a reason costs a healthy run: python -m benchmarks.faults.false_alarms [--seeds 50].

At the onset an alert of another system fires, on which a policy cuts all rates; it ends 20 steps later. The real daemon
has to take the cut back by itself. 500 steps after the end every multiplier must be 1, and the loss no further from the
undisturbed twin's than that of 95 % of twins whose weights are nudged, at the onset, as by rounding to bfloat16.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from http.client import HTTPConnection
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from benchmarks.faults.act import Acted, daemon
from benchmarks.faults.kinds import KINDS, ONSET
from benchmarks.faults.record import nudge
from benchmarks.faults.training import MODELS, Disturbance, Training

FOR, AFTER, MEAN_OF = 20, 500, 20  # steps: of the alert, after it, and whose mean loss is compared
TWINS = 20
END = ONSET + FOR + AFTER + MEAN_OF
POLICY = """
policies:
  - name: cut-for-nothing
    match: {foreign: FalseAlarm}
    mode: enforce
    action: {kind: scale_lr, blocks: all, factor: FACTOR}
    guard: {min_multiplier: 0.01, cooldown_steps: 200, max_actions_per_hour: 4, hold_steps: 80}
"""


class FalseAlarm(Acted):
    """A healthy training on which an alert fires for a while."""

    def __init__(self, training: Training, served: dict[str, str], token: str) -> None:
        super().__init__(training, KINDS["plain"])
        self.served, self.token = served, token
        self.seen: dict[int, dict[str, float]] = {}  # multipliers, by step

    def after_step(self, watch: Any) -> None:
        """Have the alert fire, and end."""
        number = self.training.number
        self.seen[number] = dict(watch.status.multipliers)
        if number in (ONSET, ONSET + FOR):
            self._tell("firing" if number == ONSET else "resolved")

    def _tell(self, status: str) -> None:
        labels = {"alertname": "FalseAlarm", "run": "run"}
        alert = {"status": status, "labels": labels, "fingerprint": "f", "startsAt": "2026-01-01T00:00:00Z"}
        ends = time.gmtime() if status == "resolved" else None
        alert["endsAt"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", ends) if ends else "0001-01-01T00:00:00Z"
        connection = HTTPConnection(self.served["http"], timeout=30)
        body = json.dumps({"version": "4", "alerts": [alert]})
        connection.request("POST", "/api/v1/alerts", body, {"Authorization": f"Bearer {self.token}"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"the daemon answered {response.status}: {response.read()!r}")
        connection.close()


def _losses(training: Training) -> float:
    losses = [training.step(Disturbance(), ONSET) for _ in range(END - training.number)]
    return fmean(losses[-MEAN_OF:])


def _judge(
    model: str, seed: int, factor: float
) -> tuple[dict[str, float], dict[int, float], dict[int, dict[str, float]]]:
    """The multipliers at the end, the losses and the multipliers by step."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with daemon(folder, POLICY.replace("FACTOR", str(factor))) as served:
            token = (folder / "operator.token").read_text(encoding="utf-8").strip()
            run = FalseAlarm(Training(model, seed), served, token)
            run.run(served["grpc"], "run", END)
    return run.seen[END], run.losses, run.seen


def main(arguments: Sequence[str]) -> int:
    """Print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[50])
    parser.add_argument("--factors", nargs="+", type=float, default=[0.5, 0.1])
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for seed in given.seeds:
        for model in MODELS:
            acted = {factor: _judge(model, seed, factor) for factor in given.factors}
            trunk = Training(model, seed)
            while trunk.number < ONSET:
                trunk.step(Disturbance(), ONSET)
            state, twin = trunk.state(), _losses(trunk)
            nudged = []
            for number in range(TWINS):
                trunk.restore(state)
                nudge(trunk, number)
                nudged.append(abs(_losses(trunk) - twin))
            limit = float(np.quantile(nudged, 0.95))
            for factor, (multipliers, losses, seen) in acted.items():
                apart = fmean(losses[step] for step in range(END - MEAN_OF + 1, END + 1)) - twin
                whole = next((step - ONSET for step in range(END, ONSET, -1) if min(seen[step].values()) < 1), 0)
                print(
                    f"{model} {seed} ×{factor:g}: multipliers {sorted(set(multipliers.values()))} at the end, all 1 "
                    f"from {whole + 1} steps after the onset on; loss {apart:+.4f} from the twin, allowed {limit:.4f}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
