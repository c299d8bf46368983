from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharpwatch.agent.probes.scheduler import OverheadBudget

STEP, TAP = 0.1, 0.0002
COST = {"gnb": 0.05, "direction": 0.1}


def drive(overhead, steps, *, step=STEP, tap=TAP, cost=COST):
    """The probes that ran, step by step."""
    ran: list[tuple[str, ...]] = []
    for _ in range(steps):
        probes = overhead.plan()
        ran.append(probes)
        overhead.record(step, tap, {probe: cost[probe] for probe in probes})
    return ran


def test_every_probe_runs_twice_at_once():
    ran = drive(OverheadBudget(("gnb", "direction"), budget=0.01), 5)
    assert ran == [("gnb",), ("direction",), ("gnb",), ("direction",), ()]


def test_a_cold_probe_that_took_a_hundred_times_as_long_delays_none():
    slow = OverheadBudget(("gnb", "direction"), budget=0.01)
    drive(slow, 2, cost={"gnb": 5.0, "direction": 10.0})
    assert drive(slow, 1000) == drive(OverheadBudget(("gnb", "direction"), budget=0.01), 1002)[2:]


def test_what_the_probes_cost_is_paid_back_before_the_next():
    ran = drive(OverheadBudget(("gnb", "direction"), budget=0.01), 1000)
    third = next(i for i, probes in enumerate(ran) if i > 3 and probes)
    # 0.15 s are owed and the next costs 0.05 s, at 0.01 * 0.1 - 0.0002 s a step.
    assert third == pytest.approx(0.20 / 0.0008, abs=3)


def test_probes_take_turns():
    ran = [probes[0] for probes in drive(OverheadBudget(("gnb", "direction"), budget=0.05), 2000) if probes]
    assert ran[0::2] == ["gnb"] * len(ran[0::2])
    assert ran[1::2] == ["direction"] * len(ran[1::2])


def test_early_probes_run_at_every_third_step_and_delay_no_later_ones():
    early = OverheadBudget(("gnb", "direction"), budget=0.01, early_probes=62)
    ran = drive(early, 1000)
    at = [step for step, probes in enumerate(ran, 1) if "direction" in probes]
    assert set(range(2, 63, 3)) <= set(at)
    plain = drive(OverheadBudget(("gnb", "direction"), budget=0.01), 1000)
    assert sum(map(bool, ran[62:])) >= sum(map(bool, plain[62:]))


def test_early_probes_come_beside_a_fixed_cadence():
    ran = drive(OverheadBudget(("gnb", "direction"), budget=0.01, probe_every=10, early_probes=8), 30)
    assert [step for step, probes in enumerate(ran, 1) if probes] == [2, 5, 8, 10, 20, 30]
    assert [set(probes) for probes in ran if probes] == 3 * [{"direction"}] + 3 * [{"gnb", "direction"}]


@settings(max_examples=60, deadline=None)
@given(
    budget=st.floats(0.005, 0.5),
    step=st.floats(0.01, 2.0),
    gnb=st.floats(0.001, 3.0),
    direction=st.floats(0.001, 3.0),
    tap_share=st.floats(0.0, 0.7),
)
def test_in_the_long_run_the_budget_is_kept(budget, step, gnb, direction, tap_share):
    overhead = OverheadBudget(("gnb", "direction"), budget=budget)
    cost, tap, steps = {"gnb": gnb, "direction": direction}, tap_share * budget * step, 3000
    ran = drive(overhead, steps, step=step, tap=tap, cost=cost)
    spent = steps * tap + sum(cost[probe] for probes in ran for probe in probes)
    # The cold ones are not charged, the second ones run on credit, and a bucket holds at most one round.
    assert spent <= budget * steps * step + 3 * (gnb + direction)


def test_where_the_tap_alone_exceeds_the_budget_probes_keep_a_quarter_of_it():
    ran = drive(OverheadBudget(("gnb",), budget=0.01), 4000, tap=0.01)
    spent = sum(COST[probe] for probes in ran for probe in probes)
    assert spent == pytest.approx(0.25 * 0.01 * STEP * 4000, rel=0.1)


def test_a_long_pause_earns_no_burst():
    overhead = OverheadBudget(("gnb", "direction"), budget=0.01)
    drive(overhead, 5)
    overhead.record(100_000.0, TAP, {})
    assert sum(bool(probes) for probes in drive(overhead, 100)) <= 3


def test_a_fixed_cadence_runs_every_kind_whatever_it_costs():
    ran = drive(OverheadBudget(("gnb", "direction"), budget=0.01, probe_every=5), 20)
    assert [i + 1 for i, probes in enumerate(ran) if probes] == [5, 10, 15, 20]
    assert set(ran[4]) == {"gnb", "direction"}


def test_a_disabled_kind_leaves_the_turns_to_the_others():
    overhead = OverheadBudget(("gnb", "direction"), budget=0.05)
    overhead.disable("gnb")
    assert {probe for probes in drive(overhead, 500) for probe in probes} == {"direction"}
    overhead.disable("direction")
    assert overhead.plan() == ()


def test_without_probes_there_is_nothing_to_plan():
    assert drive(OverheadBudget((), budget=0.01), 3) == [(), (), ()]


def test_the_ratio_is_the_agents_seconds_over_the_loops_own():
    overhead = OverheadBudget(("gnb",), budget=0.5)
    overhead.record(1.0, 0.1, {"gnb": 0.3})
    overhead.record(1.0, 0.1, {})
    assert overhead.overhead_ratio == pytest.approx(0.25)
    assert overhead.step_seconds == pytest.approx(1.0)


def test_the_ratio_forgets_what_is_older_than_its_window():
    overhead = OverheadBudget((), budget=0.5)
    overhead.record(1.0, 5.0, {})
    drive(overhead, 1000, step=1.0, tap=0.01)
    assert overhead.overhead_ratio == pytest.approx(0.01)
