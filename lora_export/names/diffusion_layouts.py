"""The names of a diffusion model's tensors in its other layout: that of its authors, or that of diffusers.

The rows are data: `diffusion.json`. Each has a module of the original model and the modules of diffusers that have its
weights; `{}` is a number. Modules that no row names have one name in both. The tests compare with diffusers.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from lora_export.names.families import read_rows
from lora_export.names.loaded_names import LoadedShapeOf, LoadedTensor, ShapeOf
from lora_export.names.row_orders import swapped_halves
from lora_export.names.tensor_parts import AssembledTensor, NotExpressible, joined

_DATA = read_rows("diffusion.json")
SUFFIXES = (".weight", ".bias")
LONGEST_MATCHED = 500  # characters of a name that may be one of a table's
PACKED = {".weight": ".in_proj_weight", ".bias": ".in_proj_bias"}  # of nn.MultiheadAttention


class RowLayout(StrEnum):
    """How the rows of an original weight relate to those of the modules of diffusers."""

    EQUAL = "equal"  # one after another, all of one size
    SQUARE_THEN_REST = "square, then the rest"  # all but the last are square matrices
    SQUARE_THEN_EQUAL = "square, then equal"  # the first is a square matrix, the others are of one size
    SWAPPED = "swapped"  # the two halves (shift, scale) in the other order
    SWAPPED_PAIR = "swapped pair"  # as SWAPPED where the weight has just these two; else unchanged
    TRANSPOSED = "transposed"  # a bare parameter (in, out), which is no module of the original model


@dataclass(frozen=True)
class TableRow:
    """One module of the original model, and what diffusers calls it."""

    original: str
    parts: tuple[str, ...]
    rows: RowLayout = RowLayout.EQUAL

    def patterns(self, *, of_original: bool) -> list[str]:
        """Regular expressions for its modules in one of the layouts."""
        names = (self.original,) if of_original else self.parts
        return [re.escape(name).replace(r"\{\}", r"(\d+)") for name in names]

    def numbers_in(self, modules: Collection[str], *, of_original: bool) -> list[tuple[str, ...]]:
        """The numbers of its module, or of the first of them, wherever that is among the modules of a layout."""
        first = self.original if of_original else self.parts[0]
        if "{}" not in first:  # a UNet's table has hundreds of such rows, whose expressions would take most of the time
            return [()] if first in modules else []
        found = map(re.compile(self.patterns(of_original=of_original)[0]).fullmatch, modules)
        return list(dict.fromkeys(match.groups() for match in found if match))


@dataclass(frozen=True)
class NameTable:
    """The names of one family of models. Rows with a number recognise it."""

    model: str
    diffusers_classes: tuple[str, ...]  # the classes of such models in diffusers, if any
    rows: tuple[TableRow, ...]

    @functools.cached_property
    def numbered(self) -> Mapping[bool, re.Pattern[str] | None]:
        """Tensors of modules that rows with a number name: of the original model (True), and of diffusers (False)."""
        return {is_original: self._numbered(of_original=is_original) for is_original in (True, False)}

    def _numbered(self, *, of_original: bool) -> re.Pattern[str] | None:
        patterns = [pattern for row in self.rows for pattern in row.patterns(of_original=of_original)]
        found = "|".join(pattern for pattern in patterns if r"(\d+)" in pattern)
        return re.compile(rf"(?P<prefix>(?:.+\.)?)(?:{found})(?:\.(?:weight|bias)|\.in_proj_\w+)") if found else None


def _rows(model: Mapping[str, Any]) -> Iterator[TableRow]:
    for group in model["modules"]:
        for one, many in group["modules"].items():
            parts = (many,) if isinstance(many, str) else many
            yield TableRow(
                group["original"] + one,
                tuple(group["diffusers"] + part for part in parts),
                RowLayout(group.get("rows", RowLayout.EQUAL)),
            )


UNET = "UNet2DConditionModel"
TABLES = tuple(
    NameTable(model["model"], tuple(model["diffusers_classes"]), tuple(_rows(model))) for model in _DATA["models"]
)
# Classes of diffusers of which the names of the authors are known: by a table, or as they are
KNOWN_CLASSES = frozenset(
    {UNET, *_DATA["one_kind_of_names"], *(each for table in TABLES for each in table.diffusers_classes)}
)


@dataclass(frozen=True, eq=False)
class OtherLayout:
    """The tensors of a base under the names of the other layout."""

    model: str  # the family, such as "Flux"
    diffusers_classes: tuple[str, ...]  # the classes of its models in diffusers, if any
    is_original: bool  # whether the other layout is that of the model's authors
    tensors: Mapping[str, LoadedTensor]  # name in the other layout -> the base's tensors that it consists of


def other_layouts(names: Iterable[str]) -> list[OtherLayout]:
    """The other layouts that a base with these tensor names may have. Most bases have none."""
    names = [name for name in names if len(name) <= LONGEST_MATCHED]
    found = []
    unet = unet_table(names)
    for table in TABLES if unet is None else (unet,):
        for is_original in (True, False):
            prefix = _prefix(table, names, of_original=not is_original)
            if prefix is not None:
                own = [name for name in names if name.startswith(prefix)]
                tensors = dict(_tensors(table, own, prefix, of_original=not is_original))
                if any(tensor.conversion is not None for tensor in tensors.values()):
                    found.append(OtherLayout(table.model, table.diffusers_classes, is_original, tensors))
    return found


def _prefix(table: NameTable, names: Sequence[str], *, of_original: bool) -> str | None:
    """What precedes the names of the table in the base, where one of its numbered rows is found there."""
    pattern = table.numbered[of_original]
    if pattern is None:
        return None
    return next((found["prefix"] for found in map(pattern.fullmatch, names) if found), None)


def _tensors(
    table: NameTable, names: Sequence[str], prefix: str, *, of_original: bool
) -> Iterator[tuple[str, LoadedTensor]]:
    """The tensors of the other layout by name; those that the table does not name under their own name."""
    by_module: dict[str, list[tuple[str, str]]] = {}  # module, without the prefix -> (suffix, tensor)
    for name in names:
        module, suffix = _module_and_suffix(name.removeprefix(prefix))
        by_module.setdefault(module, []).append((suffix, name))
    used: set[str] = set()
    for row in table.rows:
        for numbers in row.numbers_in(by_module, of_original=of_original):
            one, *many = (name.format(*numbers) for name in (row.original, *row.parts))
            owned = [one] if of_original else many
            if not all(module in by_module for module in owned):
                continue
            used |= {name for module in owned for _, name in by_module[module]}
            of_base = [dict(by_module[module]) for module in owned]
            yield from _of_row(row, one, many, of_base, of_original=of_original)
    for module, tensors in by_module.items():
        for suffix, name in tensors:
            if name not in used:
                yield module + suffix, LoadedTensor(module + suffix, stored=name)


def _module_and_suffix(name: str) -> tuple[str, str]:
    for suffix, packed in PACKED.items():
        if name.endswith(packed):
            return name.removesuffix(packed), suffix
        if name.endswith(suffix):
            return name.removesuffix(suffix), suffix
    return name, ""


def _of_row(
    row: TableRow, one: str, many: Sequence[str], owned: Sequence[Mapping[str, str]], *, of_original: bool
) -> Iterator[tuple[str, LoadedTensor]]:
    """The tensors that a row makes of the modules that the base has of it, `owned`: suffix -> tensor of each."""
    weights = [module.get(".weight", "") for module in owned]
    suffixes = [(suffix, suffix) for suffix in SUFFIXES]  # of the base's tensors, of those that are made of them
    if row.rows is RowLayout.TRANSPOSED:
        suffixes = [("", ".weight") if of_original else (".weight", "")]
    for own, other in suffixes:
        stored = [module.get(own, "") for module in owned]
        if all(stored):
            made = many if of_original else [one]
            for part, name in enumerate(made):
                how = _LayoutConversion(name + other, stored, weights, row.rows, part, len(made))
                yield how.name, LoadedTensor(how.name, conversion=how)


@dataclass(frozen=True, eq=False)
class _LayoutConversion:
    """How a tensor of the other layout is made of the base's tensors: all of several, or a part of one."""

    name: str
    sources: Sequence[str]
    weights: Sequence[str]  # the weights of the modules that own the sources; a bias is split as the weight is
    rows: RowLayout
    part: int
    parts: int  # 1: the tensor is all of its sources

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
        if self.parts > 1:
            start, stop = self._range(whole.shape[0], shape_of)
            whole = whole.part(0, start, stop)
        if self.rows is RowLayout.TRANSPOSED:
            whole = whole.transposed(0, 1)
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
        sizes = self._sizes(size, shape_of)
        start = sum(sizes[: self.part])
        return start, start + sizes[self.part]

    def _sizes(self, size: int, shape_of: ShapeOf) -> list[int]:
        """The rows of each part of a tensor of `size` rows."""
        if self.rows is RowLayout.EQUAL:
            if size % self.parts:
                raise NotExpressible(f"splits {size} rows into {self.parts} equal parts")
            return [size // self.parts] * self.parts
        square = 1 if self.rows is RowLayout.SQUARE_THEN_EQUAL else self.parts - 1
        width, others = shape_of(self.weights[0])[1] if self.weights[0] else 0, self.parts - square
        rest = size - square * width
        if not width or rest <= 0 or rest % others:
            raise NotExpressible(f"splits {size} rows into square matrices and a rest")
        return [width] * square + [rest // others] * others


# --- A UNet ---
#
# Its authors (Stable Diffusion's `sgm`) number the blocks of the whole UNet, diffusers those of each resolution.

DOWN = re.compile(r"(?:.*\.)?down_blocks\.(?P<block>\d+)\.resnets\.(?P<layer>\d+)\..*")
UP = re.compile(r"(?:.*\.)?up_blocks\.(?P<block>\d+)\.(?P<kind>resnets|attentions)\.(?P<layer>\d+)\..*")
INPUT = re.compile(r"(?:.*\.)?input_blocks\.(?P<number>\d+)\.(?P<inner>\d+)\.(?P<rest>.*)")
OUTPUT = re.compile(r"(?:.*\.)?output_blocks\.(?P<number>\d+)\.(?P<inner>\d+)\.(?P<rest>.*)")
MOST_BLOCKS = 64


def unet_table(names: Iterable[str]) -> NameTable | None:
    """The table for the UNet whose tensors have these names, in either layout; None where they are no UNet's."""
    names = list(names)
    for depth, blocks, with_attention in (_sizes_in_diffusers(names), _sizes_in_the_original(names)):
        # The numbers are those of names, which a hostile file chooses.
        if 0 < depth <= MOST_BLOCKS and 0 < blocks <= MOST_BLOCKS:
            rows = _DATA["unet"]["outside"] | dict(_unet_rows(depth, blocks, with_attention))
            table = tuple(TableRow(original, (diffusers,)) for original, diffusers in rows.items())
            return NameTable("UNet", (UNET,), table)
    return None


def _sizes_in_diffusers(names: Iterable[str]) -> tuple[int, int, set[int]]:
    """The layers of a block, the blocks, and those of them on the way up that have an attention. 0: none."""
    down = [(int(m["block"]), int(m["layer"])) for m in map(DOWN.fullmatch, names) if m]
    up = [(int(m["block"]), m["kind"]) for m in map(UP.fullmatch, names) if m]
    depth = 1 + max((layer for block, layer in down if block == 0), default=-1)
    blocks = 1 + max((block for block, _ in down), default=-1)
    return depth, blocks, {block for block, kind in up if kind != "resnets"}


def _sizes_in_the_original(names: Iterable[str]) -> tuple[int, int, set[int]]:
    """As `_sizes_in_diffusers`."""
    inputs = [(int(m["number"]), m["rest"]) for m in map(INPUT.fullmatch, names) if m]
    outputs = [(int(m["number"]), int(m["inner"]), m["rest"]) for m in map(OUTPUT.fullmatch, names) if m]
    halving = sorted({number for number, rest in inputs if rest.startswith("op.")})
    depth = halving[0] - 1 if halving else max((number for number, _ in inputs), default=0)
    if depth < 1:
        return 0, 0, set()
    with_attention = {number // (depth + 1) for number, inner, rest in outputs if inner == 1 and "conv" not in rest}
    return depth, len(halving) + 1, with_attention


def _unet_rows(depth: int, blocks: int, with_attention: set[int]) -> Iterator[tuple[str, str]]:
    """The names of all modules inside of blocks."""
    for when, kind, original, diffusers in _DATA["unet"]["places"]:
        layers = {"each layer but the last": range(depth), "last layer": range(depth, depth + 1)}
        for block in range(1 if when == "once" else blocks):
            for layer in range(1) if when == "once" else layers.get(when, range(depth + 1)):
                number = block * (depth + 1) + layer  # in the whole UNet
                numbers = {"block": block, "layer": layer, "down": number + 1, "up": number}
                numbers["after"] = 2 if block in with_attention else 1
                for one, other in _DATA["unet"]["inside"][kind].items():
                    yield f"{original.format(**numbers)}.{one}", f"{diffusers.format(**numbers)}.{other}"
