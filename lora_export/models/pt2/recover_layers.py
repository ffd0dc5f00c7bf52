"""The layers that a program's weights were of, told from the operators that read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_export.errors import InputRefused
from lora_export.models.pt2.program_types import Exported, Graph, Node, Payload, Stored, Value
from lora_export.plan import Layout

ATEN = "torch.ops.aten."
DEEPEST = 100  # modules in each other; PyTorch walks through them by recursion
CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}  # by the weight's dimensions
CONVOLVE = ("convolution.default", *(f"conv{n}d.{overload}" for n in (1, 2, 3) for overload in ("default", "padding")))
CONVOLUTION_DEFAULTS = (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1), ("transposed", False))
TURNS = ("t.default", "numpy_T.default", "permute.default", "transpose.int", "swapaxes.default", "swapdims.default")
# The argument of a product by its right side, which is multiplied as it lies: (in, out).
RIGHT = {
    "mm.default": "mat2",
    "addmm.default": "mat2",
    "matmul.default": "other",
}


class Turned(nn.Module):
    """The owner of a weight that lies (in, out), as transformers' Conv1D has it."""

    lora_layout = Layout.IN_OUT


class Use(NamedTuple):
    node: Node
    argument: str


def split_name(name: str) -> tuple[str, str]:
    owner, _, attribute = name.rpartition(".")
    return owner, attribute


def shown(target: str) -> str:
    return target.removeprefix("torch.ops.")[:80]


def operator_of(node: Node) -> str:
    """`linear.default` for torch.ops.aten.linear.default; nothing for what is no such operator."""
    return node.target.removeprefix(ATEN) if node.target.startswith(ATEN) else ""


def readers_of(graph: Graph) -> dict[str, list[Use]]:
    """Who reads a value, and as which argument."""
    found: dict[str, list[Use]] = {}
    for node in graph.nodes:
        for name, argument in node.inputs:
            for value in values_in(argument):
                found.setdefault(value, []).append(Use(node, name))
    for value in values_in(list(graph.outputs)):
        found.setdefault(value, []).append(Use(Node("output", -1, "output", (), ()), ""))
    return found


def values_in(argument: Any) -> Iterator[str]:
    if isinstance(argument, Value):
        yield argument.name
    elif isinstance(argument, list):
        for each in argument:
            yield from values_in(each)


def is_matrix(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Embedding, Turned, *CONVOLUTIONS.values()))


def build(program: nn.Module, source: Exported, uses: Mapping[str, Sequence[Use]]) -> dict[int, str | None]:
    """Give the program its modules and tensors; returns node's number -> the layer that is called in its place.

    None stands for a node that nobody needs any more.
    """
    by_owner: dict[str, dict[str, Stored]] = {}
    for there in source.stored:
        owner, attribute = split_name(there.name)
        by_owner.setdefault(owner, {})[attribute] = there
    called: dict[int, str | None] = {}
    made: dict[str, nn.Module] = {"": program}
    for owner, tensors in by_owner.items():
        layer = _layer(tensors, uses)
        if owner:
            made[owner] = layer.module
            called |= {node.number: owner for node in layer.nodes}
            called |= dict.fromkeys((node.number for node in layer.spared), None)
    for owner in sorted(made, key=lambda path: path.count(".")):
        if owner:
            _put(program, owner, made[owner], source.path)
    contents = source.contents()
    made_of: dict[tuple[bool, Payload], Tensor] = {}  # tied ones are one
    for there in source.stored:
        key = there.kind == "parameter", there.payload
        if key not in made_of:
            made_of[key] = _tensor(there, contents[there.payload.member], source.path)
        owner, attribute = split_name(there.name)
        _put_tensor(program.get_submodule(owner), attribute, there, made_of[key], source.path)
    return called


def _put(program: nn.Module, path: str, module: nn.Module, file: Path) -> None:
    above: nn.Module = program
    *parents, last = path.split(".")
    if len(parents) > DEEPEST:
        raise InputRefused(f"{file}: {path[:80]!r}... can be no module's name: it is {len(parents)} modules deep")
    for part in parents:
        if part not in above._modules:
            _add(above, part, nn.Module(), path, file)
        above = above._modules[part]  # type: ignore[assignment]
    _add(above, last, module, path, file)


def _add(above: nn.Module, name: str, module: nn.Module, path: str, file: Path) -> None:
    try:
        above.add_module(name, module)
    except (KeyError, TypeError) as error:  # empty, or an attribute that every module has
        raise InputRefused(f"{file}: {path!r} can be no module's name") from error


def _tensor(there: Stored, content: bytearray, file: Path) -> Tensor:
    payload = there.payload
    dtype: torch.dtype = getattr(torch, payload.dtype)
    try:
        flat = torch.frombuffer(content, dtype=dtype) if content else torch.zeros(0, dtype=dtype)
        tensor = flat.as_strided(payload.sizes, payload.strides, payload.offset)
    except RuntimeError as error:  # sizes whose product PyTorch cannot count
        raise InputRefused(f"{file}: {there.name} can be no tensor: {str(error).splitlines()[0]}") from error
    is_parameter = there.kind == "parameter" and dtype.is_floating_point
    return nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor


def _put_tensor(owner: nn.Module, attribute: str, there: Stored, value: Tensor, file: Path) -> None:
    owner._parameters.pop(attribute, None)
    try:
        if isinstance(value, nn.Parameter):
            owner.register_parameter(attribute, value)
        else:
            owner.register_buffer(attribute, value, persistent=there.persistent and there.kind != "constant")
    except (KeyError, TypeError) as error:
        raise InputRefused(f"{file}: {there.name!r} can be no tensor's name") from error


class _Layer(NamedTuple):
    """A module that is to hold some tensors."""

    module: nn.Module
    nodes: Sequence[Node] = ()  # in whose place it is called; without any its weight is read
    spared: Sequence[Node] = ()  # that nobody reads then


def _layer(tensors: Mapping[str, Stored], uses: Mapping[str, Sequence[Use]]) -> _Layer:
    """The module that should hold these tensors, without them."""
    packed = _packed_attention(tensors)
    if packed is not None:
        return _Layer(packed)
    weight = tensors.get("weight")
    if weight is None or weight.kind != "parameter":
        return _Layer(nn.Module())
    readers, sizes, bias = uses.get(weight.value, []), weight.payload.sizes, tensors.get("bias")
    kinds = {(operator_of(use.node), use.argument) for use in readers}
    nodes = [use.node for use in readers]
    with torch.device("meta"):
        if kinds == {("linear.default", "weight")} and len(sizes) == 2:
            layer = nn.Linear(sizes[1], sizes[0], bias=bias is not None)
            return _Layer(layer, nodes if all(_has_bias(node, bias) for node in nodes) else [])
        if kinds == {("embedding.default", "weight")} and len(sizes) == 2:
            return _embedding(tensors, nodes, sizes)
        if kinds and kinds <= {(name, "weight") for name in CONVOLVE}:
            return _convolution(nodes, sizes, bias)
        if kinds and len(sizes) == 2 and all(_turns(use) for use in readers):
            layer = nn.Linear(sizes[1], sizes[0], bias=bias is not None)
            products = [use for node in nodes for name in _names(node) for use in uses.get(name, [])]
            if products and all(_is_linear(use, bias) for use in products):
                return _Layer(layer, [use.node for use in products], spared=nodes)
            return _Layer(layer)
    if kinds and len(sizes) == 2 and all(RIGHT.get(kind) == argument for kind, argument in kinds):
        return _Layer(Turned())
    return _Layer(nn.Module())


def _embedding(tensors: Mapping[str, Stored], nodes: Sequence[Node], sizes: Sequence[int]) -> _Layer:
    paddings = {argument_of(node, "padding_idx", -1) for node in nodes}
    padding = next(iter(paddings)) if len(paddings) == 1 else None
    known = isinstance(padding, int) and -1 <= padding < sizes[0] and set(tensors) == {"weight"}
    table = nn.Embedding(sizes[0], sizes[1], padding_idx=padding if known and padding != -1 else None)
    return _Layer(table, nodes if known else [])


def _names(node: Node) -> list[str]:
    return [name for name in node.outputs if isinstance(name, str)]


def _is_linear(use: Use, bias: Stored | None) -> bool:
    """Whether a product by a transposed weight is what a linear layer with this bias computes of a matrix."""
    operator, given = operator_of(use.node), dict(use.node.inputs)
    if operator == "mm.default":
        return use.argument == "mat2" and bias is None
    if operator != "addmm.default" or use.argument != "mat2" or bias is None:
        return False
    return given.get("self") == Value(bias.value) and not {"alpha", "beta"} & given.keys()


def _packed_attention(tensors: Mapping[str, Stored]) -> nn.Module | None:
    """An nn.MultiheadAttention's owner, whose weights are read and multiplied by function."""
    packed = tensors.get("in_proj_weight")
    if packed is None or packed.kind != "parameter" or len(packed.payload.sizes) != 2:
        return None
    width = packed.payload.sizes[1]
    if packed.payload.sizes[0] != 3 * width or not width:
        return None
    with torch.device("meta"):
        attention = nn.MultiheadAttention(width, 1, bias="in_proj_bias" in tensors)
    attention._modules.clear()  # `out_proj` has tensors of its own in the file
    return attention


def _convolution(nodes: Sequence[Node], sizes: Sequence[int], bias: Stored | None) -> _Layer:
    settings = {
        tuple(_setting(argument_of(node, name, default)) for name, default in CONVOLUTION_DEFAULTS) for node in nodes
    }
    if len(settings) != 1 or len(sizes) not in CONVOLUTIONS:
        return _Layer(nn.Module())
    stride, padding, dilation, groups, transposed = next(iter(settings))
    if transposed is not False or not isinstance(groups, int) or groups < 1 or sizes[0] % groups:
        return _Layer(nn.Module())
    try:
        layer = CONVOLUTIONS[len(sizes)](
            sizes[1] * groups,
            sizes[0],
            tuple(sizes[2:]),  # type: ignore[arg-type]
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias is not None,
        )
    except (ValueError, TypeError, RuntimeError):
        return _Layer(nn.Module())
    return _Layer(layer, list(nodes) if all(_has_bias(node, bias) for node in nodes) else [])


def _setting(value: Any) -> Any:
    """A convolution's setting, one number for all its dimensions or one each."""
    if isinstance(value, list):
        return value[0] if len(value) == 1 else tuple(value)
    return value


def argument_of(node: Node, name: str, default: Any) -> Any:
    return next((value for spelled, value in node.inputs if spelled == name), default)


def _has_bias(node: Node, bias: Stored | None) -> bool:
    """Whether a node adds the bias of the layer whose weight it reads, or none where there is none."""
    return bool(argument_of(node, "bias", None) == (None if bias is None else Value(bias.value)))


def _turns(use: Use) -> bool:
    """Whether a matrix is transposed: one that is multiplied as x Wᵀ lies (out, in)."""
    operator, given = operator_of(use.node), dict(use.node.inputs)
    if use.argument != "self" or operator not in TURNS:
        return False
    if operator == "permute.default":
        return given.get("dims") in ([1, 0], [-1, -2])
    axes = {given[name] for name in ("dim0", "dim1", "axis0", "axis1") if isinstance(given.get(name), int)}
    return axes in (set(), {0, 1}, {-2, -1})
