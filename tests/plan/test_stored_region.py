"""Rows and columns of a stored tensor, against NumPy's indices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lora_export.plan.stored_region import StoredRegion, as_slice, cut, overlapping, parse

CASES = {
    "rows": ((6, 4), (slice(2, 4), slice(0, 4)), "t[2:4]"),
    "columns": ((6, 4), (slice(0, 6), slice(1, 3)), "t[:, 1:3]"),
    "every second column": ((6, 4), (slice(0, 6), slice(1, 4, 2)), "t[:, 1:4:2]"),
    "every second row": ((6, 4), (slice(1, 6, 2), slice(0, 4)), "t[1:6:2]"),
    "a bias": ((6,), (slice(2, 4),), "t[2:4]"),
    "an expert": ((3, 6, 4), (1, slice(0, 6), slice(0, 4)), "t[1]"),
    "rows of an expert": ((3, 6, 4), (2, slice(3, 6), slice(0, 4)), "t[2, 3:6]"),
    "every second row of an expert": ((3, 6, 4), (2, slice(0, 5, 2), slice(0, 4)), "t[2, 0:5:2]"),
    "columns of an expert": ((3, 6, 4), (0, slice(0, 6), slice(2, 4)), "t[0, :, 2:4]"),
    "channels of a convolution": ((6, 2, 3), (slice(2, 4), slice(0, 2), slice(0, 3)), "t[2:4]"),
    "all": ((6, 4), (slice(0, 6), slice(0, 4)), "t[:]"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_region_has_the_entries_that_the_indices_select(case):
    shape, selection, name = CASES[case]
    tensor = np.arange(np.prod(shape)).reshape(shape)
    region = cut("t", shape, selection)
    assert region is not None and region.name == name and region.tensor == "t"
    found = tensor.reshape(region.shape)[region.rows]
    found = found if found.ndim == 1 else found[:, region.columns]
    np.testing.assert_array_equal(found, tensor[selection])
    assert region.cut_shape == tensor[selection].shape


@pytest.mark.parametrize(
    ("shape", "selection"),
    [
        ((6, 4), (slice(0, 6, 4), slice(0, 4))),  # the step does not divide the rows
        ((6, 4), (slice(0, 6, 2), slice(0, 4, 2))),
        ((6, 2, 3), (slice(0, 6), slice(0, 1), slice(0, 3))),
        ((6, 4), (slice(0, 6), 1)),
        ((6,), (slice(0, 6, 2),)),
        ((3,), (1,)),
    ],
)
def test_what_is_no_range_of_rows_and_columns_is_none(shape, selection):
    assert cut("t", shape, selection) is None


@pytest.mark.parametrize(
    ("indices", "expected"),
    [([3], slice(3, 4)), ([2, 3, 4], slice(2, 5)), ([1, 3, 5], slice(1, 6, 2)), ([1, 2, 4], None), ([2, 2], None)],
)
def test_ascending_indices_are_a_slice(indices, expected):
    assert as_slice(np.array(indices)) == expected


def test_regions_that_share_an_entry_overlap():
    q, k = (StoredRegion("t", (6, 4), slice(*rows)) for rows in ((0, 2), (2, 4)))
    wide = StoredRegion("t", (6, 4), slice(1, 3))
    assert not q.overlaps(k) and q.overlaps(wide) and k.overlaps(wide)
    even, odd = (StoredRegion("t", (6, 4), slice(0, 6), slice(first, 4, 2)) for first in (0, 1))
    assert not even.overlaps(odd) and even.overlaps(q) and even.overlaps(even)
    assert q.overlaps(StoredRegion("t", (3, 8), slice(2, 3)))  # cut in another shape: not compared


@pytest.mark.parametrize("shapes", [[(6, 8)], [(6, 8), (12, 4)]])
def test_overlapping_parts_are_those_of_all_comparisons(shapes):
    rng = np.random.default_rng(0)
    regions = {}
    for number in range(40):
        rows, columns = (np.sort(rng.choice(size + 1, 2, replace=False)).tolist() for size in (6, 8))
        shape = shapes[number % len(shapes)]
        regions[f"{rng.random()}"] = StoredRegion("t", shape, slice(*rows), slice(*columns, 1 + number % 2))
    pairs = itertools.combinations(regions, 2)
    expected = [pair for pair in pairs if regions[pair[0]].overlaps(regions[pair[1]])]
    assert overlapping(regions) == expected and 100 < len(expected) < 780


def test_experts_are_not_compared_with_each_other(monkeypatch):
    compared = []
    monkeypatch.setattr(StoredRegion, "overlaps", lambda *pair: compared.append(pair))
    experts = {f"{number}": StoredRegion("t", (600, 8), slice(3 * number, 3 * number + 3)) for number in range(200)}
    halves = {f"{name}.half": StoredRegion("t", (600, 8), region.rows) for name, region in experts.items()}
    assert overlapping(experts) == [] == compared
    assert overlapping(experts | halves) == [] and len(compared) == 200


@pytest.mark.parametrize("case", [case for case in CASES if case != "all"])
def test_the_name_of_a_region_is_read_back(case):
    shape, selection, name = CASES[case]
    assert parse(name, shape) == cut("t", shape, selection)


@pytest.mark.parametrize(
    "name",
    ["t", "t[]", "t[3]", "t[0, 6]", "t[0, 2:9]", "t[0, 2:2]", "t[0, 4:2]", "t[-1]", "t[01]", "t[0,1:2]", "t[0, 1:3:0]",
     "t[0, 0:1, 0:1, 0]", "t[x]", "t[0", "t[0, 0:6]", "t[99999999999]"],
)  # fmt: skip
def test_another_name_is_no_region(name):
    assert parse(name, (3, 6, 4)) is None
