"""Mixtures of experts of transformers, whose loss has the router's in it, and Jamba's Mamba layers."""

from __future__ import annotations

from itertools import islice

import torch
from transformers import JambaConfig, JambaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from benchmarks.setups import text
from benchmarks.setups.trainers import CAUSAL
from benchmarks.setups.trial import Trial

_SIZE = {
    "vocab_size": text.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "output_router_logits": True,
}


def mixtral(trial: Trial) -> None:
    """Mixtral with the load-balancing loss of its routers."""
    _train(trial, MixtralForCausalLM(MixtralConfig(**_SIZE, num_hidden_layers=2, num_local_experts=4)))


def jamba(trial: Trial) -> None:
    """Jamba: a Mamba layer with experts, an attention layer without."""
    config = JambaConfig(
        **_SIZE,
        num_hidden_layers=2,
        num_experts=4,
        expert_layer_period=2,
        expert_layer_offset=0,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
        pad_token_id=0,
    )
    _train(trial, JambaForCausalLM(config))


def _train(trial: Trial, model: PreTrainedModel) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    record = trial.attach(model, optimizer, blocks="emb qk vo ffn norm head other", truth=CAUSAL)
    for ids in islice(text.windows(), trial.steps):
        batch = {"input_ids": ids, "labels": ids}
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        record.stepped(loss, batch)
    record.close()
