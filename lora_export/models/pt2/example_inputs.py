"""Inputs for an exported program, which says no more of them than their types and sizes.

The range of whole numbers is found where the graph looks them up: ids in a table of embeddings. A mask is known by
its name, and so are positions. What neither tells is refused: a number out of range would be the file's crash.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from lora_export.errors import InputRefused
from lora_export.models.pt2.program_types import Exported, Symbol, Value

Sizes = Mapping[str, int]
Limits = dict[str, tuple[int, int | None]]  # symbol -> least and greatest size
Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]

BATCH, SEQUENCE = "batch", "sequence"
MOST_INPUTS = 256
MOST_NUMBERS = 1 << 28  # in one input: a file may say that it takes any number of them
# What leaves numbers as they are, for all that their places change.
PASSED_ON = frozenset(
    {
        *("to", "_to_copy", "clone", "contiguous", "alias", "detach", "lift_fresh_copy", "slice", "select", "view"),
        *("reshape", "unsqueeze", "squeeze", "expand", "flatten", "unflatten", "transpose", "permute"),
    }
)


def padding_mask(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Ones where there are tokens, zeros where there is padding [batch, sequence]: at the end, and at the beginning."""
    # All rows but the first are padded for certain: a mask of ones alone would never be put to the test.
    lengths = torch.randint(max(1, shape[1] // 2), shape[1] + 1, (shape[0], 1), generator=generator)
    lengths[1:] = torch.clamp(lengths[1:], max=max(1, shape[1] - 2))
    mask = (torch.arange(shape[1]) < lengths).long()
    mask[2::2] = mask[2::2].flip(1)  # at the beginning: a mask taken for a mere length has to fail
    return mask


class Signature:
    """What a program takes: `axes` that may vary, their `traced` sizes and `limits`, and how to `make` inputs.

    The first axis is the batch, and axes that were of one size when the program was exported vary together, as they
    do for a module of the user's own. Raises InputRefused for inputs that cannot be made.
    """

    def __init__(self, source: Exported):
        self.source = source
        if not 0 < len(source.inputs) <= MOST_INPUTS:
            raise InputRefused(f"{source.path} takes {len(source.inputs)} inputs; a model takes 1 to {MOST_INPUTS}")
        self.symbols = self._names()
        self.axes = {
            name: {axis: self.symbols[size.name] for axis, size in enumerate(tensor.sizes) if isinstance(size, Symbol)}
            for name, tensor in source.inputs.items()
        }
        self.limits: Limits = {}
        self.traced: dict[str, int] = {}
        for symbol, name in self.symbols.items():
            low, high = source.ranges.get(symbol, (0, None))
            before = self.limits.get(name, (0, None))
            highs = [limit for limit in (high, before[1]) if limit is not None]
            self.limits[name] = max(low, before[0]), min(highs, default=None)
        for tensor in source.inputs.values():
            for size in tensor.sizes:
                if isinstance(size, Symbol):
                    self.traced.setdefault(self.symbols[size.name], self._traced(size))
        self.draws = {name: self._draw(name) for name in source.inputs}

    def make(self, sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
        """Inputs of these sizes, by name; floats in fp32, of which those of a half stand in that half too."""
        made = {}
        for name, tensor in self.source.inputs.items():
            shape = tuple(sizes[self.symbols[size.name]] if isinstance(size, Symbol) else size for size in tensor.sizes)
            if math.prod(shape) > MOST_NUMBERS:
                raise InputRefused(f"{self.source.path}: {name} would be {list(shape)}, which is too much to try")
            drawn = self.draws[name](shape, generator).to(getattr(torch, tensor.dtype))
            made[name] = drawn.float() if drawn.is_floating_point() else drawn
        return made

    def _traced(self, size: Symbol) -> int:
        low, _ = self.source.ranges.get(size.name, (0, None))
        return size.hint if size.hint is not None and size.hint > 0 else max(2, low)

    def _names(self) -> dict[str, str]:
        """The program's symbols by ours."""
        found: dict[str, str] = {}
        by_hint: dict[int, str] = {}
        batches = {
            tensor.sizes[0].hint
            for tensor in self.source.inputs.values()
            if tensor.sizes and isinstance(tensor.sizes[0], Symbol)
        }
        places = [
            (axis, name, size)
            for name, tensor in self.source.inputs.items()
            for axis, size in enumerate(tensor.sizes)
            if isinstance(size, Symbol)
        ]
        for axis, name, size in sorted(places, key=lambda place: place[0]):
            if not size.name:
                raise InputRefused(
                    f"{self.source.path}: the size of axis {axis} of {name} is computed of others, and I cannot make "
                    "inputs for it. Give the model as a Hugging Face folder or as `file.py:factory`"
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

    def _is_text(self, name: str) -> bool:
        tensor = self.source.inputs[name]
        return len(tensor.sizes) == 2 and not tensor.dtype.startswith(("float", "bfloat"))

    # --- numbers ---

    def _draw(self, name: str) -> Draw:
        dtype = self.source.inputs[name].dtype
        if "mask" in name.lower():
            return _mask
        if dtype.startswith(("float", "bfloat")):
            return lambda shape, generator: torch.randn(shape, generator=generator)
        if dtype == "bool":
            return lambda shape, generator: torch.randint(0, 2, shape, generator=generator)
        if "position" in name.lower():
            return lambda shape, _: torch.arange(shape[-1] if shape else 1).expand(shape)
        rows = min(self._rows(self.source.input_values[name]), default=0)
        if not rows:
            raise InputRefused(
                f"{self.source.path}: no table of embeddings looks {name} up, so that I cannot tell which whole "
                "numbers it takes. Give the model as a Hugging Face folder or as `file.py:factory`"
            )
        return lambda shape, generator: torch.randint(0, rows, shape, generator=generator)

    def _rows(self, value: str) -> Iterator[int]:
        """How many rows the tables have in which the numbers of a value are looked up."""
        sizes = {there.value: there.payload.sizes for there in self.source.stored}
        reached = {value}
        for node in self.source.graph.nodes:
            name = node.target.removeprefix("torch.ops.aten.").partition(".")[0]
            given = dict(node.inputs)
            if name == "embedding" and _name(given.get("indices")) in reached:
                table = _name(given.get("weight"))
                if sizes.get(table):
                    yield sizes[table][0]
            if name in PASSED_ON and _name(given.get("self")) in reached:
                reached |= {output for output in node.outputs if isinstance(output, str)}


def _mask(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return padding_mask((shape[0], shape[1]), generator) if len(shape) == 2 else torch.ones(shape)


def _name(argument: object) -> str:
    return argument.name if isinstance(argument, Value) else ""
