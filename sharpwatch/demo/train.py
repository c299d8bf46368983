"""The demo's trainer, run as a process: an ordinary training script with the agent attached, and its text."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import sharpwatch
from sharpwatch.demo.recipe import BAD_BATCHES, CORRUPT_WEIGHT, LR_JUMP, Fault, Recipe

VOCABULARY = 2048
_END = "<|endoftext|>"
_SOURCE_BYTES = 3_000_000  # enough that a demo run never sees a window twice
_SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """The token ids of the whole text, and the size of the vocabulary."""

    tokens: Tensor  # int64 [tokens]
    vocabulary: int

    def batch(self, rows: int, length: int, generator: torch.Generator) -> Tensor:
        """Draw `rows` windows of `length` tokens from random places: int64 [rows, length]."""
        starts = torch.randint(len(self.tokens) - length, (rows, 1), generator=generator)
        return self.tokens[starts + torch.arange(length)]


def english() -> list[str]:
    """The chapters of the language reference."""
    from pydoc_data import topics  # noqa: PLC0415 - 700 kB of text, only when asked for

    return [text for _, text in sorted(topics.topics.items())]


def library_sources(size: int) -> list[str]:
    """Sources of the standard library, in order, until they have more than `size` characters."""
    library = Path(sysconfig.get_path("stdlib"))
    sources: list[str] = []
    for path in sorted(library.rglob("*.py")):
        if _SKIP & set(path.relative_to(library).parts) or "pydoc_data" in path.parts:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        sources.append(text)
        size -= len(text)
        if size < 0:
            break
    return sources


def _documents() -> list[str]:
    # Text that every Python brings along, so that the demo downloads nothing.
    return english() + library_sources(_SOURCE_BYTES)


def load_corpus(cache: Path) -> Corpus:
    """Tokenise the text, or load the tokens of an earlier call.

    Args:
        cache: The folder that keeps the tokens, in a file named after a hash of the text.
    """
    documents = _documents()
    digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()[:16]
    path = cache / f"tokens-{digest}-{VOCABULARY}.pt"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        tokens = _encode(documents)
        # Renamed when complete: an interrupted first run must not leave half a cache for the next.
        partial = path.with_suffix(".partial")
        torch.save(tokens, partial)
        partial.replace(path)
    return Corpus(torch.load(path, weights_only=True), VOCABULARY)


def _encode(documents: list[str]) -> Tensor:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    end = tokenizer.encode(_END).ids
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    ids: list[int] = []
    for encoding in tokenizer.encode_batch([documents[index] for index in order]):
        ids.extend((*encoding.ids, *end))
    return torch.tensor(ids)


LENGTH = 128  # tokens in a row
ROWS = 8  # rows in a batch
PEAK_RATE = 1e-3
WARMUP_STEPS = 30
CHECKPOINT_EVERY = 50
# The demo has few steps of a tenth of a second each; with the default budget of 1 %, the first hundred probes of a
# production run take ten thousand steps.
OVERHEAD_BUDGET = 0.1


def build(name: str, vocabulary: int) -> nn.Module:
    """Make a transformer of Hugging Face's own classes, small enough for two cores.

    Args:
        name: `gpt2` (fused QKV, tied head, dropout) or `llama` (grouped queries, RMSNorm, own head).
        vocabulary: The number of tokens.
    """
    if name == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary,
                n_positions=LENGTH,
                n_embd=128,
                n_layer=4,
                n_head=4,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def rate_factor(fault: Fault, step: int, fault_step: int) -> float:
    """The factor by which the schedule is wrong at `step`."""
    return LR_JUMP if fault == "lr-jump" and step >= fault_step else 1.0


def corrupt_weight(model: nn.Module) -> str:
    """Overwrite one weight of the third layer's feed-forward block.

    Returns:
        The parameter's name.
    """
    for name, parameter in model.named_parameters():
        if ".2.mlp." in name and parameter.dim() == 2:
            with torch.no_grad():
                parameter[parameter.shape[0] // 2, parameter.shape[1] // 2] = CORRUPT_WEIGHT
            return name
    raise ValueError("the model has no feed-forward matrix in a third layer")


def spoil_batch(tokens: Tensor, vocabulary: int, generator: torch.Generator) -> Tensor:
    """Random tokens in the shape of `tokens`, as from a broken shard."""
    return torch.randint(vocabulary, tokens.shape, generator=generator)


class DemoTrainer:
    """The model, optimizer, schedule and data of one run; saves and restores them."""

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
        # A generator apart from the data's, so that the fault does not change which batches come after it.
        self.noise = torch.Generator().manual_seed(recipe.seed + 2)
        self.position = 0  # batches drawn; step n trains on the n-th unless some were skipped
        self.skip = range(0)
        self.step = 0
        self.losses: list[tuple[int, float]] = []

    def rate(self, step: int) -> float:
        """The schedule: a linear warm-up, then constant, times the fault's factor."""
        fault = rate_factor(self.recipe.fault, step, self.recipe.fault_step)
        return min(1.0, (step + 1) / WARMUP_STEPS) * fault

    def batch(self) -> torch.Tensor:
        """The next batch that is not skipped: int64 [ROWS, LENGTH]."""
        while True:
            tokens = self.corpus.batch(ROWS, LENGTH, self.data)
            self.position += 1
            if self.recipe.fault == "bad-batches" and 0 < self.position - self.recipe.fault_step <= BAD_BATCHES:
                tokens = spoil_batch(tokens, self.corpus.vocabulary, self.noise)
            # Drawn all the same, so that the generator stands where it would after training on the skipped batches.
            if self.position not in self.skip:
                return tokens

    def save(self) -> str:
        """Write a checkpoint, and return its path."""
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
        """Restore everything from a checkpoint, and skip the requested batches from then on.

        This runs inside `optimizer.step()`, and the loop's remaining lines still run after it. Therefore a checkpoint
        holds the state right after `optimizer.step()`, before the schedule moves.
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
    """Train to the end, and write `losses.json` into the run's folder: [[step, loss], ...]."""
    torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))  # leave a core for the daemon and the view
    trainer = DemoTrainer(recipe, load_corpus(Path(recipe.cache)))
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
                corrupt_weight(model)
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
    train(Recipe(**json.loads(sys.argv[1])))
