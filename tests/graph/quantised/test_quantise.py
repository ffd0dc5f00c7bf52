"""Linear layers of a graph of floats in few bits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import peft
import pytest
import torch
from torch import nn

import lora_export as le
from lora_export.artifacts.files import GRAPH_FILES
from lora_export.errors import InputRefused, WrongUsage
from lora_export.graph.find_sites import find_sites
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.quantised.quantise import quantise_graph
from support.generators import encoder_decoder_adapter, small_encoder_decoder, sounds
from support.graphs import a_graph, run
from support.slow import slow

# Multiples of a power of two, with the largest magnitude in each block: 4 bits hold them exactly.
W = (np.arange(64).reshape(2, 32) % 15 - 7).astype(np.float32)  # (out, in)
W[:, 0] = -8
X = (np.arange(96).reshape(3, 32) % 7 - 3).astype(np.float32)


def a_layer(node: str, weight: Any) -> ir.Model:
    rows, columns = weight.shape
    values = ",".join(f"{value:g}" for value in weight.flat)
    return a_graph(f"""g (float[N,32] x) => (float[N,2] y)
        <float[{rows},{columns}] m.weight = {{{values}}}, float[2] m.bias = {{10,20}}> {{ [n] {node} }}""")


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize(
    ("node", "weight"),
    [
        ("y = MatMul(x, m.weight)", W.T),
        ("y = Gemm <transB = 1> (x, m.weight, m.bias)", W),
        ("y = Gemm (x, m.weight)", W.T),
    ],
)
def test_a_layer_computes_with_the_quantised_weight(kind: str, node: str, weight: Any) -> None:
    model = a_layer(node, weight)
    expected = run(model.clone(), x=X)["y"]
    assert quantise_graph(model, kind) == []
    (site,) = find_sites(model).by_name["m.weight"]
    assert site.quantised is not None and site.node.op_type == "MatMulNBits" and site.node.name == "n"
    found = run(model, x=X)["y"]
    error = np.abs(X).sum(1).max() * (0 if kind == "int4" else 8 / 127 / 2)
    assert np.abs(found - expected).max() <= error
    assert [name for name in model.graph.initializers if "weight" in name] == [
        f"m.weight_Q{kind[3:]}",
        f"m.weight_Q{kind[3:]}_scales",
    ]


def test_a_head_that_is_tied_to_the_words_stays_in_floats() -> None:
    model = a_graph("""g (int64[N] i) => (float[N,2] y)
        <float[2,2] words.weight = {1,2,3,4}, float[2,2] m.weight = {1,1,2,2}>
        { e = Gather(words.weight, i)  h = MatMul(e, m.weight)  [head] y = Gemm <transB = 1> (h, words.weight) }""")
    assert quantise_graph(model, "int4") == ["not quantised: Gemm `head`"]
    assert "words.weight" in model.graph.initializers and "m.weight" not in model.graph.initializers


def test_a_matrix_that_layers_read_both_ways_stays_in_floats() -> None:
    model = a_graph("""g (float[N,2] x) => (float[N,2] y)
        <float[2,2] w.weight = {1,2,3,4}, float[2,2] m.weight = {1,1,2,2}>
        { h = MatMul(x, w.weight)  e = MatMul(h, m.weight)  y = Gemm <transB = 1> (e, w.weight) }""")
    assert len(quantise_graph(model, "int8")) == 1
    assert [node.op_type for node in model.graph] == ["MatMul", "MatMulNBits", "Gemm"]


def test_a_layer_in_a_branch_is_quantised() -> None:
    values = ",".join(f"{value:g}" for value in W.T.flat)
    model = a_graph(f"""g (float[N,32] x, bool c) => (float[N,2] y)
        {{ y = If (c) <
            then_branch = t () => (float[N,2] a) <float[32,2] m.weight = {{{values}}}> {{ a = MatMul(x, m.weight) }},
            else_branch = e () => (float[N,2] b) <float[32,2] n.weight = {{{values}}}> {{ b = MatMul(x, n.weight) }}
        > }}""")
    quantise_graph(model, "int4")
    assert np.array_equal(run(model, x=X, c=np.array(True))["y"], X @ W.T)
    assert not any(graph.initializers for graph in model.graphs() if graph is not model.graph)


@pytest.mark.parametrize(
    ("node", "weight"),
    [
        ("y = Gemm <alpha = 2.0> (x, m.weight)", W.T),
        ("y = Gemm <transB = 1, beta = 2.0> (x, m.weight, m.bias)", W),
        ("y = Gemm <transA = 1> (x, m.weight)", W.T),
    ],
)
def test_a_layer_that_does_more_than_its_product_stays_in_floats(node: str, weight: Any) -> None:
    model = a_layer(node, weight)
    assert find_sites(model).by_name["m.weight"]
    with pytest.raises(InputRefused, match="finds no layer to quantise"):
        quantise_graph(model, "int4")


def test_inputs_for_adapters_are_not_quantised() -> None:
    model = a_layer("y = MatMul(x, m.weight)", W.T)
    model.graph.inputs.append(model.graph.initializers["m.weight"])
    with pytest.raises(InputRefused, match="finds no layer to quantise"):
        quantise_graph(model, "int4")


DOUBLE = "g (double[N,2] x) => (double[N,2] y) <double[2,2] m.weight = {1,2,3,4}> { y = MatMul(x, m.weight) }"


@pytest.mark.parametrize("body", ["g (float[N] x) => (float[N] y) { y = Add(x, x) }", DOUBLE])
def test_a_graph_without_layers_is_refused(body: str) -> None:
    with pytest.raises(InputRefused, match='quantize="int4" finds no layer'):
        quantise_graph(a_graph(body), "int4")


def test_the_quantisers_log_goes_nowhere(logged: list[logging.LogRecord]) -> None:
    handlers, level = list(logging.root.handlers), logging.root.level
    quantise_graph(a_layer("y = MatMul(x, m.weight)", W.T), "int4")
    assert (logging.root.handlers, logging.root.level, logged) == (handlers, level, [])


# --- Whole exports ---


FACTORY = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    return net, torch.randn(3, 5, 32)
"""


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("net")
    (folder / "net.py").write_text(FACTORY)
    for seed, name in ((1, "adapter"), (2, "other")):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
        options = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["0", "2"], init_lora_weights=False)
        peft.get_peft_model(net, options).save_pretrained(folder / name)
    return f"{folder}/net.py:make", folder / "adapter"


@pytest.mark.parametrize(
    ("lora", "kind"),
    [
        ("merged", "int4"),
        slow("merged", "int8"),
        ("nodes", "int4"),
        slow("inputs", "int4"),
        slow("rows", "int8"),
        slow("slots", "int4"),
    ],
)
def test_every_mode_is_proven_with_quantised_weights(adapted, tmp_path, lora, kind):
    model, adapter = adapted
    result = le.export_onnx(model, tmp_path / "m", adapters=adapter, lora=lora, quantize=kind)
    assert str(result.precision) == f"weights stored in {kind[3:]} bits in blocks of 32, computed in float32"
    (note,) = [note for note in result.proof.verdict.notes if note.startswith("quantised weights: 2 ")]
    assert "from the model's weights" in note
    if lora in ("merged", "nodes"):
        assert le.verify(result.output, model, adapters=adapter)
        assert le.verify(result.output, model, adapters=adapter.with_name("other")).exit_code in (4, 5)
        assert not le.verify(result.output, model)


def test_a_wrong_integer_of_the_merge_is_found(adapted, tmp_path):
    model, adapter = adapted
    result = le.export_onnx(model, tmp_path / "m", adapters=adapter, quantize="int8")
    graph = load_graph(result.output)
    value = next(value for name, value in graph.graph.initializers.items() if name.endswith("_Q8"))
    integers = value.const_value.numpy().copy()
    integers.flat[:40] ^= 0x10
    value.const_value = ir.Tensor(integers, name=value.name)
    ir.save(graph, tmp_path / "wrong.onnx")
    assert le.verify(tmp_path / "wrong.onnx", model, adapters=adapter).exit_code == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "lora", "kind"),
    [("t5", "merged", "int8"), ("bart", "nodes", "int4"), ("t5", "rows", "int4"), ("whisper", "inputs", "int8")],
)
def test_all_graphs_of_an_encoder_decoder_are_quantised_and_proven(name, lora, kind, tmp_path):
    base = small_encoder_decoder(name, tmp_path / "base")
    # This adapter is in the decoder alone: the encoder's graph is quantised without a merge.
    adapter = encoder_decoder_adapter(base, tmp_path / "fr", targets=r".*decoder.*(q|v|q_proj|v_proj)")
    out = tmp_path / "served"
    result = le.export_onnx(base, out, adapters=adapter, lora=lora, quantize=kind, with_cache=True)
    assert result.proof.verdict.same and result.precision.stored == f"{kind[3:]} bits in blocks of 32"
    assert len([note for note in result.proof.verdict.notes if note.startswith("quantised weights: ")]) == 1
    for file in GRAPH_FILES:
        assert any(node.op_type == "MatMulNBits" for node in load_graph(out / file).graph), file
    assert len(le.generate(out, [[5, 9, 11]] if name != "whisper" else sounds()[:1], max_new_tokens=4)[0].tokens) == 4
    if lora == "inputs":
        return
    assert le.verify(out, base, adapters=adapter)
    other = encoder_decoder_adapter(base, tmp_path / "de", seed=5, targets=r".*decoder.*(q|v|q_proj|v_proj)")
    assert le.verify(out, base, adapters=other).exit_code in (4, 5)
    model = onnx.load(out / GRAPH_FILES[2])
    stored = next(each for each in model.graph.initializer if each.name.endswith(("_Q8", "_Q4")))
    integers = onnx.numpy_helper.to_array(stored).copy()
    integers.flat[:40] ^= 0x10
    stored.CopyFrom(onnx.numpy_helper.from_array(integers, stored.name))
    onnx.save(model, out / GRAPH_FILES[2])
    wrong = le.verify(out, base, adapters=adapter)
    assert wrong.exit_code == 4 and f"{GRAPH_FILES[2]} has other numbers in" in str(wrong.verdict)


def test_options_that_do_not_go_together_are_refused(adapted, tmp_path):
    model, adapter = adapted
    with pytest.raises(WrongUsage, match="'int2'; it must be int4 or int8"):
        le.export_onnx(model, tmp_path / "m", adapters=adapter, quantize="int2")
    with pytest.raises(WrongUsage, match='dtype="bfloat16" on the CPU'):
        le.export_onnx(model, tmp_path / "m", adapters=adapter, quantize="int4", dtype="bfloat16")
    ir.save(a_graph("g (float[N] x) => (float[N] y) { y = Add(x, x) }"), tmp_path / "g.onnx")
    with pytest.raises(WrongUsage, match="MODEL is a graph already"):
        le.export_onnx(tmp_path / "g.onnx", tmp_path / "m", adapters=adapter, quantize="int4")
    assert [path.name for path in tmp_path.iterdir()] == ["g.onnx"]
