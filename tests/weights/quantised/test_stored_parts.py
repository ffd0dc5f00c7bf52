"""The stored tensors of a quantised weight: found in any file, read within bounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lora_export.errors import InputRefused
from lora_export.storage import safetensors_file
from lora_export.storage.safetensors_file import Entry
from lora_export.weights.quantised.stored_parts import QuantisedTensor, StoredParts, refuse_other_size


def parts_of(folder: Path) -> StoredParts:
    files = {"a.safetensors": {"x": np.uint8([1, 2])}, "b.safetensors": {"s": np.float32([0.5])}}
    for name, tensors in files.items():
        safetensors_file.write(folder / name, tensors)
    return StoredParts({name: safetensors_file.open_file(folder / name) for name in files})


def test_parts_are_found_in_any_file(tmp_path: Path) -> None:
    parts = parts_of(tmp_path)
    assert list(parts.names()) == ["x", "s"] and parts.find("y") is None
    found = parts.find("s")
    assert found is not None and found[0].path == tmp_path / "b.safetensors"
    assert parts.read("s", "x", "float32", most=1).tolist() == [0.5]


def test_part_that_does_not_fit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    parts = parts_of(tmp_path)
    with pytest.raises(InputRefused, match="x is quantised, and y, which belongs to it, is missing"):
        parts.read("y", "x", "float32")
    with pytest.raises(InputRefused, match="s: its dtype is float32, and x needs uint8 or int8"):
        parts.read("s", "x", "uint8", "int8")
    with pytest.raises(InputRefused, match="x: 2 elements, and w needs 1"):
        parts.read("x", "w", "uint8", most=1)
    with pytest.raises(InputRefused, match="x: the table has 2 elements, and the weight needs 3"):
        refuse_other_size("x", 2, 3, "the table")


def test_weight_has_the_bytes_of_its_packed_numbers() -> None:
    dtype = np.dtype(np.float16)
    tensor = QuantisedTensor("w", (4, 6), dtype, "w", (), "nf4", decode=lambda rows, packed: packed)
    entry = tensor.entry(Entry("w", np.dtype(np.uint8), (12, 1), 100, 112))
    assert entry == Entry("w", dtype, (4, 6), 100, 112) and entry.row_bytes == 3
