"""What the image models see: noise whose brightness tells its class. Nothing is fetched."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CLASSES = 10
ROWS = 8


def labelled_images(side: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end, the same at each call: images [rows, 3, side, side] and classes [rows]."""
    source = torch.Generator().manual_seed(1)
    while True:
        labels = torch.randint(CLASSES, (ROWS,), generator=source)
        noise = torch.randn(ROWS, 3, side, side, generator=source)
        yield (noise + labels.view(-1, 1, 1, 1) / CLASSES).tanh(), labels
