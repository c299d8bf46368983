"""A small model in the layout of minGPT (github.com/karpathy/minGPT), which is no package: same names, same loop."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.setups import text
from benchmarks.setups.trial import Trial
from benchmarks.setups.truth import Truth

_WIDTH, _HEADS, _LAYERS = 32, 2, 2


class CausalSelfAttention(nn.Module):
    """Attention with queries, keys and values from one Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(_WIDTH, 3 * _WIDTH)
        self.c_proj = nn.Linear(_WIDTH, _WIDTH)
        self.attn_dropout = nn.Dropout(0.1)
        self.resid_dropout = nn.Dropout(0.1)
        self.register_buffer("bias", torch.ones(text.LENGTH, text.LENGTH).tril()[None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Attend to what came before."""
        rows, length, _ = x.shape
        heads = self.c_attn(x).view(rows, length, 3, _HEADS, -1).permute(2, 0, 3, 1, 4)
        scores = heads[0] @ heads[1].transpose(-2, -1) * heads.shape[-1] ** -0.5
        scores = scores.masked_fill(self.bias[..., :length, :length] == 0, float("-inf"))
        mixed = self.attn_dropout(scores.softmax(-1)) @ heads[2]
        return self.resid_dropout(self.c_proj(mixed.transpose(1, 2).reshape(rows, length, -1)))


class Block(nn.Module):
    """Attention and an MLP, which is a ModuleDict."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(_WIDTH)
        self.attn = CausalSelfAttention()
        self.ln_2 = nn.LayerNorm(_WIDTH)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(_WIDTH, 4 * _WIDTH),
                "c_proj": nn.Linear(4 * _WIDTH, _WIDTH),
                "act": nn.GELU(approximate="tanh"),
                "dropout": nn.Dropout(0.1),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """Add both to the stream."""
        x = x + self.attn(self.ln_1(x))
        inner = self.mlp["act"](self.mlp["c_fc"](self.ln_2(x)))
        return x + self.mlp["dropout"](self.mlp["c_proj"](inner))


class GPT(nn.Module):
    """The model returns its logits and its loss; targets of -1 are ignored."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(text.VOCABULARY, _WIDTH),
                "wpe": nn.Embedding(text.LENGTH, _WIDTH),
                "drop": nn.Dropout(0.1),
                "h": nn.ModuleList([Block() for _ in range(_LAYERS)]),
                "ln_f": nn.LayerNorm(_WIDTH),
            }
        )
        self.lm_head = nn.Linear(_WIDTH, text.VOCABULARY, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits, and the loss where there are targets."""
        positions = torch.arange(idx.shape[1])[None]
        x = self.transformer["drop"](self.transformer["wte"](idx) + self.transformer["wpe"](positions))
        for block in self.transformer["h"]:
            x = block(x)
        logits = self.lm_head(self.transformer["ln_f"](x))
        if targets is None:
            return logits, None
        return logits, functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW that decays the matrices of Linears alone."""
        linears = [module.weight for module in self.modules() if isinstance(module, nn.Linear)]
        decayed = {id(weight) for weight in linears}
        rest = [p for p in self.parameters() if id(p) not in decayed]
        groups = [{"params": linears, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))


def mingpt(trial: Trial) -> None:
    """The loop of minGPT's Trainer; the first third of each row is prompt, as in its adder."""
    model = GPT().train()
    optimizer = model.configure_optimizers()
    truth = Truth(lambda model, batch: model(*batch)[1], lambda model, batch: model(batch[0])[0][batch[1] != -1])
    record = trial.attach(model, optimizer, blocks="emb qk vo ffn norm head other", truth=truth)
    for ids in islice(text.windows(text.LENGTH + 1), trial.steps):
        x, y = ids[:, :-1], ids[:, 1:].clone()
        y[:, : text.LENGTH // 3] = -1
        _, loss = model(x, y)
        model.zero_grad(set_to_none=True)
        loss.backward()
        record.observe(loss=loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        record.stepped(loss, (x, y))
    record.close()
