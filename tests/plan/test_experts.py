"""Pairs of experts as a base has them. Products are compared by their values."""

from __future__ import annotations

import numpy as np
import pytest

from lora_export import plan, sums
from lora_export.errors import InputRefused
from lora_export.lora import Adapter, ExpertAxes, LoraPair, expert_name
from lora_export.plan import Layout, TensorSpec
from lora_export.plan.experts import per_expert, turned, with_stacks, with_whole_experts
from support.plans import holding
from support.spellings import EXPERTS, MIXTRAL, experts

# --- As stored, or transposed ---

SQUARE = np.array([[1.0], [2]]), np.array([[3.0, 4]])  # B (2, 1), A (1, 2)
TALL = np.array([[1.0], [2], [5]]), np.array([[3.0, 4]])  # B (3, 1), A (1, 2)
UP, DOWN = "m.experts.up_proj", "m.experts.down_proj"


def stacked(axes: ExpertAxes, count: int = 2, **factors: tuple[np.ndarray, np.ndarray]) -> Adapter:
    """Pairs of `count` experts of the parameters up_proj and down_proj. Expert e has the scale e + 1."""
    names = {f"m.experts.{name}": pair for name, pair in factors.items()}
    pairs = {
        expert_name(name, expert): LoraPair(a=a, b=b, scale=expert + 1.0, as_stored=True)
        for name, (b, a) in names.items()
        for expert in range(count)
    }
    return Adapter("ad", "peft", pairs, experts=dict.fromkeys(names, axes))


def products(adapter: Adapter, parameter: str) -> list[list[list[float]]]:
    return [adapter.pairs[expert_name(parameter, expert)].delta().tolist() for expert in range(2)]


AS_STORED = [[[3, 4], [6, 8]], [[6, 8], [12, 16]]]
TRANSPOSED = [[[3, 6], [4, 8]], [[6, 12], [8, 16]]]


@pytest.mark.parametrize(
    ("axes", "types", "expected"),
    [
        (ExpertAxes.STORED, set(), AS_STORED),
        (ExpertAxes.TRANSPOSED, set(), TRANSPOSED),
        (ExpertAxes.BY_CLASS, {"mixtral"}, AS_STORED),
        (ExpertAxes.BY_CLASS, {"gpt_oss"}, TRANSPOSED),
        (ExpertAxes.BY_CLASS, {"llama4", "llama4_text"}, AS_STORED),
        (ExpertAxes.OUT_IN, {"mixtral"}, AS_STORED),
        (ExpertAxes.OUT_IN, {"gpt_oss"}, TRANSPOSED),
        (ExpertAxes.OUT_IN, {"llama4_text"}, TRANSPOSED),
    ],
)
def test_square_experts_follow_the_record_and_the_class(axes, types, expected):
    found, misfits = turned(stacked(axes, up_proj=SQUARE), {UP: (2, 2, 2)}.get, types)
    assert (products(found, UP), misfits, dict(found.experts)) == (expected, [], {})


@pytest.mark.parametrize(("shape", "expected"), [((2, 3, 2), [[3, 4], [6, 8], [15, 20]]), ((2, 2, 3), None)])
def test_the_shape_decides_where_an_expert_is_not_square(shape, expected):
    found, _ = turned(stacked(ExpertAxes.UNKNOWN, up_proj=TALL), {UP: shape}.get, ())
    assert products(found, UP)[0] == (expected or [[3, 6, 15], [4, 8, 20]])


@pytest.mark.parametrize(("shape", "expected"), [((2, 3, 2), AS_STORED), ((2, 2, 3), TRANSPOSED)])
def test_a_square_parameter_follows_another_one_of_its_module(shape, expected):
    adapter = stacked(ExpertAxes.BY_CLASS, up_proj=TALL, down_proj=SQUARE)
    found, _ = turned(adapter, {UP: shape, DOWN: (2, 2, 2)}.get, {"mixtral"})
    assert products(found, DOWN) == expected


@pytest.mark.parametrize(
    ("axes", "types", "message"),
    [
        (ExpertAxes.UNKNOWN, {"mixtral"}, "the adapter records no peft_version"),
        (ExpertAxes.BY_CLASS, set(), "the base has no config with a model_type"),
        (ExpertAxes.OUT_IN, set(), "the base has no config with a model_type"),
    ],
)
def test_square_experts_without_a_record_are_refused(axes, types, message):
    with pytest.raises(InputRefused, match=f"{UP} of ad: each expert is a square matrix, and {message}"):
        turned(stacked(axes, up_proj=SQUARE), {UP: (2, 2, 2)}.get, types)


@pytest.mark.parametrize("shape", [(3, 2, 2), (1, 2, 2), (2, 2)])
def test_another_number_of_experts_is_a_misfit(shape):
    found, (misfit,) = turned(stacked(ExpertAxes.STORED, up_proj=SQUARE), {UP: shape}.get, ())
    assert str(misfit.problem) == f"the adapter was trained on 2 experts, and {UP} is {shape} in the base"
    assert not found.pairs


def test_a_parameter_that_the_base_lacks_keeps_its_pairs():
    adapter = stacked(ExpertAxes.STORED, up_proj=SQUARE)
    found, misfits = turned(adapter, {}.get, ())
    assert (found.pairs.keys(), misfits) == (adapter.pairs.keys(), [])


def test_the_pair_of_a_bare_parameter_is_that_of_its_only_expert():
    b, a = SQUARE
    adapter = Adapter("ad", "peft", {UP: LoraPair(a=a, b=b, scale=1, as_stored=True)}, layouts={UP: "out_in"})
    found, _ = turned(adapter, {UP: (1, 2, 2)}.get, ())
    assert (list(found.pairs), dict(found.layouts)) == ([f"{UP}[0]"], {})
    unchanged, _ = turned(adapter, {UP: (2, 2)}.get, ())
    assert list(unchanged.pairs) == [UP]


# --- Stacked pairs of one projection ---


def projections(*parameters: str, axes: ExpertAxes = ExpertAxes.OUT_IN) -> Adapter:
    pair = LoraPair(a=np.ones((1, 2)), b=np.ones((3, 1)), scale=1.0, as_stored=True)
    pairs = {f"{parameter}[{expert}]": pair for parameter in parameters for expert in range(2)}
    return Adapter(
        "ad", "peft", {**pairs, "fc": pair}, experts=dict.fromkeys(parameters, axes), spelling={parameters[0]: "key"}
    )


def test_each_family_of_names_is_tried():
    mixtral, others = per_expert(projections("m.experts.w1", "m.experts.down_proj"))
    assert list(mixtral.pairs) == ["m.experts.0.w1", "m.experts.1.w1", "m.experts.0.w2", "m.experts.1.w2", "fc"]
    assert list(others.pairs)[1:3] == ["m.experts.1.gate_proj", "m.experts.0.down_proj"]
    assert not mixtral.pairs["m.experts.0.w1"].as_stored and mixtral.pairs["fc"].as_stored
    assert mixtral.spelled("m.experts.1.w1") == "key" and not mixtral.experts


def test_a_stacked_parameter_is_no_projection():
    assert not list(per_expert(projections("m.experts.gate_up_proj")))
    assert not list(per_expert(projections("m.experts.down_proj", axes=ExpertAxes.BY_CLASS)))
    (kept, _) = per_expert(projections("m.experts.w3", "m.experts.gate_up_proj"))
    assert list(kept.experts) == ["m.experts.gate_up_proj"] and "m.experts.gate_up_proj[0]" in kept.pairs


# --- Rows of an expert ---

ROWS = "m.experts.up"
RNG = np.random.default_rng(0)


def part(rows: int, rank: int, scale: float = 2.0, **more: np.ndarray) -> LoraPair:
    a, b = (RNG.integers(-3, 4, size).astype(np.float32) for size in ((rank, 3), (rows, rank)))
    return LoraPair(a=a, b=b, scale=scale, **more)


def base(layout: Layout = Layout.OUT_IN) -> dict[str, TensorSpec]:
    return {f"{ROWS}[{number}]": TensorSpec(f"{ROWS}[{number}]", (6, 3), "float32", layout) for number in range(2)}


PAIRS = {f"{ROWS}[1, 0:2]": part(2, 1), f"{ROWS}[1, 2:6]": part(4, 2, 0.5), f"{ROWS}[0, 2:6]": part(4, 1)}


@pytest.mark.parametrize("layout", [Layout.OUT_IN, Layout.IN_OUT])
def test_each_expert_changes_in_the_rows_of_its_parts(layout: Layout) -> None:
    made = plan.make([holding(pairs=PAIRS)], base(layout).values())
    found = {step.weight: sums.stored_delta(step, slice(None)) for step in made.steps}
    upper, lower, other = (pair.delta() for pair in PAIRS.values())
    np.testing.assert_array_equal(found[f"{ROWS}[1]"], np.concatenate([upper, lower]))
    np.testing.assert_array_equal(found[f"{ROWS}[0]"], np.concatenate([np.zeros((2, 3)), other]))


def test_parts_stay_beside_a_stack_or_where_they_do_not_fit() -> None:
    adapter = holding(pairs=PAIRS)
    stack = {ROWS: TensorSpec(ROWS, (2, 6, 3), "float32", Layout.OUT_IN)}
    for other in (stack | base(), {}, {f"{ROWS}[1]": TensorSpec(f"{ROWS}[1]", (6, 5), "float32", Layout.OUT_IN)}):
        assert with_whole_experts(adapter, other) is adapter
    dora = holding(pairs={f"{ROWS}[1, 0:2]": part(2, 1, magnitude=np.ones(2))})
    assert with_whole_experts(dora, base()) is dora


def test_experts_that_are_numbered_from_zero_are_a_stack() -> None:
    others = [TensorSpec("m.fc", (2, 3), "float32"), TensorSpec("m.qkv[1]", (2, 3), "float32")]
    found = with_stacks([*base().values(), *others])
    assert [(spec.name, spec.shape) for spec in found[4:]] == [(ROWS, (2, 6, 3))]
    assert with_stacks(found) == found


def test_pairs_of_some_experts_change_their_parts_alone() -> None:
    pairs, stacked = experts()
    some = {name: each for name, each in pairs.items() if name.endswith(("2.w1", "0.w2"))}
    made = plan.make([holding(pairs=some)], stacked, rules=MIXTRAL)
    assert {step.weight for step in made.steps} == {
        "model.layers.0.mlp.experts.gate_up_proj[2, 0:2]",
        "model.layers.0.mlp.experts.down_proj[0]",
    }
    for step in made.steps:
        name = "2.w1" if "gate" in step.weight else "0.w2"
        np.testing.assert_array_equal(sums.delta(step), pairs[f"{EXPERTS}.{name}"].delta())
