"""The twenty lines of the README: train a small GPT-2 under the eyes of a daemon."""

import pydoc_data.topics
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import sharpwatch

text = torch.tensor(list(Path(pydoc_data.topics.__file__).read_bytes()))  # any text; its bytes are the tokens
model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

watch = sharpwatch.attach(model, optimizer, training_job="quickstart", probe_every=10)

for _ in range(300):
    starts = torch.randint(len(text) - 128, (8, 1))
    ids = text[starts + torch.arange(128)]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

watch.close()
