"""A run whose ranks hold the model together, watched: FSDP2 and tensor parallel, as one run with the same weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

sys.path.insert(0, str(Path(__file__).parents[1]))
from stand_ins import LLAMA, in_each_step

import sharpwatch
from sharpwatch.agent.probes.runner import ProbeRunner
from sharpwatch.curvature.estimators import gnb_sharded
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.errors import DesyncError
from sharpwatch.testing import InMemoryTransport
from sharpwatch.v1 import agent_pb2, types_pb2

STEPS = 16
CONFIG = LLAMA | {"num_hidden_layers": 2, "attention_dropout": 0.2}


def model_of(kind):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).train()
    if kind == "tp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            plan = {
                "mlp.gate_proj": ColwiseParallel(),
                "mlp.up_proj": ColwiseParallel(),
                "mlp.down_proj": RowwiseParallel(),
            }
            parallelize_module(layer, mesh, plan)
        return model
    options = {
        "fsdp": {},
        "mixed": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
        "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    }[kind]
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def train(kind, watched=True, hurt=lambda: None, commanded=True, **options):
    """The run's weights on this rank, what rank 0 sent, and how many groups each step had."""
    transport = InMemoryTransport()
    model = model_of(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    watch = (
        sharpwatch.attach(
            model, optimizer, training_job="sharded", transport=transport, **{"probe_every": 4, **options}
        )
        if watched
        else None
    )
    groups = []
    in_each_step(optimizer, lambda optimizer: groups.append(len(optimizer.param_groups)))
    hurt()
    rank = 0 if kind == "tp" else dist.get_rank()
    torch.manual_seed(10 + rank)
    for step in range(1, STEPS + 1):
        ids = torch.randint(32, (8, 8))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if commanded and transport.hello and step == 3:
            transport.command(id="cut", set_multipliers=types_pb2.MultiplierSet(multipliers={"emb": 0.5, "ffn": 0.25}))
    if watch:
        watch.close()
    weights = {name: value.detach() for name, value in model.named_parameters()}
    held = {name: value.to_local() if hasattr(value, "to_local") else value for name, value in weights.items()}
    samples = [sample.SerializeToString() for sample in transport.samples]
    return (
        {name: value.clone() for name, value in held.items()},
        samples,
        groups,
        list(transport.hello.probes) if transport.hello else [],
    )


def both(kind, **options):
    """A plain run, and a watched one that gets no command, in one process group."""
    plain = train(kind, watched=False)
    quiet = train(kind, commanded=False, **options)
    return plain[0], quiet, torch.get_rng_state()


def samples_of(run):
    return [agent_pb2.Sample.FromString(each) for each in run[1]]


@pytest.mark.parametrize("kind", ["fsdp", "mixed", "offload", "tp"])
def test_a_watched_run_is_bit_identical_and_probed_and_tapped_as_one(kind, ranks):
    first, second = ranks(both, 2, kind, timeout=120)
    for plain, quiet, _ in (first, second):
        torch.testing.assert_close(quiet[0], plain, rtol=0, atol=0)
    samples = samples_of(first[1])
    assert samples_of(second[1]) == []
    assert [sample.step for sample in samples if not sample.closing] == list(range(1, STEPS + 1))
    assert first[1][3] == ["gnb"]
    probed = [sample.step for sample in samples if sample.HasField("gnb")]
    # Announced by the message of an earlier step, from the first of them on.
    assert len(probed) >= 2
    for sample in samples:
        assert sample.health.swallowed_errors == 0
        assert not sample.health.probe_failures
        assert sample.closing or sample.HasField("tap")
    for sample in samples:
        if sample.HasField("gnb"):
            traces = torch.frombuffer(bytearray(sample.gnb.traces.data), dtype=torch.float64)
            assert (traces > 0).all()
            assert sample.gnb.HasField("gradient_sketch")
    assert samples[-1].health.objective == "mean cross-entropy of logits, rows assumed in the first dimension"
    assert samples[-1].health.objective_state == "verified"


def test_multipliers_are_applied_to_shards_at_the_same_step(ranks):
    first, second = ranks(train, 2, "fsdp", timeout=120)
    assert first[2] == second[2]
    assert sorted(set(first[2])) == [1, 3]  # emb, ffn and all the rest
    (result,) = [result for sample in samples_of(first) for result in sample.results]
    assert result.outcome == types_pb2.COMMAND_OUTCOME_APPLIED
    assert first[2].index(3) + 1 == result.step


def another_loss():
    """Rank 1 alone trains on a loss that is none that gnb knows."""
    inner = LlamaForCausalLM.forward

    def forward(model, **arguments):
        output = inner(model, **arguments)
        if dist.get_rank() == 1 and model.training:
            output.loss = output.loss + 0.1 * output.logits.abs().mean()
        return output

    LlamaForCausalLM.forward = forward
    return train("fsdp", probe_every=1, commanded=False)


def test_a_loss_that_is_not_known_on_one_rank_is_refused_on_all(ranks):
    first, _ = ranks(another_loss, 2, timeout=120)
    samples = samples_of(first)
    assert not any(sample.HasField("gnb") for sample in samples)
    (failure,) = samples[-1].health.probe_failures
    assert failure.reason.startswith("failed on 1 of the ranks: the gradient of logits (8, 8, 32) is not that of")
    assert len(samples) >= STEPS


def starved():
    """Rank 1 fails in its own part of each probe; then it can't have its rows; then it has no room for one."""

    def hurt():
        if dist.get_rank() == 1:
            gnb_sharded.draw_gradient = _no_memory

    def rowless():
        gnb_sharded.draw_gradient = drawn
        if dist.get_rank() == 1:
            Batch.slice = _no_memory

    drawn, cut = gnb_sharded.draw_gradient, Batch.slice
    tripped = train("fsdp", hurt=hurt, probe_every=1)
    refused = train("fsdp", hurt=rowless, probe_every=1)
    Batch.slice = cut

    def narrow():
        ProbeRunner.has_room = lambda _: dist.get_rank() == 0

    return tripped, refused, train("fsdp", hurt=narrow, probe_every=1)


def _no_memory(*_, **__):
    raise torch.OutOfMemoryError("on purpose")


def test_what_fails_on_one_rank_ends_probes_on_all(ranks):
    (tripped, refused, narrow), _ = ranks(starved, 2, timeout=120)
    for run in (tripped, refused):
        (failure,) = samples_of(run)[-1].health.probe_failures
        assert (failure.count, failure.disabled) == (3, True)
        assert "failed on 1 of the ranks: OutOfMemoryError: on purpose" in failure.reason
    for run in (tripped, refused, narrow):
        assert not any(sample.HasField("gnb") for sample in samples_of(run))
        assert len([sample for sample in samples_of(run) if sample.HasField("tap")]) == STEPS


def out_of_step():
    """In the first probe rank 0 begins a collective that rank 1 does not come to, and both fail."""
    inner = LlamaMLP.forward

    def forward(module, hidden):
        if module.training:
            return inner(module, hidden)
        if dist.get_rank() == 0:
            dist.all_reduce(torch.zeros(()), async_op=True)
        raise RuntimeError("on purpose")

    def hurt():
        LlamaMLP.forward = forward

    with pytest.raises(DesyncError) as raised:
        train("fsdp", hurt=hurt, probe_every=1)
    if dist.get_rank() == 1:
        dist.all_reduce(torch.zeros(()))  # or this process could not end
    return str(raised.value)


def test_ranks_out_of_step_train_no_further(ranks):
    for error in ranks(out_of_step, 2):
        assert error.startswith("failed on 2 of the ranks: RuntimeError: on purpose")
        assert "gnb" in error
