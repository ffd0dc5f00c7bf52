"""What programs call the layers of a family of models, and how they order and join their rows. The facts are data.

`families.json` has a row for each type of model, with a column for each format or program. `litgpt.json` has litgpt's
own families. This is the engine that carries the rows out on the pairs of an adapter: rename, reorder, join. The column
`experts` states how the experts of a model are stored, and so which axes a pair of one has.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lora_export.errors import InputRefused
from lora_export.lora import ExpertAxes, LoraPair, is_power_of_two, split_part
from lora_export.names.row_orders import Heads, RowOrder


def fuse_outputs(parts: Mapping[int, LoraPair], sizes: Sequence[int]) -> LoraPair:
    """The pair of a fused layer of these output sizes. Outputs without a pair do not change.

    A is all A below each other, B has each B on its diagonal: the rank is the sum of all, and the product is exactly
    that of the parts. A scale that is another one times a power of two moves into B, where it changes no digit. Raises
    InputRefused where a part has another size than stated, for other scales, and for DoRA on some outputs only.
    """
    starts = np.cumsum([0, *sizes])
    for number, pair in parts.items():
        if pair.shape[0] != sizes[number]:
            raise InputRefused(f"B is {pair.b.shape}, and the base has {sizes[number]} outputs there")
    ordered = [parts[number] for number in sorted(parts)]
    scale = ordered[0].scale
    factors = [pair.scale / scale if pair.scale != scale and scale else 1.0 for pair in ordered]
    same = all(pair.scale == scale or (scale and is_power_of_two(f)) for pair, f in zip(ordered, factors, strict=True))
    if len({pair.shape[1:] for pair in ordered}) != 1 or not same:
        raise InputRefused("the pairs of a fused layer have different scales or inputs")
    with_magnitude = [pair.magnitude for pair in parts.values() if pair.magnitude is not None]
    if with_magnitude and len(with_magnitude) != len(sizes):
        raise InputRefused("DoRA on some outputs of a fused layer is not supported")
    b = np.zeros((int(starts[-1]), sum(pair.rank for pair in parts.values())), np.float32)
    column = 0
    for number, factor in zip(sorted(parts), factors, strict=True):
        pair = parts[number]
        b[starts[number] : starts[number + 1], column : column + pair.rank] = pair.b * np.float32(factor)
        column += pair.rank
    return LoraPair(
        a=np.concatenate([pair.a for pair in ordered]),
        b=b,
        scale=scale,
        magnitude=np.concatenate([p.magnitude for p in ordered if p.magnitude is not None]) if with_magnitude else None,
    )


def joined_outputs(parts: Mapping[int, LoraPair], sizes: Sequence[int]) -> LoraPair:
    """As `fuse_outputs`, with one A of the old rank where every output has a pair with the same A and scale."""
    pairs = [parts[number] for number in sorted(parts)]
    first = pairs[0]
    shares_a = all(pair.scale == first.scale and np.array_equal(pair.a, first.a) for pair in pairs[1:])
    with_magnitude = [pair.magnitude for pair in pairs if pair.magnitude is not None]
    if len(parts) != len(sizes) or not shares_a or len(with_magnitude) not in (0, len(parts)):
        return fuse_outputs(parts, sizes)
    return LoraPair(
        a=first.a,
        b=np.concatenate([pair.b for pair in pairs]),
        scale=first.scale,
        magnitude=np.concatenate(with_magnitude) if with_magnitude else None,
    )


# --- Rows of data, carried out ---


_HERE = Path(__file__).parent
EXPERT = "#"  # the number of an expert in the name of a tensor
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@functools.cache
def read_rows(name: str) -> Mapping[str, Any]:
    """The data in a file of this folder, parsed once."""
    table: Mapping[str, Any] = json.loads((_HERE / name).read_text(encoding="utf-8"))
    return table


def column(name: str) -> dict[str, Any]:
    """What `families.json` has for a program: type of model -> its entry."""
    return {kind: row[name] for kind, row in read_rows("families.json")["model_types"].items() if name in row}


@dataclass(frozen=True)
class JoinedLayer:
    """A layer that has the outputs of several layers of another program, one after another."""

    parts: Sequence[str]  # the ends of their names
    by_heads: bool = False  # whether these are q, k and v, whose sizes the heads determine; else all are equal
    rows: RowOrder | None = None  # how its rows are ordered, where not so


@dataclass(frozen=True)
class FamilyNames:
    """The layers of one family: what another program calls them, by what it calls them itself."""

    modules: Mapping[str, str] = field(default_factory=dict)  # own name -> the other; `{}` is a number
    rows: Mapping[str, RowOrder] = field(default_factory=dict)  # last part of a name -> the order of its rows
    joined: Mapping[str, JoinedLayer] = field(default_factory=dict)  # the end of a layer's name -> its parts

    @classmethod
    def of(cls, row: Mapping[str, Any], modules: Mapping[str, str] | None = None) -> FamilyNames:
        """The names that a row of data has; `modules` are those of all families of a program."""
        names = dict(row.get("modules", modules or {}))
        for one, other in row.get("blocks", {}).items():
            names = {own: name.replace(f".{one}.", f".{other}.", 1) for own, name in names.items()}
        joined = {
            name: JoinedLayer(
                parts=entry["of"],
                by_heads=entry.get("sizes") == "heads",
                rows=RowOrder(entry["rows"]) if "rows" in entry else None,
            )
            for name, entry in row.get("joined", {}).items()
        }
        return cls(names, {last: RowOrder(order) for last, order in row.get("rows", {}).items()}, joined)

    def renamed(self, module: str) -> str | None:
        """What the other program calls a module; None for one that no row names."""
        name = self.modules.get(_NUMBER.sub("{}", module))
        return None if name is None else name.format(*_NUMBER.findall(module))

    def reordered(self, module: str, pair: LoraPair, heads: Heads) -> LoraPair:
        """The pair of a module with its rows in the other program's order. Raises InputRefused for another size."""
        order = self.rows.get(module.rpartition(".")[2])
        return pair if order is None else pair.part(order.indices(pair.b.shape[0], heads), None)

    def with_joined(
        self, pairs: Mapping[str, LoraPair], spelling: Mapping[str, str], source: Path, heads: Heads | None = None
    ) -> tuple[dict[str, LoraPair], dict[str, str]]:
        """The pairs and their keys in the file, with those of the parts of one layer as one pair.

        Layers may be stacks of experts. Raises InputRefused as `fuse_outputs` does.
        """
        places = {part: (new, number) for new, layer in self.joined.items() for number, part in enumerate(layer.parts)}
        result: dict[str, LoraPair] = {}
        names: dict[str, str] = {}
        found: dict[str, tuple[JoinedLayer, dict[int, LoraPair]]] = {}
        for name, pair in pairs.items():
            owner, indices = split_part(name)
            part = next((each for each in places if owner.endswith(f".{each}")), None)
            if part is None:
                result[name], names[name] = pair, spelling[name]
                continue
            layer, number = places[part]
            new = f"{owner.removesuffix(part)}{layer}" + (f"[{indices}]" if indices else "")
            found.setdefault(new, (self.joined[layer], {}))[1][number] = pair
            names.setdefault(new, spelling[name])
        for new, (joined, parts) in found.items():
            try:
                result[new] = _joined(joined, parts, heads, is_expert=bool(split_part(new)[1]))
            except InputRefused as error:
                raise InputRefused(f"{source}: {names[new]}: {error}") from error
        return result, names


def _joined(layer: JoinedLayer, parts: Mapping[int, LoraPair], heads: Heads | None, *, is_expert: bool) -> LoraPair:
    equal = [next(iter(parts.values())).shape[0]] * len(layer.parts)
    fused = fuse_outputs(parts, heads.outputs if layer.by_heads and heads is not None else equal)
    if layer.rows is not None:
        fused = fused.part(layer.rows.indices(fused.b.shape[0], heads), None)
    return LoraPair(a=fused.a, b=fused.b, scale=fused.scale, as_stored=True) if is_expert else fused


# --- Experts ---

_STORED = column("experts")
# Model types of transformers whose class of experts sets `is_transposed`, and further ones that store (in, out) too.
# `tests/names/test_families.py` derives both again from the installed transformers.
TRANSPOSED_CLASSES = frozenset(kind for kind, entry in _STORED.items() if entry.get("is_transposed"))
STORED_IN_OUT = frozenset(kind for kind, entry in _STORED.items() if entry["stored"] == "in_out")
ALTERNATING = frozenset(kind for kind, entry in _STORED.items() if entry.get("gate_up") == "alternating")
# The names of one projection: Mixtral's (SGLang's too), and those of most others.
PROJECTIONS = {"gate": ("w1", "gate_proj"), "up": ("w3", "up_proj"), "down": ("w2", "down_proj")}
PROJECTION_OF = {name: projection for projection, names in PROJECTIONS.items() for name in names}


def is_turned(axes: ExpertAxes, wanted: ExpertAxes, model_types: Collection[str]) -> bool | None:
    """Whether an expert's pair is transposed to have other axes. None where nothing tells, as without types."""
    if axes is wanted:
        return False
    one, other = (_differs_from_stored(each, model_types) for each in (axes, wanted))
    return None if one is None or other is None else one is not other


def _differs_from_stored(axes: ExpertAxes, model_types: Collection[str]) -> bool | None:
    """Whether the product of a pair with these axes is the transpose of the stored expert."""
    if axes in (ExpertAxes.STORED, ExpertAxes.TRANSPOSED):
        return axes is ExpertAxes.TRANSPOSED
    known = {ExpertAxes.BY_CLASS: TRANSPOSED_CLASSES, ExpertAxes.OUT_IN: STORED_IN_OUT}.get(axes)
    return None if known is None or not model_types else not known.isdisjoint(model_types)


def model_types(config: Mapping[str, Any]) -> set[str]:
    """The model types of a config and of its parts."""
    found, parts = set(), [config]
    while parts:
        part = parts.pop()
        if isinstance(part.get("model_type"), str):
            found.add(part["model_type"])
        parts += [value for value in part.values() if isinstance(value, Mapping)]
    return found
