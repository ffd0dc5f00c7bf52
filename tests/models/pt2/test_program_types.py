"""The types of a program, and checks of the fields of its JSON."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - NumPy knows bfloat16 by it
import numpy as np
import pytest
from torch._export.serde.schema import ScalarType

from fuzz.targets import run
from lora_export.errors import InputRefused
from lora_export.models.pt2 import program, reader
from lora_export.models.pt2.graph_json import DTYPES_BY_NUMBER, ITEM_BYTES
from support.hostile_programs import changed, refused
from support.programs import ids, padded, rewritten

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


EXPRESSIONS = [
    "__import__('os').system('touch payload-ran')",
    "Symbol('s0').__class__",
    "Symbol('s0', positive=open('payload-ran', 'w'))",
    "[].__class__.__base__.__subclasses__()",
    "9**9**9**9",
    "Integer(" * 500 + "1" + ")" * 500,
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_size_that_is_an_expression_is_not_evaluated(
    good: Path, tmp_path: Path, expression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def change(graph: dict[str, Any]) -> None:
        for tensor in graph["graph_module"]["graph"]["tensor_values"].values():
            for size in tensor["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = expression

    path = changed(good, tmp_path, change)
    code, _, message = run("verify", path, "--model", path)
    assert code == 3 and "is computed from others" in message
    module = program.load_program(path)  # a candidate runs: the program computes its own sizes, and reads no expression
    assert module(ids=ids(3, 4) % 10, mask=padded(3, 4)).shape == (3, 4)
    assert not (tmp_path / "payload-ran").exists()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"{" + b'"a":{' * 50_000, "is not JSON"),
        (b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}", "deep"),
        (b'{"a": 1, "a": 2}', "more than once"),
        (b'{"a": [' + b"{}," * 1_000_000 + b"{}]}", "more than 1,000,000 objects"),
        (b"[]", "is not a JSON object"),
        (b"\xff\xfe{}", "is not JSON"),
    ],
)
def test_malformed_or_huge_json_is_refused_quickly(good: Path, tmp_path: Path, text: bytes, problem: str) -> None:
    assert problem in refused(rewritten(good, tmp_path / "evil.pt2", {"models/model.json": text}))
