"""Export a module to a program of torch.export (.pt2). Knows nothing of LoRA.

The program needs neither this package nor the model's: it takes and returns tensors, in dictionaries, tuples and lists
of Python. No path and no source line of this machine is in its file, and the same module gives the same bytes.
"""

from __future__ import annotations

import copy
import functools
import importlib
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from lora_export.errors import RuntimeRefused
from lora_export.layers.exchanged_class import exchange_forward
from lora_export.models.export import check_axes
from lora_export.models.failures import exporter_refusals
from lora_export.models.model import Axes
from lora_export.models.outputs import named_outputs
from lora_export.models.tracing import USE_CACHE, is_hugging_face, silence, tracing, without_cache

OPERATOR = type(torch.ops.aten.add.Tensor)
UNWRITABLE = torch.ops.higher_order.flat_apply
PYTORCHS_OWN = frozenset({"aten", "prim", "prims"})  # namespaces of operators
FIXED_TIME = (1980, 1, 1, 0, 0, 0)  # of every member: a zip's first
MACHINES_OWN = ("stack_trace", "from_node", "custom")  # what a node records of the code that was traced, and where


def to_program(module: nn.Module, inputs: Mapping[str, torch.Tensor], *, axes: Axes) -> ExportedProgram:
    """Export a copy of a module, in eval mode and without gradients, as called with `inputs` by keyword.

    Only the listed axes vary. The program takes the same keywords. It returns what the module does, a dictionary of
    Python for a mapping.

    Raises RuntimeRefused when the exporter refuses the module, or fixes an axis that should vary.
    """
    check_axes(inputs, axes)
    dynamic = {name: dict.fromkeys(axes.get(name, {}), Dim.DYNAMIC) for name in inputs}
    with exporter_refusals(module):
        copied = copy.deepcopy(module).requires_grad_(False)
    _return_dictionaries(copied)
    with tracing(copied), without_cache(copied), exporter_refusals(module):
        program = _exported(copied, inputs, dynamic)
    _refuse_unwritable(module, program)
    _remove_records(program)
    return program


def _exported(
    module: nn.Module, inputs: Mapping[str, torch.Tensor], dynamic: Mapping[str, Mapping[int, Any]]
) -> ExportedProgram:
    if not is_hugging_face(module):
        return torch.export.export(module, (), dict(inputs), dynamic_shapes=dict(dynamic))
    transformers: Any = importlib.import_module("transformers.exporters.exporter_dynamo")
    config = transformers.DynamoConfig(dynamic_shapes=dict(dynamic))
    program = transformers.DynamoExporter().export(module, {**inputs, USE_CACHE: False}, config=config).program
    assert isinstance(program, ExportedProgram)
    return program


def _return_dictionaries(module: nn.Module) -> None:
    """Let a module that returns a mapping return a dictionary: a file cannot name the classes of other packages."""
    cls = type(module)

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        outputs = cls.forward(self, *args, **kwargs)
        return named_outputs(outputs) if isinstance(outputs, Mapping) else outputs

    exchange_forward(module, forward)


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
        raise RuntimeRefused(
            f"torch.export cannot write the program of {type(module).__name__}: it calls a function of Python "
            "(flat_apply)"
        )


def _remove_records(program: ExportedProgram) -> None:
    """Remove what a program records of this machine: the paths and source lines of its nodes."""
    for graph in program.graph_module.modules():
        for node in graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ():
            for record in MACHINES_OWN:
                node.meta.pop(record, None)


def load_own_program(path: Path) -> nn.Module:
    """The module of a file that this process has written. Others are read by `models.pt2`: a .pt2 can run code."""
    with silence():
        return torch.export.load(path).module()


def save_program(program: ExportedProgram, path: Path, *, extra: Mapping[str, str]) -> None:
    """Write a program. `torch.export.load(..., extra_files=...)` reads the texts of `extra` again."""
    content = io.BytesIO()
    with silence():
        torch.export.save(program, content, extra_files=dict(extra))
    content.seek(0)
    _copy_with_fixed_times(content, path)


def _copy_with_fixed_times(source: BinaryIO, target: Path) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for record in old.infolist():
            new.writestr(zipfile.ZipInfo(record.filename, FIXED_TIME), old.read(record))
