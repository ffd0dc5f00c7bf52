"""Quantised weights merged into and quantised again: by hand, and against onnxruntime's own quantisers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from lora_export import cli, formats, plan
from lora_export.errors import InputRefused
from lora_export.graph.find_sites import find_sites
from lora_export.graph.merge.merge_graph import merge_graph
from lora_export.graph.onnx_file.reading import load_graph, open_graph
from lora_export.storage import block_copy
from lora_export.weights.merge_report import MergeReport
from support.folder_contents import folder_contents
from support.graphs import contents, quantised, run, stored
from support.handmade import base_file, graph_file, peft_adapter

RNG = np.random.default_rng(0)
IN, OUT = 80, 48  # 80 is no multiple of 32
W = RNG.normal(size=(IN, OUT)).astype(np.float32)
A, B = RNG.normal(size=(4, IN)), RNG.normal(size=(OUT, 4)) * 0.3
BOTH_WAYS = pytest.mark.parametrize("block", [1000, 1 << 21], ids=["in many blocks", "in one"])
PLACES = pytest.mark.parametrize("beside", [False, True], ids=["inside", "beside"])


def saved(model: ir.Model, path: Path, *, beside: bool = False) -> Path:
    proto = ir.to_proto(model)
    apart = {"save_as_external_data": True, "location": "w.data", "size_threshold": 0} if beside else {}
    onnx.save(proto, path, **apart)
    return path


def merged(path: Path, adapter: Path, *, base: Path | None = None, **options: Any) -> tuple[ir.Model, MergeReport]:
    from lora_export.weights.checkpoint import open_checkpoint

    stage = path.parent / f"out{len(list(path.parent.iterdir()))}"
    stage.mkdir()
    graph = open_graph(path)
    sites = find_sites(graph.model, None if base is None else open_checkpoint(base))
    steps = plan.make([formats.load(adapter)], sites.specs)
    report = merge_graph(steps, graph, sites, stage, file_name="m.onnx", requantise=True, **options)
    return load_graph(stage / "m.onnx"), report


def the_weight(model: ir.Model, name: str = "fc.weight") -> NDArray[np.float32]:
    """As it computes, (out, in)."""
    return find_sites(model).by_name[name][0].matrix


def told(report: MergeReport) -> tuple[float, float]:
    (result,) = report.results
    return result.retention, result.noise


def figures(before: Any, change: Any, after: Any) -> tuple[float, float]:
    """Retention and noise, in fp64."""
    kept = np.asarray(after, np.float64) - before
    return float(np.vdot(kept, change) / np.vdot(change, change)), float(
        np.linalg.norm(kept - change) / np.linalg.norm(change)
    )


# --- by hand ---


def by_hand(zeros: str = "") -> ir.Model:
    return ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        g (float[N,3] x) => (float[N,2] y)
        <uint8[2,1,8] "fc.weight_Q4" = {{152, 7, 0,0,0,0,0,0, 143, 10, 0,0,0,0,0,0}}, float[2] s = {{0.5, -2}}{zeros}>
        {{ y = com.microsoft.MatMulNBits <K = 3, N = 2, bits = 4, block_size = 16>
               (x, "fc.weight_Q4", s{", z" if zeros else ""}) }}""")


def test_four_bits_by_hand(tmp_path: Path) -> None:
    # Less 8, W is [[0, 1, -1] * 0.5, [7, 0, 2] * -2]; ΔW is [[0, 0, 0], [0, 3, -12]].
    # W' is [[0, 0.5, -0.5], [-14, 3, -16]].
    path = saved(by_hand(), tmp_path / "m.onnx")
    adapter = peft_adapter(tmp_path / "ad", {"fc": ([[0, 1, -4]], [[0], [3]])})
    model, report = merged(path, adapter)
    # What is largest becomes the lowest integer, 0: scales are -0.5 / -8 (0.5 is as large) and -16 / -8.
    assert stored(model, "s").tolist() == [0.0625, 2]
    # Less 8: [0, 8, -8], where 8 is one too many; [-7, 1.5, -8], where 1.5 is even 2.
    assert stored(model, "fc.weight_Q4")[:, 0, :2].tolist() == [[15 << 4 | 8, 0], [10 << 4 | 1, 0]]
    after = np.array([[0, 7 * 0.0625, -0.5], [-14, 4, -16]])
    assert np.array_equal(the_weight(model), after)
    expected = figures([[0, 0.5, -0.5], [-14, 0, -4]], np.array([[0, 0, 0], [0, 3, -12]]), after)
    np.testing.assert_allclose(told(report), expected)
    assert report.results[0].changed == 3


def test_zero_points_by_hand(tmp_path: Path) -> None:
    # Zero points 3 and 10: W is [[5, 6, 4] * 0.5, [5, -2, 0] * -2]; ΔW makes of it [[2.5, 3, 2], [-10, 5, 20]].
    path = saved(by_hand(", uint8[2] z = {3, 10}"), tmp_path / "m.onnx")
    model, _ = merged(path, peft_adapter(tmp_path / "ad", {"fc": ([[0, 1, 20]], [[0], [1]])}))
    assert stored(model, "s").tolist() == [np.float32(3) / np.float32(15), 2]  # (3 - 0) / 15; (20 + 10) / 15
    assert stored(model, "z").tolist() == [0, 5]
    # 2.5 / 0.2 is 12.5, and in fp32 a little less; -10 / 2 + 5 is 0, 2.5 + 5 even 8.
    assert stored(model, "fc.weight_Q4")[:, 0, :2].tolist() == [[15 << 4 | 12, 10], [8 << 4 | 0, 15]]


DEQUANTISED = {
    "int8 by tensor": ([[2, -2], [4, 126]], "<axis = 0>", np.float32(0.5), np.int8(0)),
    "int8 by column": ([[2, -2], [4, 127]], "<axis = 1>", np.float32([0.5, 1]), None),
    "int8 by row": ([[2, -2], [4, 127]], "<axis = 0>", np.float32([0.5, 1]), None),
    "uint8 by column": ([[2, 128], [4, 255]], "<axis = 1>", np.float32([0.5, 1]), np.uint8([3, 130])),
    "int4 by column": (
        [[2, -2], [4, -8]],
        "<axis = 1>",
        np.array([0.5, 1], ml_dtypes.bfloat16),
        np.array([1, -1], ml_dtypes.int4),
    ),
    "int4 down": ([[2, -2], [4, -8]], "<axis = 0, block_size = 2>", np.float32([[0.5, -1]]), None),
    "int16 by tensor": ([[2, -2], [4, 126]], "<axis = 0>", np.float32(0.5), np.int16(0)),
}


def a_pair(kind: str) -> ir.Model:
    """A 2 x 2 weight, (in, out), behind a DequantizeLinear."""
    integers, attributes, scale, zero = DEQUANTISED[kind]
    dtype = np.dtype(kind.split()[0]) if "4" not in kind.split()[0] else ml_dtypes.int4
    proto = ir.to_proto(
        ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N,2] x) => (float[N,2] y) <int8[1] "fc.weight_quantized" = {{0}}, float s = {{0}}, int8[1] z = {{0}}>
        {{ w = DequantizeLinear {attributes} ("fc.weight_quantized", s{", z" if zero is not None else ""})
           v = Cast <to = 1> (w)
           y = MatMul(x, v) }}""")
    )
    model = ir.from_proto(proto)
    for name, array in {"fc.weight_quantized": np.array(integers).astype(dtype), "s": scale, "z": zero}.items():
        value = model.graph.initializers[name]
        if array is None:
            del model.graph.initializers[name]
            continue
        value.const_value = ir.Tensor(np.asarray(array), name=name)
        value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(np.shape(array))
    return model


# W' in each, (in, out), and what it is stored as: scales, zero points, integers.
EXPECTED: dict[str, tuple[Any, Any, Any]] = {
    # [[1, -1], [2, 63]] + [[0, -1], [0, -190]]: 127 is the largest; 2 / 1 is 2.
    "int8 by tensor": (1, 0, [[1, -2], [2, -127]]),
    # [[1, -2], [2, 127]] + the same: 2 / 127 and 63 / 127.
    "int8 by column": ([2 / 127, 63 / 127], None, [[64, -6], [127, -127]]),
    # [[1, -1], [4, 127]] + the same: 2 / 127 and 63 / 127.
    "int8 by row": ([2 / 127, 63 / 127], None, [[64, -127], [8, -127]]),
    # [[-0.5, -2], [0.5, 125]] + the same: 1 / 255, 65 / 255; zero at 127.5, in fp32 a little less, and 255.
    "uint8 by column": ([1 / 255, 65 / 255], [127, 255], [[0, 243], [254, 0]]),
    # [[0.5, -1], [1.5, -7]] + the same: 1.5 / 15 in bfloat16 is 0.10009765625, 197 / 15 is 13.125.
    "int4 by column": ([0.10009765625, 13.125], [-8, 7], [[-3, 7], [7, -8]]),
    # [[1, 2], [2, 8]] + the same: -2 / 8; -182 / -8
    "int4 down": ([[-0.25, 22.75]], None, [[-4, 0], [-8, -8]]),
    "int16 by tensor": (127 / 32767, 0, [[258, -516], [516, -32767]]),
}


@BOTH_WAYS
@PLACES
@pytest.mark.parametrize("kind", DEQUANTISED)
def test_dequantised_pairs_by_hand(
    kind: str, beside: bool, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_copy, "BLOCK", block if block > 1000 else 1)
    path = saved(a_pair(kind), tmp_path / "m.onnx", beside=beside)
    adapter = peft_adapter(tmp_path / "ad", {"fc": ([[1, 190]], [[0], [-1]])})
    model, report = merged(path, adapter, min_retention=0)
    scales, zeros, levels = EXPECTED[kind]
    assert np.allclose(stored(model, "s").astype(np.float64), scales, rtol=1e-6, atol=0)
    assert np.shape(stored(model, "s")) == np.shape(DEQUANTISED[kind][2])
    if zeros is not None:
        assert stored(model, "z").astype(int).tolist() == zeros
    assert stored(model, "fc.weight_quantized").astype(int).tolist() == levels
    before, after = the_weight(load_graph(path)), the_weight(model)
    np.testing.assert_allclose(told(report), figures(before, np.array([[0, 0], [-1, -190]]), after), rtol=1e-5)


# --- onnxruntime's quantisers are the oracle ---


def a_float_graph(path: Path, weight: NDArray[Any] = W) -> ir.Model:
    return ir.from_proto(onnx.load(graph_file(path, {"fc.weight": weight})))


def differing(one: ir.Model, other: ir.Model) -> dict[str, float]:
    """The share of numbers in which two graphs' initializers differ; of floats, by more than their last bits."""
    assert list(one.graph.initializers) == list(other.graph.initializers)
    shares = {}
    for name in one.graph.initializers:
        here, there = stored(one, name), stored(other, name)
        assert (here.dtype, here.shape) == (there.dtype, there.shape)
        close = np.isclose(here, there, rtol=1e-6) if here.dtype.kind == "f" else here == there
        shares[name] = 1 - float(np.mean(close))
    return shares


@BOTH_WAYS
@PLACES
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "size", "as_pairs"),
    [(2, 16, False), (4, 16, False), (4, 32, False), (4, 128, False), (8, 32, False), (4, 32, True), (4, 128, True)],
)
def test_it_is_what_onnxruntime_makes_of_the_merged_weight(
    bits: int, size: int, symmetric: bool, as_pairs: bool, beside: bool, block: int,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(block_copy, "BLOCK", block)
    how = {"bits": bits, "block": size, "symmetric": symmetric, "as_pairs": as_pairs}
    base = quantised(a_float_graph(tmp_path / "f.onnx"), **how)
    path = saved(base, tmp_path / "q.onnx", beside=beside)
    before, change = the_weight(base), (B @ A).astype(np.float32)
    model, report = merged(path, peft_adapter(tmp_path / "ad", {"fc": (A, B)}), min_retention=0)
    oracle = quantised(a_float_graph(tmp_path / "o.onnx", np.ascontiguousarray((before + change).T)), **how)
    # W' is summed in another order there and here: a few numbers lie on the other side of a half.
    assert max(differing(model, oracle).values()) < 0.01
    assert max(differing(model, base).values()) > 0.5
    np.testing.assert_allclose(told(report), figures(before, change, the_weight(model)), rtol=1e-4)
    x = RNG.normal(size=(3, IN)).astype(np.float32)
    expected = x @ the_weight(model).T
    # Of pairs onnxruntime makes a product in eight bits.
    assert np.linalg.norm(run(model, x=x)["y0"] - expected) < (0.03 if as_pairs else 1e-5) * np.linalg.norm(expected)
    assert not list(tmp_path.glob("out*/weights.data"))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", ["QInt8", "QUInt8"])
def test_it_is_what_static_quantisation_makes_of_the_merged_weight(
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
    assert cli.run(line(path, peft_adapter(tmp_path / "ad", {"fc": (A, B)}), "--requantize", "--dry-run")) == 0
    assert "2 activations are quantised too" in capsys.readouterr().err
    before, change = the_weight(load_graph(path)), (B @ A).astype(np.float32)
    model, report = merged(path, peft_adapter(tmp_path / "ad", {"fc": (A, B)}))
    oracle = load_graph(statically((before + change).T, "oracle"))
    names = [name for name in contents(model) if name.startswith("fc.weight")]
    shares = differing(model, oracle)
    assert len(names) == 3 and shares["fc.weight_quantized"] < 0.01
    for name in names:
        np.testing.assert_allclose(
            stored(model, name).astype(np.float64), stored(oracle, name).astype(np.float64), rtol=1e-6, atol=1
        )
    assert report.results[0].retention > 0.99
    assert not np.array_equal(stored(model, "fc.weight_quantized"), stored(load_graph(path), "fc.weight_quantized"))


def test_scales_in_half_precision_are_rounded_before_the_integers_are_made(tmp_path: Path) -> None:
    base = quantised(a_float_graph(tmp_path / "f.onnx", W.astype(np.float16)))
    before = the_weight(base)
    model, report = merged(saved(base, tmp_path / "q.onnx"), peft_adapter(tmp_path / "ad", {"fc": (A, B)}))
    scales = stored(model, "fc.weight_scales")
    assert scales.dtype == np.float16
    exact = before.astype(np.float64) + B @ A
    error = np.abs(the_weight(model) - exact).reshape(OUT, -1)
    step = np.repeat(np.abs(scales.astype(np.float64)).reshape(OUT, -1), 32, axis=1)[:, :IN]
    extreme = np.abs(exact) >= 7.4 * step  # the one end of a symmetric range is a step shorter
    assert (error <= step * 0.501)[~extreme].all() and (~extreme).mean() > 0.9
    assert report.results[0].retention == pytest.approx(figures(before, B @ A, the_weight(model))[0], rel=1e-3)


# --- who is touched ---


def test_what_the_plan_does_not_touch_keeps_its_bytes(tmp_path: Path) -> None:
    floats = graph_file(tmp_path / "f.onnx", {"a.weight": W, "b.weight": W[:, ::-1].copy()})
    base = quantised(ir.from_proto(onnx.load(floats)), symmetric=False)
    for beside in (False, True):
        path = saved(base, tmp_path / f"{beside}.onnx", beside=beside)
        model, report = merged(path, peft_adapter(tmp_path / "ad", {"a": (A, B)}))
        before, after = contents(base), contents(model)
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {"a.weight_Q4", "a.weight_scales", "a.weight_zero_points"}
        assert not beside or report.copied >= len(before["b.weight_Q4"])


def shared(**what: str) -> ir.Model:
    """Two layers, b's integers, scales and zero points another's where that is said."""
    uses = {"levels": "lb", "scales": "sb", "zeros": "zb"} | what
    model = ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N,2] x) => (float[N,2] y)
        <int8[2,2] la = {{1, 2, 3, 127}}, float[2] sa = {{1, 2}}, int8[2] za = {{0, 0}},
         int8[2,2] lb = {{4, 3, 2, 127}}, float[2] sb = {{3, 4}}, int8[2] zb = {{0, 0}}>
        {{ v = DequantizeLinear <axis = 1> (la, sa, za)
           [a] h = MatMul(x, v)
           w = DequantizeLinear <axis = 1> ({uses["levels"]}, {uses["scales"]}, {uses["zeros"]})
           [b] y = MatMul(h, w) }}""")
    for node in model.graph:
        if node.op_type == "MatMul":
            node.metadata_props["pkg.torch.onnx.name_scopes"] = repr(["", str(node.name), "linear"])
    for name in {"lb", "sb", "zb"} - set(uses.values()):
        del model.graph.initializers[name]
    return model


@pytest.mark.parametrize(
    "what", [{"levels": "la"}, {"scales": "sa"}, {"zeros": "za"}, {"levels": "la", "scales": "sa"}]
)
@PLACES
def test_tensors_that_layers_share_are_given_to_the_one_that_changes(
    what: dict[str, str], beside: bool, tmp_path: Path
) -> None:
    path = saved(shared(**what), tmp_path / "m.onnx", beside=beside)
    before = {name: the_weight(load_graph(path), f"{name}.weight") for name in "ab"}
    model, _ = merged(path, peft_adapter(tmp_path / "ad", {"b": ([[10, 100]], [[1], [-1]])}))
    found = find_sites(model)
    after = {name: found.by_name[f"{name}.weight"][0].matrix for name in "ab"}
    assert np.array_equal(after["a"], before["a"])
    expected = before["b"] + np.array([[10, 100], [-10, -100]])
    scale = np.abs(expected).max(axis=1, keepdims=True) / 127
    assert (np.abs(after["b"] - expected) <= scale * 0.501).all()
    x = np.eye(2, dtype=np.float32)
    # onnxruntime itself multiplies such weights in eight bits.
    (answer,) = onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    np.testing.assert_allclose(answer, x @ after["a"].T @ after["b"].T, rtol=1e-5)
    if what == {"zeros": "za"}:  # they stay what they are, for both
        assert "za" in model.graph.initializers and not any("zeros" in name for name in model.graph.initializers)


def test_integers_that_are_read_with_several_scales_as_one_weight_are_refused(tmp_path: Path) -> None:
    model = shared(levels="la")
    for node in model.graph:
        if node.name == "b":
            node.metadata_props["pkg.torch.onnx.name_scopes"] = repr(["", "a", "linear"])
    path = saved(model, tmp_path / "m.onnx")
    adapter = peft_adapter(tmp_path / "ad", {"a": ([[10, 100]], [[1], [-1]])})
    with pytest.raises(InputRefused, match=r"several scales|no weight for a"):
        merged(path, adapter)


@BOTH_WAYS
@pytest.mark.parametrize("as_pairs", [False, True])
@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_a_block_of_a_packed_matrix_changes_and_its_neighbours_keep_their_bytes(
    use_dora: bool, as_pairs: bool, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_copy, "BLOCK", block)
    parts = {"q": W.T[:20], "k": W.T[20:30], "v": W.T[30:]}
    base = base_file(tmp_path / "b.safetensors", {f"attn.{name}.weight": part for name, part in parts.items()})
    model = quantised(
        ir.from_proto(onnx.load(graph_file(tmp_path / "f.onnx", {"packed_1": W}))), symmetric=False, as_pairs=as_pairs
    )
    path = saved(model, tmp_path / "q.onnx", beside=True)
    pairs = {f"attn.{name}": (A, RNG.normal(size=(len(parts[name]), 4)) * 0.3) for name in "qv"}
    adapter = peft_adapter(tmp_path / "ad", pairs, use_dora=use_dora)
    lengths = {name: RNG.uniform(5, 9, len(pair[1])).astype(np.float32) for name, pair in pairs.items()}
    if use_dora:
        file = adapter / "adapter_model.safetensors"
        vectors = {f"base_model.model.{name}.lora_magnitude_vector": length for name, length in lengths.items()}
        save_file(load_file(file) | vectors, file)
    before = find_sites(model).unnamed[0].matrix
    after, report = merged(path, adapter, base=base)
    total = before.astype(np.float64)
    for name, rows in (("attn.q", slice(20)), ("attn.v", slice(30, None))):
        total[rows] += pairs[name][1] @ pairs[name][0]
        if use_dora:
            total[rows] *= (lengths[name] / np.linalg.norm(total[rows], axis=1))[:, None]
    found = find_sites(after).unnamed[0].matrix
    assert found[20:30].tobytes() == before[20:30].tobytes()
    changed = np.r_[:20, 30:OUT]
    assert np.linalg.norm(found[changed] - total[changed]) < 0.12 * np.linalg.norm(total[changed])
    assert {there.weight: there.retention > 0.9 for there in report.results} == {
        "attn.q.weight": True, "attn.v.weight": True,
    }  # fmt: skip


def test_a_block_that_shares_its_scale_with_its_neighbours_is_refused_by_name(tmp_path: Path) -> None:
    parts = {"q": W.T[:20], "k": W.T[20:]}
    base = base_file(tmp_path / "b.safetensors", {f"attn.{name}.weight": part for name, part in parts.items()})
    scale = np.float32(np.abs(W).max() / 127)
    model = a_pair("int8 by tensor")
    for name, array in {"fc.weight_quantized": np.rint(W / scale).astype(np.int8), "s": scale}.items():
        value = model.graph.initializers[name]
        value.const_value, value.shape = ir.Tensor(np.asarray(array), name=name), ir.Shape(np.shape(array))
    value = model.graph.initializers["fc.weight_quantized"]
    value.name = "packed"
    model.graph.inputs[0].shape, model.graph.outputs[0].shape = ir.Shape(["N", IN]), ir.Shape(["N", OUT])
    path = saved(model, tmp_path / "q.onnx")
    for names, refused in (("q", True), ("qk", False)):
        pairs = {f"attn.{name}": (A, RNG.normal(size=(len(parts[name]), 4))) for name in names}
        adapter = peft_adapter(tmp_path / names, pairs)
        if refused:
            with pytest.raises(InputRefused, match=r"attn.q.weight shares a scale with its neighbours in packed"):
                merged(path, adapter, base=base)
        else:
            _, report = merged(path, adapter, base=base)
            assert [there.retention > 0.9 for there in report.results] == [True, True]


def test_a_whole_tensor_is_quantised_as_the_one_whose_place_it_takes(tmp_path: Path) -> None:
    base = quantised(a_float_graph(tmp_path / "f.onnx"))
    whole = RNG.normal(size=(OUT, IN)).astype(np.float32)
    adapter = peft_adapter(tmp_path / "ad", {}, {"fc.weight": whole})
    model, report = merged(saved(base, tmp_path / "q.onnx", beside=True), adapter)
    oracle = quantised(a_float_graph(tmp_path / "o.onnx", np.ascontiguousarray(whole.T)))
    assert contents(model) == contents(oracle)
    before = the_weight(base)
    np.testing.assert_allclose(told(report), figures(before, whole - before, the_weight(model)), rtol=1e-4)


# --- what is refused ---


def line(path: Path, adapter: Path, *options: str) -> list[str]:
    return ["merge", str(path), str(adapter), "-o", str(path.with_name("merged.onnx")), *options]


def test_a_weak_adapter_is_lost_in_four_bits_and_refused_with_the_ways_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = quantised(a_float_graph(tmp_path / "f.onnx"))
    path = saved(base, tmp_path / "q.onnx")
    adapter = peft_adapter(tmp_path / "ad", {"fc": (A, B * 0.003)})
    before = folder_contents(tmp_path)
    assert cli.run(line(path, adapter, "--requantize")) == 3
    told = capsys.readouterr().err
    assert "1 of 1 weights would lose most of their change" in told and "fc.weight: " in told
    assert "onnx MODEL.onnx --lora nodes" in told and "merge into the float model" in told
    assert "float32" not in told
    assert folder_contents(tmp_path) == before
    # The refusal is true: the figures, with nothing refused, are those of what is written.
    assert cli.run(line(path, adapter, "--requantize", "--min-retention", "0", "--json")) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    after = the_weight(load_graph(tmp_path / "merged.onnx"))
    expected = figures(the_weight(base), B @ A * 0.003, after)
    np.testing.assert_allclose((result["retention"], result["noise"]), expected, rtol=1e-3)
    assert result["retention"] < 0.5


def test_without_the_option_both_ways_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(quantised(a_float_graph(tmp_path / "f.onnx")), tmp_path / "q.onnx")
    adapter = peft_adapter(tmp_path / "ad", {"fc": (A, B)})
    assert cli.run(line(path, adapter)) == 3
    told = capsys.readouterr().err
    assert "fc.weight is quantised (4 bits in blocks of 32)" in told
    assert "onnx MODEL.onnx --lora nodes" in told and "merge --requantize" in told and "float model" in told
    assert cli.run(line(path, adapter, "--requantize", "--dry-run")) == 0
    assert "note: 1 weights are quantised again: 4 bits in blocks of 32" in capsys.readouterr().err
    assert cli.run(line(path, adapter, "--requantize")) == 0
    record = json.loads(load_graph(tmp_path / "merged.onnx").metadata_props["lora_export"])
    assert record["settings"]["requantize"] is True
    assert cli.run(line(tmp_path / "merged.onnx", adapter, "--requantize")) == 3  # the same adapter a second time
    base = base_file(tmp_path / "b.safetensors", {"fc.weight": W.T})
    assert cli.run([*line(base, adapter)[:-1], str(tmp_path / "m.safetensors"), "--requantize"]) == 2


def float8() -> ir.Model:
    model = a_pair("int8 by tensor")
    for name, array in {"fc.weight_quantized": np.ones((2, 2), ml_dtypes.float8_e4m3fn)}.items():
        value = model.graph.initializers[name]
        value.const_value, value.type = ir.Tensor(array, name=name), ir.TensorType(ir.DataType.FLOAT8E4M3FN)
    value = model.graph.initializers["z"]
    value.const_value = ir.Tensor(np.zeros((), ml_dtypes.float8_e4m3fn), name="z")
    value.type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
    return model


def int32() -> ir.Model:
    model = a_pair("int8 by row")
    value = model.graph.initializers["fc.weight_quantized"]
    value.const_value = ir.Tensor(np.ones((2, 2), np.int32), name=value.name)
    value.type = ir.TensorType(ir.DataType.INT32)
    return model


def without_zero_points() -> ir.Model:
    model = a_pair("int8 by row")
    value = model.graph.initializers["fc.weight_quantized"]
    value.const_value = ir.Tensor(np.ones((2, 2), np.uint8), name=value.name)
    value.type = ir.TensorType(ir.DataType.UINT8)
    return model


def not_finite() -> ir.Model:
    model = a_pair("int8 by row")
    model.graph.initializers["s"].const_value = ir.Tensor(np.float32([1, np.nan]), name="s")
    return model


def nf4() -> ir.Model:
    return ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        g (float[N,16] x) => (float[N,2] y)
        <uint8[16] "fc.weight_Bnb4" = {0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0}, float[2] s = {0.5, 2}>
        { y = com.microsoft.MatMulBnb4 <K = 16, N = 2, quant_type = 1, block_size = 16> (x, "fc.weight_Bnb4", s) }""")


def by_group_index() -> ir.Model:
    return ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        g (float[N,3] x) => (float[N,2] y)
        <uint8[2,1,8] "fc.weight_Q4" = {0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0}, float[2] s = {1, 2}, int32[3] i = {0, 0, 0}>
        { y = com.microsoft.MatMulNBits <K = 3, N = 2, bits = 4, block_size = 16> (x, "fc.weight_Q4", s, , i) }""")


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (float8, r"fc.weight is quantised in a way that cannot be repeated \(float8e4m3fn by tensor\)"),
        (int32, r"fc.weight is quantised in a way that cannot be repeated \(int32 by channel\)"),
        (without_zero_points, r"fc.weight is quantised without zero points .*: it cannot store negative values"),
        (not_finite, r"fc.weight: 2 values would not be finite: the graph's own tensor has such values"),
        (nf4, r"lora_A.weight: fc.weight is uint8 of MatMulBnb4: a quantised weight is never merged silently"),
        (
            by_group_index,
            r"lora_A.weight: fc.weight is uint8 of MatMulNBits: a quantised weight is never merged silently",
        ),
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_what_is_not_understood_is_refused_by_name(
    make: Callable[[], ir.Model], problem: str, beside: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(make(), tmp_path / "m.onnx", beside=beside)
    wide = load_graph(path).graph.inputs[0].shape[1]
    adapter = peft_adapter(tmp_path / "ad", {"fc": (np.ones((1, int(wide))), [[1], [2]])})
    before = folder_contents(tmp_path)
    assert cli.run(line(path, adapter, "--requantize")) == 3
    assert re.search(problem, capsys.readouterr().err)
    assert folder_contents(tmp_path) == before
