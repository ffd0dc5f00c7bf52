"""Quantised weights must be the model's, rounded: what is wrong with them, no output shows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_export import plan
from lora_export.graph.find_sites import find_sites
from lora_export.graph.insert.adapter_nodes import insert_nodes
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.graph.quantised_weights import Steps, unpack_bits
from lora_export.models.export import to_onnx
from lora_export.models.load import load_model
from lora_export.models.model import Model
from lora_export.models.traced_lengths import with_traced_lengths
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.verification import parity
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.proof import prove
from lora_export.verification.references.quantisation_error import (
    NearestNumbers,
    OutputErrors,
    findings_on,
    output_errors,
    quantisation_error_of,
)
from support import FACTORIES
from support.graphs import in_int8, quantised
from support.wide_model import adapter_for_wide

pytestmark = pytest.mark.usefixtures("undiagnosed")

Change = Callable[[NDArray[Any]], NDArray[Any]]


@pytest.fixture(scope="module")
def wide() -> Model:
    return with_traced_lengths(load_model(f"{FACTORIES}:wide"))


@pytest.fixture(scope="module")
def floats(wide: Model) -> ir.Model:
    return to_onnx(wide.module, wide.example_inputs(), axes=wide.axes)


SCHEMES: dict[str, Callable[[ir.Model], ir.Model]] = {
    "MatMulNBits, 4 bits": quantised,
    "MatMulNBits, 4 bits, zero points": lambda graph: quantised(graph, symmetric=False),
    "MatMulNBits, 4 bits, blocks of 16": lambda graph: quantised(graph, block=16),
    "MatMulNBits, 8 bits": lambda graph: quantised(graph, bits=8),
    "MatMulNBits, 8 bits, zero points": lambda graph: quantised(graph, bits=8, symmetric=False),
    "DequantizeLinear, int4": lambda graph: quantised(graph, as_pairs=True),
    "DequantizeLinear, int4, zero points": lambda graph: quantised(graph, as_pairs=True, symmetric=False),
    "DequantizeLinear, int8 by channel": in_int8,
    "DequantizeLinear, int8 by input": lambda graph: in_int8(graph, axis=0),
    "DequantizeLinear, int8 by tensor": lambda graph: in_int8(graph, axis=None),
    "DequantizeLinear, uint8 by channel": lambda graph: in_int8(graph, zeros=True),
    "DequantizeLinear, uint8 by tensor": lambda graph: in_int8(graph, axis=None, zeros=True),
}
EVERY_SCHEME = pytest.mark.parametrize("scheme", SCHEMES)


def verdict_of(graph: ir.Model, model: Model, folder: Path) -> parity.Verdict:
    """The verdict on a graph beside whose weights the adapter is inserted."""
    for node in graph.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    found = find_sites(graph)
    insert_nodes(graph, found, plan.make([adapter_for_wide(4.0)], found.specs))
    save_graph(graph, folder, "m.onnx")
    return prove(OnnxRunner(folder / "m.onnx"), PyTorchReferences(model, [adapter_for_wide(4.0)])).verdict


def change(graph: ir.Model, part: str, change: Change, *, of: str = "down") -> None:
    """Change the integers, scales or zero points of one weight. Integers of 4 bits are changed as (rows, bytes)."""
    (site,) = (site for site in find_sites(graph).by_name[f"{of}.weight"])
    assert site.quantised is not None
    is_packed = site.quantised.node.op_type == "MatMulNBits"
    value = site.quantised.node.inputs[["integers", "scales", "zeros"].index(part) + is_packed]
    assert value is not None and value.const_value is not None
    old = value.const_value
    if old.dtype in (ir.DataType.INT4, ir.DataType.UINT4):
        array = change(old.numpy().astype(np.int8))
        value.const_value = ir.Tensor(array.astype(old.dtype.numpy()), dtype=old.dtype, name=value.name)
        return
    bits = site.quantised.node.attributes.get_int("bits", 8) if is_packed and part != "scales" else 8
    if bits == 4:
        levels = change(unpack_bits(old.numpy(), 4))
        packed = levels[..., ::2].astype(np.uint8) | (levels[..., 1::2].astype(np.uint8) << 4)
        value.const_value = ir.Tensor(packed, name=value.name)
    else:
        value.const_value = ir.Tensor(change(old.numpy().copy()).astype(old.dtype.numpy()), name=value.name)


@EVERY_SCHEME
def test_right_rounding_is_same(scheme: str, wide: Model, floats: ir.Model, tmp_path: Path) -> None:
    verdict = verdict_of(SCHEMES[scheme](floats.clone()), wide, tmp_path)
    assert verdict.same, str(verdict)
    assert not any("each integer" in part for part in verdict.not_judged)


def noisy(levels: NDArray[Any]) -> NDArray[Any]:
    noise = np.random.default_rng(0).integers(-1, 2, size=levels.shape)
    return np.clip(levels.astype(int) + noise, levels.min(), levels.max())


def permuted(levels: NDArray[Any]) -> NDArray[Any]:
    flat = levels.reshape(-1)
    flat[:16] = flat[:16][::-1].copy()
    return levels


# Both blank 6 of 192 blocks, in no row more than one.


def blank_scales(scales: NDArray[Any]) -> NDArray[Any]:
    scales.reshape(-1, 1)[:: scales.size // 6] = 0
    return scales


def blank_integers(levels: NDArray[Any]) -> NDArray[Any]:
    blocks = levels.reshape(-1, 32)
    blocks[:: len(blocks) // 6] = 0 if levels.min() < 0 else 1 << (int(levels.max()).bit_length() - 1)
    return levels


def first_one_less(zeros: NDArray[Any]) -> NDArray[Any]:
    wider = zeros.astype(int)
    wider.reshape(-1)[0] -= 1
    return wider


BY_BLOCK = [name for name in SCHEMES if name.endswith(("bits", "int4"))]
WITH_ZEROS = ["MatMulNBits, 4 bits, zero points", "MatMulNBits, 8 bits, zero points",
              "DequantizeLinear, int4, zero points", "DequantizeLinear, uint8 by channel"]  # fmt: skip
SOME = list(SCHEMES)[1::2]  # of each operator, with and without zero points
MISROUNDED = "[0-9,]+ of 6,144 integers are not the nearest to the right weight"
BLANK = "all numbers are the same in each of 6 blocks of 32"


class Fault(NamedTuple):
    part: str
    change: Change
    schemes: Iterable[str]
    told: str  # a pattern of the text, behind the name of the weight
    weights: tuple[str, ...] = ("down",)
    outcome: parity.Outcome = parity.Outcome.DIFFERENT


FAULTS = {
    "noise": Fault("integers", noisy, SCHEMES, MISROUNDED, ("up", "down")),
    "other scales": Fault("scales", lambda scales: scales * np.float32(1.5), SOME, MISROUNDED),
    "a permuted block": Fault("integers", permuted, SOME, MISROUNDED),
    "blank scales": Fault("scales", blank_scales, BY_BLOCK, BLANK),
    "blank integers": Fault("integers", blank_integers, BY_BLOCK, BLANK),
    "the zero point off by one": Fault("zeros", first_one_less, ["DequantizeLinear, uint8 by tensor"], MISROUNDED),
    # Of one block, or one row: few integers are wrong.
    "a zero point off by one": Fault("zeros", first_one_less, WITH_ZEROS, MISROUNDED, outcome=parity.Outcome.UNDECIDED),
}


@pytest.mark.parametrize(("name", "scheme"), [(name, scheme) for name in FAULTS for scheme in FAULTS[name].schemes])
def test_a_fault_is_found_in_its_weight(name: str, scheme: str, wide: Model, floats: ir.Model, tmp_path: Path) -> None:
    graph, fault = SCHEMES[scheme](floats.clone()), FAULTS[name]
    for weight in fault.weights:
        change(graph, fault.part, fault.change, of=weight)
    verdict = verdict_of(graph, wide, tmp_path)
    assert verdict.outcome is fault.outcome, str(verdict)
    texts = [reason.text for reason in verdict.reasons]
    for weight in fault.weights:
        assert any(re.match(f"{weight}.weight: {fault.told}", text) for text in texts), str(verdict)
    assert {text.partition(":")[0] for text in texts} == {f"{weight}.weight" for weight in fault.weights}


def test_few_wrong_integers_are_undecided_by_name(wide: Model, floats: ir.Model, tmp_path: Path) -> None:
    graph = quantised(floats.clone())

    def off(levels: NDArray[Any]) -> NDArray[Any]:
        flat = levels.reshape(-1)
        flat[:3] = np.clip(flat[:3].astype(int) + np.array([1, -1, 1]), 0, 15)
        return levels

    change(graph, "integers", off)
    verdict = verdict_of(graph, wide, tmp_path)
    assert verdict.outcome is parity.Outcome.UNDECIDED, str(verdict)
    (reason,) = verdict.distinct_reasons
    assert re.match(r"down.weight: [23] of 6,144 integers are not the nearest", reason.text)


def test_coarse_scales_are_undecided(wide: Model, floats: ir.Model, tmp_path: Path) -> None:
    """4 bits in the place of 8: each integer is the nearest, and the weight is 16 times as far away."""
    graph = in_int8(floats.clone())
    change(graph, "integers", lambda levels: np.rint(levels / 16.0))
    change(graph, "scales", lambda scales: scales * np.float32(16))
    verdict = verdict_of(graph, wide, tmp_path)
    assert verdict.outcome is parity.Outcome.UNDECIDED, str(verdict)
    assert any(
        reason.text.startswith("down.weight: the scales do not fit the right weight. The rounded weight is 1")
        for reason in verdict.reasons
    )


def test_coarse_scales_of_a_few_blocks_are_undecided(wide: Model, floats: ir.Model, tmp_path: Path) -> None:
    graph = quantised(floats.clone(), bits=8)

    def coarse(array: NDArray[Any], factor: float) -> NDArray[Any]:
        wider = array.astype(np.float32).reshape(192, -1)
        wider[::50] = np.rint((wider[::50] - 128) / factor) + 128 if array.dtype == np.uint8 else wider[::50] * factor
        return wider.reshape(array.shape).astype(array.dtype)

    change(graph, "integers", lambda array: coarse(array, 4.0))
    change(graph, "scales", lambda array: coarse(array, 4.0))
    verdict = verdict_of(graph, wide, tmp_path)
    assert verdict.outcome is parity.Outcome.UNDECIDED, str(verdict)
    assert "the scales do not fit the right weight in 4 blocks of 32: they are more than 3 times as coarse" in str(
        verdict
    )


def test_half_precision_scales_are_same(tmp_path: Path) -> None:
    """Quantisers divide by scales before they are rounded to fp16: in 8 bits, 1 % of the integers are then not the
    nearest to the scales that are stored."""
    weight = np.random.default_rng(0).normal(size=(96, 64)).astype(np.float32)
    scales = np.abs(weight).max(1, keepdims=True) / 127
    levels = np.rint(weight / scales)
    stored = scales.astype(np.float16).astype(np.float64)
    values = (levels * stored).astype(np.float32)
    error = quantisation_error_of(values, weight, a_rounding(weight, stored, eps=2.0**-10))
    assert not error.misrounded and error.coarseness == pytest.approx(1.0, abs=0.05)
    assert quantisation_error_of(values, weight, a_rounding(weight, stored, eps=2.0**-23)).misrounded > 20


# --- quantisers that do not round to nearest -----------------------------------------------------


def a_rounding(weight: NDArray[Any], scales: NDArray[Any], *, eps: float = 2.0**-23) -> NearestNumbers:
    """To int8, with one scale for each row."""
    wide = weight.astype(np.float64)
    nearest = np.clip(np.rint(wide / scales), -128, 127) * scales
    steps = Steps(scales + 0 * wide, np.abs(wide).max(1, keepdims=True) + 0 * wide, 127)
    return NearestNumbers(nearest, steps, eps, has_float_zeros=False)


def corrected(weight: NDArray[Any], inputs: NDArray[Any], scales: NDArray[Any]) -> NDArray[Any]:
    """GPTQ: each column is rounded, and the later columns take up its error as far as the inputs are correlated."""
    weight = weight.astype(np.float64)
    hessian = inputs.T @ inputs / len(inputs)
    hessian += 0.01 * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T
    rounded = np.zeros_like(weight)
    for column in range(weight.shape[1]):
        rounded[:, column] = np.clip(np.rint(weight[:, column] / scales[:, 0]), -128, 127) * scales[:, 0]
        error = (weight[:, column] - rounded[:, column]) / factor[column, column]
        weight[:, column:] -= np.outer(error, factor[column, column:])
    return rounded


def stochastic(weight: NDArray[Any], _: NDArray[Any], scales: NDArray[Any]) -> NDArray[Any]:
    return np.floor(weight / scales + np.random.default_rng(3).random(weight.shape)) * scales


def with_noise(weight: NDArray[Any], _: NDArray[Any], scales: NDArray[Any]) -> NDArray[Any]:
    noise = np.random.default_rng(3).integers(-1, 2, size=weight.shape)
    return (np.rint(weight / scales) + noise) * scales


@pytest.mark.parametrize(("quantise", "outcome"), [(corrected, "note"), (stochastic, "doubt"), (with_noise, "fault")])
def test_quantisers_are_judged_by_the_layers_outputs(quantise: Callable[..., NDArray[Any]], outcome: str) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(48, 64)).astype(np.float32)
    mix = np.eye(64) / 2 + rng.normal(size=(64, 64)) @ np.diag(np.arange(1, 65) ** -0.7)
    scales = np.abs(weight).max(1, keepdims=True).astype(np.float64) / 127
    values = quantise(weight, rng.normal(size=(2048, 64)) @ mix.T, scales)
    errors = {"fc.weight": quantisation_error_of(values.astype(np.float32), weight, a_rounding(weight, scales))}
    assert errors["fc.weight"].is_corrected
    module = nn.Module()
    module.fc = nn.Linear(64, 48)
    with output_errors(module, errors) as found:
        module.fc(torch.from_numpy((rng.normal(size=(2, 60, 64)) @ mix.T).astype(np.float32)))
    findings = findings_on(errors, found)
    assert {"note": findings.not_judged, "doubt": findings.doubts, "fault": findings.faults}[outcome], findings
    assert sum(map(len, (findings.not_judged, findings.doubts, findings.faults))) == 1
    module.fc(torch.zeros(1, 64))
    assert found.relative("fc.weight") is not None and not module.fc._forward_pre_hooks


def test_transposed_weight_is_measured_in_its_own_layout() -> None:
    """The input is multiplied by W (in, out) as it is, also where W is square."""
    weight = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    scales = np.abs(weight).max(1, keepdims=True).astype(np.float64) / 127
    values = weight + np.eye(8, k=1, dtype=np.float32)
    errors = {"fc.weight": quantisation_error_of(values, weight, a_rounding(weight, scales))}
    module = nn.Module()
    module.fc = Conv1D(8, 8)
    x = torch.eye(8)[:1]
    for inputs in (((x,), {}), ((), {"x": x})):
        with output_errors(module, errors) as found:
            module.fc(*inputs[0], **inputs[1])
        assert found.own["fc.weight"] == pytest.approx(1.0)  # row 0 of the error, which has one 1


def test_weight_without_a_product_is_judged_by_its_own_distance() -> None:
    weight = np.random.default_rng(0).normal(size=(48, 64)).astype(np.float32)
    scales = np.abs(weight).max(1, keepdims=True).astype(np.float64) / 127
    values = with_noise(weight, weight, scales).astype(np.float32)
    errors = {"fc.weight": quantisation_error_of(values, weight, a_rounding(weight, scales))}
    (fault,) = findings_on(errors, OutputErrors()).faults
    assert "the weight is 3" in fault


def test_equal_weights_have_no_error_where_all_is_zero() -> None:
    zeros = np.zeros((2, 3), np.float32)
    error = quantisation_error_of(zeros, zeros, a_rounding(zeros, np.ones((2, 1))))
    assert (error.misrounded, error.coarseness, error.relative) == (0, 0.0, 0.0)
    error = quantisation_error_of(zeros + 1, zeros, a_rounding(zeros, np.ones((2, 1))))
    assert error.misrounded == 6 and error.relative == np.inf
