"""Whose learning rates can't be changed by block is watched all the same, and says so at attach."""

from __future__ import annotations

import logging
import os

import forked
import pytest
import torch
from small_llama import RATE, backward, imported, llama, order, same

import sharpwatch
from sharpwatch.agent.optimizers.support import lr_refusal, stepping_optimizer
from sharpwatch.v1 import types_pb2

STEPS = 5
REFUSED = "learning-rate multipliers of revision 3 ({} x 0.5) refused at step 2"


def relative_adafactor(parameters):
    return imported("transformers", "Adafactor")(parameters, relative_step=True)


def prodigy(parameters):
    return imported("prodigyopt", "Prodigy")(parameters)


def rprop(parameters):
    return torch.optim.Rprop(parameters, lr=1e-3)


def trained(model, optimizer):
    for number in range(1, STEPS + 1):
        backward(model, number)
        optimizer.step()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (relative_adafactor, "Adafactor: it computes its own learning rate"),
        (prodigy, "Prodigy: it estimates one learning rate for all groups, and raises if they differ"),
        (rprop, "Rprop: it uses the learning rate in its first step only"),
    ],
)
def test_it_is_tapped_and_refuses_rates_but_not_rollbacks(transports, caplog, make, reason):
    ours, theirs = llama(), llama()
    optimizer = make(ours.parameters())
    asked = []
    with caplog.at_level(logging.WARNING, "sharpwatch"):
        watch = sharpwatch.attach(
            ours, optimizer, training_job="own", transport=transports.new(), probes=(), on_rollback=asked.append
        )
    assert [record.message for record in caplog.records if record.name == "sharpwatch"] == [
        f"learning rates are watched, but can't be changed: {reason}"
    ]
    order(transports[0], {"ffn": 0.5}, at=2)
    place = types_pb2.Checkpoint(step=1, uri="file:///1")
    transports[0].command(id="back", apply_at_step=STEPS, rollback=types_pb2.Rollback(checkpoint=place))
    trained(ours, optimizer)
    watch.close()
    trained(theirs, make(theirs.parameters()))
    assert same(ours, theirs) == []
    rates, back = transports[0].results
    assert (rates.outcome, rates.detail) == (
        "refused",
        f"learning rates can't be changed: {reason}",
    )
    assert back.outcome == "applied"
    assert [request.step for request in asked] == [1]
    assert len([sample for sample in transports[0].samples if sample.HasField("tap")]) == STEPS
    assert transports[0].samples[-1].health.swallowed_errors == 0


def test_a_run_taken_up_with_another_optimizer_leaves_its_multipliers_behind(transports):
    model = llama()
    adamw = torch.optim.AdamW(model.parameters(), lr=RATE)
    with sharpwatch.attach(model, adamw, training_job="own", transport=transports.new(), probes=()) as watch:
        order(transports[0], {"ffn": 0.5}, at=2)
        trained(model, adamw)
        state = watch.state_dict()
    ours, theirs = llama(), llama()
    optimizer = prodigy(ours.parameters())
    with sharpwatch.attach(ours, optimizer, training_job="own", transport=transports.new(), probes=()) as watch:
        watch.load_state_dict(state)
        trained(ours, optimizer)
    trained(theirs, prodigy(theirs.parameters()))
    assert same(ours, theirs) == []


def test_prodigy_would_have_raised():
    """The reason is the optimizer's own: two groups with two rates end the run."""
    model = llama()
    head = {"params": [model.lm_head.weight], "lr": 0.5}
    optimizer = prodigy([{"params": list(model.model.parameters())}, head])
    backward(model, 1)
    with pytest.raises(RuntimeError, match="different lr"):
        optimizer.step()


def test_muon_that_shares_a_group_out_over_ranks_is_left_alone():
    kind = type("MuonWithAuxAdam", (torch.optim.SGD,), {"__module__": "muon"})
    model = llama()
    assert lr_refusal([kind(model.parameters())], ranks=1) == ""
    assert "every n-th parameter" in lr_refusal([kind(model.parameters())], ranks=2)
    assert lr_refusal([torch.optim.AdamW(model.parameters())], ranks=2) == ""


def test_rates_kept_by_a_groups_position_are_left_alone():
    optimizer = torch.optim.Adam(llama().parameters())
    optimizer.base_lrs = [group["lr"] for group in optimizer.param_groups]  # as AdaBound does
    assert lr_refusal([optimizer]) == "Adam: it keeps learning rates by the position of the group"


def test_one_that_cannot_be_controlled_speaks_for_all():
    model = llama()
    head = rprop([model.lm_head.weight])
    assert lr_refusal([torch.optim.AdamW(model.model.parameters()), head]).startswith("Rprop: ")


@pytest.fixture
def overrides():
    """bitsandbytes' one manager of overrides, as it was before afterwards."""
    manager = imported("bitsandbytes.optim", "GlobalOptimManager").get_instance()
    yield manager
    manager.initialize()


def test_overrides_of_bitsandbytes_go_by_position(overrides):
    kind = imported("bitsandbytes.optim", "AdamW8bit")
    model = llama()
    overrides.register_parameters(model.parameters())
    assert lr_refusal([kind(model.parameters())]) == ""
    overrides.register_module_override(model.lm_head, "weight", {"optim_bits": 32})
    assert "position" in lr_refusal([kind(model.parameters())])


class Sam(torch.optim.Optimizer):
    """Wraps an optimizer and shows its groups, as SAM and Lookahead do."""

    def __init__(self, base):
        self.base_optimizer = base
        super().__init__(base.param_groups, base.defaults)
        self.param_groups = base.param_groups

    def step(self, closure=None):
        return self.base_optimizer.step(closure)


def accelerated(base):
    accelerator = imported("accelerate", "Accelerator")(cpu=True)
    return accelerator.prepare_optimizer(base)


@pytest.mark.parametrize("wrap", [Sam, accelerated])
def test_inside_a_wrapper_is_the_optimizer_that_steps(transports, wrap):
    ours, theirs = llama(), llama()
    base, plain = torch.optim.SGD(ours.parameters(), lr=RATE), torch.optim.SGD(theirs.parameters(), lr=RATE)
    wrapped = wrap(base)
    assert stepping_optimizer(wrapped, ours) is base
    assert stepping_optimizer(plain, theirs) is plain
    with sharpwatch.attach(ours, wrapped, training_job="wrapped", transport=transports.new(), probes=()) as watch:
        order(transports[0], dict.fromkeys(("emb", "qk", "vo", "ffn", "norm", "head"), 0.5), at=2)
        trained(ours, wrapped)
        assert watch.step == STEPS
    for number in range(1, STEPS + 1):
        plain.param_groups[0]["lr"] = RATE * (0.5 if number > 1 else 1.0)
        backward(theirs, number)
        plain.step()
    assert same(ours, theirs) == []


ONE_RANK = """
import logging, sys, torch, sharpwatch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
sys.path[:0] = sys.argv[1:]
from small_llama import backward, llama, order, same
from stand_ins import Transports
logging.basicConfig(format="%(message)s", stream=sys.stdout)
transports = Transports()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
def made(kind):
    if kind == "zero":
        model = llama()
        return model, ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
    model = FullyShardedDataParallel(
        llama(), device_id=torch.device("cpu"), use_orig_params=kind == "original",
        auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)
for kind in ("flat", "original", "zero"):
    print("#", kind)
    (ours, optimizer), (theirs, plain) = made(kind), made(kind)
    watch = sharpwatch.attach(ours, optimizer, training_job="one", transport=transports.new(), probe_every=2)
    order(transports[-1], {transports[-1].hello.blocks[-1]: 0.5}, at=3)
    for number in range(1, 6):
        for model, each in ((ours, optimizer), (theirs, plain)):
            backward(model, number)
            each.step()
    watch.close()
    hello, samples = transports[-1].hello, transports[-1].samples
    print("blocks", *hello.blocks, "probes", *hello.probes)
    print("taps", sum(sample.HasField("tap") for sample in samples), "swallowed", samples[-1].health.swallowed_errors)
    print("results", *(result.detail for result in transports[-1].results))
    print("same" if same(ours, theirs) == [] else "differ")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, request):
    """What runs in a process group of their own printed, by kind."""
    path = tmp_path_factory.mktemp("one_rank") / "one_rank.py"
    path.write_text(ONE_RANK)
    here = request.path.parent
    folders = (str(here), str(here.parents[1]))
    status, output, errors = forked.run(path=path, env=os.environ, arguments=folders, timeout=240)
    assert status == 0, errors
    return {kind: lines for kind, *lines in (part.splitlines() for part in output.split("# ")[1:])}


def test_flat_parameters_are_tapped_as_other_without_probes(one_rank):
    flat = "AdamW: its parameters are flat parameters of FSDP1, each of several blocks"
    assert one_rank["flat"] == [
        "FSDP1's flat parameters are watched as block 'other', without probes; FSDP2 (fully_shard) shows the blocks",
        f"learning rates are watched, but can't be changed: {flat}",
        f"{REFUSED.format('other')}: learning rates can't be changed: {flat}",
        "blocks other probes",
        "taps 5 swallowed 0",
        f"results learning rates can't be changed: {flat}",
        "same",
    ]


def test_fsdp_with_original_parameters_is_controlled(one_rank):
    rates = "emb 0.01, qk 0.01, vo 0.01, ffn 0.01, norm 0.01, head 0.005"
    assert one_rank["original"] == [
        f"learning-rate multipliers of revision 3 (head x 0.5) applied at step 3, learning rates {rates}",
        "blocks emb qk vo ffn norm head probes gnb direction",
        "taps 5 swallowed 0",
        "results ",
        "differ",
    ]


def test_an_optimizer_that_hands_its_groups_on_is_left_alone(one_rank):
    reason = "ZeroRedundancyOptimizer: it passes its groups to another optimizer by their position"
    assert one_rank["zero"] == [
        f"learning rates are watched, but can't be changed: {reason}",
        f"{REFUSED.format('head')}: learning rates can't be changed: {reason}",
        "blocks emb qk vo ffn norm head probes gnb direction",
        "taps 5 swallowed 0",
        f"results learning rates can't be changed: {reason}",
        "same",
    ]
