"""The tensors that a quantised weight is stored in: the packed numbers, their scales, and what describes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.storage.block_copy import Bytes
from lora_export.storage.safetensors_file import Entry, TensorFile

# (rows, the packed bytes of these rows) -> these rows of the weight, in its float dtype
Decode = Callable[[slice, Bytes], NDArray[Any]]


@dataclass(frozen=True, eq=False)
class QuantisedTensor:
    """A weight that is stored as packed numbers with scales."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]  # a float: what the weight becomes
    packed: str  # the stored tensor with its numbers, row after row
    parts: tuple[str, ...]  # all other stored tensors that belong to it
    scheme: str  # such as nf4
    decode: Decode

    def entry(self, packed: Entry) -> Entry:
        """The weight as a tensor of the file that has its packed numbers: their bytes, its shape and dtype."""
        return Entry(self.name, self.dtype, self.shape, packed.start, packed.stop)


@dataclass(frozen=True, eq=False)
class StoredParts:
    """All stored tensors of a checkpoint. The parts of one weight may be in several files."""

    shards: Mapping[str, TensorFile]

    def names(self) -> Iterator[str]:
        for shard in self.shards.values():
            yield from shard.entries

    def find(self, name: str) -> tuple[TensorFile, Entry] | None:
        """The file and the entry of a stored tensor; None where there is none."""
        for shard in self.shards.values():
            if name in shard.entries:
                return shard, shard.entries[name]
        return None

    def read(self, name: str, weight: str, *dtypes: str, most: int | None = None) -> NDArray[Any]:
        """Read a part of a weight. `most` is the largest number of its elements.

        Raises InputRefused where it is missing, larger, or of none of these dtypes.
        """
        found = self.find(name)
        if found is None:
            raise InputRefused(f"{weight} is quantised, and {name}, which belongs to it, is missing")
        shard, entry = found
        if str(entry.dtype) not in dtypes:
            raise InputRefused(f"{name}: its dtype is {entry.dtype}, and {weight} needs {' or '.join(dtypes)}")
        if most is not None and entry.nbytes > most * entry.dtype.itemsize:
            raise InputRefused(f"{name}: {entry.nbytes // entry.dtype.itemsize} elements, and {weight} needs {most}")
        return shard.read(name)


def refuse_other_size(name: str, found: int, expected: int, what: str) -> None:
    """Raise InputRefused where a part has another number of elements than the weight needs."""
    if found != expected:
        raise InputRefused(f"{name}: {what} has {found} elements, and the weight needs {expected}")
