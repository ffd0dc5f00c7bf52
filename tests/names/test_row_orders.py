"""The orders of rows, written out by hand."""

from __future__ import annotations

import pytest

from lora_export.errors import InputRefused
from lora_export.names.row_orders import Heads, RowOrder, alternating, swapped_halves, two_blocks


def test_the_orders_of_rows() -> None:
    heads = Heads(4, 2, size=4)
    halves, pairs = RowOrder.HALVES_OF_KEYS.indices(8, heads), RowOrder.PAIRS_OF_KEYS.indices(8, heads)
    assert halves.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert pairs[halves].tolist() == list(range(8))
    assert RowOrder.HALVES_OF_QUERIES.indices(16, heads)[:4].tolist() == [0, 2, 1, 3]
    assert RowOrder.ALTERNATING.indices(6, None).tolist() == [0, 3, 1, 4, 2, 5]
    # Two groups of two queries: q 0 and 1, k 4, v 6; then q 2 and 3, k 5, v 7.
    assert RowOrder.QUERY_GROUPS.indices(8, Heads(4, 2, 1)).tolist() == [0, 1, 4, 6, 2, 3, 5, 7]


@pytest.mark.parametrize(
    ("order", "rows", "heads", "message"),
    [
        (RowOrder.HALVES_OF_QUERIES, 6, Heads(2, 1, 4), "its 6 rows are not those of the base's 2 heads of 4 rows"),
        (RowOrder.PAIRS_OF_KEYS, 3, Heads(2, 1), "its 3 rows are not those of the base's 1 heads"),
        (RowOrder.PAIRS_OF_KEYS, 4, Heads(0, 0), "does not state its num_attention_heads"),
        (RowOrder.QUERY_GROUPS, 7, Heads(3, 2, 1), "3 heads are no multiple of 2 query groups"),
    ],
)
def test_rows_that_are_not_those_of_the_heads_are_refused(
    order: RowOrder, rows: int, heads: Heads, message: str
) -> None:
    with pytest.raises(InputRefused, match=message):
        order.indices(rows, heads)


def test_two_blocks_and_halves() -> None:
    assert two_blocks(6)[alternating(6)].tolist() == list(range(6))
    assert swapped_halves(4).tolist() == [2, 3, 0, 1]
