"""The first FSDP: its flat parameters are watched as they are, each rank's piece a part of one sum."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

sys.path.append(str(Path(__file__).parents[1]))
import stand_ins

import sharpwatch
from sharpwatch.errors import AttachError
from sharpwatch.testing import InMemoryTransport
from sharpwatch.v1 import types_pb2

STEPS = 8


def trained(model, optimizer):
    """Each step's gradient norm over all of the model, by FSDP itself."""
    norms = []
    for step in range(STEPS):
        ids = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        model(ids, ids)[1].backward()
        norms.append(model.clip_grad_norm_(float("inf")).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms


def made(*, original):
    torch.manual_seed(0)
    policy = ModuleWrapPolicy({nn.Embedding})
    wrap = functools.partial(FullyShardedDataParallel, auto_wrap_policy=policy, device_id=torch.device("cpu"))
    model = wrap(stand_ins.Net(), use_orig_params=original)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def flat():
    transport = InMemoryTransport()
    (ours, optimizer), (theirs, plain) = made(original=False), made(original=False)
    watch = sharpwatch.attach(ours, optimizer, training_job="flat", transport=transport)
    if transport.hello:
        chosen = types_pb2.MultiplierSet(multipliers={"other": 0.5}, revision=1)
        transport.command(id="cut", apply_at_step=4, set_multipliers=chosen)
    trained(ours, optimizer)
    watch.close()
    norms = trained(theirs, plain)
    same = all(map(torch.equal, ours.parameters(), theirs.parameters()))
    if not transport.hello:
        return same
    taps = [sample.tap for sample in transport.samples if sample.HasField("tap")]
    seen = [np.linalg.norm(np.frombuffer(tap.gradient_norm.data, "<f4")).item() for tap in taps]
    return same, norms, seen, [result.detail for result in transport.results], list(transport.hello.blocks)


def test_flat_parameters_are_tapped_whole_and_left_alone(ranks):
    (same, norms, seen, details, blocks), other = ranks(flat, 2)
    assert same
    assert other
    assert blocks == ["other"]
    np.testing.assert_allclose(seen, norms, rtol=1e-5)  # float32 sums in another order
    (detail,) = details
    assert "flat parameters of FSDP1" in detail


def cut_to_pieces():
    model, optimizer = made(original=True)
    try:
        sharpwatch.attach(model, optimizer, training_job="pieces")
    except AttachError as error:
        return str(error)
    return ""


def test_original_parameters_in_pieces_are_refused_on_every_rank(ranks):
    for error in ranks(cut_to_pieces, 2):
        assert "FSDP2" in error
