"""All ranks of a run, come together at attach: who holds what of the model, and that all want the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn

from sharpwatch.agent.border import Border
from sharpwatch.agent.deepspeed import fragments
from sharpwatch.agent.meeting import Meeting
from sharpwatch.agent.optimizers import is_flat, uncontrolled
from sharpwatch.agent.options import Options
from sharpwatch.agent.ranks import Introduction, Ranks, join
from sharpwatch.agent.shared import Shared
from sharpwatch.agent.subject import Together
from sharpwatch.agent.tap import Tap
from sharpwatch.blocks import BlockMap, Part
from sharpwatch.curvature.fsdp import DataRank
from sharpwatch.curvature.shards import Shard, is_sharded, shares
from sharpwatch.errors import AttachError, BlockError


@dataclass(frozen=True, slots=True)
class _Own:
    """What one rank has: its part of the model, the entries that it holds of each parameter, its name for the run."""

    block_map: BlockMap
    held: Mapping[str, int]
    sharded: bool
    summed: bool
    run: str
    uncontrolled: str


@dataclass(frozen=True, slots=True)
class Company:
    """The same on every rank, but for `ranks`.

    `block_map` is of the whole model, of which a pipeline's stage has a part. `sharded`: no rank has all weights,
    `summed`: nor all gradients; `shares` weigh this rank's sums then. `uncontrolled`: why the learning rates of one of
    them can't be changed, and so nobody's.
    """

    ranks: Ranks
    block_map: BlockMap
    shares: Mapping[str, float]
    sharded: bool
    summed: bool
    staged: bool
    run: str
    uncontrolled: str

    def shared(self, tap: Tap, border: Border, device: torch.device) -> Shared:
        """The way of records through the ranks; an accelerator's numbers are a step further behind."""
        lag = 1 if device.type == "cpu" else 2
        return Shared(self.ranks, tap, border, sharded=self.sharded, summed=self.summed, lag=lag)

    def together(self, model: nn.Module) -> Together | None:
        """How probes of `model` add up what ranks find; None where each rank has all of it."""
        if not self.sharded or self.staged:
            return None
        return Together(self.ranks.add, self.shares, DataRank.of(model).number)


def come_together(meeting: Meeting, options: Options, block_map: BlockMap, run: str) -> Company:
    """Meet all other ranks, which have all come; every rank calls this.

    Raises `AttachError` on all of them where one differs in what must be `equal`.
    """
    model, optimizers = options.model, options.optimizers
    parameters = dict(model.named_parameters())
    cut = fragments(optimizers)
    try:
        shards = {name: cut.get(id(parameter)) or Shard.of(parameter) for name, parameter in parameters.items()}
    except BlockError as error:
        raise AttachError(f"model: {error}") from error
    meeting.all("attach")
    flat = any(map(is_flat, parameters.values()))
    if flat:  # each rank has its own piece under the same name
        block_map = _stretched(block_map, dist.get_world_size())
    held = {name: shard.numel for name, shard in shards.items()}
    sharded = flat or is_sharded(model)
    reason = uncontrolled(optimizers, dist.get_world_size())
    mine = _Own(block_map, held, sharded, sharded or bool(cut), run, reason)
    group, all_of_them = join(Introduction(equal=options.equal, own=mine))
    owns = [each.own for each in all_of_them if isinstance(each.own, _Own)]
    whole = _merged([own.block_map for own in owns])
    staged = any(own.block_map.shapes != whole.shapes for own in owns)
    sharded = staged or any(own.sharded for own in owns)
    summed = sharded or any(own.summed for own in owns)
    numel = {name: math.prod(shape) for name, shape in whole.shapes.items()}
    entries = len(whole.parts) * Tap.columns if summed else 0
    return Company(
        ranks=Ranks(group, entries),
        block_map=whole,
        shares=shares(numel, [own.held for own in owns]) if summed else {},
        sharded=sharded,
        summed=summed,
        staged=staged,
        run=owns[0].run,
        uncontrolled="; ".join(dict.fromkeys(own.uncontrolled for own in owns if own.uncontrolled)),
    )


def _merged(maps: Sequence[BlockMap]) -> BlockMap:
    """One map of all parameters; of a name that several ranks have, one and the same."""
    shapes: dict[str, tuple[int, ...]] = {}
    for rank, each in enumerate(maps):
        for name, shape in each.shapes.items():
            if shapes.setdefault(name, shape) != shape:
                raise AttachError(f"{name}: {shape} on rank {rank}, {shapes[name]} on another: not one model")
    if all(each.shapes == shapes for each in maps):
        return maps[0]
    parts: dict[str, list[Part]] = {}
    for each in maps:
        own = {
            name: [part for part in each.parts if part.parameter == name] for name in each.shapes if name not in parts
        }
        parts.update(own)
    return BlockMap(tuple(part for name in shapes for part in parts[name]), shapes)


def _stretched(block_map: BlockMap, times: int) -> BlockMap:
    """The map of vectors `times` as long."""
    parts = tuple(replace(part, numel=part.numel * times) for part in block_map.parts)
    return BlockMap(parts, {name: (math.prod(shape) * times,) for name, shape in block_map.shapes.items()})
