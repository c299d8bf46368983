"""What the agent's tests train and what they send to: a small model, and a pipe whose other end is the test."""

from __future__ import annotations

from torch import nn

from sharpwatch.v1 import agent_pb2, types_pb2

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


class Wire:
    """A pipe: what was sent is kept in `samples`, what is put into `inbox` is received."""

    def __init__(self, hello, **options):
        self.hello, self.options = hello, options
        self.samples, self.inbox, self.dropped, self.closed = [], [], {}, False

    def greet(self, hello):
        self.hello = hello

    def send(self, request):
        self.samples.append(request.sample)

    def receive(self):
        taken, self.inbox = self.inbox, []
        return taken

    def close(self):
        self.closed = True

    def order(self, **command):
        self.inbox.append(agent_pb2.SessionResponse(command=types_pb2.Command(**command)))

    @property
    def results(self):
        return [result for sample in self.samples for result in sample.results]


def in_each_step(optimizer, call):
    """Have `call(optimizer)` called in the midst of each `step()` of one of torch's optimizers, inside all hooks."""
    inner = optimizer._init_group

    def init_group(group, *arguments, **options):
        if group is optimizer.param_groups[0]:
            call(optimizer)
        return inner(group, *arguments, **options)

    optimizer._init_group = init_group
