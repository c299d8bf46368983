"""Several ranks are one run: what is agreed is agreed by all at one step, and nobody waits for a rank that is gone."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from stand_ins import Net, in_each_step

import sharpwatch
from sharpwatch.agent import options as attach_options
from sharpwatch.agent.distributed.channel import RankGroup, RankProgress, StepMessage
from sharpwatch.agent.distributed.commit import COMMIT_DELAY_STEPS
from sharpwatch.agent.distributed.rendezvous import AttachMessage, join
from sharpwatch.errors import AttachError
from sharpwatch.testing import InMemoryTransport
from sharpwatch.v1 import types_pb2

STEPS = 14


class Dropping(Net):
    """Of a plain loop: logits and loss, with dropout."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.2)

    def forward(self, idx, targets=None):
        logits = self.lm_head(self.drop(self.ln_f(self.wte(idx))))
        loss = None if targets is None else nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


class Training:
    """A loop under DDP, each rank on rows of its own; `after(step)` runs at the end of each step."""

    def __init__(self, *, watched=True, **options):
        torch.manual_seed(3)
        self.transport = InMemoryTransport()
        self.plain = Dropping().train()
        self.model = nn.parallel.DistributedDataParallel(self.plain)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        options = {"training_job": "ranks", "transport": self.transport, "probe_every": 2, **options}
        self.watch = sharpwatch.attach(self.model, self.optimizer, **options) if watched else None
        self.losses, self.groups = [], []
        in_each_step(self.optimizer, lambda optimizer: self.groups.append(len(optimizer.param_groups)))
        torch.manual_seed(100 + dist.get_rank())

    def run(self, after=lambda _: None):
        for step in range(1, STEPS + 1):
            tokens = torch.randint(11, (8, 5))
            _, loss = self.model(tokens, tokens.roll(1))
            loss.backward()
            self.losses.append(float(loss.detach()))
            if self.watch:
                self.watch.observe(loss=loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            after(step)
        if self.watch:
            self.watch.close()
        return self

    @property
    def weights(self):
        return {name: value.clone() for name, value in self.plain.state_dict().items()}


def trained(watched):
    training = Training(watched=watched).run()
    return training.weights, torch.get_rng_state()


def test_under_ddp_a_watched_run_is_bit_identical_to_a_plain_one(ranks):
    plain, watched = ranks(trained, 2, False), ranks(trained, 2, True)
    for (weights, random), (own_weights, own_random) in zip(plain, watched, strict=True):
        torch.testing.assert_close(own_weights, weights, rtol=0, atol=0)
        assert torch.equal(own_random, random)


def cut():
    """Rank 0 receives a cut after its third step; rank 1 is a whole step behind in the steps after."""
    training, store = Training(), dist.distributed_c10d._get_default_store()

    def after(step):
        if dist.get_rank() == 0:
            if step == 3:
                action = types_pb2.MultiplierSet(multipliers={"emb": 0.5}, revision=7)
                training.transport.command(id="cut", set_multipliers=action)
            store.set(f"past {step}", "")
        else:
            store.wait([f"past {step}"])

    training.run(after=after)
    samples = training.transport.samples
    return {
        "groups": training.groups,
        "losses": training.losses,
        "weights": training.weights,
        "results": [(result.command_id, result.outcome, result.step) for s in samples for result in s.results],
        "reported": [(sample.step, sample.loss) for sample in samples if not sample.closing],
        "probed": [sample.step for sample in samples if sample.HasField("gnb")],
        "taps": sum(sample.HasField("tap") for sample in samples),
        "run": training.watch.run,
    }


@pytest.fixture(scope="module")
def both(ranks):
    return ranks(cut, 2)


def test_a_command_is_applied_at_the_same_step_on_all_also_where_one_lags(both):
    first, second = both
    assert first["groups"] == second["groups"]
    # Received after step 4, all acknowledge it in the message of step 5 at the earliest.
    changed = first["groups"].index(2) + 1
    assert changed >= 5 + COMMIT_DELAY_STEPS
    assert first["groups"] == [1] * (changed - 1) + [2] * (STEPS - changed + 1)
    assert first["results"] == [("cut", types_pb2.COMMAND_OUTCOME_APPLIED, changed)]
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)


def test_one_rank_speaks_for_all(both):
    first, second = both
    assert first["run"] == second["run"]
    assert second["reported"] == []
    means = [(step + 1, sum(pair) / 2) for step, pair in enumerate(zip(first["losses"], second["losses"], strict=True))]
    assert [step for step, _ in first["reported"]] == [step for step, _ in means]
    assert [loss for _, loss in first["reported"]] == pytest.approx([loss for _, loss in means])
    assert first["probed"] == list(range(2, STEPS + 1, 2))
    assert first["taps"] == STEPS


def cancelled():
    """Rank 0 receives a cut that is planned for the last step, and then that it is cancelled; rank 1 lags."""
    training, store = Training(), dist.distributed_c10d._get_default_store()

    def after(step):
        if dist.get_rank() == 0:
            if step == 3:
                action = types_pb2.MultiplierSet(multipliers={"emb": 0.5}, revision=7)
                training.transport.command(id="cut", apply_at_step=STEPS, set_multipliers=action)
            if step == 4:
                training.transport.command(id="cancel-cut", cancel="cut")
            store.set(f"past {step}", "")
        else:
            store.wait([f"past {step}"])

    training.run(after=after)
    results = [result for sample in training.transport.samples for result in sample.results]
    return training.groups, [(result.command_id, result.outcome) for result in results]


def test_a_command_that_is_cancelled_before_its_step_is_applied_by_no_rank(ranks):
    (first, results), (second, _) = ranks(cancelled, 2)
    assert first == second == [1] * STEPS
    assert results == [("cut", types_pb2.COMMAND_OUTCOME_CANCELLED)]


def left(watched):
    """Rank 1 is gone after its sixth step: what becomes of rank 0 is torch's to say."""
    training = Training(watched=watched)

    def after(step):
        if dist.get_rank() == 1 and step == 6:
            torch.save(None, f"{os.environ['RESULTS']}/result1")
            os._exit(0)

    try:
        training.run(after=after)
    except RuntimeError as error:
        if training.watch:
            training.watch.close()
        return len(training.losses), "gloo" in str(error).lower() or "peer" in str(error).lower(), training.weights
    return None


def test_where_a_rank_dies_the_run_ends_as_it_would_have(ranks):
    plain, watched = ranks(left, 2, False)[0], ranks(left, 2, True)[0]
    assert plain[:2] == watched[:2] == (6, True)  # the seventh backward fails
    torch.testing.assert_close(watched[2], plain[2], rtol=0, atol=0)


WRONG = {
    "control must be one of 'none', 'lr', 'rollback', got 'nothing'": [{}, {"control": "nothing"}],
    "seed: rank 0 has 1, rank 1 2": [{"seed": 1}, {"seed": 2}],
    "run: rank 0 has 'a', rank 1 'b'": [{"run": "a"}, {"run": "b"}],
}


def refused():
    reported = []
    for options in WRONG.values():
        with pytest.raises(AttachError) as error:
            Training(**options[dist.get_rank()])
        reported.append(str(error.value))
    return reported


def test_all_ranks_get_the_error_of_one(ranks):
    for reported in ranks(refused, 2):
        assert all(expected in message for expected, message in zip(WRONG, reported, strict=True))


def upgraded():
    """Rank 1 is on a host with another version of sharpwatch, whose messages may have another size."""
    attach_options.__version__ = f"0.{dist.get_rank() + 1}.0"
    with pytest.raises(AttachError) as error:
        Training()
    return str(error.value)


def test_ranks_of_several_versions_are_refused(ranks):
    assert all("sharpwatch: rank 0 has '0.1.0', rank 1 '0.2.0'" in reported for reported in ranks(upgraded, 2))


def apart():
    """Rank 1 takes one step fewer."""
    channel, _ = join(AttachMessage())
    group, read = RankGroup(channel, 0), []
    for step in range(1, 9):
        read += group.exchange(StepMessage(RankProgress(step + (dist.get_rank() == 1 and step > 3))))
        dist.barrier()
    read += group.drain(30)
    return group.rank, group.lost, [message.progress.step for message in read]


def test_ranks_that_take_different_steps_agree_to_nothing(ranks):
    # Messages 1 to 3 agree; message 4 shows the difference, on all ranks after the same step.
    assert ranks(apart, 3) == [(rank, True, [1, 2, 3]) for rank in range(3)]


def staged():
    """Two stages of a pipeline, each with its own part of one model; no collective ties their steps but the store."""
    torch.manual_seed(3)
    transport = InMemoryTransport()
    whole = Net()
    stage = nn.ModuleDict(
        {"wte": whole.wte} if dist.get_rank() == 0 else {"ln_f": whole.ln_f, "lm_head": whole.lm_head}
    )
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.01 * (1 + dist.get_rank()))
    watch = sharpwatch.attach(stage, optimizer, training_job="pipeline", transport=transport)
    norms = []
    for step in range(1, 9):
        for parameter in stage.parameters():
            parameter.grad = torch.full_like(parameter, step * (1.0 + dist.get_rank()))
        norms.append({name: float(parameter.grad.norm()) for name, parameter in stage.named_parameters()})
        optimizer.step()
        dist.barrier()
    watch.close()
    if not transport.hello:
        return norms, None
    rows = [(block.layer, block.block) for block in transport.hello.layer_blocks]
    taps = [(sample.step, sample.tap) for sample in transport.samples if sample.HasField("tap")]
    read = {
        step: {
            name: dict(zip(rows, torch.frombuffer(bytearray(array.data), dtype=torch.float32).tolist(), strict=True))
            for name, array in (("norm", tap.gradient_norm), ("rate", tap.learning_rate))
        }
        for step, tap in taps
    }
    return norms, (list(transport.hello.probes), read)


def test_stages_of_a_pipeline_are_tapped_as_one_model(ranks):
    (first, reported), (second, nothing) = ranks(staged, 2)
    assert nothing is None
    probes, read = reported
    assert probes == []
    assert list(read) == list(range(1, 9))
    for step, reading in read.items():
        expected = first[step - 1] | second[step - 1]
        norms = {block: value for (_, block), value in reading["norm"].items()}
        assert norms["emb"] == pytest.approx(expected["wte.weight"])
        assert norms["head"] == pytest.approx(expected["lm_head.weight"])
        rates = {block: value for (_, block), value in reading["rate"].items()}
        assert (rates["emb"], rates["head"]) == (pytest.approx(0.01), pytest.approx(0.02))
