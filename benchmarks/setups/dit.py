"""A small diffusion transformer in the layout of DiT (github.com/facebookresearch/DiT), which is no package."""

from __future__ import annotations

import copy
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.setups.images import labelled_images
from benchmarks.setups.trial import Trial
from benchmarks.setups.truth import Truth

_WIDTH, _HEADS, _LAYERS, _PATCH, _SIDE, _CHANNELS, _CLASSES = 32, 2, 2, 2, 8, 3, 10
_TIMES = 1000  # of the noise's schedule
_FREQUENCIES = 16


class PatchEmbed(nn.Module):
    """Patches as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(_CHANNELS, _WIDTH, _PATCH, _PATCH)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, patches, width]."""
        return self.proj(x).flatten(2).mT


class TimestepEmbedder(nn.Module):
    """Embeds a time by its sines and cosines."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * _FREQUENCIES, _WIDTH), nn.SiLU(), nn.Linear(_WIDTH, _WIDTH))

    def forward(self, t: Tensor) -> Tensor:
        """[N] to [N, width]."""
        angles = t[:, None] * 1e4 ** (-torch.arange(_FREQUENCIES) / _FREQUENCIES)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


class LabelEmbedder(nn.Module):
    """Embeds a class, and one label more for none, which a tenth of training is without."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(_CLASSES + 1, _WIDTH)

    def forward(self, y: Tensor) -> Tensor:
        """[N] to [N, width]."""
        if self.training:
            y = torch.where(torch.rand(len(y)) < 0.1, _CLASSES, y)
        return self.embedding_table(y)


class Attention(nn.Module):
    """timm's, with queries, keys and values from one Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(_WIDTH, 3 * _WIDTH)
        self.proj = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Attend to all patches."""
        q, k, v = self.qkv(x).unflatten(-1, (3, _HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(_WIDTH, 4 * _WIDTH)
        self.fc2 = nn.Linear(4 * _WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both."""
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


class DiTBlock(nn.Module):
    """Attention and an MLP, each shifted, scaled and gated by the condition; at first all gates are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(_WIDTH, elementwise_affine=False)
        self.attn = Attention()
        self.norm2 = nn.LayerNorm(_WIDTH, elementwise_affine=False)
        self.mlp = Mlp()
        self.adaLN_modulation = zeroed(nn.Sequential(nn.SiLU(), nn.Linear(_WIDTH, 6 * _WIDTH)))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Add both to the stream, under the condition [N, width]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    """From tokens to patches of noise."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(_WIDTH, elementwise_affine=False)
        self.linear = zeroed(nn.Linear(_WIDTH, _PATCH**2 * _CHANNELS))
        self.adaLN_modulation = zeroed(nn.Sequential(nn.SiLU(), nn.Linear(_WIDTH, 2 * _WIDTH)))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """[N, patches, width] to [N, patches, entries]."""
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, -1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


def zeroed(module: nn.Module) -> nn.Module:
    """`module` with all its parameters zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class DiT(nn.Module):
    """Predicts the noise in images of a class at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder = PatchEmbed()
        self.t_embedder = TimestepEmbedder()
        self.y_embedder = LabelEmbedder()
        self.pos_embed = nn.Parameter(0.1 * torch.randn(1, (_SIDE // _PATCH) ** 2, _WIDTH), requires_grad=False)
        self.blocks = nn.ModuleList([DiTBlock() for _ in range(_LAYERS)])
        self.final_layer = FinalLayer()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Images [N, C, H, W], times [N] and classes [N] to noise."""
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        patches, side = self.final_layer(x, c), _SIDE // _PATCH
        whole = patches.unflatten(1, (side, side)).unflatten(-1, (_PATCH, _PATCH, _CHANNELS))
        return whole.permute(0, 5, 1, 3, 2, 4).reshape(len(x), _CHANNELS, _SIDE, _SIDE)


def noised(batch: dict[str, Tensor]) -> Tensor:
    """The images with their noise, by its share at each time."""
    share = (1 - batch["t"] / _TIMES)[:, None, None, None]
    return share.sqrt() * batch["images"] + (1 - share).sqrt() * batch["noise"]


def loss_fn(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The mean squared error of the predicted noise."""
    return functional.mse_loss(model(noised(batch), batch["t"], batch["y"]), batch["noise"])


def dit(trial: Trial) -> None:
    """The loop of DiT's train.py, with its moving average of the weights."""
    model = DiT().train()
    average = copy.deepcopy(model).requires_grad_(requires_grad=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    truth = Truth(loss_fn, lambda model, batch: model(noised(batch), batch["t"], batch["y"]), "squared error")
    record = trial.attach(model, optimizer, blocks="emb qk vo ffn head other", truth=truth, loss_fn=loss_fn)
    for images, labels in islice(labelled_images(_SIDE), trial.steps):
        noise, t = torch.randn_like(images), torch.randint(_TIMES, (len(images),))
        batch = {"images": images, "noise": noise, "t": t, "y": labels}
        loss = loss_fn(model, batch)
        optimizer.zero_grad()
        loss.backward()
        record.observe(loss=loss, batch=batch)
        optimizer.step()
        with torch.no_grad():
            for kept, now in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(now, 0.01)
        record.stepped(loss, batch)
    record.close()
