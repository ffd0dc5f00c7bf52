"""A and B of many experts, in the layouts of their trainers, and by projection. Each pair is written out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lora_export.errors import InputRefused
from lora_export.formats import expert_layouts
from lora_export.formats.expert_layouts import REGISTRATION_ORDER, BLayout, expert_stacks
from lora_export.lora import ExpertAxes, LoraPair, expert_name
from support.stacked_parameters import classes_of_experts
from support.written import adapter_of, low_rank

# Two experts of rank 2, (out 1, in 1): A = [1, 2] and [3, 4], B = [5, 6] and [7, 8].
FLAT_A = np.array([[1.0], [2], [3], [4]])
FLAT_B = {BLayout.RANK_MAJOR: np.array([[5.0, 7, 6, 8]]), BLayout.GROUPED_BY_EXPERT: np.array([[5.0, 6, 7, 8]])}


@pytest.mark.parametrize("layout", BLayout)
def test_flat_pairs_are_those_of_the_experts(layout):
    one, other = expert_layouts.flat_pairs(FLAT_A, FLAT_B[layout], 2, 10.0, layout)
    assert one.a.tolist() == [[1], [2]] and one.b.tolist() == [[5, 6]]
    assert other.a.tolist() == [[3], [4]] and other.b.tolist() == [[7, 8]]
    assert one.delta().tolist() == [[170]] and other.delta().tolist() == [[530]]
    assert one.as_stored and other.as_stored


def test_stacked_pairs_share_a_factor_of_which_there_is_one():
    a, b = np.array([[[1.0, 2]]]), np.array([[[3.0]], [[4]]])
    assert [pair.delta().tolist() for pair in expert_layouts.stacked_pairs(a, b, 1.0)] == [[[3, 6]], [[4, 8]]]
    shared = expert_layouts.stacked_pairs(b, np.array([[[5.0], [6]]]), 1.0)
    assert [pair.delta().tolist() for pair in shared] == [[[15], [18]], [[20], [24]]]


@pytest.mark.parametrize(
    ("a", "b", "rank", "expected"),
    [((8, 3), (5, 8), 2, True), ((2, 3), (5, 2), 2, False), ((7, 3), (5, 7), 2, False), ((8, 3), (5, 6), 2, False)],
)
def test_flat_factors_have_several_times_the_rank(a, b, rank, expected):
    assert expert_layouts.is_flat(np.ones(a), np.ones(b), rank) is expected


@pytest.mark.parametrize(
    ("module", "a", "b", "expected"),
    [
        ("mlp.experts.w1", (4, 2, 3), (4, 5, 2), True),
        ("mlp.experts.w1", (1, 2, 3), (4, 5, 2), True),
        ("mlp.experts.w1", (4, 2, 3), (1, 5, 2), True),
        ("mlp.experts.w1", (4, 2, 3), (3, 5, 2), False),
        ("mlp.experts.w1", (4, 2, 3), (4, 5, 3), False),
        ("conv", (4, 2, 1), (4, 4, 1), False),
        ("mlp.experts_of_art.w1", (4, 2, 3), (4, 5, 2), False),
    ],
)
def test_stacked_factors_are_inside_of_experts(module, a, b, expected):
    assert expert_layouts.is_stacked(module, np.ones(a), np.ones(b)) is expected


@pytest.mark.parametrize(
    ("version", "axes"),
    [
        ("0.17.1", ExpertAxes.TRANSPOSED),
        ("0.18.0", ExpertAxes.TRANSPOSED),
        ("0.19.0", ExpertAxes.BY_CLASS),
        ("0.21.2", ExpertAxes.BY_CLASS),
        ("1.0.0.dev0", ExpertAxes.BY_CLASS),
        ("main", ExpertAxes.UNKNOWN),
        (None, ExpertAxes.UNKNOWN),
    ],
)
def test_the_axes_follow_from_the_version_of_peft(version, axes):
    assert expert_layouts.flat_axes({"peft_version": version}) is axes


UNSLOTH = {
    "auto_mapping": {"unsloth_fixed": True, "parent_library": "transformers.models.qwen3_moe.modeling_qwen3_moe"}
}
OTHER_FAMILY = {"auto_mapping": {"unsloth_fixed": True, "parent_library": "transformers.models.phimoe.modeling_phimoe"}}
BY_PARAMETER = {"unsloth_fused_expert_lora": {"parameters": {"experts.up": {"lora_B_layout": "grouped_by_expert"}}}}


@pytest.mark.parametrize(
    ("config", "stated", "layout"),
    [
        ({}, "", "rank_major"),
        (OTHER_FAMILY, "", "rank_major"),
        ({"lora_B_layout": "grouped_by_expert"}, "", "grouped_by_expert"),
        ({"lora_B_layout": "grouped_by_expert"}, "grouped_by_expert", "grouped_by_expert"),
        (BY_PARAMETER, "", "grouped_by_expert"),
        ({**BY_PARAMETER, **UNSLOTH}, "", "grouped_by_expert"),
        (UNSLOTH, "grouped_by_expert", "grouped_by_expert"),
        (UNSLOTH, "rank_major", "rank_major"),
        ({"unsloth_fused_expert_lora": {"parameters": {"down": {"lora_B_layout": "x"}}}}, "", "rank_major"),
        ({"unsloth_fused_expert_lora": [1]}, "", "rank_major"),
    ],
)
def test_the_order_of_b_is_recorded_or_stated(config, stated, layout):
    assert expert_layouts.b_layout("mlp.experts.up", config, stated) == layout


@pytest.mark.parametrize(
    ("config", "stated", "message"),
    [
        (UNSLOTH, "", 'moe_b_layout="grouped_by_expert" or moe_b_layout="rank_major"'),
        ({"auto_mapping": {"unsloth_fixed": True}}, "", "does not record the order of the columns of B"),
        ({"lora_B_layout": "rank_major"}, "grouped_by_expert", "but adapter_config.json records rank_major"),
        ({"lora_B_layout": ["rank_major"]}, "", r"lora_B_layout is \['rank_major'\]; it must be rank_major or grouped"),
    ],
)
def test_an_order_of_b_that_is_not_certain_is_refused(config, stated, message):
    with pytest.raises(InputRefused, match=message):
        expert_layouts.b_layout("mlp.experts.up", config, stated)


@pytest.mark.parametrize(
    ("targeted", "count", "expected"),
    [
        (["down_proj", "gate_up_proj"], 2, ["m.gate_up_proj", "m.down_proj"]),
        (["down_proj", "up_proj", "gate_proj"], 3, ["m.gate_proj", "m.up_proj", "m.down_proj"]),
        (["kernel"], 1, ["m.kernel"]),
        (["up_proj", "kernel"], 2, None),
        (["up_proj", "down_proj"], 1, None),
        (["up_proj"], 2, None),
    ],
)
def test_nested_pairs_are_in_the_order_of_registration(targeted, count, expected):
    assert expert_layouts.nested_parameters("m", targeted, count) == expected


def test_all_classes_of_transformers_register_their_parameters_in_this_order():
    found = [one for one in classes_of_experts() if len(one.parameters) > 1]
    assert len(found) > 60
    for one in found:
        assert set(one.parameters) <= set(REGISTRATION_ORDER), one
        assert list(one.parameters) == sorted(one.parameters, key=REGISTRATION_ORDER.index), one


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
    ((owner, kind, pairs),) = other.whole()
    assert (owner, kind) == (E, "up")
    assert [factor.shape for factor in expert_layouts.stacked_factors(pairs)] == [(2, 2, 3), (2, 4, 2)]


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
    assert list(found.whole()) == []
    assert found.problems == [f"{E}: experts of different shapes, ranks or scales, or without a pair"] * 2
