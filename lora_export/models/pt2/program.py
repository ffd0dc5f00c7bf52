"""An exported program as a module: its graph is run node by node, and its weights are in layers again.

Where all operators that read `X.weight` are those of a linear layer, a convolution or an embedding, X becomes that
layer (`nn.Linear` and so on) and is called in place of the operator. Adapters can be attached then as in any module,
and a reference with adapters computes `W x + s·B (A x)`, which no merge does. Where a weight is read in another way
(transposed and multiplied, as in a decomposed program), the operator reads `W + s·BA`, computed by the reference itself
in fp64: not the sum that a merge wrote.

The graph names dtypes. Where the module is cast (`.double()`, `.to()`), the dtype in which the file stores its weights
is replaced, wherever the graph names it, by the dtype that they have now.

As a Model it has the axes that vary, and inputs made for it. The file describes only dtypes and sizes of inputs. The
range of an integer input is the number of rows of the embedding table that it indexes. Masks and positions are
recognised by their names. Any other integer input is refused: a number out of range would crash the program.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_export.errors import InputRefused, LoraExportError, RuntimeRefused, first_line
from lora_export.layers.torch_internals import changes_of, own_buffers, own_parameters
from lora_export.models.model import Axes, Limits, Model, ModelInputs, Sizes
from lora_export.models.pt2 import reader
from lora_export.models.pt2.graph_json import Node, ProgramDescription, Symbol, TorchName, Value, fill
from lora_export.models.pt2.prepared_graph import PreparedGraph, PreparedNode, TensorLocation, all_nodes, prepare
from lora_export.models.pt2.recover_layers import has_matrix, readable, recover_layers, split_attribute, uses_of
from lora_export.models.text_inputs import padding_mask

MAX_INPUT_PROBLEMS = 5  # that a message lists


class Program(nn.Module):
    """A program's graph. Raises InputRefused for operators and structures that are not run from a file."""

    def __init__(self, description: ProgramDescription):
        super().__init__()
        # All attributes are set before the modules are: none of these may have the name of one.
        self.unobserved_weights: tuple[str, ...] = ()  # weights that no layer multiplies by: no hook sees their use
        self.file_dtype = _float_dtype(description)  # of the file's weights: that of the first float tensor
        self.description = description
        self._locations = {each.value: TensorLocation(*split_attribute(each.name)) for each in description.tensors}
        self._graph, self._writes = PreparedGraph(description.graph, ()), False
        layers = recover_layers(self, description, uses_of(description.graph))
        called = {layer for layer in layers.values() if layer is not None}
        self.unobserved_weights = tuple(
            f"{owner}.weight" for owner, module in self.named_modules() if has_matrix(module) and owner not in called
        )
        inputs = set(description.input_values.values())
        self._graph = prepare(description.graph, self._locations, inputs, layers, description.path)
        self._writes = any(node.operator is not None and node.operator.writes for node in all_nodes(self._graph))
        self.eval()

    @property
    def stored_dtypes(self) -> dict[str, str]:
        """The dtype in which the file stores each tensor, by the module's names."""
        return {tensor.name: tensor.data.dtype for tensor in self.description.tensors}

    @property
    def axes(self) -> dict[str, tuple[int | None, ...]]:
        """Input -> the size of each axis, None where it varies."""
        return {
            name: tuple(size if isinstance(size, int) else None for size in tensor.sizes)
            for name, tensor in self.description.inputs.items()
        }

    @property
    def limits(self) -> dict[str, tuple[tuple[int, int | None], ...]]:
        """Input -> the least and the greatest size of each axis; None where there is no greatest."""
        ranges = self.description.ranges
        return {
            name: tuple(
                (size, size) if isinstance(size, int) else ranges.get(size.name, (0, None)) for size in tensor.sizes
            )
            for name, tensor in self.description.inputs.items()
        }

    def extra_repr(self) -> str:
        return f"graph {self.description.graph_sha256}"

    def forward(self, **inputs: Tensor) -> Any:
        """The outputs, in the structure that the exported module returned them in.

        Raises RuntimeRefused for inputs that the program was not exported for, and when an operator fails.
        """
        self._check(inputs)
        dtype = self._current_dtype()
        values: dict[str, Any] = {}
        for name, value in self.description.input_values.items():
            tensor = self._converted(inputs[name], self.description.inputs[name].dtype, dtype)
            values[value] = tensor.clone() if self._writes else tensor
        versions = self._versions() if self._writes else []
        results = self._run(self._graph, values, dtype)
        if versions != (self._versions() if self._writes else []):
            raise RuntimeRefused(f"{self.description.path.name} changes its own weights when it is run")
        return fill(self.description.outputs, results)

    # --- running ---

    def _run(self, graph: PreparedGraph, values: dict[str, Any], dtype: torch.dtype | None) -> list[Any]:
        device = next((tensor.device for tensor in self.parameters()), torch.device("cpu"))
        read = functools.partial(self._read, values, dtype, device)
        for prepared in graph.nodes:
            try:
                result = self._result(prepared, read, dtype)
            except LoraExportError:
                raise
            except Exception as error:  # operators raise exceptions of any type
                where = f"node {prepared.node.name} ({readable(prepared.node.target)})"
                raise RuntimeRefused(f"{where}: {first_line(error)}") from error
            _store(prepared.node, result, values)
            for name in prepared.last_reads:
                values.pop(name, None)
        return [read(output) for output in graph.graph.outputs]

    def _result(self, prepared: PreparedNode, read: Callable[[Any], Any], dtype: torch.dtype | None) -> Any:
        if prepared.layer:
            return self.get_submodule(prepared.layer)(read(prepared.layer_input))
        if prepared.operator is None:
            assert prepared.inner is not None
            arguments = [read(value) for _, value in prepared.arguments]
            inputs = dict(zip(prepared.inner.graph.inputs, arguments, strict=True))
            own = {name: value for name, value in inputs.items() if name is not None}
            results = self._run(prepared.inner, own, dtype)
            return results[0] if prepared.inner.graph.is_single else results
        if prepared.operator.names is None:
            return prepared.operator.run(*(read(value) for _, value in prepared.arguments))
        return prepared.operator.run(**{name: read(value) for name, value in prepared.arguments})

    def _read(self, values: Mapping[str, Any], dtype: torch.dtype | None, device: torch.device, argument: Any) -> Any:
        if isinstance(argument, Value):
            if argument.name in values:
                return values[argument.name]
            location = self._locations[argument.name]
            return getattr(self.get_submodule(location.owner), location.attribute)  # with its attached adapters
        if isinstance(argument, TorchName):
            return self._constant(argument, dtype, device)
        if isinstance(argument, list):
            return [self._read(values, dtype, device, each) for each in argument]
        return argument

    def _constant(self, constant: TorchName, dtype: torch.dtype | None, device: torch.device) -> Any:
        if constant.kind == "device":
            return device  # the module's own, wherever it was exported
        found: Any = getattr(torch, constant.name)
        return dtype if constant.kind == "dtype" and found is self.file_dtype else found

    def _current_dtype(self) -> torch.dtype | None:
        """The present dtype of the first tensor that the file stores in `file_dtype`."""
        for tensor in self.description.tensors:
            if getattr(torch, tensor.data.dtype) is self.file_dtype:
                owner, attribute = self._locations[tensor.value]
                module = self.get_submodule(owner)
                current = {**own_parameters(module), **own_buffers(module)}[attribute]
                return None if current is None else current.dtype
        return self.file_dtype

    def _versions(self) -> list[int]:
        return [changes_of(tensor) for tensor in (*self.parameters(), *self.buffers())]

    # --- inputs ---

    def _check(self, inputs: Mapping[str, Tensor]) -> None:
        expected = self.description.inputs
        problems = [f"the program has no input {name}" for name in inputs if name not in expected]
        problems += [f"the program's input {name} is missing" for name in expected if name not in inputs]
        if problems:
            raise RuntimeRefused("; ".join(problems))
        sizes: dict[str, int] = {}
        for name, tensor in expected.items():
            value = inputs[name]
            declared: torch.dtype = getattr(torch, tensor.dtype)
            if value.is_floating_point() != declared.is_floating_point or (
                not declared.is_floating_point and value.dtype is not declared
            ):
                problems.append(f"{name} is {str(value.dtype)[6:]}, and the program takes {tensor.dtype}")
            if value.ndim != len(tensor.sizes):
                problems.append(f"{name} has {value.ndim} axes, and the program takes {len(tensor.sizes)}")
                continue
            for axis, (size, wanted) in enumerate(zip(value.shape, tensor.sizes, strict=True)):
                problems += self._size_problem(f"axis {axis} of {name}", size, wanted, sizes)
        if problems:
            raise RuntimeRefused("; ".join(problems[:MAX_INPUT_PROBLEMS]))

    def _size_problem(self, what: str, size: int, wanted: int | Symbol, sizes: dict[str, int]) -> Iterator[str]:
        if isinstance(wanted, int):
            if size != wanted:
                yield f"{what} is {size}, and the program was exported for {wanted} alone"
            return
        if not wanted.name:
            return  # an expression of others, which the program computes itself
        if sizes.setdefault(wanted.name, size) != size:
            yield f"{what} is {size}; another axis that must have the same size is {sizes[wanted.name]}"
        low, high = self.description.ranges.get(wanted.name, (0, None))
        if size < low or (high is not None and size > high):
            yield f"{what} is {size}, and the program takes {low} to {'any' if high is None else high}"

    def _converted(self, value: Tensor, declared: str, dtype: torch.dtype | None) -> Tensor:
        """An input in the dtype that the program takes, or in `dtype` where that replaces the file's."""
        wanted: torch.dtype = getattr(torch, declared)
        if not wanted.is_floating_point or (value.dtype is torch.float64 and dtype is torch.float64):
            return value  # the inputs of a reference in fp64 are not narrowed
        return value.to(dtype if wanted is self.file_dtype and dtype is not None else wanted)


def load_program(path: Path) -> Program:
    """The program in a .pt2 file. Raises InputRefused for what cannot be read, or is not run from a file."""
    return Program(reader.read(path))


def _float_dtype(description: ProgramDescription) -> torch.dtype | None:
    for kind in ("parameter", "buffer", "constant"):
        for tensor in description.tensors:
            dtype: torch.dtype = getattr(torch, tensor.data.dtype)
            if tensor.kind == kind and dtype.is_floating_point:
                return dtype
    return None


def _store(node: Node, result: Any, values: dict[str, Any]) -> None:
    """Store a node's results under the names of its outputs."""
    if not node.outputs:
        return
    if len(node.outputs) == 1:
        is_one_of_one = not isinstance(node.outputs[0], list) and isinstance(result, tuple | list) and len(result) == 1
        result = result if is_one_of_one else [result]
    for output, part in zip(node.outputs, result, strict=True):
        if isinstance(output, list):
            values.update(zip(output, part, strict=True))
        elif output is not None:
            values[output] = part


Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]
BATCH, SEQUENCE = "batch", "sequence"
MAX_INPUTS = 256
MAX_INPUT_NUMBERS = 1 << 28  # in one input: a file may claim that it takes any number of them
# Operators that move numbers but do not change them.
MOVING = frozenset(
    {
        *("to", "_to_copy", "clone", "contiguous", "alias", "detach", "lift_fresh_copy", "slice", "select", "view"),
        *("reshape", "unsqueeze", "squeeze", "expand", "flatten", "unflatten", "transpose", "permute"),
    }
)


def from_program(path: Path) -> Model:
    """Load a .pt2 with its weights in fp32. Where it was exported in another precision, its graph runs in fp32 too.

    Raises InputRefused for a file that cannot be read or run, and for inputs that cannot be made.
    """
    module = load_program(path)
    inputs = ProgramInputs(module.description)
    notes, limits = _notes(module, inputs), inputs.limits
    module = module.to(torch.float32)
    return Model(str(path), module, inputs.axes, inputs.make, inputs.traced_sizes, limits=limits, notes=notes)


def _notes(module: Program, inputs: ProgramInputs) -> tuple[str, ...]:
    notes = []
    if module.file_dtype not in (None, torch.float32):
        notes.append(f"the model's .pt2 stores its weights in {str(module.file_dtype).removeprefix('torch.')}")
    fixed = [
        f"axis {axis} of {name} is {size}"
        for name, tensor in module.description.inputs.items()
        for axis, size in enumerate(tensor.sizes)
        if isinstance(size, int) and axis < 2
    ]
    if fixed and not any(inputs.axes.values()):
        notes.append(f"the model was exported for one size of every axis ({', '.join(fixed)}): no other was tried")
    return tuple(notes)


class ProgramInputs:
    """The inputs of a program: the `axes` that may vary, their `traced_sizes` and `limits`, and how to `make` them.

    The first axis is the batch. Axes of equal size at the export are taken to vary together, as for a factory's
    module. Raises InputRefused for inputs that cannot be made.
    """

    def __init__(self, program: ProgramDescription):
        self.program = program
        if not 0 < len(program.inputs) <= MAX_INPUTS:
            raise InputRefused(f"{program.path} takes {len(program.inputs)} inputs; a model takes 1 to {MAX_INPUTS}")
        self.symbols = self._named_symbols()
        self.limits = self._limits()
        self.axes: Axes = {name: {} for name in program.inputs}
        self.traced_sizes: Sizes = {}
        for axis, name, size in self._varying_axes():
            symbol = self.axes[name][axis] = self.symbols[size.name]
            low, _ = program.ranges.get(size.name, (0, None))
            self.traced_sizes.setdefault(symbol, size.hint if size.hint is not None and size.hint > 0 else max(2, low))
        self.draws = {name: self._draw(name) for name in program.inputs}

    def make(self, sizes: Sizes, generator: torch.Generator) -> ModelInputs:
        """Inputs of these sizes, by name. Floats are in fp32, and first rounded to the program's own dtype.

        Raises InputRefused for an input of more than MAX_INPUT_NUMBERS.
        """
        made = {}
        for name, tensor in self.program.inputs.items():
            shape = tuple(sizes[self.symbols[size.name]] if isinstance(size, Symbol) else size for size in tensor.sizes)
            if math.prod(shape) > MAX_INPUT_NUMBERS:
                raise InputRefused(f"{self.program.path}: {name} would be {list(shape)}, which is too large to run")
            drawn = self.draws[name](shape, generator).to(getattr(torch, tensor.dtype))
            made[name] = drawn.float() if drawn.is_floating_point() else drawn
        return made

    # --- sizes ---

    def _limits(self) -> Limits:
        """Least and greatest size by our symbol: the narrowest of the ranges of all the program's symbols for it."""
        limits: Limits = {}
        for symbol, name in self.symbols.items():
            low, high = self.program.ranges.get(symbol, (0, None))
            before = limits.get(name, (0, None))
            highs = [limit for limit in (high, before[1]) if limit is not None]
            limits[name] = max(low, before[0]), min(highs, default=None)
        return limits

    def _named_symbols(self) -> dict[str, str]:
        """The program's symbols -> ours: `batch`, `sequence`, or the name of an input and its axis."""
        found: dict[str, str] = {}
        by_hint: dict[int, str] = {}
        batches = {size.hint for axis, _, size in self._varying_axes() if axis == 0}
        for axis, name, size in sorted(self._varying_axes(), key=lambda varying: varying[0]):
            if not size.name:
                raise InputRefused(
                    f"{self.program.path}: the size of axis {axis} of {name} is computed from others, so that "
                    "lora-export cannot make inputs for it. Give the model as a Hugging Face folder or as "
                    "`file.py:factory`"
                )
            if size.name in found:
                continue
            own = f"{name}_axis{axis}"
            if axis == 0:
                found[size.name] = BATCH if len(batches) == 1 else own
            elif size.hint in by_hint:
                found[size.name] = by_hint[size.hint]
            else:
                own = SEQUENCE if axis == 1 and self._is_text(name) and SEQUENCE not in found.values() else own
                found[size.name] = own
                if size.hint is not None:
                    by_hint[size.hint] = own
        return found

    def _varying_axes(self) -> list[tuple[int, str, Symbol]]:
        """(axis, input, size) of each axis that may vary."""
        return [
            (axis, name, size)
            for name, tensor in self.program.inputs.items()
            for axis, size in enumerate(tensor.sizes)
            if isinstance(size, Symbol)
        ]

    def _is_text(self, name: str) -> bool:
        tensor = self.program.inputs[name]
        return len(tensor.sizes) == 2 and not tensor.dtype.startswith(("float", "bfloat"))

    # --- numbers ---

    def _draw(self, name: str) -> Draw:
        """A function that draws the numbers of one input."""
        dtype = self.program.inputs[name].dtype
        if "mask" in name.lower():
            return lambda shape, generator: (
                padding_mask((shape[0], shape[1]), generator) if len(shape) == 2 else torch.ones(shape)
            )
        if dtype.startswith(("float", "bfloat")):
            return lambda shape, generator: torch.randn(shape, generator=generator)
        if dtype == "bool":
            return lambda shape, generator: torch.randint(0, 2, shape, generator=generator)
        if "position" in name.lower():
            return lambda shape, _: torch.arange(shape[-1] if shape else 1).expand(shape)
        rows = min(self._indexed_rows(self.program.input_values[name]), default=0)
        if not rows:
            raise InputRefused(
                f"{self.program.path}: the integer input {name} indexes no embedding table, so that its range is "
                "unknown. Give the model as a Hugging Face folder or as `file.py:factory`"
            )
        return lambda shape, generator: torch.randint(0, rows, shape, generator=generator)

    def _indexed_rows(self, value: str) -> Iterator[int]:
        """The number of rows of each embedding table that a value indexes."""
        sizes = {tensor.value: tensor.data.sizes for tensor in self.program.tensors}
        reached = {value}
        for node in self.program.graph.nodes:
            operator = node.target.removeprefix("torch.ops.aten.").partition(".")[0]
            arguments = dict(node.inputs)
            if operator == "embedding" and _value_name(arguments.get("indices")) in reached:
                table = _value_name(arguments.get("weight"))
                if sizes.get(table):
                    yield sizes[table][0]
            if operator in MOVING and _value_name(arguments.get("self")) in reached:
                reached |= {output for output in node.outputs if isinstance(output, str)}


def _value_name(argument: object) -> str:
    return argument.name if isinstance(argument, Value) else ""
