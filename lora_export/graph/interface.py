"""What it takes to run a graph: its inputs and outputs, their types and sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from lora_export.graph.site import Site

Size = int | str | None  # a symbol is a dynamic axis; None: not stated
ADAPTER_TENSOR = re.compile(r"(^|\.)lora_(embedding_)?(A|B|magnitude_vector)(\.|$)")


@dataclass(frozen=True)
class Port:
    """One input or output of a graph."""

    name: str
    dtype: str  # NumPy's name
    shape: tuple[Size, ...] | None  # None: not stated
    optional: bool = False  # an input that has a default value

    @property
    def dynamic_axes(self) -> tuple[int, ...]:
        """The axes whose size may vary."""
        return tuple(axis for axis, size in enumerate(self.shape or ()) if not isinstance(size, int))


@dataclass(frozen=True)
class Interface:
    """The inputs and outputs of a graph, in their sequence, and the operator sets that it needs."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    opsets: Mapping[str, int]  # domain -> version; the domain of ONNX itself is empty


def read_interface(model: ir.Model) -> Interface:
    """The interface of a graph. Reads no weights."""
    graph = model.graph
    return Interface(
        inputs=tuple(_port(value, optional=value.name in graph.initializers) for value in graph.inputs),
        outputs=tuple(_port(value) for value in graph.outputs),
        opsets=dict(model.opset_imports),
    )


def is_adapter_tensor(site: Site) -> bool:
    """Whether the site reads an adapter's A, B or factor, and no weight of the base: by the name of its tensor."""
    return bool(ADAPTER_TENSOR.search(site.value.name or ""))


def _port(value: ir.Value, *, optional: bool = False) -> Port:
    shape = None if value.shape is None else tuple(_size(size) for size in value.shape)
    names = {None: "unknown", ir.DataType.STRING: "string", ir.DataType.BOOL: "bool"}
    return Port(value.name or "", names.get(value.dtype) or str(value.dtype and value.dtype.numpy()), shape, optional)


def _size(size: int | ir.SymbolicDim) -> Size:
    return size if isinstance(size, int) else size.value if isinstance(size.value, str) else None
