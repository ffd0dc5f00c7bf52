"""Where the entries of an adapter's tensor are in the base, and the part of a change that belongs there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.lora import LoraPair
from lora_export.names.row_orders import Indices
from lora_export.names.tensor_parts import AssembledTensor, NotExpressible, Piece
from lora_export.plan.stored_region import StoredRegion, as_slice, cut
from lora_export.plan.types import Layout, LayoutSource, TensorSpec

ONLY = np.zeros(1, np.int64)


@dataclass(frozen=True, eq=False)
class Place:
    """Some entries of an adapter's tensor, and the base tensor, or the part of it, that has these entries."""

    tensor: str  # of the base
    region: StoredRegion | None = None  # None: the whole tensor, and not transposed
    transposed: bool = False
    selected: tuple[Indices | None, ...] = ()  # for each axis of the adapter's tensor; None: all, in order

    @property
    def name(self) -> str:
        """The name of the spec that a step on this place has."""
        return self.tensor if self.region is None else self.region.name

    def view(self, base: TensorSpec) -> TensorSpec:
        """The spec of the part of this base tensor."""
        assert self.region is not None
        shape = self.region.cut_shape
        layout = Layout.OTHER if len(shape) < 2 else Layout.IN_OUT if self.transposed else Layout.OUT_IN
        size = math.prod(shape) * base.nbytes // max(1, math.prod(base.shape))
        return replace(
            base, name=self.name, shape=shape, layout=layout, layout_source=LayoutSource.BASE, nbytes=size,
            region=self.region,
        )  # fmt: skip

    def of_pair(self, pair: LoraPair) -> LoraPair:
        """The part of a pair for these entries. Raises NotExpressible for what needs other entries too."""
        selected: list[Indices | None] = [*self.selected, None, None]
        rows, columns = selected[0], selected[1]
        if any(each is not None for each in selected[2:]):
            raise NotExpressible("rearranges the kernel of a convolution")
        if rows is None and columns is None and self.region is None:
            return pair
        if pair.magnitude is not None and columns is not None and len(columns) != pair.a.shape[1]:
            raise NotExpressible("splits the inputs of a layer, and DoRA's magnitude is over all of them")
        try:
            part = pair.part(rows, columns)
        except InputRefused as error:
            raise NotExpressible(f"splits its entries, and {error}") from error
        return replace(part, as_stored=False) if part.as_stored and self.region is not None else part

    def of_array(self, value: NDArray[Any]) -> NDArray[Any]:
        """The part of a whole tensor, or of a bias's change, for these entries, as the base stores it."""
        for axis, indices in enumerate(self.selected):
            if indices is not None:
                value = np.take(value, indices, axis=axis)
        if self.region is None:
            return value
        value = value.reshape(self.region.cut_shape[::-1] if self.transposed else self.region.cut_shape)
        return np.ascontiguousarray(value.T if self.transposed else value)


def places_in_sources(tensor: AssembledTensor, shape_of: Callable[[str], Sequence[int]]) -> list[Place]:
    """Where the entries of an assembled tensor, which the adapter changes, are in the stored tensors of the base.

    Raises NotExpressible.
    """
    places = []
    for piece in tensor.pieces:
        own = {axis: number for number, axis in enumerate(piece.axes) if axis is not None}
        if len(own) != len(piece.axes):
            raise NotExpressible("stacks tensors, such as experts: a change of the stack is not supported")
        base_shape = shape_of(piece.source)
        base_axes: list[tuple[int | None, Indices, Indices]] = []
        for axis in range(len(base_shape)):
            if axis in piece.fixed:
                base_axes.append((None, np.array([piece.fixed[axis]]), ONLY))
            else:
                base_axes.append((own[axis], piece.indices[own[axis]], piece.positions[own[axis]]))
        places.append(_place(piece.source, base_shape, base_axes, tensor.shape))
    return places


def places_in_result(
    tensor: AssembledTensor, name: str, piece: Piece, shape_of: Callable[[str], Sequence[int]]
) -> Place:
    """Where the entries of a stored tensor, which the adapter changes, are in the assembled tensor of the base.

    Raises NotExpressible.
    """
    base_axes = list(zip(piece.axes, piece.positions, piece.indices, strict=True))
    return _place(name, tensor.shape, base_axes, shape_of(piece.source))


def _place(
    tensor: str,
    base_shape: Sequence[int],
    base_axes: Sequence[tuple[int | None, Indices, Indices]],
    own_shape: Sequence[int],
) -> Place:
    """For each axis of the base tensor: the axis of the adapter's tensor, the indices there, those in the adapter's."""
    selection: list[slice | int] = []
    selected: list[Indices | None] = [None] * len(own_shape)
    order = []
    for axis, in_base, in_own in base_axes:
        if axis is None:
            selection.append(int(in_base[0]))
            continue
        ascending = np.argsort(in_base)
        found = as_slice(in_base[ascending])
        if found is None:
            raise NotExpressible("scatters the entries of a tensor")
        selection.append(found)
        order.append(axis)
        chosen = in_own[ascending]
        if not np.array_equal(chosen, np.arange(own_shape[axis])):
            selected[axis] = chosen
    transposed = order == [1, 0]
    if order != sorted(order) and not transposed:
        raise NotExpressible("reorders the axes of a tensor that has more than two")
    whole = all(
        isinstance(each, slice) and len(range(*each.indices(size))) == size
        for each, size in zip(selection, base_shape, strict=True)
    )
    if whole and not transposed:
        return Place(tensor, None, False, tuple(selected))
    region = cut(tensor, base_shape, selection)
    if region is None:
        raise NotExpressible("puts a tensor where it is no range of rows and columns")
    return Place(tensor, region, transposed, tuple(selected))
