"""The models that are measured: Hugging Face's own GPT-2 and LLaMA, trained for real on Python's documentation.

Two sizes: `small` has about half a million parameters; `tiny` is so small that its Hessian fits in memory. After
training the weights are rounded to what bfloat16 can hold, so that one truth serves float32 and bfloat16 alike.
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

CACHE = Path(".bench")
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """What a model is made of, how long it is trained, and the batch its curvature is taken on."""

    width: int
    layers: int
    heads: int
    inner: int  # of LLaMA; GPT-2's is 3/2 of it, for it has two matrices where LLaMA has three
    vocabulary: int
    length: int  # tokens in a row
    rows: int  # of the batch that is measured
    steps: int  # of training
    train_rows: int = 16
    rate: float = 2e-3


SIZES = {
    "tiny": Size(width=32, layers=2, heads=4, inner=64, vocabulary=128, length=32, rows=4, steps=300),
    "small": Size(width=96, layers=4, heads=4, inner=256, vocabulary=512, length=64, rows=4, steps=400),
}
NAMES = ("gpt2", "llama")


def build(name: str, size: Size, attention: str = "eager") -> nn.Module:
    """`gpt2` (fused QKV, tied head) or `llama` (grouped queries, RMSNorm, own head), freshly initialised."""
    if name == "gpt2":
        config = GPT2Config(
            vocab_size=size.vocabulary,
            n_positions=size.length,
            n_embd=size.width,
            n_layer=size.layers,
            n_head=size.heads,
            n_inner=size.inner * 3 // 2,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
            attn_implementation=attention,
        )
        return GPT2LMHeadModel(config)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.width,
            intermediate_size=size.inner,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads // 2,
            max_position_embeddings=size.length,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
            attn_implementation=attention,
        )
    )


def load(name: str, size_name: str, attention: str = "eager", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The trained model in evaluation mode; trained now where `.bench` has it not."""
    size = SIZES[size_name]
    path = CACHE / f"{name}-{size_name}-{_digest(size)}.pt"
    if not path.exists():
        _save(_train(name, size).state_dict(), path)
    model = build(name, size, attention).eval()
    model.load_state_dict(torch.load(path, weights_only=True))
    for parameter in model.parameters():  # buffers stay, as where a checkpoint is loaded in half precision
        parameter.data = parameter.data.to(dtype)
    return model


def batch_of(size_name: str) -> Batch:
    """The batch that curvature is taken on: text that training did not see in these windows, labels the inputs."""
    size = SIZES[size_name]
    ids = _windows(_tokens(size), size.rows, size.length, torch.Generator().manual_seed(10_000))
    return {"input_ids": ids, "labels": ids.clone()}


def key(name: str, size_name: str) -> str:
    """A name for what is kept of a model, other where the recipe is another."""
    return f"{name}-{size_name}-{_digest(SIZES[size_name])}"


class _Joined(nn.Module):
    """A fused query-key-value tensor as two parameters: query and key, value."""

    def forward(self, query_key: Tensor, value: Tensor) -> Tensor:
        return torch.cat([query_key, value], -1)

    def right_inverse(self, fused: Tensor) -> tuple[Tensor, Tensor]:
        third = fused.shape[-1] // 3
        return fused[..., : 2 * third].clone(), fused[..., 2 * third :].clone()


def split_fused(model: nn.Module) -> nn.Module:
    """A copy whose fused query-key-value parameters are two each, for libraries that can't divide a parameter."""
    twin = copy.deepcopy(model)
    for module_name, module in list(twin.named_modules()):
        if module_name.endswith("c_attn"):
            for tensor in ("weight", "bias"):
                parametrize.register_parametrization(module, tensor, _Joined())
    return twin


def _train(name: str, size: Size) -> nn.Module:
    torch.manual_seed(0)
    model, tokens = build(name, size).train(), _tokens(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, size.rate, total_steps=size.steps, pct_start=0.1)
    data = torch.Generator().manual_seed(0)
    for _ in range(size.steps):
        ids = _windows(tokens, size.train_rows, size.length, data)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def _windows(tokens: Tensor, rows: int, length: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(tokens) - length, (rows, 1), generator=generator)
    return tokens[starts + torch.arange(length)]


def _tokens(size: Size) -> Tensor:
    """Python's documentation: its bytes where the vocabulary is theirs, else byte pairs."""
    from pydoc_data import topics  # noqa: PLC0415 - 700 kB of text, only when asked for

    texts = [text for _, text in sorted(topics.topics.items())]
    if size.vocabulary == 128:
        return torch.frombuffer(bytearray("".join(texts).encode("ascii", "ignore")), dtype=torch.uint8).long()
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]
    path = CACHE / f"tokens-{size.vocabulary}-{digest}.pt"
    if not path.exists():
        _save(_byte_pairs(texts, size.vocabulary), path)
    return torch.load(path, weights_only=True)


def _byte_pairs(texts: list[str], vocabulary: int) -> Tensor:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return torch.tensor([token for encoded in tokenizer.encode_batch(texts) for token in encoded.ids])


def _digest(size: Size) -> str:
    return hashlib.sha256(json.dumps(asdict(size), sort_keys=True).encode()).hexdigest()[:8]


def _save(value: object, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(value, partial)
    partial.replace(path)
