"""A diffusion transformer of diffusers: the loop hands its latents, noise, timesteps and classes to sharpwatch."""

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from torch import Tensor, nn
from torch.nn.functional import mse_loss

# --8<-- [start:import]
import sharpwatch

# --8<-- [end:import]

torch.manual_seed(0)
model = DiTTransformer2DModel(
    num_layers=2, num_attention_heads=2, attention_head_dim=16, sample_size=8, in_channels=4, out_channels=4,
    num_embeds_ada_norm=10,
)  # fmt: skip
schedule = DDPMScheduler()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


# --8<-- [start:loop]
def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Return the loss that is trained on, of any rows of a batch."""
    latents, noise, timesteps, classes = batch
    noisy = schedule.add_noise(latents, noise, timesteps)
    return mse_loss(model(noisy, timestep=timesteps, class_labels=classes).sample, noise)


probes = ("direction", "hutchinson")
watch = sharpwatch.attach(model, optimizer, training_job="dit", loss_fn=loss_fn, probes=probes, probe_every=5)
for _ in range(60):
    classes, timesteps = torch.randint(10, (16,)), torch.randint(1000, (16,))
    latents = torch.randn(16, 4, 8, 8) + classes.view(-1, 1, 1, 1) / 10  # classes differ in brightness
    batch = (latents, torch.randn_like(latents), timesteps, classes)
    loss = loss_fn(model, batch)
    loss.backward()
    watch.observe(loss=loss, batch=batch)
    optimizer.step()
    optimizer.zero_grad()
watch.close()
# --8<-- [end:loop]
