"""A plain classifier: its loss is computed outside the model, so the loop hands its batch to sharpwatch."""

from collections import OrderedDict

import torch
from torch import nn
from torch.nn.functional import cross_entropy

# --8<-- [start:import]
import sharpwatch

# --8<-- [end:import]

torch.manual_seed(0)
model = nn.Sequential(
    OrderedDict(
        patch_embed=nn.Linear(64, 128),
        mlp=nn.Sequential(OrderedDict(act1=nn.GELU(), fc1=nn.Linear(128, 128), act2=nn.GELU())),
        head=nn.Linear(128, 10),
    )
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


# --8<-- [start:loop]
def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the loss that is trained on, of any rows of a batch."""
    images, labels = batch
    return cross_entropy(model(images), labels)


watch = sharpwatch.attach(model, optimizer, training_job="classifier", loss_fn=loss_fn, probe_every=5)
for _ in range(100):
    labels = torch.randint(10, (32,))
    images = torch.randn(32, 64) + labels.view(-1, 1) / 10  # classes differ in brightness
    loss = loss_fn(model, (images, labels))
    loss.backward()
    watch.observe(loss=loss, batch=(images, labels))
    optimizer.step()
    optimizer.zero_grad()
watch.close()
# --8<-- [end:loop]
