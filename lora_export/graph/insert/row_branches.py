"""The nodes of branches whose adapter is selected per batch row. See `adapter_rows` for the method.

A row may have several adapters, each times a factor of the input `adapter_scales`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.formats.contract import ADAPTER_IDS, ADAPTER_SCALES
from lora_export.graph.insert.batch_axis import UNKNOWN, BatchAxis
from lora_export.graph.insert.branches import BranchNodes, Rescaling
from lora_export.graph.insert.node_factory import (
    Dim,
    Factor,
    NodeFactory,
    NodeList,
    fixed_sizes,
    last_size,
    layer_input,
    sizes_of,
)
from lora_export.graph.insert.token_rows import SortedTokens, of_tokens
from lora_export.graph.operators import product_factor
from lora_export.graph.site import Site
from lora_export.graph.values import new_initializer, unused_name


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


# The products of all adapters are cheaper than copies for each row where
# adapters * (tokens + READ_COST) <= COPY_COST * rows. Reading an adapter costs as much as multiplying READ_COST tokens
# by it, and copying it as much as multiplying COPY_COST tokens.
READ_COST, COPY_COST = 16, 32


def transposed(nodes: NodeList, x: ir.Value, order: Sequence[int]) -> ir.Value:
    """x with its dimensions in this order. Adds no node where they are."""
    if list(order) == sorted(order):
        return x
    return nodes.add("Transpose", [x], [sizes_of(x)[axis] for axis in order], perm=order)


class RowBranches:
    """Makes the input `adapter_ids`, and the nodes of branches that follow it.

    `first_input` is an input of the graph whose first dimension is the batch. With `per_row` above 1, each row has so
    many adapters: `adapter_ids` is [batch, per_row], and so is the input `adapter_scales`, their factors. Where the
    stacks are inputs (`by_copies`), no matrices of all adapters are made: that would copy all of them in every run.
    """

    def __init__(
        self, factory: NodeFactory, first_input: ir.Value, adapters: int, per_row: int = 1, *, by_copies: bool = False
    ):
        assert first_input.shape is not None
        self.factory, self.batch = factory, first_input.shape[0]
        self.adapters, self.per_row = adapters, per_row
        self.by_copies = by_copies or adapters >= COPY_COST * per_row
        self.constants: dict[tuple[int, ...], ir.Value] = {}
        self.rank_masks: dict[int, ir.Value] = {}  # by rank
        self.scales: RowScales | None = None  # None: each row has one adapter
        self.conditions: dict[ir.Value, ir.Value] = {}  # by layer input
        self.of_sorted: dict[SortedTokens, RowBranches] = {}
        self.ids_of_tokens: dict[SortedTokens, ir.Value] = {}
        self.scales_of_tokens: dict[SortedTokens, ir.Value] = {}
        graph = factory.model.graph
        sizes = [self.batch] if per_row == 1 else [self.batch, per_row]
        ids = ir.Value(name=ADAPTER_IDS, shape=ir.Shape(sizes), type=ir.TensorType(ir.DataType.INT64))
        graph.inputs.append(ids)
        nodes = NodeList(factory, f"/{ADAPTER_IDS}")
        shape = self.row_count = nodes.add("Shape", [first_input], [1], ir.DataType.INT64, start=0, end=1)
        # Gather counts negative ids from the end, and rejects ids that are too large.
        is_negative = nodes.add("Less", [ids, self.constant(0)], sizes, ir.DataType.BOOL)
        choices = [is_negative, self.constant(adapters + 1), ids]
        valid_ids = nodes.add("Where", choices, sizes, ir.DataType.INT64)
        if per_row > 1:
            shape = nodes.add("Concat", [self.row_count, self.constant(per_row)], [2], axis=0)
        # A single id would be broadcast over the batch. Only as many ids as rows can be reshaped.
        self.ids = nodes.add("Reshape", [valid_ids, shape], sizes)
        if per_row > 1:
            factors = ir.Value(name=ADAPTER_SCALES, shape=ir.Shape(sizes), type=ir.TensorType(ir.DataType.FLOAT))
            graph.inputs.append(factors)
            given = nodes.add("Reshape", [factors, shape], sizes)
            # That of no adapter has no effect, whatever it is: 0 times NaN or infinity is NaN.
            is_empty = nodes.add("Equal", [self.ids, self.constant(0)], sizes, ir.DataType.BOOL)
            zero = factory.constant(f"/{ADAPTER_SCALES}", "none", np.zeros((), np.float32))
            scales = nodes.add("Where", [is_empty, zero, given], sizes, ir.DataType.FLOAT)
            self.scales = RowScales(nodes, self.ids, scales, adapters, self.constant)
        graph.insert_before(graph[0], nodes.nodes)

    def of_layer(self, batch: BatchAxis) -> RowBranches:
        """The branches for a layer's input: these, or those whose rows are its tokens, each with its row's adapter."""
        tokens = batch.tokens
        if tokens is None:
            return self
        if tokens not in self.of_sorted:
            made = self.of_sorted[tokens] = copy.copy(self)
            nodes = NodeList(self.factory, f"/{ADAPTER_IDS}")
            made.ids = of_tokens(nodes, tokens, self.ids, self.ids_of_tokens)
            made.batch = sizes_of(made.ids)[0]
            made.rank_masks, made.conditions = {}, {}
            made.row_count = nodes.add("Shape", [made.ids], [1], start=0, end=1)
            nodes.insert_behind(made.ids)
            if self.scales is not None:
                nodes = NodeList(self.factory, f"/{ADAPTER_SCALES}")
                scales = of_tokens(nodes, tokens, self.scales.scales, self.scales_of_tokens)
                made.scales = RowScales(nodes, made.ids, scales, self.adapters, self.constant)
                nodes.insert_behind(made.ids)  # which are behind the scales
        return self.of_sorted[tokens]

    def branch(self, site: Site, batch: BatchAxis, a: Factor, b: Factor, outputs: range) -> BranchNodes:
        """x·A·B with A and B by row, in the shape of these outputs of the site's node."""
        nodes = NodeList(self.factory, a.path)
        product = site.node.outputs[0]
        shape = product.shape and [*product.shape[:-1], len(outputs)]
        a, b = nodes.cast_to_site(site, a), nodes.padded_to(site, b, outputs, 0.0)
        x = self._looked_up(nodes, site, batch, a) if site.is_lookup else layer_input(site)
        x = self.separate_batch(nodes, x, batch, last_size(x))
        x, back = self.batch_first(nodes, x, batch)
        if site.is_lookup:
            x = self._scaled(nodes, x)
        if site.is_lookup or self.by_copies or site.dtype != "float32":
            if not site.is_lookup:
                x = self._scaled(nodes, self.product_by_row(nodes, x, a.value, to_ranks=True))
            nodes.path = b.path
            x = self.product_by_row(nodes, x, b.value)
        else:
            x = self._cheaper_product(nodes, x, a, b)
        if product_factor(site.node) != 1:
            alpha = nodes.constant("alpha", np.array(product_factor(site.node), np.dtype(site.dtype)))
            x = nodes.add("Mul", [x, alpha], x.shape)
        x = self.as_layer(nodes, transposed(nodes, x, back), batch, shape)
        return BranchNodes(nodes.nodes, x, b.path)

    def convolution_branch(
        self, site: Site, a: Factor, b: Factor, rank_mask: NDArray[np.bool_], _: range
    ) -> BranchNodes:
        """A convolution by the A of all adapters, of which each row keeps its own ranks, and one by all their B."""
        nodes = NodeList(self.factory, a.path)
        a, b = nodes.cast_to_site(site, a), nodes.cast_to_site(site, b)
        product, ranks = site.node.outputs[0], rank_mask.shape[1]
        shape = product.shape and [product.shape[0], ranks, *product.shape[2:]]
        inner = nodes.add("Conv", [layer_input(site), a.value], shape, None, site.node.attributes)
        if self.scales is None:
            mask = self.factory.constant(a.path, "rows", rank_mask)
            own = self.of_rows(nodes, mask, len(site.shape), batch_axis=0, feature_axis=1)
        else:
            inner, own = self.scales.of_all_adapters(nodes, inner, rank_mask.argmax(axis=0), feature_axis=1)
        # Selected, not multiplied: NaN and infinity of another adapter must not reach this row.
        zero = self.factory.constant(a.path, "nothing", np.zeros((), np.dtype(site.dtype)))
        inner = nodes.add("Where", [own, inner, zero], shape, inner.dtype)
        nodes.path = b.path
        return BranchNodes(nodes.nodes, nodes.add("Conv", [inner, b.value], product.shape), b.path)

    def rescaling(self, site: Site, batch: BatchAxis, factors: Factor) -> Rescaling:
        """The multiplication of each row by the factors of its own adapter."""

        def rescaling_nodes(total: ir.Value) -> list[ir.Node]:
            nodes = NodeList(self.factory, factors.path)
            stack = nodes.padded_to(site, factors, range(site.node_outputs), 1.0).value
            self._times_own(nodes, site, batch, stack, total)
            return nodes.nodes

        return Rescaling(rescaling_nodes, factors.path)

    def scaled_input(self, site: Site, batch: BatchAxis, factors: Factor) -> tuple[NodeList, ir.Value]:
        """The layer's input, each row times the factors (adapters + 1, in) of its own adapter."""
        nodes = NodeList(self.factory, factors.path)
        stack = nodes.cast_to_site(site, factors).value
        return nodes, self._times_own(nodes, site, batch, stack, layer_input(site))

    def _times_own(self, nodes: NodeList, site: Site, batch: BatchAxis, stack: ir.Value, x: ir.Value) -> ir.Value:
        """x times each row's own entry of a stack (adapters + 1, features)."""
        if site.is_convolution:
            own = self.of_rows(nodes, stack, batch.rank, batch_axis=0, feature_axis=1)
        else:
            own = self.of_rows(nodes, stack, 4 if batch.is_flat else batch.rank, batch_axis=batch.axis)
        if not batch.is_flat:
            return nodes.add("Mul", [x, own], x.shape)
        separated = self.separate_batch(nodes, x, batch, last_size(stack))
        return self.as_layer(nodes, nodes.add("Mul", [separated, own], sizes_of(separated)), batch, x.shape)

    def _looked_up(self, nodes: NodeList, site: Site, batch: BatchAxis, table: Factor) -> ir.Value:
        """The rows of A that are looked up, each batch row in its own adapter's part of the table."""
        tokens, count = layer_input(site), site.stored_shape[0]
        sizes = sizes_of(tokens)
        tokens = nodes.cast(tokens, ir.DataType.INT64)
        # Negative tokens count from the end of the adapter's own part.
        is_negative = nodes.add("Less", [tokens, self.constant(0)], sizes, ir.DataType.BOOL)
        from_end = nodes.add("Add", [tokens, self.constant(count)], sizes)
        tokens = nodes.add("Where", [is_negative, from_end, tokens], sizes, ir.DataType.INT64)
        looked_up, rank = [], last_size(table.value)
        for position in range(self.per_row):
            ids = self.ids
            if self.per_row > 1:
                ids = nodes.add("Gather", [ids, self.constant(position)], [self.batch, 1], axis=1)
                ids = nodes.add("Squeeze", [ids, self.constant(1)], [self.batch])
            first = nodes.add("Mul", [ids, self.constant(count)], [self.batch])
            other_axes = [axis for axis in range(len(sizes)) if axis != batch.axis]
            if other_axes:
                shape = [self.batch if axis == batch.axis else 1 for axis in range(len(sizes))]
                first = nodes.add("Unsqueeze", [first, self.constant(*other_axes)], shape)
            rows = nodes.add("Add", [tokens, first], sizes)
            looked_up.append(nodes.add("Gather", [table.value, rows], [*sizes, rank], table.value.dtype))
        if self.per_row == 1:
            return looked_up[0]
        return nodes.add("Concat", looked_up, [*sizes, rank * self.per_row], axis=-1)

    def of_rows(
        self, nodes: NodeList, stack: ir.Value, rank: int, *, batch_axis: int, feature_axis: int = -1
    ) -> ir.Value:
        """Each batch row's own entry of a stack (adapters + 1, n), in `rank` dimensions."""
        width = sizes_of(stack)[1]
        own = nodes.add("Gather", [stack, self.ids], [self.batch, width], axis=0)
        sizes = {batch_axis: self.batch, feature_axis % rank: width}
        ones = [axis for axis in range(rank) if axis not in sizes]
        if not ones:
            return own
        shape = [sizes.get(axis, 1) for axis in range(rank)]
        return nodes.add("Unsqueeze", [own, self.constant(*ones)], shape)

    def separate_batch(self, nodes: NodeList, x: ir.Value, batch: BatchAxis, features: int) -> ir.Value:
        """x with a dimension for the batch, and at least one between it and the features."""
        if batch.is_flat:
            last = self.constant(batch.inner, features)
            shape = nodes.add("Concat", [self.constant(batch.outer), self.row_count, last], [4], axis=0)
            outer, inner = (ir.SymbolicDim(None) if size == UNKNOWN else size for size in (batch.outer, batch.inner))
            return nodes.add("Reshape", [x, shape], [outer, self.batch, inner, features])
        if batch.rank == 2:
            return nodes.add("Unsqueeze", [x, self.constant(1)], [self.batch, 1, features])
        return x

    def batch_first(self, nodes: NodeList, x: ir.Value, batch: BatchAxis) -> tuple[ir.Value, list[int]]:
        """x with the batch as its first dimension, and the permutation that undoes it."""
        order = [batch.axis, *(axis for axis in range(len(sizes_of(x))) if axis != batch.axis)]
        return transposed(nodes, x, order), [order.index(axis) for axis in range(len(order))]

    def as_layer(self, nodes: NodeList, x: ir.Value, batch: BatchAxis, shape: Iterable[Dim] | None) -> ir.Value:
        """x without the dimension that `separate_batch` added, in the shape of the layer's output."""
        if batch.is_flat:
            return nodes.add("Reshape", [x, self.constant(-1, last_size(x))], shape)
        return nodes.add("Squeeze", [x, self.constant(1)], shape) if batch.rank == 2 else x

    def _scaled(self, nodes: NodeList, x: ir.Value) -> ir.Value:
        """x (batch, ..., ranks), each rank times the factor of its adapter, where a row has several."""
        return x if self.scales is None else self.scales.of_positions(nodes, x)

    def product_by_row(self, nodes: NodeList, x: ir.Value, stack: ir.Value, *, to_ranks: bool = False) -> ir.Value:
        """x (batch, ..., in) by each row's own matrix of the stack (adapters + 1, in, out).

        The ranks of several adapters are side by side: the columns of their A (`to_ranks`), the rows of their B.
        """
        between, matrix = sizes_of(x)[1:-1], sizes_of(stack)[1:]
        if self.scales is None:
            own = nodes.add("Gather", [stack, self.ids], [self.batch, *matrix], axis=0)
        else:
            own = self.scales.side_by_side(nodes, stack, to_ranks=to_ranks)
            matrix = sizes_of(own)[1:]
        if len(between) > 1:
            ones = range(1, len(between))
            own = nodes.add("Unsqueeze", [own, self.constant(*ones)], [self.batch, *(1 for _ in ones), *matrix])
        return nodes.add("MatMul", [x, own], [self.batch, *between, matrix[-1]])

    # --- the products of all adapters, where they are cheaper ---

    def _cheaper_product(self, nodes: NodeList, x: ir.Value, a: Factor, b: Factor) -> ir.Value:
        """x (batch, ..., in) by each row's own A and B: by copies of them, or by those of all adapters."""
        nodes.path = b.path
        condition = self._is_all_cheaper(nodes, x)
        copies, all_adapters = NodeList(self.factory, a.path), NodeList(self.factory, a.path)
        by_copies = self._scaled(copies, self.product_by_row(copies, x, a.value, to_ranks=True))
        by_all = self._product_by_all(nodes, all_adapters, x, a, b)
        copies.path = b.path
        by_copies = self.product_by_row(copies, by_copies, b.value)
        alternatives = {"then_branch": (all_adapters, by_all), "else_branch": (copies, by_copies)}
        graphs = {
            name: ir.AttrGraph(name, ir.Graph([], [output], nodes=made.nodes, name=f"{b.path}/{name}"))
            for name, (made, output) in alternatives.items()
        }
        return nodes.add("If", [condition], sizes_of(by_copies), a.value.dtype, graphs)

    def _is_all_cheaper(self, nodes: NodeList, x: ir.Value) -> ir.Value:
        """Whether the products of all adapters are cheaper for this x. Computed once for all layers that read it."""
        if x in self.conditions:
            return self.conditions[x]
        made, features, producer = NodeList(self.factory, f"/{ADAPTER_IDS}"), last_size(x), x.producer()
        rows = made.add("Mul", [self.row_count, self.constant(COPY_COST * features * self.per_row)], [1])
        limit = made.add("Sub", [rows, self.constant(READ_COST * self.adapters * features)], [1])
        size = made.add("Size", [x], [], ir.DataType.INT64)
        cost = made.add("Mul", [size, self.constant(self.adapters)], [1])
        is_cheaper = made.add("LessOrEqual", [cost, limit], [1], ir.DataType.BOOL)
        is_cheaper = made.add("Squeeze", [is_cheaper, self.constant(0)], [])
        if producer is not None and producer.graph is not None:  # before the first of these layers
            made.insert_behind(x)
            self.conditions[x] = is_cheaper
        else:
            nodes.nodes += made.nodes
        return is_cheaper

    def _product_by_all(self, nodes: NodeList, inner_nodes: NodeList, x: ir.Value, a: Factor, b: Factor) -> ir.Value:
        """x by all A side by side, of which each row keeps its own ranks, by all B one below the other.

        The matrices are made of the stacks. A runtime that folds constants does so when it loads the graph.
        """
        slots, features, rank = fixed_sizes(a.value, 0, 1, 2)
        all_ranks, out = slots * rank, last_size(b.value)
        transposed = nodes.add("Transpose", [a.value], [features, slots, rank], perm=[1, 0, 2])
        all_a = nodes.add("Reshape", [transposed, self.constant(features, all_ranks)], [features, all_ranks])
        all_b = nodes.add("Reshape", [b.value, self.constant(all_ranks, out)], [all_ranks, out])
        own = self._own_ranks(rank) if self.scales is None else None
        between = sizes_of(x)[1:-1]
        if own is not None and len(between) > 1:
            ones = range(1, len(between))
            shape = [self.batch, *(1 for _ in between), all_ranks]
            own = inner_nodes.add("Unsqueeze", [own, self.constant(*ones)], shape)
        dtype = a.value.dtype
        assert dtype is not None
        product = inner_nodes.add("MatMul", [x, all_a], [self.batch, *between, all_ranks], dtype)
        if self.scales is not None:
            owners = np.repeat(np.arange(slots), rank)
            product, own = self.scales.of_all_adapters(inner_nodes, product, owners, feature_axis=-1)
        assert own is not None
        # Selected, not multiplied: NaN and infinity of another adapter must not reach this row.
        zero = self.factory.constant(a.path, "nothing", np.zeros((), dtype.numpy()))
        selected = inner_nodes.add("Where", [own, product, zero], [self.batch, *between, all_ranks], dtype)
        inner_nodes.path = b.path
        return inner_nodes.add("MatMul", [selected, all_b], [self.batch, *between, out])

    def _own_ranks(self, rank: int) -> ir.Value:
        """Which of the ranks of all adapters belong to each row: (batch, 1, ranks)."""
        if rank not in self.rank_masks:
            slots = self.adapters + 1
            mask = np.repeat(np.eye(slots, dtype=bool), rank, axis=1)
            nodes = NodeList(self.factory, f"/{ADAPTER_IDS}")
            table = self.factory.constant(f"/{ADAPTER_IDS}", f"owners.{rank}", mask)
            own = nodes.add("Gather", [table, self.ids], [self.batch, slots * rank], axis=0)
            self.rank_masks[rank] = nodes.add("Unsqueeze", [own, self.constant(1)], [self.batch, 1, slots * rank])
            nodes.insert_behind(self.ids)
        return self.rank_masks[rank]

    def constant(self, *numbers: int) -> ir.Value:
        """An int64 initializer, one for all nodes that need it."""
        if numbers not in self.constants:
            name = unused_name(f"{ADAPTER_IDS}.{'_'.join(map(str, numbers))}", self.factory.value_names)
            tensor = ir.Tensor(np.array(numbers, np.int64))
            self.constants[numbers] = new_initializer(self.factory.model, name, tensor)
        return self.constants[numbers]
