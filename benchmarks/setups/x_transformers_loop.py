"""x-transformers' autoregressive wrapper, whose forward returns the loss alone."""

from __future__ import annotations

from itertools import islice

import torch
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

from benchmarks.setups import text
from benchmarks.setups.trial import Trial
from benchmarks.setups.truth import Truth


def x_transformers(trial: Trial) -> None:
    """The loop of its train_enwik8.py."""
    layers = Decoder(dim=32, depth=2, heads=2, attn_dim_head=16, rotary_pos_emb=True)
    model = AutoregressiveWrapper(
        TransformerWrapper(num_tokens=text.VOCABULARY, max_seq_len=text.LENGTH, attn_layers=layers)
    ).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    truth = Truth(lambda model, ids: model(ids), lambda model, ids: model.net(ids[:, :-1]).flatten(0, 1))
    record = trial.attach(model, optimizer, blocks="emb qk vo ffn norm head", truth=truth)
    for ids in islice(text.windows(), trial.steps):
        loss = model(ids)
        loss.backward()
        record.observe(loss=loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        record.stepped(loss, ids)
    record.close()
