"""Quantised weights that are merged into and quantised again: by hand, and against onnxruntime's quantisers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from lora_export import cli
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.storage import block_copy
from support.graphs import contents, quantised, run, stored
from support.handmade import graph_file, peft_adapter
from support.requantised_graphs import (
    BLOCK_SIZES,
    DEQUANTISED,
    IN,
    LOCATIONS,
    OUT,
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


def by_hand(zeros: str = "") -> ir.Model:
    return ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        g (float[N,3] x) => (float[N,2] y)
        <uint8[2,1,8] "fc.weight_Q4" = {{152, 7, 0,0,0,0,0,0, 143, 10, 0,0,0,0,0,0}}, float[2] s = {{0.5, -2}}{zeros}>
        {{ y = com.microsoft.MatMulNBits <K = 3, N = 2, bits = 4, block_size = 16>
               (x, "fc.weight_Q4", s{", z" if zeros else ""}) }}""")


def test_four_bits_by_hand(tmp_path: Path) -> None:
    # Minus 8, W is [[0, 1, -1] * 0.5, [7, 0, 2] * -2]; ΔW is [[0, 0, 0], [0, 3, -12]].
    # W' is [[0, 0.5, -0.5], [-14, 3, -16]].
    path = save_model(by_hand(), tmp_path / "m.onnx")
    adapter = peft_adapter(tmp_path / "ad", {"fc": ([[0, 1, -4]], [[0], [3]])})
    model, report = merge_requantised(path, adapter)
    # The largest entry becomes the lowest integer, 0: scales are -0.5 / -8 (0.5 is as large) and -16 / -8.
    assert stored(model, "s").tolist() == [0.0625, 2]
    # Minus 8: [0, 8, -8], where 8 is clipped; [-7, 1.5, -8], where 1.5 is rounded to 2.
    assert stored(model, "fc.weight_Q4")[:, 0, :2].tolist() == [[15 << 4 | 8, 0], [10 << 4 | 1, 0]]
    after = np.array([[0, 7 * 0.0625, -0.5], [-14, 4, -16]])
    assert np.array_equal(dequantised_weight(model), after)
    expected = expected_retention_and_noise([[0, 0.5, -0.5], [-14, 0, -4]], np.array([[0, 0, 0], [0, 3, -12]]), after)
    np.testing.assert_allclose(retention_and_noise(report), expected)
    assert report.results[0].changed == 3


def test_zero_points_by_hand(tmp_path: Path) -> None:
    # Zero points 3 and 10: W is [[5, 6, 4] * 0.5, [5, -2, 0] * -2]; W + ΔW is [[2.5, 3, 2], [-10, 5, 20]].
    path = save_model(by_hand(", uint8[2] z = {3, 10}"), tmp_path / "m.onnx")
    model, _ = merge_requantised(path, peft_adapter(tmp_path / "ad", {"fc": ([[0, 1, 20]], [[0], [1]])}))
    assert stored(model, "s").tolist() == [np.float32(3) / np.float32(15), 2]  # (3 - 0) / 15; (20 + 10) / 15
    assert stored(model, "z").tolist() == [0, 5]
    # 2.5 / 0.2 is 12.5, and in fp32 a little less; -10 / 2 + 5 is 0, 2.5 + 5 is rounded to 8.
    assert stored(model, "fc.weight_Q4")[:, 0, :2].tolist() == [[15 << 4 | 12, 10], [8 << 4 | 0, 15]]


# The stored scales, zero points and integers of W' (in, out).
EXPECTED: dict[str, tuple[Any, Any, Any]] = {
    # [[1, -1], [2, 63]] + [[0, -1], [0, -190]]: 127 is the largest; 2 / 1 is 2.
    "int8 by tensor": (1, 0, [[1, -2], [2, -127]]),
    # [[1, -2], [2, 127]] + the same ΔW: 2 / 127 and 63 / 127.
    "int8 by column": ([2 / 127, 63 / 127], None, [[64, -6], [127, -127]]),
    # [[1, -1], [4, 127]] + the same ΔW: 2 / 127 and 63 / 127.
    "int8 by row": ([2 / 127, 63 / 127], None, [[64, -127], [8, -127]]),
    # [[-0.5, -2], [0.5, 125]] + the same ΔW: 1 / 255, 65 / 255; zero at 127.5, in fp32 a little less, and 255.
    "uint8 by column": ([1 / 255, 65 / 255], [127, 255], [[0, 243], [254, 0]]),
    # [[0.5, -1], [1.5, -7]] + the same ΔW: 1.5 / 15 in bfloat16 is 0.10009765625, 197 / 15 is 13.125.
    "int4 by column": ([0.10009765625, 13.125], [-8, 7], [[-3, 7], [7, -8]]),
    # [[1, 2], [2, 8]] + the same ΔW: -2 / 8; -182 / -8
    "int4 down": ([[-0.25, 22.75]], None, [[-4, 0], [-8, -8]]),
    "int16 by tensor": (127 / 32767, 0, [[258, -516], [516, -32767]]),
}


@BLOCK_SIZES
@LOCATIONS
@pytest.mark.parametrize("kind", DEQUANTISED)
def test_dequantize_linear_by_hand(
    kind: str, beside: bool, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_copy, "BLOCK", block if block > 1000 else 1)
    path = save_model(dequantize_graph(kind), tmp_path / "m.onnx", beside=beside)
    adapter = peft_adapter(tmp_path / "ad", {"fc": ([[1, 190]], [[0], [-1]])})
    model, report = merge_requantised(path, adapter, min_retention=0)
    scales, zeros, levels = EXPECTED[kind]
    assert np.allclose(stored(model, "s").astype(np.float64), scales, rtol=1e-6, atol=0)
    assert np.shape(stored(model, "s")) == np.shape(DEQUANTISED[kind][2])
    if zeros is not None:
        assert stored(model, "z").astype(int).tolist() == zeros
    assert stored(model, "fc.weight_quantized").astype(int).tolist() == levels
    before, after = dequantised_weight(load_graph(path)), dequantised_weight(model)
    np.testing.assert_allclose(
        retention_and_noise(report),
        expected_retention_and_noise(before, np.array([[0, 0], [-1, -190]]), after),
        rtol=1e-5,
    )


def differing(one: ir.Model, other: ir.Model) -> dict[str, float]:
    """The fraction of differing numbers in each initializer of two graphs. Floats may differ in their last bits."""
    assert list(one.graph.initializers) == list(other.graph.initializers)
    fractions = {}
    for name in one.graph.initializers:
        ours, theirs = stored(one, name), stored(other, name)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        close = np.isclose(ours, theirs, rtol=1e-6) if ours.dtype.kind == "f" else ours == theirs
        fractions[name] = 1 - float(np.mean(close))
    return fractions


@BLOCK_SIZES
@LOCATIONS
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "size", "as_pairs"),
    [(2, 16, False), (4, 16, False), (4, 32, False), (4, 128, False), (8, 32, False), (4, 32, True), (4, 128, True)],
)
def test_result_equals_onnxruntime_quantising_merged_weight(
    bits: int, size: int, symmetric: bool, as_pairs: bool, beside: bool, block: int,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(block_copy, "BLOCK", block)
    options = {"bits": bits, "block": size, "symmetric": symmetric, "as_pairs": as_pairs}
    base = quantised(float_graph(tmp_path / "f.onnx"), **options)
    path = save_model(base, tmp_path / "q.onnx", beside=beside)
    before, change = dequantised_weight(base), (B @ A).astype(np.float32)
    model, report = merge_requantised(path, peft_adapter(tmp_path / "ad", {"fc": (A, B)}), min_retention=0)
    oracle = quantised(float_graph(tmp_path / "o.onnx", np.ascontiguousarray((before + change).T)), **options)
    # W' is summed in another order, so that a few numbers are rounded to the other side.
    assert max(differing(model, oracle).values()) < 0.01
    assert max(differing(model, base).values()) > 0.5
    np.testing.assert_allclose(
        retention_and_noise(report), expected_retention_and_noise(before, change, dequantised_weight(model)), rtol=1e-4
    )
    x = RNG.normal(size=(3, IN)).astype(np.float32)
    expected = x @ dequantised_weight(model).T
    # onnxruntime makes a product in eight bits of a DequantizeLinear.
    assert np.linalg.norm(run(model, x=x)["y0"] - expected) < (0.03 if as_pairs else 1e-5) * np.linalg.norm(expected)
    assert not list(tmp_path.glob("out*/weights.data"))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", ["QInt8", "QUInt8"])
def test_result_equals_static_quantisation_of_merged_weight(
    kind: str, per_channel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{"x": RNG.normal(size=(4, IN)).astype(np.float32)}]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    def statically(weight: NDArray[Any], name: str) -> Path:
        graph_file(tmp_path / f"{name}.f.onnx", {"fc.weight": np.ascontiguousarray(weight)})
        quantize_static(
            tmp_path / f"{name}.f.onnx", tmp_path / f"{name}.onnx", Reader(), quant_format=QuantFormat.QDQ,
            per_channel=per_channel, weight_type=QuantType[kind], activation_type=QuantType.QUInt8,
            op_types_to_quantize=["MatMul"],
        )  # fmt: skip
        return tmp_path / f"{name}.onnx"

    monkeypatch.setattr(block_copy, "BLOCK", 1000)
    path = statically(W, "base")
    capsys.readouterr()
    assert cli.run(merge_command(path, peft_adapter(tmp_path / "ad", {"fc": (A, B)}), "--requantize", "--dry-run")) == 0
    assert "2 activations are quantised too" in capsys.readouterr().err
    before, change = dequantised_weight(load_graph(path)), (B @ A).astype(np.float32)
    model, report = merge_requantised(path, peft_adapter(tmp_path / "ad", {"fc": (A, B)}))
    oracle = load_graph(statically((before + change).T, "oracle"))
    names = [name for name in contents(model) if name.startswith("fc.weight")]
    fractions = differing(model, oracle)
    assert len(names) == 3 and fractions["fc.weight_quantized"] < 0.01
    for name in names:
        np.testing.assert_allclose(
            stored(model, name).astype(np.float64), stored(oracle, name).astype(np.float64), rtol=1e-6, atol=1
        )
    assert report.results[0].retention > 0.99
    assert not np.array_equal(stored(model, "fc.weight_quantized"), stored(load_graph(path), "fc.weight_quantized"))


def test_half_precision_scales_are_rounded_before_integers(tmp_path: Path) -> None:
    base = quantised(float_graph(tmp_path / "f.onnx", W.astype(np.float16)))
    before = dequantised_weight(base)
    model, report = merge_requantised(
        save_model(base, tmp_path / "q.onnx"), peft_adapter(tmp_path / "ad", {"fc": (A, B)})
    )
    scales = stored(model, "fc.weight_scales")
    assert scales.dtype == np.float16
    exact = before.astype(np.float64) + B @ A
    error = np.abs(dequantised_weight(model) - exact).reshape(OUT, -1)
    step = np.repeat(np.abs(scales.astype(np.float64)).reshape(OUT, -1), 32, axis=1)[:, :IN]
    extreme = np.abs(exact) >= 7.4 * step  # one end of a symmetric range is a step shorter
    assert (error <= step * 0.501)[~extreme].all() and (~extreme).mean() > 0.9
    assert report.results[0].retention == pytest.approx(
        expected_retention_and_noise(before, B @ A, dequantised_weight(model))[0], rel=1e-3
    )


def test_other_weights_keep_their_bytes(tmp_path: Path) -> None:
    floats = graph_file(tmp_path / "f.onnx", {"a.weight": W, "b.weight": W[:, ::-1].copy()})
    base = quantised(ir.from_proto(onnx.load(floats)), symmetric=False)
    for beside in (False, True):
        path = save_model(base, tmp_path / f"{beside}.onnx", beside=beside)
        model, report = merge_requantised(path, peft_adapter(tmp_path / "ad", {"a": (A, B)}))
        before, after = contents(base), contents(model)
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {"a.weight_Q4", "a.weight_scales", "a.weight_zero_points"}
        assert not beside or report.copied >= len(before["b.weight_Q4"])


def test_whole_tensor_is_quantised_as_the_weight_it_replaces(tmp_path: Path) -> None:
    base = quantised(float_graph(tmp_path / "f.onnx"))
    whole = RNG.normal(size=(OUT, IN)).astype(np.float32)
    adapter = peft_adapter(tmp_path / "ad", {}, {"fc.weight": whole})
    model, report = merge_requantised(save_model(base, tmp_path / "q.onnx", beside=True), adapter)
    oracle = quantised(float_graph(tmp_path / "o.onnx", np.ascontiguousarray(whole.T)))
    assert contents(model) == contents(oracle)
    before = dequantised_weight(base)
    np.testing.assert_allclose(
        retention_and_noise(report),
        expected_retention_and_noise(before, whole - before, dequantised_weight(model)),
        rtol=1e-4,
    )
