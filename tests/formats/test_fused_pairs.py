"""Pairs of some outputs of a fused layer, as one pair."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lora_export.errors import InputRefused
from lora_export.formats.fused_pairs import fuse_outputs, with_outputs
from lora_export.lora import LoraPair


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
        (pair(2, scale=1.0), "different scales or inputs"),
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
