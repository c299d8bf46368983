"""Train and record the laboratory's runs: python -m benchmarks.faults.record FOLDER [--seeds 0 1] [--kinds NAME...].

For each model and seed one trunk is trained up to the onset. Every kind branches from it with the same batches: the
healthy twin, twins whose weights are nudged as by rounding to bfloat16, and the faults. A file that exists is not made
again, so the command can be stopped and repeated.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sharpwatch
from benchmarks.faults.kinds import AFTER, KINDS, ONSET, Kind
from benchmarks.faults.recordings import About, path_of, write
from benchmarks.faults.training import MODELS, SIZES, Disturbance, Step, Training, loss_of
from sharpwatch.agent.probes.builtin import DEFAULT_PROBES, PROBES
from sharpwatch.testing import InMemoryTransport

NUDGED = 4  # twins, by which the band of the healthy loss is known
_NUDGE = 2.0**-8  # as rounding to bfloat16 does


@torch.no_grad()
def nudge(training: Training, seed: int) -> None:
    """Change all weights a little, as rounding does."""
    source = torch.Generator().manual_seed(seed)
    for parameter in training.model.parameters():
        parameter.mul_(1 + _NUDGE * torch.randn(parameter.shape, generator=source))


def _train(  # noqa: PLR0913 - a training, and how it is recorded
    training: Training,
    disturbance: Disturbance,
    onset: int,
    until: int,
    kind: Kind | None,
    *,
    probing: Mapping[str, Any],
    before: Mapping[str, Tensor] | None = None,
) -> tuple[Any, list[float]]:
    """Train to step `until` under the agent; `before` is the weights of the step before. Its transport, the losses."""
    transport = InMemoryTransport()
    options: dict[str, Any] = {
        "transport": transport,
        "training_job": "faults",
        "seed": training.seed,
        "loss_fn": loss_of,
        **probing,
    }

    def attach() -> Any:
        return sharpwatch.attach(training.model, training.optimizer, initial_step=training.number, **options)

    attached = 0 if kind is None else kind.attached
    watch = attach() if training.number >= attached else None
    if watch is not None and before is not None:
        _show(watch, training, before)
    losses = []
    while training.number < until:
        losses.append(training.step(disturbance, onset, watch))
        if watch is None and training.number == attached:
            watch = attach()
        if kind is not None and kind.name == "resume" and watch is not None and training.number == onset + 20:
            state = watch.state_dict()
            watch.close()
            watch = attach()
            watch.load_state_dict(state)
    if watch is not None:
        watch.close()
    return transport, losses


def _keep(training: Training, step: Step) -> None:
    del step
    training.memory["weights"] = copy.deepcopy(training.model.state_dict())


def _show(watch: Any, training: Training, before: Mapping[str, Tensor]) -> None:
    """Let the tap read the weights of the step before, as it would have without attaching anew."""
    tap = watch._watched.strategy.tap  # noqa: SLF001 - no run that is watched from its start needs this
    now = copy.deepcopy(training.model.state_dict())
    training.model.load_state_dict(before)
    pending = tap.start({})
    tap.read(pending, 0)
    tap.resolve(pending)
    training.model.load_state_dict(now)


def record(  # noqa: PLR0913, PLR0917 - as the command line has them
    folder: Path, model: str, size: str, seed: int, kinds: Sequence[str], probing: Mapping[str, Any]
) -> str:
    """Record all runs of one model and seed that are missing, with options of `attach`; what was done, in words."""
    torch.set_num_threads(1)
    started, made = time.monotonic(), 0
    trunk = About("trunk", model, size, seed, 0)
    trunk_path = path_of(folder, trunk)
    wanted = sorted((KINDS[name] for name in kinds), key=lambda kind: kind.name != "plain")  # others are judged by it
    missing = [kind for kind in wanted if not path_of(folder, replace(trunk, kind=kind.name)).exists()]
    # Harm is told by nudged twins, and healthy runs do none.
    twins = range(NUDGED if any(kind.cause != "healthy" for kind in wanted) else 0)
    nudged = [i for i in twins if not path_of(folder, replace(trunk, kind=f"nudged-{i}")).exists()]
    if not missing and not nudged and trunk_path.exists():
        return f"{model} {size} {seed}: nothing to do"
    training = Training(model, seed, size)
    transport, losses = _train(training, Disturbance(begin=_keep), ONSET - 1, ONSET - 1, None, probing=probing)
    state, before = training.state(), training.memory["weights"]
    if not trunk_path.exists():
        write(folder, replace(trunk, losses=losses), transport.hellos[0], transport.samples)
    for number in nudged:
        training = Training(model, seed, size)
        training.restore(state)
        nudge(training, number)
        losses = [training.step(Disturbance(), ONSET) for _ in range(AFTER)]
        about = About(f"nudged-{number}", model, size, seed, 0, trunk=trunk_path.name, losses=losses, first=ONSET)
        write(folder, about, None, [])
        made += 1
    for kind in missing:
        _record_kind(folder, Training(model, seed, size), (state, before), kind, trunk_path.name, probing)
        made += 1
        print(f"{model} {size} {seed} {kind.name}", file=sys.stderr, flush=True)
    return f"{model} {size} {seed}: {made} runs in {time.monotonic() - started:.0f} s"


def _record_kind(  # noqa: PLR0913, PLR0917 - as `record`
    folder: Path,
    training: Training,
    states: tuple[dict[str, Any], Mapping[str, Tensor]],
    kind: Kind,
    trunk: str,
    probing: Mapping[str, Any],
) -> None:
    """Record a run; `states` has the trunk's at its end, and its weights at its last step."""
    block, layer = kind.place(training.name, training.seed, SIZES[training.size].layers)
    part = training.part(block, layer) if block else None
    branches = kind.onset == ONSET and kind.schedule is None
    if branches:
        training.restore(states[0])
    if kind.schedule is not None:
        training.schedule = kind.schedule
    until = ONSET + AFTER - 1 if kind.name != "warm-up-1000" else 1000
    before = states[1] if branches else None
    transport, losses = _train(
        training, kind.make(block, layer), kind.onset, until, kind, probing=probing, before=before
    )
    about = About(
        kind.name,
        training.name,
        training.size,
        training.seed,
        0 if kind.cause == "healthy" else kind.onset,
        block,
        None if part is None else part.layer,
        "" if part is None else part.parameter,
        trunk if branches else "",
        losses,
        ONSET if branches else 1,
    )
    write(folder, about, transport.hellos[0], transport.samples)


def main(arguments: Sequence[str]) -> int:
    """Record, two models and seeds at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--size", choices=SIZES, default="0.5M")
    parser.add_argument("--seeds", nargs="+", type=int, default=range(5))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--probe-every", type=int, help="steps between probes; by default what the budget allows")
    parser.add_argument("--probes", nargs="+", choices=PROBES, default=DEFAULT_PROBES)
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    probing = {"probe_every": given.probe_every, "probes": tuple(given.probes)}
    jobs = [
        (given.folder, model, given.size, seed, given.kinds, probing) for seed in given.seeds for model in given.models
    ]
    with ProcessPoolExecutor(given.processes, mp_context=get_context("spawn")) as pool:
        for done in pool.map(record, *zip(*jobs, strict=True)):
            print(done, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
