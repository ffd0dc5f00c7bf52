"""Several adapters on one row of a batch, each times a factor: the input `adapter_scales`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.formats.row_adapters import ADAPTER_SCALES
from lora_export.graph.insert.node_factory import Dim, NodeList, fixed_sizes, last_size, sizes_of


class RowScales:
    """The factors of a row's adapters, for each rank of a branch.

    `ids` and `scales` are [batch, per_row]; `nodes` are the graph's first, and get those that all layers share.
    `constant` makes an int64 initializer.
    """

    def __init__(
        self, nodes: NodeList, ids: ir.Value, scales: ir.Value, adapters: int, constant: Callable[..., ir.Value]
    ):
        self.factory, self.ids, self.scales, self.constant = nodes.factory, ids, scales, constant
        self.batch, self.per_row, slots = sizes_of(scales)[0], last_size(scales), adapters + 1
        self.made: dict[tuple[ir.Value, tuple[int, ...]], ir.Value] = {}
        # The factor of each adapter on each row (batch, adapters + 1): the sum over the positions that have its id.
        table = self.factory.constant(f"/{ADAPTER_SCALES}", "owners", np.eye(slots, dtype=np.float32))
        is_own = nodes.add("Gather", [table, ids], [self.batch, self.per_row, slots], axis=0)
        by_position = nodes.add("Unsqueeze", [scales, constant(2)], [self.batch, self.per_row, 1])
        scaled = nodes.add("Mul", [is_own, by_position], [self.batch, self.per_row, slots])
        self.by_adapter = nodes.add("ReduceSum", [scaled, constant(1)], [self.batch, slots], keepdims=0)

    def side_by_side(self, nodes: NodeList, stack: ir.Value, *, to_ranks: bool) -> ir.Value:
        """The matrices of a row's adapters as one, from a stack (adapters + 1, in, out).

        For A (`to_ranks`) their columns are side by side: (batch, in, ranks); for B their rows: (batch, ranks, out).
        """
        into, out = fixed_sizes(stack, 1, 2)
        own = nodes.add("Gather", [stack, self.ids], [self.batch, self.per_row, into, out], axis=0)
        matrix = [self.per_row * into, out]
        if to_ranks:
            own = nodes.add("Transpose", [own], [self.batch, into, self.per_row, out], perm=[0, 2, 1, 3])
            matrix = [into, self.per_row * out]
        return nodes.add("Reshape", [own, self.constant(-1, *matrix)], [self.batch, *matrix])

    def of_positions(self, nodes: NodeList, x: ir.Value) -> ir.Value:
        """x (batch, ..., ranks of a row's adapters side by side), each rank times the factor of its adapter."""
        ranks = last_size(x)
        factors = self._of_ranks(self.scales, np.repeat(np.arange(self.per_row), ranks // self.per_row))
        return self._product(nodes, x, factors, feature_axis=-1)[0]

    def of_all_adapters(
        self, nodes: NodeList, x: ir.Value, owners: NDArray[np.intp], *, feature_axis: int
    ) -> tuple[ir.Value, ir.Value]:
        """x with the ranks of all adapters, each times its adapter's factor, and where the row has this adapter.

        `owners` has the id of each rank.
        """
        return self._product(nodes, x, self._of_ranks(self.by_adapter, owners), feature_axis=feature_axis)

    def _of_ranks(self, scales: ir.Value, columns: Sequence[int] | NDArray[np.intp]) -> ir.Value:
        """These columns of factors: (batch, ranks). Computed once for all layers."""
        key = scales, tuple(map(int, columns))
        if key not in self.made:
            nodes = NodeList(self.factory, f"/{ADAPTER_SCALES}")
            indices = self.factory.constant(f"/{ADAPTER_SCALES}", "ranks", np.array(key[1], np.int64))
            self.made[key] = nodes.add("Gather", [scales, indices], [self.batch, len(key[1])], axis=1)
            nodes.insert_behind(scales)
        return self.made[key]

    def _product(
        self, nodes: NodeList, x: ir.Value, factors: ir.Value, *, feature_axis: int
    ) -> tuple[ir.Value, ir.Value]:
        """x times factors (batch, ranks), and where these are not zero."""
        shape: Iterable[Dim] | None = x.shape
        rank = len(sizes_of(x))
        ones = [axis for axis in range(1, rank) if axis != feature_axis % rank]
        if ones:
            sizes = [
                1 if axis in ones else size
                for axis, size in enumerate([self.batch, *[last_size(factors)] * (rank - 1)])
            ]
            factors = nodes.add("Unsqueeze", [factors, self.constant(*ones)], sizes)
        sizes, dtype = sizes_of(factors), x.dtype
        assert dtype is not None
        zero = self.factory.constant(nodes.path, "zero", np.zeros((), np.float32))
        is_used = nodes.add("Not", [nodes.add("Equal", [factors, zero], sizes, ir.DataType.BOOL)], sizes)
        return nodes.add("Mul", [x, nodes.cast(factors, dtype)], shape, dtype), is_used
