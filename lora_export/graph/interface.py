"""What it takes to run a graph: its inputs and outputs, their types and sizes, and the precision of its weights."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from lora_export.errors import brief
from lora_export.graph.find_sites import Sites
from lora_export.graph.site import Site
from lora_export.graph.values import stored_dtype

FULL_PRECISION = "float32"

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

    def __repr__(self) -> str:
        return brief(self, f"inputs={len(self.inputs)}", f"outputs={len(self.outputs)}")


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


# --- In which precision a graph stores its weights, and in which it computes with them: they need not be the same ---


@dataclass(frozen=True)
class WeightPrecision:
    """The precision of most entries of the matrices that linear layers and convolutions read."""

    stored: str  # a dtype, or how it is quantised: `4 bits in blocks of 32`
    computed: str  # the dtype of the product; a Cast or a dequantisation can make it differ

    def __str__(self) -> str:
        return f"weights stored in {self.stored}, computed in {self.computed}"

    @property
    def is_full(self) -> bool:
        """Whether both are float32."""
        return self.stored == self.computed == FULL_PRECISION


def precision_of(sites: Sites) -> WeightPrecision | None:
    """The precision of a graph with these sites; None for a graph without linear layers. Reads no tensor data."""
    entries: Counter[WeightPrecision] = Counter()
    for site in (*sites.linear, *sites.unnamed):
        stored = stored_dtype(site.value) if site.quantised is None else site.quantised.kind
        entries[WeightPrecision(stored, site.dtype)] += math.prod(site.shape)
    return max(entries, key=lambda each: entries[each], default=None)
