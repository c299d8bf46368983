"""A small model that the agent's tests train, and transports that keep what the agent sends."""

from __future__ import annotations

from torch import nn

from sharpwatch.testing import InMemoryTransport

LLAMA = {  # of transformers' LlamaConfig
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


class Net(nn.Module):
    """A language model of nanoGPT's manner: logits and loss."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(11, 8)
        self.ln_f = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 11, bias=False)

    def forward(self, idx, targets=None):
        logits = self.lm_head(self.ln_f(self.wte(idx)))
        loss = None if targets is None else nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


class Transports(list):
    """The transports that a test has made, oldest first; none leads to a courier."""

    def new(self):
        self.append(InMemoryTransport())
        return self[-1]


def in_each_step(optimizer, call):
    """Have `call(optimizer)` called in the midst of each `step()` of one of torch's optimizers, inside all hooks."""
    inner = optimizer._init_group

    def init_group(group, *arguments, **options):
        if group is optimizer.param_groups[0]:
            call(optimizer)
        return inner(group, *arguments, **options)

    optimizer._init_group = init_group
