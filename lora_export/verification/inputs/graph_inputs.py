"""Inputs for a graph without a model: made from the graph's declared inputs and from the nodes that read them.

The inputs are seeded and of several sizes; equal symbols have equal sizes. Token ids are smaller than the number of
rows of the table that they index. Masks hide padding, which a row alone has none of, and positions count the ones of
the mask. NumPy only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats.adapter_files import size_in_config
from lora_export.formats.contract import ROW_INPUTS
from lora_export.graph.cache_names import present_by_past
from lora_export.graph.operators import cache_heads
from lora_export.options.spelling import named
from lora_export.runtime.runner import Arrays
from lora_export.storage.npz import read_arrays
from lora_export.verification.inputs import REDRAWS


class GraphSizes(NamedTuple):
    """The sizes of one set of inputs."""

    batch: int
    length: int
    past: int  # the length of the cache


# All lengths differ, one batch has a single row, and one an even number of them. The cache is empty in two cases, and
# filled in one.
CASES = (GraphSizes(1, 5, 0), GraphSizes(3, 16, 5), GraphSizes(4, 29, 0))
SINGLE_TOKENS = GraphSizes(2, 1, 47)  # of a graph that takes token ids, if it takes so few
NO_CONFIG: Mapping[str, Any] = MappingProxyType({})
CACHE = re.compile(r"past|cache", re.IGNORECASE)
MASK_NAME = re.compile(r"mask", re.IGNORECASE)
POSITION_NAME = re.compile(r"position", re.IGNORECASE)
TYPE_NAME = re.compile(r"token_type", re.IGNORECASE)
# Operators that read the rows of tables: the input of the ids -> that of their table
LOOKUPS: Mapping[str, Mapping[int, int]] = MappingProxyType(
    {"Gather": {1: 0}, "GatherBlockQuantized": {1: 0}, "EmbedLayerNormalization": {0: 2, 1: 4, 7: 3}}
)
VALUE_PRESERVING = frozenset({"Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose"})


class NoGeneratedInputs(InputRefused):
    """No inputs can be generated for a graph. `problem` is the message without the remedy, which is to give inputs."""

    def __init__(self, problem: str, names: Iterable[str]):
        self.problem = problem
        remedy = f"Give inputs: {named('inputs', 'FILE.npz')}, with an array for each of {', '.join(names)}"
        super().__init__(f"{problem}. {remedy}")


class InputGenerator:
    """Makes inputs for a graph.

    `config` is that of the graph's model, where it is known: it has the sizes of a cache that the graph leaves open.
    `graph_name` is what an error calls the graph. Raises NoGeneratedInputs, with the inputs' names, where the graph
    does not determine which values an input takes.
    """

    def __init__(self, model: ir.Model, graph_name: str, config: Mapping[str, Any] = NO_CONFIG):
        self.inputs = _required_inputs(model)
        self.caches = [value for value in self.inputs if CACHE.search(value.name or "") and _is_float(value)]
        outputs = {str(value.name): value for value in model.graph.outputs}
        present = present_by_past([str(value.name) for value in self.caches], outputs)
        returned = {value: outputs.get(present.get(str(value.name), "")) for value in self.caches}
        # Cache -> its own sizes that do not vary, by axis, where the graph states them elsewhere than at the input
        self._stated = {value: _stated_sizes(value, result, config) for value, result in returned.items()}
        problems = [problem for value in self.inputs if (problem := _problem(value))]
        if problems:
            problem = f"inputs for {graph_name} cannot be made: {'; '.join(problems)}"
            raise NoGeneratedInputs(problem, [str(value.name) for value in self.inputs])

    @property
    def takes_tokens(self) -> bool:
        """Whether an input indexes a table."""
        return any(_rows_indexed(value) for value in self.inputs)

    def alternatives(self, sizes: GraphSizes) -> list[GraphSizes]:
        """These sizes; for a graph with a cache also one step after the cache, and an empty cache."""
        if not self.caches or not sizes.past:
            return [sizes]
        return [sizes, sizes._replace(length=1), sizes._replace(past=0)]

    def label(self, sizes: GraphSizes) -> str:
        """The name of a case of these sizes."""
        return f"batch {sizes.batch} x length {sizes.length}" + (f" after {sizes.past}" if self.caches else "")

    def redraw(self, sizes: GraphSizes, before: Arrays, *, seed: int) -> Arrays:
        """Each input with other values than in `before`; an input that cannot be varied is left out."""
        varied: Arrays = {}
        for number in range(REDRAWS):
            for name, array in self.make(sizes, seed=seed + number).items():
                if not np.array_equal(array, before[name]):
                    varied.setdefault(name, array)
        return varied

    def make(self, wanted: GraphSizes, *, seed: int) -> Arrays:
        """One set of inputs, of these sizes where the graph leaves them open."""
        rng = np.random.default_rng(seed)
        batch, length, past = wanted if self.caches else wanted._replace(past=0)
        size_of = self._sizes(batch, length, past)
        valid = rng.integers(max(1, length // 2), length + 1, size=batch)
        valid[1::2] = np.minimum(valid[1::2], max(1, length - 2))  # a mask of ones alone would not be put to the test
        if batch == 1:
            valid[:] = length
        return {
            value.name or "": _array(value, [size_of(value, axis) for axis in range(_rank(value))], past, valid, rng)
            for value in self.inputs
        }

    # --- sizes ---

    def _sizes(self, batch: int, length: int, past: int) -> Callable[[ir.Value, int], int]:
        by_symbol: dict[str, int] = {}
        # A cache's lengths come first, then those of a mask over the cache and the new tokens, then the new tokens'.
        for value in sorted(self.inputs, key=self._rank_of_kind):
            for axis, symbol in _symbols(value):
                over_all = value not in self.caches and self.caches and symbol not in self._lengths
                later = past if value in self.caches else past + length if over_all else length
                if axis not in self._stated.get(value, {}):
                    by_symbol.setdefault(symbol, later if axis else batch)

        def size_of(value: ir.Value, axis: int) -> int:
            declared = value.shape[axis] if value.shape is not None else None
            if isinstance(declared, int):
                return declared
            return self._stated.get(value, {}).get(axis) or by_symbol[_symbol(value, axis)]

        return size_of

    def _rank_of_kind(self, value: ir.Value) -> int:
        return 0 if value in self.caches else 2 if MASK_NAME.search(value.name or "") else 1

    @property
    def _lengths(self) -> set[str]:
        """The symbols of inputs that are neither masks nor caches."""
        own = [value for value in self.inputs if self._rank_of_kind(value) == 1]
        return {symbol for value in own for axis, symbol in _symbols(value) if axis}


# --- values -------------------------------------------------------------------------------------


def _required_inputs(model: ir.Model) -> list[ir.Value]:
    """The inputs without a default value. Adapter ids are not among them: the runner provides those."""
    optional = set(model.graph.initializers.values())
    return [value for value in model.graph.inputs if value not in optional and value.name not in ROW_INPUTS]


def _stated_sizes(cache: ir.Value, present: ir.Value | None, config: Mapping[str, Any]) -> dict[int, int]:
    """The sizes of a cache [batch, heads, length, features] by axis: as returned, by its operator, by the config."""
    shape = () if present is None or present.shape is None else present.shape
    stated = {axis: size for axis, size in enumerate(shape) if isinstance(size, int)}
    heads, features = cache_heads(cache)
    if _rank(cache) == 4:
        stated |= {axis: size for axis, size in ((1, heads), (3, features)) if size}
        stated = _sizes_in_config(config) | stated
    return stated


def _sizes_in_config(config: Mapping[str, Any]) -> dict[int, int]:
    """The heads of a cache and their features, by axis; empty where the config does not have both."""
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    queries, width = (size_in_config(text, name) for name in ("num_attention_heads", "hidden_size"))
    heads = size_in_config(text, "num_key_value_heads") or queries
    features = size_in_config(text, "head_dim") or (width // queries if width and queries else None)
    return {1: heads, 3: features} if heads and features else {}


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def _problem(value: ir.Value) -> str:
    """Why the graph does not determine which values an input takes; empty where it does."""
    name, dtype = value.name or "", value.dtype
    if dtype is None or value.shape is None:
        return f"the type and shape of {name} are unknown"
    if _is_float(value) or MASK_NAME.search(name) or POSITION_NAME.search(name):
        return ""
    if dtype is ir.DataType.BOOL and CACHE.search(name):
        return ""
    if dtype in (ir.DataType.INT64, ir.DataType.INT32) and _rows_indexed(value):
        return ""
    return f"the valid values of {name} ({dtype.name.lower()} {value.shape}) are unknown"


def _array(
    value: ir.Value, shape: Sequence[int], past: int, valid: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[Any]:
    name, dtype = value.name or "", value.dtype
    assert dtype is not None
    numpy_dtype = dtype.numpy()
    if MASK_NAME.search(name):
        return _mask(shape, past, valid).astype(numpy_dtype)
    if POSITION_NAME.search(name) and not _is_float(value):
        length = shape[-1] if shape else 1
        count = np.arange(length)
        by_row = np.minimum(count, valid[:, None] - 1) if len(shape) == 2 and shape[0] == len(valid) else count
        return np.broadcast_to(past + by_row, shape).astype(numpy_dtype)
    if TYPE_NAME.search(name) and len(valid) == 1:
        return np.zeros(shape, numpy_dtype)
    if _is_float(value):
        return rng.standard_normal(shape).astype(numpy_dtype)
    if dtype is ir.DataType.BOOL:
        return np.full(shape, past > 0)
    return rng.integers(0, _rows_indexed(value), size=shape).astype(numpy_dtype)


def _mask(shape: Sequence[int], past: int, valid: NDArray[np.int64]) -> NDArray[np.bool_]:
    """True for the whole cache, and for each row's own number of new tokens."""
    if len(shape) < 2:
        return np.ones(shape, bool)
    seen = np.arange(shape[-1]) < np.resize(valid, shape[0])[:, None] + past  # (batch, length)
    return np.broadcast_to(seen.reshape(shape[0], *[1] * (len(shape) - 2), shape[-1]), shape)


def _rows_indexed(value: ir.Value) -> int:
    """The number of rows of the smallest table that these ids index; 0 where there is none."""
    rows: list[int] = []
    waiting, known = [value], {value}
    while waiting:
        for node, index in waiting.pop().uses():
            at = LOOKUPS.get(node.op_type, {}).get(index)
            table = None if at is None else node.inputs[at]
            dequantised = None if table is None else table.producer()
            if dequantised is not None and dequantised.op_type == "DequantizeLinear":
                table = dequantised.inputs[0]  # of the same shape, which graphs need not state again
            axis = node.attributes.get_int("axis", node.attributes.get_int("gather_axis", 0))
            if table is not None and table.shape is not None and isinstance(size := table.shape[axis], int):
                rows.append(size)
            elif node.op_type in VALUE_PRESERVING and index == 0 and node.outputs[0] not in known:
                known.add(node.outputs[0])
                waiting.append(node.outputs[0])
    return min(rows, default=0)


def _rank(value: ir.Value) -> int:
    return len(value.shape) if value.shape is not None else 0


def _symbols(value: ir.Value) -> Iterator[tuple[int, str]]:
    """The axes that vary, each with its symbol."""
    for axis in range(_rank(value)):
        if not isinstance(value.shape[axis], int):  # type: ignore[index]
            yield axis, _symbol(value, axis)


def _symbol(value: ir.Value, axis: int) -> str:
    """The name of a size. Unnamed sizes of the same axis share one name."""
    size = value.shape[axis] if value.shape is not None else None
    named = isinstance(size, ir.SymbolicDim) and size.value
    return str(size) if named else f"axis {axis}"


def read(path: Path, model: ir.Model) -> Arrays:
    """The user's own inputs, in the graph's order. Raises InputRefused unless they are exactly the graph's inputs."""
    arrays = read_arrays(path)
    names = [str(value.name) for value in _required_inputs(model)]
    if set(arrays) != set(names):
        raise InputRefused(f"{path} contains {', '.join(arrays) or 'nothing'}; the graph takes {', '.join(names)}")
    return {name: arrays[name] for name in names}
