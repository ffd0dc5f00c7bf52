"""Merging into the quantised weights of a graph: on their own scales, or promoted to 8 bits or to floats.

A weight is kept where its scheme can hold the change (`weights.quantised_layers`). A symmetric MatMulNBits that is kept
gets new scales where these have less noise. Otherwise a MatMulNBits of fewer bits gets 8, where those hold the change.
Else the weight becomes floats, W + ΔW rounded once: a Transpose and a MatMul in place of a MatMulNBits, an initializer
in place of a DequantizeLinear. That is decided before anything is written, on the rows that the statistics count.

New scales of a MatMulNBits are those of onnxruntime's quantiser: an entry is (integer - half) * scale, and the entry of
largest magnitude of a block becomes the lowest integer, 0, whatever its sign. So half of the scales are negative.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.graph.exporter_names import FOLDED_FROM, PROMOTED_FROM, name_before_quantisation
from lora_export.graph.merge.fold import InitializerChange
from lora_export.graph.quantised.scheme_of_weight import quantised_tensor
from lora_export.graph.quantised_weights import NBitsWeight, QuantisedWeight, stored_weight
from lora_export.graph.refusals import graph_remedy
from lora_export.graph.values import drop_unused, new_initializer, unused_name, value_names
from lora_export.storage import block_copy
from lora_export.storage.block_copy import Bytes
from lora_export.storage.safetensors_file import DTYPES, Entry
from lora_export.weights.apply_step import Backend, refuse_overflow
from lora_export.weights.encoded_tensor import EncodedTensor, WrittenRows
from lora_export.weights.kept_weights import KeptTensor, measured_results
from lora_export.weights.merge_report import QuantisedLayer, Statistics, StatisticsByWeight, StepResult
from lora_export.weights.quantised.packed_numbers import pack
from lora_export.weights.quantised.stored_parts import QuantisedTensor
from lora_export.weights.quantised_layers import OWN_VALUES, refuse_promotion, worst_result
from lora_export.weights.tensor_blocks import OutputTensor, Patch, run_in_memory

PACKED_BYTE = DTYPES["U8"]
WIDEST = 8  # the most that MatMulNBits has
LOW_NOISE = 0.1  # of the change: with more, new scales are tried
SCALES_OF_NBITS, ZEROS_OF_NBITS, BIAS_OF_NBITS = 2, 3, 5  # inputs of MatMulNBits


class NewTensor(NamedTuple):
    """An initializer of the merged graph that is made of the integers of the base."""

    value: ir.Value
    change: QuantisedChange
    output: OutputTensor
    dtype: ir.DataType
    shape: Sequence[int]

    def place(self, backend: Backend) -> list[Statistics] | None:
        """Let the value have its dtype and shape. None: its bytes have to be written.

        A tensor whose integers are in the graph's message is made here, and stays there. Returns its statistics.
        """
        self.value.type, self.value.shape = ir.TensorType(self.dtype), ir.Shape(self.shape)
        old, name = self.change.integers, self.value.name or ""
        if isinstance(old, ir.ExternalTensor):  # where the bytes are read
            place = old.location, old.offset, self.output.nbytes, self.dtype
            self.value.const_value = ir.ExternalTensor(
                *place, shape=ir.Shape(self.shape), name=name, base_dir=old.base_dir
            )
            return None
        after = np.empty(self.output.nbytes, np.uint8)
        with self.change.opened() as (path, fd):
            found = run_in_memory(path, fd, self.output, self.output.blocks_from(0, path, fd, backend), after)
        proto = onnx.TensorProto(name=name, data_type=int(self.dtype), dims=self.shape, raw_data=after.tobytes())
        self.value.const_value = ir.serde.TensorProtoTensor(proto)
        return found


@dataclass(frozen=True, eq=False)
class QuantisedChange:
    """A quantised weight of a graph, and the steps on it."""

    name: str
    value: ir.Value  # its integers, which nothing else reads
    stored: QuantisedWeight
    integers: ir.TensorProtocol
    tensor: QuantisedTensor
    patches: tuple[Patch, ...]
    is_turned: bool  # whether the model's parameter is the transpose of what is stored

    @property
    def _start(self) -> int:
        return (self.integers.offset or 0) if isinstance(self.integers, ir.ExternalTensor) else 0

    def kept(self) -> KeptTensor:
        """The integers on their own scales."""
        start, codes = self._start, self.tensor.codes
        assert codes is not None
        packed = Entry(self.name, PACKED_BYTE, (self.integers.nbytes,), start, start + self.integers.nbytes)
        return KeptTensor(packed, None, self.name, PACKED_BYTE, self.patches, codes=codes, of_weight=self.name)

    def floats(self) -> OutputTensor:
        """The sum in the dtype in which the graph computes with the weight."""
        return OutputTensor(self._source, None, self.name, self._scale_dtype, self.patches, self.tensor)

    def rescaled(self, bits: int, *, scales: bool = False) -> EncodedTensor:
        """The sum as integers of so many bits in the weight's blocks, with new scales; or these scales."""
        own = self._source, None, self.name, self._source.dtype, self.patches, self.tensor
        size, dtype = self.stored.block_size, self._scale_dtype
        row_bytes = -(-self.stored.shape[1] // size) * (dtype.itemsize if scales else size * bits // 8)
        encode = functools.partial(_encode, self.name, bits, size, dtype, scales)
        return EncodedTensor(*own, encode=encode, place=lambda row: row * row_bytes)

    @property
    def _scale_dtype(self) -> np.dtype[Any]:
        return self.stored.tensors[1].dtype.numpy()

    @property
    def _source(self) -> Entry:
        start = self._start
        return Entry(self.name, self.tensor.dtype, self.stored.shape, start, start + self.integers.nbytes)

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[Path, int]]:
        """The file that has the integers, and its descriptor: a temporary one where the graph's message has them."""
        if isinstance(self.integers, ir.ExternalTensor):
            path = Path(os.path.realpath(self.integers.path))
            with path.open("rb") as file:
                yield path, file.fileno()
            return
        import tempfile  # imported here: only integers of less than a kilobyte are in the message

        with tempfile.TemporaryFile() as file:
            file.write(self.integers.tobytes())
            file.flush()
            yield Path(self.name), file.fileno()


def _encode(
    name: str,
    bits: int,
    block_size: int,
    dtype: np.dtype[Any],
    is_scales: bool,
    _: Bytes,
    total: NDArray[np.float32],
    target: Bytes,
    measured: bool,
) -> WrittenRows:
    """Store the integers of some rows (rows, in), in blocks of these, or their scales."""
    count, columns = total.shape
    padded = np.pad(total, [(0, 0), (0, -columns % block_size)]).reshape(count, -1, block_size)
    low, high, half = padded.min(-1), padded.max(-1), 1 << (bits - 1)
    stored = (np.where(high > -low, high, low) / -half).astype(dtype)
    refuse_overflow(name, total, stored)
    if is_scales:
        target[:] = stored.reshape(-1).view(np.uint8)
        return None, None
    scales = stored.astype(np.float32)[..., None]
    padded /= np.where(scales, scales, 1)
    levels = np.clip(np.rint(padded, out=padded), -half, half - 1, out=padded)
    pack((levels + half).astype(np.uint8).reshape(count, -1), bits, target.reshape(count, -1))
    return (levels * scales).reshape(count, -1)[:, :columns] if measured else None, None


ChangeNodes = Callable[[ir.Model, QuantisedChange], list[NewTensor]]  # changes the nodes


def quantised_change(value: ir.Value, changes: Sequence[InitializerChange]) -> QuantisedChange:
    """The changes of the weight whose integers are `value`; `isolate_changes` has isolated it. Reads nothing.

    Raises InputRefused for a scheme that is not supported, for a part of a stack, and where the same integers are read
    with several scales.
    """
    readers = list(value.uses())
    stored = stored_weight(*readers[0])
    assert stored is not None
    name = value.name or "" if changes[0].is_block else changes[0].step.weight
    scales, zeros = stored.POSITIONS[1:]
    if len({(node.op_type, *node.inputs[scales : zeros + 1]) for node, _ in readers}) > 1:
        raise InputRefused(
            f"{name}: its integers are read with several scales, and cannot be quantised again for one of them"
        )
    if any(change.expert is not None or change.cut_shape is not None for change in changes):
        raise InputRefused(f"{changes[0].step.weight} is a part of {name}, a stack of quantised weights: not supported")
    patches = tuple(change.patch(stored.shape[0]) for change in changes)
    tensor, integers = quantised_tensor(stored, name), stored.tensors[0]
    return QuantisedChange(name, value, stored, integers, tensor, patches, changes[0].is_turned)


def requantise(
    model: ir.Model, changes: Sequence[QuantisedChange], min_retention: float, backend: Backend
) -> tuple[list[QuantisedLayer], list[NewTensor]]:
    """Decide which weights are kept and which promoted, and change their nodes. Writes no weight.

    Returns what becomes of each layer, and the tensors that have to be made. Reads the rows that are measured. Raises
    InputRefused with the layers whose floats would lose the change, too.
    """
    with ThreadPoolExecutor(block_copy.default_threads()) as pool:
        decided = list(pool.map(functools.partial(_decide, min_retention=min_retention, backend=backend), changes))
    if lost := [layer for layer, _ in decided if not layer.stored]:
        refuse_promotion(
            lost, len(decided), "neither can floats of the type that the graph computes in", graph_remedy()
        )
    made = [tensor for change, (_, form) in zip(changes, decided, strict=True) for tensor in form(model, change)]
    return [layer for layer, _ in decided], made


def _decide(change: QuantisedChange, *, min_retention: float, backend: Backend) -> tuple[QuantisedLayer, ChangeNodes]:
    """What becomes of a layer: kept, or promoted to the narrowest form that holds its change."""
    stored, floats = change.stored, str(change.floats().dtype)
    if any(patch.step.has_own_values for patch in change.patches):
        return QuantisedLayer(change.name, stored.kind, floats, OWN_VALUES, None, None), _to_floats
    bits = stored.bits if isinstance(stored, NBitsWeight) else WIDEST
    forms: list[tuple[str, OutputTensor, ChangeNodes]] = [(floats, change.floats(), _to_floats)]
    if bits < WIDEST:
        name = f"{WIDEST} bits in blocks of {stored.block_size}"
        forms.insert(0, (name, change.rescaled(WIDEST), functools.partial(_rescale, bits=WIDEST)))
    with change.opened() as (path, fd):
        result, why = worst_result(measured_results(change.kept(), path, fd), min_retention)
        layer = QuantisedLayer(change.name, stored.kind, stored.kind, why, result.retention, result.noise)
        if not why and isinstance(stored, NBitsWeight) and stored.tensors[2] is None and result.noise > LOW_NOISE:
            # A change moves some entries beyond the last integer of a block, which was the largest entry.
            other = worst_result(_trial(change.rescaled(bits), path, fd, backend), min_retention)[0]
            if other.noise < result.noise:
                why = f"with its scales the noise would be {result.noise:.2g} times its change, not {other.noise:.2g}"
                layer = replace(layer, stored=f"{stored.kind}, new scales", why=why)
                return layer, functools.partial(_rescale, bits=bits)
        if not why:
            return layer, _kept
        for name, tensor, form in forms:
            if name == "float32" or not worst_result(_trial(tensor, path, fd, backend), min_retention)[1]:
                return replace(layer, stored=name), form
    return replace(layer, stored=""), _to_floats


def _trial(tensor: OutputTensor, path: Path, fd: int, backend: Backend) -> list[StepResult]:
    """What is left of a change in another form."""
    if isinstance(tensor, EncodedTensor):
        blocks = [block for block, is_measured in tensor.blocks(path, fd, 0, backend) if is_measured]
    else:
        blocks = list(tensor.blocks_from(0, path, fd, backend))
    return list(StatisticsByWeight(run_in_memory(path, fd, tensor, blocks)).results)


# --- The nodes of each form ---


def _kept(_: ir.Model, change: QuantisedChange) -> list[NewTensor]:
    shape = [int(size) for size in change.integers.shape.numpy()]
    return [NewTensor(change.value, change, change.kept(), change.integers.dtype, shape)]


def _rescale(model: ir.Model, change: QuantisedChange, bits: int) -> list[NewTensor]:
    """Let the nodes of a weight read integers of so many bits, with scales of their own and no zero points."""
    readers = list(change.value.uses())
    old = [
        readers[0][0].inputs[index] for index in (SCALES_OF_NBITS, ZEROS_OF_NBITS) if index < len(readers[0][0].inputs)
    ]
    scale = change.stored.tensors[1]
    scales = new_initializer(model, unused_name(f"{change.value.name}_scales", value_names(model)), scale)
    for node, _ in readers:
        node.attributes["bits"] = ir.AttrInt64("bits", bits)
        node.replace_input_with(SCALES_OF_NBITS, scales)
        if len(node.inputs) > ZEROS_OF_NBITS:
            node.replace_input_with(ZEROS_OF_NBITS, None)
    drop_unused(old)
    (rows, columns), size = change.stored.shape, change.stored.block_size
    shape = rows, -(-columns // size), size * bits // 8
    of_scales = [int(each) for each in scale.shape.numpy()]
    return [
        NewTensor(change.value, change, change.rescaled(bits), ir.DataType.UINT8, shape),
        NewTensor(scales, change, change.rescaled(bits, scales=True), scale.dtype, of_scales),
    ]


def _to_floats(model: ir.Model, change: QuantisedChange) -> list[NewTensor]:
    """Let the readers of a weight read floats, under its own name where that is not lost."""
    value, output, readers = change.value, change.floats(), list(change.value.uses())
    old_name, before = value.name or "", name_before_quantisation(value)
    name = change.name if change.name != old_name else before
    used = value_names(model)
    value.name = unused_name(f"{old_name}.integers", used)
    used.discard(old_name)
    floats = new_initializer(model, unused_name(name, used), change.integers)
    floats.metadata_props[PROMOTED_FROM] = old_name
    if change.is_turned:
        floats.metadata_props[FOLDED_FROM] = repr([name])
    old = [each for node, _ in readers for each in (*node.inputs[1:], node.inputs[0]) if each is not None]
    for node, _ in readers:
        if isinstance(change.stored, NBitsWeight):
            _replace_product(node, floats)
        else:
            ir.convenience.replace_all_uses_with(node.outputs[0], floats)
            assert node.graph is not None
            node.graph.remove(node, safe=True)
    drop_unused(old)
    return [NewTensor(floats, change, output, ir.DataType.from_numpy(output.dtype), change.stored.shape)]


def _replace_product(old: ir.Node, weight: ir.Value) -> None:
    """Put a Transpose and a MatMul, and an Add of the bias, in the place of a MatMulNBits."""
    graph, bias = old.graph, old.inputs[BIAS_OF_NBITS] if len(old.inputs) > BIAS_OF_NBITS else None
    assert graph is not None
    turned = ir.node("Transpose", [weight], {"perm": [1, 0]}, name=f"{old.name}_transposed")
    turned.outputs[0].name = f"{old.outputs[0].name}_weight"
    product = ir.node("MatMul", [old.inputs[0], turned.outputs[0]], name=old.name)
    product.metadata_props.update(old.metadata_props)
    nodes = [turned, product]
    if bias is not None:
        product.outputs[0].name = f"{old.outputs[0].name}_product"
        nodes.append(ir.node("Add", [product.outputs[0], bias], name=f"{old.name}_bias"))
    ir.convenience.replace_nodes_and_values(graph, old, [old], nodes, old.outputs, nodes[-1].outputs)
