"""Graphs from ONNX text, adapters and plans for them, and runs by onnxruntime. For the tests of every folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from lora_export import plan
from lora_export.graph.exporter_names import FOLDED_FROM, NAME_SCOPES
from lora_export.graph.find_sites import Sites, find_sites
from lora_export.lora import Adapter, LoraPair
from lora_export.plan import Plan

Arrays = dict[str, NDArray[Any]]


def a_graph(body: str, *, modules: Mapping[str, str] | None = None, **origins: str) -> ir.Model:
    """A model from ONNX text. Dotted names need no quotes.

    `modules` maps nodes to the modules in which they were traced, `origins` maps values to the names that they were
    folded from.
    """
    quoted = re.sub(r"\b[a-z]\w*(\.\w+)+", r'"\g<0>"', body)
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 20]>\n{quoted}')
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if modules and node.name in modules:
            node.metadata_props[NAME_SCOPES] = repr(["", modules[node.name], "linear"])
    for name, origin in origins.items():
        model.graph.initializers[name].metadata_props[FOLDED_FROM] = repr([origin])
    return model


def record_of(path: Path) -> Any:
    """What the file of a graph records of its origin, its settings and its verdict."""
    entries = onnx.load(path, load_external_data=False).metadata_props
    return json.loads(next(entry.value for entry in entries if entry.key == "lora_export"))


def run(model: ir.Model, **feeds: Any) -> Arrays:
    """The outputs of onnxruntime on the CPU, by name."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    proto = ir.to_proto(ir.external_data.load_to_model(model.clone())).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))


class MatMul(OpRun):
    """The operator in its operands' dtype: before onnx 1.23 the evaluator refuses stacks of matrices in bfloat16."""

    op_domain = ""

    def _run(self, a: NDArray[Any], b: NDArray[Any]) -> tuple[NDArray[Any]]:
        return (np.matmul(a, b).astype(a.dtype),)


def evaluated(model: ir.Model, **feeds: Any) -> NDArray[Any]:
    """The one output under ONNX's own reference evaluator."""
    (output,) = ReferenceEvaluator(ir.to_proto(model), new_ops=[MatMul]).run(None, feeds)
    return output


def an_adapter(pairs: Mapping[str, LoraPair], *, name: str = "default", **fields: Any) -> Adapter:
    """An adapter of these pairs, by module."""
    return Adapter(name=name, format="test", pairs=pairs, **fields)


def planned(model: ir.Model, *adapters: Adapter, **options: Any) -> tuple[Sites, Plan]:
    """The sites of a graph, and the plan of these adapters over them."""
    found = find_sites(model)
    return found, plan.make(adapters, found.specs, **options)


def stored(model: ir.Model, name: str) -> NDArray[Any]:
    """The array of an initializer."""
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def tensor_bytes(value: ir.Value) -> bytes:
    """The bytes of an initializer."""
    assert value.const_value is not None
    return value.const_value.tobytes()


def contents(model: ir.Model) -> dict[str, bytes]:
    """The bytes of every initializer, by name."""
    return {name: stored(model, name).tobytes() for name in model.graph.initializers}


def quantised(
    model: ir.Model, *, bits: int = 4, block: int = 32, symmetric: bool = True, as_pairs: bool = False
) -> ir.Model:
    """The graph with its MatMul weights quantised by onnxruntime, to MatMulNBits or (`as_pairs`) DequantizeLinear."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.quant_utils import QuantFormat

    tool = MatMulNBitsQuantizer(
        ir.to_proto(model), block_size=block, is_symmetric=symmetric, bits=bits,
        quant_format=QuantFormat.QDQ if as_pairs else QuantFormat.QOperator,
    )  # fmt: skip
    tool.process()
    return ir.from_proto(tool.model.model)


def in_int8(model: ir.Model, *, axis: int | None = 1, zeros: bool = False) -> ir.Model:
    """The graph with its MatMul weights (in, out) as bytes behind DequantizeLinear, the products in fp32.

    One scale for each index of `axis`, or one for all (None). With `zeros`, uint8 with zero points; otherwise int8.
    """
    model.opset_imports[""] = max(21, model.opset_imports[""])
    for node in list(model.graph):
        tensor = ir.convenience.get_const_tensor(node.inputs[1]) if node.op_type == "MatMul" else None
        if tensor is None:
            continue
        weight, old = tensor.numpy(), node.inputs[1]
        others = None if axis is None else 1 - axis
        low, high = (np.asarray(part(weight, axis=others, keepdims=True)) for part in (np.min, np.max))
        scale = (high - low) / 255 if zeros else np.maximum(high, -low) / 127
        zero = np.rint(-low / scale) if zeros else np.zeros_like(scale)
        levels = np.clip(np.rint(weight / scale) + zero, 0 if zeros else -127, 255 if zeros else 127)
        integer = np.uint8 if zeros else np.int8
        shape = () if axis is None else (-1,)
        arrays = {
            f"{old.name}_quantized": levels.astype(integer),
            f"{old.name}_scale": scale.reshape(shape).astype(np.float32),
            **({f"{old.name}_zero_point": zero.reshape(shape).astype(integer)} if zeros else {}),
        }
        values = []
        for name, array in arrays.items():
            tensor = ir.Tensor(array, name=name)
            values.append(ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape))
            model.graph.initializers[name] = values[-1]
        pair = ir.node("DequantizeLinear", values, {"axis": axis or 0}, name=f"{old.name}_DequantizeLinear")
        pair.outputs[0].name = f"{old.name}_DequantizeLinear_Output"
        pair.outputs[0].type, pair.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), old.shape
        model.graph.insert_before(node, pair)
        node.replace_input_with(1, pair.outputs[0])
        if not old.uses() and old.is_initializer():
            del model.graph.initializers[old.name]
    return model
