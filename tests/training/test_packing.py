"""Short texts in rows of one length."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lora_export.training.packing import packed_rows


def test_the_longest_are_placed_first_where_they_fit_best() -> None:
    # 7; 5; 3 beside 7; 3 beside 5; 2 in what is left beside 5 and 3
    assert packed_rows([5, 3, 2, 7, 3], 10) == [[0, 2, 4], [1, 3]]
    assert packed_rows([4, 4, 4], 4) == [[0], [1], [2]]
    assert packed_rows([], 4) == []


@given(st.lists(st.integers(1, 12), max_size=60))
def test_every_item_has_one_place_and_no_row_is_too_long(lengths: list[int]) -> None:
    bins = packed_rows(lengths, 12)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in items) <= 12 for items in bins)
    # No two rows would fit into one: at most one row is half empty.
    assert sum(2 * sum(lengths[item] for item in items) <= 12 for items in bins) <= 1
