"""Inputs that are made from what a graph says of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from lora_export.errors import InputRefused
from lora_export.verification.inputs.graph_inputs import CASES, Feeds, Sizes, read
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


def test_ids_stay_below_the_rows_of_their_tables_and_every_second_row_is_padded() -> None:
    maker = Feeds(a_graph(TEXT), "text.onnx")
    seen = set()
    for number, sizes in enumerate(CASES):
        made = maker.make(sizes, seed=number)
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
    assert seen == {0, 1}
    assert len({sizes.length for sizes in CASES}) == 3 and 1 in {sizes.batch for sizes in CASES}


def test_inputs_are_repeatable_and_differ_by_seed() -> None:
    maker = Feeds(a_graph(TEXT), "text.onnx")
    one, again, other = (maker.make(CASES[1], seed=seed)["input_ids"] for seed in (1, 1, 2))
    assert np.array_equal(one, again) and not np.array_equal(one, other)


def test_a_cache_a_mask_over_it_and_positions_behind_it() -> None:
    maker = Feeds(a_graph(CACHED), "cached.onnx")
    made = maker.make(Sizes(3, 4, 5), seed=0)
    assert made["input_ids"].shape == (3, 4) and made["attention_mask"].shape == (3, 9)
    assert made["past_key_values_0"].shape == (3, 2, 5, 8) and made["past_key_values_0"].any()
    assert made["past_key_values_1"].dtype == np.float16
    assert made["attention_mask"][:, :5].all() and not made["attention_mask"][1, -1]
    assert made["position_ids"].tolist() == [[5, 6, 7, 8]] * 3
    assert maker.choices(Sizes(3, 4, 5)) == [Sizes(3, 4, 5), Sizes(3, 1, 5), Sizes(3, 4, 0)]
    empty = maker.make(Sizes(3, 4, 0), seed=0)
    assert empty["past_key_values_0"].shape == (3, 2, 0, 8) and empty["attention_mask"].shape == (3, 4)
    assert Feeds(a_graph(TEXT), "text.onnx").choices(Sizes(3, 4, 5)) == [Sizes(3, 4, 5)]  # there is nothing to vary


def test_a_branch_on_the_cache_is_taken_where_there_is_one_and_a_mask_of_four_dimensions_hides_the_same_places() -> (
    None
):
    text = CACHED.replace(
        "int64[b, total] attention_mask", "bool[b, 1, s, total] attention_mask, bool[1] use_cache_branch"
    )
    maker = Feeds(a_graph(text), "cached.onnx")
    made, empty = (maker.make(Sizes(3, 4, past), seed=0) for past in (5, 0))
    assert made["use_cache_branch"].tolist() == [True] and empty["use_cache_branch"].tolist() == [False]
    mask = made["attention_mask"]
    assert mask.dtype == bool and mask.shape == (3, 1, 4, 9)
    flat = Feeds(a_graph(CACHED), "cached.onnx").make(Sizes(3, 4, 5), seed=0)["attention_mask"]
    assert (mask == flat.astype(bool)[:, None, None]).all() and not mask.all()


def test_every_input_that_can_be_varied_is() -> None:
    maker = Feeds(a_graph(CACHED), "cached.onnx")
    before = maker.make(Sizes(3, 16, 5), seed=0)
    fresh = maker.draws(Sizes(3, 16, 5), before, seed=1)
    assert set(fresh) == set(before) - {"position_ids"}  # they are what they are
    assert not [name for name, array in fresh.items() if np.array_equal(array, before[name])]
    assert {name: array.shape for name, array in fresh.items()} == {name: before[name].shape for name in fresh}


def test_the_size_of_a_head_is_told_by_the_operator_that_reads_the_cache() -> None:
    model = a_graph("""
        g (float[b, s, 64] x, float[b, 2, past, head] past_key) => (float[b, s, 64] y) { y = Add(x, x) }
    """)
    (node,) = model.graph
    cache = model.graph.inputs[1]
    node.resize_inputs(3)
    node.replace_input_with(1, None)
    node.replace_input_with(2, cache)
    node.attributes["num_heads"], node.attributes["kv_num_heads"] = ir.AttrInt64("num_heads", 4), ir.AttrInt64("kv", 2)
    made = Feeds(model, "g").make(Sizes(1, 3, 5), seed=0)
    assert made["past_key"].shape == (1, 2, 5, 64 // (4 + 2 * 2))


def test_fixed_sizes_are_kept_and_sizes_without_a_name_are_one_by_their_place() -> None:
    model = a_graph("g (float[2, n] x, float[2, 3] y) => (float[2, n] z) { z = Identity(x) }")
    model.graph.inputs[0].shape = ir.Shape([2, None])
    made = Feeds(model, "g").make(CASES[1], seed=0)
    assert made["x"].shape == (2, CASES[1].length) and made["y"].shape == (2, 3)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("int64[n] lengths", r"nothing tells what lengths \(int64 \[n\]\) should hold"),
        ("bool[n] flags", "nothing tells what flags"),
        ("int64[n] past_lengths", "nothing tells what past_lengths"),
        ("string[n] words", "nothing tells what words"),
    ],
)
def test_what_nobody_can_make_is_named_with_the_way_out(given: str, told: str) -> None:
    model = a_graph(f"g ({given}, float[n] x) => (float[n] y) {{ y = Identity(x) }}")
    with pytest.raises(InputRefused, match=rf"{told}.*Give some: --inputs FILE.npz, with an array for each of"):
        Feeds(model, "g.onnx")


def test_the_users_inputs_are_all_that_the_graph_takes(tmp_path: Path) -> None:
    model = a_graph(TEXT)
    arrays = Feeds(model, "text.onnx").make(CASES[0], seed=0)
    np.savez(tmp_path / "mine.npz", **arrays)
    assert list(read(tmp_path / "mine.npz", model)) == list(arrays)
    np.savez(tmp_path / "half.npz", input_ids=arrays["input_ids"])
    with pytest.raises(InputRefused, match="the graph takes input_ids, attention_mask, token_type_ids"):
        read(tmp_path / "half.npz", model)
