from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharpwatch.agent.control.commands import Cancel, Command, RollBack, SetMultipliers
from sharpwatch.agent.control.controller import Controller, smallest_multiplier

BLOCKS = ("emb", "qk", "vo", "ffn", "norm", "other")
# GPT-2: one fused parameter for qk and part of vo, the rest each for itself.
GPT2_TYPES = tuple(map(frozenset, (["emb"], ["qk", "vo"], ["vo"], ["ffn"], ["norm"], ["other"])))


def make(mode="lr", *, bounds=(0.1, 10.0), types=GPT2_TYPES, callback=False, **options):
    return Controller(mode, bounds=bounds, blocks=BLOCKS, parameter_types=types, has_callback=callback, **options)


def cut(id_="c1", *, ramp=0, ttl=0, apply_at=0, expires=0, expires_ns=0, revision=1, **multipliers):
    return Command(id_, SetMultipliers(multipliers, revision, ramp, ttl), apply_at, expires, expires_ns, "why")


def back(id_="r1", step=3, *, uri="file:///c", skip=(4, 9), apply_at=0, expires=0):
    return Command(id_, RollBack(step, uri, skip), apply_at, expires, 0, "why")


def run(control, steps, start=1):
    """The multipliers of `steps` steps."""
    seen = []
    for step in range(start, start + steps):
        seen.append(dict(control.begin(step, 0)))
        control.end(step, 0)
    return seen


def test_a_command_is_applied_at_the_next_step_and_names_it():
    control = make()
    run(control, 4)
    control.receive(cut(ffn=0.5), 5)
    assert control.may_scale
    assert control.take_results() == ()
    assert control.begin(5, 0)["ffn"] == 0.5
    (result,) = control.take_results()
    assert (result.command_id, result.outcome, result.step, control.revision) == ("c1", "applied", 5, 1)


def test_a_command_waits_for_its_step():
    control = make()
    control.receive(cut(apply_at=4, ffn=0.5), 1)
    assert [m["ffn"] for m in run(control, 5)] == [1.0, 1.0, 1.0, 0.5, 0.5]
    assert control.take_results()[0].step == 4


def test_the_set_is_complete_so_what_it_does_not_name_returns_to_one():
    control = make()
    control.receive(cut("a", ffn=0.5, norm=0.25), 1)
    control.receive(cut("b", norm=0.5), 1)
    assert run(control, 1)[0] == dict.fromkeys(BLOCKS, 1.0) | {"norm": 0.5}


def test_a_ramp_is_geometric_and_lands_exactly():
    control = make()
    control.receive(cut(ramp=4, ffn=0.1), 1)
    values = [m["ffn"] for m in run(control, 6)]
    assert values == pytest.approx([0.1**0.25, 0.1**0.5, 0.1**0.75, 0.1, 0.1, 0.1], rel=1e-12)
    assert values[3:] == [0.1] * 3


def test_a_second_command_ramps_from_where_the_first_one_stands():
    control = make()
    control.receive(cut("a", ramp=4, ffn=0.1), 1)
    half_way = run(control, 2)[-1]["ffn"]
    control.receive(cut("b", ramp=2, ffn=1.0), 3)
    assert [m["ffn"] for m in run(control, 3, start=3)] == pytest.approx([math.sqrt(half_way), 1.0, 1.0], rel=1e-12)
    assert not control.may_scale


def test_raises_return_to_one_after_the_ttl_and_cuts_hold():
    control = make()
    control.receive(cut(ttl=3, ramp=2, emb=4.0, norm=0.5), 1)
    values = run(control, 7)
    assert [m["emb"] for m in values] == pytest.approx([2.0, 4.0, 4.0, 2.0, 1.0, 1.0, 1.0], rel=1e-12)
    assert [m["norm"] for m in values[1:]] == [0.5] * 6


def test_renewal_in_time_keeps_the_raise():
    control = make()
    control.receive(cut("a", ttl=3, emb=4.0), 1)
    run(control, 2)
    control.receive(cut("b", ttl=3, emb=4.0), 3)
    assert [m["emb"] for m in run(control, 4, start=3)] == [4.0, 4.0, 4.0, 1.0]


def test_begin_twice_for_one_step_is_one_begin():
    control = make()
    control.receive(cut(ramp=4, ffn=0.1), 1)
    assert dict(control.begin(1, 0)) == dict(control.begin(1, 0))
    assert len(control.take_results()) == 1


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (cut(head=0.5), "unknown block 'head'"),
        (cut(ffn=0.05), "lr_bounds"),
        (cut(ffn=20.0), "lr_bounds"),
        (cut(ffn=math.nan), "lr_bounds"),
        (cut(ffn=math.inf), "lr_bounds"),
        (cut(ffn=-1.0), "lr_bounds"),
        (cut(ramp=-1, ffn=0.5), "must be >= 0"),
        (Command("x", None), "unknown action"),
        (back(), 'accepts rollbacks only with on_rollback=; control="rollback" needs none'),
    ],
)
def test_what_breaks_a_rule_is_refused_at_once(command, says):
    control = make()
    control.receive(command, 7)
    (result,) = control.take_results()
    assert (result.outcome, result.step) == ("refused", 7)
    assert says in result.detail
    assert set(control.begin(7, 0).values()) == {1.0}


def test_control_none_refuses_everything():
    control = make("none", callback=True)
    for command in (cut(ffn=0.5), back()):
        control.receive(command, 1)
    assert [result.outcome for result in control.take_results()] == ["refused", "refused"]


def test_an_id_is_applied_once_and_its_result_sent_again():
    control = make()
    control.receive(cut(ffn=0.5), 1)
    control.begin(1, 0)
    first = control.take_results()
    control.end(1, 0)
    control.receive(cut(ffn=0.25), 2)  # the same id: what it asks now does not matter
    assert control.take_results() == first
    assert control.begin(2, 0)["ffn"] == 0.5


def test_an_id_seen_twice_before_its_step_has_one_result():
    control = make()
    control.receive(cut(apply_at=3, ffn=0.5), 1)
    control.receive(cut(apply_at=3, ffn=0.5), 1)
    run(control, 3)
    assert len(control.take_results()) == 1


def applied(control, command, step):
    """The outcomes of `command` in step `step`, and the ramp's target after it; a rollback is done."""
    control.receive(command, step)
    control.begin(step, 0)
    if control.end(step, 0) is not None:
        control.rolled_back(step)
    return [result.outcome for result in control.take_results()], dict(control.targets)


def after_many(control, others=10_000):
    """Take many commands after the first; and a run that goes on from the state then."""
    for number in range(2, others + 2):
        assert applied(control, cut(f"c{number}", revision=number, ffn=0.25), number)[0] == ["applied"]
    later = make("rollback")
    later.load_state_dict(control.state_dict())
    return control, later


def test_a_set_is_not_applied_again_after_ten_thousand_others_nor_by_the_run_that_goes_on():
    control = make("rollback")
    assert applied(control, cut(ffn=0.5), 1)[0] == ["applied"]
    for resumed in after_many(control):
        outcomes, target = applied(resumed, cut(ffn=0.5), 20_000)
        assert (outcomes, target["ffn"], resumed.revision) == (["refused"], 0.25, 10_001)
        # Whatever it is called: also one that was never seen is older than what is forgotten.
        resumed.receive(cut("new", revision=7, ffn=0.5), 20_001)
        (refused,) = resumed.take_results()
        assert refused.detail.startswith("revision 7 must be above 8977")
        assert applied(resumed, cut("next", revision=10_002, ffn=0.125), 20_002)[1]["ffn"] == 0.125


def test_a_rollback_is_not_done_again_after_ten_thousand_others_nor_by_the_run_that_goes_on():
    control = make("rollback")
    control.receive(back(), 6)
    assert control.end(6, 0) is not None
    control.rolled_back(3)
    done = control.take_results()
    for resumed in after_many(control):
        resumed.receive(back(), 20_000)
        resumed.begin(20_000, 0)
        assert resumed.end(20_000, 0) is None
        assert resumed.take_results() == done


def test_a_set_that_waits_is_not_forgotten_for_others_and_is_applied_once():
    control = make("rollback")
    control.receive(cut("planned", apply_at=20_000, ffn=0.5), 1)
    after_many(control, others=3_000)
    control.receive(cut("planned", apply_at=20_000, ffn=0.5), 19_999)
    assert applied(control, cut("last", revision=9_999, ffn=0.25), 19_999)[0] == ["applied"]
    control.begin(20_000, 0)
    assert [(each.command_id, each.outcome) for each in control.take_results()] == [("planned", "applied")]


def test_what_has_no_revision_is_taken_only_as_often_as_it_can_be_remembered():
    control = make("rollback")
    for number in range(1_024):
        assert applied(control, back(f"r{number}", step=1), 2)[0] == ["applied"]
    for command in (back("one more", step=1), cut("no number", revision=0, ffn=0.5), cancelled("unknown")):
        control.receive(command, 2)
        (refused,) = control.take_results()
        assert refused.outcome == "refused"
        assert "1024 commands without a revision" in refused.detail
    assert control.end(2, 0) is None
    assert applied(control, back("r0", step=1), 2)[0] == ["applied"]  # its result, once more
    assert applied(control, cut(ffn=0.5), 3) == (["applied"], dict.fromkeys(BLOCKS, 1.0) | {"ffn": 0.5})


def test_what_is_remembered_is_bounded():
    control = make("rollback")
    for number in range(1, 20_000):
        control.receive(cut(f"c{number}", revision=number, qk=99.0), 1)
        control.receive(back(f"r{number}", step=1, uri=""), 1)
        control.receive(Command(f"u{number}", None), 1)
    assert len(control.state_dict()["answered"]) == 2_048


def test_a_state_from_before_revisions_were_remembered_is_loaded():
    control = make()
    assert applied(control, cut(ffn=0.5), 1)[0] == ["applied"]
    state = control.state_dict()
    del state["revisions"], state["forgotten"]
    later = make()
    later.load_state_dict(state)
    assert applied(later, cut(ffn=0.25), 1) == (["applied"], dict(control.targets))


@pytest.mark.parametrize(
    ("command", "now"),
    [(cut(apply_at=9, expires=4, ffn=0.5), 0), (cut(apply_at=9, expires_ns=50, ffn=0.5), 51), (back(expires=4), 0)],
)
def test_what_is_too_late_expires(command, now):
    control = make("rollback")
    control.receive(command, 5)
    control.begin(5, now)
    assert control.end(5, now) is None
    assert [result.outcome for result in control.take_results()] == ["expired"]


def test_the_last_step_before_expiry_still_counts():
    control = make()
    control.receive(cut(expires=5, ffn=0.5), 5)
    assert control.begin(5, 0)["ffn"] == 0.5


def test_unchanged_blocks_are_those_whose_own_multiplier_acts_nowhere():
    control = make()
    control.receive(cut(qk=2.0, vo=1.0, ffn=2.0), 1)
    control.begin(1, 0)
    assert control.take_results()[0].unchanged_blocks == ("qk",)
    control.receive(cut("c2", qk=0.5, vo=2.0), 1)  # vo still acts on its output projection
    control.begin(1, 0)
    assert control.take_results()[0].unchanged_blocks == ()


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"ffn": 0.5}, ""),
        ({"qk": 0.5}, "vo 0.5 where parameters are shared with qk, 1 elsewhere"),
        ({"vo": 0.5}, "qk 0.5 where parameters are shared with vo"),
        ({"qk": 2.0}, "qk 1 where parameters are shared with vo"),
        ({"qk": 0.5, "vo": 0.5}, ""),
        ({"qk": 0.25, "vo": 0.5}, "vo 0.25 where parameters are shared with qk, 0.5 elsewhere"),
    ],
)
def test_the_result_says_what_each_block_of_a_fused_parameter_got(wanted, said):
    control = make()
    control.receive(cut(**wanted), 1)
    control.begin(1, 0)
    assert control.take_results()[0].detail == said


def test_where_all_blocks_share_one_rate_the_result_says_so_once():
    control = Controller(
        "lr", bounds=(0.1, 10.0), blocks=("emb", "qk", "ffn"), parameter_types=[frozenset({"emb", "qk", "ffn"})]
    )
    control.receive(cut(qk=0.5), 1)
    control.begin(1, 0)
    assert control.take_results()[0].detail == "emb, ffn 0.5 where parameters are shared with qk"


def test_a_fused_parameter_takes_the_smaller_multiplier():
    assert smallest_multiplier(frozenset(["qk", "vo"]), {"qk": 0.5, "vo": 2.0}) == 0.5


def test_a_rollback_is_pending_until_it_is_done():
    control = make("rollback")
    control.receive(back(), 6)
    control.begin(6, 0)
    request = control.end(6, 0)
    assert (request.step, request.uri, request.skip, request.reason) == (3, "file:///c", (4, 9), "why")
    assert control.pending_rollback == request
    control.receive(back("r2"), 7)
    assert control.end(7, 0) is None
    assert control.take_results()[0].detail == "another rollback is pending"
    control.rolled_back(3)
    (result,) = control.take_results()
    assert (result.command_id, result.outcome, result.step) == ("r1", "applied", 4)
    assert control.pending_rollback is None


def test_a_failed_rollback_says_why():
    control = make(callback=True)
    control.receive(back(), 6)
    assert control.end(6, 0) is not None
    control.rollback_failed(6, "OSError: gone")
    assert [(r.outcome, r.detail) for r in control.take_results()] == [("failed", "OSError: gone")]


def test_a_rollback_into_the_future_is_refused():
    control = make("rollback")
    control.receive(back(step=9), 6)
    assert control.end(6, 0) is None
    assert "is ahead of step" in control.take_results()[0].detail


def test_a_rollback_does_not_turn_a_ramp_back():
    control = make(callback=True)
    control.receive(cut(ramp=4, ffn=0.1), 11)
    run(control, 2, start=11)
    control.receive(back(step=5), 13)
    control.begin(13, 0)
    assert control.end(13, 0) is not None
    control.rolled_back(5)
    assert control.begin(6, 0)["ffn"] == 0.1


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 5),  # steps until the next command
            st.dictionaries(st.sampled_from(BLOCKS), st.floats(0.01, 100) | st.just(math.nan), max_size=3),
            st.integers(0, 6),
            st.integers(0, 6),
        ),
        max_size=12,
    )
)
def test_whatever_comes_every_multiplier_stays_in_bounds_and_every_command_has_one_result(commands):
    control, step, results = make(), 0, []
    for number, (pause, multipliers, ramp, ttl) in enumerate(commands):
        control.receive(cut(f"c{number}", ramp=ramp, ttl=ttl, **multipliers), step + 1)
        for _ in range(pause + 1):
            step += 1
            values = control.begin(step, 0)
            assert all(0.1 <= value <= 10.0 for value in values.values())
            control.end(step, 0)
        results += control.take_results()
    assert sorted(result.command_id for result in results) == sorted(f"c{n}" for n in range(len(commands)))


def test_every_result_of_a_command_is_logged_once():
    lines = []
    control = make("rollback", log=lines.append)

    def logged(*steps):
        for step in steps:
            control.begin(step, 0)
            control.end(step, 0)
        said, lines[:] = list(lines), []
        return said

    control.receive(cut(ramp=20, ffn=0.5, norm=0.25), 1)
    assert lines == []  # it is not applied yet
    one = "learning-rate multipliers of revision 1 (ffn x 0.5, norm x 0.25 over 20 steps)"
    assert logged(1) == [f"{one} applied at step 1; reason: 'why'"]
    control.receive(cut(ramp=20, ffn=0.5, norm=0.25), 2)  # sent again
    assert logged(2) == []
    control.receive(cut("c2", revision=2), 3)
    assert logged(3) == [
        "learning-rate multipliers of revision 2 (every multiplier is 1) applied at step 3; reason: 'why'"
    ]
    control.receive(cut("c3", qk=20.0), 4)
    (refused,) = logged(4)
    assert refused.startswith("learning-rate multipliers of revision 1 (qk x 20) refused at step 4: multiplier of 'qk'")
    assert refused.endswith("must be within lr_bounds (0.1, 10), got 20; reason: 'why'")
    control.receive(cut("c4", apply_at=9, expires=5, vo=0.5), 5)
    (expired,) = logged(5, 6)
    assert expired.startswith("learning-rate multipliers of revision 1 (vo x 0.5) expired at step 6: not applied")
    assert control.refuse(cut("c5", qk=0.5), 7, "rank 1 is not in step")
    (refused,) = logged()
    assert refused.startswith("learning-rate multipliers of revision 1 (qk x 0.5) refused at step 7: rank 1 is not in")
    assert not control.refuse(cut("c4", vo=0.5), 7, "again")
    assert logged() == []


def test_a_rollback_is_logged_when_it_is_due_and_when_it_is_done_or_not():
    lines = []
    control = make("rollback", log=lines.append)
    control.receive(Command("r1", RollBack(3, "/c", (4, 9)), reason="bad\nshard", author="ann"), 6)
    control.end(6, 0)
    what, who = "rollback to step 3 ('/c', without the batches of steps 4 to 8)", "; by 'ann'; reason: 'bad\\nshard'"
    assert lines == [f"{what} is due after step 6{who}"]
    control.rolled_back(3)
    assert lines[1:] == [f"{what} applied at step 4: restored to step 3{who}"]
    control.receive(back("r2", skip=(0, 0)), 6)
    control.end(6, 0)
    control.rollback_failed(6, "OSError: no such file")
    assert lines[3:] == ["rollback to step 3 ('file:///c') failed at step 6: OSError: no such file; reason: 'why'"]


def test_raises_that_end_are_logged_and_a_time_out_of_cuts_alone_is_not():
    lines = []
    control = make(log=lines.append)
    control.receive(cut(ttl=2, emb=4.0, norm=0.5), 1)
    run(control, 4)
    assert lines[1:] == ["multipliers above 1 end, as they were not renewed: norm x 0.5"]
    control.receive(cut("c2", ttl=2, norm=0.5), 5)
    run(control, 4, start=5)
    assert len(lines) == 3


def test_a_flood_of_wrong_commands_does_not_fill_the_log():
    lines = []
    control = make(log=lines.append)
    for number in range(1000):
        control.receive(cut(f"c{number}", **{"x" * 2**16: 0.5}), 1)
    assert len(control.take_results()) == 256
    assert len(lines) == 101
    assert lines[-1] == "100 commands in a row were not applied: no more are logged until one is"
    assert max(map(len, lines)) < 1000
    control.receive(cut("good", ffn=0.5), 1)
    control.begin(1, 0)
    control.receive(cut("bad", qk=99.0), 2)
    assert ["applied" in line for line in lines[101:]] == [True, False]


# Cancelled commands


def cancelled(id_="c1"):
    return Command(f"cancel-{id_}", Cancel(id_), reason="not needed", author="ann")


def test_a_command_that_waits_for_its_step_is_let_go_of():
    control = make("rollback")
    control.receive(cut(apply_at=4, ffn=0.5), 1)
    control.receive(back(apply_at=4), 1)
    control.receive(cancelled("c1"), 3)
    control.receive(cancelled("r1"), 3)
    assert [m["ffn"] for m in run(control, 5)] == [1.0] * 5
    assert control.pending_rollback is None
    results = [(each.command_id, each.outcome, each.step) for each in control.take_results()]
    assert results == [("c1", "cancelled", 3), ("r1", "cancelled", 3)]


def test_the_step_before_which_it_is_cancelled_does_not_run_under_it():
    control = make()
    control.receive(cut(apply_at=3, ffn=0.5), 1)
    run(control, 2)
    control.receive(cancelled(), 3)
    assert control.begin(3, 0)["ffn"] == 1.0


def test_a_cancellation_that_comes_too_late_gets_the_result_and_changes_nothing():
    control = make()
    control.receive(cut(ffn=0.5), 1)
    run(control, 1)
    control.receive(cancelled(), 2)
    assert [each.outcome for each in control.take_results()] == ["applied", "applied"]
    assert control.begin(2, 0)["ffn"] == 0.5


def test_a_command_that_comes_after_its_cancellation_is_not_applied_also_by_another_attempt():
    first = make()
    first.receive(cancelled(), 1)
    first.receive(cancelled(), 1)
    second = make()
    second.load_state_dict(first.state_dict())
    for control in (first, second):
        control.receive(cut(ffn=0.5), 1)
        assert control.begin(1, 0)["ffn"] == 1.0
        assert {each.outcome for each in control.take_results()} == {"cancelled"}


def test_a_rollback_that_has_begun_cannot_be_cancelled():
    control = make("rollback")
    run(control, 5)
    control.receive(back(), 6)
    control.begin(6, 0)
    assert control.end(6, 0) is not None
    control.receive(cancelled("r1"), 7)
    (result,) = control.take_results()
    assert (result.command_id, result.outcome, result.detail) == ("cancel-r1", "refused", "the rollback has begun")
    control.rolled_back(3)
    assert [(each.command_id, each.outcome) for each in control.take_results()] == [("r1", "applied")]
