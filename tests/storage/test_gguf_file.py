"""Headers of GGUF files: as the package gguf reads them, and what a hostile one may not do."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from lora_export.errors import InputRefused
from lora_export.isolation.limits import MAX_GGUF_ENTRIES, MAX_GGUF_HEADER
from lora_export.storage import gguf_file
from lora_export.storage.gguf_file import BLOCK_TYPES, BY_NAME, gguf_layout, is_gguf, open_gguf
from support.gguf_files import Kind, values_of, write_llama


def number(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str) -> bytes:
    return number(len(value)) + value.encode()


def field(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str = "t", sizes: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def header(
    *parts: bytes, tensors: int = 0, fields: int = 0, version: int = 3, alignment: int = 32, data: int = 0
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + b"".join(parts)
    return head + bytes(-len(head) % alignment + data)


def test_sizes_of_types_are_those_of_gguf() -> None:
    ours = {one.number: (one.name, one.elements, one.nbytes) for one in BLOCK_TYPES.values()}
    assert ours == {kind.value: (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}


@pytest.mark.parametrize("alignment", [32, 64])
def test_fields_and_tensors_are_those_that_gguf_reads(tmp_path: Path, alignment: int) -> None:
    def fields(writer: gguf.GGUFWriter) -> None:
        writer.add_custom_alignment(alignment)
        writer.add_name("mine")
        writer.add_float32("f", 0.5)
        writer.add_bool("b", val=True)
        writer.add_int16("i", -7)
        writer.add_array("a", [1, 2])

    path = write_llama(tmp_path / "a.gguf", lambda name: Kind.Q8_0 if "mlp" in name else Kind.F16, fields=fields)
    ours, theirs = open_gguf(path), gguf.GGUFReader(path)
    assert [(one.name, one.type.number, one.shape, one.start, one.stop - one.start) for one in ours.tensors] == [
        (t.name, t.tensor_type, tuple(t.shape[::-1]), t.data_offset, t.n_bytes) for t in theirs.tensors
    ]
    assert list(ours.fields) == [key for key in theirs.fields if not key.startswith("GGUF.")]
    for key, value in theirs.fields.items():
        if not key.startswith("GGUF.") and value.types[0] != gguf.GGUFValueType.ARRAY:
            assert ours.value(key) == value.contents()
    assert (ours.value("a", "no number"), ours.value("absent", 3)) == ("no number", 3)
    assert (ours.alignment, is_gguf(path), is_gguf(tmp_path)) == (alignment, True, False)


def test_a_layout_keeps_fields_and_places_tensors(tmp_path: Path) -> None:
    base = open_gguf(write_llama(tmp_path / "a.gguf", Kind.Q4_0))
    wanted = [(one.name, BY_NAME["Q8_0"] if one.type.name == "Q4_0" else one.type, one.shape) for one in base.tensors]
    head, tensors = gguf_layout(base, wanted, {"mine": "é"})
    (tmp_path / "b.gguf").write_bytes(head + bytes(tensors[-1].stop - len(head)))
    again = open_gguf(tmp_path / "b.gguf")
    assert (again.tensors, again.value("mine")) == (tuple(tensors), "é")
    assert list(again.fields) == [*base.fields, "mine"]
    assert values_of(tmp_path / "b.gguf").keys() == {one.name for one in base.tensors}
    replaced, _ = gguf_layout(again, wanted, {"mine": "e"})
    assert len(replaced) == len(head)  # the one character less is in the padding
    assert gguf_file.BY_NAME["F32"] in {kind for _, kind, _ in wanted}


HUGE = 1 << 62
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "beyond 0 bytes"),
    "another format": (lambda: b"GGML" + bytes(60), "does not begin with GGUF"),
    "old version": (lambda: header(version=1), "of version 1, which is not supported"),
    "big endian": (lambda: header(version=3 << 24), "in big-endian order, which is not supported"),
    "many tensors": (lambda: header(tensors=HUGE), "should have 4,611,686,018,427,387,904 tensors"),
    "many fields": (lambda: header(fields=MAX_GGUF_ENTRIES + 1), "should have 100,001 fields"),
    "fields that are missing": (lambda: header(fields=MAX_GGUF_ENTRIES), "header goes beyond 32 bytes"),
    "a long key": (lambda: header(number(HUGE), fields=1), "name of a field should have 4,611,"),
    "a long text": (lambda: header(field("k", 8, number(HUGE)), fields=1), "header goes beyond"),
    "a long array": (lambda: header(field("k", 9, struct.pack("<IQ", 12, HUGE)), fields=1), "header goes beyond"),
    "many texts": (lambda: header(field("k", 9, struct.pack("<IQ", 8, HUGE)), fields=1), "texts"),
    "a long text in an array": (
        lambda: header(field("k", 9, struct.pack("<IQQ", 8, 1, HUGE)), fields=1, data=64),
        "header goes beyond",
    ),
    "an array of arrays": (lambda: header(field("k", 9, struct.pack("<IQ", 9, 1)), fields=1), "unknown type 9"),
    "an unknown value": (lambda: header(field("k", 13, b""), fields=1), "'k' has the unknown type 13"),
    "a field twice": (lambda: header(field("k", 0, b"0"), field("k", 0, b"0"), fields=2), "the field 'k' twice"),
    "a key that is no text": (lambda: header(number(1) + b"\xff" + bytes(20), fields=1), "is not UTF-8"),
    "an odd alignment": (lambda: header(field("general.alignment", 4, b"\x03\0\0\0"), fields=1), "no power of two"),
    "an alignment of 0": (lambda: header(field("general.alignment", 4, bytes(4)), fields=1), "no power of two"),
    "one part": (lambda: header(field("split.count", 2, b"\x02\0"), fields=1), "llama-gguf-split"),
    "no dimensions": (lambda: header(tensor(sizes=()), tensors=1), "has 0 dimensions"),
    "many dimensions": (lambda: header(tensor(sizes=(1,) * 5), tensors=1, data=4), "has 5 dimensions"),
    "a size of 0": (lambda: header(tensor(sizes=(0,)), tensors=1), r"cannot have the shape [0]"),
    "a size beyond all files": (lambda: header(tensor(sizes=(HUGE, HUGE)), tensors=1), "cannot have the shape"),
    "rows that are no blocks": (lambda: header(tensor(sizes=(33,), kind=8), tensors=1, data=96), "blocks of 32"),
    "an unknown block": (lambda: header(tensor(kind=5), tensors=1, data=128), "has the unknown type 5"),
    "a tensor beyond the end": (lambda: header(tensor(), tensors=1, data=100), "goes beyond its"),
    "tensors that overlap": (
        lambda: header(tensor("a"), tensor("b"), tensors=2, data=256),
        "'b' is stored at 0, and 128 is the next place",
    ),
    "a hole": (lambda: header(tensor(offset=32), tensors=1, data=160), "'t' is stored at 32, and 0 is the next place"),
    "a tensor twice": (lambda: header(tensor(), tensor(offset=128), tensors=2, data=256), "the tensor 't' twice"),
    "bytes at the end": (lambda: header(tensor(), tensors=1, data=129), "its tensors end at"),
    "a name that steers the terminal": (lambda: header(tensor("\x1b[2J"), tensors=1, data=128), "control characters"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused_in_little_memory(tmp_path: Path, name: str) -> None:
    make, message = HOSTILE[name]
    (path := tmp_path / "a.gguf").write_bytes(make())
    tracemalloc.start()
    with pytest.raises(InputRefused) as refused:
        open_gguf(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message in str(refused.value) and str(path) in str(refused.value)
    assert peak < 1 << 20


def test_a_header_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    (path := tmp_path / "a.gguf").write_bytes(header(field("k", 8, number(MAX_GGUF_HEADER)), fields=1))
    with path.open("r+b") as file:
        file.truncate(8 << 30)  # holes, without bytes on the disk
    with pytest.raises(InputRefused) as refused:
        open_gguf(path)
    assert "header goes beyond the 134,217,728 bytes that one may take" in str(refused.value)


def test_a_file_that_becomes_shorter_is_refused(tmp_path: Path) -> None:
    found = open_gguf(write_llama(tmp_path / "a.gguf"))
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputRefused) as refused:
        found.value("general.architecture")
    assert "became shorter while it was being read" in str(refused.value)
    with pytest.raises(InputRefused) as refused:
        gguf_layout(found, [], {})
    assert "became shorter while it was being read" in str(refused.value)
