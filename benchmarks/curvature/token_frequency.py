"""How the embedding's sharpness depends on how frequent a token is, as a model of the demo trains.

    python -m benchmarks.curvature.token_frequency [--models llama gpt2] [--steps 0 30 300] [--draws 32]

Trains on nine tenths of the demo's text, and measures on eight batches of the last tenth. A markdown table for each
model goes to stdout, with the slope of a line through the deciles' logarithms of sharpness and of the mean count.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

import sharpwatch
from sharpwatch.cli.output import percent, with_error
from sharpwatch.curvature.measure.embedding_rows import UNSEEN, EmbeddingRows
from sharpwatch.demo.recipe import Recipe
from sharpwatch.demo.train import LENGTH, ROWS, Corpus, DemoTrainer, load_corpus

BATCHES = 8
_CACHE = Path(".bench")


def split(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """The text to train on, and that to measure on."""
    cut = len(corpus.tokens) * 9 // 10
    return Corpus(corpus.tokens[:cut], corpus.vocabulary), Corpus(corpus.tokens[cut:], corpus.vocabulary)


def train_to(trainer: DemoTrainer, step: int) -> None:
    """Train as the demo does, without an agent."""
    while trainer.step < step:
        tokens = trainer.batch()
        trainer.model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.schedule.step()
        trainer.step += 1


def slope(found: EmbeddingRows, occurrences: int) -> float:
    """The exponent α of sharpness ∝ countᵅ, by least squares through the logarithms of the deciles."""
    deciles = [group for name, group in found.groups.items() if name != UNSEEN]
    counts = [group.share * occurrences / group.tokens for group in deciles]
    fitted = np.polyfit(np.log(counts), np.log([group.sharpness.value for group in deciles]), 1)
    return float(fitted[0])


def table(found: dict[int, EmbeddingRows], occurrences: int) -> str:
    """A markdown table: the sharpness of each group after each number of steps."""
    first = next(iter(found.values()))
    headings = ["group", "tokens", "occurrences of each", "share", *(f"after {step} steps" for step in found)]
    lines = [" | ".join(headings), " | ".join(["---"] * len(headings))]
    for name, group in first.groups.items():
        sharpness = (each.groups[name].sharpness for each in found.values())
        cells = [name, f"{group.tokens}", f"{group.max_count} to {group.min_count}", percent(group.share)]
        lines.append(" | ".join([*cells, *(with_error(each.value, each.stderr) for each in sharpness)]))
    slopes = [f"{slope(each, occurrences):.2f}" for each in found.values()]
    lines.append(" | ".join(["slope", "", "", "", *slopes]))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["llama", "gpt2"], choices=["llama", "gpt2"])
    parser.add_argument("--steps", nargs="+", type=int, default=[0, 30, 300])
    parser.add_argument("--draws", type=int, default=32)
    given = parser.parse_args()
    corpus, held_out = split(load_corpus(_CACHE))
    source = torch.Generator().manual_seed(0)
    windows = [held_out.batch(ROWS, LENGTH, source) for _ in range(BATCHES)]
    batches = [{"input_ids": tokens, "labels": tokens} for tokens in windows]
    for name in given.models:
        trainer = DemoTrainer(Recipe(name, max(given.steps), "none", 0, "", "", "", ""), corpus)
        found: dict[int, EmbeddingRows] = {}
        for step in sorted(given.steps):
            train_to(trainer, step)
            report = sharpwatch.measure(trainer.model, batches, estimators=("gnb",), draws=given.draws)
            if report.embedding_rows is None or report.embedding_rows.reason:
                raise ValueError(f"{name} has no embedding rows: {report.embedding_rows}")
            found[step] = report.embedding_rows
            emb = report.blocks["emb"].sharpness
            print(f"{name} after {step} steps: emb {with_error(emb.value, emb.stderr) if emb else ''}", flush=True)
        print(table(found, sum(tokens.numel() for tokens in windows)), flush=True)


if __name__ == "__main__":
    main()
