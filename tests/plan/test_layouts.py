"""Layouts that the base does not state: the shape, the option or the adapter determines them."""

from __future__ import annotations

import numpy as np
import pytest

from lora_export import plan
from lora_export.errors import InputRefused
from lora_export.lora import Adapter, LoraPair
from lora_export.plan import Layout, Plan
from support.plans import adapter, holding, matrix, pair, square, unknown, vector


def recording(layout: str, name: str = "mine", **pairs: LoraPair) -> Adapter:
    return holding(name, pairs=pairs, layouts=dict.fromkeys(pairs, layout))


def settled(made: Plan) -> dict[str, tuple[str, str]]:
    return {step.weight: (step.spec.layout, step.spec.layout_source) for step in made.steps}


@pytest.mark.parametrize(("shape", "layout"), [((2, 3), "out_in"), ((3, 2), "in_out")])
def test_a_shape_that_fits_one_layout_decides_it(shape, layout):
    made = plan.make([adapter(fc=pair())], [unknown("fc.weight", *shape)])
    assert settled(made) == {"fc.weight": (layout, "shape")}
    assert made.steps[0].spec.matrix == (2, 3)
    assert f"{shape[0]} x {shape[1]} float32, {layout} by shape" in str(made)


def test_a_square_matrix_of_unknown_layout_is_refused_by_name():
    base = [unknown(f"h.{layer}.mix.weight") for layer in range(5)]
    one = holding(pairs={f"h.{layer}.mix": square() for layer in range(5)})
    with pytest.raises(InputRefused) as refused:
        plan.make([one], base)
    assert str(refused.value).startswith(
        "the layout of 5 square matrices is unknown: h.0.mix.weight, h.1.mix.weight, h.2.mix.weight and 2 more. "
    )
    assert 'layout={"NAME": "out_in"} or layout={"NAME": "in_out"}' in str(refused.value)
    assert {layout for layout, _ in settled(plan.make([one], base, unknown_layout_ok=True)).values()} == {"unknown"}


@pytest.mark.parametrize("pattern", ["a.fc.weight", "a.fc", "a.*", "*"])
def test_the_option_decides_by_tensor_module_or_glob(pattern):
    base = [unknown("a.fc.weight")]
    made = plan.make([holding(pairs={"a.fc": square()})], base, layout={pattern: "in_out"})
    assert settled(made) == {"a.fc.weight": ("in_out", "option")}
    assert "in_out by option" in str(made)


def test_the_last_statement_that_matches_counts():
    one, base = adapter(a=square(), b=square()), [unknown("a.weight"), unknown("b.weight")]
    made = plan.make([one], base, layout={"*": "out_in", "b": "in_out"})
    assert settled(made) == {"a.weight": ("out_in", "option"), "b.weight": ("in_out", "option")}
    made = plan.make([one], base, layout={"b": "in_out", "*": "out_in"})
    assert {layout for layout, _ in settled(made).values()} == {"out_in"}


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_the_record_of_an_adapter_decides(layout):
    assert settled(plan.make([recording(layout, fc=square())], [unknown("fc.weight")])) == {
        "fc.weight": (layout, "adapter")
    }


def test_a_record_that_a_shape_contradicts_is_no_evidence():
    # One `fan_in_fan_out` for a Conv1D and an nn.Linear.
    one = recording("in_out", fc=square(), dense=pair())
    with pytest.raises(InputRefused, match=r"the layout of 1 square matrix is unknown: fc\.weight"):
        plan.make([one], [unknown("fc.weight"), unknown("dense.weight", 2, 3)])
    made = plan.make([one], [unknown("fc.weight"), unknown("dense.weight", 3, 2)])
    assert settled(made)["fc.weight"] == ("in_out", "adapter")


def test_two_records_that_contradict_each_other_are_no_evidence():
    two = [recording("in_out", "one", fc=square()), recording("out_in", "two", fc=square())]
    with pytest.raises(InputRefused, match=r"the layout of 1 square matrix is unknown: fc\.weight"):
        plan.make(two, [unknown("fc.weight")])


@pytest.mark.parametrize(
    ("module", "beside", "decided"),
    [
        ("h.0.fc", [], ("out_in", "name")),  # an nn.Linear in transformers, and a layer of a stack
        ("fc", [], None),  # no layer of a stack
        ("pooler.dense", [unknown("h.0.fc.weight", 2, 3)], ("out_in", "name")),  # beside a stack
        ("pooler.mix", [unknown("h.0.fc.weight", 2, 3)], None),
        ("h.0.mix", [], None),  # a name that transformers does not have
        ("h.0.c_proj", [], None),  # GPT-2's, and that of an nn.Linear in StarCoder2
        ("h.0.fc", [unknown("wide.weight", 2, 3), vector("wide.bias", 3)], None),  # a Conv1D that is none of GPT-2's
        ("h.0.fc", [unknown("wide.weight", 2, 3)], ("out_in", "name")),  # without a bias it shows nothing
        ("h.0.mix", [unknown("h.1.mix.weight", 2, 3), vector("h.1.mix.bias", 3)], ("in_out", "siblings")),
        ("h.0.mix", [unknown("h.1.mix.weight", 2, 3), vector("h.1.mix.bias", 2)], ("out_in", "siblings")),
        ("h.0.c_proj", [unknown("h.0.c_attn.weight", 2, 6), vector("h.0.c_attn.bias", 6)], ("in_out", "siblings")),
        ("h.0.fc", [unknown("h.1.fc.weight", 2, 3), vector("h.1.fc.bias", 3)], ("in_out", "siblings")),  # a Conv1D
        ("net.0", [unknown("net.2.weight", 2, 3), vector("net.2.bias", 3)], None),  # numbers are no names
        ("a.1.0", [unknown("a.2.0.weight", 2, 3), vector("a.2.0.bias", 3)], ("in_out", "siblings")),
    ],
)
def test_names_and_other_matrices_decide(module, beside, decided):
    base = [unknown(f"{module}.weight"), *beside]
    one = holding(pairs={module: square()})
    if decided is None:
        with pytest.raises(InputRefused, match=r"the layout of 1 square matrix is unknown"):
            plan.make([one], base)
        return
    made = plan.make([one], base)
    assert settled(made) == {f"{module}.weight": decided}
    (note,) = [note for note in made.notes if "taken as stored" in note]
    assert f"1 square matrix is taken as stored {decided[0]} " in note and f"such as {module}.weight." in note
    other = {"out_in": "in_out", "in_out": "out_in"}[decided[0]]
    assert settled(plan.make([one], base, layout={"*": other})) == {f"{module}.weight": (other, "option")}


def test_the_option_overrides_the_record_of_an_adapter():
    made = plan.make([recording("in_out", fc=square())], [unknown("fc.weight")], layout={"fc": "out_in"})
    assert settled(made) == {"fc.weight": ("out_in", "option")}


@pytest.mark.parametrize(
    ("spec", "layout", "message"),
    [
        (unknown("fc.weight", 2, 3), "in_out", "in_out, but with the shape (2, 3), the adapter's is out_in"),
        (matrix("fc.weight", layout=Layout.MATRIX), "in_out", "in_out, but the base's is out_in"),
        (matrix("fc.weight", 3, 2, layout=Layout.IN_OUT), "out_in", "out_in, but the base's is in_out"),
    ],
)
def test_an_option_that_contradicts_the_base_is_refused(spec, layout, message):
    with pytest.raises(InputRefused) as refused:
        plan.make([adapter(fc=pair())], [spec], layout={"*": layout})
    assert str(refused.value) == f"layout= states that fc.weight is {message}"


def test_an_option_for_no_matrix_is_refused():
    with pytest.raises(InputRefused, match=r'layout=\{"fd": "out_in"\}: no matrix of the base has this name'):
        plan.make([adapter(fc=square())], [unknown("fc.weight"), vector("fd")], layout={"fd": "out_in"})


def test_an_embedding_of_unknown_layout_is_one_by_its_pair():
    one = adapter(emb=LoraPair(np.ones((1, 2)), np.ones((2, 1)), 1.0, embedding=True))
    for layout in ({}, {"*": "out_in"}, {"*": "in_out"}):
        assert settled(plan.make([one], [unknown("emb.weight")], layout=layout)) == {
            "emb.weight": ("embedding", "base")
        }
