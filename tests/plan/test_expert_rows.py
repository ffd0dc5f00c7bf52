"""Pairs of an expert's rows as pairs of the whole expert, where a base has each expert as a weight of its own."""

from __future__ import annotations

import numpy as np
import pytest

from lora_export import plan, sums
from lora_export.lora import LoraPair
from lora_export.plan import Layout, TensorSpec
from lora_export.plan.expert_rows import with_stacks, with_whole_experts
from support.plans import holding

UP = "m.experts.up"
RNG = np.random.default_rng(0)


def part(rows: int, rank: int, scale: float = 2.0, **more: np.ndarray) -> LoraPair:
    a, b = (RNG.integers(-3, 4, size).astype(np.float32) for size in ((rank, 3), (rows, rank)))
    return LoraPair(a=a, b=b, scale=scale, **more)


def base(layout: Layout = Layout.OUT_IN) -> dict[str, TensorSpec]:
    return {f"{UP}[{number}]": TensorSpec(f"{UP}[{number}]", (6, 3), "float32", layout) for number in range(2)}


PAIRS = {f"{UP}[1, 0:2]": part(2, 1), f"{UP}[1, 2:6]": part(4, 2, 0.5), f"{UP}[0, 2:6]": part(4, 1)}


@pytest.mark.parametrize("layout", [Layout.OUT_IN, Layout.IN_OUT])
def test_each_expert_changes_in_the_rows_of_its_parts(layout: Layout) -> None:
    made = plan.make([holding(pairs=PAIRS)], base(layout).values())
    found = {step.weight: sums.stored_delta(step, slice(None)) for step in made.steps}
    upper, lower, other = (pair.delta() for pair in PAIRS.values())
    np.testing.assert_array_equal(found[f"{UP}[1]"], np.concatenate([upper, lower]))
    np.testing.assert_array_equal(found[f"{UP}[0]"], np.concatenate([np.zeros((2, 3)), other]))


def test_parts_stay_beside_a_stack_or_where_they_do_not_fit() -> None:
    adapter = holding(pairs=PAIRS)
    stack = {UP: TensorSpec(UP, (2, 6, 3), "float32", Layout.OUT_IN)}
    for other in (stack | base(), {}, {f"{UP}[1]": TensorSpec(f"{UP}[1]", (6, 5), "float32", Layout.OUT_IN)}):
        assert with_whole_experts(adapter, other) is adapter
    dora = holding(pairs={f"{UP}[1, 0:2]": part(2, 1, magnitude=np.ones(2))})
    assert with_whole_experts(dora, base()) is dora


def test_experts_that_are_numbered_from_zero_are_a_stack() -> None:
    others = [TensorSpec("m.fc", (2, 3), "float32"), TensorSpec("m.qkv[1]", (2, 3), "float32")]
    found = with_stacks([*base().values(), *others])
    assert [(spec.name, spec.shape) for spec in found[4:]] == [(UP, (2, 6, 3))]
    assert with_stacks(found) == found
