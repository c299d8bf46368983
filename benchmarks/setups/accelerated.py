"""Loops under Accelerate."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader
from transformers import default_data_collator, get_scheduler

from benchmarks.setups import text
from benchmarks.setups.trainers import CAUSAL, GPT2_BLOCKS, gpt2
from benchmarks.setups.trial import Trial


def run_clm_no_trainer(trial: Trial) -> None:
    """The loop of run_clm_no_trainer.py of transformers: two groups of AdamW, a linear schedule."""
    accelerator = Accelerator(cpu=True)
    model = gpt2()
    plain = [p for name, p in model.named_parameters() if "bias" in name or "ln_" in name]
    decayed = [p for name, p in model.named_parameters() if not ("bias" in name or "ln_" in name)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    rows = text.dataset(text.ROWS * trial.steps)
    loader = DataLoader(rows, shuffle=True, collate_fn=default_data_collator, batch_size=text.ROWS)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=4, num_training_steps=trial.steps)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    record = trial.attach(model, optimizer, blocks=GPT2_BLOCKS, truth=CAUSAL)
    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        record.stepped(loss, batch)
    record.close()


def accelerate(trial: Trial) -> None:
    """Mixed precision, two micro-batches a step and clipping."""
    # The precision of another training of the same process; Accelerate's tests do so too.
    AcceleratorState._reset_state()  # noqa: SLF001
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(text.dataset(2 * text.ROWS * trial.steps), batch_size=text.ROWS)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    record = trial.attach(model, optimizer, blocks=GPT2_BLOCKS, truth=CAUSAL)
    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            losses.append(loss.item())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            record.stepped(sum(losses) / 2, batch)
            losses.clear()
    record.close()
