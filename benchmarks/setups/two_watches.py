"""Two watches in one process: a teacher and a student that learns from it, trained in turn."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.setups import text
from benchmarks.setups.trainers import CAUSAL
from benchmarks.setups.trial import Trial
from benchmarks.setups.truth import Truth

_BLOCKS = "emb qk vo ffn norm head"


def _llama(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=text.VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=text.LENGTH,
    )
    return LlamaForCausalLM(config).train()


def two_watches(trial: Trial) -> None:
    """The teacher has transformers' loss, the student its own: the distance of its logits from the teacher's."""
    teacher, student = _llama(2), _llama(1)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-3) for each in (teacher, student)]

    def loss_fn(model: Any, batch: dict[str, Tensor]) -> Tensor:
        return functional.mse_loss(model(input_ids=batch["input_ids"]).logits, batch["wanted"])

    own = Truth(loss_fn, lambda model, batch: model(input_ids=batch["input_ids"]).logits, "squared error")
    taught = trial.attach(student, optimizers[1], blocks=_BLOCKS, truth=own, loss_fn=loss_fn)
    teaching = trial.attach(teacher, optimizers[0], blocks=_BLOCKS, truth=CAUSAL)
    for ids in islice(text.windows(), trial.steps):
        batch = {"input_ids": ids, "labels": ids}
        output = teacher(**batch)
        output.loss.backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        teaching.stepped(output.loss, batch)
        lesson = {"input_ids": ids, "wanted": output.logits.detach()}
        loss = loss_fn(student, lesson)
        loss.backward()
        taught.observe(loss=loss, batch=lesson)
        optimizers[1].step()
        optimizers[1].zero_grad()
        taught.stepped(loss, lesson)
    taught.close()
    teaching.close()
