"""The demo's faults at many lengths and seeds: python -m benchmarks.faults.demo FOLDER [--seeds 0 1 2 3 4].

`sharpwatch demo` puts its fault into the middle of a run. Here one healthy run of 600 steps for each model and seed is
the trunk; each fault branches from it at the middle of each length, for as many steps as an incident may take.
FOLDER keeps the tokenised text.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import torch

import sharpwatch
from sharpwatch.daemon.detection.run_detection import RunDetection
from sharpwatch.daemon.ingest.hello import RunHello, read_hello
from sharpwatch.daemon.ingest.samples import read_sample
from sharpwatch.daemon.runs.run import observation_of
from sharpwatch.demo.recipe import Recipe
from sharpwatch.demo.train import OVERHEAD_BUDGET, DemoTrainer, corrupt_weight, load_corpus
from sharpwatch.testing import InMemoryTransport

MODELS = ("llama", "gpt2")
FAULTS = ("lr-jump", "bad-batches", "weight-corruption")
LENGTHS = (200, 250, 300, 400, 600)
WITHIN = 5  # steps after the onset


@dataclass(frozen=True, slots=True)
class Found:
    """What became of one combination: the steps from onset to incident and page; None for none."""

    model: str
    seed: int
    fault: str
    length: int
    incident: int | None
    page: int | None
    name: str = ""


class Watched:
    """One trainer under the agent, whose samples go to the detectors.

    Args:
        recipe: The run.
        checkpoint: Where its state comes from, and its step; None for a new run.
        detection: The detectors, and the Hello that they go by; None for new ones.
    """

    def __init__(
        self, recipe: Recipe, checkpoint: tuple[int, str] | None, detection: tuple[RunDetection, RunHello] | None
    ) -> None:
        self.trainer = DemoTrainer(recipe, load_corpus(Path(recipe.cache)))
        if checkpoint is not None:
            self.trainer.restore(sharpwatch.RollbackRequest(*checkpoint, skip=(0, 0), reason=""))
            self.trainer.schedule.step()
        self.transport = InMemoryTransport()
        self.watch = sharpwatch.attach(
            self.trainer.model,
            self.trainer.optimizer,
            training_job="demo",
            transport=self.transport,
            overhead_budget=OVERHEAD_BUDGET,
            initial_step=self.trainer.step,
            seed=recipe.seed,
        )
        own = read_hello(self.transport.hellos[0])
        numbers = count()
        made = RunDetection("run", own.layer_blocks, own.parameters, lambda: str(next(numbers)))
        self.detection, self.hello = (made, own) if detection is None else detection

    def step(self) -> None:
        """As `sharpwatch.demo.train.train` does, then the detectors."""
        trainer, recipe = self.trainer, self.trainer.recipe
        if recipe.fault == "weight-corruption" and trainer.step == recipe.fault_step:
            corrupt_weight(trainer.model)
        tokens = trainer.batch()
        loss = trainer.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.step += 1
        self.watch.observe(loss=loss)
        trainer.optimizer.step()
        self._detect()
        # What the demo restores is the state before the schedule moves.
        self.saved = trainer.save() if trainer.step in {length // 2 for length in LENGTHS} else ""
        trainer.schedule.step()
        trainer.optimizer.zero_grad()

    def _detect(self) -> None:
        sent, self.transport.samples = self.transport.samples, []
        for sample in sent:
            self.detection.see(observation_of(self.hello.blocks, read_sample(self.hello, sample)))


def combinations(model: str, seed: int, folder: Path) -> Iterator[Found]:
    """All faults and lengths of one model and seed; then the healthy run itself, under the longest length."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        recipe = Recipe(model, max(LENGTHS), "none", 0, "run", "", scratch, str(folder), seed)
        trunk = Watched(recipe, None, None)
        while trunk.trainer.step < max(LENGTHS):
            trunk.step()
            if trunk.saved:
                for fault in FAULTS:
                    yield _branch(trunk, fault)
        trunk.watch.close()
        all_of = trunk.detection.incidents.all
        pages = [incident for incident in all_of if incident.severity == "critical"]
        names = ", ".join(f"{each.name} ({each.severity}) at {each.first_step}" for each in all_of)
        yield Found(
            model,
            seed,
            "none",
            max(LENGTHS),
            all_of[0].first_step if all_of else None,
            pages[0].first_step if pages else None,
            names,
        )


def _branch(trunk: Watched, fault: str) -> Found:
    onset = trunk.trainer.step
    recipe = replace(trunk.trainer.recipe, fault=fault, fault_step=onset)
    detection = copy.deepcopy(trunk.detection)
    before = {incident.id for incident in detection.incidents.all}
    branch = Watched(recipe, (onset, trunk.saved), (detection, trunk.hello))
    for _ in range(WITHIN):
        branch.step()
    branch.watch.close()
    new = [incident for incident in detection.incidents.all if incident.id not in before]
    pages = [incident for incident in new if incident.severity == "critical"]
    first, page = (min((each.first_step - onset for each in some), default=None) for some in (new, pages))
    names = ", ".join(each.name for each in new)
    return Found(recipe.model, recipe.seed, fault, 2 * onset, first, page, names)


def main(arguments: Sequence[str]) -> int:
    """Print a line for each combination that is not as it should be, then a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=range(5))
    given = parser.parse_args(arguments)
    found: list[Found] = []
    for seed in given.seeds:
        for model in MODELS:
            for one in combinations(model, seed, given.folder):
                found.append(one)
                if (one.incident is None) != (one.fault == "none"):
                    print(one, flush=True)
    print("| fault | incident within 5 steps | page within 5 steps |\n|---|---|---|")
    for fault in (*FAULTS, "none"):
        of = [one for one in found if one.fault == fault]
        incidents = sum(one.incident is not None for one in of)
        pages = sum(one.page is not None for one in of)
        print(f"| {fault} | {incidents} of {len(of)} | {pages} of {len(of)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
