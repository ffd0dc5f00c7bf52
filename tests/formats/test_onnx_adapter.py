"""onnxruntime's adapter files: their contents, and what is refused before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import pytest

from lora_export.errors import InputRefused, OutputFailed
from lora_export.formats import onnx_adapter
from lora_export.formats.contract import AdapterPlace, Contract, HeadPlace, read_contract
from lora_export.provenance import CONTRACT_KEY, SLOTS_KEY
from lora_export.storage import hashes
from support.onnx_adapters import shortened

A, B = np.float32([[1, 2], [0, 1], [5, 0]]), np.float32([[1, 2, 3, 4], [0, 0, 1, 0]])
SLOTS = tuple(
    AdapterPlace(weight, a, b, (4, 3), "float32", "")
    for weight, a, b in [("m.weight", "a", "b"), ("n.weight", "c", "d")]
)
CONTRACT = Contract("ffffffff00", "00", SLOTS)


def a_file(path: Path, values: dict[str, Any], *, base: str = CONTRACT.base) -> Path:
    onnx_adapter.write(path, values, Contract(base, "", ()), sha256="12345678ab")
    return path


def test_onnxruntime_reads_the_written_file_with_both_fingerprints(tmp_path: Path) -> None:
    file = onnxruntime.AdapterFormat.read_adapter(str(a_file(tmp_path / "x.onnx_adapter", {"a": A, "b": B})))
    values = file.get_parameters()
    assert {name: value.numpy().tolist() for name, value in values.items()} == {"a": A.tolist(), "b": B.tolist()}
    assert (file.get_format_version(), file.get_model_version(), file.get_adapter_version()) == (
        1,
        0x7FFFFFFF,
        0x12345678,
    )
    assert (tmp_path / "x.onnx_adapter").read_bytes()[4:8] == b"TORT"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_dtype_reads_back_to_the_bit(tmp_path: Path, dtype: str) -> None:
    array = np.random.default_rng(0).standard_normal((3, 2)).astype(dtype)
    adapter = onnx_adapter.read(a_file(tmp_path / "x.onnx_adapter", {"a": array, "empty": array[:, :0]}))
    values = {name: onnx_adapter.array_of_ort_value(value) for name, value in adapter.values.items()}
    assert values["a"].dtype == array.dtype and values["a"].tobytes() == array.tobytes()
    assert values["empty"].shape == (3, 0)


def test_an_adapter_for_some_of_the_slots_is_accepted(tmp_path: Path) -> None:
    adapter = onnx_adapter.read(a_file(tmp_path / "x.onnx_adapter", {"a": A, "b": B}))
    assert set(adapter.values) == {"a", "b"} and len(CONTRACT.places) > 1
    onnx_adapter.refuse_misfits(adapter, CONTRACT, source="x", graph="g")  # raises for any misfit


@pytest.mark.parametrize(
    ("values", "misfit"),
    [
        ({"a": A, "b": B, "e": A}, "e: the graph has no such input for an adapter"),
        ({"a": A}, "b: missing, though a is present"),
        ({"b": B, "c": A, "d": B}, "a: missing, though b is present"),
        ({"a": A, "b": B.astype(np.float16)}, "b: tensor(float16), the graph takes float32"),
        ({"a": A.astype(ml_dtypes.bfloat16), "b": B}, "a: tensor(bfloat16), the graph takes float32"),
        ({"a": A, "b": B[:1]}, "a [3, 2] and b [1, 4]: the ranks disagree"),
        ({"a": A[:2], "b": B}, "a: [2, 2], the graph takes [3, rank]"),
        ({"a": A[:, 0], "b": B}, "a: [3], the graph takes [3, rank]"),
        ({"a": A, "b": B[:, :2]}, "b: [2, 2], the graph takes [rank, 4]"),
        ({}, "it is empty"),
    ],
)
def test_a_partial_or_foreign_adapter_is_refused(tmp_path: Path, values: dict[str, Any], misfit: str) -> None:
    adapter = onnx_adapter.read(a_file(tmp_path / "x.onnx_adapter", values))
    with pytest.raises(InputRefused) as refusal:
        onnx_adapter.refuse_misfits(adapter, CONTRACT, source="x.onnx_adapter", graph="g.onnx")
    assert f"\n  {misfit}\n" in str(refusal.value)
    assert str(refusal.value).startswith("x.onnx_adapter does not fit g.onnx:\n")


def test_all_misfits_are_listed_at_once_the_base_first(tmp_path: Path) -> None:
    adapter = onnx_adapter.read(a_file(tmp_path / "x.onnx_adapter", {"a": A, "z": A}, base="0000000100"))
    with pytest.raises(InputRefused) as refusal:
        onnx_adapter.refuse_misfits(adapter, CONTRACT, source="x", graph="g")
    assert str(refusal.value).splitlines()[1:-1] == [
        "  it was made for another base (fingerprint 1, the graph has 2147483647)",
        "  z: the graph has no such input for an adapter",
        "  b: missing, though a is present",
    ]


def with_false_sizes(data: bytes) -> bytes:
    """Claim 3000 rows for a tensor of 3."""
    dims = np.int64([3, 2]).tobytes()
    assert data.count(dims) == 1
    return data.replace(dims, np.int64([3000, 2]).tobytes())


@pytest.mark.parametrize(
    "damage", [shortened, with_false_sizes, lambda data: b"", lambda data: b"TORT" * 9, lambda data: data[8:]]
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = a_file(tmp_path / "x.onnx_adapter", {"a": A, "b": B})
    path.write_bytes(damage(path.read_bytes()[: -hashes.ENDING]))
    with pytest.raises(InputRefused, match=r"x.onnx_adapter is not an adapter in onnxruntime's format, or it is dam"):
        onnx_adapter.read(path)
    with pytest.raises(InputRefused, match="missing"):
        onnx_adapter.read(tmp_path / "missing")


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputFailed, match=r"could not be written: No such file or directory$"):
        a_file(tmp_path / "no" / "folder", {"a": A})
    with pytest.raises(OutputFailed, match=r"could not be written: No space left on device$"):
        a_file(Path("/dev/full"), {"a": A})
    monkeypatch.setattr(onnx_adapter, "LIMIT", 40)
    with pytest.raises(InputRefused, match="has 56 bytes"):
        a_file(tmp_path / "x", {"a": A, "b": B})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["first", "value", "name", "hash"])
def test_one_flipped_bit_is_refused(tmp_path: Path, place: str) -> None:
    path = a_file(tmp_path / "x.onnx_adapter", {"first": A, "b": B})
    data = bytearray(path.read_bytes())
    index = {"first": 0, "value": data.index(A.tobytes()), "name": data.index(b"first"), "hash": len(data) - 1}[place]
    data[index] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(InputRefused, match=r"x\.onnx_adapter is damaged: its contents are not those that were written"):
        onnx_adapter.read(path)


def a_file_of_onnxruntime(path: Path, values: dict[str, Any]) -> Path:
    """A file as onnxruntime writes it, without a hash."""
    file = onnxruntime.AdapterFormat()
    file.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in values.items()})
    file.export_adapter(str(path))
    return path


def test_files_of_other_tools_are_read_and_have_no_hash(tmp_path: Path) -> None:
    assert onnx_adapter.read(a_file(tmp_path / "own", {"a": A})).has_hash
    read = onnx_adapter.read(a_file_of_onnxruntime(tmp_path / "other", {"a": A}))
    assert not read.has_hash and read.values["a"].numpy().tolist() == A.tolist()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_and_counted(tmp_path: Path, dtype: str, value: float) -> None:
    bad = np.array([[1, value], [value, 0]], dtype)
    with pytest.raises(InputRefused, match=r"is refused:\n  a: 2 of 4 values are not finite \(NaN or infinity\)$"):
        onnx_adapter.read(a_file(tmp_path / "x.onnx_adapter", {"a": bad, "b": B.astype(dtype)}))


def test_onnxruntime_reads_a_file_with_a_hash(tmp_path: Path) -> None:
    path = a_file(tmp_path / "x.onnx_adapter", {"a": A, "b": B})
    onnxruntime.LoraAdapter().Load(str(path))
    values = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
    assert values.keys() == {"a", "b"}
    assert np.array_equal(values["a"].numpy(), A) and np.array_equal(values["b"].numpy(), B)


@pytest.mark.parametrize("max_rank", [-1, "4", 2.5])
def test_a_record_with_a_damaged_rank_is_refused(max_rank: Any) -> None:
    place = replace(SLOTS[0], max_rank=4)
    right = str(Contract("ffffffff00", "00", (place,), required=True))
    assert read_contract({CONTRACT_KEY: right}, "g").places == (place,)
    wrong = right.replace('"max_rank": 4', f'"max_rank": {json.dumps(max_rank)}')
    with pytest.raises(InputRefused, match="g: its record of adapter inputs"):
        read_contract({CONTRACT_KEY: wrong}, "g")


@pytest.mark.parametrize("dtype", ["float33", "int32", "object"])
@pytest.mark.parametrize("number", [1, 2, 3])  # of both places, and of the head
def test_a_record_with_another_type_is_refused(dtype: str, number: int) -> None:
    head = HeadPlace("h", "w", "b", "used", 4, 2, 2, "float32", ("y",), narrower=False)
    places = tuple(replace(place, max_rank=4) for place in SLOTS)
    right = Contract("ffffffff00", "00", places, required=True, slots=2, heads=(head,))
    assert read_contract({SLOTS_KEY: str(right)}, "g") == right
    dtypes = [dtype if place == number else "float32" for place in (1, 2, 3)]
    one, two, three = (replace(own, dtype=other) for own, other in zip(right.every_place, dtypes, strict=True))
    with pytest.raises(InputRefused, match="g: its record of adapter inputs"):
        read_contract({SLOTS_KEY: str(replace(right, places=(one, two), heads=(three,)))}, "g")


def test_a_record_with_half_a_character_is_refused() -> None:
    with pytest.raises(InputRefused, match="g: its record of adapter inputs"):
        read_contract({CONTRACT_KEY: '{"places": "\ud800"}'}, "g")
