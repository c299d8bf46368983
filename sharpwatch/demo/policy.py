"""The daemon's configuration for a demo run."""

from __future__ import annotations

from pathlib import Path

# The jump is by 30, so the ladder has to reach 1/30: the cuts are to a fifth each, two steps apart. A production
# policy cuts less and waits longer; see examples/sharpwatch.yaml.
_CONFIG = """\
daemon:
  grpc: "127.0.0.1:0"
  http: "127.0.0.1:0"
  store: "sqlite:///{folder}/sharpwatch.db"
  token_file: "{folder}/operator.token"
policies:
  - name: cut-on-update-rms
    match: {{alert: UpdateRmsSpike}}
    mode: {mode}
    action: {{kind: scale_lr, blocks: all, factor: 0.2}}
    guard: {{min_multiplier: 0.02, cooldown_steps: 2, max_actions_per_hour: 20}}
  - name: cut-on-stability-limit
    match: {{alert: StabilityLimit}}
    mode: {mode}
    action: {{kind: scale_lr, blocks: all, factor: 0.2}}
    guard: {{min_multiplier: 0.02, cooldown_steps: 2, max_actions_per_hour: 20}}
  - name: cut-on-loss-spike
    match: {{alert: LossSpike}}
    mode: {mode}
    action: {{kind: scale_lr, blocks: all, factor: 0.2}}
    guard: {{min_multiplier: 0.02, cooldown_steps: 2, max_actions_per_hour: 20}}
"""


def write_config(folder: Path, mode: str) -> Path:
    """Write the configuration into `folder`; returns its path."""
    path = folder / "sharpwatch.yaml"
    path.write_text(_CONFIG.format(folder=folder, mode=mode), encoding="utf-8")
    return path
