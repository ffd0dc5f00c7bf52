"""A GGUF file as a base: its tensors under the names of transformers, for plans, merges and proofs.

A weight in blocks is a quantised weight whose packed bytes are those of its rows. The rows of some weights are in
llama.cpp's order: `in_stored_rows` puts a plan into it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export import provenance
from lora_export.errors import InputRefused
from lora_export.formats.gguf_architecture import config_of, is_adapter, names_of
from lora_export.names.families import EXPERT
from lora_export.names.llama_cpp import LlamaCppNames
from lora_export.names.row_orders import Indices
from lora_export.plan import Layout, Plan, Step, TensorSpec
from lora_export.plan.stored_region import StoredRegion
from lora_export.storage.block_copy import Bytes
from lora_export.storage.gguf_blocks import FLAT, as_tensor_file, codec_of, decoded
from lora_export.storage.gguf_file import BlockType, GgufFile, GgufTensor, open_gguf
from lora_export.weights.checkpoint import Checkpoint
from lora_export.weights.quantised.stored_parts import Decode, QuantisedTensor


@dataclass(frozen=True, eq=False)
class GgufBase:
    """A GGUF file of a model, and the same as a checkpoint of transformers."""

    file: GgufFile
    names: LlamaCppNames
    tensors: Mapping[str, GgufTensor]  # by the names that the checkpoint has for them, in the order of their bytes
    checkpoint: Checkpoint

    def in_stored_rows(self, plan: Plan) -> Plan:
        """The plan with everything that it changes in llama.cpp's order of rows.

        Raises InputRefused for a change that mixes rows, and for one that llama.cpp's norms do not express.
        """
        return replace(plan, steps=tuple(map(self._reordered, plan.steps)))

    def _reordered(self, step: Step) -> Step:
        is_norm = len(step.spec.shape) == 1 and step.weight.endswith("norm.weight")
        if is_norm and self.names.shifts_norms and step.shift is None:
            raise InputRefused(f"{step.weight}: llama.cpp stores this norm with 1 added, which is not supported")
        order = self.names.row_order(step.weight)
        if order is None:
            return step
        try:
            return _with_rows(step, order.indices(step.spec.shape[0], self.names.heads))
        except InputRefused as error:
            raise InputRefused(f"{step.weight}, whose rows llama.cpp stores in another order: {error}") from error


def _with_rows(step: Step, rows: Indices) -> Step:
    def taken(values: NDArray[Any] | None) -> NDArray[Any] | None:
        return None if values is None else values[rows]

    if step.token_rows is not None:
        raise InputRefused("rows that an adapter replaces are not supported here")
    terms = tuple(replace(term, pair=term.pair.part(rows, None)) for term in step.terms)
    return replace(step, terms=terms, shift=taken(step.shift), replace=taken(step.replace))


def open_base(path: Path) -> GgufBase:
    """Read the header of a GGUF file of a model. Reads no weights.

    Raises InputRefused as `open_gguf`, and for adapters, architectures and types that are not known.
    """
    file = open_gguf(path)
    if is_adapter(file):
        raise InputRefused(f"{path} is an adapter, and no model")
    names = names_of(file)
    tensors: dict[str, GgufTensor] = {}
    for tensor in file.tensors:  # by its own name where transformers has no such tensor, and where two would be one
        name = names.of_transformers(tensor.name) or tensor.name
        tensors[tensor.name if name in tensors else name] = tensor
    return GgufBase(file, names, tensors, _checkpoint(file, tensors))


def _checkpoint(file: GgufFile, tensors: Mapping[str, GgufTensor]) -> Checkpoint:
    record = file.value(provenance.KEY)
    metadata = {provenance.KEY: record} if isinstance(record, str) else {}
    return Checkpoint(
        path=file.path,
        shards={file.path.name: as_tensor_file(file, tensors, metadata)},
        specs=tuple(spec for name, tensor in tensors.items() for spec in _specs(file.path.name, name, tensor)),
        config=config_of(file),
        history=provenance.read_history(record, file.path) if isinstance(record, str) else (),
        quantised={name: _quantised(name, one) for name, one in tensors.items() if one.type not in FLAT},
        takes_more=False,
    )


def _specs(file: str, name: str, tensor: GgufTensor) -> Iterator[TensorSpec]:
    """A tensor, and the weight of each expert that it stacks, as transformers' files name these."""
    stack = TensorSpec(
        name=name,
        shape=tensor.shape,
        dtype=str(FLAT.get(tensor.type, np.dtype(np.float32))),
        layout=(Layout.OTHER, Layout.MATRIX, Layout.OUT_IN, Layout.OUT_IN)[len(tensor.shape) - 1],
        file=file,
        nbytes=tensor.stop - tensor.start,
    )
    yield stack
    if EXPERT not in name or len(tensor.shape) != 3:
        return
    count, rows, columns = tensor.shape
    for number in range(count):
        own = slice(number * rows, (number + 1) * rows)
        yield replace(
            stack,
            name=name.replace(EXPERT, str(number)),
            shape=(rows, columns),
            layout=Layout.MATRIX,
            nbytes=stack.nbytes // count,
            region=StoredRegion(name, (count * rows, columns), own, written=str(number)),
        )


def _quantised(name: str, tensor: GgufTensor) -> QuantisedTensor:
    return QuantisedTensor(
        name=name,
        shape=tensor.shape,
        dtype=np.dtype(np.float32),
        packed=name,
        parts=(),
        scheme=tensor.type.name,
        load=functools.partial(_decoder, name, tensor.type),
    )


def _decoder(name: str, kind: BlockType) -> Decode:
    codec = codec_of(name, kind)

    def decode(rows: slice, packed: Bytes) -> NDArray[Any]:
        return decoded(name, codec, packed.reshape(-1, kind.nbytes)).reshape(rows.stop - rows.start, -1)

    return decode
