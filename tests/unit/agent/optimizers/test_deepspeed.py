"""What a rank steps of a parameter, as views: against the entries' own numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sharpwatch.agent.optimizers.deepspeed import Fragment
from sharpwatch.blocks import Part

SGD = torch.optim.SGD([torch.zeros(1)])


@st.composite
def cut_parameters(draw):
    """A tensor whose entries are numbered, and where it is cut."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    entries = math.prod(shape)
    cuts = sorted(draw(st.sets(st.integers(0, entries), max_size=4)) | {0, entries})
    return torch.arange(entries).view(shape), cuts


@given(cut_parameters(), st.data())
def test_fragments_have_each_entry_of_a_part_once(cut, data):
    whole, cuts = cut
    dim = data.draw(st.none() | st.integers(0, whole.ndim - 1))
    part = Part("w", "ffn", None, dim, 0, 0, whole.numel())
    if dim is not None:
        size = whole.shape[dim]
        repeats = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
        start = data.draw(st.integers(0, size // repeats - 1))
        stop = data.draw(st.integers(start + 1, size // repeats))
        part = replace(part, start=start, stop=stop, repeats=repeats)
    seen = []
    for start, stop in pairwise(cuts):
        held = whole.flatten()[start:stop]
        fragment = Fragment(whole, SGD, start, stop - start)
        seen += [entry for view in fragment.views(part, held) for entry in view.flatten().tolist()]
    assert sorted(seen) == sorted(part.view(whole).flatten().tolist())


def test_views_share_the_fragments_memory():
    whole = torch.zeros(4, 6)
    held = whole.flatten()[8:20].clone()
    views = Fragment(whole, SGD, 8, 12).views(Part("w", "qk", None, dim=1, start=0, stop=2, numel=8), held)
    for view in views:
        view.fill_(1.0)
    assert held.sum() == sum(view.numel() for view in views) > 0


def test_what_other_ranks_step_is_none_of_it():
    parameter = nn.Parameter(torch.zeros(3))
    parameter._hp_mapping = None
    fragment = Fragment.of(parameter, SGD)
    assert (fragment.numel, fragment.is_whole) == (0, False)
    assert fragment.views(Part("w", "norm", None, None, 0, 0, 3), torch.zeros(0)) == ()
