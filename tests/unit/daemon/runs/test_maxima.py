"""The largest values of the last minute are seen by every scrape of that minute, and then forgotten."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sharpwatch.daemon.ingest.samples import BlockTap
from sharpwatch.daemon.runs.run import MAXIMA_SECONDS, RecentMaxima

START = 1_700_000_000.0


def see(
    maxima: RecentMaxima, now: float, *, loss: float | None = 1.0, gradient: float = 1.0, update: float = math.nan
) -> None:
    ones = np.ones(2)
    tap = BlockTap(np.array([gradient, 0.5]), ones, np.array([0.25, update]), ones.astype(int), ones, ones)
    maxima.see(tap, loss, now)


def shown(maxima: RecentMaxima) -> tuple[float, float, float]:
    present = maxima.present
    return present.loss, float(present.gradient_norm[0]), float(present.update_rms[1])


def test_a_spike_of_one_step_is_shown_for_a_minute():
    maxima = RecentMaxima(2)
    see(maxima, START, loss=9.0, gradient=7.0, update=5.0)
    seen = []
    for second in range(1, 80):
        see(maxima, START + second, update=1.0)
        # However many servers scrape.
        assert shown(maxima) == shown(maxima)
        seen.append(shown(maxima))
    assert seen[:60] == [(9.0, 7.0, 5.0)] * 60
    assert seen[65:] == [(1.0, 1.0, 1.0)] * 14


def test_what_was_not_measured_has_no_maximum():
    maxima = RecentMaxima(2)
    assert all(map(math.isnan, shown(maxima)))
    see(maxima, START, loss=None)
    loss, gradient, update = shown(maxima)
    assert math.isnan(loss)
    assert gradient == 1.0
    assert math.isnan(update)


def test_a_run_whose_steps_take_minutes_has_a_maximum_of_its_newest_step():
    maxima = RecentMaxima(2)
    for step, loss in enumerate((8.0, 6.0, 4.0)):
        see(maxima, START + 600 * step, loss=loss)
        assert shown(maxima)[0] == loss


def test_a_clock_that_is_set_back_forgets_nothing():
    maxima = RecentMaxima(2)
    see(maxima, START, loss=8.0)
    see(maxima, START - 3600, loss=2.0)
    assert shown(maxima)[0] == 8.0


@given(st.lists(st.tuples(st.floats(0, 40), st.floats(0, 1e6)), min_size=1, max_size=60))
def test_the_maximum_is_that_of_a_window_of_60_to_65_seconds(steps):
    maxima, now, past = RecentMaxima(2), START, []
    for wait, loss in steps:
        now += wait
        past.append((now, loss))
        see(maxima, now, loss=loss)
        least = max(loss for at, loss in past if now - at < MAXIMA_SECONDS)
        most = max(loss for at, loss in past if now - at <= MAXIMA_SECONDS + 5)
        assert least <= shown(maxima)[0] <= most
