"""What `RunDetection` does for all that it calls: NaN and infinity are values there."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def floating_point_errors_are_ignored():
    with np.errstate(all="ignore"):
        yield
