"""The gradient noise under DDP: what each rank makes of its own gradients is, in the mean, the covariance of all."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

sys.path.insert(0, str(Path(__file__).parents[1]))
from stand_ins import Net

import sharpwatch
from sharpwatch.agent.probes.gradient_noise import GradientListener, averaged_over
from sharpwatch.agent.safety import ExceptionBarrier
from sharpwatch.blocks import classify
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.parameters.shards import squared_norms
from sharpwatch.testing import InMemoryTransport
from sharpwatch.wire import decode

RANKS = 2
CLOSE = 1e-4  # norms are float32 sums, and the noise a difference of squared ones not much smaller than they are


def tokens(micro_batch):
    seed = 10 * dist.get_rank() + micro_batch
    return torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(seed))


def local_gradients(model, micro_batches):
    """By parameter, [micro_batches, numel]."""
    found = []
    for micro_batch in range(micro_batches):
        batch = tokens(micro_batch)
        loss = model(batch, batch.roll(1))[1] / micro_batches
        found.append([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    return [torch.stack(each) for each in zip(*found, strict=True)]


def accumulated(micro_batches, synchronised, views):
    """What this rank makes of one step, what its sample says, and its micro-batches' own gradients."""
    transport = InMemoryTransport()
    torch.manual_seed(3)
    plain = Net().train()
    gradients = local_gradients(plain, micro_batches)
    model = nn.parallel.DistributedDataParallel(plain, gradient_as_bucket_view=views)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # each step the same
    watch = sharpwatch.attach(
        model, optimizer, training_job="noise", transport=transport, probe_every=1, probes=("gnb", "gradient_noise")
    )
    block_map = classify(model)
    noise = GradientListener(block_map, model, ExceptionBarrier(), ranks=averaged_over(model))
    own = []
    for _ in range(3):  # of ranks, none probes at the first step
        for micro_batch in range(micro_batches):
            batch = tokens(micro_batch)
            last = micro_batch == micro_batches - 1
            with nullcontext() if last or synchronised else model.no_sync():
                noise.forward()
                arguments = batch, batch.roll(1)
                output = model(*arguments)
                noise.output(Batch(arguments), output)
                output[1].div(micro_batches).backward()
        stepped = squared_norms(block_map, {name: each.grad for name, each in model.named_parameters()})
        own.append(noise.take().noise(block_map, stepped.numpy()))
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    sent = [sample.gradient_noise.noise for sample in transport.samples if sample.HasField("gnb")]
    at = {part.parameter: index for index, part in enumerate(block_map.parts)}
    return {
        "own": own,
        "sent": [decode(each, name="noise", dtype="float32", shape=own[0].shape) for each in sent],
        "gradients": gradients,
        "layers": [block_map.layer_block_of[at[name]] for name in dict(model.named_parameters())],
    }


@pytest.mark.parametrize(
    ("micro_batches", "synchronised", "views"), [(2, False, False), (2, True, True), (1, True, False)]
)
def test_the_mean_of_what_the_ranks_find_is_the_covariance_of_their_average(ranks, micro_batches, synchronised, views):
    found = ranks(accumulated, RANKS, micro_batches, synchronised, views)
    expected = np.zeros_like(found[0]["own"][0], dtype=np.float64)
    n = RANKS * micro_batches
    for i, layer in enumerate(found[0]["layers"]):
        gradients = torch.cat([each["gradients"][i] for each in found]).double()
        assert len(gradients) == n
        expected[layer] += float(gradients.var(0).sum()) * n / RANKS**2
    for step in range(3):
        mean = np.mean([each["own"][step] for each in found], axis=0)
        np.testing.assert_allclose(mean, expected, rtol=CLOSE)
    assert len(found[0]["sent"]) == 2
    for sent in found[0]["sent"]:
        np.testing.assert_allclose(sent, found[0]["own"][0], rtol=CLOSE)
    assert found[1]["sent"] == []


def left_alone(_, bucket):
    """No reduction at all: as a hook may have it that averages weights now and then."""
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


HOOKS = {
    "fp16": lambda: (None, default_hooks.fp16_compress_hook),
    "PowerSGD": lambda: (
        powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2),
        powerSGD_hook.powerSGD_hook,
    ),
    "wrapped": lambda: (None, default_hooks.fp16_compress_wrapper(left_alone)),
    "local": lambda: (None, left_alone),
}


def sampled_with(hook):
    """Whether noise is sampled in a step whose gradients go through `hook`."""
    torch.manual_seed(3)
    model = nn.parallel.DistributedDataParallel(Net().train())
    noise = GradientListener(classify(model), model, ExceptionBarrier(), ranks=averaged_over(model))
    model.register_comm_hook(*HOOKS[hook]())  # a loop may do so after attach
    batch = tokens(0)
    noise.forward()
    model(batch, batch.roll(1))[1].backward()
    return noise.take() is not None


def sampled_with_each():
    return {hook: sampled_with(hook) for hook in HOOKS}


def test_gradients_that_are_not_plain_averages_give_no_noise(ranks):
    for results in ranks(sampled_with_each, RANKS):
        assert results == {"fp16": True, "PowerSGD": False, "wrapped": False, "local": False}
