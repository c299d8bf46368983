"""To which daemon the courier goes next."""

from __future__ import annotations

from sharpwatch.agent.transport.route import Route
from sharpwatch.common.shards import held_by, shard_order

TARGETS = ("a:1", "b:1", "c:1")
ORDER = [TARGETS[shard] for shard in shard_order("run", 3)]


def route() -> Route:
    made = Route(TARGETS)
    made.of_run("run")
    return made


def test_it_begins_with_the_runs_own_shard_and_goes_on_in_its_order():
    of = route()
    seen = [of.target]
    for _ in range(3):
        assert not of.turned_away("connection refused")
        seen.append(of.target)
    assert seen == [*ORDER, ORDER[0]]
    of.restart()
    assert of.target == ORDER[0]


def test_it_goes_to_whoever_holds_the_shard_and_on_from_there_where_that_does_not_answer():
    of = route()
    assert of.turned_away(held_by(0, ORDER[2]))
    assert of.target == ORDER[2]
    assert not of.turned_away("connection refused")
    assert of.target == ORDER[1]
    # Two daemons that name each other are asked in turn, but not at once.
    assert of.turned_away(held_by(0, ORDER[0]))
    assert not of.turned_away(held_by(0, ORDER[0]))


def test_a_daemon_can_not_send_it_to_an_address_that_it_was_not_given():
    of = route()
    assert not of.turned_away(held_by(0, "evil:7741"))
    assert of.target == ORDER[1]
    assert of.unlisted(held_by(0, "evil:7741")) == ", which is not in address=a:1,b:1,c:1"
    for reason in ("connection refused", held_by(0, ORDER[2]), held_by(0, "")):
        assert not of.unlisted(reason)


def test_with_one_daemon_it_is_always_that_one():
    of = Route(("a:1",))
    of.of_run("run")
    for reason in ("connection refused", held_by(0, "b:1"), held_by(0, "")):
        assert not of.turned_away(reason)
        assert of.target == "a:1"
