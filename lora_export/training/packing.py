"""Put short texts into rows of one length, so that little of a batch is padding."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def packed_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of item numbers, each with at most `capacity` in all: the longest first, each where it fits best.

    Items of more than the capacity must not be there. An item's bin depends on the lengths alone. The bins are in the
    order of their first items, and so are the items in a bin.
    """
    bins: list[list[int]] = []
    free_in: dict[int, list[int]] = {}  # free -> the bins that have so much
    sizes: list[int] = []  # the keys of free_in, sorted
    for item in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        place = bisect.bisect_left(sizes, lengths[item])
        if place == len(sizes):
            bins.append([])
            number, free = len(bins) - 1, capacity
        else:
            free = sizes[place]
            number = free_in[free].pop()
            if not free_in[free]:
                del free_in[free], sizes[place]
        bins[number].append(item)
        left = free - lengths[item]
        if left not in free_in:
            free_in[left] = []
            bisect.insort(sizes, left)
        free_in[left].append(number)
    return sorted(sorted(items) for items in bins)
