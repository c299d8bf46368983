"""An image classifier of timm: the loss is computed outside the model, so the loop hands its batch to sharpwatch."""

import timm
import torch
from torch import nn
from torch.nn.functional import cross_entropy

# --8<-- [start:loop]
import sharpwatch

torch.manual_seed(0)
model = timm.create_model(
    "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the loss that is trained on, of any rows of a batch."""
    images, labels = batch
    return cross_entropy(model(images), labels)


watch = sharpwatch.attach(model, optimizer, training_job="vit-tiny", loss_fn=loss_fn, probe_every=5)
for _ in range(60):
    labels = torch.randint(10, (16,))
    images = torch.randn(16, 3, 32, 32) + labels.view(-1, 1, 1, 1) / 10  # classes differ in brightness
    loss = loss_fn(model, (images, labels))
    loss.backward()
    watch.observe(loss=loss, batch=(images, labels))
    optimizer.step()
    optimizer.zero_grad()
watch.close()
# --8<-- [end:loop]
