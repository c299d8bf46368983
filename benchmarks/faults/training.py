"""Small language models on real text, and one training of each that a fault can be put into."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import sharpwatch
from sharpwatch.blocks import Part
from sharpwatch.demo.train import english, library_sources

ROWS, LENGTH = 6, 64  # 384 tokens a step
PEAK_RATE = 2e-3
WARM_UP = 60
MAX_NORM = 1.0
MODELS = ("llama", "gpt2")
BYTES = 256  # vocabulary whose tokens are bytes; a larger one is of byte pairs
_DOMAIN_BYTES = 1_500_000


class Size(NamedTuple):
    """The size of a model, and of its vocabulary."""

    width: int
    inner: int
    layers: int
    heads: int
    vocabulary: int = BYTES


SIZES = {
    "0.5M": Size(96, 256, 4, 4),
    "1M": Size(128, 344, 4, 4, vocabulary=1024),
    "5M": Size(288, 768, 5, 6, vocabulary=2048),
    "gpt2-small": Size(768, 2048, 12, 12, vocabulary=8192),
}


@cache
def raw(domain: str) -> bytes:
    """A kind of text that every Python brings along: "english", the language reference, or "code", its sources."""
    joined = "\n\n".join(english() if domain == "english" else library_sources(_DOMAIN_BYTES))
    return joined.encode()[:_DOMAIN_BYTES]


@cache
def byte_pairs(vocabulary: int) -> Tokenizer:
    """The byte pairs of both kinds of text, with every byte among them, so that any text has tokens."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=vocabulary, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([raw(domain).decode(errors="ignore") for domain in ("english", "code")], trainer)
    return tokenizer


@cache
def text(domain: str, vocabulary: int = BYTES) -> Tensor:
    """The tokens of a kind of text: int64 [n].

    Args:
        domain: As in `raw`.
        vocabulary: Number of different tokens.
    """
    if vocabulary == BYTES:
        return torch.frombuffer(bytearray(raw(domain)), dtype=torch.uint8).long()
    return torch.tensor(byte_pairs(vocabulary).encode(raw(domain).decode(errors="ignore")).ids)


def build(name: str, size: str = "0.5M", length: int = LENGTH) -> nn.Module:
    """A model of Hugging Face's own class: "llama" (grouped queries, RMSNorm, own head) or "gpt2" (fused, tied)."""
    width, inner, layers, heads, vocabulary = SIZES[size]
    if name == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary,
                n_positions=length,
                n_embd=width,
                n_inner=inner * 3 // 2,
                n_layer=layers,
                n_head=heads,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            max_position_embeddings=length,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def loss_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean loss of a batch; also the `loss_fn` of probes."""
    logits = model(input_ids=batch["inputs"]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


@dataclass(slots=True)
class Step:
    """One step of a training, as what disturbs it may change it.

    Attributes:
        number: 1, 2, 3, …
        since: Steps since the onset; 0 at the onset.
        domain: What text the batch is from.
        rows: Number of rows.
        factor: Of the schedule's learning rate.
        tokens: Int64 [rows, LENGTH + 1], drawn before `batch` is called: inputs and their next tokens.
        labels: Int64 [rows, LENGTH]; None for the tokens that follow.
    """

    number: int
    since: int
    domain: str = "mixed"
    rows: int = ROWS
    factor: float = 1.0
    tokens: Tensor | None = None
    labels: Tensor | None = None


Act = Callable[["Training", Step], None]


@dataclass(frozen=True, slots=True)
class Disturbance:
    """What is done to a training from its onset on; each is called at every step from there, `begin` at the onset.

    Attributes:
        begin: Before the first step: weights, optimizer, its settings.
        plan: Before a batch is drawn: its domain, its rows, the factor of the rate.
        batch: After it is drawn.
        gradients: Before clipping.
        clipped: After clipping.
        stepped: After the optimizer's step.
    """

    begin: Act | None = None
    plan: Act | None = None
    batch: Act | None = None
    gradients: Act | None = None
    clipped: Act | None = None
    stepped: Act | None = None


@dataclass(slots=True)
class Training:
    """A model, its optimizer, schedule and text.

    Args:
        name: One of `MODELS`.
        seed: Of weights and batches.
        size: One of `SIZES`.
        schedule: The learning rate at step n, as a share of `PEAK_RATE`; by default a linear warm-up, then constant.
    """

    name: str
    seed: int
    size: str = "0.5M"
    schedule: Callable[[int], float] = field(default=lambda step: min(1.0, step / WARM_UP))
    model: nn.Module = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    data: torch.Generator = field(init=False)
    noise: torch.Generator = field(init=False)
    number: int = field(init=False, default=0)
    memory: dict[str, Any] = field(init=False, default_factory=dict)  # of a disturbance

    def __post_init__(self) -> None:
        """Make model and optimizer."""
        torch.manual_seed(self.seed)
        self.model = build(self.name, self.size).train()
        decayed = [parameter for parameter in self.model.parameters() if parameter.dim() >= 2]
        others = [parameter for parameter in self.model.parameters() if parameter.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            lr=PEAK_RATE,
            betas=(0.9, 0.95),
            foreach=True,
        )
        self.data = torch.Generator().manual_seed(1000 + self.seed)
        self.noise = torch.Generator().manual_seed(2000 + self.seed)  # apart: a fault must not change later batches

    @property
    def vocabulary(self) -> int:
        """Number of different tokens."""
        return SIZES[self.size].vocabulary

    @property
    def frequent(self) -> int:
        """A token that occurs often."""
        if self.vocabulary == BYTES:
            return ord("e")
        return int(torch.cat([text(domain, self.vocabulary) for domain in ("english", "code")]).bincount().argmax())

    def state(self) -> dict[str, Any]:
        """All that a branch starts from."""
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "data": self.data.get_state(),
                "number": self.number,
            }
        )

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        state = copy.deepcopy(state)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.data.set_state(state["data"])
        self.number = state["number"]

    def part(self, block: str, layer: int | None) -> Part:
        """The largest part of a block type in a layer, by sharpwatch's own division; whole parameters first."""
        parts = sharpwatch.classify(self.model).parts
        layers = sorted({part.layer for part in parts if part.layer is not None}, key=lambda each: (len(each), each))
        wanted = None if layer is None else layers[layer]
        found = [part for part in parts if part.type == block and part.layer == wanted]
        if not found:
            raise ValueError(f"{self.name} has no block {block} in layer {layer}")
        return max(found, key=lambda part: (part.dim is None, part.numel))

    def weight(self, part: Part) -> Tensor:
        """The part of its parameter, as a view."""
        return _view(part, dict(self.model.named_parameters())[part.parameter])

    def gradient(self, part: Part) -> Tensor:
        """The part of its parameter's gradient, as a view."""
        gradient = dict(self.model.named_parameters())[part.parameter].grad
        if gradient is None:
            raise RuntimeError(f"{part.parameter} has no gradient")
        return _view(part, gradient)

    def draw(self, rows: int, domain: str) -> Tensor:
        """Windows of LENGTH + 1 tokens from random places: int64 [rows, LENGTH + 1]."""
        domains = ("english", "code") if domain == "mixed" else (domain,)
        sources = [text(each, self.vocabulary) for each in domains]
        windows = []
        for row in range(rows):
            source = sources[row % len(sources)]
            start = int(torch.randint(len(source) - LENGTH - 1, (1,), generator=self.data))
            windows.append(source[start : start + LENGTH + 1])
        return torch.stack(windows)

    def step(self, done: Disturbance, onset: int, watch: Any = None) -> float:
        """Train one step; the loss."""
        self.number += 1
        step = Step(self.number, self.number - onset)
        disturbed = self.number >= onset

        def act(kind: str) -> None:
            call = getattr(done, kind)
            if disturbed and call is not None:
                call(self, step)

        if step.since == 0:
            act("begin")
        act("plan")
        step.tokens = self.draw(step.rows, step.domain)
        act("batch")
        inputs, labels = step.tokens[:, :-1], step.tokens[:, 1:] if step.labels is None else step.labels
        loss = loss_of(self.model, {"inputs": inputs, "labels": labels})
        loss.backward()
        act("gradients")
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        act("clipped")
        for group in self.optimizer.param_groups:
            group["lr"] = PEAK_RATE * self.schedule(self.number) * step.factor
        value = float(loss.detach())
        if watch is not None:
            watch.observe(loss=value, batch={"inputs": inputs, "labels": labels})
        self.optimizer.step()
        self.optimizer.zero_grad()
        act("stepped")
        return value


def _view(part: Part, whole: Tensor) -> Tensor:
    return whole if part.dim is None else whole.narrow(part.dim, part.start, part.stop - part.start)
