"""PyTorch's DCGAN example: two models, each with its own optimizer and its own watch."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.setups.images import labelled_images
from benchmarks.setups.trial import Trial
from benchmarks.setups.truth import Truth

_NOISE, _WIDTH = 8, 8


class Generator(nn.Module):
    """Noise [N, noise, 1, 1] to images [N, 3, 16, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(_NOISE, 2 * _WIDTH, 4, 1, 0, bias=False),
            nn.BatchNorm2d(2 * _WIDTH),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(2 * _WIDTH, _WIDTH, 4, 2, 1, bias=False),
            nn.BatchNorm2d(_WIDTH),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(_WIDTH, 3, 4, 2, 1, bias=False),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        """Make images."""
        return self.main(z)


class Discriminator(nn.Module):
    """Images to the probability that each is real, [N]."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(3, _WIDTH, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(_WIDTH, 2 * _WIDTH, 4, 2, 1, bias=False),
            nn.BatchNorm2d(2 * _WIDTH),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(2 * _WIDTH, 1, 4, 1, 0, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Judge them."""
        return self.main(images).view(-1)


def _judged(probabilities: Tensor, real: float) -> Tensor:
    return functional.binary_cross_entropy(probabilities, torch.full_like(probabilities, real))


def dcgan(trial: Trial) -> None:
    """Steps of both in turn, on a real and on a made batch."""
    generator, discriminator = Generator().train(), Discriminator().train()
    optimizers = [
        torch.optim.Adam(each.parameters(), lr=2e-4, betas=(0.5, 0.999)) for each in (generator, discriminator)
    ]

    def judging(model: Any, batch: dict[str, Tensor]) -> Tensor:
        return _judged(model(batch["real"]), 1.0) + _judged(model(batch["made"]), 0.0)

    def making(model: Any, z: Tensor) -> Tensor:
        return _judged(discriminator(model(z)), 1.0)

    making_record = trial.attach(generator, optimizers[0], blocks="norm other", truth=Truth(None), loss_fn=making)
    judging_record = trial.attach(
        discriminator, optimizers[1], blocks="norm other", truth=Truth(judging), loss_fn=judging
    )
    for real, _ in islice(labelled_images(16), trial.steps):
        z = torch.randn(len(real), _NOISE, 1, 1)
        made = generator(z)
        batch = {"real": real, "made": made.detach()}
        discriminator.zero_grad()
        error = judging(discriminator, batch)
        error.backward()
        judging_record.observe(loss=error, batch=batch)
        optimizers[1].step()
        judging_record.stepped(error, batch)
        generator.zero_grad()
        error = _judged(discriminator(made), 1.0)
        error.backward()
        making_record.observe(loss=error, batch=z)
        optimizers[0].step()
        making_record.stepped(error, z)
    making_record.close()
    judging_record.close()
