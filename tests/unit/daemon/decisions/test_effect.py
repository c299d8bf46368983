"""What the losses of a run say of an action."""

from __future__ import annotations

import numpy as np
import pytest

from sharpwatch.daemon.decisions.effect import LossBand, effect
from sharpwatch.daemon.detection.history import Losses

SD = 0.1
ONSET, APPLIED = 101, 106


def losses(*parts: tuple[int, float]) -> Losses:
    """Losses from step 1 on: numbers of steps, each at a level, with noise of SD."""
    levels = np.concatenate([np.full(count, level) for count, level in parts])
    noise = np.random.default_rng(0).standard_normal(len(levels))
    return Losses.of(np.arange(1, len(levels) + 1), levels + SD * noise)


def judged(*after: tuple[int, float], over: bool = True, last: bool = True) -> str:
    found = effect(losses((100, 3.0), (5, 5.0), *after), ONSET, APPLIED, over=over, last=last)
    return "" if found is None else found[0]


def test_a_band_is_what_the_losses_before_were():
    falling = Losses.of(np.arange(1, 101), np.linspace(9.0, 5.0, 100) + SD * np.random.default_rng(0).normal(size=100))
    band = LossBand.before(falling, 101)
    # The mean of the newest 40; the spread is that of the noise, the trend apart: within 4 of its standard errors.
    assert band.level == pytest.approx(falling.losses[-40:].mean())
    assert band.sd == pytest.approx(SD, rel=4 * 1.17 / np.sqrt(2 * 39))
    assert LossBand.before(falling, 20) is None


@pytest.mark.parametrize(
    ("after", "over", "expected"),
    [
        ((30, 3.0), True, "recovered"),
        ((30, 2.5), True, "recovered"),  # lower is no harm
        ((30, 3.0), False, "no-effect"),
        ((30, 3.3), True, "no-effect"),
        ((30, 4.5), True, "no-effect"),  # it was at 5
        ((30, 6.0), True, "worse"),
        ((30, 6.0), False, "worse"),
        ((3, 3.0), True, "inconclusive"),
        ((3, 3.0), False, "no-effect"),
    ],
)
def test_the_time_is_up(after, over, expected):
    assert judged(after, over=over) == expected


@pytest.mark.parametrize(
    ("after", "over", "expected"),
    [((30, 3.0), True, "recovered"), ((19, 3.0), True, ""), ((30, 3.0), False, ""), ((90, 6.0), False, "")],
)
def test_before_the_time_is_up_only_a_recovery_is_known(after, over, expected):
    assert judged(after, over=over, last=False) == expected


def test_a_loss_that_only_comes_down_late_recovers_once_it_is_there():
    assert judged((30, 4.0), (20, 3.0), last=False) == "recovered"


def test_a_run_without_losses_is_judged_by_what_is_found():
    none = Losses()
    assert effect(none, ONSET, APPLIED, over=True, last=False) == ("recovered", "nothing is found any more")
    assert effect(none, ONSET, APPLIED, over=False, last=False) is None
    assert effect(none, ONSET, APPLIED, over=False, last=True) == ("no-effect", "it goes on")


def test_a_run_that_broke_at_its_start_has_no_band_to_come_back_to():
    found = effect(losses((200, 3.0)), 5, 6, over=True, last=True)
    assert found == ("inconclusive", "too few losses to say where it stands")


def test_after_a_rollback_the_band_is_that_of_before_its_checkpoint():
    """Steps 81 to 100 come again, so that what stands there is no longer from before the trouble."""
    again = losses((80, 3.0), (30, 6.0))
    found = effect(again, ONSET, 81, over=True, last=True)
    assert found is not None
    assert found[0] == "worse"
