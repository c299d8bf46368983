"""Exact Jacobians and Hessians of tiny models: dense, in float64, computed independently of the probes."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCAB = 40
POSITIONS = 12


def gpt2(dropout=0.1, layers=2):
    """Fused QKV, tied head, dropout; weights large enough that no block is flat."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=16,
        n_layer=layers,
        n_head=2,
        n_inner=16,
        vocab_size=VOCAB,
        n_positions=POSITIONS,
        initializer_range=0.3,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLM",
    )
    return GPT2LMHeadModel(config).train()


def llama(*, tied=False):
    """Grouped-query attention, RMSNorm, untied head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=16,
        vocab_size=VOCAB,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
        attention_dropout=0.1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).train()


def tied_llama():
    """`llama` with the head tied to the embedding."""
    return llama(tied=True)


def gpt_neox():
    """QKV fused head by head, attention and feed-forward in parallel, rotary positions."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=VOCAB,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTNeoXForCausalLM(config).train()


def mixtral():
    """Experts and routers."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=8,
        num_local_experts=3,
        num_experts_per_tok=2,
        vocab_size=VOCAB,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    return MixtralForCausalLM(config).train()


def t5():
    """Encoder and decoder, relative positions, no biases."""
    torch.manual_seed(0)
    config = T5Config(
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        vocab_size=VOCAB,
        initializer_factor=1.0,
        dropout_rate=0.1,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5ForConditionalGeneration(config).train()


MODELS = {"gpt2": gpt2, "llama": llama}
ZOO = MODELS | {"tied_llama": tied_llama, "gpt_neox": gpt_neox, "mixtral": mixtral, "t5": t5}


def tokens(rows=3, seed=1):
    """Inputs and labels, some of which are ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, POSITIONS), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
    return ids, labels


@dataclass(frozen=True)
class Exact:
    """A float64 copy of a model without dropout, with its parameters laid end to end."""

    model: torch.nn.Module
    names: tuple[str, ...]

    @classmethod
    def of(cls, model):
        twin = copy.deepcopy(model).double().eval()
        if hasattr(twin.config, "num_local_experts"):
            twin.set_experts_implementation("eager")  # the grouped product has no float64
        return cls(twin, tuple(name for name, _ in twin.named_parameters()))

    @property
    def parameters(self):
        return [dict(self.model.named_parameters())[name] for name in self.names]

    def by_part(self, block_map, flat):
        """The entries of each part in `flat` [..., n]."""
        sizes = [parameter.numel() for parameter in self.parameters]
        pieces = dict(zip(self.names, flat.split(sizes, -1), strict=True))
        lead = flat.shape[:-1]
        shaped = {name: pieces[name].view(*lead, *parameter.shape) for name, parameter in self._named()}
        views = []
        for part in block_map.parts:
            flat = [
                part.view(one).reshape(-1)
                for one in shaped[part.parameter].reshape(-1, *block_map.shapes[part.parameter])
            ]
            views.append(torch.stack(flat).view(*lead, -1))
        return views

    def entries(self, block_map, block):
        """Flat indices of the parameters of a block."""
        index = torch.arange(sum(parameter.numel() for parameter in self.parameters))
        parts = self.by_part(block_map, index)
        return torch.cat([p for p, part in zip(parts, block_map.parts, strict=True) if part.type == block])

    def _named(self):
        return zip(self.names, self.parameters, strict=True)


def gauss_newton_root(exact, ids, labels):
    """A matrix A [N V, n] with AᵀA = G: one row for each predicting position and class.

    diag(p) − ppᵀ = RRᵀ with R = diag(√p) − p√pᵀ.
    """
    if exact.model.config.is_encoder_decoder:
        logits = exact.model(input_ids=ids, labels=labels).logits[labels != -100]
    else:
        logits = exact.model(input_ids=ids).logits[:, :-1][labels[:, 1:] != -100]
    p = logits.detach().softmax(-1)
    root = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]
    directions = torch.zeros(p.shape[0], p.shape[1], *p.shape, dtype=p.dtype)
    for position in range(len(p)):
        directions[position, :, position, :] = root[position].T / len(p) ** 0.5
    rows = [
        torch.autograd.grad(logits, exact.parameters, chunk, retain_graph=True, is_grads_batched=True)
        for chunk in directions.flatten(0, 1).split(256)
    ]
    return torch.cat([torch.cat([g.flatten(1) for g in row], 1) for row in rows])


def gradient_and_hessian(exact, ids, labels):
    """g [n] and H [n, n] of the mean cross-entropy."""
    parameters = exact.parameters
    with sdpa_kernel(SDPBackend.MATH):
        loss = exact.model(input_ids=ids, labels=labels).loss
        found = torch.autograd.grad(loss, parameters, create_graph=True)
        hessian = torch.cat([_rows_of_hessian(gradient, parameters) for gradient in found])
    return torch.cat([g.flatten() for g in found]).detach(), hessian


def _rows_of_hessian(gradient, parameters):
    """The rows of H for one parameter, whose gradient leads back through a part of the graph alone."""
    entries = torch.eye(gradient.numel(), dtype=gradient.dtype).view(-1, *gradient.shape)
    size = sum(parameter.numel() for parameter in parameters)
    rows = gradient.new_zeros(len(entries), size)
    for chunk, into in zip(entries.split(256), rows.split(256), strict=True):
        found = torch.autograd.grad(
            gradient, parameters, chunk, retain_graph=True, is_grads_batched=True, allow_unused=True
        )
        for part, second in zip(into.split([p.numel() for p in parameters], 1), found, strict=True):
            if second is not None:
                part.copy_(second.flatten(1))
    return rows


def ends(matrix):
    """The smallest and the largest eigenvalue of a symmetric matrix, by ARPACK: all of 4,000 take 15 times as long."""
    return eigsh(matrix.numpy(), 2, which="BE", return_eigenvectors=False, v0=np.ones(len(matrix))).tolist()


class Once(torch.autograd.Function):
    """x³, by a kernel without a second derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad
