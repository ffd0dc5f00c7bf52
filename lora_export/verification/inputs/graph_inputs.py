"""Inputs for a graph of which nothing else is known: made from what its own inputs say and from what reads them.

Seeded, of differing sizes; equal symbols have equal sizes. Token ids stay below the rows of the table that they
index, masks are padded, positions count, a cache is short or empty. NumPy only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats.onnx_adapter import IDS
from lora_export.graph.ort_operators import head_size
from lora_export.storage.npz import read_arrays

Arrays = dict[str, NDArray[Any]]


class Sizes(NamedTuple):
    """How large what comes is, and how much of it a cache holds already."""

    batch: int
    length: int
    past: int


# None of the lengths is another's; one batch has a single row. A cache is empty, and once it is not.
CASES = (Sizes(1, 7, 0), Sizes(3, 16, 5), Sizes(5, 29, 0))
PERTURBATIONS = 5  # draws before an input counts as one that cannot be varied
CACHE = re.compile(r"past|cache", re.IGNORECASE)
MASK = re.compile(r"mask", re.IGNORECASE)
POSITION = re.compile(r"position", re.IGNORECASE)
TABLES = frozenset({"Gather", "GatherBlockQuantized"})  # read rows of input 0 by the ids at input 1
PASSED = frozenset({"Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose"})


class Feeds:
    """Makes inputs for a graph. Raises InputRefused, naming the input, where it cannot tell what one should hold."""

    def __init__(self, model: ir.Model, what: str):
        given = set(model.graph.initializers.values())
        self.inputs = [value for value in model.graph.inputs if value not in given and value.name != IDS]
        self.caches = [value for value in self.inputs if CACHE.search(value.name or "") and self._is_float(value)]
        strange = [problem for value in self.inputs if (problem := self._problem(value))]
        if strange:
            raise InputRefused(
                f"I cannot make inputs for {what}: {'; '.join(strange)}. Give some: --inputs FILE.npz, with an array "
                f"for each of {', '.join(str(value.name) for value in self.inputs)}"
            )

    def choices(self, sizes: Sizes) -> list[Sizes]:
        """These sizes, and what a graph with a cache may take instead: a single step after it, or nothing before."""
        if not self.caches or not sizes.past:
            return [sizes]
        return [sizes, sizes._replace(length=1), sizes._replace(past=0)]

    def label(self, sizes: Sizes) -> str:
        """What a case of these sizes is called."""
        return f"batch {sizes.batch} x length {sizes.length}" + (f" after {sizes.past}" if self.caches else "")

    def draws(self, sizes: Sizes, before: Arrays, *, seed: int) -> Arrays:
        """For each input another array of these sizes that it may hold; none for one that cannot be varied."""
        varied: Arrays = {}
        for number in range(PERTURBATIONS):
            for name, array in self.make(sizes, seed=seed + number).items():
                if not np.array_equal(array, before[name]):
                    varied.setdefault(name, array)
        return varied

    def make(self, wanted: Sizes, *, seed: int) -> Arrays:
        """One set of inputs, of these sizes where the graph leaves them open."""
        rng = np.random.default_rng(seed)
        batch, length, past = wanted if self.caches else wanted._replace(past=0)
        sizes = self._sizes(batch, length, past)
        valid = rng.integers(max(1, length // 2), length + 1, size=batch)
        valid[1::2] = np.minimum(valid[1::2], max(1, length - 2))  # a mask of ones alone would not be put to the test
        return {
            value.name or "": self._array(value, [sizes(value, axis) for axis in range(_rank(value))], past, valid, rng)
            for value in self.inputs
        }

    # --- sizes ---

    def _sizes(self, batch: int, length: int, past: int) -> Callable[[ir.Value, int], int]:
        told: dict[str, int] = {}
        # A cache's lengths first, then those of a mask over the cache and what comes now; the rest is what comes now.
        for value in sorted(self.inputs, key=self._rank_of_kind):
            for axis, symbol in _symbols(value):
                over_all = value not in self.caches and self.caches and symbol not in self._lengths
                later = past if value in self.caches else past + length if over_all else length
                inner = head_size(value) if value in self.caches and axis == _rank(value) - 1 else 0
                told.setdefault(symbol, inner or (later if axis else batch))

        def size(value: ir.Value, axis: int) -> int:
            there = value.shape[axis] if value.shape is not None else None
            return there if isinstance(there, int) else told[_symbol(value, axis)]

        return size

    def _rank_of_kind(self, value: ir.Value) -> int:
        return 0 if value in self.caches else 2 if MASK.search(value.name or "") else 1

    @property
    def _lengths(self) -> set[str]:
        """The symbols of inputs that are neither masks nor caches."""
        own = [value for value in self.inputs if self._rank_of_kind(value) == 1]
        return {symbol for value in own for axis, symbol in _symbols(value) if axis}

    # --- what they hold ---

    def _is_float(self, value: ir.Value) -> bool:
        return value.dtype is not None and value.dtype.is_floating_point()

    def _problem(self, value: ir.Value) -> str:
        """Why nobody can tell what an input should hold; empty where one can."""
        name, dtype = value.name or "", value.dtype
        if dtype is None or value.shape is None:
            return f"nothing tells the type and shape of {name}"
        if self._is_float(value) or MASK.search(name) or POSITION.search(name):
            return ""
        if dtype is ir.DataType.BOOL and CACHE.search(name):
            return ""
        if dtype in (ir.DataType.INT64, ir.DataType.INT32) and _rows_indexed(value):
            return ""
        return f"nothing tells what {name} ({dtype.name.lower()} {value.shape}) should hold"

    def _array(
        self, value: ir.Value, shape: Sequence[int], past: int, valid: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[Any]:
        name, dtype = value.name or "", value.dtype
        assert dtype is not None
        kind = dtype.numpy()
        if MASK.search(name):
            return _mask(shape, past, valid).astype(kind)
        if POSITION.search(name) and not self._is_float(value):
            length = shape[-1] if shape else 1
            return np.broadcast_to(np.arange(past, past + length), shape).astype(kind)
        if self._is_float(value):
            return rng.standard_normal(shape).astype(kind)
        if dtype is ir.DataType.BOOL:
            return np.full(shape, past > 0)
        return rng.integers(0, _rows_indexed(value), size=shape).astype(kind)


def _mask(shape: Sequence[int], past: int, valid: NDArray[np.int64]) -> NDArray[np.bool_]:
    """True for what is to be seen: all that came before, and each row's own length of what comes now."""
    if len(shape) < 2:
        return np.ones(shape, bool)
    seen = np.arange(shape[-1]) < np.resize(valid, shape[0])[:, None] + past  # (batch, length)
    return np.broadcast_to(seen.reshape(shape[0], *[1] * (len(shape) - 2), shape[-1]), shape)


def _rows_indexed(value: ir.Value) -> int:
    """How many rows the smallest table has that these ids index; 0 where none is found."""
    rows: list[int] = []
    waiting, known = [value], {value}
    while waiting:
        at = waiting.pop()
        for node, index in at.uses():
            table = node.inputs[0] if node.op_type in TABLES and index == 1 else None
            if table is not None and table.shape is not None and isinstance(table.shape[0], int):
                rows.append(table.shape[0])
            elif node.op_type in PASSED and index == 0 and node.outputs[0] not in known:
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
    """What a size is called; sizes without a name are one by their place."""
    size = value.shape[axis] if value.shape is not None else None
    named = isinstance(size, ir.SymbolicDim) and size.value
    return str(size) if named else f"axis {axis}"


def read(path: Path, model: ir.Model) -> Arrays:
    """The user's own inputs, all that the graph takes and no others. Raises InputRefused."""
    arrays = read_arrays(path)
    given = set(model.graph.initializers)
    wanted = [str(value.name) for value in model.graph.inputs if value.name not in given and value.name != IDS]
    if set(arrays) != set(wanted):
        raise InputRefused(f"{path} holds {', '.join(arrays) or 'nothing'}; the graph takes {', '.join(wanted)}")
    return {name: arrays[name] for name in wanted}
