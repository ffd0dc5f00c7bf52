"""The names of a diffusion model's tensors in its other layout: that of its authors, or that of diffusers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lora_export.names.diffusion_tables import TABLES, RowLayout, TableRow, unet_table
from lora_export.names.loaded_names import LoadedShapeOf, LoadedTensor, ShapeOf
from lora_export.names.row_orders import swapped_halves
from lora_export.names.tensor_parts import AssembledTensor, NotExpressible, joined

_NUMBER = "{}"
SUFFIXES = (".weight", ".bias")
LONGEST_MATCHED = 500  # characters of a name that may be one of a table's
PACKED = {".weight": ".in_proj_weight", ".bias": ".in_proj_bias"}  # of nn.MultiheadAttention


@dataclass(frozen=True, eq=False)
class OtherLayout:
    """The tensors of a base under the names of the other layout."""

    model: str  # the family, such as "Flux"
    diffusers_class: str  # the class of its models in diffusers; empty where it has none
    is_original: bool  # whether the other layout is that of the model's authors
    tensors: Mapping[str, LoadedTensor]  # name in the other layout -> the base's tensors that it consists of


def other_layouts(names: Iterable[str]) -> list[OtherLayout]:
    """The other layouts that a base with these tensor names may have. Most bases have none."""
    names = [name for name in names if len(name) <= LONGEST_MATCHED]
    found = []
    unet = unet_table(names)
    for table in TABLES if unet is None else (unet,):
        for is_original in (True, False):
            sides = [_Side(row, original_side=not is_original) for row in table.rows]
            prefix = _prefix(sides, names)
            if prefix is not None:
                tensors = dict(_tensors(sides, [name for name in names if name.startswith(prefix)], prefix))
                if any(tensor.conversion is not None for tensor in tensors.values()):
                    found.append(OtherLayout(table.model, table.diffusers_class, is_original, tensors))
    return found


@dataclass(frozen=True, eq=False)
class _Side:
    """A row of a table, read from the side of the base."""

    row: TableRow
    original_side: bool  # whether the base has the original names

    @property
    def own(self) -> tuple[str, ...]:
        return (self.row.original,) if self.original_side else self.row.parts

    @property
    def patterns(self) -> list[re.Pattern[str]]:
        return [re.compile(re.escape(name).replace(r"\{\}", r"(\d+)")) for name in self.own]


def _prefix(sides: Sequence[_Side], names: Sequence[str]) -> str | None:
    """What precedes the names of the table in the base, where one of its numbered rows is found there."""
    numbered = [pattern.pattern for side in sides for pattern in side.patterns if r"(\d+)" in pattern.pattern]
    if not numbered:
        return None
    anywhere = re.compile(rf"(?P<prefix>(?:.+\.)?)(?:{'|'.join(numbered)})(?:\.(?:weight|bias)|\.in_proj_\w+)")
    return next((found["prefix"] for found in map(anywhere.fullmatch, names) if found), None)


def _tensors(sides: Sequence[_Side], names: Sequence[str], prefix: str) -> Iterator[tuple[str, LoadedTensor]]:
    """The tensors of the other layout by name; those that the table does not name under their own name."""
    by_module: dict[str, list[tuple[str, str]]] = {}  # module, without the prefix -> (suffix, tensor)
    for name in names:
        module, suffix = _module_and_suffix(name.removeprefix(prefix))
        by_module.setdefault(module, []).append((suffix, name))
    used: set[str] = set()
    for side in sides:
        for numbers in dict.fromkeys(_numbers(side, by_module)):
            original, parts = (text.replace(_NUMBER, "%s") for text in (side.row.original, "\n".join(side.row.parts)))
            one = original % numbers
            many = [part % numbers for part in parts.split("\n")]
            owned = [one] if side.original_side else many
            if not all(module in by_module for module in owned):
                continue
            used |= {name for module in owned for _, name in by_module[module]}
            yield from _of_row(side, one, many, by_module)
    for module, tensors in by_module.items():
        for suffix, name in tensors:
            if name not in used:
                yield module + suffix, LoadedTensor(module + suffix, stored=name)


def _numbers(side: _Side, modules: Iterable[str]) -> Iterator[tuple[str, ...]]:
    (first, *_), modules = side.patterns, list(modules)
    for module in modules:
        if found := first.fullmatch(module):
            yield found.groups()


def _module_and_suffix(name: str) -> tuple[str, str]:
    for suffix, packed in PACKED.items():
        if name.endswith(packed):
            return name.removesuffix(packed), suffix
        if name.endswith(suffix):
            return name.removesuffix(suffix), suffix
    return name, ""


def _of_row(
    side: _Side, one: str, many: Sequence[str], by_module: Mapping[str, Sequence[tuple[str, str]]]
) -> Iterator[tuple[str, LoadedTensor]]:
    tables = {module: dict(by_module[module]) for module in ([one] if side.original_side else many)}
    for suffix in SUFFIXES:
        stored = [tables[module].get(suffix, "") for module in tables]
        if not all(stored):
            continue
        weights = [tables[module].get(".weight", "") for module in tables]
        if side.original_side:
            for index, module in enumerate(many):
                of_part = _LayoutConversion(module + suffix, stored, weights, side.row.rows, index, len(many))
                yield of_part.name, LoadedTensor(of_part.name, conversion=of_part)
        else:
            of_whole = _LayoutConversion(one + suffix, stored, weights, side.row.rows)
            yield of_whole.name, LoadedTensor(of_whole.name, conversion=of_whole)


@dataclass(frozen=True, eq=False)
class _LayoutConversion:
    """How a tensor of the other layout is made of the base's tensors: all of several, or a part of one."""

    name: str
    sources: Sequence[str]
    weights: Sequence[str]  # the weights of the modules that own the sources; a bias is split as the weight is
    rows: RowLayout
    part: int | None = None
    parts: int = 1

    @property
    def stacks(self) -> bool:
        return False

    def assembled(
        self,
        shape_of: ShapeOf,
        loaded_shape_of: LoadedShapeOf | None = None,  # noqa: ARG002 - a base has all sizes
    ) -> dict[str, AssembledTensor]:
        """The tensor by its name. Raises NotExpressible."""
        tensors = [AssembledTensor.stored(name, shape_of(name)) for name in self.sources]
        whole = tensors[0] if len(tensors) == 1 else joined(tensors, 0)
        if self.part is not None and self.parts > 1:
            start, stop = self._range(whole.shape[0], shape_of)
            whole = whole.part(0, start, stop)
        size = whole.shape[0]
        swapped = self.rows is RowLayout.SWAPPED
        if self.rows is RowLayout.SWAPPED_PAIR and self.weights[0]:
            out, inputs = shape_of(self.weights[0])[:2]
            swapped = out == 2 * inputs
        if swapped:
            if size % 2:
                raise NotExpressible(f"swaps the halves of {size} rows")
            whole = whole.permuted(0, swapped_halves(size))
        return {self.name: whole}

    def _range(self, size: int, shape_of: ShapeOf) -> tuple[int, int]:
        """The rows of the part."""
        assert self.part is not None
        if self.rows is RowLayout.EQUAL:
            if size % self.parts:
                raise NotExpressible(f"splits {size} rows into {self.parts} equal parts")
            step = size // self.parts
            return self.part * step, (self.part + 1) * step
        width = shape_of(self.weights[0])[1] if self.weights[0] else 0
        if not width or width * (self.parts - 1) >= size:
            raise NotExpressible(f"splits {size} rows into square matrices and a rest")
        start = self.part * width
        return start, size if self.part == self.parts - 1 else start + width
