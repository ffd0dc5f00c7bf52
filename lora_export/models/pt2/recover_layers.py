"""The layers that a program's weights belonged to, recovered from the operators that read them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_export.errors import InputRefused, first_line
from lora_export.layers.torch_internals import own_modules, own_parameters
from lora_export.models.pt2.graph_json import Graph, Node, ProgramDescription, ProgramTensor, StoredArray, Value
from lora_export.plan import Layout

ATEN = "torch.ops.aten."
MAX_MODULE_DEPTH = 100  # of nested modules; PyTorch walks through them by recursion
CONVOLUTION_CLASSES = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}  # by the weight's dimensions
CONVOLUTION_OPERATORS = (
    "convolution.default",
    *(f"conv{n}d.{overload}" for n in (1, 2, 3) for overload in ("default", "padding")),
)
CONVOLUTION_DEFAULTS = (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1), ("transposed", False))
TRANSPOSES = (
    *("t.default", "numpy_T.default", "permute.default"),
    *("transpose.int", "swapaxes.default", "swapdims.default"),
)
# The right factor of a matrix product, which is multiplied as it is stored: (in, out).
RIGHT_FACTOR = {"mm.default": "mat2", "addmm.default": "mat2", "matmul.default": "other"}


class InOutWeight(nn.Module):
    """The owner of a weight that is stored as (in, out), as in transformers' Conv1D."""

    lora_layout = Layout.IN_OUT


class Use(NamedTuple):
    """A node that reads a value, and the argument that it reads it as."""

    node: Node
    argument: str


def split_attribute(name: str) -> tuple[str, str]:
    """The module and the attribute of a tensor's name."""
    owner, _, attribute = name.rpartition(".")
    return owner, attribute


def readable(target: str) -> str:
    """An operator's name, for messages."""
    return target.removeprefix("torch.ops.")[:80]


def operator_of(node: Node) -> str:
    """`linear.default` for torch.ops.aten.linear.default; empty for an operator of another namespace."""
    return node.target.removeprefix(ATEN) if node.target.startswith(ATEN) else ""


def uses_of(graph: Graph) -> dict[str, list[Use]]:
    """All uses of each value. The graph's outputs are read by a node named `output`."""
    found: dict[str, list[Use]] = {}
    for node in graph.nodes:
        for name, argument in node.inputs:
            for value in values_in(argument):
                found.setdefault(value, []).append(Use(node, name))
    for value in values_in(list(graph.outputs)):
        found.setdefault(value, []).append(Use(Node("output", -1, "output", (), ()), ""))
    return found


def values_in(argument: Any) -> Iterator[str]:
    """The names of the values in an argument, lists included."""
    if isinstance(argument, Value):
        yield argument.name
    elif isinstance(argument, list):
        for each in argument:
            yield from values_in(each)


def has_matrix(module: nn.Module) -> bool:
    """Whether a recovered layer multiplies by its weight."""
    return isinstance(module, (nn.Linear, nn.Embedding, InOutWeight, *CONVOLUTION_CLASSES.values()))


def recover_layers(
    program: nn.Module, source: ProgramDescription, uses: Mapping[str, Sequence[Use]]
) -> dict[int, str | None]:
    """Give the program its modules and tensors. Returns node's number -> the layer that is called in its place.

    None marks a node whose result no remaining node reads.
    """
    by_owner: dict[str, dict[str, ProgramTensor]] = {}
    for tensor in source.tensors:
        owner, attribute = split_attribute(tensor.name)
        by_owner.setdefault(owner, {})[attribute] = tensor
    called: dict[int, str | None] = {}
    modules: dict[str, nn.Module] = {}
    for owner, tensors in by_owner.items():
        if owner:
            layer = _layer(tensors, uses)
            modules[owner] = layer.module
            called |= {node.number: owner for node in layer.nodes}
            called |= dict.fromkeys((node.number for node in layer.unused), None)
    for owner in sorted(modules, key=lambda path: path.count(".")):
        _register_module(program, owner, modules[owner], source.path)
    _register_tensors(program, source)
    return called


def _register_tensors(program: nn.Module, source: ProgramDescription) -> None:
    """Read the tensors from the file into the program's modules. Tied tensors become one."""
    contents = source.read_members()
    loaded: dict[tuple[bool, StoredArray], Tensor] = {}
    for tensor in source.tensors:
        key = tensor.kind == "parameter", tensor.data
        if key not in loaded:
            loaded[key] = _loaded(tensor, contents[tensor.data.member], source.path)
        owner, attribute = split_attribute(tensor.name)
        _register_tensor(program.get_submodule(owner), attribute, tensor, loaded[key], source.path)


def _register_module(program: nn.Module, path: str, module: nn.Module, file: Path) -> None:
    parent: nn.Module = program
    *parents, last = path.split(".")
    if len(parents) > MAX_MODULE_DEPTH:
        raise InputRefused(f"{file}: {path[:80]!r}... cannot be a module's name: it is {len(parents)} modules deep")
    with _refused_names(file, path, "module"):
        for part in parents:
            if part not in own_modules(parent):
                parent.add_module(part, nn.Module())
            parent = own_modules(parent)[part]  # type: ignore[assignment]
        parent.add_module(last, module)


@contextlib.contextmanager
def _refused_names(file: Path, name: str, what: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError) as error:  # empty, or an attribute that every module has
        raise InputRefused(f"{file}: {name!r} cannot be a {what}'s name") from error


def _loaded(tensor: ProgramTensor, content: bytearray, file: Path) -> Tensor:
    data = tensor.data
    dtype: torch.dtype = getattr(torch, data.dtype)
    try:
        flat = torch.frombuffer(content, dtype=dtype) if content else torch.zeros(0, dtype=dtype)
        value = flat.as_strided(data.sizes, data.strides, data.offset)
    except RuntimeError as error:  # sizes whose product PyTorch cannot count
        raise InputRefused(f"{file}: {tensor.name} cannot be a tensor: {first_line(error)}") from error
    is_parameter = tensor.kind == "parameter" and dtype.is_floating_point
    return nn.Parameter(value, requires_grad=False) if is_parameter else value


def _register_tensor(owner: nn.Module, attribute: str, tensor: ProgramTensor, value: Tensor, file: Path) -> None:
    own_parameters(owner).pop(attribute, None)
    with _refused_names(file, tensor.name, "tensor"):
        if isinstance(value, nn.Parameter):
            owner.register_parameter(attribute, value)
        else:
            owner.register_buffer(attribute, value, persistent=tensor.persistent and tensor.kind != "constant")


class _Layer(NamedTuple):
    """A module for some tensors."""

    module: nn.Module
    nodes: Sequence[Node] = ()  # the nodes in whose place it is called; if none, its weight is read
    unused: Sequence[Node] = ()  # the nodes whose results are not read then


def _layer(tensors: Mapping[str, ProgramTensor], uses: Mapping[str, Sequence[Use]]) -> _Layer:
    """The module that should hold these tensors, without them."""
    packed = _packed_attention(tensors)
    if packed is not None:
        return _Layer(packed)
    weight = tensors.get("weight")
    if weight is None or weight.kind != "parameter":
        return _Layer(nn.Module())
    readers, sizes, bias = uses.get(weight.value, []), weight.data.sizes, tensors.get("bias")
    kinds = {(operator_of(use.node), use.argument) for use in readers}
    nodes = [use.node for use in readers]
    with torch.device("meta"):
        if kinds == {("linear.default", "weight")} and len(sizes) == 2:
            layer = nn.Linear(sizes[1], sizes[0], bias=bias is not None)
            return _Layer(layer, nodes if all(_has_bias(node, bias) for node in nodes) else [])
        if kinds == {("embedding.default", "weight")} and len(sizes) == 2:
            return _embedding(tensors, nodes, sizes)
        if kinds and kinds <= {(name, "weight") for name in CONVOLUTION_OPERATORS}:
            return _convolution(nodes, sizes, bias)
        if kinds and len(sizes) == 2 and all(_transposes(use) for use in readers):
            layer = nn.Linear(sizes[1], sizes[0], bias=bias is not None)
            results = [name for node in nodes for name in node.outputs if isinstance(name, str)]
            products = [use for name in results for use in uses.get(name, [])]
            if products and all(_is_linear(use, bias) for use in products):
                return _Layer(layer, [use.node for use in products], unused=nodes)
            return _Layer(layer)
    if kinds and len(sizes) == 2 and all(RIGHT_FACTOR.get(kind) == argument for kind, argument in kinds):
        return _Layer(InOutWeight())
    return _Layer(nn.Module())


def _embedding(tensors: Mapping[str, ProgramTensor], nodes: Sequence[Node], sizes: Sequence[int]) -> _Layer:
    paddings = {argument_of(node, "padding_idx", -1) for node in nodes}
    padding = next(iter(paddings)) if len(paddings) == 1 else None
    known = isinstance(padding, int) and -1 <= padding < sizes[0] and set(tensors) == {"weight"}
    table = nn.Embedding(sizes[0], sizes[1], padding_idx=padding if known and padding != -1 else None)
    return _Layer(table, nodes if known else [])


def _is_linear(use: Use, bias: ProgramTensor | None) -> bool:
    """Whether a product by a transposed weight is what a linear layer with this bias computes of a matrix."""
    operator, arguments = operator_of(use.node), dict(use.node.inputs)
    if operator == "mm.default":
        return use.argument == "mat2" and bias is None
    if operator != "addmm.default" or use.argument != "mat2" or bias is None:
        return False
    return arguments.get("self") == Value(bias.value) and not {"alpha", "beta"} & arguments.keys()


def _packed_attention(tensors: Mapping[str, ProgramTensor]) -> nn.Module | None:
    """An nn.MultiheadAttention for a packed projection. It is never called: nodes multiply by its weights."""
    packed = tensors.get("in_proj_weight")
    if packed is None or packed.kind != "parameter" or len(packed.data.sizes) != 2:
        return None
    width = packed.data.sizes[1]
    if packed.data.sizes[0] != 3 * width or not width:
        return None
    with torch.device("meta"):
        attention = nn.MultiheadAttention(width, 1, bias="in_proj_bias" in tensors)
    own_modules(attention).clear()  # the file has the tensors of `out_proj` under names of their own
    return attention


def _convolution(nodes: Sequence[Node], sizes: Sequence[int], bias: ProgramTensor | None) -> _Layer:
    settings = {
        tuple(_setting(argument_of(node, name, default)) for name, default in CONVOLUTION_DEFAULTS) for node in nodes
    }
    if len(settings) != 1 or len(sizes) not in CONVOLUTION_CLASSES:
        return _Layer(nn.Module())
    stride, padding, dilation, groups, transposed = next(iter(settings))
    if transposed is not False or not isinstance(groups, int) or groups < 1 or sizes[0] % groups:
        return _Layer(nn.Module())
    try:
        cls: Any = CONVOLUTION_CLASSES[len(sizes)]
        layer = cls(sizes[1] * groups, sizes[0], tuple(sizes[2:]), stride, padding, dilation, groups, bias is not None)
    except (ValueError, TypeError, RuntimeError):
        return _Layer(nn.Module())
    return _Layer(layer, list(nodes) if all(_has_bias(node, bias) for node in nodes) else [])


def _setting(value: Any) -> Any:
    """A convolution's setting: one number for all dimensions, or one for each."""
    return (
        tuple(value) if isinstance(value, list) and len(value) > 1 else value[0] if isinstance(value, list) else value
    )


def argument_of(node: Node, name: str, default: Any) -> Any:
    """The value of a node's argument, or the default where it has none of this name."""
    return next((value for spelled, value in node.inputs if spelled == name), default)


def _has_bias(node: Node, bias: ProgramTensor | None) -> bool:
    """Whether a node adds the bias of the layer whose weight it reads, or none where there is none."""
    return bool(argument_of(node, "bias", None) == (None if bias is None else Value(bias.value)))


def _transposes(use: Use) -> bool:
    """Whether a node transposes a matrix, which is then stored as (out, in)."""
    operator, arguments = operator_of(use.node), dict(use.node.inputs)
    if use.argument != "self" or operator not in TRANSPOSES:
        return False
    if operator == "permute.default":
        return arguments.get("dims") in ([1, 0], [-1, -2])
    axes = {arguments[name] for name in ("dim0", "dim1", "axis0", "axis1") if isinstance(arguments.get(name), int)}
    return axes in (set(), {0, 1}, {-2, -1})
