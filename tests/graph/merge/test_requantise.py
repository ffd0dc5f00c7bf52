"""Merges into quantised weights of graphs: kept on their own scales, or promoted; by hand and against fp64."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from lora_export import cli
from lora_export.errors import InputRefused
from lora_export.graph.find_sites import find_sites
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.storage import block_copy
from support.graphs import contents, quantised, run, stored
from support.handmade import graph_file, peft_adapter
from support.requantised_graphs import (
    DEQUANTISED,
    IN,
    OUT,
    PAIRED,
    PAIRED_OTHERWISE,
    RNG,
    A,
    B,
    W,
    dequantised_weight,
    dequantize_graph,
    expected_retention_and_noise,
    float_graph,
    merge_command,
    merge_requantised,
    retention_and_noise,
    save_model,
)


def by_hand(more: str = "", inputs: str = "") -> ir.Model:
    return ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        g (float[N,3] x) => (float[N,2] y)
        <uint8[2,1,8] "fc.weight_Q4" = {{152, 7, 0,0,0,0,0,0, 143, 10, 0,0,0,0,0,0}}, float[2] s = {{0.5, -2}}{more}>
        {{ y = com.microsoft.MatMulNBits <K = 3, N = 2, bits = 4, block_size = 16>
               (x, "fc.weight_Q4", s{inputs}) }}""")


def test_four_bits_by_hand(tmp_path: Path) -> None:
    # Minus 8, W is [[0, 1, -1] * 0.5, [7, 0, 2] * -2]; ΔW is [[0, 0, 0], [0, 4, -8.5]].
    # W' is [[0, 0.5, -0.5], [-14, 4, -12.5]].
    path = save_model(by_hand(), tmp_path / "m.onnx")
    model, report = merge_requantised(path, peft_adapter(tmp_path / "ad", {"fc": ([[0, 4, -8.5]], [[0], [1]])}))
    assert stored(model, "s").tolist() == [0.5, -2]
    # Of the second row minus 8: [7, -2, 6.25], which is rounded to 6.
    assert stored(model, "fc.weight_Q4")[:, 0, :2].tolist() == [[152, 7], [6 << 4 | 15, 14]]
    after = np.array([[0, 0.5, -0.5], [-14, 4, -12]])
    assert np.array_equal(dequantised_weight(model), after)
    expected = expected_retention_and_noise([[0, 0.5, -0.5], [-14, 0, -4]], np.array([[0, 0, 0], [0, 4, -8.5]]), after)
    np.testing.assert_allclose(retention_and_noise(report), expected)
    assert report.results[0].changed == 2
    (layer,) = report.layers
    assert (layer.weight, layer.scheme, layer.stored, layer.why) == ("fc.weight", *["4 bits in blocks of 16"] * 2, "")
    assert report.base_bytes == path.stat().st_size


def test_new_scales_by_hand(tmp_path: Path) -> None:
    # ΔW is [[0, 0, 0], [0, 3, -12]], W' is [[0, 0.5, -0.5], [-14, 3, -16]]: -16 / -2 is beyond 7 on the old scale.
    path = save_model(by_hand(), tmp_path / "m.onnx")
    model, report = merge_requantised(path, peft_adapter(tmp_path / "ad", {"fc": ([[0, 1, -4]], [[0], [3]])}))
    # The largest entry becomes the lowest integer, 0: scales are -0.5 / -8 (0.5 is as large) and -16 / -8.
    assert stored(model, "fc.weight_Q4_scales").tolist() == [0.0625, 2] and "s" not in model.graph.initializers
    # Minus 8: [0, 8, -8], where 8 is clipped; [-7, 1.5, -8], where 1.5 is rounded to 2. Entries beside them are zeros.
    assert stored(model, "fc.weight_Q4")[:, 0, :2].tolist() == [[15 << 4 | 8, 8 << 4], [10 << 4 | 1, 8 << 4]]
    assert np.array_equal(dequantised_weight(model), [[0, 7 * 0.0625, -0.5], [-14, 4, -16]])
    (layer,) = report.layers
    assert layer.stored == "4 bits in blocks of 16, new scales"
    assert layer.why == "with its scales the noise would be 0.18 times its change, not 0.081"


def test_zero_points_by_hand(tmp_path: Path) -> None:
    # Zero points 3 and 10: W is [[5, 6, 4] * 0.5, [5, -2, 0] * -2]; W + ΔW is [[2.5, 3, 2], [-10, 6.5, 20]].
    path = save_model(by_hand(", uint8[2] z = {3, 10}", ", z"), tmp_path / "m.onnx")
    model, _ = merge_requantised(path, peft_adapter(tmp_path / "ad", {"fc": ([[0, 2.5, 20]], [[0], [1]])}))
    assert (stored(model, "s").tolist(), stored(model, "z").tolist()) == ([0.5, -2], [3, 10])
    # 6.5 / -2 is -3.25, rounded to -3.
    assert stored(model, "fc.weight_Q4")[:, 0, :2].tolist() == [[152, 7], [7 << 4 | 15, 0]]


def test_float_zero_points_by_hand(tmp_path: Path) -> None:
    # Zero points 7.5 and 8.25: W is [[0.5, 1.5, -0.5] * 0.5, [6.75, -0.25, 1.75] * -2]; ΔW is 0 and [0, 4.1, 8].
    path = save_model(by_hand(", float[2,1] z = {7.5, 8.25}", ", z"), tmp_path / "m.onnx")
    model, _ = merge_requantised(path, peft_adapter(tmp_path / "ad", {"fc": ([[0, 4.1, 8]], [[0], [1]])}))
    # 4.6 / -2 + 8.25 is 5.95: 6. (1.75 * -2 + 8) / -2 + 8.25 is 6.
    assert stored(model, "fc.weight_Q4")[:, 0, :2].tolist() == [[152, 7], [6 << 4 | 15, 6]]
    assert stored(model, "z").tolist() == [[7.5], [8.25]]


# The stored integers of W' (in, out), on the scales and zero points that are there. ΔW is [[0, -1], [0, -190]].
EXPECTED: dict[str, Any] = {
    "int8 by tensor": [[2, -4], [4, -128]],  # [[1, -2], [2, -127]] / 0.5
    "int8 by column": [[2, -3], [4, -63]],  # [[1, -3], [2, -63]] / [0.5, 1]
    "int8 by row": [[2, -4], [4, -63]],  # [[1, -2], [4, -63]] / [[0.5], [1]]
    "uint8 by column": [[2, 127], [4, 65]],  # [[-0.5, -3], [0.5, -65]] / [0.5, 1] + [3, 130]
    "int4 by column": [[2, -3], [4, -8]],  # [[0.5, -2], [1.5, -197]] / [0.5, 1] + [1, -1]
    "int4 down": [[2, -1], [4, 7]],  # [[1, 1], [2, -182]] / [0.5, -1]
    "int16 by tensor": [[2, -4], [4, -254]],  # [[1, -2], [2, -127]] / 0.5
}


@PAIRED
@pytest.mark.parametrize("kind", DEQUANTISED)
def test_dequantize_linear_by_hand(
    kind: str, beside: bool, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_copy, "BLOCK", block if block > 1000 else 1)
    path = save_model(dequantize_graph(kind), tmp_path / "m.onnx", beside=beside)
    adapter = peft_adapter(tmp_path / "ad", {"fc": ([[1, 190]], [[0], [-1]])})
    model, report = merge_requantised(path, adapter, min_retention=0)
    before = contents(load_graph(path))
    assert {name for name, data in contents(model).items() if before[name] != data} == {"fc.weight_quantized"}
    assert stored(model, "fc.weight_quantized").astype(int).tolist() == EXPECTED[kind]
    before, after = dequantised_weight(load_graph(path)), dequantised_weight(model)
    np.testing.assert_allclose(
        retention_and_noise(report),
        expected_retention_and_noise(before, np.array([[0, 0], [-1, -190]]), after),
        rtol=1e-5,
    )


SCHEMES = pytest.mark.parametrize(
    ("bits", "size", "as_pairs"),
    [(2, 16, False), (4, 16, False), (4, 32, False), (4, 128, False), (8, 32, False), (4, 32, True), (4, 128, True)],
)


@PAIRED
@pytest.mark.parametrize("symmetric", [True, False])
@SCHEMES
def test_each_integer_is_the_nearest_on_its_own_scale(
    bits: int, size: int, symmetric: bool, as_pairs: bool, beside: bool, block: int,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(block_copy, "BLOCK", block)
    options = {"bits": bits, "block": size, "symmetric": symmetric, "as_pairs": as_pairs}
    base = quantised(float_graph(tmp_path / "f.onnx"), **options)
    path = save_model(base, tmp_path / "q.onnx", beside=beside)
    before, change = dequantised_weight(base), (B @ A).astype(np.float32)
    model, report = merge_requantised(path, peft_adapter(tmp_path / "ad", {"fc": (A, B)}), min_retention=0)
    after = dequantised_weight(model).copy()
    if symmetric and not as_pairs:  # so large a change moves many entries beyond the last integer
        oracle = quantised(float_graph(tmp_path / "o.onnx", np.ascontiguousarray((before + change).T)), **options)
        exact = dequantised_weight(oracle)
        assert report.layers[0].stored.endswith(", new scales") and report.layers[0].noise > report.results[0].noise
    else:
        old, new = contents(base), contents(model)
        (changed,) = [name for name in old if old[name] != new[name]]
        assert old.keys() == new.keys() and not changed.endswith(("scales", "zero_points"))
        exact = find_sites(base).by_name["fc.weight"][0].nearest((before + change).astype(np.float64))
    # W' is summed in another order, so that a few numbers are rounded to the other side.
    assert np.mean(np.isclose(after, exact, rtol=1e-5)) > 0.99
    np.testing.assert_allclose(
        retention_and_noise(report), expected_retention_and_noise(before, change, after), rtol=1e-4
    )
    x = RNG.normal(size=(3, IN)).astype(np.float32)
    expected = x @ after.T
    # onnxruntime makes a product in eight bits of a DequantizeLinear.
    assert np.linalg.norm(run(model, x=x)["y0"] - expected) < (0.03 if as_pairs else 1e-5) * np.linalg.norm(expected)
    assert not list(tmp_path.glob("out*/weights.data"))


def searched(weight: NDArray[Any], algorithm: str, path: Path) -> ir.Model:
    """A graph in 4 bits whose scales and zero points a search of onnxruntime's quantiser chose."""
    from onnxruntime.quantization import matmul_nbits_quantizer as tool

    inputs = [{"x": RNG.normal(size=(8, weight.shape[0])).astype(np.float32)} for _ in range(8)]
    config = {
        "hqq": lambda: tool.HQQWeightOnlyQuantConfig(block_size=32),
        "k_quant": tool.KQuantWeightOnlyQuantConfig,
        "gptq": lambda: tool.GPTQWeightOnlyQuantConfig(inputs, mse=True),
    }[algorithm]()
    quantizer = tool.MatMulNBitsQuantizer(ir.to_proto(float_graph(path, weight)), block_size=32, algo_config=config)
    quantizer.process()
    made = ir.from_proto(quantizer.model.model)
    made.opset_imports["com.microsoft"] = 1  # its k_quant leaves it out
    return made


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("algorithm", ["k_quant", "hqq", "gptq"])
def test_scales_of_a_search_stay(algorithm: str, tmp_path: Path) -> None:
    inner = 64
    base = searched(W[:inner], algorithm, tmp_path / "f.onnx")
    nearest = quantised(float_graph(tmp_path / "f.onnx", W[:inner]), symmetric=False)
    levels, scales, zeros = (str(value.name) for value in base.graph.node(0).inputs[1:4] if value is not None)
    own = stored(base, scales).reshape(OUT, -1)
    if algorithm == "hqq":  # it chooses zero points between two integers
        assert np.mean(stored(base, zeros) % 1 == 0) < 0.1
    else:
        most = 0.1 if algorithm == "k_quant" else 0.7  # GPTQ's search keeps the range of some blocks
        assert np.mean(np.isclose(own, stored(nearest, "fc.weight_scales").reshape(OUT, -1), rtol=1e-3)) < most
    path, change = save_model(base, tmp_path / "q.onnx"), B * 0.3 @ A[:, :inner]
    model, report = merge_requantised(path, peft_adapter(tmp_path / "ad", {"fc": (A[:, :inner], B * 0.3)}))
    old, new = contents(base), contents(model)
    assert {name for name in old if old[name] != new[name]} == {levels} and report.layers[0].is_kept
    exact, after = dequantised_weight(base).astype(np.float64) + change, dequantised_weight(model)
    near = np.abs(after - exact) <= 0.5001 * np.repeat(np.abs(own), 32, axis=1)
    ends = [edge(after.reshape(OUT, -1, 32), axis=2).repeat(32, axis=1) for edge in (np.min, np.max)]
    assert near.mean() > 0.9 and (near | (exact <= ends[0]) | (exact >= ends[1])).all()
    x = np.eye(inner, dtype=np.float32)
    np.testing.assert_allclose(run(model, x=x)["y0"], after.T, rtol=1e-4, atol=1e-5)


# --- promoted -----------------------------------------------------------------------------------------

FORMS = {
    "4 bits with zero points, kept": ({"symmetric": False}, 0.5, "4 bits in blocks of 32", ["MatMulNBits"]),
    "4 bits, with new scales": ({}, 0.5, "4 bits in blocks of 32, new scales", ["MatMulNBits"]),
    "4 bits, to 8": ({}, 0.05, "8 bits in blocks of 32", ["MatMulNBits"]),
    "4 bits with zero points, to 8": ({"symmetric": False}, 0.05, "8 bits in blocks of 32", ["MatMulNBits"]),
    "2 bits, to 8": ({"bits": 2, "block": 16}, 0.05, "8 bits in blocks of 16", ["MatMulNBits"]),
    "4 bits, to floats": ({}, 1e-3, "float32", ["Transpose", "MatMul"]),
    "8 bits, with new scales": ({"bits": 8}, 0.05, "8 bits in blocks of 32, new scales", ["MatMulNBits"]),
    "8 bits, to floats": ({"bits": 8}, 1e-3, "float32", ["Transpose", "MatMul"]),
    "DequantizeLinear, kept": ({"as_pairs": True}, 0.5, "int4 in blocks of 32", ["DequantizeLinear", "MatMul"]),
    "DequantizeLinear, to floats": ({"as_pairs": True}, 0.05, "float32", ["MatMul"]),
}


@PAIRED_OTHERWISE
@pytest.mark.parametrize("case", FORMS)
def test_a_layer_is_stored_in_the_narrowest_form_that_holds_its_change(
    case: str, beside: bool, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_copy, "BLOCK", block)
    options, strength, form, operators = FORMS[case]
    base = quantised(float_graph(tmp_path / "f.onnx"), **options)
    path = save_model(base, tmp_path / "q.onnx", beside=beside)
    model, report = merge_requantised(path, peft_adapter(tmp_path / "ad", {"fc": (A, B * strength)}))
    assert [node.op_type for node in model.graph] == operators
    (layer,), (result,) = report.layers, report.results
    assert (layer.weight, layer.stored, layer.is_kept) == ("fc.weight", form, "kept" in case)
    assert layer.is_kept or re.search(r"\d% of its change would be left|scales the noise would be 0.", layer.why)
    before, change = dequantised_weight(base), (B * strength @ A).astype(np.float32)
    after, total = dequantised_weight(model).copy(), before + change
    np.testing.assert_allclose(
        (result.retention, result.noise), expected_retention_and_noise(before, change, after), rtol=1e-3, atol=1e-4
    )
    if form == "float32":
        assert np.abs(after - total).max() <= 2**-22 * np.abs(total).max() and len(contents(model)) == 1
    elif not layer.is_kept:
        scales = next(stored(model, name).copy() for name in model.graph.initializers if name.endswith("scales"))
        step = np.repeat(np.abs(scales).reshape(OUT, -1), int(re.findall(r"\d+", form)[1]), axis=1)[:, :IN]
        assert (np.abs(after - total) <= (1.0001 if "4 bits" in form else 0.5001) * step).all()
        assert len(contents(model)) == 2  # no zero points
    x = np.eye(IN, dtype=np.float32)
    product = run(model, x=x)["y0"].T
    assert np.linalg.norm(product - after) < (0.03 if "DequantizeLinear" in operators else 1e-6) * np.linalg.norm(after)


def test_noise_above_the_change_promotes_whatever_retention_is_asked(tmp_path: Path) -> None:
    path = save_model(quantised(float_graph(tmp_path / "f.onnx")), tmp_path / "q.onnx")
    single = np.where(np.arange(IN) == 1, 1.0, 0)[None]  # changes one column, by a third of the step
    step = stored(load_graph(path), "fc.weight_scales").reshape(OUT, -1)[:, :1]
    adapter = peft_adapter(tmp_path / "ad", {"fc": (single, 0.51 * np.abs(step))})
    _, report = merge_requantised(path, adapter, min_retention=0)
    assert report.layers[0].is_kept or "noise" in report.layers[0].why


BIAS = ", float[2] b = {10, 20}"


@pytest.mark.parametrize(("strength", "operators"), [(0.02, ["MatMulNBits"]), (1e-4, ["Transpose", "MatMul", "Add"])])
def test_a_bias_of_a_promoted_layer_is_added(strength: float, operators: list[str], tmp_path: Path) -> None:
    path = save_model(by_hand(BIAS, ", , , b"), tmp_path / "m.onnx")
    change = np.outer([0, 1], [0, strength, -4 * strength])
    model, _ = merge_requantised(path, peft_adapter(tmp_path / "ad", {"fc": ([change[1]], [[0], [1]])}))
    assert [node.op_type for node in model.graph] == operators
    expected = np.array([[0, 0.5, -0.5], [-14, 0, -4]]) + change
    found = run(model, x=np.eye(3, dtype=np.float32))["y"]
    assert np.abs(found - expected.T - [10, 20]).max() < (0.06 if len(operators) == 1 else 1e-6)


def test_a_layer_that_shares_its_scales_leaves_them_to_the_others(tmp_path: Path) -> None:
    model = by_hand()
    model.graph.initializers["fc.weight_Q4"].name = "a.weight_Q4"
    other = ir.Tensor(stored(model, "a.weight_Q4").copy(), name="b.weight_Q4")
    value = ir.Value(name="b.weight_Q4", const_value=other, type=ir.TensorType(other.dtype), shape=other.shape)
    model.graph.register_initializer(value)
    first = model.graph.node(0)
    second = ir.node(
        "MatMulNBits", [first.inputs[0], value, first.inputs[2]], dict(first.attributes), domain="com.microsoft"
    )
    second.outputs[0].name, second.outputs[0].type = "z", first.outputs[0].type
    second.outputs[0].shape = first.outputs[0].shape
    model.graph.append(second)
    model.graph.outputs.append(second.outputs[0])
    path = save_model(model, tmp_path / "m.onnx")
    merged, _ = merge_requantised(path, peft_adapter(tmp_path / "ad", {"b": ([[0, 0.02, -0.08]], [[0], [1]])}))
    assert [node.attributes["bits"].as_int() for node in merged.graph] == [4, 8]
    x = np.eye(3, dtype=np.float32)
    assert np.array_equal(run(merged, x=x)["y"], run(model, x=x)["y"])
    assert 0 < np.abs(run(merged, x=x)["z"] - run(model, x=x)["y"]).max() < 0.1


def test_convolution_weights_are_kept_and_promoted(tmp_path: Path) -> None:
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N,2,4,4] x) => (float[N,3,2,2] y) <int8[1] "conv.weight_quantized" = {0}, float[3] s = {0.5, 1, 2}>
        { w = DequantizeLinear <axis = 0> ("conv.weight_quantized", s)
          y = Conv(x, w) }""")
    value = model.graph.initializers["conv.weight_quantized"]
    levels = RNG.integers(-90, 90, (3, 2, 3, 3)).astype(np.int8)
    value.const_value = ir.Tensor(levels, name=value.name)
    value.shape = ir.Shape(levels.shape)
    a, b = RNG.normal(size=(1, 2, 3, 3)), np.ones((3, 1, 1, 1))
    path, before = save_model(model, tmp_path / "m.onnx"), levels * np.float32([0.5, 1, 2])[:, None, None, None]
    for strength, is_kept in ((5.0, True), (0.01, False)):
        adapter = peft_adapter(tmp_path / f"{is_kept}", {"conv": (a * strength, b)})
        merged, report = merge_requantised(path, adapter)
        after = find_sites(merged).by_name["conv.weight"][0].array
        total = before + (a * strength).astype(np.float32)
        assert report.layers[0].is_kept is is_kept
        step = np.float32([0.25, 0.5, 1])[:, None, None, None] if is_kept else 1e-6
        assert (np.abs(after - total) <= step * 1.0001).all()


def test_floats_that_lose_the_change_too_are_refused_with_the_layers(tmp_path: Path) -> None:
    base = quantised(float_graph(tmp_path / "f.onnx", W.astype(np.float16)))
    path = save_model(base, tmp_path / "q.onnx")
    with pytest.raises(
        InputRefused, match=r"(?s)1 of 1 quantised weights cannot hold .*fc.weight \(4 bits.*Keep the adapter beside"
    ):
        merge_requantised(path, peft_adapter(tmp_path / "ad", {"fc": (A, B * 1e-5)}))
    model, report = merge_requantised(path, peft_adapter(tmp_path / "more", {"fc": (A, B * 0.003)}))
    assert report.layers[0].stored == "float16" and stored(model, "fc.weight").dtype == np.float16
    assert np.array_equal(
        stored(model, "fc.weight"), (dequantised_weight(base) + (B * 0.003 @ A).astype(np.float32)).astype(np.float16)
    )


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", ["QInt8", "QUInt8"])
def test_static_quantisation_keeps_its_scales(
    kind: str, per_channel: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{"x": RNG.normal(size=(4, IN)).astype(np.float32)}]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    graph_file(tmp_path / "f.onnx", {"fc.weight": W})
    path = tmp_path / "base.onnx"
    quantize_static(
        tmp_path / "f.onnx", path, Reader(), quant_format=QuantFormat.QDQ, per_channel=per_channel,
        weight_type=QuantType[kind], activation_type=QuantType.QUInt8, op_types_to_quantize=["MatMul"],
    )  # fmt: skip
    adapter = peft_adapter(tmp_path / "ad", {"fc": (A, B)})
    capsys.readouterr()
    assert cli.run(merge_command(path, adapter, "--requantize", "--dry-run")) == 0
    assert "2 activations are quantised too" in capsys.readouterr().err
    base = load_graph(path)
    model, report = merge_requantised(path, adapter)
    old, new = contents(base), contents(model)
    assert {name for name in new if new[name] != old[name]} == {"fc.weight_quantized"} and report.layers[0].is_kept
    exact = find_sites(base).by_name["fc.weight"][0].nearest(dequantised_weight(base) + B @ A)
    assert np.mean(np.isclose(dequantised_weight(model), exact, rtol=1e-6)) > 0.999


def test_other_weights_keep_their_bytes(tmp_path: Path) -> None:
    floats = graph_file(tmp_path / "f.onnx", {"a.weight": W, "b.weight": W[:, ::-1].copy()})
    base = quantised(ir.from_proto(onnx.load(floats)), symmetric=False)
    for beside in (False, True):
        for strength, others in ((1, {"a.weight_Q4"}), (0.001, {"a.weight"})):
            path = save_model(base, tmp_path / f"{beside}{strength}.onnx", beside=beside)
            model, report = merge_requantised(path, peft_adapter(tmp_path / f"{strength}", {"a": (A, B * strength)}))
            before, after = contents(base), contents(model)
            assert {name for name in after if before.get(name) != after[name]} == others
            assert not beside or report.copied >= len(before["b.weight_Q4"])


def test_a_replaced_weight_becomes_floats(tmp_path: Path) -> None:
    base = quantised(float_graph(tmp_path / "f.onnx"))
    whole = RNG.normal(size=(OUT, IN)).astype(np.float32)
    adapter = peft_adapter(tmp_path / "ad", {}, {"fc.weight": whole})
    model, report = merge_requantised(save_model(base, tmp_path / "q.onnx", beside=True), adapter)
    assert np.array_equal(dequantised_weight(model), whole) and list(model.graph.initializers) == ["fc.weight"]
    assert (report.layers[0].stored, report.layers[0].why) == ("float32", "the adapter has values of its own")
