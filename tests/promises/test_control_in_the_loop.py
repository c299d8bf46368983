"""Promise 7: commands change the rates the optimizer really uses, at a named step, and nothing else sees it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import sharpwatch
from sharpwatch.v1 import types_pb2

APPLIED, REFUSED, FAILED = (
    "applied",
    "refused",
    "failed",
)


class Loop:
    """A training loop of a small GPT-2 under a schedule."""

    def __init__(self, transports, **options):
        torch.manual_seed(7)
        config = GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        self.model = GPT2LMHeadModel(config).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 0.9**step)
        options = {"training_job": "promise", "probes": (), "transport": transports.new()} | options
        self.watch = sharpwatch.attach(self.model, self.optimizer, **options)
        self.transport = transports[-1]
        self.seen = []  # what every user of the optimizer sees, after each step

    def steps(self, count):
        for _ in range(count):
            tokens = torch.randint(64, (4, 16))
            self.model(input_ids=tokens, labels=tokens).loss.backward()
            self.optimizer.step()
            groups = self.optimizer.state_dict()["param_groups"]
            self.seen.append(([copy.deepcopy(group) for group in groups], self.schedule.get_last_lr()))
            self.schedule.step()
            self.optimizer.zero_grad()

    def tap(self, name):
        """{(layer, block): value} of each sample."""
        keys = [(block.layer, block.block) for block in self.transport.hello.layer_blocks]
        taps = [
            np.frombuffer(getattr(sample.tap, name).data, "<f4")
            for sample in self.transport.samples
            if sample.HasField("tap")
        ]
        return [dict(zip(keys, values.tolist(), strict=True)) for values in taps]


def test_the_rate_changes_at_the_named_step_and_schedule_and_checkpoint_see_nothing(transports):
    loop, plain = Loop(transports), Loop(transports, control="none")
    loop.transport.command(
        id="cut", apply_at_step=4, set_multipliers=types_pb2.MultiplierSet(multipliers={"ffn": 0.5}, revision=7)
    )
    loop.steps(3)
    before = {name: p.detach().clone() for name, p in loop.model.named_parameters()}
    gradients = {}
    loop.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({name: p.grad.clone() for name, p in loop.model.named_parameters()})
    )
    torch.manual_seed(11)
    loop.steps(1)
    (result,) = loop.transport.results
    assert (result.command_id, result.outcome, result.step) == ("cut", APPLIED, 4)
    assert loop.transport.samples[-1].health.lr_revision == 7
    for number, (rates, multipliers) in enumerate(
        zip(loop.tap("learning_rate"), loop.tap("lr_multiplier"), strict=True)
    ):
        for (layer, block), rate in rates.items():
            multiplier = 0.5 if block == "ffn" and number == 3 else 1.0
            assert multipliers[layer, block] == multiplier
            assert rate == pytest.approx(1e-2 * 0.9**number * multiplier)
    # The step really taken: AdamW by hand at the rate that was reported.
    state = loop.optimizer.state
    for name, p in loop.model.named_parameters():
        rate = 1e-2 * 0.9**3 * (0.5 if ".mlp." in name else 1.0)
        s = state[p]
        denominator = (s["exp_avg_sq"] / (1 - 0.999**4)).sqrt() + 1e-8
        expected = before[name] * (1 - rate * 0.1) - rate * (s["exp_avg"] / (1 - 0.9**4)) / denominator
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-7)
    loop.steps(2)
    plain.steps(6)
    assert loop.seen == plain.seen
    assert plain.watch.step == loop.watch.step == 6


def test_step_hooks_of_the_program_s_own_never_see_split_groups(transports):
    """A schedule, a new group, a rate and a checkpoint, all from hooks that came after ours."""
    loop = Loop(transports)
    loop.transport.command(id="cut", set_multipliers=types_pb2.MultiplierSet(multipliers={"ffn": 0.5, "emb": 0.25}))
    loop.steps(2)
    late, checkpoints = torch.nn.Parameter(torch.ones(3)), []
    second = torch.optim.lr_scheduler.LambdaLR(loop.optimizer, lambda _: 1.0)

    def before(optimizer, *_):
        if len(checkpoints) < 2:
            second.step()
        elif len(checkpoints) == 2:
            optimizer.add_param_group({"params": [late], "lr": 0.5})
            late.grad = torch.ones(3)
        optimizer.param_groups[0]["lr"] = 0.003
        checkpoints.append(optimizer.state_dict())

    seen = []
    loop.optimizer.register_step_pre_hook(before)
    loop.optimizer.register_step_post_hook(lambda optimizer, *_: seen.append(len(optimizer.param_groups)))
    for _ in range(2):
        loop.steps(1)
        loop.schedule.base_lrs = [0.003]
    groups = loop.optimizer.param_groups
    loop.schedule.step = lambda: None  # it knows one group
    loop.steps(2)
    assert loop.optimizer.param_groups is groups
    assert seen == [1, 1, 2, 2]
    assert (late < 1).all()  # it was stepped
    assert groups[0]["lr"] == 0.003
    loop.optimizer.load_state_dict(checkpoints[-1])
    assert loop.watch._watched.barrier.swallowed == 0
    assert loop.watch._watched.control.multipliers["ffn"] == 0.5


def test_a_set_with_all_multipliers_at_one_takes_everything_away(transports):
    loop = Loop(transports)
    loop.transport.command(id="a", set_multipliers=types_pb2.MultiplierSet(multipliers={"norm": 0.5}))
    loop.steps(2)
    assert "step" in vars(loop.optimizer)
    theirs = vars(loop.optimizer)["step"]
    loop.transport.command(id="b", set_multipliers=types_pb2.MultiplierSet())
    loop.steps(2)
    assert vars(loop.optimizer)["step"] is not theirs  # the scheduler's own wrapper again
    loop.watch.close()
    assert not hasattr(vars(loop.optimizer)["step"], "__self__")
    assert [result.outcome for result in loop.transport.results] == [APPLIED, APPLIED]


def test_a_fused_parameter_takes_the_smaller_and_the_result_says_so(transports):
    loop = Loop(transports)
    loop.transport.command(id="a", set_multipliers=types_pb2.MultiplierSet(multipliers={"qk": 4.0}))
    loop.steps(2)
    assert loop.transport.results[0].unchanged_blocks == ("qk",)
    assert set(loop.tap("lr_multiplier")[-1].values()) == {1.0}


def test_beyond_the_trainers_own_bounds_nothing_is_applied(transports):
    loop = Loop(transports, lr_bounds=(0.5, 2.0))
    loop.transport.command(id="a", set_multipliers=types_pb2.MultiplierSet(multipliers={"ffn": 0.4}))
    loop.steps(2)
    assert [result.outcome for result in loop.transport.results] == [REFUSED]
    assert set(loop.tap("lr_multiplier")[-1].values()) == {1.0}


def rollback(step=2):
    return types_pb2.Rollback(
        checkpoint=types_pb2.Checkpoint(step=step, uri="file:///c"), skip_from_step=3, skip_to_step=9
    )


def test_a_rollback_runs_after_a_step_and_the_count_goes_back(transports):
    asked = []
    loop = Loop(transports, on_rollback=asked.append)
    loop.watch.saved_checkpoint(2, "file:///c")
    loop.steps(3)
    assert [(c.step, c.uri) for c in loop.transport.samples[0].checkpoints] == [(2, "file:///c")]
    loop.transport.command(id="back", reason="spike", rollback=rollback())
    loop.steps(1)
    assert asked == [sharpwatch.RollbackRequest(step=2, uri="file:///c", skip=(3, 9), reason="spike")]
    assert loop.watch.step == 2
    loop.steps(1)
    (result,) = loop.transport.results
    assert (result.outcome, result.step) == (APPLIED, 3)
    assert [sample.step for sample in loop.transport.samples] == [1, 2, 3, 4, 3]
    assert [sample.sequence for sample in loop.transport.samples] == [1, 2, 3, 4, 5]


def test_what_on_rollback_raises_reaches_the_loop_and_the_daemon(transports):
    def restore(_):
        raise OSError("gone")

    loop = Loop(transports, on_rollback=restore)
    loop.steps(2)
    loop.transport.command(id="back", rollback=rollback())
    with pytest.raises(OSError, match="gone"):
        loop.steps(1)
    assert [(r.outcome, r.detail) for r in loop.transport.results] == [(FAILED, "OSError: gone")]
    assert loop.watch.step == 3
    assert loop.watch.pending_rollback is None
    loop.optimizer.zero_grad()
    loop.steps(1)  # the loop may go on


def test_a_loop_that_leaves_its_for_reads_the_pending_rollback(transports):
    loop = Loop(transports, control="rollback")
    loop.steps(2)
    loop.transport.command(id="back", rollback=rollback())
    loop.steps(2)  # it need not look at once
    assert loop.watch.pending_rollback.step == 2
    loop.watch.restored(2)
    assert loop.watch.pending_rollback is None
    assert loop.watch.step == 2
    loop.steps(1)
    assert [(r.outcome, r.step) for r in loop.transport.results] == [(APPLIED, 3)]


def test_without_a_callback_lr_control_refuses_a_rollback(transports):
    loop = Loop(transports)
    loop.steps(2)
    loop.transport.command(id="back", rollback=rollback())
    loop.steps(2)
    assert [r.outcome for r in loop.transport.results] == [REFUSED]
    assert loop.watch.step == 4
