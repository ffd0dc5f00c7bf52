"""The types of a program: torch's own numbers of dtypes, and the bytes of the tensors' members."""

from __future__ import annotations

import zipfile

import ml_dtypes  # noqa: F401 - NumPy knows bfloat16 by it
import numpy as np
import pytest
from torch._export.serde.schema import ScalarType

from lora_export.errors import InputRefused
from lora_export.models.pt2 import reader
from lora_export.models.pt2.program_types import DTYPES_BY_NUMBER, ITEM_BYTES

TORCH_NAMES = {
    "BYTE": "uint8", "CHAR": "int8", "SHORT": "int16", "INT": "int32", "LONG": "int64", "HALF": "float16",
    "FLOAT": "float32", "DOUBLE": "float64", "BOOL": "bool", "BFLOAT16": "bfloat16", "UINT16": "uint16",
}  # fmt: skip


def test_numbers_of_dtypes_are_torchs_own() -> None:
    ours = {number: name for number, name in DTYPES_BY_NUMBER.items() if name not in ("uint32", "uint64")}
    assert ours == {ScalarType[torchs].value: name for torchs, name in TORCH_NAMES.items()}


@pytest.mark.parametrize("name", DTYPES_BY_NUMBER.values())
def test_bytes_of_an_item_are_numpys(name: str) -> None:
    assert ITEM_BYTES[name] == np.dtype(name).itemsize


def test_members_of_all_tensors_are_read_and_their_checksums_verified(programs, tmp_path) -> None:
    path = programs.base("mlp")
    description = reader.read(path)
    members = description.read_members()
    assert members.keys() == {tensor.data.member for tensor in description.tensors}
    with zipfile.ZipFile(path) as file:
        stored = {name: file.read(name) for name in file.namelist()}
    for member, data in members.items():
        assert [bytes(data)] == [stored[name] for name in stored if name.endswith(f"/{member}")]
    largest = max(members.values(), key=len)
    content = path.read_bytes()
    damaged = content.replace(bytes(largest), bytes([largest[0] ^ 1]) + bytes(largest[1:]))
    assert damaged != content
    (tmp_path / "damaged.pt2").write_bytes(damaged)
    with pytest.raises(InputRefused):
        reader.read(tmp_path / "damaged.pt2").read_members()
