"""What diffusers calls the modules of the models' original code. The rows are data: `diffusion.json`.

Each row has a module of the original model and the modules of diffusers that have its weights; `{}` is a number.
Modules that no row names have one name in both. The tests compare the results with diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from lora_export.names.families import read_rows


class RowLayout(StrEnum):
    """How the rows of an original weight relate to those of the modules of diffusers."""

    EQUAL = "equal"  # one after another, all of one size
    SQUARE_THEN_REST = "square, then the rest"  # all but the last are square matrices
    SWAPPED = "swapped"  # the two halves (shift, scale) in the other order
    SWAPPED_PAIR = "swapped pair"  # as SWAPPED where the weight has just these two; else unchanged


@dataclass(frozen=True)
class TableRow:
    """One module of the original model, and what diffusers calls it."""

    original: str
    parts: tuple[str, ...]
    rows: RowLayout = RowLayout.EQUAL


@dataclass(frozen=True)
class NameTable:
    """The names of one family of models. Rows with a number recognise it."""

    model: str
    diffusers_class: str  # the class of such a model in diffusers; empty where it has none
    rows: tuple[TableRow, ...]


def _rows(model: Mapping[str, Any]) -> Iterator[TableRow]:
    for group in model["modules"]:
        for one, many in group["modules"].items():
            parts = (many,) if isinstance(many, str) else many
            yield TableRow(
                group["original"] + one,
                tuple(group["diffusers"] + part for part in parts),
                RowLayout(group.get("rows", RowLayout.EQUAL)),
            )


TABLES = tuple(
    NameTable(model["model"], model["diffusers_class"], tuple(_rows(model)))
    for model in read_rows("diffusion.json")["models"]
)
