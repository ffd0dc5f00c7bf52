"""ΔW with the same bits on every machine.

A matrix product in floating point depends on the order of its sums, so on the processor and the library. Here the
factors are rounded to integers, relative to the largest value of each row of B and each column of A. They are so small
that every sum of their products is an integer below 2⁵³, which fp64 holds exactly in any order. What follows is
single operations of IEEE 754, which have one result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.plan import Step, Term


@dataclass(frozen=True, eq=False)
class _IntegerTerm:
    """One pair: A as integers (rank, columns) and the exponents of its columns; B is rounded row by row."""

    term: Term
    a: NDArray[np.float64]
    exponents: NDArray[np.int32]  # (columns,)
    bits: int

    @classmethod
    def of(cls, term: Term) -> _IntegerTerm:
        a = term.pair.a.reshape(term.pair.rank, -1)
        bits = (52 - math.ceil(math.log2(term.pair.rank))) // 2
        integers, exponents = _integers(a.T, bits)
        return cls(term, np.ascontiguousarray(integers.T), exponents, bits)

    def rows(self, rows: slice) -> NDArray[np.float64]:
        integers, exponents = _integers(self.term.pair.b[rows].reshape(-1, self.term.pair.rank), self.bits)
        product = integers @ self.a  # integers below 2^52: exact
        scaled: NDArray[np.float64] = np.ldexp(product, exponents[:, None] + self.exponents - 2 * self.bits)
        scaled *= np.float64(np.float32(self.term.scale))
        return scaled


class ExactChange:
    """ΔW of a step, in rows of the weight as it is stored, (rows, columns) in fp64."""

    def __init__(self, step: Step):
        self._shift = step.shift
        self._terms = [_IntegerTerm.of(term) for term in step.stored_terms]

    def rows(self, rows: slice) -> NDArray[np.float64]:
        if self._shift is not None:
            return self._shift[rows].astype(np.float64)[:, None]
        first, *others = self._terms
        total = first.rows(rows)
        for term in others:
            total += term.rows(rows)
        return total


def _integers(rows: NDArray[Any], bits: int) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """Each row as integers up to 2^bits, times 2^(exponent - bits)."""
    wide = rows.astype(np.float64)
    _, exponents = np.frexp(np.abs(wide).max(axis=1))
    return np.rint(np.ldexp(wide, bits - exponents[:, None])), exponents.astype(np.int32)
