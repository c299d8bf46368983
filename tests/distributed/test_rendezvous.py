"""All ranks meet at attach, and none waits where another can't be watched."""

from __future__ import annotations

import os
import pickle
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from stand_ins import Net

import sharpwatch
from sharpwatch.errors import AttachError
from sharpwatch.testing import InMemoryTransport
from sharpwatch.v1 import types_pb2


def attached(model=None, kind=torch.optim.SGD, transport=None, **options):
    """The watch, its model and optimizer; in place of a watch, what attach raised."""
    torch.manual_seed(1)
    model = model or Net()
    optimizer = kind(model.parameters(), lr=0.1)
    try:
        options = {"training_job": "rendezvous", "transport": transport or InMemoryTransport(), **options}
        return sharpwatch.attach(model, optimizer, **options), model, optimizer
    except AttachError as error:
        return str(error), model, optimizer


def go_on(optimizer):
    """What the loop does without its monitor: steps, and a group of its own that torch names by how many there were."""
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    total = torch.ones(1)
    dist.all_reduce(total, group=dist.new_group([0, 1], timeout=timedelta(seconds=20)))
    return total.item()


def disabled(who):
    if dist.get_rank() in who:
        os.environ["SHARPWATCH_DISABLED"] = "1"
    watch, _, optimizer = attached()
    return watch if isinstance(watch, str) else type(watch).__name__, go_on(optimizer)


def test_a_disabled_rank_holds_up_nobody_and_their_groups_stay_in_step(ranks):
    error = "rank 1: sharpwatch is disabled there, and must be on all ranks or none"
    assert ranks(disabled, 2, [1]) == [(error, 2.0), ("Watch", 2.0)]


def test_where_all_ranks_are_disabled_none_meets(ranks):
    assert ranks(disabled, 2, [0, 1]) == [("Watch", 2.0), ("Watch", 2.0)]


def missing():
    """Rank 1 never attaches; the loop's own collectives would wait for it three seconds."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=3))
    error = None if dist.get_rank() else attached()[0]
    dist.distributed_c10d._get_default_store().set(f"past {dist.get_rank()}", "")
    dist.distributed_c10d._get_default_store().wait(["past 0", "past 1"])
    return error, go_on(attached()[2])


def test_nobody_waits_for_a_missing_rank_longer_than_the_loop_would(ranks):
    error = "rank 0: not all 2 ranks called attach within 3 s (all must, not one)"
    assert ranks(missing, 2) == [(error, 2.0), (None, 2.0)]


def failing():
    """Rank 0 can't make its part, after all ranks have exchanged theirs."""

    class Broken(InMemoryTransport):
        def send_hello(self, _):
            raise AttachError("tls: the files are gone")

    error, model, optimizer = attached(transport=Broken())
    return error, len(model._forward_pre_hooks), go_on(optimizer)


def test_where_one_rank_fails_no_rank_is_watched(ranks):
    first, second = ranks(failing, 2)
    assert first == ("tls: the files are gone", 0, 2.0)
    assert second == ("rank 0: tls: the files are gone", 0, 2.0)


class Muon(torch.optim.SGD):
    """As users have it: its name says that ranks share its momentum out."""


def stages():
    """A pipeline: the optimizer of stage 1 can't be controlled."""
    transport = InMemoryTransport()
    whole, rank = Net(), dist.get_rank()
    stage = nn.ModuleDict({"wte": whole.wte} if rank == 0 else {"ln_f": whole.ln_f, "lm_head": whole.lm_head})
    watch, _, optimizer = attached(stage, torch.optim.SGD if rank == 0 else Muon, transport)
    rates = []
    optimizer.register_step_pre_hook(lambda it, *_: rates.append(len(it.param_groups)))
    for step in range(1, 11):
        for parameter in stage.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        dist.barrier()
        if transport.hello and step == 2:
            action = types_pb2.MultiplierSet(multipliers={"emb": 0.5, "head": 0.5}, revision=3)
            transport.command(id="cut", set_multipliers=action)
    revision = watch._watched.control.revision
    watch.close()
    return rates, revision, [result.outcome for result in transport.results]


def test_a_command_that_one_stage_cannot_take_is_taken_by_none(ranks):
    first, second = ranks(stages, 2)
    assert first[:2] == second[:2] == ([1] * 10, 0)
    assert first[2] == ["refused"]


def early():
    dist.barrier()  # a rank that leaves early breaks the connections that another is still making
    dist.destroy_process_group()
    with pytest.raises(AttachError, match="WORLD_SIZE=2, but there is no process group yet"):
        sharpwatch.attach(model := Net(), optimizer := torch.optim.SGD(model.parameters()), training_job="early")
    os.environ["SHARPWATCH_DISABLED"] = "1"
    sharpwatch.attach(model, optimizer, training_job="early").close()
    del os.environ["SHARPWATCH_DISABLED"]
    os.environ["WORLD_SIZE"] = "1"
    sharpwatch.attach(model, optimizer, training_job="alone", transport=InMemoryTransport()).close()
    store = dist.FileStore(f"{os.environ['RESULTS']}/second", 2)
    dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=2)
    dist.barrier()


def test_attach_waits_for_the_process_group_to_be_made(ranks):
    ranks(early, 2)


def resumed(how):
    """Both ranks go on with a state, rank 1 in another way: their run, step and multiplier in the end."""
    watch, _, optimizer = attached()
    state = watch.state_dict() | {"run": "before", "step": 100}
    state["control"]["start"] = state["control"]["target"] = {"emb": 0.25}
    state["sampler"]["credit"] = float(dist.get_rank())  # each rank's own
    if dist.get_rank() == 1:
        changed = {"unreadable": {"control": {}}, "newer": {"version": 99}}
        state = {} if how == "empty" else state | changed.get(how, {})
    if dist.get_rank() == 0 or how != "absent":
        watch.load_state_dict(state)
    go_on(optimizer)
    found = watch.run, watch.step, watch._watched.control.multipliers["emb"]
    watch.close()
    return found


def test_a_state_that_all_ranks_are_given_is_taken_up(ranks):
    assert ranks(resumed, 2, "alike") == [("before", 101, 0.25)] * 2


@pytest.mark.parametrize("how", ["absent", "empty", "unreadable", "newer"])
def test_a_state_that_one_rank_cannot_take_up_is_taken_up_by_none(ranks, how):
    first, second = ranks(resumed, 2, how)
    assert first == second
    assert first[0].startswith("rendezvous-")
    assert first[1:] == (1, 1.0)


def several(seeds, groups):
    """Each rank trains a model of its own: what attach says."""
    torch.manual_seed(seeds[dist.get_rank()])
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    if groups:
        groups = [dist.new_group([rank]) for rank in range(2)]
        model = nn.parallel.DistributedDataParallel(model, process_group=groups[dist.get_rank()])
    rules = Path(os.environ["RESULTS"], f"rules{dist.get_rank()}.yaml")
    rules.write_text('- {match: "*", block: ffn}')
    os.environ["SHARPWATCH_BLOCK_RULES"] = str(rules)
    attempt = attached(model)[0]
    return attempt if isinstance(attempt, str) else attempt.close()


@pytest.mark.parametrize(("seeds", "groups"), [((1, 2), False), ((1, 1), True)], ids=["values", "groups"])
def test_ranks_with_models_of_their_own_are_no_replicas(ranks, seeds, groups):
    for error in ranks(several, 2, seeds, groups):
        assert "0.weight: not the same on rank 1 as on rank 0" in error
        assert "process groups of their own" in error


def test_ranks_that_start_from_the_same_values_are_replicas_without_a_wrapper(ranks):
    assert ranks(several, 2, (1, 1), False) == [None, None]


def pipeline(extra):
    """One file of rules for both stages, and one more rule."""
    rules = Path(os.environ["RESULTS"], f"rules{dist.get_rank()}.yaml")
    rules.write_text("\n".join(f'- {{match: "{name}.*", block: ffn}}' for name in ("l0", "l1", *extra)))
    os.environ["SHARPWATCH_BLOCK_RULES"] = str(rules)
    attempt = attached(nn.ModuleDict({f"l{dist.get_rank()}": nn.Linear(8, 8)}))[0]
    return attempt if isinstance(attempt, str) else attempt.close()


def test_the_stages_of_a_pipeline_share_a_file_of_rules(ranks):
    assert ranks(pipeline, 2, []) == [None, None]
    expected = "$SHARPWATCH_BLOCK_RULES: rule 'l2.*' places nothing: no parameter matches"
    assert ranks(pipeline, 2, ["l2"]) == [expected, expected]


def gathered():
    """How many bytes a rank says of itself, of a model of 600 parameters."""
    sizes, gather = [], dist.all_gather_object

    def weighed(objects, own, **options):
        sizes.append(len(pickle.dumps(own)))
        gather(objects, own, **options)

    dist.all_gather_object = weighed
    model = Net()
    model.blocks = nn.ModuleList(nn.LayerNorm(4) for _ in range(300))
    attached(model)[0].close()
    return sum(sizes)


def test_ranks_that_are_alike_say_little(ranks):
    # A name, a shape and a part of a parameter take more than 40 bytes.
    assert max(ranks(gathered, 2)) < 600 * 40 / 10
