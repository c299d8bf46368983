"""Pages are cut by bytes, and each goes on."""

from __future__ import annotations

import pytest

from sharpwatch.daemon.api.pages import fitting


@pytest.mark.parametrize(
    ("sizes", "taken"), [([], []), ([2, 2], [2, 2]), ([2, 2, 1], [2, 2]), ([9, 1], [9]), ([1, 9], [1])]
)
def test_a_page_has_one_item_at_least_or_a_client_would_ask_for_ever(sizes, taken):
    assert fitting(sizes, lambda size: size, limit=4) == taken
