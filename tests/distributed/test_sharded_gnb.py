from __future__ import annotations

import math
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers the backend
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.distributed import DistributedConfig

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import dense
import sharding

from sharpwatch.blocks import classify
from sharpwatch.curvature.estimators.gnb_sharded import sharded_gnb_probe
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.objective.candidates import CROSS_ENTROPY
from sharpwatch.curvature.parameters import shards
from sharpwatch.curvature.parameters.fsdp import DataRank
from sharpwatch.curvature.parameters.shards import squared_norms, sum_by_index
from sharpwatch.curvature.statistics.sketch import CountSketch
from sharpwatch.errors import DesyncError, ProbeError

ROWS = 4
DRAWS = 64
POSITIONS = torch.arange(dense.POSITIONS)[None]


def add(tensor):
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def batch_of(data):
    """The rows of one data rank, of `ROWS` in all; it sees no others."""
    ids, labels = dense.tokens(rows=ROWS)
    own = slice(data.number * ROWS // data.count, (data.number + 1) * ROWS // data.count)
    return Batch((), {"input_ids": ids[own], "labels": labels[own], "position_ids": POSITIONS})


def weights_of(block_map, model):
    held = [None] * dist.get_world_size()
    dist.all_gather_object(held, {name: shards.Shard.of(p).numel for name, p in model.named_parameters()})
    return shards.shard_weights({name: math.prod(shape) for name, shape in block_map.shapes.items()}, held)


def source(data, draw=0):
    return torch.Generator().manual_seed(1000 * draw + data.number)


def probe(model, block_map, batch=None, **options):
    data = DataRank.of(model)
    given = {"draws": 1, "generator": source(data), "add": add, "weights": weights_of(block_map, model)}
    return sharded_gnb_probe(model, block_map, batch or nullcontext(batch_of(data)), **given | options)


def unsharded(model, block_map, sketcher, count):
    """√N ∇L̂ of the same labels on one process: its squares and its sketch."""
    whole = 0
    tokens = int((dense.tokens(rows=ROWS)[1][:, 1:] != -100).sum())
    for number in range(count):
        data = DataRank(number, count)
        arguments = batch_of(data).kwargs
        logits = model(input_ids=arguments["input_ids"]).logits
        mask = torch.nn.functional.pad(arguments["labels"][:, 1:] != -100, (0, 1))
        # What the probe draws: its gradient by the logits is negative at the label alone.
        drawn = CROSS_ENTROPY.draw(logits.detach(), mask.flatten().float(), 1, source(data))
        labels = drawn[0].argmin(-1)[mask]
        whole = whole + torch.nn.functional.cross_entropy(logits[mask], labels, reduction="sum")
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(whole / tokens**0.5, parameters), strict=True))
    by_layer = sum_by_index(squared_norms(block_map, gradients), block_map.layer_block_of, len(block_map.layer_blocks))
    return tokens, by_layer, sketcher.sketch(gradients)


def summed(model):
    """A sharded model whose gradients the user wants added up, not averaged."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other way
    return model


def check_draw(model, make):
    """One draw is to the digit that of the same labels on one process."""
    block_map, data = classify(make()), DataRank.of(model)
    sketcher = CountSketch(block_map, size=64, seed=1)
    found = probe(model, block_map, sketcher=sketcher)
    tokens, traces, sketch = unsharded(make().eval(), block_map, sketcher, data.count)
    assert (found.tokens, found.rows) == (tokens, ROWS)
    torch.testing.assert_close(found.traces[0], traces, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.sketches[0], sketch, rtol=1e-5, atol=1e-5 * float(sketch.abs().max()))


def check_draws(model, truth, rounding=0.0):
    """Many draws are right to their standard error. `rounding`, relative, is what the precision may cost."""
    draws = probe(model, classify(dense.llama()), draws=DRAWS, generator=source(DataRank.of(model), 1)).traces
    stderr = draws.std(0) / DRAWS**0.5
    assert ((draws.mean(0) - truth).abs() < 4 * stderr + rounding * truth).all()
    assert (stderr < 0.15 * truth).all()  # else 4 of them would hold nothing


def qwen3():
    """Each rank normalizes its own heads: a weight that all have, whose gradient transformers adds up in a hook."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen3ForCausalLM(
        Qwen3Config(
            **sizes,
            head_dim=4,
            num_hidden_layers=2,
            vocab_size=dense.VOCAB,
            max_position_embeddings=dense.POSITIONS,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def by_transformers(model):
    """Tensor parallelism by the model's own plan."""
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder)
        if dist.get_rank() == 0:
            model.save_pretrained(folder[0])
        dist.barrier()
        config = DistributedConfig(tp_size=dist.get_world_size())
        sharded = type(model).from_pretrained(folder[0], distributed_config=config).train()
        dist.barrier()
    sharded(input_ids=dense.tokens()[0])  # sets the hooks
    return sharded


def two(truth):
    dist.new_group(backend="fake")  # torchtitan's meshes have them for what they don't divide
    mesh = init_device_mesh("cpu", (2,))
    model = summed(sharding.by_fsdp(dense.llama(), mesh))
    check_draw(model, dense.llama)
    check_draws(model, truth)
    model = sharding.by_tensor_parallelism(dense.llama(), mesh)
    check_draw(model, dense.llama)
    check_draws(model, truth)
    check_draw(by_transformers(qwen3()), qwen3)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    # bfloat16 rounds to 0.4 %; some thirty roundings, half of them up, make 1 % of a gradient and 2 % of its square.
    check_draws(sharding.by_fsdp(dense.llama(), mesh, mp_policy=half), truth, rounding=0.05)


def four(truth):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = sharding.by_fsdp(sharding.by_tensor_parallelism(dense.llama(), mesh["tp"]), mesh["dp"])
    check_draw(model, dense.llama)
    check_draws(model, truth)


@pytest.fixture(scope="module")
def truth():
    model = dense.llama()
    exact, block_map = dense.Exact.of(model), classify(model)
    root = dense.gauss_newton_root(exact, *dense.tokens(rows=ROWS))
    parts = torch.stack([part.square().sum() for part in exact.by_part(block_map, root)])
    return sum_by_index(parts, block_map.layer_block_of, len(block_map.layer_blocks)).detach()


def test_two_ranks_give_the_trace_of_every_layer_block(ranks, truth):
    ranks(two, 2, truth, timeout=120)


def test_four_ranks_give_the_trace_of_every_layer_block(ranks, truth):
    ranks(four, 4, truth, timeout=120)


class Counted(nn.Module):
    """A buffer that every forward counts in."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, hidden):
        self.calls += 1
        return hidden


def train(probed):
    """Dropout, accumulated gradients that are summed, a buffer that changes, hooks: what is left after some steps."""
    torch.manual_seed(7)
    model = dense.gpt2()
    model.transformer.drop = nn.Sequential(model.transformer.drop, Counted())
    block_map = classify(model)
    sharding.by_fsdp(model, init_device_mesh("cpu", (2,)))
    summed(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    seen = Counter()
    model.transformer.h[0].register_forward_hook(lambda *_: seen.update(["forward"]))
    model.transformer.wpe.weight.register_post_accumulate_grad_hook(lambda _: seen.update(["accumulated"]))
    ids, labels = dense.tokens(seed=dist.get_rank())
    gradients = []
    for _ in range(3):
        for last in (False, True):
            model.set_requires_gradient_sync(last)
            model(input_ids=ids, labels=labels).loss.backward()
            if probed:
                leaves_no_trace(model, block_map)
        optimizer.step()
        if probed:
            leaves_no_trace(model, block_map)
        gradients += [parameter.grad.to_local().clone() for parameter in model.parameters()]
        optimizer.zero_grad()
    weights = [parameter.detach().to_local().clone() for parameter in model.parameters()]
    return [*weights, *gradients, *(b.clone() for b in model.buffers()), torch.get_rng_state(), torch.rand(3)], seen


def leaves_no_trace(model, block_map):
    held = [(parameter, parameter.grad) for parameter in model.parameters()]
    probe(model, block_map, sketcher=CountSketch(block_map, size=64), draws=2)
    fail_before(model, block_map)
    fail_after(model, block_map)
    fail_beside(model, block_map)
    assert all(new is old for new, (old, _) in zip(model.parameters(), held, strict=True))
    assert all(parameter.grad is grad for parameter, grad in held)
    assert all(module.training for module in model.modules())
    assert not model._get_fsdp_state()._comm_ctx.post_forward_order  # what the next backward would gather ahead


def fail_before(model, block_map):
    """One rank has no rows: no other waits for it in the forward."""
    with pytest.raises(ProbeError, match="failed on 1 of the ranks: OutOfMemoryError: no rows"):
        probe(model, block_map, batch=no_rows() if dist.get_rank() == 1 else None)


@contextmanager
def no_rows():
    raise torch.OutOfMemoryError("no rows")
    yield


def fail_beside(model, block_map):
    """One rank can't sketch: all hear why, and nobody waits."""
    sketcher = CountSketch(block_map, size=64)
    if dist.get_rank() == 1:
        sketcher.sketch = None
    with pytest.raises(ProbeError, match="failed on 1 of the ranks: TypeError: 'NoneType'"):
        probe(model, block_map, sketcher=sketcher)


def fail_after(model, block_map):
    """One rank's logits can't be told, after a forward that ends there."""

    def logits_fn(called, batch):
        output = called(**batch.kwargs)
        if dist.get_rank() == 0:
            raise ValueError("no mask")
        return output.logits, batch.kwargs["labels"] != -100

    with pytest.raises(ProbeError, match="failed on 1 of the ranks: ValueError: no mask"):
        probe(model, block_map, logits_fn=logits_fn)


def unchanged_by_probes():
    plain, expected = train(probed=False)
    probed, found = train(probed=True)
    assert expected == found == {"forward": 6, "accumulated": 3}
    assert len(plain) == len(probed)
    assert all(torch.equal(one, other) for one, other in zip(plain, probed, strict=True))


def test_training_is_bit_identical(ranks):
    ranks(unchanged_by_probes, 2)


class Hurried:
    """`add` over a group of its own; waits a minute for the others, a second once this rank has failed."""

    def __init__(self):
        self.failed = False
        self._group = dist.new_group(backend="gloo")

    def __call__(self, tensor):
        total = tensor.clone()
        dist.all_reduce(total, group=self._group, async_op=True).wait(timedelta(seconds=1 if self.failed else 60))
        return total


def break_probes(module, fail, *, backward=False):
    """Call `fail` in every probe's forward through `module`, or backward."""
    inner = module.forward

    def forward(*args, **kwargs):
        output = inner(*args, **kwargs)
        if not module.training and not backward:
            fail()
        if not module.training:
            output.register_hook(lambda _: fail())
        return output

    module.forward = forward


def sharded_llama(kind):
    model, mesh = dense.llama(), init_device_mesh("cpu", (2,))
    return sharding.by_fsdp(model, mesh) if kind == "fsdp" else sharding.by_tensor_parallelism(model, mesh)


def failing_alone(kind):
    """Rank 1 alone runs out of memory where the other waits for it: in a forward (FSDP2), a backward (TP)."""
    model, add = sharded_llama(kind), Hurried()

    def fail():
        add.failed = True
        raise torch.OutOfMemoryError("rank 1 had no room")

    if dist.get_rank() == 1:
        break_probes(model.model.layers[0].mlp if kind == "fsdp" else model.model.norm, fail, backward=kind == "tp")
    with pytest.raises(DesyncError) as raised:
        probe(model, classify(dense.llama()), add=add)
    return str(raised.value)  # this process ends: only then does the other stop waiting


@pytest.mark.parametrize("kind", ["fsdp", "tp"])
def test_a_failure_of_one_rank_within_the_models_collectives_is_never_passed_over(kind, ranks):
    waited, failed = ranks(failing_alone, 2, kind)
    assert failed.startswith("failed on this rank: OutOfMemoryError: rank 1 had no room")
    assert "failed on this rank: RuntimeError" in waited  # the collective that rank 1 left
    assert "Restart from the last checkpoint" in failed


def failing_alike(backward):
    """All ranks fail in one place: none waits for another. Then one has launched a collective more than the other."""
    model, unequal = sharded_llama("tp"), []

    def fail():
        if unequal and dist.get_rank() == 0:
            unequal.append(dist.all_reduce(torch.zeros(()), async_op=True))
        raise torch.OutOfMemoryError("no room anywhere")

    break_probes(model.model.norm, fail, backward=backward)
    block_map = classify(dense.llama())
    for _ in range(2):
        with pytest.raises(ProbeError, match="failed on 2 of the ranks: OutOfMemoryError: no room anywhere"):
            probe(model, block_map)
    model(input_ids=dense.tokens()[0], position_ids=POSITIONS).logits.full_tensor().sum().backward()
    unequal.append(None)
    with pytest.raises(DesyncError, match="failed on 2 of the ranks"):
        probe(model, block_map, add=Hurried())
    if dist.get_rank() == 1:
        dist.all_reduce(torch.zeros(()))


@pytest.mark.parametrize("backward", [False, True])
def test_ranks_that_fail_alike_go_on_and_those_that_do_not_go_no_further(backward, ranks):
    ranks(failing_alike, 2, backward)


def hooked():
    """A reduction of the user's own, which may keep something of each call."""
    model, calls = sharded_llama("fsdp"), []
    model.set_all_reduce_hook(calls.append)
    with pytest.raises(ProbeError, match="custom all_reduce_hook"):
        probe(model, classify(dense.llama()))
    return len(calls)


def test_no_probe_calls_a_reduction_of_the_users_own(ranks):
    assert ranks(hooked, 2) == [0, 0]
