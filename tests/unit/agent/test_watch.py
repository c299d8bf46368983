from __future__ import annotations

import gc
import itertools
import signal
import weakref

import pytest
import stand_ins
import torch
from interrupts import interrupted_at
from torch import nn

import sharpwatch
from sharpwatch.agent import watched_run
from sharpwatch.agent.losses import MAX_FORWARDS
from sharpwatch.v1 import types_pb2


class Net(stand_ins.Net):
    """The same in Hugging Face's manner: its output is named, and the tokens are their own labels."""

    def forward(self, idx, targets=None):
        logits, loss = super().forward(idx, idx if targets is None else targets)
        return {"logits": logits, "loss": loss}


TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def made(transports, make=torch.optim.AdamW, **options):
    torch.manual_seed(3)
    model = Net().train()
    optimizer = make(model.parameters(), lr=0.01)
    watch = sharpwatch.attach(
        model, optimizer, training_job="job", transport=transports.new(), **({"probes": ()} | options)
    )
    return model, optimizer, watch, transports[-1]


def losses(transport):
    return [
        round(sample.loss, 3) if sample.HasField("loss") else None for sample in transport.samples if not sample.closing
    ]


def test_the_models_own_loss_is_the_mean_over_micro_batches(transports):
    model, optimizer, watch, transport = made(transports)
    expected = []
    for tokens in (TOKENS, TOKENS.flip(0) + 1):
        loss = model(tokens)["loss"]
        loss.backward()
        expected.append(loss.item())
    optimizer.step()
    assert losses(transport) == [pytest.approx(sum(expected) / 2, abs=1e-3)]
    watch.close()


def test_an_evaluation_between_steps_is_not_the_runs_loss(transports):
    model, optimizer, watch, transport = made(transports)
    loss = model(TOKENS)["loss"]
    loss.backward()
    with torch.no_grad():
        model(TOKENS * 0)
    model.eval()
    model(TOKENS * 0)
    model.train()
    optimizer.step()
    assert losses(transport) == [round(loss.item(), 3)]
    watch.close()


@pytest.mark.parametrize("after", [False, True])
def test_an_observed_loss_wins_and_belongs_to_its_step_before_or_after_it(transports, after):
    model, optimizer, watch, transport = made(transports)
    for number in range(1, 5):
        model(TOKENS)["loss"].backward()
        if not after:
            watch.observe(loss=float(number))
        optimizer.step()
        if after:
            watch.observe(loss=torch.tensor(float(number)))
    watch.close()
    got = losses(transport)
    # Of the first step the watch can't know that more comes, so its own loss has left already.
    assert got[1:] == [2.0, 3.0, 4.0]
    assert after or got[0] == 1.0


def test_a_step_waits_for_its_late_loss_no_longer_than_until_the_next_begins(transports):
    model, optimizer, watch, transport = made(transports)
    model(TOKENS)["loss"].backward()
    optimizer.step()
    watch.observe(loss=1.0)
    model(TOKENS)["loss"].backward()
    optimizer.step()
    assert len(transport.samples) == 1
    model(TOKENS)  # and no loss was observed
    assert len(transport.samples) == 2
    watch.close()
    assert transport.closed


def test_steps_that_a_grad_scaler_skips_do_not_count(transports):
    model, optimizer, watch, transport = made(transports)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for poisoned in (False, True, False):
        scaler.scale(model(TOKENS)["loss"]).backward()
        if poisoned:
            model.lm_head.weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert watch.step == 2
    assert [sample.step for sample in transport.samples] == [1, 2]
    watch.close()


def test_a_fused_step_under_a_grad_scaler_is_unscaled_and_a_void_one_does_not_count(transports):
    def fused(parameters, lr):
        return torch.optim.AdamW(parameters, lr=lr, fused=True)

    norms = []
    for scaled in (False, True):
        model, optimizer, watch, transport = made(transports, fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for poisoned in (False, True):
            scaler.scale(model(TOKENS)["loss"]).backward()
            if poisoned and scaled:
                model.lm_head.weight.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert watch.step == (1 if scaled else 2)
        norms.append(torch.frombuffer(bytearray(transport.samples[0].tap.gradient_norm.data), dtype=torch.float32))
        watch.close()
    torch.testing.assert_close(*norms)


def test_several_optimizers_make_one_step(transports):
    torch.manual_seed(3)
    model = Net().train()
    optimizers = [
        torch.optim.SGD(model.wte.parameters(), lr=0.1),
        torch.optim.AdamW([*model.ln_f.parameters(), *model.lm_head.parameters()], lr=0.01),
    ]
    watch = sharpwatch.attach(model, optimizers, training_job="job", transport=transports.new(), probes=())
    transport = transports[-1]
    for _ in range(3):
        model(TOKENS)["loss"].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()  # what one has stepped on may be gone before the other steps
    assert watch.step == 3
    assert transport.hello.optimizer == "SGD+AdamW"
    norms = torch.frombuffer(bytearray(transport.samples[-1].tap.gradient_norm.data), dtype=torch.float32)
    rates = torch.frombuffer(bytearray(transport.samples[-1].tap.learning_rate.data), dtype=torch.float32)
    assert (norms > 0).all()
    torch.testing.assert_close(rates, torch.tensor([0.1, 0.01, 0.01]))
    for _ in range(2):  # only one of them steps: each time it steps again, a step is over
        model(TOKENS)["loss"].backward()
        optimizers[0].step()
    assert watch.step == 4
    watch.close()


def test_a_step_that_raises_is_not_counted_and_leaves_no_override(transports):
    model, optimizer, watch, transport = made(transports)
    cut = types_pb2.MultiplierSet(multipliers={"emb": 0.5})
    transport.command(id="a", set_multipliers=cut)
    model(TOKENS)["loss"].backward()
    optimizer.step()
    model.ln_f.weight.grad = model.ln_f.weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert len(optimizer.param_groups) == 1
    assert watch.step == 1
    optimizer.zero_grad()
    model(TOKENS)["loss"].backward()
    optimizer.step()
    assert watch.step == 2
    watch.close()


def test_an_optimizer_whose_step_calls_another_hooked_step_counts_once(transports):
    class Wrapping(torch.optim.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # torch hooks the class's step when the first one is made
    model, optimizer, watch, transport = made(transports, Wrapping)
    for _ in range(2):
        model(TOKENS)["loss"].backward()
        optimizer.step()
    assert watch.step == 2
    assert [sample.step for sample in transport.samples] == [1, 2]
    watch.close()


def test_first_probes_run_twice_at_once(transports):
    model, optimizer, watch, transport = made(transports, probes=("gnb", "direction"))
    for _ in range(5):
        model(TOKENS)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [(s.HasField("gnb"), s.HasField("direction")) for s in transport.samples] == [
        (True, False),
        (False, True),
        (True, False),
        (False, True),
        (False, False),
    ]
    assert transport.samples[0].gnb.rows == 1
    assert transport.samples[-1].health.overhead_ratio > 0
    watch.close()


def test_closing_takes_every_hook_away_says_goodbye_once_and_is_idempotent(transports):
    model, optimizer, watch, transport = made(transports)
    model(TOKENS)["loss"].backward()
    optimizer.step()
    watch.saved_checkpoint(1, "file:///c")
    watch.close()
    watch.close()
    optimizer.step()
    assert [sample.closing for sample in transport.samples] == [False, True]
    assert [(c.step, c.uri) for c in transport.samples[-1].checkpoints] == [(1, "file:///c")]
    assert not model._forward_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert watch.step == 1


def test_a_close_that_is_interrupted_anywhere_has_not_begun_or_leaves_nothing_behind(transports):
    outcomes = set()
    for number in itertools.count():
        model, optimizer, watch, transport = made(transports, probes=("gnb",))
        transport.command(id="cut", set_multipliers=types_pb2.MultiplierSet(multipliers={"emb": 0.5}))
        stepped(model, optimizer, 1)
        assert "step" in vars(optimizer)  # wrapped
        interrupted = interrupted_at(watched_run, number, watch.close)
        hooks = [*model._forward_hooks, *model._forward_pre_hooks]
        hooks += [*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks]
        outcomes.add((bool(hooks), "step" in vars(optimizer), transport.samples[-1].closing, transport.closed))
        watch.close()  # of one that has not begun
        assert transport.closed
        if not interrupted:
            break
    assert outcomes == {(True, True, False, False), (False, False, True, True)}


def test_a_step_that_is_interrupted_anywhere_costs_its_own_sample_at_most(transports):
    kept = []  # or one would be collected, and so run, while the next is interrupted
    for number in itertools.count():
        model, optimizer, watch, transport = made(transports)
        kept.append(watch._watched)
        transport.command(id="cut", set_multipliers=types_pb2.MultiplierSet(multipliers={"emb": 0.5}))
        stepped(model, optimizer, 2)
        model(TOKENS)["loss"].backward()
        interrupted = interrupted_at(watched_run, number, optimizer.step)
        assert [group["lr"] for group in optimizer.param_groups] == [0.01]
        stepped(model, optimizer, 2)
        watch.close()
        *samples, goodbye = transport.samples
        steps = [sample.step for sample in samples]
        assert goodbye.closing
        # Before the step it was none; after it, it counts, also where its sample is lost.
        assert watch.step in ((4, 5) if interrupted else (5,))
        lost = set(range(1, watch.step + 1)) - set(steps)
        assert steps == sorted(set(steps))
        assert lost <= {3}
        assert not lost or interrupted
        assert [sample.sequence for sample in transport.samples] == list(range(1, len(transport.samples) + 1))
        assert [result.outcome for result in transport.results] == ["applied"]
        assert samples[-1].health.multipliers["emb"] == 0.5
        assert goodbye.health.swallowed_errors == 0
        assert not [*model._forward_hooks, *optimizer._optimizer_step_pre_hooks]
        assert "step" not in vars(optimizer)
        if not interrupted:
            break


def test_who_insists_on_an_interrupt_gives_up_the_last_samples_but_the_courier_is_ended(transports, monkeypatch):
    _, _, watch, transport = made(transports)

    def insist(*_, **__):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(watch._watched._reporter, "flush", insist)
    with pytest.raises(KeyboardInterrupt):
        watch.close()
    assert transport.closed
    assert not transport.samples


def test_a_state_that_is_none_of_the_agents_is_named_so(transports, caplog):
    _, _, watch, _ = made(transports)
    watch.load_state_dict({"model": {}})
    assert "cannot load agent state version None: this version of sharpwatch reads version 1" in caplog.text
    watch.close()


def logged(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "sharpwatch"]


def test_a_command_that_was_applied_stands_in_the_trainers_log(transports, caplog):
    model, optimizer, watch, transport = made(transports)
    halved = types_pb2.MultiplierSet(multipliers={"emb": 0.5}, revision=7)
    transport.command(set_multipliers=halved, author="ann", reason="spikes")
    stepped(model, optimizer, 3)
    (line,) = logged(caplog)
    assert line == (
        "learning-rate multipliers of revision 7 (emb x 0.5) applied at step 2, "
        "learning rates emb 0.005, norm 0.01, head 0.01; by 'ann'; reason: 'spikes'"
    )
    assert caplog.records[0].levelname == "WARNING"  # which shows where logging is not set up, too
    watch.close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, ["with multipliers in force: emb x 0.25, norm x 0.5"]),
        (
            {"lr_bounds": (0.5, 10.0)},
            [
                "with multipliers in force: emb x 0.5, norm x 0.5",
                "without multipliers that were in force and are not allowed now: emb x 0.25",
            ],
        ),
        (
            {"control": "none"},
            ["without multipliers that were in force and are not allowed now: emb x 0.25, norm x 0.5"],
        ),
    ],
)
def test_a_resumed_run_logs_which_multipliers_are_in_force(transports, caplog, options, said):
    model, optimizer, watch, transport = made(transports, run="run")
    transport.set_multipliers({"emb": 0.25, "norm": 0.5}, ramp_steps=50)
    stepped(model, optimizer, 3)
    state = watch.state_dict()
    watch.close()
    caplog.clear()
    _, _, watch, _ = made(transports, run="run", **options)
    watch.load_state_dict(state)
    assert logged(caplog) == [f"run run goes on from step 3 {each}" for each in said]
    watch.close()


def test_a_run_that_was_resumed_without_multipliers_logs_none(transports, caplog):
    model, optimizer, watch, _ = made(transports, run="run")
    stepped(model, optimizer, 3)
    state = watch.state_dict()
    watch.close()
    _, _, watch, _ = made(transports, run="run")
    watch.load_state_dict(state)
    assert (watch.step, logged(caplog)) == (3, [])
    watch.close()


@pytest.mark.parametrize("part", ["step", "control", "sampler", "probes"])
def test_a_state_that_is_damaged_in_one_part_is_not_loaded_at_all(transports, caplog, part):
    model, optimizer, watch, transport = made(transports, probes=("gnb",), run="run")
    transport.command(id="cut", set_multipliers=types_pb2.MultiplierSet(multipliers={"emb": 0.5}, revision=7))
    stepped(model, optimizer, 3)
    state = watch.state_dict()
    watch.close()
    model, optimizer, watch, transport = made(transports, probes=("gnb",), run="run")
    fresh = watch.state_dict()
    damaged = {"step": "x", "control": {**state["control"], "revision": "x", "fade": [3, 4]}}
    watch.load_state_dict({**state, part: damaged.get(part, {})})
    assert "loading the agent's state" in caplog.text
    assert watch.state_dict() == fresh
    watch.load_state_dict(state)
    assert (watch.step, watch.state_dict()["control"]["revision"]) == (3, 7)
    watch.close()


def test_deleted_checkpoints_are_told_with_the_next_sample(transports, tmp_path):
    model, optimizer, watch, transport = made(transports)
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for step, path in enumerate(paths, 1):
        stepped(model, optimizer, 1)
        path.mkdir()
        watch.saved_checkpoint(step, path)
    paths[0].rmdir()
    watch.deleted_checkpoint(paths[1])
    stepped(model, optimizer, 1)
    watch.saved_checkpoint(4, "elsewhere")
    watch.close()
    assert [c.uri for sample in transport.samples for c in sample.checkpoints] == [*map(str, paths), "elsewhere"]
    told = [uri for sample in transport.samples for uri in sample.deleted_checkpoints]
    assert told == [str(paths[1]), str(paths[0])]


def test_a_checkpoint_saved_last_is_told_though_the_loop_ends_in_an_error(transports):
    model, optimizer, watch, transport = made(transports)
    stepped(model, optimizer, 1)
    watch.saved_checkpoint(1, "a")
    with pytest.raises(ZeroDivisionError), watch:
        raise ZeroDivisionError
    assert [c.uri for c in transport.samples[-1].checkpoints] == ["a"]
    assert not transport.samples[-1].closing


def test_a_rollback_to_a_checkpoint_that_was_deleted_fails_before_the_loop_is_asked(transports, tmp_path):
    asked = []
    model, optimizer, watch, transport = made(transports, on_rollback=asked.append)
    for step, name in ((1, "known"), (2, "there")):
        stepped(model, optimizer, 1)
        (tmp_path / name).mkdir()
        watch.saved_checkpoint(step, tmp_path / name)
    (tmp_path / "known").rmdir()
    for name in ("known", "earlier", "there"):  # "earlier": of an attempt before this one
        transport.roll_back(1, str(tmp_path / name), id=name)
    stepped(model, optimizer, 2)
    watch.close()
    assert [request.uri for request in asked] == [str(tmp_path / "there")]
    assert [(result.command_id, result.outcome) for result in transport.results] == [
        ("known", "failed"),
        ("earlier", "failed"),
        ("there", "applied"),
    ]
    assert transport.results[0].detail == f"{tmp_path}/known does not exist any more"
    told = [uri for sample in transport.samples for uri in sample.deleted_checkpoints]
    assert told == [str(tmp_path / "known"), str(tmp_path / "earlier")]


def test_a_rollback_that_is_refused_leaves_its_checkpoint_alone(transports):
    model, optimizer, watch, transport = made(transports, control="rollback")
    for command in ("can't", "won't"):
        transport.roll_back(1, "a", id=command)
        stepped(model, optimizer, 2)
        (watch.rollback_failed if command == "can't" else watch.rollback_refused)(command)
    watch.close()
    results = [(result.command_id, result.outcome, result.detail) for result in transport.results]
    assert results == [("can't", "failed", "can't"), ("won't", "refused", "won't")]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda watch: watch.saved_checkpoint(None, "a"), "step must be a whole number >= 0, got None"),
        (lambda watch: watch.saved_checkpoint("a", 3), "step must be a whole number >= 0, got 'a'"),
        (lambda watch: watch.saved_checkpoint(-1, "a"), "step must be a whole number >= 0, got -1"),
        (lambda watch: watch.saved_checkpoint(1, None), "uri must be a path or another text of 1 to 4096 characters"),
        (lambda watch: watch.saved_checkpoint(1, ""), "uri must be a path or another text of 1 to 4096 characters"),
        (lambda watch: watch.deleted_checkpoint(7), "uri must be a path or another text of 1 to 4096 characters"),
        (lambda watch: watch.restored("x"), "step must be a whole number >= 0, got 'x'"),
        (lambda watch: watch.observe(loss=[3.0]), "loss must be a number or a tensor with one element, got [3.0]"),
        (lambda watch: watch.observe(loss="3"), "loss must be a number or a tensor with one element, got '3'"),
        (
            lambda watch: watch.observe(loss=torch.ones(2, 3)),
            "loss must be a number or a tensor with one element, got a tensor of shape (2, 3)",
        ),
    ],
)
def test_a_wrong_argument_is_named_in_the_log_and_reported_to_nobody(transports, caplog, call, message):
    model, optimizer, watch, transport = made(transports)
    call(watch)
    assert message in caplog.text
    stepped(model, optimizer, 1)
    watch.close()
    assert not any(sample.checkpoints or sample.deleted_checkpoints for sample in transport.samples)
    assert watch.step == 1


def test_a_loop_that_ends_in_an_error_says_no_goodbye(transports):
    _, _, watch, transport = made(transports)
    with pytest.raises(ZeroDivisionError), watch:
        raise ZeroDivisionError
    assert transport.closed
    assert not any(sample.closing for sample in transport.samples)


def test_a_watch_dies_with_its_model_and_closes_itself(transports):
    model, optimizer, watch, transport = made(transports)
    model(TOKENS)["loss"].backward()
    optimizer.step()
    gone = weakref.ref(model)
    del model, optimizer, watch
    gc.collect()
    assert gone() is None
    assert transport.closed
    assert transport.samples[-1].closing


def stepped(model, optimizer, steps):
    for _ in range(steps):
        model(TOKENS)["loss"].backward()
        optimizer.step()


def test_a_watch_ends_where_a_parameter_it_knows_is_replaced(transports, caplog):
    model, optimizer, _, transport = made(transports)
    stepped(model, optimizer, 1)
    model.lm_head = nn.Linear(8, 11, bias=False)
    optimizer.add_param_group({"params": [model.lm_head.weight]})
    stepped(model, optimizer, 63)
    assert [sample.step for sample in transport.samples if sample.closing] == [64]
    assert "lm_head.weight was replaced" in caplog.text
    stepped(model, optimizer, 1)
    assert not optimizer._optimizer_step_pre_hooks
    assert not model._forward_hooks


def test_a_parameter_that_comes_later_is_reported_once_as_unseen(transports, caplog):
    model, optimizer, watch, transport = made(transports)
    model.extra = nn.Linear(2, 2, bias=False)
    stepped(model, optimizer, 128)
    assert caplog.text.count("parameters added after attach are not watched: extra.weight") == 1
    assert not any(sample.closing for sample in transport.samples)
    watch.close()


def test_losses_of_an_optimizer_that_no_one_steps_are_bounded(transports, caplog):
    model, _, watch, _ = made(transports)
    for _ in range(MAX_FORWARDS + 9):
        model(TOKENS)
    assert len(watch._watched.losses._own) == MAX_FORWARDS
    assert caplog.text.count("forwards without a step of a watched optimizer") == 1
    watch.close()
