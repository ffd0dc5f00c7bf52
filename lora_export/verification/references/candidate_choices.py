"""What the top-k operators of a candidate choose: read from its graph as further outputs, or from its module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch

from lora_export.graph.onnx_file.reading import load_graph
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import Arrays, Runner
from lora_export.runtime.torch_runners import ModuleRunner
from lora_export.verification.candidate_outputs import OutputsByCase
from lora_export.verification.compare_outputs import same_bits
from lora_export.verification.diagnose.graph_taps import exposed
from lora_export.verification.references.top_k import Recorder, choosing

ChosenByCase = Mapping[str, Sequence[torch.Tensor]]  # case -> the indices of each call, in the order of the calls
FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})


def candidate_choices(candidate: Runner, cases: Mapping[str, Arrays], outputs: OutputsByCase) -> ChosenByCase | None:
    """The indices that every top-k on floats chooses, the axis of the choice last.

    None where they cannot be read: of what gives its outputs alone, of a graph with a cache, which runs a text in
    steps, and where the `outputs` by case are other ones when the indices are read.
    """
    if isinstance(candidate, ModuleRunner):
        return _of_module(candidate, cases, outputs)
    return _of_graph(candidate, cases, outputs) if isinstance(candidate, OnnxRunner) else None


def _of_module(candidate: ModuleRunner, cases: Mapping[str, Arrays], outputs: OutputsByCase) -> ChosenByCase | None:
    found = {}
    for name, arrays in cases.items():
        recorder = Recorder()
        with choosing(candidate.module, recorder):
            again = candidate.run(arrays)
        if recorder.repeated or not same_bits(again, outputs[name]):
            return None
        found[name] = [choice.indices for choice in recorder.found.values()]
    return found


def _of_graph(candidate: OnnxRunner, cases: Mapping[str, Arrays], outputs: OutputsByCase) -> ChosenByCase | None:
    model = load_graph(candidate.path)
    nodes = [node for node in model.graph if node.op_type == "TopK" and _is_float(node.inputs[0])]
    for node in nodes:
        node.outputs[1].type = ir.TensorType(ir.DataType.INT64)
    graph = exposed(model, [node.outputs[1] for node in nodes])
    axes = {str(node.outputs[1].name): node.attributes.get_int("axis", -1) for node in nodes}
    runner = candidate.with_graph(graph.message, graph.folder)
    found = {}
    for case, arrays in cases.items():
        own = runner.run(arrays)
        if not same_bits({name: own[name] for name in outputs[case]}, outputs[case]):
            return None
        indices = [np.moveaxis(own[name], axis, -1) for name, axis in axes.items()]
        found[case] = [torch.from_numpy(np.ascontiguousarray(each)) for each in indices]
    return found


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and (value.dtype is None or value.dtype in FLOATS)
