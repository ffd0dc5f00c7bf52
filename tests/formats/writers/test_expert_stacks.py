"""The pairs of experts by projection, whatever the layout that an adapter has them in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lora_export.formats.writers.expert_stacks import expert_stacks
from lora_export.lora import ExpertAxes, LoraPair, expert_name
from support.written import adapter_of, low_rank

E = "model.layers.0.mlp.experts"


def stack(parameter: str, out: int, inner: int, *, count: int = 2) -> dict[str, LoraPair]:
    pairs = [low_rank(out, inner, 2, seed=number, as_stored=True) for number in range(count)]
    return {expert_name(f"{E}.{parameter}", number): pair for number, pair in enumerate(pairs)}


def deltas(pairs: dict[int, LoraPair]) -> list[Any]:
    return [pairs[number].delta().tolist() for number in sorted(pairs)]


def test_single_experts_and_projections_of_all_are_the_same() -> None:
    stacked = stack("up_proj", 4, 3)
    single = {f"{E}.{number}.w3": replace(pair, as_stored=False) for number, pair in enumerate(stacked.values())}
    one = expert_stacks(adapter_of(stacked, experts={f"{E}.up_proj": ExpertAxes.OUT_IN}), ())
    other = expert_stacks(adapter_of(single), ())
    assert deltas(one.stacks[E, "up"]) == deltas(other.stacks[E, "up"])
    assert (one.names[E, "up"], other.names[E, "up"]) == ("up_proj", "w3")
    arrays = other.arrays((E, "up"))
    assert arrays is not None and (arrays[0].shape, arrays[1].shape) == ((2, 2, 3), (2, 4, 2))


@pytest.mark.parametrize(("model", "alternate"), [("qwen3_moe", False), ("gpt_oss", True)])
def test_gate_and_up_are_taken_apart(model: str, alternate: bool) -> None:
    fused = stack("gate_up_proj", 6, 3)
    found = expert_stacks(adapter_of(fused, experts={f"{E}.gate_up_proj": ExpertAxes.OUT_IN}), {model})
    for number, pair in enumerate(fused.values()):
        whole = pair.delta()
        gate, up = (whole[::2], whole[1::2]) if alternate else (whole[:3], whole[3:])
        assert found.stacks[E, "gate"][number].delta().tolist() == gate.tolist()
        assert found.stacks[E, "up"][number].delta().tolist() == up.tolist()


@pytest.mark.parametrize(
    ("axes", "model", "transposed"),
    [
        (ExpertAxes.BY_CLASS, "qwen3_moe", False),
        (ExpertAxes.BY_CLASS, "gpt_oss", False),
        (ExpertAxes.BY_CLASS, "llama4", True),
        (ExpertAxes.TRANSPOSED, "qwen3_moe", True),
        (ExpertAxes.STORED, "gpt_oss", True),
        (ExpertAxes.OUT_IN, "llama4", False),
    ],
)
def test_the_model_decides_how_a_pair_is_turned(axes: ExpertAxes, model: str, transposed: bool) -> None:
    pairs = stack("down_proj", 4, 3, count=1)
    (pair,) = pairs.values()
    found = expert_stacks(adapter_of(pairs, experts={f"{E}.down_proj": axes}), {model})
    expected = pair.delta().T if transposed else pair.delta()
    np.testing.assert_array_equal(found.stacks[E, "down"][0].delta(), expected)


def test_what_is_not_known_is_a_problem() -> None:
    pairs = {
        **stack("down_proj", 4, 3, count=1),
        "bare": low_rank(2, 2, 1, as_stored=True),
        "qkv.weight[0:4]": low_rank(4, 2, 1),
        "fc": low_rank(2, 2, 1),
    }
    found = expert_stacks(adapter_of(pairs, experts={f"{E}.down_proj": ExpertAxes.BY_CLASS}), ())
    assert list(found.plain) == ["fc"]
    assert found.problems == [
        f'{E}.down_proj[0]: how the base stores its experts is not known. State it: base="CHECKPOINT"',
        "bare: the pair of a bare parameter",
        "qkv.weight[0:4]: the pair of a part of a tensor",
    ]
    uneven = {f"{E}.0.w1": low_rank(4, 3, 2), f"{E}.1.w1": low_rank(4, 3, 1), f"{E}.1.w2": low_rank(4, 3, 1)}
    found = expert_stacks(adapter_of(uneven), ())
    assert found.arrays((E, "gate")) is found.arrays((E, "down")) is None
