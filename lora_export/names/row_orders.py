"""The orders in which programs store the rows of a weight. Row k of the new order is row `order[k]` of the old one."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused

Indices = NDArray[np.int64]


def halves_of_heads(rows: int, heads: int) -> Indices:
    """Each head's rows from pairs side by side (Meta's rotary embedding) to two halves (Hugging Face's)."""
    return np.arange(rows).reshape(heads, -1, 2).transpose(0, 2, 1).reshape(-1)


def pairs_of_heads(rows: int, heads: int) -> Indices:
    """The reverse of `halves_of_heads`."""
    return np.arange(rows).reshape(heads, 2, -1).transpose(0, 2, 1).reshape(-1)


def alternating(rows: int) -> Indices:
    """Two blocks of rows, one after another (gate, up), to rows that alternate."""
    return pairs_of_heads(rows, 1)


def two_blocks(rows: int) -> Indices:
    """The reverse of `alternating`."""
    return halves_of_heads(rows, 1)


def swapped_halves(rows: int) -> Indices:
    """The second half of the rows before the first."""
    return np.roll(np.arange(rows), rows // 2)


@dataclass(frozen=True)
class Heads:
    """The sizes of an attention: the heads of q, those of k and v, and the rows of each. 0: not known."""

    queries: int
    keys: int
    size: int = 0

    @property
    def outputs(self) -> tuple[int, int, int]:
        """The number of outputs of q, k and v."""
        return self.queries * self.size, self.keys * self.size, self.keys * self.size


class RowOrder(StrEnum):
    """The orders that rows of data name."""

    HALVES_OF_QUERIES = "halves of query heads"
    HALVES_OF_KEYS = "halves of key heads"
    PAIRS_OF_QUERIES = "pairs of query heads"
    PAIRS_OF_KEYS = "pairs of key heads"
    QUERY_GROUPS = "query groups"  # the queries of a group, its key, its value; from q, k and v one after another
    ALTERNATING = "alternating"

    def indices(self, rows: int, heads: Heads | None) -> Indices:
        """The order of so many rows. Raises InputRefused where they are not those of the heads."""
        if self is RowOrder.ALTERNATING:
            return alternating(rows)
        assert heads is not None
        if self is RowOrder.QUERY_GROUPS:
            if heads.queries % heads.keys:
                raise InputRefused(f"{heads.queries} heads are no multiple of {heads.keys} query groups")
            q, k, v = np.split(np.arange(sum(heads.outputs)), np.cumsum(heads.outputs)[:2])
            return np.concatenate([part.reshape(heads.keys, -1) for part in (q, k, v)], axis=1).reshape(-1)
        count = heads.queries if self in (RowOrder.HALVES_OF_QUERIES, RowOrder.PAIRS_OF_QUERIES) else heads.keys
        if not count:
            raise InputRefused("the base's config does not state its num_attention_heads")
        if rows % (2 * count) or (heads.size and rows != count * heads.size):
            size = f" of {heads.size} rows" if heads.size else ""
            raise InputRefused(f"its {rows} rows are not those of the base's {count} heads{size}")
        is_halves = self in (RowOrder.HALVES_OF_QUERIES, RowOrder.HALVES_OF_KEYS)
        return (halves_of_heads if is_halves else pairs_of_heads)(rows, count)
