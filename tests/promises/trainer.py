"""An ordinary training script, as a module: a small transformer with dropout, AdamW under a schedule.

It prints a line of JSON a step. Its digest covers all that training changes, so that a run can be held against
another at every step; batches come from the random source that dropout draws from, so that a draw too many shows.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import select
import sys

import torch
from torch import nn

import sharpwatch

VOCABULARY, LENGTH, ROWS, WIDTH = 32, 12, 8, 16


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.1, batch_first=True, norm_first=True)
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids, labels):
        mask = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1])
        hidden = self.blocks(self.wte(input_ids), mask=mask, is_causal=True)
        logits = self.lm_head(self.ln_f(hidden))
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"logits": logits, "loss": loss}


class Rows(torch.utils.data.Dataset):
    """Rows of tokens, the same in every process."""

    def __len__(self):
        return 10 * ROWS

    def __getitem__(self, index):
        return torch.randint(VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(index))


class Trainer:
    """One training run, watched: probes at every 5th step, where `options` of `attach` don't say otherwise."""

    def __init__(self, optimizer=torch.optim.AdamW, **options):
        torch.set_num_threads(1)
        torch.manual_seed(7)
        self.model = Transformer()
        self.optimizer = optimizer(self.model.parameters(), lr=1e-2)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 10_000)
        self.steps = 0
        self.watch = sharpwatch.attach(
            self.model, self.optimizer, **{"training_job": "promise", "run": "run", "probe_every": 5} | options
        )
        self.watched = self.watch._watched  # None where sharpwatch is disabled

    @property
    def transport(self):
        return self.watched.transport

    def batch(self):
        return torch.randint(VOCABULARY, (ROWS, LENGTH))

    def step(self):
        """One step on the next batch."""
        self.step_on(self.batch())

    def step_on(self, tokens):
        loss = self.model(tokens, tokens)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.steps += 1
        say(step=self.steps, loss=loss.item(), digest=self.digest())

    def train(self, steps):
        for _ in range(steps):
            self.step()

    def train_until_stopped(self, backlog=math.inf):
        """Train until standard input ends; also say which samples nobody has to keep any more.

        While more samples than `backlog` are kept, ten steps a second are enough.
        """
        pause = 0.0
        while not select.select([sys.stdin], [], [], pause)[0]:
            self.step()
            acknowledged = self.transport._spool.settled
            say(acknowledged=acknowledged)
            pause = 0.1 if self.steps - acknowledged > backlog else 0.0

    def digest(self):
        """Of weights, optimizer state, learning rates and the random source."""
        digest = hashlib.sha256()
        for tensor in (*self.model.state_dict().values(), torch.get_rng_state()):
            digest.update(tensor.numpy().tobytes())
        for state in self.optimizer.state_dict()["state"].values():
            for tensor in state.values():
                digest.update(tensor.numpy().tobytes())
        digest.update(repr(self.optimizer.state_dict()["param_groups"]).encode())
        return digest.hexdigest()

    def close(self):
        """Close the watch and tell what the agent counted."""
        self.watch.close()
        self.tell()

    def tell(self):
        if self.watched is not None:
            probes = {failure.probe: failure.count for failure in self.watched.scheduler.runner.failures}
            say(swallowed=self.watched.barrier.swallowed, dropped=self.transport.dropped, failed_probes=probes)


def say(**words):
    # In one write: what comes of several processes does not mix.
    os.write(1, (json.dumps(words) + "\n").encode())


if __name__ == "__main__":  # the reference: for as long as its standard output is read
    trainer = Trainer()
    while True:
        trainer.step()
