"""Export a module to an ONNX graph in memory. Knows nothing of LoRA.

The exporters are PyTorch's and, for Hugging Face models, transformers' own; the optimiser is onnxscript's. This file
adds four guarantees: every parameter is in the graph under its own name and with its own values, dynamic axes have the
names that the user gave them, nothing is printed, and an error names what the exporter refused.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass
from torch import nn
from torch.export import Dim

from lora_export.errors import RuntimeRefused
from lora_export.layers.torch_internals import (
    can_match,
    composites_looked_up_once,
    forget_kernels,
    functions_read_once,
    loaded_models_alone,
    own_buffers,
    own_parameters,
    signatures_made_once,
    types_promoted_as_traced,
    without_stack_traces,
)
from lora_export.models.decompositions import decomposed_in_place
from lora_export.models.model import Axes
from lora_export.models.open_sizes import refused_numbers
from lora_export.models.outputs import named_outputs
from lora_export.models.refusals import exporter_refusals, fails_on_node, fixes_size, line_of_size, named_failures
from lora_export.models.shared_context import SharedContext
from lora_export.models.tracing import USE_CACHE, is_hugging_face, tracing, without_cache
from lora_export.options.spelling import named

# onnxscript 0.7.2 removes x + c, x - c, x * c and x / c where c is within these tolerances of 0 or 1
# (rewriter/_pattern_ir.py, Constant). Helium's norm divides by sqrt(mean(x * x) + 1e-8): without the 1e-8, a row of
# zeros becomes NaN.
NEUTRAL, RELATIVE, ABSOLUTE = (0.0, 1.0), 1e-5, 1e-8


def simplify(model: ir.Model) -> None:
    """Optimise a graph in place; every weight stays as it is, under its own name.

    The optimiser would fold batch norms into the weights before them, drop zero biases and merge equal tensors of
    different layers: an initializer would no longer be the parameter of its name. It would also take numbers that are
    nearly 0 or 1 for these. A matrix that one Transpose reads is stored transposed, and marked as folded.
    """
    from onnxscript.optimizer import FOLDED_FROM_KEY, optimize_ir  # 0.2 s, which a proof alone does not need

    graph = model.graph
    InlinePass()(model)  # so that the numbers in functions are seen
    _remove_idle_squeezes(graph)
    weights = [(value, value.const_value) for value in graph.initializers.values()]
    hidden = weights + _hidden_numbers(graph)
    count = len(graph.inputs)
    graph.initializers.clear()
    for value, _ in hidden:
        value.const_value = None
        graph.inputs.append(value)
    with RULES_BY_OPERATOR:
        optimize_ir(model)
    del graph.inputs[count:]
    for value, tensor in hidden:
        if value.uses() or value.is_graph_output():
            value.const_value = tensor
            graph.register_initializer(value)
    for value, _ in weights:
        if value.is_initializer():
            _store_transposed(value, FOLDED_FROM_KEY)


def _rules_by_operator() -> AbstractContextManager[Any]:
    """A context in which a rule of the optimiser is tried at nodes of its operator alone.

    The optimiser tries each of some 60 rules at each node. For a pattern that ends in several nodes it lists all nodes
    of the graph each time, so that its time grows with their square (onnxscript 0.7.2, rewriter/_matcher.py).
    """
    from onnxscript.rewriter.pattern import RewriteRule

    try_rewrite = RewriteRule.try_rewrite
    possible: dict[tuple[RewriteRule, str], bool] = {}

    def try_where_possible(rule: RewriteRule, model: ir.Model, graph: Any, node: ir.Node, **options: Any) -> Any:
        key = rule, node.op_type
        if key not in possible:
            possible[key] = can_match(rule, node.op_type)
        return try_rewrite(rule, model, graph, node, **options) if possible[key] else None

    return mock.patch.object(RewriteRule, "try_rewrite", try_where_possible)


RULES_BY_OPERATOR = SharedContext(_rules_by_operator)
READ_ONCE = SharedContext(
    functions_read_once, signatures_made_once, composites_looked_up_once, types_promoted_as_traced
)
LOADED_ALONE = SharedContext(loaded_models_alone)
WITHOUT_STACK_TRACES = SharedContext(without_stack_traces)


def _remove_idle_squeezes(graph: ir.Graph) -> None:
    """Make an Identity of each Squeeze of an axis whose size is not 1. PyTorch leaves this axis; ONNX refuses it."""
    for node in ir.traversal.RecursiveGraphIterator(graph):
        value, axis = [*node.inputs, None, None][:2]
        if node.op_type != "Squeeze" or value is None or value.shape is None or axis is None:
            continue
        found = ir.convenience.get_const_tensor(axis)
        sizes = [] if found is None else [value.shape[each] for each in found.numpy().reshape(-1).tolist()]
        if len(sizes) == 1 and isinstance(sizes[0], int) and sizes[0] != 1:
            node.op_type = "Identity"
            node.resize_inputs(1)


def _hidden_numbers(graph: ir.Graph) -> list[tuple[ir.Value, ir.TensorProtocol | None]]:
    """Numbers that are nearly 0 or 1, each once, with their values, in place of the Constants that had them."""
    found: dict[tuple[ir.DataType, float], ir.Value] = {}
    tensors: list[tuple[ir.Value, ir.TensorProtocol | None]] = []
    for node, tensor in list(_nearly_neutral(graph)):
        (output,) = node.outputs
        key = (tensor.dtype, tensor.numpy().item())
        if key not in found:
            found[key] = ir.Value(
                name=f"number_{len(found)}", shape=ir.Shape(()), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            tensors.append((found[key], tensor))
        ir.convenience.replace_all_uses_with(output, found[key])
        assert node.graph is not None
        node.graph.remove(node, safe=True)
    return tensors


def _nearly_neutral(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.TensorProtocol]]:
    """The Constants of one float that is within the optimiser's tolerance of 0 or 1, and is neither."""
    for node in ir.traversal.RecursiveGraphIterator(graph):
        if node.op_type != "Constant" or node.outputs[0].is_graph_output():
            continue
        tensor = ir.convenience.get_const_tensor(node.outputs[0])
        if tensor is not None and is_nearly_neutral(tensor):
            yield node, tensor


def is_nearly_neutral(tensor: ir.TensorProtocol) -> bool:
    """Whether a tensor is one float that is within the optimiser's tolerance of 0 or 1, and is neither."""
    if tuple(tensor.shape) != () or not tensor.dtype.is_floating_point():
        return False
    number = tensor.numpy().item()
    near = (math.isclose(number, each, rel_tol=RELATIVE, abs_tol=ABSOLUTE) for each in NEUTRAL)
    return number not in NEUTRAL and any(near)


def _store_transposed(weight: ir.Value, folded_from: str) -> None:
    """Store a matrix transposed, and marked by the key `folded_from`, if all that reads it is one Transpose."""
    uses = list(weight.uses())
    if len(uses) != 1 or uses[0].node.op_type != "Transpose" or weight.shape is None or len(weight.shape) != 2:
        return
    transpose = uses[0].node
    (transposed,) = transpose.outputs
    if transposed.is_graph_output() or list(transpose.attributes["perm"].as_ints()) != [1, 0]:
        return
    tensor = weight.const_value
    assert tensor is not None and weight.name is not None and transpose.graph is not None
    ir.convenience.replace_all_uses_with(transposed, weight)
    transpose.graph.remove(transpose, safe=True)
    weight.const_value = ir.Tensor(tensor.numpy().T, dtype=tensor.dtype, name=weight.name)  # a view: nothing is copied
    weight.shape = ir.Shape(weight.const_value.shape)
    weight.metadata_props[folded_from] = repr([weight.name])


def to_onnx(module: nn.Module, inputs: Mapping[str, torch.Tensor], *, axes: Axes, opset: int | None = None) -> ir.Model:
    """Export a module, in eval mode, as called with `inputs` by keyword. Writes no file.

    Only the listed axes vary; axes with equal symbols have equal sizes. The weights share memory with the module until
    the graph is saved. A linear layer's weight that a MatMul reads is stored transposed, under the parameter's name.
    Outputs have the keys of what the module returns as names, or `output_0`, `output_1`, ... Nodes keep the exporter's
    metadata, which contain module names and this machine's paths: `save_graph` removes them.

    Raises RuntimeRefused when the exporter refuses the module, fixes an axis that should vary, or
    drops an input.
    """
    check_axes(inputs, axes)
    dynamic = {name: dict.fromkeys(axes.get(name, {}), Dim.DYNAMIC) for name in inputs}
    _refuse_name_of_weight(module, inputs)
    remedy = f"If it needs other inputs, give them: {named('inputs', 'FILE.npz')}" if is_hugging_face(module) else ""
    with tracing(module), without_cache(module):
        with named_failures(module, inputs, "example inputs", remedy):
            names = list(named_outputs(module(**inputs)))

        def export(factor: int = 1) -> ir.Model:
            return _run_exporter(module, _larger(inputs, axes, factor), dynamic, names, opset)

        model = _simplified(module, opset, export, export)
    refuse_unused_inputs(model, inputs)
    name_axes(model, axes)
    return model


def check_axes(inputs: Mapping[str, torch.Tensor], axes: Axes) -> None:
    sizes: dict[str, int] = {}
    for name, symbols in axes.items():
        if name not in inputs:
            raise RuntimeRefused(f"the dynamic axes name an input {name}; the example inputs are {', '.join(inputs)}")
        shape = tuple(inputs[name].shape)
        for axis, symbol in symbols.items():
            if not 0 <= axis < len(shape):
                raise RuntimeRefused(f"{name} has the shape {shape}; it has no axis {axis} to vary as `{symbol}`")
            if shape[axis] < 2:
                raise RuntimeRefused(
                    f"axis {axis} of the example input {name} is to vary as `{symbol}` but has size {shape[axis]}: "
                    "sizes 0 and 1 are traced as constants. Give an example input with a size of at least 2"
                )
            if sizes.setdefault(symbol, shape[axis]) != shape[axis]:
                raise RuntimeRefused(
                    f"`{symbol}` is {sizes[symbol]} in one example input and {shape[axis]} on axis {axis} of {name}; "
                    "axes of one name have one size"
                )


def _refuse_name_of_weight(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> None:
    # In a graph, an initializer with the name of an input is the default value of this input.
    names = [name for name in inputs if name in own_parameters(module) or name in own_buffers(module)]
    if names:
        raise RuntimeRefused(
            f"{type(module).__name__} has inputs and tensors of one name: {', '.join(names)}. A graph cannot contain "
            "both. Rename the parameters of forward"
        )


def _line_that_fixes(module: nn.Module, inputs: Mapping[str, torch.Tensor], dynamic: dict[str, dict[int, Any]]) -> str:
    """The line of the model's code that fixes a size: a refusal of torch.export has it, where torch.onnx's has not."""
    try:
        torch.export.export(module, (), dict(inputs), dynamic_shapes=dynamic)
    except (RuntimeError, ValueError) as error:
        return line_of_size(error)
    return ""


def _run_exporter(
    module: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    dynamic: dict[str, dict[int, Any]],
    outputs: list[str],
    opset: int | None,
) -> ir.Model:
    # Not optimised here: see simplify.
    if is_hugging_face(module):
        return _exported_by_transformers(module, {**inputs, USE_CACHE: False}, dynamic, opset)
    with _forgotten_kernels():
        try:
            exported = torch.onnx.export(
                module,
                kwargs=dict(inputs),
                input_names=list(inputs),  # torch.export changes names: `X` to `x`, `pixelValues` to `pixelvalues`
                output_names=outputs,
                dynamic_shapes=dynamic,
                opset_version=opset,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
        except Exception as error:
            if fixes_size(error):
                error.add_note(_line_that_fixes(module, inputs, dynamic))
            raise
    assert exported is not None
    return exported.model


@contextlib.contextmanager
def _forgotten_kernels() -> Iterator[None]:
    """Let PyTorch look up again, before and after, what computes an LSTM or a GRU.

    For an export it puts a loop into the graph's operators in place of one in Python, which has one number of steps.
    Once such an operator has run, PyTorch keeps what computed it, and does not see the exchange: the second export of a
    process would have the loop in Python (torch 2.13, torch/export/_patches.py).
    """
    kernels: list[Any] = [torch.ops.aten.lstm.input, torch.ops.aten.gru.input]
    try:
        forget_kernels(kernels)
        yield
    finally:
        forget_kernels(kernels)


def exported_with_cache(
    module: nn.Module, inputs: Mapping[str, Any], dynamic: Mapping[str, Any], opset: int | None
) -> ir.Model:
    """The graph of a model of transformers whose `inputs` contain a cache, or ask for one. Its axes have no names yet.

    Raises RuntimeRefused where the exporter refuses the model.
    """
    return _simplified(module, opset, lambda: _exported_by_transformers(module, inputs, dynamic, opset))


def _exported_by_transformers(
    module: nn.Module, inputs: Mapping[str, Any], dynamic: Mapping[str, Any], opset: int | None
) -> ir.Model:
    transformers: Any = importlib.import_module("transformers.exporters.exporter_onnx")
    config = transformers.OnnxConfig(optimize=False, dynamic_shapes=dict(dynamic), opset_version=opset)
    own = set(vars(module))
    try:
        with LOADED_ALONE:
            program = transformers.OnnxExporter().export(module, dict(inputs), config=config).program
    finally:
        for name in vars(module).keys() - own:  # `forward`, which the class has already
            delattr(module, name)
    assert isinstance(program, ir.Model)
    return program


def _simplified(
    module: nn.Module,
    opset: int | None,
    export: Callable[[], ir.Model],
    larger: Callable[[int], ir.Model] | None = None,
) -> ir.Model:
    """What an exporter makes, simplified. `larger` exports at sizes that are as many times as large.

    Raises RuntimeRefused where it refuses, or writes another operator set.
    """

    def graph_at(factor: int) -> object:
        assert larger is not None
        with exporter_refusals(module):
            return [*_operations(model if factor == 1 else larger(factor), module.state_dict(keep_vars=True).keys())]

    dependent = refused_numbers(module, graph_at if larger else None)
    with decomposed_in_place(), READ_ONCE, dependent, exporter_refusals(module):
        model = _exported(export)
    with exporter_refusals(module):
        simplify(model)
    if opset is not None and model.opset_imports[""] != opset:
        raise RuntimeRefused(f"the exporter wrote opset {model.opset_imports['']} in place of the requested {opset}")
    return model


def _larger(inputs: Mapping[str, torch.Tensor], axes: Axes, factor: int) -> dict[str, torch.Tensor]:
    """The inputs, repeated along the axes that vary: each symbol by a factor of its own, this one at least."""
    if factor == 1:
        return dict(inputs)
    symbols = [*dict.fromkeys(symbol for own in axes.values() for symbol in own.values())]
    times = {symbol: factor + place for place, symbol in enumerate(symbols)}
    return {
        name: tensor.repeat([times[own[axis]] if axis in own else 1 for axis in range(tensor.ndim)])
        for name, tensor in inputs.items()
        for own in [axes.get(name, {})]
    }


def _operations(model: ir.Model, weights: Container[str]) -> Iterator[object]:
    """What a graph computes, apart from the values of its weights: equal for two exports that do not differ."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        yield name, tensor.dtype, tuple(tensor.shape), b"" if name in weights else tensor.tobytes()
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        for node in ir.traversal.RecursiveGraphIterator(graph):
            names = [value and value.name for value in node.inputs], [value.name for value in node.outputs]
            yield node.op_identifier(), names, [_comparable(each) for each in node.attributes.values()]
    for value in model.graph.outputs:
        yield value.name


def _comparable(attribute: ir.Attr) -> object:
    """An attribute's value. That of a graph is its nodes, which follow."""
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return attribute.name
    if attribute.type is ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return attribute.name, tensor.dtype, tuple(tensor.shape), tensor.tobytes()
    return str(attribute)


def _exported(export: Callable[[], ir.Model]) -> ir.Model:
    """What an exporter makes. The places in the code are recorded where it refuses an operator: the message has one."""
    try:
        with WITHOUT_STACK_TRACES:
            return export()
    except Exception as error:
        if not fails_on_node(error):
            raise
    return export()


def refuse_unused_inputs(model: ir.Model, inputs: Iterable[str]) -> None:
    """Raise RuntimeRefused where the graph does not read an input that the module was given."""
    used = {value.name for value in model.graph.inputs if value.uses()}
    unused = [name for name in inputs if name not in used]
    if unused:
        raise RuntimeRefused(
            f"the exported graph does not use the input {', '.join(unused)}: either the model ignores it (then leave "
            "it out of the example inputs), or the exporter replaced it by its example value"
        )


def name_axes(model: ir.Model, axes: Axes) -> None:
    """Rename the exporter's symbols (`s77`) to the user's, in the shapes of all values."""
    symbols: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, symbol in axes.get(value.name or "", {}).items():
            size = value.shape[axis] if value.shape is not None else None
            assert isinstance(size, ir.SymbolicDim), "the exporter itself refuses to fix a dynamic axis"
            other = symbols.setdefault(str(size.value), symbol)
            if other != symbol:
                raise RuntimeRefused(
                    f"the model ties `{symbol}` to `{other}`: both always have the same size. Give both axes one name"
                )
    values = list(model.graph.inputs)
    values += [output for node in ir.traversal.RecursiveGraphIterator(model.graph) for output in node.outputs]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(size, symbols) for size in value.shape])


def _renamed(size: int | ir.SymbolicDim, symbols: Mapping[str, str]) -> int | ir.SymbolicDim:
    if isinstance(size, int) or size.value is None:
        return size
    return ir.SymbolicDim(re.sub(r"[A-Za-z_]\w*", lambda match: symbols.get(match[0], match[0]), size.value))
