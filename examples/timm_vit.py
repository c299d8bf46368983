"""An image classifier of timm: the loss is computed outside the model, so the loop tells sharpwatch of it."""

import timm
import torch
from torch.nn.functional import cross_entropy

# --8<-- [start:loop]
import sharpwatch

torch.manual_seed(0)
model = timm.create_model(
    "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

# `gnb` draws its own labels from the logits; `direction` would need `loss_fn`, since the model never sees the labels.
watch = sharpwatch.attach(model, optimizer, training_job="vit-tiny", probes=("gnb",), probe_every=5)
for _ in range(60):
    labels = torch.randint(10, (16,))
    images = torch.randn(16, 3, 32, 32) + labels.view(-1, 1, 1, 1) / 10  # classes differ in brightness
    loss = cross_entropy(model(images), labels)
    loss.backward()
    watch.observe(loss=loss)
    optimizer.step()
    optimizer.zero_grad()
watch.close()
# --8<-- [end:loop]
