"""Layouts of fused matrices read from code, each held against what the code computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention

from sharpwatch.blocks import classify
from sharpwatch.blocks.fused_source import division_of

D, HEADS = 8, 2


class Attention(nn.Module):
    """Attention whose `divided` gives queries, keys and values, each [batch, heads, tokens, width]."""

    def __init__(self, rows=3 * D):
        super().__init__()
        self.qkv, self.proj = nn.Linear(D, rows), nn.Linear(D, D)

    def forward(self, x):
        q, k, v = self.divided(x)
        mixed = scaled_dot_product_attention(q, k, v, enable_gqa=k.shape[1] != q.shape[1])
        return self.proj(mixed.transpose(1, 2).flatten(2))


def heads(tensor, count=HEADS):
    return tensor.unflatten(-1, (count, -1)).transpose(1, 2)


class Chunk(Attention):
    def divided(self, x):
        return [heads(each) for each in self.qkv(x).chunk(3, dim=-1)]


class ChunkOfAVariable(Attention):
    def divided(self, x):
        qkv = self.qkv(x)
        q, k, v = torch.chunk(qkv, 3, dim=-1)
        return heads(q), heads(k), heads(v)


class Split(Attention):
    def divided(self, x):
        q, k, v = self.qkv(x).split(x.shape[-1], dim=2)
        return heads(q), heads(k), heads(v)


class Reshape(Attention):
    """As in timm."""

    def divided(self, x):
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return q, k, v


class ReshapeOfTokens(Attention):
    """As in Qwen's vision tower: all tokens of a batch are one sequence."""

    def divided(self, x):
        q, k, v = self.qkv(x[0]).reshape(x.shape[1], 3, HEADS, -1).permute(1, 2, 0, 3).unbind(0)
        return q[None], k[None], v[None]


class Functional(Attention):
    """As in timm's Swin v2: a bias of its own."""

    def reset_parameters(self):
        nn.init.xavier_uniform_(self.qkv.weight)

    def divided(self, x):
        bias = torch.cat([self.qkv.bias[:D], torch.zeros(D), self.qkv.bias[2 * D :]])
        qkv = linear(x, weight=self.qkv.weight, bias=bias)
        b, n = qkv.shape[:2]
        qkv = qkv.reshape(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return q, k, v


class Unflatten(Attention):
    def divided(self, x):
        q, k, v = self.qkv(x).float().unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v


class Grouped(Attention):
    """As in litgpt: fewer keys and values than queries."""

    def __init__(self):
        super().__init__(D + 2 * (D // HEADS))

    def divided(self, x):
        sizes = D, D // HEADS
        q, k, v = self.qkv(x).split((sizes[0], sizes[1], sizes[1]), dim=-1)
        return heads(q), heads(k, 1), heads(v, 1)


class Inherited(Chunk):
    """Its code is its parent's."""


LAYOUTS = [Chunk, ChunkOfAVariable, Split, Reshape, ReshapeOfTokens, Functional, Unflatten, Grouped, Inherited]


class ByHead(Attention):
    """As in GPT-NeoX: all of the first head, then all of the next."""

    def divided(self, x):
        b, n, _ = x.shape
        return self.qkv(x).view(b, n, HEADS, -1).transpose(1, 2).chunk(3, dim=-1)


class ByHeadInOne(Attention):
    def divided(self, x):
        b, n, _ = x.shape
        return self.qkv(x).view(b, n, HEADS, 3, -1).permute(3, 0, 2, 1, 4)


class ValuesFirst(Attention):
    def divided(self, x):
        v, k, q = self.qkv(x).chunk(3, dim=-1)
        return heads(q), heads(k), heads(v)


class Mixed(Attention):
    """Divides it in two ways."""

    def divided(self, x):
        if x.shape[1] == 1:
            return self.qkv(x).view(x.shape[0], 1, HEADS, -1).transpose(1, 2).chunk(3, dim=-1)
        return [heads(each) for each in self.qkv(x).chunk(3, dim=-1)]


def placed(attention):
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"attn": attention, "mlp": nn.Linear(D, D)})])
    return classify(model)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_values_of_the_split_are_those_that_the_code_mixes(kind):
    torch.manual_seed(0)
    attention, x = kind(), torch.randn(1, 4, D)
    block_map = placed(attention)
    weights = {f"layers.0.attn.{name}": parameter for name, parameter in attention.named_parameters()}
    weights |= {name: torch.zeros(shape) for name, shape in block_map.shapes.items() if name not in weights}
    views = [
        (part.type, view)
        for part, view in zip(block_map.parts, block_map.views(weights), strict=True)
        if "qkv" in part.parameter
    ]
    assert [block for block, _ in views] == ["qk", "vo", "qk", "vo"]
    mixed = []
    attention.proj.register_forward_pre_hook(lambda _, args: mixed.append(args[0].detach()))
    with torch.no_grad():
        attention(x)
        # What leaves attention is linear in the values, for weights that queries and keys give.
        for block, view in views:
            view.mul_(2.0 if block == "vo" else 1.0)
        attention(x)
        for block, view in views:
            view.mul_(0.0 if block == "qk" else 1.0)
        attention(x)
    once, twice, evenly = mixed
    torch.testing.assert_close(twice, 2 * once)
    torch.testing.assert_close(evenly, evenly[:, :1].expand_as(evenly))  # without queries and keys all tokens are alike


@pytest.mark.parametrize("kind", [ByHead, ByHeadInOne, ValuesFirst, Mixed])
def test_other_layouts_are_not_guessed(kind):
    assert division_of(kind(), "qkv", 3) == ""
    assert placed(kind()).unplaced == ("layers.0.attn.qkv.weight", "layers.0.attn.qkv.bias")


def test_a_class_without_code_is_not_guessed():
    space = {}
    exec("class Made(base):\n    def divided(self, x): return self.qkv(x).chunk(3, -1)", {"base": Attention}, space)  # noqa: S102
    assert division_of(space["Made"](), "qkv", 3) == ""


class Rearranged(nn.Module):
    """As in lucidrains' models."""

    def __init__(self):
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x, rearrange):
        return rearrange(self.to_qkv(x), "b n (three h d) -> three b h n d", three=3, h=HEADS)


class RearrangedByHead(Rearranged):
    def forward(self, x, rearrange):
        return rearrange(self.to_qkv(x), "b n (h three d) -> three b h n d", three=3, h=HEADS)


class KeysAndValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_kv, self.to_out = nn.Linear(D, D), nn.Linear(D, 2 * D), nn.Linear(D, D)

    def forward(self, x):
        k, v = self.to_kv(x).chunk(2, dim=-1)
        return self.to_q(x), k, v


def test_einops_patterns_are_read():
    assert division_of(Rearranged(), "to_qkv", 3) == "equal"
    assert division_of(RearrangedByHead(), "to_qkv", 3) == ""


def test_keys_and_values_are_halves():
    parts = [p for p in placed(KeysAndValues()).parts if p.parameter.endswith("to_kv.weight")]
    assert [(p.type, p.start, p.stop) for p in parts] == [("qk", 0, D), ("vo", D, 2 * D)]
