from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import dense
import sharding

from sharpwatch.agent.probes.context import ProbeContext, ProbedStep, ShardReduction
from sharpwatch.agent.probes.gnb import ShardedGnb
from sharpwatch.agent.statistics.clipping import ClipHookHandle
from sharpwatch.agent.statistics.tap import Tap
from sharpwatch.blocks import classify
from sharpwatch.curvature.estimators.gnb_sharded import launched_collectives
from sharpwatch.curvature.parameters import shards
from sharpwatch.curvature.parameters.fsdp import DataRank
from sharpwatch.curvature.statistics.sketch import CountSketch

STEPS = 4
RATE = 0.01
POSITIONS = torch.arange(dense.POSITIONS)[None]


def add(tensor):
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def full(tensor):
    return tensor.full_tensor() if shards.is_dtensor(tensor) else tensor


class Whole:
    """The same model on one process: it is given what the sharded one holds, put together by torch."""

    def __init__(self, make, block_map):
        self.model = make()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE)
        self.tap = Tap(block_map, dict(self.model.named_parameters()), [self.optimizer])

    @torch.no_grad()
    def follow(self, model, optimizer):
        own = dict(self.model.named_parameters())
        for name, parameter in model.named_parameters():
            own[name].copy_(full(parameter.detach()))
            own[name].grad = full(parameter.grad).clone()  # one that is replicated is no copy
            state = {key: full(value) for key, value in optimizer.state.get(parameter, {}).items()}
            self.optimizer.state[own[name]] = state

    def read(self):
        pending = self.tap.start({})
        self.tap.read(pending, 0)
        return self.tap.resolve(pending)


def weights_of(block_map, parameters):
    held = [None] * dist.get_world_size()
    dist.all_gather_object(held, {name: shards.Shard.of(p).numel for name, p in parameters.items()})
    return shards.shard_weights({name: math.prod(shape) for name, shape in block_map.shapes.items()}, held)


def shared_tap(block_map, model, optimizer):
    parameters = dict(model.named_parameters())
    return Tap(block_map, parameters, [optimizer], weights_of(block_map, parameters))


def shared_reading(tap):
    pending, before = tap.start({}), launched_collectives()
    tap.read(pending, 0)
    assert launched_collectives() == before  # of the user's groups none, in every step
    sums = torch.from_numpy(tap.local(pending))
    dist.all_reduce(sums)
    return tap.reading(sums.numpy())


@torch.no_grad()
def damage(model):
    """Make the largest entry of a gradient infinite, on all ranks that hold it."""
    gradient = next(p.grad for p in model.parameters() if p.grad.placements == p.placements and p.dim() == 2)
    local = gradient.to_local()
    local[local.abs() == full(gradient).abs().max()] = math.inf


def clip(model, tap):
    handle = ClipHookHandle(tap.clips.begin)
    before = launched_collectives()
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    launched = launched_collectives() - before
    handle.remove()
    assert float(full(total)) > 1e-2
    before = launched_collectives()
    torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)  # without sharpwatch, and changes nothing
    assert launched_collectives() - before == launched


def check_sketch(block_map, model, optimizer):
    """The gradient's sketch, added up over ranks; none of them waits for another on the way."""
    weights = weights_of(block_map, dict(model.named_parameters()))
    sketcher = CountSketch(block_map, size=64, seed=3)
    reduction = ShardReduction(add, weights, DataRank.of(model).number)
    context = ProbeContext(model, block_map, [optimizer], sketcher, torch.Generator(), shards=reduction)
    probe = ShardedGnb(context)
    before = launched_collectives()
    probe.before_step(ProbedStep(context))
    own = probe._gradient_sketch.cpu()
    assert launched_collectives() == before
    gradients = {name: full(parameter.grad) for name, parameter in model.named_parameters()}
    expected = sketcher.sketch(gradients)
    torch.testing.assert_close(add(own), expected, rtol=1e-4, atol=1e-5 * float(expected.nan_to_num().abs().max()))


def train(make, shard, ids, *, scattered=False):
    """A few steps; the tap of the sharded model against that of the whole at each of them.

    `scattered`: ranks have sums of the norms' gradients, which nobody has added up before the step.
    """
    block_map = classify(make())
    model = shard(make())
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    whole, tap = Whole(make, block_map), shared_tap(block_map, model, optimizer)
    for step in range(STEPS):
        logits = full(model(input_ids=ids, position_ids=POSITIONS).logits)[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        if step == STEPS - 1:
            damage(model)
        whole.follow(model, optimizer)
        if step == 1:  # the whole model's gradients are not clipped
            clip(model, tap)
        found, expected = shared_reading(tap), whole.read()
        assert (found.clip_factor < 0.9) == (step == 1)
        for name in ("weight_norm", "learning_rate"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-5, err_msg=name)
        untold = np.isnan(found.gradient_norm)
        assert untold.tolist() == [scattered and layer.type == "norm" for layer in block_map.layer_blocks]
        np.testing.assert_allclose(found.gradient_norm[~untold], expected.gradient_norm[~untold], rtol=1e-5)
        check_sketch(block_map, model, optimizer)
        assert found.non_finite.tolist() == expected.non_finite.tolist()
        assert found.non_finite.sum() == (step == STEPS - 1)
        assert found.changed_parameter.tolist() == expected.changed_parameter.tolist()
        assert (found.changed_parameter >= 0).any() == (step > 0)
        if step == STEPS - 1:
            assert found.non_finite_parameter.tolist() == expected.non_finite_parameter.tolist()
            assert (found.non_finite_parameter >= 0).sum() == 1
        if step >= 2:  # before, no rank knows the mean of v̂ over a part, which is its floor
            assert np.isfinite(found.update_rms).any()
            np.testing.assert_allclose(found.update_rms[~untold], expected.update_rms[~untold], rtol=1e-5)
            assert np.isnan(found.update_rms[untold]).all()
        optimizer.step()
        optimizer.zero_grad()


def check():
    ranks, rank = dist.get_world_size(), dist.get_rank()
    line = init_device_mesh("cpu", (ranks,))
    square = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("dp", "tp"))
    both = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    own = dense.tokens(seed=rank)[0]
    # Fused and interleaved matrices, whose heads the shards cut through; a tied head; rows that ranks go without.
    train(dense.gpt_neox, lambda model: sharding.by_fsdp(model, line), own)
    train(lambda: dense.gpt2(dropout=0.0), lambda model: sharding.by_fsdp(model, line, mp_policy=half), own)
    offload = CPUOffloadPolicy(pin_memory=False)
    train(dense.llama, lambda model: sharding.by_fsdp(model, both, offload_policy=offload), own)
    # Ranks that compute together see the same rows. Here gradients are placed otherwise than their parameters.
    tokens = dense.tokens(seed=square.get_local_rank("dp"))[0]
    by_rows = partial(sharding.by_tensor_parallelism, mesh=square["tp"])
    train(dense.llama, by_rows, dense.tokens()[0], scattered=True)
    train(
        dense.llama,
        lambda model: sharding.by_fsdp(sharding.by_tensor_parallelism(model, square["tp"]), square["dp"]),
        tokens,
    )


def test_a_sharded_model_is_read_as_the_whole(ranks):
    ranks(check, 4, timeout=120)
