"""litgpt's GPT, as its pretrain.py trains it."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import chunked_cross_entropy
from torch import Tensor

from benchmarks.setups import text
from benchmarks.setups.trial import Trial
from benchmarks.setups.truth import Truth


def litgpt(trial: Trial) -> None:
    """A LLaMA of litgpt's own, with grouped queries; targets are outside of the model."""
    config = Config(
        block_size=text.LENGTH,
        vocab_size=text.VOCABULARY,
        padded_vocab_size=text.VOCABULARY,
        n_layer=2,
        n_head=4,
        n_query_groups=2,
        n_embd=32,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=64,
    )
    model = GPT(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))

    def loss_fn(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return chunked_cross_entropy(model(batch[0]), batch[1], chunk_size=0)

    truth = Truth(loss_fn, lambda model, batch: model(batch[0]).flatten(0, 1))
    record = trial.attach(model, optimizer, blocks="emb qk vo ffn norm head", truth=truth, loss_fn=loss_fn)
    for ids in islice(text.windows(text.LENGTH + 1), trial.steps):
        batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        loss = loss_fn(model, batch)
        loss.backward()
        record.observe(loss=loss, batch=batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        record.stepped(loss, batch)
    record.close()
