"""A .pt2 program as a Model: its module, the axes that vary, and inputs made for it.

The file describes only the dtypes and sizes of its inputs. The range of an integer input is the number of rows of the
embedding table that it indexes. Masks and positions are recognised by their names. Any other integer input is refused:
a number out of range would crash the program.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from lora_export.errors import InputRefused
from lora_export.models.model import Axes, Limits, Model, ModelInputs, Sizes
from lora_export.models.pt2 import program
from lora_export.models.pt2.program_types import ProgramDescription, Symbol, Value
from lora_export.models.text_inputs import padding_mask

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
    module = program.load_program(path)
    inputs = ProgramInputs(module.description)
    notes, limits = _notes(module, inputs), inputs.limits
    module = module.to(torch.float32)
    return Model(str(path), module, inputs.axes, inputs.make, inputs.traced_sizes, limits=limits, notes=notes)


def _notes(module: program.Program, inputs: ProgramInputs) -> tuple[str, ...]:
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

        Raises InputRefused for inputs above MAX_NUMBERS.
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
            return _mask
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


def _mask(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return padding_mask((shape[0], shape[1]), generator) if len(shape) == 2 else torch.ones(shape)


def _value_name(argument: object) -> str:
    return argument.name if isinstance(argument, Value) else ""
