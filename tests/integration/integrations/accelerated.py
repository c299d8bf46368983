"""A training loop under Accelerate, on a small model with dropout; used on one process and on several."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import sharpwatch
from sharpwatch.testing import InMemoryTransport


class Rows(Dataset):
    """Rows of tokens, some replaced by chance, as an augmentation does in the training process."""

    def __init__(self):
        self.rows = torch.randint(1, 11, (40, 4), generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return torch.where(torch.rand(4) < 0.2, 0, self.rows[index])


class Fixed(Rows):
    """The same rows as they are."""

    def __getitem__(self, index):
        return self.rows[index]


class Stream(IterableDataset):
    """The same rows, without a length."""

    def __iter__(self):
        return iter(Rows().rows)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(11, 8)
        self.drop = nn.Dropout(0.2)
        self.ln_f = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 11)

    def forward(self, tokens):
        logits = self.lm_head(self.drop(self.ln_f(self.wte(tokens))))
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


class Loop:
    """The loop's parts, prepared all at once or one by one, after `accelerate` has forgotten earlier ones."""

    def __init__(
        self, *, seed=0, accumulation=2, one_by_one=False, precision="no", data=Rows, workers=0, **configuration
    ):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        torch.manual_seed(seed)
        self.accelerator = Accelerator(
            cpu=True,
            mixed_precision=precision,
            gradient_accumulation_steps=accumulation,
            dataloader_config=DataLoaderConfiguration(**configuration),
        )
        model, rows = Net(), data()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.7)
        loader = DataLoader(rows, 2, shuffle=data is not Stream, num_workers=workers)
        prepare = self.accelerator.prepare
        if one_by_one:
            self.schedule, self.loader, self.optimizer, self.model = map(prepare, (schedule, loader, optimizer, model))
        else:
            self.model, self.optimizer, self.loader, self.schedule = prepare(model, optimizer, loader, schedule)
        torch.manual_seed(100 + seed + self.accelerator.process_index)

    def batch(self, tokens):
        """Train on a micro-batch; returns whether it ended a step."""
        with self.accelerator.accumulate(self.model):
            self.accelerator.backward(self.model(tokens)["loss"])
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        return self.accelerator.sync_gradients

    def weights(self):
        return [value.detach().clone() for value in self.accelerator.unwrap_model(self.model).parameters()]

    def checkpointed(self, folder):
        """Attach, and make checkpoints of what was prepared; returns them, the watch and its transport."""
        transport = InMemoryTransport()
        watch = sharpwatch.attach(
            self.model, self.optimizer, training_job="job", run="run", transport=transport, control="rollback"
        )
        checkpoints = sharpwatch.Checkpoints(
            folder,
            self.model,
            self.optimizer,
            watch=watch,
            data=self.loader,
            scheduler=self.schedule,
            scaler=self.accelerator.scaler,
        )
        return checkpoints, watch, transport


def plain(steps, skip=(), **options):
    """The weights after each step without sharpwatch; `skip` are micro-batches to leave out, from 0."""
    loop, found, number = Loop(**options), [], 0
    while True:
        for tokens in loop.loader:
            number += 1
            if number - 1 not in skip and loop.batch(tokens):
                found.append(loop.weights())
            if len(found) == steps:
                return found


def watched(folder, steps, save_at, roll_back_at=None, skip=(0, 0), **options):
    """The same under `Checkpoints`: the weights by step, and what became of the rollback to `save_at`."""
    loop, found, uri = Loop(**options), {}, ""
    checkpoints, watch, transport = loop.checkpointed(folder)
    for tokens in checkpoints.batches():
        if not loop.batch(tokens):
            continue
        found[checkpoints.step] = loop.weights()
        if checkpoints.step == save_at and not uri:
            uri = str(checkpoints.save())
        if checkpoints.step == roll_back_at:
            roll_back_at = transport.roll_back(save_at, uri, skip=skip) if loop.accelerator.is_main_process else None
        if checkpoints.step == steps:
            break
    results = [result.outcome for result in transport.results]
    watch.close()
    return [found[step] for step in range(1, steps + 1)], results


def resumed(folder, steps, **options):
    """The step that was resumed from, and the weights after each step from there."""
    loop = Loop(seed=7, **options)  # other weights, other random numbers and another order of the data
    checkpoints, watch, _ = loop.checkpointed(folder)
    found = [checkpoints.resume()]
    for tokens in checkpoints.batches():
        if loop.batch(tokens):
            found.append(loop.weights())
        if checkpoints.step == steps:
            break
    watch.close()
    return found
