"""The demo's trainer: an ordinary training script with the agent attached, in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import sharpwatch
from sharpwatch.demo import faults
from sharpwatch.demo.models import LENGTH, ROWS, build
from sharpwatch.demo.text import Corpus, load_corpus

PEAK_RATE = 1e-3
WARMUP_STEPS = 30
CHECKPOINT_EVERY = 50
# The steps of this demo take a tenth of a second and there are few of them; a production run with the default
# budget of 1 % sees its first hundred probes in ten thousand steps.
OVERHEAD_BUDGET = 0.1


@dataclass(frozen=True)
class Recipe:
    """One run of the demo."""

    model: str
    steps: int
    fault: faults.Fault
    fault_step: int
    run: str
    address: str
    folder: str  # where checkpoints and the losses go
    cache: str  # where the tokenised text is kept
    seed: int = 0


class Trainer:
    """Model, optimizer, schedule and data of one run, and how to put them back."""

    def __init__(self, recipe: Recipe, corpus: Corpus) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.corpus = corpus
        self.model = build(recipe.model, corpus.vocabulary).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1, foreach=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate)
        self.data = torch.Generator().manual_seed(recipe.seed + 1)
        self.noise = torch.Generator().manual_seed(recipe.seed + 2)
        self.position = 0  # batches drawn; the batch of step n is the n-th unless some were skipped
        self.skip = range(0)
        self.step = 0
        self.losses: list[tuple[int, float]] = []

    def rate(self, step: int) -> float:
        """The schedule: a linear warm-up, then flat, times what the fault makes of it."""
        fault = faults.rate_factor(self.recipe.fault, step, self.recipe.fault_step)
        return min(1.0, (step + 1) / WARMUP_STEPS) * fault

    def batch(self) -> torch.Tensor:
        """The next batch that is not to be skipped: int64 [ROWS, LENGTH]."""
        while True:
            tokens = self.corpus.batch(ROWS, LENGTH, self.data)
            self.position += 1
            if self.recipe.fault == "bad-batches" and 0 < self.position - self.recipe.fault_step <= faults.BAD_BATCHES:
                tokens = faults.spoil_batch(tokens, self.corpus.vocabulary, self.noise)
            if self.position not in self.skip:
                return tokens

    def save(self) -> str:
        """Write a checkpoint; returns its path."""
        path = Path(self.recipe.folder) / f"step-{self.step}.pt"
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "data": self.data.get_state(),
            "rng": torch.get_rng_state(),
            "step": self.step,
            "position": self.position,
        }
        torch.save(state, path)
        return str(path)

    def restore(self, request: sharpwatch.RollbackRequest) -> None:
        """Put everything back to a checkpoint; the batches to be skipped are passed over when they come.

        This runs inside `optimizer.step()`, so what the loop does after it still happens: a checkpoint is therefore
        the state right after `optimizer.step()`, before the schedule moves.
        """
        state = torch.load(request.uri, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.data.set_state(state["data"])
        torch.set_rng_state(state["rng"])
        self.step, self.position = state["step"], state["position"]
        self.skip = range(*request.skip)


def train(recipe: Recipe) -> None:
    """Train to the end and write `losses.json` into the run's folder: [[step, loss], ...]."""
    torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))  # a core is for the daemon and the view
    trainer = Trainer(recipe, load_corpus(Path(recipe.cache)))
    model, optimizer = trainer.model, trainer.optimizer
    watch = sharpwatch.attach(
        model,
        optimizer,
        training_job=f"demo-{recipe.model}",
        run=recipe.run,
        address=recipe.address,
        overhead_budget=OVERHEAD_BUDGET,
        on_rollback=trainer.restore,
        lr_bounds=(0.01, 10.0),
        seed=recipe.seed,
    )
    with watch:
        while trainer.step < recipe.steps:
            if recipe.fault == "weight-corruption" and trainer.step == recipe.fault_step:
                faults.corrupt_weight(model)
            tokens = trainer.batch()
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            trainer.step += 1
            trainer.losses.append((trainer.step, loss.item()))
            watch.observe(loss=loss)
            optimizer.step()
            if trainer.step % CHECKPOINT_EVERY == 0:
                watch.saved_checkpoint(trainer.step, trainer.save())
            trainer.schedule.step()
            optimizer.zero_grad()
    (Path(recipe.folder) / "losses.json").write_text(json.dumps(trainer.losses), encoding="utf-8")


def command(recipe: Recipe) -> list[str]:
    """The command line that runs this module with `recipe`."""
    return [sys.executable, "-m", "sharpwatch.demo.train", json.dumps(asdict(recipe))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=json.loads)
    train(Recipe(**parser.parse_args().recipe))
