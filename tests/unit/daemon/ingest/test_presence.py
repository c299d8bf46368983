"""How long a trainer that is not heard is taken to be there, second by second."""

from __future__ import annotations

import pytest

from sharpwatch.daemon.ingest.hello import RECONNECT_SECONDS, SILENT_SECONDS, Presence

JUST = 0.001


def heard(at: float = 100.0) -> Presence:
    presence = Presence()
    presence.heard(at)
    return presence


def test_who_was_never_heard_is_not_there():
    assert not Presence().is_there(0.0)


@pytest.mark.parametrize(("after", "there"), [(0.0, True), (SILENT_SECONDS - JUST, True), (SILENT_SECONDS, False)])
def test_an_open_stream_counts_until_it_was_silent_for_30_s(after, there):
    assert SILENT_SECONDS == 30
    presence = heard()
    assert presence.is_there(100 + after) == there
    presence.heard(100 + after)
    assert presence.is_there(100 + after + SILENT_SECONDS - JUST)


@pytest.mark.parametrize(
    ("after", "there"), [(0.0, True), (RECONNECT_SECONDS - JUST, True), (RECONNECT_SECONDS, False)]
)
def test_a_stream_that_broke_is_awaited_for_as_long_as_a_courier_takes_to_come_back(after, there):
    assert RECONNECT_SECONDS > 5
    presence = heard(0.0)
    presence.broke(100.0)
    assert presence.is_there(100 + after) == there


def test_a_trainer_that_left_is_gone_at_once_and_the_end_of_its_stream_changes_nothing():
    presence = heard()
    presence.left()
    presence.broke(100.0)
    assert not presence.is_there(100.0)


def test_after_a_restart_the_trainer_is_awaited():
    presence = Presence()
    presence.await_return(100.0)
    assert presence.is_there(100.0)
    assert not presence.is_there(100 + RECONNECT_SECONDS)
    presence.heard(120.0)
    assert presence.is_there(120.0)


def test_a_trainer_whose_messages_wait_for_the_daemon_is_not_silent():
    presence = heard()
    presence.is_unread = True
    assert presence.is_there(10_000)
    presence.broke(10_000)
    presence.await_return(10_000)
    assert not presence.is_there(20_000)
