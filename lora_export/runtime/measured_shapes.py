"""Shapes of a graph's values, measured in runs: behind operators whose shapes no inference knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from lora_export.graph.onnx_file.writing import in_memory
from lora_export.graph.values import drop_tensors, unused_name, value_names
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.ort_session import InMemoryGraph
from lora_export.runtime.runner import TIMEOUT, Arrays

SizesByCase = tuple[int, ...]  # of one dimension


def set_measured_shapes(
    model: ir.Model, values: Sequence[ir.Value], cases: Mapping[str, Arrays], *, timeout: float = TIMEOUT
) -> None:
    """Set the shapes and types of these results of the main graph's nodes to what the graph computes on the CPU.

    A dimension that has the size of one symbol of the graph's inputs in every case, and of no other, gets this symbol.
    One whose size is the same in all cases is that number. Any other is unknown. Sizes that do not differ between the
    cases say nothing: with less than two cases nothing is set.

    Raises RuntimeRefused where the graph does not run on the cases.
    """
    if len(cases) < 2:
        return
    measured, shapes = _with_shapes_as_outputs(model, values)
    graph = InMemoryGraph("the graph", *in_memory(measured))
    drop_tensors(measured)
    runner = OnnxRunner(graph, optimise=False, low_memory=True, timeout=timeout)
    types = {output.name: output.type for output in runner.session.get_outputs()}
    runs = [runner.run(arrays, shapes) for arrays in cases.values()]
    symbols = _symbols_by_sizes(model, list(cases.values()))
    for value, name in zip(values, shapes, strict=True):
        sizes = [run[name].tolist() for run in runs]
        if len({len(own) for own in sizes}) == 1:
            dimensions = zip(*sizes, strict=True)
            value.shape = ir.Shape(
                [own[0] if len(set(own)) == 1 else ir.SymbolicDim(symbols.get(own)) for own in dimensions]
            )
        value.type = ir.TensorType(ir.DataType[types[value.name].removeprefix("tensor(").removesuffix(")").upper()])


def _with_shapes_as_outputs(model: ir.Model, values: Sequence[ir.Value]) -> tuple[ir.Model, list[str]]:
    """A copy of the graph whose outputs are these values and their shapes; and the names of the shapes."""
    copy, used = model.clone(), value_names(model)
    results = {value.name: value for node in copy.graph for value in node.outputs}
    own = [results[value.name] for value in values]
    nodes = [ir.node("Shape", [value]) for value in own]
    shapes = [node.outputs[0] for node in nodes]
    for shape in shapes:
        shape.name = unused_name("shape", used)
    copy.graph.extend(nodes)
    copy.graph.outputs.clear()
    copy.graph.outputs.extend([*own, *shapes])
    return copy, [str(shape.name) for shape in shapes]


def _symbols_by_sizes(model: ir.Model, cases: Sequence[Arrays]) -> dict[SizesByCase, str | None]:
    """The symbol of the inputs' dimensions that has these sizes; None where several have them."""
    found: dict[SizesByCase, str | None] = {}
    for value in model.graph.inputs:
        arrays = [case[value.name] for case in cases if value.name in case]
        if value.shape is None or len(arrays) < len(cases):
            continue
        for axis, size in enumerate(value.shape):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                sizes = tuple(array.shape[axis] for array in arrays)
                found[sizes] = size.value if found.get(sizes, size.value) == size.value else None
    return found
