"""Which examples each step sees."""

from __future__ import annotations

import pytest

from lora_export.training.order import ShuffledOrder, parts_of


def test_every_row_is_seen_once_an_epoch_in_seeded_order() -> None:
    orders = []
    for seed in (0, 1):
        order = ShuffledOrder(10, 4, seed)
        steps = [order.rows_of(step) for step in range(6)]
        assert [len(rows) for rows in steps] == [4, 4, 2, 4, 4, 2]
        assert [order.epoch_of(step) for step in range(6)] == [0, 0, 0, 1, 1, 1]
        orders += [tuple(row for rows in half for row in rows) for half in (steps[:3], steps[3:])]
        assert ShuffledOrder(10, 4, seed).rows_of(4) == steps[4]  # whatever came before
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({*orders, tuple(range(10))}) == 5


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 2, 7, 12])
def test_processes_and_parts_together_have_every_row_once(count: int, parts: int, processes: int) -> None:
    rows = list(range(100, 100 + count))
    shares = [parts_of(rows, parts, rank=rank, processes=processes) for rank in range(processes)]
    assert sorted(row for share in shares for part in share for row in part) == rows
    assert all(len(share) <= parts for share in shares)
    largest = [len(part) for share in shares for part in share]
    assert max(largest) <= -(-count // (parts * processes))
