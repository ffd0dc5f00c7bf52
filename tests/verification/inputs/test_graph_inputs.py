"""Inputs made for a graph without a model, and inputs read from the user's file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from lora_export.errors import InputRefused
from lora_export.verification.inputs.graph_inputs import CASES, GraphSizes, InputGenerator, read
from support.graphs import a_graph

TEXT = """
text (int64[batch, sequence] input_ids, int64[batch, sequence] attention_mask, int32[batch, sequence] token_type_ids)
    => (float[batch, sequence, 3] y) <float[50, 3] words = {0}, float[2, 3] kinds = {0}> {
    found = Gather(words, input_ids)
    wide = Cast<to: int = 7>(token_type_ids)
    kind = Gather(kinds, wide)
    y = Add(found, kind)
}
"""
CACHED = """
cached (int64[b, s] input_ids, int64[b, total] attention_mask, int64[b, s] position_ids,
        float[b, 2, past, 8] past_key_values_0, float16[b, 2, past, 8] past_key_values_1)
    => (float[b, s, 3] y) <float[50, 3] words = {0}> { y = Gather(words, input_ids) }
"""


def test_ids_are_below_their_tables_rows_and_odd_rows_padded() -> None:
    generator = InputGenerator(a_graph(TEXT), "text.onnx")
    seen = set()
    for number, sizes in enumerate(CASES):
        made = generator.make(sizes, seed=number)
        assert {name: (array.dtype.name, array.shape) for name, array in made.items()} == {
            "input_ids": ("int64", sizes[:2]),
            "attention_mask": ("int64", sizes[:2]),
            "token_type_ids": ("int32", sizes[:2]),
        }
        assert made["input_ids"].min() >= 0 and made["input_ids"].max() < 50
        seen |= set(made["token_type_ids"].flat)
        mask = made["attention_mask"]
        assert mask[:, 0].all() and (np.diff(mask) <= 0).all()  # ones, then zeros
        assert not mask[1::2, -1].any()
        assert sizes.batch > 1 or (mask.all() and not made["token_type_ids"].any())
    assert seen == {0, 1}
    assert len({sizes.length for sizes in CASES}) == 3 and 1 in {sizes.batch for sizes in CASES}


def test_inputs_are_repeatable_and_differ_by_seed() -> None:
    generator = InputGenerator(a_graph(TEXT), "text.onnx")
    one, again, other = (generator.make(CASES[1], seed=seed)["input_ids"] for seed in (1, 1, 2))
    assert np.array_equal(one, again) and not np.array_equal(one, other)


def test_mask_covers_the_cache_and_positions_continue_it() -> None:
    generator = InputGenerator(a_graph(CACHED), "cached.onnx")
    made = generator.make(GraphSizes(3, 4, 5), seed=0)
    assert made["input_ids"].shape == (3, 4) and made["attention_mask"].shape == (3, 9)
    assert made["past_key_values_0"].shape == (3, 2, 5, 8) and made["past_key_values_0"].any()
    assert made["past_key_values_1"].dtype == np.float16
    assert made["attention_mask"][:, :5].all() and not made["attention_mask"][1, -1]
    assert made["position_ids"][1].tolist() == [5, 6, 6, 6], "padding is not counted"
    assert generator.alternatives(GraphSizes(3, 4, 5)) == [
        GraphSizes(3, 4, 5),
        GraphSizes(3, 1, 5),
        GraphSizes(3, 4, 0),
    ]
    empty = generator.make(GraphSizes(3, 4, 0), seed=0)
    assert empty["past_key_values_0"].shape == (3, 2, 0, 8) and empty["attention_mask"].shape == (3, 4)
    assert InputGenerator(a_graph(TEXT), "text.onnx").alternatives(GraphSizes(3, 4, 5)) == [
        GraphSizes(3, 4, 5)
    ]  # no cache


def test_cache_branch_flag_and_four_dimensional_mask() -> None:
    text = CACHED.replace(
        "int64[b, total] attention_mask", "bool[b, 1, s, total] attention_mask, bool[1] use_cache_branch"
    )
    generator = InputGenerator(a_graph(text), "cached.onnx")
    made, empty = (generator.make(GraphSizes(3, 4, past), seed=0) for past in (5, 0))
    assert made["use_cache_branch"].tolist() == [True] and empty["use_cache_branch"].tolist() == [False]
    mask = made["attention_mask"]
    assert mask.dtype == bool and mask.shape == (3, 1, 4, 9)
    flat = InputGenerator(a_graph(CACHED), "cached.onnx").make(GraphSizes(3, 4, 5), seed=0)["attention_mask"]
    assert (mask == flat.astype(bool)[:, None, None]).all() and not mask.all()


def test_redraw_varies_every_input() -> None:
    generator = InputGenerator(a_graph(CACHED), "cached.onnx")
    before = generator.make(GraphSizes(3, 16, 5), seed=0)
    fresh = generator.redraw(GraphSizes(3, 16, 5), before, seed=1)
    assert set(fresh) == set(before)
    assert not [name for name, array in fresh.items() if np.array_equal(array, before[name])]
    assert {name: array.shape for name, array in fresh.items()} == {name: before[name].shape for name in fresh}


def test_head_size_comes_from_the_operator_reading_the_cache() -> None:
    model = a_graph("""
        g (float[b, s, 64] x, float[b, 2, past, head] past_key) => (float[b, s, 64] y) { y = Add(x, x) }
    """)
    (node,) = model.graph
    cache = model.graph.inputs[1]
    node.resize_inputs(3)
    node.replace_input_with(1, None)
    node.replace_input_with(2, cache)
    node.attributes["num_heads"], node.attributes["kv_num_heads"] = ir.AttrInt64("num_heads", 4), ir.AttrInt64("kv", 2)
    made = InputGenerator(model, "g").make(GraphSizes(1, 3, 5), seed=0)
    assert made["past_key"].shape == (1, 2, 5, 64 // (4 + 2 * 2))


def without_shapes(present: str) -> ir.Model:
    """A graph as onnxruntime-genai's builder makes it, without the shapes of what is between its nodes."""
    model = a_graph(f"""
        g (int64[b, s] input_ids, float[b, groups, past, head] past_key)
        => (float[b, s, 3] y, float[{present}] present_key)
        <float[50, 64] words = {{0}}, float[64, 3] weight = {{0}}>
        {{ x = Gather (words, input_ids) present_key = Concat <axis = 2> (past_key, past_key)
           attended = Add (x, x) y = MatMul (attended, weight) }}
    """)
    (node,) = (node for node in model.graph if node.op_type == "Add")
    node.resize_inputs(4)
    node.replace_input_with(3, model.graph.inputs[1])
    node.attributes["num_heads"], node.attributes["kv_num_heads"] = ir.AttrInt64("num_heads", 4), ir.AttrInt64("kv", 2)
    return model


def test_sizes_of_a_cache_come_from_what_reads_the_attention() -> None:
    made = InputGenerator(without_shapes("b, groups, all, head"), "g").make(GraphSizes(1, 3, 5), seed=0)
    assert made["past_key"].shape == (1, 2, 5, 64 // 4)


def test_sizes_of_a_cache_come_from_what_is_returned() -> None:
    model = without_shapes("b, 3, all, 7")
    for node in model.graph:
        node.attributes.pop("num_heads", None)
    made = InputGenerator(model, "g").make(GraphSizes(1, 3, 5), seed=0)
    assert made["past_key"].shape == (1, 3, 5, 7)


LLAMA = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (LLAMA, (2, 8)),
        ({"text_config": LLAMA | {"head_dim": 5}}, (2, 5)),
        ({"num_attention_heads": 8, "hidden_size": 64}, (8, 8)),
        ({"num_attention_heads": 8}, (5, 5)),  # as any other symbol's size
    ],
)
def test_sizes_of_a_cache_come_from_the_config(config: dict[str, object], sizes: tuple[int, int]) -> None:
    model = without_shapes("b, groups, all, head")
    for node in model.graph:
        node.attributes.pop("num_heads", None)
    made = InputGenerator(model, "g", config).make(GraphSizes(1, 3, 5), seed=0)
    assert made["past_key"].shape[1::2] == sizes
    with pytest.raises(InputRefused, match="num_attention_heads is '8'; it must be a positive integer"):
        InputGenerator(model, "g", config | {"num_attention_heads": "8", "text_config": None})


def test_fixed_sizes_hold_and_unnamed_sizes_match_by_axis() -> None:
    model = a_graph("g (float[2, n] x, float[2, 3] y) => (float[2, n] z) { z = Identity(x) }")
    model.graph.inputs[0].shape = ir.Shape([2, None])
    made = InputGenerator(model, "g").make(CASES[1], seed=0)
    assert made["x"].shape == (2, CASES[1].length) and made["y"].shape == (2, 3)


@pytest.mark.parametrize(
    ("declared", "problem"),
    [
        ("int64[n] lengths", r"the valid values of lengths \(int64 \[n\]\) are unknown"),
        ("bool[n] flags", "the valid values of flags"),
        ("int64[n] past_lengths", "the valid values of past_lengths"),
        ("string[n] words", "the valid values of words"),
    ],
)
def test_inputs_with_unknown_values_are_refused_with_a_remedy(declared: str, problem: str) -> None:
    model = a_graph(f"g ({declared}, float[n] x) => (float[n] y) {{ y = Identity(x) }}")
    with pytest.raises(InputRefused, match=rf'{problem}.*Give inputs: inputs="FILE.npz", with an array for each of'):
        InputGenerator(model, "g.onnx")


def test_user_inputs_must_be_exactly_the_graphs_inputs(tmp_path: Path) -> None:
    model = a_graph(TEXT)
    arrays = InputGenerator(model, "text.onnx").make(CASES[0], seed=0)
    np.savez(tmp_path / "mine.npz", **arrays)
    assert list(read(tmp_path / "mine.npz", model)) == list(arrays)
    np.savez(tmp_path / "half.npz", input_ids=arrays["input_ids"])
    with pytest.raises(InputRefused, match="the graph takes input_ids, attention_mask, token_type_ids"):
        read(tmp_path / "half.npz", model)


def test_ids_of_a_fused_embedding_are_rows_of_its_tables() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]> g (int32[b,s] words, int32[b,s] kinds) => (y)
        <float[50,4] table = {0}, float[9,4] places = {0}, float[3,4] segments = {0}, float[4] n = {0}>
        { y, lengths = com.microsoft.EmbedLayerNormalization (words, kinds, table, places, segments, n, n) }""")
    made = InputGenerator(model, "g").make(GraphSizes(40, 5, 0), seed=0)
    assert made["words"].min() >= 0 and 40 < made["words"].max() < 50
    assert sorted(set(made["kinds"].ravel().tolist())) == [0, 1, 2]


@pytest.mark.parametrize(("axis", "most"), [(0, 3), (1, 50), (-1, 50)])
def test_ids_are_places_along_the_axis_of_their_table(axis: int, most: int) -> None:
    model = ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["" : 20]> g (int64[n] ids) => (y) <float[3,50] table = {{0}}>
        {{ y = Gather <axis = {axis}> (table, ids) }}""")
    ids = InputGenerator(model, "g").make(GraphSizes(400, 5, 0), seed=0)["ids"]
    assert (ids.min(), ids.max()) == (0, most - 1)


def test_ids_of_a_quantised_table_are_its_rows() -> None:
    """Without a shape of what is dequantised, and beside a table of floats that has more rows."""
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 20]> g (int64[n] ids) => (y, z)
        <int8[7,4] table = {0}, float scale = {1}, float[50,4] larger = {0}>
        { rows = DequantizeLinear (table, scale)  y = Gather (rows, ids)  z = Gather (larger, ids) }""")
    ids = InputGenerator(model, "g").make(GraphSizes(400, 5, 0), seed=0)["ids"]
    assert (ids.min(), ids.max()) == (0, 6)
