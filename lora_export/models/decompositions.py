"""Operators of an exported program that ONNX lacks, exchanged where they stand.

PyTorch's exporter to ONNX calls `ExportedProgram.run_decompositions`, which traces the whole program a second time: a
quarter to a third of the time of an export. Of most models in eval mode this replaces few operators, and each by one
other. Here these are exchanged in place. Where a program has another operator that would be replaced, one that writes
into its input, or a part with a graph of its own, it is traced again as before.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from lora_export.layers.torch_internals import is_composite, schema_of
from lora_export.models.shared_context import SharedContext

aten: Any = torch.ops.aten


class Exchange(NamedTuple):
    """What takes the place of a node: an operator and its arguments."""

    operator: Any
    positional: tuple[Any, ...]
    named: Mapping[str, Any] = {}
    copies: bool = False  # whether the first argument is copied before


@contextlib.contextmanager
def decomposed_in_place() -> Iterator[None]:
    """While the context is active, this thread's programs are decomposed in place where that gives the same."""
    before = _IS_EXPORTING.set(True)
    try:
        with _PATCHED:
            yield
    finally:
        _IS_EXPORTING.reset(before)


_IS_EXPORTING = ContextVar("_IS_EXPORTING", default=False)


def _patched() -> contextlib.AbstractContextManager[Any]:
    traced_again: Callable[..., ExportedProgram] = ExportedProgram.run_decompositions

    def run_decompositions(program: ExportedProgram, *args: Any, **kwargs: Any) -> ExportedProgram:
        table = args[0] if args else kwargs.get("decomp_table")
        exchanges = _exchanges(program, table) if _IS_EXPORTING.get() and table is not None else None
        if exchanges is None:
            return traced_again(program, *args, **kwargs)
        for node, exchange in exchanges.items():
            _exchange(node, exchange)
        program.graph_module.recompile()
        return program

    return mock.patch.object(ExportedProgram, "run_decompositions", run_decompositions)


_PATCHED = SharedContext(_patched)


def _exchanges(program: ExportedProgram, table: Collection[Any]) -> dict[Node, Exchange] | None:
    """What takes the place of each node that tracing would replace; None where the program must be traced again.

    `table` has the operators to be decomposed.
    """
    written = program.graph_signature
    if written.buffers_to_mutate or written.user_inputs_to_mutate:
        return None
    if any(isinstance(part, GraphModule) for part in program.graph_module.children()):
        return None
    found: dict[Node, Exchange] = {}
    for node in program.graph.nodes:
        if node.target in LIKE_FIRST and "val" in node.args[0].meta:
            node.meta.setdefault("val", node.args[0].meta["val"])
        if "val" not in node.meta and node.op != "output":  # what it returns is unknown
            return None
        if node.op != "call_function" or _stays(node.target, table):
            continue
        exchange = EXCHANGES[node.target](node) if node.target in EXCHANGES else None
        if exchange is None:
            return None
        found[node] = exchange
    return found


def _stays(target: Any, table: Collection[Any]) -> bool:
    """Whether tracing again would leave an operator as it is."""
    schema = schema_of(target)
    if schema is None:
        return target in OF_NUMBERS
    return not (target in table or schema.is_mutable or (is_composite(target) and target not in _kept_whole()))


@functools.cache
def _kept_whole() -> frozenset[Any]:
    """The operators made of others that PyTorch keeps whole unless a table has them."""
    return frozenset(torch.export.default_decompositions())


def _exchange(node: Node, exchange: Exchange) -> None:
    """Put an operator into the place of a node. Its name stays: the program's outputs are known by names."""
    node.target, node.args, node.kwargs = exchange.operator, exchange.positional, dict(exchange.named)
    if exchange.copies:
        with node.graph.inserting_before(node):
            first, *others = node.args
            copy = node.graph.call_function(aten.clone.default, (first,), CONTIGUOUS)
        copy.meta = {**node.meta, "val": first.meta["val"]}  # type: ignore[union-attr]
        node.args = (copy, *others)


# Functions of Python that compute with sizes, or take one of several results.
OF_NUMBERS = frozenset(
    {
        *(operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg),
        *(operator.truediv, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
        *(torch.sym_max, torch.sym_min, torch.sym_int, torch.sym_float, torch.sym_not),
    }
)
# Operators that transformers puts into a program after the trace. They return what their first argument is like.
LIKE_FIRST = frozenset({aten.detach.default, aten.index_put.default})
CONTIGUOUS: dict[str, Any] = {"memory_format": torch.contiguous_format}


def _contiguous(node: Node) -> Exchange:
    return Exchange(aten.clone.default, node.args[:1], CONTIGUOUS)


def _dropout(node: Node) -> Exchange | None:
    return None if _arguments(node)["train"] else Exchange(aten.clone.default, node.args[:1])


def _to(node: Node) -> Exchange | None:
    before, after = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    if before.device != after.device or before.layout != after.layout:
        return None
    if before.dtype == after.dtype:
        return Exchange(aten.clone.default, node.args[:1])
    return Exchange(aten._to_copy.default, node.args[:1], {"dtype": after.dtype})


def _reshape(node: Node) -> Exchange:
    """A view of the same shape. A size that is left open, by -1, is stated where it is a number."""
    stated: Any = node.args[1]
    sizes = zip(stated, node.meta["val"].shape, strict=True)
    return _view(node, [size if each == -1 and isinstance(size, int) else each for each, size in sizes])


def _resized(node: Node) -> Exchange | None:
    """A view of the shape of the result, where one size at most is open."""
    sizes = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
    is_certain = -1 not in sizes or (sizes.count(-1) == 1 and 0 not in sizes)
    return _view(node, sizes) if is_certain else None


def _view(node: Node, shape: Sequence[Any]) -> Exchange:
    """A view of a contiguous copy. The exporter's Reshape of a view keeps sizes of 0, that of `reshape` does not."""
    return Exchange(aten.view.default, (node.args[0], list(shape)), copies=True)


def _expanded(node: Node) -> Exchange | None:
    """An expansion to known sizes. One that is open must be that of the argument, which keeps it (-1)."""
    before, after = list(node.args[0].meta["val"].shape), list(node.meta["val"].shape)  # type: ignore[union-attr]
    before = [1] * (len(after) - len(before)) + before
    sizes = [size if isinstance(size, int) else -1 for size in after]
    is_known = all(size != -1 or str(old) == str(new) for size, old, new in zip(sizes, before, after, strict=True))
    return Exchange(aten.expand.default, (node.args[0], sizes)) if is_known else None


def _transposed(node: Node) -> Exchange:
    axes = len(node.meta["val"].shape)
    return Exchange(aten.permute.default, (node.args[0], list(reversed(range(axes)))))


def _reversed_sub(node: Node) -> Exchange | None:
    x, other = node.args[:2]
    return Exchange(aten.sub.Tensor, (other, x)) if _arguments(node)["alpha"] == 1 else None


def _chunk(node: Node) -> Exchange | None:
    axis = _arguments(node)["dim"]
    size = node.meta["val"][0].shape[axis]
    return Exchange(aten.split.Tensor, (node.args[0], size, axis)) if isinstance(size, int) and size else None


def _apart(other: Any) -> Callable[[Node], Exchange | None]:
    """The operator that returns a tensor of its own, where nothing else reads what the node would write into."""

    def exchange(node: Node) -> Exchange | None:
        x, *others = node.all_input_nodes
        earlier = set(itertools.takewhile(lambda each: each is not node, node.graph.nodes))
        is_alone = _is_new(x) and all(user is node or (user in earlier and _is_new(user)) for user in x.users)
        kept = all(_result_type(x, each) == x.meta["val"].dtype for each in others)
        return Exchange(other, node.args, node.kwargs) if is_alone and kept else None

    return exchange


def _result_type(x: Node, y: Node) -> torch.dtype | None:
    values = x.meta["val"], y.meta["val"]
    return torch.result_type(*values) if all(isinstance(each, torch.Tensor) for each in values) else None


def _is_new(node: Node) -> bool:
    """Whether an operator returns a tensor with memory of its own, and writes into none."""
    schema = schema_of(node.target)
    if EXCHANGES.get(node.target) is _to:
        return bool(node.args[0].meta["val"].dtype != node.meta["val"].dtype)  # type: ignore[union-attr]
    if schema is None or is_composite(node.target):
        return False
    return all(each.alias_info is None for each in (*schema.arguments, *schema.returns))


def _arguments(node: Node) -> dict[str, Any]:
    """The arguments of an operator by name, with the defaults of those that are not given."""
    known = schema_of(node.target).arguments
    given = zip((each.name for each in known), node.args, strict=False)
    return {**{each.name: each.default_value for each in known}, **dict(given), **node.kwargs}


def _as(other: Any) -> Callable[[Node], Exchange]:
    return lambda node: Exchange(other, node.args, node.kwargs)


EXCHANGES: Mapping[Any, Callable[[Node], Exchange | None]] = {
    aten.contiguous.default: _contiguous,
    aten.dropout.default: _dropout,
    aten.to.device: _to,
    aten.to.dtype: _to,
    aten.to.dtype_layout: _to,
    aten.to.other: _to,
    aten.reshape.default: _reshape,
    aten.flatten.using_ints: _resized,
    aten.unflatten.int: _resized,
    aten.expand_as.default: _expanded,
    aten.numpy_T.default: _transposed,
    aten.chunk.default: _chunk,
    aten.add_.Tensor: _apart(aten.add.Tensor),
    aten.clamp_.default: _apart(aten.clamp.default),
    aten.scatter_add_.default: _apart(aten.scatter_add.default),
    aten.rsub.Scalar: _reversed_sub,
    aten.min.other: _as(aten.minimum.default),
    aten.max.other: _as(aten.maximum.default),
    aten.__and__.Tensor: _as(aten.bitwise_and.Tensor),
    aten.__or__.Tensor: _as(aten.bitwise_or.Tensor),
}
