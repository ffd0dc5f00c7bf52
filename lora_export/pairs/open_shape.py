"""Pairs of files that do not record the shape of the weight: they become pairs when a plan lays them on one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.lora import LoraPair
from lora_export.options.spelling import named

MatrixShape = tuple[int, ...]  # (out, in)


class OpenPair(LoraPair):
    """A pair whose shape is that of the weight. Only `for_shape` gives one that has A and B.

    `make` is the pair for a weight (out, in), given the shapes of all weights that open pairs of the adapter change.
    `outputs` is the number of outputs, where the file records it. `values` were trained.
    """

    make: Callable[[MatrixShape, Sequence[MatrixShape]], LoraPair]
    values: tuple[NDArray[Any], ...]
    outputs: int | None

    def __init__(
        self,
        make: Callable[[MatrixShape, Sequence[MatrixShape]], LoraPair],
        values: Sequence[NDArray[Any]],
        outputs: int | None = None,
        scale: float = 1.0,
    ):
        vars(self).update(make=make, values=tuple(values), outputs=outputs, scale=scale)
        vars(self).update(magnitude=None, embedding=False, as_stored=False)

    def for_shape(self, shape: MatrixShape, shapes: Sequence[MatrixShape]) -> LoraPair:
        """The pair for a weight (out, in). Raises InputRefused where it fits none of this shape."""
        if len(shape) != 2:
            raise InputRefused(f"the weight is {shape}; a matrix is needed")
        if self.outputs not in (None, shape[0]):
            raise InputRefused(f"the weight is {shape} (out, in), the adapter was trained on {self.outputs} outputs")
        pair = self.make(shape, shapes)
        return pair if self.scale == 1 else pair.times(self.scale)

    def _refused(self) -> InputRefused:
        return InputRefused(
            "an adapter of this kind does not record the shapes of its weights, and has no A and B without its base: "
            f"{named('base', 'BASE')}, where the command takes one"
        )

    @property
    def a(self) -> NDArray[np.float32]:
        raise self._refused()

    @property
    def b(self) -> NDArray[np.float32]:
        raise self._refused()

    @property
    def rank(self) -> int:
        """0, as long as it is open."""
        return 0

    @property
    def is_low_rank(self) -> bool:
        raise self._refused()

    @property
    def norm(self) -> float:
        return float("nan")

    @property
    def shape(self) -> MatrixShape:
        raise self._refused()

    @property
    def parameters(self) -> int:
        return sum(each.size for each in self.values)

    @property
    def is_identity(self) -> bool:
        return self.scale == 0 or not all(each.any() for each in self.values)

    def part(self, rows: object, columns: object) -> LoraPair:  # noqa: ARG002
        raise self._refused()

    def times(self, weight: float) -> LoraPair:
        return OpenPair(self.make, self.values, self.outputs, weight * self.scale)

    def with_kernel(self, kernel: tuple[int, ...]) -> LoraPair:  # noqa: ARG002
        return self


def known_shape(pair: LoraPair) -> tuple[int, ...]:
    """The shape of a pair; () as long as it is open."""
    return () if isinstance(pair, OpenPair) else pair.shape


def laid_on(pair: LoraPair, shape: tuple[int, ...]) -> LoraPair:
    """The pair for a weight of this (out, in, ...) shape, as far as it fits."""
    return with_kernel_like(shape, pair.for_weight(shape))


def with_kernel_like(shape: tuple[int, ...], pair: LoraPair) -> LoraPair:
    """A pair whose file has no kernel, or one that differs by axes of size 1, with the kernel of (out, in, ...)."""
    if pair.embedding or pair.as_stored or known_shape(pair) in (shape, ()):
        return pair
    kernel = shape[2:]
    is_flat = len(pair.shape) == 2 and math.prod(pair.shape[1:]) == math.prod(shape[1:])
    own, its = ([size for size in sizes if size != 1] for sizes in (pair.shape[2:], kernel))
    return pair.with_kernel(kernel) if is_flat or (own == its and pair.shape[:2] == shape[:2]) else pair
