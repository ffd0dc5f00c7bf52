"""Rows of an embedding that are rows of the head, too, where a graph has one table for both."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

import lora_export as le
from lora_export.errors import InputRefused, MatchError
from lora_export.graph.find_sites import find_sites
from lora_export.graph.insert.adapter_nodes import insert_nodes
from lora_export.graph.merge.fold import fold_graph
from lora_export.graph.onnx_file import writing
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.graph.tied_tables import tie_notes, with_rows_of_equal_tables
from lora_export.lora import LoraPair, TokenRows
from lora_export.storage import block_copy
from lora_export.weights.checkpoint import open_checkpoint
from support.graphs import a_graph, an_adapter, planned, run, stored
from support.handmade import add_tensors, peft_adapter

TABLE = np.arange(1, 13, dtype=np.float32).reshape(4, 3)
ROWS = TokenRows(np.array([1, 3]), np.float32([[0, 0, 1], [2, 2, 2]]))
EXPECTED = np.float32([[1, 2, 3], [0, 0, 1], [7, 8, 9], [2, 2, 2]])
OTHER = EXPECTED + 1
IDS = np.int64([0, 1, 2, 3])
MODULES = {"e": "embed", "m": "head"}


def text(table: np.ndarray) -> str:
    return "{" + ",".join(map(str, table.ravel().tolist())) + "}"


def one_table() -> str:
    """Both readers have one initializer."""
    return f"""
        g (int64[N] ids) => (float[N,4] y) <float[4,3] head.weight = {text(TABLE)}>
        {{ [e] x = Gather(head.weight, ids)
          [t] w = Transpose <perm = [1, 0]> (head.weight)
          [m] y = MatMul(x, w) }}"""


def two_tables(head: np.ndarray = TABLE, name: str = "head.weight") -> str:
    """The head has a tensor of its own, stored (in, out)."""
    return f"""
        g (int64[N] ids) => (float[N,4] y) <float[4,3] embed.weight = {text(TABLE)}, float[3,4] {name} = {text(head.T)}>
        {{ [e] x = Gather(embed.weight, ids)
          [m] y = MatMul(x, {name}) }}"""


def planned_rows(graph: str, **fields: object):
    model = a_graph(graph, modules=MODULES if "embed" not in graph else None)
    sites, steps = planned(model, an_adapter(fields.pop("pairs", {}), token_rows={"embed.weight": ROWS}, **fields))
    return model, sites, with_rows_of_equal_tables(steps, sites, None)


@pytest.mark.parametrize(
    ("graph", "head"),
    [(one_table(), EXPECTED), (two_tables(), EXPECTED), (two_tables(OTHER), OTHER)],
    ids=["one", "equal", "another"],
)
@pytest.mark.parametrize("change", [fold_graph, insert_nodes])
def test_rows_are_those_of_each_head_with_this_table(change, graph: str, head: np.ndarray) -> None:
    model, sites, steps = planned_rows(graph)
    change(model, sites, steps)
    assert np.array_equal(run(model, ids=IDS)["y"], EXPECTED @ head.T)
    name, *others = model.graph.initializers
    assert np.array_equal(stored(model, name), EXPECTED)
    assert others == ([] if graph == one_table() else ["head.weight"])  # a table for both is stored once


def test_a_head_keeps_rows_of_its_own() -> None:
    model, sites, steps = planned_rows(one_table())
    own = TokenRows(np.array([0]), np.float32([[5, 5, 5]]))
    adapter = an_adapter({}, token_rows={"embed.weight": ROWS, "head.weight": own})
    model = a_graph(one_table(), modules=MODULES)
    sites, steps = planned(model, adapter)
    fold_graph(model, sites, with_rows_of_equal_tables(steps, sites, None))
    head = TABLE.copy()
    head[0] = 5
    assert np.array_equal(run(model, ids=IDS)["y"], EXPECTED @ head.T)


def test_another_change_of_such_a_head_is_refused() -> None:
    pair = LoraPair(a=[[1, 0, 0]], b=[[1]] * 4, scale=1.0)
    with pytest.raises(InputRefused, match=r"head\.weight has the table of embed\.weight, .* another way, too"):
        planned_rows(one_table(), pairs={"head": pair})


def test_such_a_head_without_a_name_is_refused() -> None:
    with pytest.raises(InputRefused, match=r"MatMul `m` has the table of embed\.weight, .* no certain name"):
        planned_rows(two_tables(name="val_3"))
    model, *_ = planned_rows(two_tables(OTHER, name="val_3"))
    assert find_sites(model).unnamed


@pytest.mark.parametrize(("sign", "refused"), [(1, True), (-1, False)])
def test_a_quantised_head_that_may_have_this_table_is_refused(sign: int, refused: bool) -> None:
    table = text((sign * TABLE.T).astype(np.int8))
    graph = f"""
        g (int64[N] ids) => (float[N,4] y)
        <float[4,3] embed.weight = {text(TABLE)}, int8[3,4] head.weight = {table}, float s = {{1}}>
        {{ [e] x = Gather(embed.weight, ids)
          [d] w = DequantizeLinear(head.weight, s)
          [m] y = MatMul(x, w) }}"""
    with pytest.raises(InputRefused, match=r"the table of MatMul `m` may be") if refused else nullcontext():
        _, _, steps = planned_rows(graph)
        assert [step.weight for step in steps.steps] == ["embed.weight"]


@pytest.mark.parametrize("data", ["", "weights"], ids=["inside", "beside"])
def test_a_file_gets_rows_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str) -> None:
    """Its blocks have one row each: of the head, which is stored (in, out), one number of each word."""
    monkeypatch.setattr(block_copy, "BLOCK", 16)
    adapter = peft_adapter(tmp_path / "adapter", {}, trainable_token_indices={"embed": [1, 3]})
    add_tensors(adapter, {"base_model.model.embed.token_adapter.trainable_tokens_delta": ROWS.values})
    with monkeypatch.context() as patch:
        patch.setattr(writing, "MAX_INLINE_BYTES", 0 if data else 1 << 20)
        save_graph(a_graph(two_tables()), tmp_path, "m.onnx")
    le.merge(tmp_path / "m.onnx", adapter, tmp_path / "out.onnx")
    written = load_graph(tmp_path / "out.onnx")
    assert np.array_equal(stored(written, "embed.weight"), EXPECTED)
    assert np.array_equal(stored(written, "head.weight"), EXPECTED.T)


def test_a_table_that_the_graph_has_under_another_name_is_refused(tmp_path: Path) -> None:
    adapter = peft_adapter(tmp_path / "adapter", {}, trainable_token_indices={"shared": [1, 3]})
    add_tensors(adapter, {"base_model.model.shared.token_adapter.trainable_tokens_delta": ROWS.values})
    save_graph(a_graph(two_tables()), tmp_path, "m.onnx")
    with pytest.raises(MatchError, match=r'name\. checkpoint="CHECKPOINT" finds a tied table\. Or merge the'):
        le.merge(tmp_path / "m.onnx", adapter, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_a_table_that_the_graph_has_is_not_blamed_for_another_misfit(tmp_path: Path) -> None:
    pairs = dict.fromkeys(("model.head", "model.other"), ([[1.0] * 3], [[1.0]] * 4))
    adapter = peft_adapter(tmp_path / "adapter", pairs, trainable_token_indices={"model.embed": [1, 3]})
    add_tensors(adapter, {"base_model.model.model.embed.token_adapter.trainable_tokens_delta": ROWS.values})
    save_graph(a_graph(two_tables()), tmp_path, "m.onnx")
    with pytest.raises(MatchError, match=r"1 of 3 targets do not fit") as caught:
        le.merge(tmp_path / "m.onnx", adapter, tmp_path / "out.onnx")
    assert "under another name" not in str(caught.value)


def test_a_config_that_ties_nothing_counts_more_than_equal_tables(tmp_path: Path) -> None:
    """As after `head.weight = embed.weight.clone()`: PEFT changes the rows of the embedding alone."""
    both = ["embed.weight", "head.weight"]
    for config, rows in (
        ({"tie_word_embeddings": False}, ["embed.weight"]),
        ({"tie_word_embeddings": True}, both),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, ["embed.weight"]),  # its class's default
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, both),
        ({"architectures": ["MyForCausalLM"], "model_type": "my"}, both),  # nothing is known
    ):
        save_file({"embed.weight": TABLE, "head.weight": TABLE}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config))
        model = a_graph(one_table(), modules=MODULES)
        sites, steps = planned(model, an_adapter({}, token_rows={"embed.weight": ROWS}))
        tied = with_rows_of_equal_tables(steps, sites, open_checkpoint(tmp_path))
        assert [step.weight for step in tied.steps] == rows
        assert len(tie_notes(steps, tied)) == len(rows) - 1


LLAMA, LLAVA = ("model.embed_tokens", "lm_head"), ("model.language_model.embed_tokens", "lm_head")
OLD_LLAVA = ("language_model.model.embed_tokens", "language_model.lm_head")


@pytest.mark.parametrize(
    ("architecture", "model_type", "saved", "loaded", "adapted"),
    [
        ("LlamaForCausalLM", "llama", LLAMA, LLAMA, LLAMA),
        ("LlavaForConditionalGeneration", "llava", OLD_LLAVA, LLAVA, LLAVA),
        ("LlavaForConditionalGeneration", "llava", OLD_LLAVA, OLD_LLAVA, LLAVA),
        ("LlavaForConditionalGeneration", "llava", LLAVA, LLAVA, OLD_LLAVA),
    ],
)
@pytest.mark.parametrize("is_one", [True, False])
def test_rows_of_tables_that_the_checkpoint_stores_apart_are_refused(
    is_one: bool, architecture: str, model_type: str, saved: tuple, loaded: tuple, adapted: tuple, tmp_path: Path
) -> None:
    """The rows were trained for both. The tables of another generation of names are those, too."""
    config = {"architectures": [architecture], "model_type": model_type, "tie_word_embeddings": True}
    head = TABLE if is_one else OTHER
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    own = dict(zip([f"{name}.weight" for name in saved], [TABLE, head], strict=True))
    save_file(own, tmp_path / "base" / "model.safetensors")
    graph = (
        two_tables(head).replace("embed.weight", f"{loaded[0]}.weight").replace("head.weight", f"{loaded[1]}.weight")
    )
    save_graph(a_graph(graph), tmp_path, "m.onnx")
    adapter = an_adapter({}, token_rows={f"{adapted[0]}.weight": ROWS})
    why = (
        rf"the base stores other values of {saved[1]}\.weight\. Merge the adapter into the checkpoint, and export that$"
    )
    with nullcontext() if is_one else pytest.raises(InputRefused, match=why):
        le.merge(tmp_path / "m.onnx", adapter, tmp_path / "out.onnx", checkpoint=tmp_path / "base")
        assert np.array_equal(stored(load_graph(tmp_path / "out.onnx"), f"{loaded[1]}.weight"), EXPECTED.T)


def test_a_head_in_another_precision_is_refused() -> None:
    cast = "[c] w = Cast <to = 1> (head.weight)\n [m] y = MatMul(x, w)"
    model = a_graph(two_tables().replace("[m] y = MatMul(x, head.weight)", cast))
    head = ir.Tensor(np.ascontiguousarray(TABLE.T.astype(np.float16)), name="head.weight")
    model.graph.initializers["head.weight"].const_value = head
    sites, steps = planned(model, an_adapter({}, token_rows={"embed.weight": ROWS}))
    with pytest.raises(InputRefused, match=r"the table of MatMul `m` may be that of the input embeddings"):
        with_rows_of_equal_tables(steps, sites, None)


TWO_LOOKUPS = f"""
    g (int64[N] ids) => (float[N,3] y) <float[4,3] embed.weight = {text(TABLE)}, float[4,3] dec.weight = {text(TABLE)}>
    {{ [e] x = Gather(embed.weight, ids)
      [d] z = Gather(dec.weight, ids)
      [a] y = Add(x, z) }}"""


def test_rows_are_those_of_another_lookup_with_this_table() -> None:
    model, sites, steps = planned_rows(TWO_LOOKUPS)
    fold_graph(model, sites, steps)
    assert np.array_equal(run(model, ids=IDS)["y"], 2 * EXPECTED)


def test_other_rows_of_two_tables_that_a_head_has_are_refused() -> None:
    graph = TWO_LOOKUPS.replace("=> (float[N,3] y)", "=> (float[N,4] o)").replace("> \n", "")
    graph = graph.replace(
        f"float[4,3] dec.weight = {text(TABLE)}>",
        f"float[4,3] dec.weight = {text(TABLE)}, float[3,4] head.weight = {text(TABLE.T)}>",
    )
    graph = graph.replace("[a] y = Add(x, z) }", "[a] y = Add(x, z)\n [m] o = MatMul(y, head.weight) }")
    other = TokenRows(np.array([0]), np.float32([[5, 5, 5]]))
    model = a_graph(graph)
    sites, steps = planned(model, an_adapter({}, token_rows={"embed.weight": ROWS, "dec.weight": other}))
    with pytest.raises(InputRefused, match=r"head\.weight has the values of two tables"):
        with_rows_of_equal_tables(steps, sites, None)
