"""What the top-k operators of a candidate choose: read from its graph as further outputs, or from its module."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import torch

from lora_export.errors import RuntimeRefused
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.runtime.kv_cache import CacheRunner
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import Arrays, Runner
from lora_export.runtime.torch_runners import ModuleRunner
from lora_export.verification.candidate_outputs import OutputsByCase
from lora_export.verification.compare_outputs import same_bits
from lora_export.verification.diagnose.graph_taps import exposed
from lora_export.verification.references.top_k import Recorder, choosing

AxisByOutput = Mapping[str, int]
ChosenByCase = Mapping[str, Sequence[torch.Tensor]]  # case -> the indices of each call, in the order of the calls
ChoiceReader = Callable[[Mapping[str, Arrays], OutputsByCase], ChosenByCase | None]
SCORE_TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})


def choice_reader(candidate: Runner) -> ChoiceReader | None:
    """The function that reads the indices that every top-k on floats chooses, the axis of the choice last.

    Those of a graph with a cache are [batch, sequence, k]. It returns None where they cannot be read, and where the
    outputs by case are other ones while they are. None is returned for a graph without a top-k, and for what gives its
    outputs alone: a server, TorchScript. Runs nothing.
    """
    if isinstance(candidate, ModuleRunner):
        return functools.partial(_of_module, candidate)
    graph = candidate.inner if isinstance(candidate, CacheRunner) else candidate
    if isinstance(graph, OnnxRunner) and _choosing_nodes(graph.file().model):
        return functools.partial(_of_graph, candidate, graph)
    return None


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


def _of_graph(
    candidate: Runner, graph: OnnxRunner, cases: Mapping[str, Arrays], outputs: OutputsByCase
) -> ChosenByCase | None:
    with contextlib.suppress(RuntimeRefused):
        choosing_graph, axes = _with_indices(graph)
        if not isinstance(candidate, CacheRunner):
            return _run(choosing_graph, axes, cases, outputs)
        by_position = _ByPosition(choosing_graph, axes, candidate.tokens)
        whole = replace(candidate, inner=by_position)  # type: ignore[arg-type]
        return _run(whole, dict.fromkeys(axes, -1), cases, outputs)
    return None


def _choosing_nodes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "TopK" and _is_float(node.inputs[0])]


def _with_indices(runner: OnnxRunner) -> tuple[OnnxRunner, AxisByOutput]:
    """The graph that returns the indices of its top-k operators, too, and the axis of each by the output's name."""
    model = load_graph(runner.path)
    nodes = _choosing_nodes(model)
    for node in nodes:
        node.outputs[1].type = ir.TensorType(ir.DataType.INT64)
    graph = exposed(model, [node.outputs[1] for node in nodes])
    axes = {str(node.outputs[1].name): node.attributes.get_int("axis", -1) for node in nodes}
    return runner.with_graph(graph.message, graph.folder), axes


class _ByPosition:
    """A graph whose indices are [batch, sequence, k]: a `CacheRunner` joins those of its runs, as any other output."""

    def __init__(self, graph: OnnxRunner, choice_axes: AxisByOutput, tokens: str):
        self.axes, self.placement = graph.axes, graph.placement
        self._graph, self._choice_axes, self._tokens = graph, choice_axes, tokens

    def run(self, inputs: Arrays) -> Arrays:
        """Raises RuntimeRefused where a top-k does not choose for each position."""
        outputs, positions = dict(self._graph.run(inputs)), inputs[self._tokens].shape[:2]
        for name, axis in self._choice_axes.items():
            indices = np.moveaxis(outputs[name], axis, -1)
            if indices.size != math.prod(positions) * indices.shape[-1]:
                raise RuntimeRefused(f"{name} does not choose for each position")
            outputs[name] = indices.reshape(*positions, -1)
        return outputs


def _run(
    runner: Runner, axes: AxisByOutput, cases: Mapping[str, Arrays], outputs: OutputsByCase
) -> ChosenByCase | None:
    found = {}
    for case, arrays in cases.items():
        own = runner.run(arrays)
        if not same_bits({name: own[name] for name in outputs[case]}, outputs[case]):
            return None
        indices = [np.moveaxis(own[name], axis, -1) for name, axis in axes.items()]
        found[case] = [torch.from_numpy(np.ascontiguousarray(each)) for each in indices]
    return found


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and (value.dtype is None or value.dtype in SCORE_TYPES)
