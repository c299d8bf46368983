"""A small model in the layout of nanochat (github.com/karpathy/nanochat), which is no package: same names, same loop.

Its optimizer keeps the momentum of all matrices of one shape stacked under the first of them.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.setups import text
from benchmarks.setups.trial import Trial
from benchmarks.setups.truth import Truth

_WIDTH, _HEADS, _LAYERS = 32, 2, 2
_HEAD_WIDTH = _WIDTH // _HEADS
_GATE_WIDTH = 12  # entries of the stream that decide on the value embeddings
_PADDED = text.VOCABULARY + 64  # rows of the embedding and the head


def norm(x: Tensor) -> Tensor:
    """RMS normalisation without weights."""
    return functional.rms_norm(x, x.shape[-1:])


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A Linear without bias."""
    return nn.Linear(inputs, outputs, bias=False)


class CausalSelfAttention(nn.Module):
    """Normalised, rotated queries and keys; values with a gated embedding of the token added."""

    def __init__(self, *, value_embeds: bool) -> None:
        super().__init__()
        self.c_q = linear(_WIDTH, _WIDTH)
        self.c_k = linear(_WIDTH, _WIDTH)
        self.c_v = linear(_WIDTH, _WIDTH)
        self.c_proj = linear(_WIDTH, _WIDTH)
        self.ve_gate = linear(_GATE_WIDTH, _HEADS) if value_embeds else None

    def forward(self, x: Tensor, ve: Tensor | None, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        """Attend to what came before."""
        q, k, v = (each(x).unflatten(-1, (_HEADS, _HEAD_WIDTH)) for each in (self.c_q, self.c_k, self.c_v))
        if self.ve_gate is not None and ve is not None:
            gate = 2 * self.ve_gate(x[..., :_GATE_WIDTH]).sigmoid()
            v = v + gate[..., None] * ve.unflatten(-1, (_HEADS, _HEAD_WIDTH))
        q, k = (norm(rotated(each, *cos_sin)) for each in (q, k))
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).flatten(2))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], -1)


class MLP(nn.Module):
    """Two matrices and a squared ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.c_fc = linear(_WIDTH, 4 * _WIDTH)
        self.c_proj = linear(4 * _WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Apply them."""
        return self.c_proj(self.c_fc(x).relu().square())


class Block(nn.Module):
    """Attention and an MLP."""

    def __init__(self, *, value_embeds: bool) -> None:
        super().__init__()
        self.attn = CausalSelfAttention(value_embeds=value_embeds)
        self.mlp = MLP()

    def forward(self, x: Tensor, ve: Tensor | None, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        """Add both to the stream."""
        x = x + self.attn(norm(x), ve, cos_sin)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """The model returns its loss where there are targets, and else its logits, which a tanh bounds."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(_PADDED, _WIDTH),
                "h": nn.ModuleList([Block(value_embeds=i % 2 == 1) for i in range(_LAYERS)]),
            }
        )
        self.lm_head = linear(_WIDTH, _PADDED)
        self.resid_lambdas = nn.Parameter(torch.ones(_LAYERS))
        self.x0_lambdas = nn.Parameter(torch.full((_LAYERS,), 0.1))
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(_PADDED, _WIDTH) for i in range(_LAYERS) if i % 2})
        nn.init.normal_(self.lm_head.weight, std=0.02)
        angles = torch.outer(torch.arange(text.LENGTH), 1e4 ** -torch.arange(0, 1, 2 / _HEAD_WIDTH))[:, None]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None, loss_reduction: str = "mean") -> Tensor:
        """The loss, or logits without `targets`."""
        start = x = norm(self.transformer["wte"](idx))
        for i, block in enumerate(self.transformer["h"]):
            x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * start
            ve = self.value_embeds[str(i)](idx) if str(i) in self.value_embeds else None
            x = block(x, ve, (self.cos, self.sin))
        logits = 15 * torch.tanh(self.lm_head(norm(x))[..., : text.VOCABULARY].float() / 15)
        if targets is None:
            return logits
        return functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=loss_reduction
        )

    def setup_optimizer(self) -> MuonAdamW:
        """Muon for the layers' matrices by their shape, AdamW for all else."""
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for matrix in self.transformer["h"].parameters():
            by_shape.setdefault(matrix.shape, []).append(matrix)
        adamw = [
            ([*self.lm_head.parameters()], 4e-3),
            ([*self.transformer["wte"].parameters(), *self.value_embeds.parameters()], 2e-2),
            ([self.resid_lambdas, self.x0_lambdas], 5e-3),
        ]
        groups = [{"kind": "adamw", "params": params, "lr": rate} for params, rate in adamw]
        groups += [{"kind": "muon", "params": matrices, "lr": 0.02} for matrices in by_shape.values()]
        return MuonAdamW(groups)


class MuonAdamW(torch.optim.Optimizer):
    """Both in one, by each group's `kind`."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, defaults={})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Take a step."""
        for group in self.param_groups:
            (self._muon if group["kind"] == "muon" else self._adamw)(group["params"], group["lr"])

    def _adamw(self, params: list[nn.Parameter], rate: float) -> None:
        for p in params:
            state = self.state[p]
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state["step"] += 1
            state["exp_avg"].lerp_(p.grad, 0.2)
            state["exp_avg_sq"].lerp_(p.grad.square(), 0.05)
            root = (state["exp_avg_sq"] / (1 - 0.95 ** state["step"])).sqrt() + 1e-10
            p.sub_(rate / (1 - 0.8 ** state["step"]) * state["exp_avg"] / root)

    def _muon(self, params: list[nn.Parameter], rate: float) -> None:
        """One step for all matrices of a shape; their momentum is under the first of them."""
        gradients, state = torch.stack([p.grad for p in params]), self.state[params[0]]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradients)
        state["momentum_buffer"].lerp_(gradients, 0.05)
        updates = orthogonalized(gradients.lerp(state["momentum_buffer"], 0.95))
        rate *= max(1.0, updates.shape[-2] / updates.shape[-1]) ** 0.5
        for p, update in zip(params, updates, strict=True):
            p.sub_(rate * update)


def orthogonalized(matrices: Tensor) -> Tensor:
    """Newton-Schulz iterations towards the nearest orthogonal matrices, of a stack [n, rows, columns]."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def nanochat(trial: Trial) -> None:
    """The loop of nanochat's base_train.py, which sets each group's rate at each step."""
    model = GPT().train()
    optimizer = model.setup_optimizer()
    truth = Truth(lambda model, batch: model(*batch), lambda model, batch: model(batch[0]).flatten(0, 1))
    record = trial.attach(model, optimizer, blocks="emb qk vo ffn head other", truth=truth)
    initial = [group["lr"] for group in optimizer.param_groups]
    for step, ids in enumerate(islice(text.windows(text.LENGTH + 1), trial.steps)):
        x, y = ids[:, :-1], ids[:, 1:]
        loss = model(x, y)
        loss.backward()
        record.observe(loss=loss)
        for group, rate in zip(optimizer.param_groups, initial, strict=True):
            group["lr"] = rate * min(1.0, 2 * (1 - step / trial.steps))
        optimizer.step()
        model.zero_grad(set_to_none=True)
        record.stepped(loss, (x, y))
    record.close()
