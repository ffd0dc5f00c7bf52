"""Export a module to a file of PyTorch: a program of torch.export (.pt2), or TorchScript. Knows nothing of LoRA.

A program needs neither this package nor the model's: it takes and returns tensors, in dictionaries, tuples and lists
of Python. No path and no source line of this machine is in its file, and the same module gives the same bytes.
"""

from __future__ import annotations

import copy
import importlib
import io
import shutil
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec
from torch.utils._pytree import tree_flatten

from lora_export.errors import RuntimeRefused
from lora_export.models.export import LOADED_ALONE, WITHOUT_STACK_TRACES, check_axes
from lora_export.models.model import Axes
from lora_export.models.open_sizes import refused_numbers
from lora_export.models.outputs import convert_outputs, named_outputs
from lora_export.models.refusals import exporter_refusals
from lora_export.models.tracing import USE_CACHE, is_hugging_face, silence, tracing, without_cache

OPERATOR = type(torch.ops.aten.add.Tensor)
UNWRITABLE = torch.ops.higher_order.flat_apply
PYTORCHS_OWN = frozenset({"aten", "prim", "prims"})  # namespaces of operators
FIXED_TIME = (1980, 1, 1, 0, 0, 0)  # of every member: a zip's first
MACHINES_OWN = ("stack_trace", "from_node", "custom")  # what a node records of the code that was traced, and where


def to_program(
    module: nn.Module, inputs: Mapping[str, torch.Tensor], *, axes: Axes, most: Mapping[str, int] | None = None
) -> ExportedProgram:
    """Export a copy of a module, in eval mode and without gradients, as called with `inputs` by keyword.

    Only the listed axes vary, up to the size that `most` has of each symbol. The program takes the same keywords. It
    returns what the module does, a dictionary of Python for a mapping.

    Raises RuntimeRefused when the exporter refuses the module, or fixes an axis that should vary.
    """
    check_axes(inputs, axes)
    dims = {symbol: Dim.DYNAMIC(max=size) for symbol, size in (most or {}).items()}
    dynamic = {
        name: {axis: dims.get(symbol, Dim.DYNAMIC) for axis, symbol in axes.get(name, {}).items()} for name in inputs
    }
    with exporter_refusals(module):
        copied = copy.deepcopy(module).requires_grad_(False)
    # A file cannot name the classes of other packages.
    convert_outputs(copied, lambda outputs: named_outputs(outputs) if isinstance(outputs, Mapping) else outputs)
    refused = exporter_refusals(module)
    with refused_numbers(module), tracing(copied), without_cache(copied), refused, WITHOUT_STACK_TRACES:
        program = _exported(copied, inputs, dynamic)
    _refuse_unwritable(module, program)
    for graph in program.graph_module.modules():
        for node in graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ():
            for record in MACHINES_OWN:
                node.meta.pop(record, None)
    return program


def _exported(
    module: nn.Module, inputs: Mapping[str, torch.Tensor], dynamic: Mapping[str, Mapping[int, Any]]
) -> ExportedProgram:
    if not is_hugging_face(module):
        return torch.export.export(module, (), dict(inputs), dynamic_shapes=dict(dynamic))
    transformers: Any = importlib.import_module("transformers.exporters.exporter_dynamo")
    config = transformers.DynamoConfig(dynamic_shapes=dict(dynamic))
    with LOADED_ALONE:
        program = transformers.DynamoExporter().export(module, {**inputs, USE_CACHE: False}, config=config).program
    assert isinstance(program, ExportedProgram)
    return program


def _refuse_unwritable(module: nn.Module, program: ExportedProgram) -> None:
    """Raise RuntimeRefused for a call of a Python function, which no file can contain, and of a package's operator."""
    targets = [node.target for node in program.graph.nodes]
    others = {each.name() for each in targets if isinstance(each, OPERATOR) and each.namespace not in PYTORCHS_OWN}
    if others:
        raise RuntimeRefused(
            f"the program of {type(module).__name__} calls {', '.join(sorted(others))}, which is no operator of "
            "PyTorch: PyTorch alone could not load it",
            "Export an ONNX graph: lora-export onnx.",
        )
    if UNWRITABLE in targets:
        name = type(module).__name__
        raise RuntimeRefused(
            f"torch.export cannot write the program of {name}: it calls a function of Python (flat_apply)"
        )


def with_inputs(program: ExportedProgram, names: Sequence[str]) -> ExportedProgram:
    """The same program, in which these parameters are inputs. They follow the other inputs, in this order.

    Raises RuntimeRefused where the program lacks one of the parameters.
    """
    signature = program.graph_signature
    of_parameter = {spec.target: spec for spec in signature.input_specs if spec.kind is InputKind.PARAMETER}
    if lost := [name for name in names if name not in of_parameter]:
        raise RuntimeRefused(f"the exporter left {', '.join(lost)} out of the program, so that it cannot be an input")
    moved = [of_parameter[name] for name in names]
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    last = [*placeholders.values()][-1]
    for spec in moved:
        last.append(placeholders[spec.arg.name])
        last = placeholders[spec.arg.name]
    program.graph.lint()
    program.graph_module.recompile()
    others = [spec for spec in signature.input_specs if spec not in moved]
    specs = [*others, *(InputSpec(InputKind.USER_INPUT, spec.arg, None) for spec in moved)]
    args, kwargs = program.example_inputs or ((), dict[str, Any]())
    values = {spec.arg.name: program.state_dict[name] for spec, name in zip(moved, names, strict=True)}
    call = copy.deepcopy(program.module_call_graph)
    entry = call[0].signature
    assert entry is not None
    entry.inputs = [*entry.inputs, *(spec.arg for spec in moved)]
    entry.in_spec = tree_flatten((args, {**kwargs, **values}))[1]
    entry.forward_arg_names = [*(entry.forward_arg_names or kwargs), *values]
    return ExportedProgram(
        root=program.graph_module,
        graph=program.graph,
        graph_signature=ExportGraphSignature(specs, signature.output_specs),
        state_dict={name: value for name, value in program.state_dict.items() if name not in names},
        range_constraints=program.range_constraints,
        module_call_graph=call,
        example_inputs=(args, {**kwargs, **values}),
        constants=program.constants,
        verifiers=program.verifiers,
    )


def load_own_program(path: Path) -> tuple[nn.Module, dict[str, tuple[tuple[int, int | None], ...]]]:
    """The module of a file that this process has written, and the sizes of its inputs.

    Others are read by `models.pt2`: a .pt2 can run code.
    """
    with silence():
        program = torch.export.load(path)
    sizes = {
        node.name: tuple(_range(program, size) for size in node.meta["val"].shape)
        for node in program.graph.nodes
        if node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor)
    }
    return program.module(), sizes


def _range(program: ExportedProgram, size: Any) -> tuple[int, int | None]:
    """The least and the greatest size of an axis."""
    found = program.range_constraints.get(size.node.expr) if isinstance(size, torch.SymInt) else None
    if found is None:
        return 0, None
    return int(found.lower), int(found.upper) if found.upper < sys.maxsize else None


def save_program(program: ExportedProgram, path: Path, *, extra: Mapping[str, str]) -> None:
    """Write a program. `torch.export.load(..., extra_files=...)` reads the texts of `extra` again."""
    content = io.BytesIO()
    with silence():
        torch.export.save(program, content, extra_files=dict(extra))
    _copy(content, path)


def _copy(source: BinaryIO, target: Path, *, without: tuple[str, ...] = ()) -> None:
    """Copy an archive, with fixed times, without the records whose names end so."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for record in old.infolist():
            if not record.filename.endswith(without):
                fixed = zipfile.ZipInfo(record.filename, FIXED_TIME)
                fixed.file_size = record.file_size  # by which zipfile chooses the format
                with old.open(record) as read, new.open(fixed, "w") as write:
                    shutil.copyfileobj(read, write)


# --- TorchScript ---


def to_torchscript(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.jit.ScriptModule:
    """Trace a copy of a module, in eval mode and without gradients, as called with `inputs` by keyword.

    The traced module takes the same keywords, or positional arguments in the order of the module's signature. It
    returns what the module returns: a tensor, a tuple, or, for a Hugging Face model, a dict.

    Raises RuntimeRefused when the module cannot be traced.
    """
    with exporter_refusals(module):
        traced = copy.deepcopy(module).requires_grad_(False)
    with tracing(traced), without_cache(traced), exporter_refusals(module):
        traced(**inputs)  # BigBird chooses its attention in the first run, which a trace would be
        # Not strict: a Hugging Face model returns a dict, whose keys do not depend on the inputs.
        script = torch.jit.trace(traced, example_kwarg_inputs=dict(inputs), strict=False)
    assert isinstance(script, torch.jit.ScriptModule)
    return script


def save_torchscript(script: torch.jit.ScriptModule, path: Path, *, extra: Mapping[str, str]) -> None:
    """Write a traced module. `torch.jit.load(..., _extra_files=...)` reads the texts of `extra` again.

    PyTorch's debugging records are left out: they contain paths and source lines of this machine.
    """
    with silence():
        # Through memory: on a disk that is full, PyTorch's own writer ends the whole process (std::terminate).
        content = io.BytesIO(script.save_to_buffer(_extra_files=dict(extra)))
    _copy(content, path, without=(".debug_pkl",))
