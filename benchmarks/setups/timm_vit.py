"""An image classifier of timm, in a loop as in its train.py."""

from __future__ import annotations

from itertools import islice
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor

from benchmarks.setups.images import CLASSES, labelled_images
from benchmarks.setups.trial import Trial
from benchmarks.setups.truth import Truth


def timm_vit(trial: Trial) -> None:
    """A vision transformer under cross-entropy."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=CLASSES
    ).train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    criterion = torch.nn.CrossEntropyLoss()

    def loss_fn(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return criterion(model(batch[0]), batch[1])

    truth = Truth(loss_fn, lambda model, batch: model(batch[0]))
    record = trial.attach(model, optimizer, blocks="qk vo ffn norm head other", truth=truth, loss_fn=loss_fn)
    for batch in islice(labelled_images(16), trial.steps):
        loss = loss_fn(model, batch)
        optimizer.zero_grad()
        loss.backward()
        record.observe(loss=loss, batch=batch)
        optimizer.step()
        record.stepped(loss, batch)
    record.close()
