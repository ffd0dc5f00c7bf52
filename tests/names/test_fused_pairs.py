"""Pairs of some outputs of a fused layer, as one pair."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lora_export.errors import InputRefused
from lora_export.lora import LoraPair
from lora_export.names.fused_pairs import fuse_outputs, joined_outputs, with_outputs


def pair(outputs: int, rank: int = 1, **fields: Any) -> LoraPair:
    rng = np.random.default_rng(outputs)
    a, b = rng.integers(1, 5, (rank, 3)), rng.integers(1, 5, (outputs, rank))
    return LoraPair(a=a, b=b, **{"scale": 2.0, **fields})


def test_outputs_without_a_pair_do_not_change() -> None:
    q, v = pair(2), pair(3, rank=2)
    fused = fuse_outputs({2: v, 0: q}, [2, 1, 3])
    assert fused.delta().tolist() == [*q.delta().tolist(), [0, 0, 0], *v.delta().tolist()]
    assert (fused.rank, fused.magnitude) == (3, None)


def test_magnitudes_of_all_outputs_are_joined() -> None:
    one, other = pair(1, magnitude=np.array([7])), pair(2, magnitude=np.array([8, 9]))
    fused = fuse_outputs({0: one, 1: other}, [1, 2])
    assert fused.magnitude is not None and fused.magnitude.tolist() == [7, 8, 9]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (pair(3), r"B is \(3, 1\), and the base has 2 outputs there"),
        (pair(2, scale=3.0), "different scales or inputs"),
        (pair(2, magnitude=np.ones(2)), "DoRA on some outputs of a fused layer is not supported"),
    ],
)
def test_pairs_that_make_no_layer_are_refused(other: LoraPair, message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        fuse_outputs({0: pair(1), 1: other}, [1, 2])


def test_outputs_are_reordered_with_their_magnitudes() -> None:
    before = pair(3, magnitude=np.array([5, 6, 7]))
    after = with_outputs(before, np.array([2, 0, 1]))
    assert after.delta().tolist() == before.delta()[[2, 0, 1]].tolist()
    assert after.magnitude is not None and after.magnitude.tolist() == [7, 5, 6]


def test_a_scale_that_is_a_power_of_two_apart_moves_into_b() -> None:
    one, other = pair(2, scale=3.0), pair(3, rank=2, scale=0.75)
    fused = fuse_outputs({0: one, 1: other}, [2, 3])
    assert fused.scale == 3.0
    assert np.array_equal(fused.delta(), np.concatenate([one.delta(), other.delta()]))


def test_one_a_is_kept_where_every_output_has_it() -> None:
    one = pair(2, rank=2, magnitude=np.array([5, 6]))
    other = LoraPair(a=one.a, b=pair(3, rank=2).b, scale=one.scale, magnitude=np.array([7, 8, 9]))
    joined = joined_outputs({0: one, 1: other}, [2, 3])
    assert joined.rank == 2 and np.array_equal(joined.delta(), np.concatenate([one.delta(), other.delta()]))
    assert joined.magnitude is not None and joined.magnitude.tolist() == [5, 6, 7, 8, 9]
    assert joined_outputs({0: one, 1: pair(3, rank=2, magnitude=np.ones(3))}, [2, 3]).rank == 4
    plain = LoraPair(a=one.a, b=one.b, scale=one.scale)
    assert joined_outputs({1: plain}, [3, 2]).delta().tolist() == [[0.0] * 3] * 3 + plain.delta().tolist()
