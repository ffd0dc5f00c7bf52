"""Operators of an exported program that ONNX lacks, exchanged where they stand.

PyTorch's exporter to ONNX calls `ExportedProgram.run_decompositions`, which traces the whole program a second time: a
quarter to a third of the time of an export. Of most models in eval mode this replaces few operators, and each by one
other. Here these are exchanged in place. Where a program has another operator that would be replaced, one that writes
into its input, or a part with a graph of its own, it is traced again as before.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from lora_export.layers.torch_internals import is_composite, schema_of
from lora_export.models.partial_writes import return_whole
from lora_export.models.shared_context import SharedContext

aten: Any = torch.ops.aten


class Exchange(NamedTuple):
    """What takes the place of a node: an operator and its arguments, some of which may be such operators themselves."""

    operator: Any
    positional: tuple[Any, ...]
    named: Mapping[str, Any] = {}
    value: Any = None  # what an argument is; PyTorch computes it where it is not stated


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
        if not _IS_EXPORTING.get() or table is None:
            return traced_again(program, *args, **kwargs)
        _state_sizes_of_parts(program.graph)
        _repeat_what_is_written(program.graph)
        return_whole(program.graph, _is_new)
        _divide_grids(program.graph)
        _sort_stably(program.graph)
        _floor_quotients(program.graph)
        _index_in_place_of_calls(program.graph)
        exchanges = None if _state_sizes_of_equal_parts(program.graph) else _exchanges(program, table)
        if exchanges is None and any(node.target in WITHOUT_TRANSLATION for node in program.graph.nodes):
            return traced_again(program, decomp_table={**table, **WITHOUT_TRANSLATION})
        if exchanges is None:
            return traced_again(program, *args, **kwargs)
        for node, exchange in exchanges.items():
            _exchange(node, exchange)
        _remove_checks(program.graph)
        program.graph_module.recompile()
        return program

    return mock.patch.object(ExportedProgram, "run_decompositions", run_decompositions)


_PATCHED = SharedContext(_patched)

# The inverse of erf is x P(l) / Q(l) with l = log(1 - x²): from the constants up. The ratio of the two polynomials was
# fitted to fp64 values for x² up to 1 - 1e-7, which leaves 1.4e-8 of it. Each sums terms of one sign.
NUMERATOR = (
    *(0.8862269377477959, -0.30669397287090633, 0.05962856988323883),
    *(-0.007770852369821136, 0.00064422673735249, -2.4236076918460038e-05),
)
DENOMINATOR = (
    *(1.0, -0.08426809070886411, 0.03218854617750353),
    *(-0.001881051070601927, 0.000179239032419776, -1.2850860751519316e-06),
)
HALLEY_STEPS = 2  # of float64 alone; each makes three times as many digits


def _inverse_erf(x: torch.Tensor) -> torch.Tensor:
    """The inverse of erf, as Gemma 3n takes it of its sparsity.

    In float32 to 5 units in the last place. In float64 to what the rounding of erf leaves: 1e-9, relative, at 1 - 1e-9,
    and 1e-4 in the last 1e-14 before 1. PyTorch decomposes `erfinv` into an operator that ONNX lacks.
    """
    x = x if x.is_floating_point() else x.to(torch.float32)
    wide = x if x.dtype == torch.float64 else x.to(torch.float32)
    logarithm = torch.log((1 - wide) * (1 + wide))  # 1 - x has no rounding error where it is small
    found = wide * (_polynomial(NUMERATOR, logarithm) / _polynomial(DENOMINATOR, logarithm))
    # Not in float32: behind 0.999, the rounding of erf is larger than the step.
    for _ in range(HALLEY_STEPS if x.dtype == torch.float64 else 0):
        step = (torch.erf(found) - wide) * torch.exp(found * found) * (math.sqrt(math.pi) / 2)
        found = found - step / (1 + found * step)
    return torch.where(wide.abs() == 1, wide * math.inf, found).to(x.dtype)


def _polynomial(coefficients: Sequence[float], x: torch.Tensor) -> torch.Tensor:
    """The polynomial with these coefficients, that of the constant first, by Horner's scheme."""
    *others, last = coefficients
    total = x * last + others.pop()
    while others:
        total = total * x + others.pop()
    return total


WITHOUT_TRANSLATION = dict.fromkeys((aten.erfinv.default, aten.special_erfinv.default), _inverse_erf)


def _state_sizes_of_parts(graph: Graph) -> None:
    """State the size of each part of an axis that is split into parts of an open size.

    The optimiser of onnxscript 0.7.2 fails on a single size that is no constant (`split_to_sequence`).
    """
    for node in graph.nodes:
        if node.target not in (aten.chunk.default, aten.split.Tensor) or "val" not in node.meta:
            continue
        x, number, axis = _arguments(node).values()
        parts = node.meta["val"]
        if not isinstance(parts[0].shape[axis], torch.SymInt):
            continue
        if node.target is aten.chunk.default and len(parts) < number:  # other sizes have more parts
            continue
        whole, size = Exchange(aten.sym_size.int, (x, axis)), number
        if node.target is aten.chunk.default:
            size = Exchange(operator.floordiv, (Exchange(operator.add, (whole, number - 1)), number))
        last = Exchange(operator.sub, (whole, Exchange(operator.mul, (size, len(parts) - 1))))
        _exchange(node, Exchange(aten.split_with_sizes.default, (x, [*[size] * (len(parts) - 1), last], axis)))


def _state_sizes_of_equal_parts(graph: Graph) -> bool:
    """State the size of each part of an open axis that `tensor_split` makes of it: the first ones may have one more.

    Returns whether there are such, whose results are to be traced again. Calls by name are exchanged before
    (`traceable_code`), so that sizes that a model computes with are open, too; these were made in another way.
    """
    found = False
    for node in graph.find_nodes(op="call_function", target=aten.tensor_split.sections):
        x, number, axis = _arguments(node).values()
        if isinstance(number, int) and "val" in x.meta and isinstance(x.meta["val"].shape[axis], torch.SymInt):
            whole = Exchange(aten.sym_size.int, (x, axis))
            raised = [Exchange(operator.add, (whole, number - 1 - part)) for part in range(number)]
            sizes = [Exchange(operator.floordiv, (each, number)) for each in raised]
            _exchange(node, Exchange(aten.split_with_sizes.default, (x, sizes, axis)))
            found = True
    return found


def _divide_grids(graph: Graph) -> None:
    """Make of each grid of `meshgrid` an operator of its own: a view of its axis, expanded to the sizes of all."""
    overloads = (aten.meshgrid.indexing, aten.meshgrid.default)
    for node in (each for kind in overloads for each in graph.find_nodes(op="call_function", target=kind)):
        arguments = _arguments(node)
        axes, order = arguments["tensors"], [*range(len(arguments["tensors"]))]
        if len(order) < 2 or any("val" not in each.meta or each.meta["val"].ndim != 1 for each in axes):
            continue
        if arguments.get("indexing") == "xy":
            order[:2] = 1, 0
        sizes = [_size_of(axes[each], 0) for each in order]
        for user in list(node.users):
            place, grid = order.index(user.args[1]), axes[user.args[1]]
            for axis in range(len(order)):
                grid = grid if axis == place else Exchange(aten.unsqueeze.default, (grid, axis))
            _exchange(user, Exchange(aten.expand.default, (grid, sizes)))
        graph.erase_node(node)


def _repeat_what_is_written(graph: Graph) -> None:
    """Expand what is written into a larger part: onnxscript 0.7.2 leaves it as it is."""
    for node in graph.find_nodes(op="call_function", target=aten.copy_.default):
        part, source = node.args[:2]
        shapes = [each.meta["val"].shape for each in (part, source) if "val" in each.meta]
        if len(shapes) == 2 and str(shapes[0]) != str(shapes[1]):
            sizes = [_size_of(part, axis) for axis in range(len(shapes[0]))]
            _exchange(node, Exchange(aten.copy_.default, (part, Exchange(aten.expand.default, (source, sizes)))))


def _sort_stably(graph: Graph) -> None:
    """Sort bools as whole numbers, for ONNX sorts no bools. The order of equal values is stable there in any case."""
    for node in [each for kind in SORTS for each in graph.find_nodes(op="call_function", target=kind)]:
        arguments = _arguments(node)
        x: Any = arguments["self"]
        if "val" not in x.meta:
            continue
        if x.meta["val"].dtype == torch.bool:
            numbers = x.meta["val"].to(torch.int32)
            x = Exchange(aten._to_copy.default, (x,), {"dtype": torch.int32}, numbers)
            for user in list(node.users):
                if user.target is operator.getitem and user.args[1] == 0:
                    value = Exchange(operator.getitem, (node, 0), value=numbers)
                    _exchange(user, Exchange(aten._to_copy.default, (value,), {"dtype": torch.bool}))
        _exchange(node, Exchange(SORTS[node.target], (x, arguments["dim"], arguments["descending"])))


def _floor_quotients(graph: Graph) -> None:
    """Divide sizes that may be negative as Python does: ONNX rounds their quotients towards zero."""
    for node in graph.find_nodes(op="call_function", target=operator.floordiv):
        number, divisor = node.args
        if any(map(_may_be_negative, (number, divisor))):
            rest = Exchange(operator.mod, (number, divisor))
            _exchange(node, Exchange(operator.floordiv, (Exchange(operator.sub, (number, rest)), divisor)))


def _may_be_negative(size: Any) -> bool:
    value = size.meta.get("val") if isinstance(size, Node) else size
    if isinstance(value, torch.SymInt):
        return bool(value.node.shape_env.bound_sympy(value.node.expr).lower < 0)
    return not isinstance(value, int) or value < 0


def _size_of(x: Node, axis: int) -> Any:
    size = x.meta["val"].shape[axis]
    return size if isinstance(size, int) else Exchange(aten.sym_size.int, (x, axis), value=size)


def _index_in_place_of_calls(graph: Graph) -> None:
    """Index a tensor by tensors where a program calls the function of Python for that: masks of transformers do."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.higher_order.flat_apply):
        function, leaves, kind, *tensors = node.args
        if kind != INDEX_OF_MASKS or not all(isinstance(each, Node) for each in tensors) or "val" not in node.meta:
            continue
        x, *indices = tensors
        _exchange(node, Exchange(aten.index.Tensor, (x, indices)))
        for each in {function, leaves}:
            if isinstance(each, Node) and not each.users:
                graph.erase_node(each)


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
    return frozenset(torch.export.default_decompositions()) | UPSAMPLING


def _exchange(node: Node, exchange: Exchange) -> None:
    """Put an operator into the place of a node. Its name stays: the program's outputs are known by names."""
    with node.graph.inserting_before(node), torch.no_grad():
        node.args = tuple(_inserted(node, each) for each in exchange.positional)
    node.target, node.kwargs = exchange.operator, dict(exchange.named)


def _inserted(node: Node, argument: Any) -> Any:
    """An argument of a node. Each operator in it becomes a node before this one."""
    if isinstance(argument, list):
        return [_inserted(node, each) for each in argument]
    if not isinstance(argument, Exchange):
        return argument
    args = tuple(_inserted(node, each) for each in argument.positional)
    made = node.graph.call_function(argument.operator, args, dict(argument.named))
    value = argument.value
    if value is None:
        value = argument.operator(*map_arg(args, lambda each: each.meta["val"]), **argument.named)
    made.meta = {**node.meta, "val": value}
    return made


def _remove_checks(graph: Graph) -> None:
    """Remove checks of sizes, which no graph of ONNX has, and what is computed for them alone."""
    for node in reversed(graph.nodes):
        if node.target is aten._assert_scalar.default or (node.target in OF_NUMBERS and not node.users):
            graph.erase_node(node)


# What a program calls where a mask function indexes a tensor by tensors (torch 2.13)
INDEX_OF_MASKS = "torch._dynamo._trace_wrapped_higher_order_op.ModIndex"
# Functions of Python that compute with sizes, or take one of several results.
OF_NUMBERS = frozenset(
    {
        *(operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg),
        *(operator.truediv, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
        *(operator.and_, operator.or_, torch.sym_max, torch.sym_min, torch.sym_int, torch.sym_float, torch.sym_not),
    }
)
# Operators that sort -> the ones without a choice of the order of equal values. ONNX keeps it.
SORTS: Mapping[Any, Any] = {
    each: kind.default for kind in (aten.sort, aten.argsort) for each in (kind.default, kind.stable)
}
# PyTorch keeps these whole too, and leaves them out of the table of all others.
UPSAMPLING = frozenset({aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec, aten.upsample_trilinear3d.vec})
# Operators that transformers puts into a program after the trace. They return what their first argument is like.
LIKE_FIRST = frozenset({aten.detach.default, aten.index_put.default})
# Operators made of others that return none of their arguments, and no view of one.
NEW = frozenset(
    {aten.matmul.default, aten.linear.default, aten.batch_norm.default, aten.conv1d.default, aten.conv2d.default}
)
CONTIGUOUS: dict[str, Any] = {"memory_format": torch.contiguous_format}


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
    """A view of the shape of the result. Where several sizes are open, each must be that of a known axis."""
    shape = node.meta["val"].shape
    sizes: list[Any] = [size if isinstance(size, int) else -1 for size in shape]
    if sizes.count(-1) > 1 or 0 in sizes:
        sizes = [size if isinstance(size, int) else _open_size(node, size) for size in shape]
    return None if None in sizes else _view(node, sizes)


def _open_size(node: Node, size: Any) -> Exchange | None:
    """A size that an input of the program has, or the argument of a node."""
    for each in (*reversed(node.graph.find_nodes(op="placeholder")), node.args[0]):
        shape = getattr(each.meta["val"], "shape", ())
        for axis, known in enumerate(shape):
            if not isinstance(known, int) and str(known) == str(size):
                return Exchange(aten.sym_size.int, (each, axis), value=known)
    return None


def _view(node: Node, shape: Sequence[Any]) -> Exchange:
    """A view of a contiguous copy. The exporter's Reshape of a view keeps sizes of 0, that of `reshape` does not."""
    x: Any = node.args[0]
    return Exchange(aten.view.default, (Exchange(aten.clone.default, (x,), CONTIGUOUS, x.meta["val"]), list(shape)))


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
    """The number less the tensor, in the result's dtype: the exporter casts no tensor behind a number."""
    x, other, alpha = _arguments(node).values()
    dtype = node.meta["val"].dtype
    cast = x if x.meta["val"].dtype == dtype else Exchange(aten._to_copy.default, (x,), {"dtype": dtype})
    return Exchange(aten.sub.Tensor, (other, cast)) if alpha == 1 else None


def _chunk(node: Node) -> Exchange | None:
    axis = _arguments(node)["dim"]
    size = node.meta["val"][0].shape[axis]
    return Exchange(aten.split.Tensor, (node.args[0], size, axis)) if isinstance(size, int) and size else None


def _diff(node: Node) -> Exchange | None:
    x, n, axis, before, after = _arguments(node).values()
    if n != 1 or node.meta["val"].dtype == torch.bool:
        return None
    parts = [each for each in (before, x, after) if each is not None]
    joined = x if len(parts) == 1 else Exchange(aten.cat.default, (parts, axis))
    later, earlier = (Exchange(aten.slice.Tensor, (joined, axis, *ends)) for ends in ((1, sys.maxsize), (0, -1)))
    return Exchange(aten.sub.Tensor, (later, earlier))


def _unpadded(node: Node) -> Exchange | None:
    x, weight, bias, stride, padding, dilation, groups = _arguments(node).values()
    axes = len(weight.meta["val"].shape) - 2
    if padding != "valid" or len(x.meta["val"].shape) != axes + 2:  # it has no batch
        return None
    args = (x, weight, bias, _each(stride, axes), [0] * axes, _each(dilation, axes), False, [0] * axes, groups)
    return Exchange(aten.convolution.default, args)


def _each(number: Any, axes: int) -> list[int]:
    """A number of each axis, where one can be stated for all."""
    numbers = number if isinstance(number, list | tuple) else [number]
    return list(numbers) * axes if len(numbers) == 1 else list(numbers)


def _normalised(node: Node) -> Exchange | None:
    x, weight, bias, mean, variance, is_training, momentum, epsilon, _ = _arguments(node).values()
    if is_training or mean is None or variance is None:
        return None
    value, empty = node.meta["val"], node.meta["val"].new_empty(0)
    args = (x, weight, bias, mean, variance, momentum, epsilon)
    results = Exchange(aten._native_batch_norm_legit_no_training.default, args, value=(value, empty, empty))
    return Exchange(operator.getitem, (results, 0))


def _transposed_convolution(node: Node) -> Exchange:
    x, weight, bias, stride, padding, outer, groups, dilation = _arguments(node).values()
    axes = len(weight.meta["val"].shape) - 2
    stride, padding, dilation, outer = (_each(number, axes) for number in (stride, padding, dilation, outer))
    return Exchange(aten.convolution.default, (x, weight, bias, stride, padding, dilation, True, outer, groups))


def _places_of_sorted(node: Node) -> Exchange:
    x, axis, descending = _arguments(node).values()
    results = Exchange(aten.sort.default, (x, axis, descending), value=(x.meta["val"], node.meta["val"]))
    return Exchange(operator.getitem, (results, 1))


def _weight_norm(node: Node) -> Exchange | None:
    direction, length, axis = _arguments(node).values()
    if axis < -1:  # -1 is the norm of all axes
        return None
    axes = len(direction.meta["val"].shape)
    others = [each for each in range(axes) if each != axis]
    norm = Exchange(aten.linalg_vector_norm.default, (direction, 2, others, True))
    return Exchange(aten.mul.Tensor, (direction, Exchange(aten.div.Tensor, (length, norm))))


def _mean_of_line(node: Node) -> Exchange | None:
    x, sizes = node.args
    line = Exchange(aten.unsqueeze.default, (x, -2))
    return Exchange(aten.squeeze.dim, (Exchange(aten.mean.dim, (line, [-1, -2], True)), -2)) if sizes == [1] else None


def _mean_of_plane(node: Node) -> Exchange | None:
    x, sizes = node.args
    return Exchange(aten.mean.dim, (x, [-1, -2], True)) if sizes == [1, 1] else None


def _apart(other: Any) -> Callable[[Node], Exchange | None]:
    """The operator that returns a tensor of its own, where nothing else reads what the node would write into."""

    def exchange(node: Node) -> Exchange | None:
        x, *others = node.all_input_nodes
        is_alone = _is_new(x) and all(user is node or (user < node and _is_new(user)) for user in x.users)
        kept = all(_result_type(x, each) == x.meta["val"].dtype for each in others)
        return Exchange(other, node.args, node.kwargs) if is_alone and kept else None

    return exchange


def _result_type(x: Node, y: Node) -> torch.dtype | None:
    values = x.meta["val"], y.meta["val"]
    return torch.result_type(*values) if all(isinstance(each, torch.Tensor) for each in values) else None


def _is_new(node: Node) -> bool:
    """Whether an operator returns a tensor with memory of its own, and writes into none."""
    if node.target is operator.getitem:  # one of several results
        results: Any = node.args[0]
        return _is_new(results) and sum(each.args == node.args for each in results.users) == 1
    schema = schema_of(node.target)
    if EXCHANGES.get(node.target) is _to:
        return bool(node.args[0].meta["val"].dtype != node.meta["val"].dtype)  # type: ignore[union-attr]
    if schema is None or (is_composite(node.target) and node.target not in NEW):
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
    aten.contiguous.default: lambda node: Exchange(aten.clone.default, node.args[:1], CONTIGUOUS),
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
    aten.diff.default: _diff,
    aten.argsort.default: _places_of_sorted,
    aten.item.default: _as(aten._local_scalar_dense.default),
    aten.conv1d.padding: _unpadded,
    aten.conv2d.padding: _unpadded,
    aten.conv_transpose2d.input: _transposed_convolution,
    aten.batch_norm.default: _normalised,
    aten._weight_norm.default: _weight_norm,
    aten.adaptive_avg_pool1d.default: _mean_of_line,
    aten.adaptive_avg_pool2d.default: _mean_of_plane,
    aten.add_.Tensor: _apart(aten.add.Tensor),
    aten.sub_.Tensor: _apart(aten.sub.Tensor),
    aten.mul_.Tensor: _apart(aten.mul.Tensor),
    aten.div_.Tensor: _apart(aten.div.Tensor),
    aten.relu_.default: _apart(aten.relu.default),
    aten.clamp_.default: _apart(aten.clamp.default),
    aten.scatter_.value: _apart(aten.scatter.value),
    aten.scatter_add_.default: _apart(aten.scatter_add.default),
    aten.rsub.Scalar: _reversed_sub,
    aten.min.other: _as(aten.minimum.default),
    aten.max.other: _as(aten.maximum.default),
    aten.__and__.Tensor: _as(aten.bitwise_and.Tensor),
    aten.__or__.Tensor: _as(aten.bitwise_or.Tensor),
}
