"""An exported program as a module: its graph is run node by node, its weights are those of layers again.

A program has no layers, only parameters with their names, and operators that read them. Where every operator that
reads `X.weight` is a linear layer's, a convolution's or an embedding's, X is made that layer (`nn.Linear` and so on)
and called in the operator's place: what attaches adapters to a module, watches its layers or looks rows up does so
here too, and a reference with adapters computes `W x + s·B (A x)`, which no merge does. Where a weight is read in
another way (transposed and multiplied, as a program has it after its decomposition), whoever reads it is given
`W + s·BA` of the reference's own making, in fp64 for the reference: not the sum that a merge wrote, and the only
meaning that an adapter has where its layer cannot be told.

The floats are those of the file. Where the module is cast (`.double()`, `.to()`), the dtype in which the file keeps
its weights stands for the dtype that they have now, wherever the graph names it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_export.errors import InputRefused, LoraExportError, RuntimeRefused
from lora_export.models.pt2 import allowed_operators, reader
from lora_export.models.pt2.program_types import Exported, Graph, Node, Symbol, Value, Word
from lora_export.models.pt2.recover_layers import (
    argument_of,
    build,
    is_matrix,
    operator_of,
    readers_of,
    shown,
    split_name,
    values_in,
)

ALIKE = 5  # faults of one kind that are told
ENTERS = {"embedding.default": "indices", "mm.default": "self", "addmm.default": "mat1"}  # others: "input"
# Blocks that a module runs under a switch. Switched off, they are their graph; on, gradients alone differ.
INLINE = {
    "torch.ops.higher_order.wrap_with_set_grad_enabled": 1,  # how many arguments come before the graph
    "torch.ops.higher_order.wrap_with_autocast": 4,
}


class Place(NamedTuple):
    """Where a value of the graph lies in the module."""

    owner: str
    attribute: str


@dataclass(frozen=True, eq=False)
class _Step:
    """One node, ready to run."""

    node: Node
    run: allowed_operators.Operator | None  # None: the node's graph, in the place of the node
    arguments: tuple[tuple[str, Any], ...]
    layer: str  # the module that is called in the operator's place; empty where there is none
    input: Any  # of that module
    inner: _Steps | None
    ends: tuple[str, ...]  # values that nobody reads any more


@dataclass(frozen=True, eq=False)
class _Steps:
    graph: Graph
    steps: tuple[_Step, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Steps:
        return self  # it never changes, and a module is copied often


class Program(nn.Module):
    """A program's graph. Raises InputRefused for operators and structures that are not run from a file."""

    def __init__(self, source: Exported):
        super().__init__()
        # All that a program has of its own is there before its modules are: none may be called like it.
        self.unseen: tuple[str, ...] = ()  # weights that no layer multiplies by: who watches layers sees no use of them
        self.file_dtype = _dtype_of(source)  # of the file's weights: that of the first one of floats
        self._described = _Described(source)
        self._places = {there.value: Place(*split_name(there.name)) for there in source.stored}
        self._steps, self._writes = _Steps(source.graph, ()), False
        called = build(self, source, readers_of(source.graph))
        layers = {layer for layer in called.values() if layer is not None}
        self.unseen = tuple(
            f"{owner}.weight" for owner, module in self.named_modules() if is_matrix(module) and owner not in layers
        )
        self._steps = _prepared(source.graph, self._places, set(source.input_values.values()), called, source.path)
        self._writes = any(step.run is not None and step.run.writes for step in _every(self._steps))
        self.eval()

    @property
    def source(self) -> Exported:
        """What the file says of itself."""
        return self._described.source

    @property
    def stored_dtypes(self) -> dict[str, str]:
        """In which dtype the file keeps each tensor, by the module's names."""
        return {there.name: there.payload.dtype for there in self.source.stored}

    @property
    def axes(self) -> dict[str, tuple[int | None, ...]]:
        """Input -> sizes, None where they vary."""
        return {
            name: tuple(size if isinstance(size, int) else None for size in tensor.sizes)
            for name, tensor in self.source.inputs.items()
        }

    @property
    def limits(self) -> dict[str, tuple[tuple[int, int | None], ...]]:
        """Input -> the least and the greatest size of each axis; None where any will do."""
        ranges = self.source.ranges
        return {
            name: tuple(
                (size, size) if isinstance(size, int) else ranges.get(size.name, (0, None)) for size in tensor.sizes
            )
            for name, tensor in self.source.inputs.items()
        }

    def extra_repr(self) -> str:
        return f"graph {self.source.digest}"

    def forward(self, **inputs: Tensor) -> Any:
        """The outputs, in the structure in which the module that was exported returned them.

        Raises RuntimeRefused for inputs that the program was not made for, and for what an operator refuses.
        """
        self._check(inputs)
        now = self._dtype_now()
        values: dict[str, Any] = {}
        for name, value in self.source.input_values.items():
            given = self._in_its_dtype(inputs[name], self.source.inputs[name].dtype, now)
            values[value] = given.clone() if self._writes else given
        versions = self._versions() if self._writes else []
        results = self._run(self._steps, values, now)
        if versions != (self._versions() if self._writes else []):
            raise RuntimeRefused(f"{self.source.path.name} changes its own weights when it is run")
        return _filled(self.source.outputs, results)

    # --- running ---

    def _run(self, steps: _Steps, values: dict[str, Any], now: torch.dtype | None) -> list[Any]:
        device = next((tensor.device for tensor in self.parameters()), torch.device("cpu"))
        read = functools.partial(self._read, values, now, device)
        for step in steps.steps:
            try:
                result = self._result(step, read, now)
            except LoraExportError:
                raise
            except Exception as error:  # operators raise whatever they like
                told = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise RuntimeRefused(f"node {step.node.name} ({shown(step.node.target)}): {told}") from error
            _bind(step.node, result, values)
            for name in step.ends:
                values.pop(name, None)
        return [read(output) for output in steps.graph.outputs]

    def _result(self, step: _Step, read: Callable[[Any], Any], now: torch.dtype | None) -> Any:
        if step.layer:
            return self.get_submodule(step.layer)(read(step.input))
        if step.run is None:
            assert step.inner is not None
            given = [read(value) for _, value in step.arguments]
            inputs = dict(zip(step.inner.graph.inputs, given, strict=True))
            made = self._run(step.inner, {name: value for name, value in inputs.items() if name is not None}, now)
            return made[0] if step.inner.graph.is_single else made
        if step.run.names is None:
            return step.run.run(*(read(value) for _, value in step.arguments))
        return step.run.run(**{name: read(value) for name, value in step.arguments})

    def _read(self, values: Mapping[str, Any], now: torch.dtype | None, device: torch.device, argument: Any) -> Any:
        if isinstance(argument, Value):
            if argument.name in values:
                return values[argument.name]
            place = self._places[argument.name]
            return getattr(self.get_submodule(place.owner), place.attribute)  # with what is attached to it
        if isinstance(argument, Word):
            return self._word(argument, now, device)
        if isinstance(argument, list):
            return [self._read(values, now, device, each) for each in argument]
        return argument

    def _word(self, word: Word, now: torch.dtype | None, device: torch.device) -> Any:
        if word.kind == "device":
            return device  # where the module is, wherever it was exported
        found: Any = getattr(torch, word.name)
        return now if word.kind == "dtype" and found is self.file_dtype else found

    def _dtype_now(self) -> torch.dtype | None:
        """What the file's own dtype has become: that of the first tensor which the file keeps in it."""
        for there in self.source.stored:
            if getattr(torch, there.payload.dtype) is self.file_dtype:
                owner, attribute = self._places[there.value]
                module = self.get_submodule(owner)
                tensor = {**module._parameters, **module._buffers}[attribute]
                return None if tensor is None else tensor.dtype
        return self.file_dtype

    def _versions(self) -> list[int]:
        return [tensor._version for tensor in (*self.parameters(), *self.buffers())]

    # --- inputs ---

    def _check(self, inputs: Mapping[str, Tensor]) -> None:
        told = [f"the program has no input {name}" for name in inputs if name not in self.source.inputs]
        told += [
            f"the program wants {name}, which it was not given" for name in self.source.inputs if name not in inputs
        ]
        if told:
            raise RuntimeRefused("; ".join(told))
        sizes: dict[str, int] = {}
        for name, tensor in self.source.inputs.items():
            given = inputs[name]
            declared: torch.dtype = getattr(torch, tensor.dtype)
            if given.is_floating_point() != declared.is_floating_point or (
                not declared.is_floating_point and given.dtype is not declared
            ):
                told.append(f"{name} is {str(given.dtype)[6:]}, and the program takes {tensor.dtype}")
            if given.ndim != len(tensor.sizes):
                told.append(f"{name} has {given.ndim} axes, and the program takes {len(tensor.sizes)}")
                continue
            for axis, (size, wanted) in enumerate(zip(given.shape, tensor.sizes, strict=True)):
                told += self._size_problem(f"axis {axis} of {name}", size, wanted, sizes)
        if told:
            raise RuntimeRefused("; ".join(told[:ALIKE]))

    def _size_problem(self, what: str, size: int, wanted: int | Symbol, sizes: dict[str, int]) -> Iterator[str]:
        if isinstance(wanted, int):
            if size != wanted:
                yield f"{what} is {size}, and the program was exported for {wanted} alone"
            return
        if not wanted.name:
            return  # an expression of others, which the program computes itself
        if sizes.setdefault(wanted.name, size) != size:
            yield f"{what} is {size}, where another axis that has to be as long is {sizes[wanted.name]}"
        low, high = self.source.ranges.get(wanted.name, (0, None))
        if size < low or (high is not None and size > high):
            yield f"{what} is {size}, and the program takes {low} to {'any' if high is None else high}"

    def _in_its_dtype(self, given: Tensor, declared: str, now: torch.dtype | None) -> Tensor:
        wanted: torch.dtype = getattr(torch, declared)
        if not wanted.is_floating_point or (given.dtype is torch.float64 and now is torch.float64):
            return given  # a reference's numbers are not narrowed
        return given.to(now if wanted is self.file_dtype and now is not None else wanted)


def _dtype_of(source: Exported) -> torch.dtype | None:
    for kind in ("parameter", "buffer", "constant"):
        for there in source.stored:
            dtype: torch.dtype = getattr(torch, there.payload.dtype)
            if there.kind == kind and dtype.is_floating_point:
                return dtype
    return None


class _Described:
    """Holds what the file says, out of reach of a module's copies."""

    def __init__(self, source: Exported):
        self.source = source

    def __deepcopy__(self, memo: dict[int, Any]) -> _Described:
        return self


def load(path: Path) -> Program:
    """The program in a .pt2 file. Raises InputRefused for what cannot be read, or is not run from a file."""
    return Program(reader.read(path))


# --- steps --------------------------------------------------------------------------------------


def _prepared(
    graph: Graph, places: Mapping[str, Place], given: set[str], called: Mapping[int, str | None], path: Path
) -> _Steps:
    """The graph's nodes with their operators looked up. Raises InputRefused with all that are not run."""
    last = _last_reads(graph)
    steps, problems = [], []
    for number, node in enumerate(graph.nodes):
        if called.get(node.number, "") is None:
            continue
        try:
            steps.append(_step(node, places, given, called, path, tuple(last.get(number, ()))))
        except InputRefused as error:
            problems.append(str(error))
    if problems:
        more = f" (and {len(problems) - 1} more nodes like it)" if len(problems) > 1 else ""
        raise InputRefused(f"{problems[0]}{more}")
    return _Steps(graph, tuple(steps))


def _last_reads(graph: Graph) -> dict[int, list[str]]:
    """Node -> the values that nobody reads after it. Those that nobody reads at all stay until the end."""
    reads: dict[str, int] = {}
    for number, node in enumerate(graph.nodes):
        for _, given in node.inputs:
            for value in values_in(given):
                reads[value] = number
    for value in values_in(list(graph.outputs)):
        reads.pop(value, None)
    ends: dict[int, list[str]] = {}
    for value, number in reads.items():
        ends.setdefault(number, []).append(value)
    return ends


def _step(
    node: Node,
    places: Mapping[str, Place],
    given: set[str],
    called: Mapping[int, str | None],
    path: Path,
    ends: tuple[str, ...],
) -> _Step:
    where = f"{path}: node {node.name}"
    if node.target in INLINE:
        return _inlined(node, path, ends)
    if node.target.startswith(allowed_operators.HIGHER_ORDER):
        raise InputRefused(f"{where}: {shown(node.target)} runs graphs in a way that is not supported")
    operator = allowed_operators.resolve(node.target, where)
    if any(isinstance(argument, Graph) for _, argument in node.inputs):
        raise InputRefused(f"{where}: {shown(node.target)} is given a graph")
    if operator.names is not None:
        strange = [name for name, _ in node.inputs if name not in operator.names]
        if strange:
            raise InputRefused(f"{where}: {shown(node.target)} has no argument {', '.join(strange)[:80]}")
    if operator.writes and (target := next(iter(node.inputs), None)) is not None:
        written = set(values_in(target[1]))
        if written & (places.keys() | given):
            raise InputRefused(
                f"{where}: {shown(node.target)} changes {', '.join(sorted(written))}, which is no value of its own: "
                "a program that keeps something from run to run is not supported"
            )
    layer = called.get(node.number) or ""
    first = argument_of(node, ENTERS.get(operator_of(node), "input"), None) if layer else None
    # Pinning is for copies to a GPU.
    arguments = tuple((name, value) for name, value in node.inputs if name != "pin_memory")
    return _Step(node, operator, arguments, layer, first, None, ends)


def _inlined(node: Node, path: Path, ends: tuple[str, ...]) -> _Step:
    before = INLINE[node.target]
    values = [value for _, value in node.inputs]
    where = f"{path}: node {node.name} ({shown(node.target)})"
    if len(values) <= before or not isinstance(values[before], Graph):
        raise InputRefused(f"{where} has no graph where it should")
    enabled = values[2] if node.target.endswith("autocast") else False
    if enabled is not False:
        raise InputRefused(f"{where}: a block under autocast is not supported")
    graph: Graph = values[before]
    arguments = tuple(("", value) for value in values[before + 1 :])
    if len(arguments) != len(graph.inputs):
        raise InputRefused(f"{where} gives {len(arguments)} values to a graph that takes {len(graph.inputs)}")
    names = {name for name in graph.inputs if name is not None}
    return _Step(node, None, arguments, "", None, _prepared(graph, {}, names, {}, path), ends)


def _every(steps: _Steps) -> Iterator[_Step]:
    for step in steps.steps:
        yield step
        if step.inner is not None:
            yield from _every(step.inner)


def _bind(node: Node, result: Any, values: dict[str, Any]) -> None:
    outputs = node.outputs
    if not outputs:
        return
    if len(outputs) == 1:
        if isinstance(outputs[0], list):
            values.update(zip(outputs[0], result, strict=True))
        elif outputs[0] is not None:
            many = isinstance(result, tuple | list) and len(result) == 1
            values[outputs[0]] = result[0] if many else result
        return
    for output, part in zip(outputs, result, strict=True):
        if isinstance(output, list):
            values.update(zip(output, part, strict=True))
        elif output is not None:
            values[output] = part


def _filled(structure: Any, results: Sequence[Any]) -> Any:
    if isinstance(structure, dict):
        return {key: _filled(part, results) for key, part in structure.items()}
    if isinstance(structure, tuple | list):
        return type(structure)(_filled(part, results) for part in structure)
    return results[structure]
