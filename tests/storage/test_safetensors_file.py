"""safetensors files as ranges of bytes: damaged files are refused at once, whole files read back."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from lora_export.errors import EnvironmentLacking, InputRefused
from lora_export.storage import safetensors_file, store_file
from lora_export.storage.object_store import Bucket
from support.handmade import raw_tensor_file

TENSORS = {
    "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.array([1, -2, 0.5], np.float16),
    "brain": np.array([[1.5], [-256]], ml_dtypes.bfloat16),
    "double": np.array([np.pi]),
    "numbers": np.arange(3, dtype=np.int64),
    "scalar": np.array(7, np.int32),
    "empty": np.zeros((0, 4), np.float32),
    "mask": np.array([True, False]),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refusal(path: Path) -> str:
    with pytest.raises(InputRefused) as refused:
        safetensors_file.open_file(path)
    message = str(refused.value)
    assert str(path) in message
    return message.replace(str(path), "FILE")


# --- Round trips with the safetensors library ---


def same(one: np.ndarray, other: np.ndarray) -> bool:
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def test_files_of_the_library_are_read(path):
    safetensors.numpy.save_file(TENSORS, path, metadata={"made by": "the library"})
    file = safetensors_file.open_file(path)
    assert file.entries.keys() == TENSORS.keys()
    assert all(same(file.read(name), tensor) for name, tensor in TENSORS.items())
    assert file.metadata == {"made by": "the library"}


def test_the_library_reads_written_files(path):
    strided = TENSORS | {"matrix": TENSORS["matrix"].T}
    safetensors_file.write(path, strided, {"made by": "us"})
    read = safetensors.numpy.load_file(path)
    assert read.keys() == strided.keys()
    assert all(same(read[name], tensor) for name, tensor in strided.items())
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"made by": "us"}


def test_torch_reads_written_bfloat16(path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    safetensors_file.write(path, {"brain": TENSORS["brain"]})
    assert torch.equal(load_file(path)["brain"], torch.tensor([[1.5], [-256]], dtype=torch.bfloat16))


def test_entries_come_in_the_order_of_their_bytes(path):
    raw_tensor_file(path, {"late": entry([1], 8, 12), "early": entry([2], 0, 8)}, struct.pack("<3f", 1, 2, 3))
    file = safetensors_file.open_file(path)
    assert list(file.entries) == ["early", "late"]
    content = path.read_bytes()
    late = file.entries["late"]
    assert content[late.start : late.stop] == struct.pack("<f", 3)
    assert file.size == len(content)


def test_data_starts_at_a_multiple_of_eight_bytes(path):
    for length in range(1, 10):
        safetensors_file.write(path, {"n" * length: np.ones(1, np.float32)})
        assert safetensors_file.open_file(path).entries["n" * length].start % 8 == 0


def test_a_file_without_tensors_is_read(path):
    safetensors_file.write(path, {})
    file = safetensors_file.open_file(path)
    assert not file.entries and file.data_start == file.size


def test_metadata_that_is_null_is_none(path):
    """MLX writes `"__metadata__": null`, which the library reads."""
    header = {"__metadata__": None, "x": entry([1], 0, 4)}
    raw_tensor_file(path, header, struct.pack("<f", 1))
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata() is None
    assert safetensors_file.open_file(path).metadata == {}
    content = path.read_bytes()
    assert safetensors_file.file_of_header(path, content[:-4], len(content)).metadata == {}


# --- Damage ---


def test_a_file_cut_within_its_header_is_refused(path):
    safetensors_file.write(path, {"x": np.zeros(8, np.float32)})
    os.truncate(path, 20)
    assert "cut short: its header should have 56 bytes, the file has 20" in refusal(path)


@pytest.mark.parametrize("size", [0, 7])
def test_a_file_shorter_than_its_length_field_is_refused(path, size):
    path.write_bytes(b"\0" * size)
    assert refusal(path) == f"FILE is not a safetensors file: it has only {size} bytes"


def test_bytes_after_the_last_tensor_are_refused(path):
    raw_tensor_file(path, {"x": entry([1], 0, 4)}, b"\0" * 5)
    assert "is too long" in refusal(path)


def test_a_header_beyond_the_formats_limit_is_refused_in_any_file(path):
    raw_tensor_file(path, {}, length=100_000_001)
    os.truncate(path, 200_000_000)  # a sparse file
    assert "its header should have 100000001 bytes, the file has 200000000" in refusal(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "the header of FILE is not JSON"),
        (b"not json", "the header of FILE is not JSON"),
        (b"\xff\xfe\xfd", "the header of FILE is not JSON"),
        (b"[" * 100_000, "the header of FILE is not JSON"),
        (b"[]", "the header of FILE is not a JSON object"),
        (b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "shape": [1]}}', "shape more than once"),
        ({"x": entry([1], 0, 4, "F99")}, "FILE: x has the unknown dtype 'F99'"),
        ({"x": {**entry([1], 0, 4), "dtype": ["F32"]}}, "entry for x is malformed"),
        ({"x": "F32"}, "entry for x is malformed"),
        ({"x": {"dtype": "F32"}}, "entry for x is malformed"),
        ({"x": {**entry([1], 0, 4), "data_offsets": [0, 4, 8]}}, "entry for x is malformed"),
        ({"x": {**entry([1], 0, 4), "shape": 1}}, "entry for x is malformed"),
        ({"x": {**entry([1], 0, 4), "shape": {}}}, "FILE: "),
        ({"x": entry([-1], 0, 4)}, "x has a size that is not a non-negative integer"),
        ({"x": {**entry([1], 0, 4), "shape": [1.0]}}, "x has a size that is not a non-negative integer"),
        ({"x": entry([True], 0, 4)}, "x has a size that is not a non-negative integer"),
        ({"x": entry([2], 0, 4)}, r"x (2,) float32 needs 8 bytes, its range has 4"),
        ({"x": entry([1], 4, 0)}, r"x (1,) float32 needs 4 bytes, its range has -4"),
        ({"x": entry([2**40, 2**40], 0, 4)}, "needs 4835703278458516698824704 bytes"),
        ({"x": entry([1], 0, 4), "y": entry([1], 2, 6)}, "y overlaps the tensor before it"),
        ({"x": entry([1], 0, 4), "y": entry([1], 0, 4)}, "y overlaps the tensor before it"),
        ({"x": entry([1], 4, 8)}, "x leaves a hole before it"),
        ({"__metadata__": [], "x": entry([1], 0, 4)}, "__metadata__ must map names to strings"),
        ({"__metadata__": {"a": 1}, "x": entry([1], 0, 4)}, "__metadata__ must map names to strings"),
    ],
)
def test_a_malformed_header_is_refused(path, header, message):
    raw_tensor_file(path, header, b"\0" * 4)
    assert message in refusal(path)


def test_a_duplicate_name_is_refused_though_the_library_accepts_it(path):
    twice = json.dumps(entry([1], 0, 4))
    raw_tensor_file(path, f'{{"x": {twice}, "x": {twice}}}'.encode(), b"\0" * 4)
    assert safetensors.numpy.load_file(path).keys() == {"x"}
    assert refusal(path) == "the header of FILE names x more than once"


def test_what_only_the_library_refuses_is_refused_in_its_words(path):
    raw_tensor_file(path, {"x": {**entry([1], 0, 4), "shape": {}}}, b"\0" * 4)
    assert "invalid type: map, expected a sequence" in refusal(path)


# --- Files that are not regular ---


def test_dangling_links_are_refused(path):
    path.symlink_to("nowhere")
    assert refusal(path) == "FILE is a symbolic link to nowhere, which does not exist"


# --- Files that change after they were opened ---


def test_a_file_that_became_shorter_is_refused(path):
    safetensors_file.write(path, {"x": np.zeros(8, np.float32)})
    file = safetensors_file.open_file(path)
    os.truncate(path, file.size - 1)
    with pytest.raises(InputRefused, match="became shorter while x was read"):
        file.read("x")


@pytest.fixture
def requested(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each request of an object so far."""
    sizes, read = list[int](), Bucket.read

    def recorded(bucket: Bucket, key: str, start: int, stop: int) -> memoryview:
        sizes.append(stop - start)
        return read(bucket, key, start, stop)

    monkeypatch.setattr(Bucket, "read", recorded)
    return sizes


@pytest.mark.parametrize(("step", "most"), [(1, 23), (7, 42)])
def test_tensors_of_an_object_are_requested_once(
    path, stored, requested, monkeypatch: pytest.MonkeyPatch, step: int, most: int
) -> None:
    """In the order of the file by the chunks of it; in another order each by its own request."""
    monkeypatch.setattr(store_file, "CHUNK", 1 << 18)
    tensors = {f"t{number:02}": np.full(30_000, number, np.float32) for number in range(40)}
    safetensors_file.write(path, tensors)
    stored.put("model.safetensors", path.read_bytes())
    file = safetensors_file.open_file(stored / "model.safetensors")
    for number in range(40):
        name = f"t{number * step % 40:02}"
        assert same(file.read(name), tensors[name])
    assert len(requested) <= most and sum(requested) < 1.1 * file.size


@pytest.mark.parametrize("failures", [1, 4])
def test_an_object_is_read_again_after_a_failure(path, stored, monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    """Also where the requests of chunks that are read ahead fail."""
    monkeypatch.setattr(store_file, "CHUNK", 1 << 18)
    tensors = {f"t{number:02}": np.full(30_000, number, np.float32) for number in range(12)}
    safetensors_file.write(path, tensors)
    stored.put("model.safetensors", path.read_bytes())
    file, read, failed = safetensors_file.open_file(stored / "model.safetensors"), Bucket.read, list[int]()

    def fail(bucket: Bucket, key: str, start: int, stop: int) -> memoryview:
        if start > 1 << 17 and len(failed) < failures:
            failed.append(start)
            raise EnvironmentLacking("the store did not answer")
        return read(bucket, key, start, stop)

    monkeypatch.setattr(Bucket, "read", fail)
    with pytest.raises(EnvironmentLacking):
        for name in (names := iter(tensors)):
            file.read(name)
    monkeypatch.setattr(Bucket, "read", read)
    assert all(same(file.read(again), tensors[again]) for again in (name, *names))
    assert safetensors_file._opened_object.cache_info().currsize == 0  # nothing of it is kept after its last tensor


def test_another_object_in_its_place_is_read_anew(path, stored) -> None:
    for value in (1, 2):
        safetensors_file.write(path, {name: np.full(100_000, value, np.float32) for name in "xy"})
        stored.put("model.safetensors", path.read_bytes())
        file = safetensors_file.open_file((stored / "model.safetensors").newly())
        assert all((file.read(name) == value).all() for name in "xyxy")


def test_a_changed_or_removed_file_is_detected(path):
    safetensors_file.write(path, {"x": np.zeros(8, np.float32)})
    file = safetensors_file.open_file(path)
    assert file.unchanged()
    os.utime(path, ns=(0, file.mtime_ns + 1))
    assert not file.unchanged()
    os.utime(path, ns=(0, file.mtime_ns))
    assert file.unchanged()
    os.truncate(path, file.size + 1)
    os.utime(path, ns=(0, file.mtime_ns))
    assert not file.unchanged()
    path.unlink()
    assert not file.unchanged()


@pytest.mark.fault(24)
@pytest.mark.parametrize("shape", [[0, 2**63], [0, 2**62, 4], [2**32, 0, 2**40], [1] * 65, [2**62] * 300_000])
def test_shapes_that_no_array_can_have_are_refused(tmp_path, shape):
    size = 0 if 0 in shape else 4
    header = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}
    path = raw_tensor_file(tmp_path / "a.safetensors", header, bytes(size))
    with pytest.raises(InputRefused, match=f"{path}: a has the shape .*, which no array can have"):
        safetensors_file.open_file(path)


@pytest.mark.fault(40)
def test_names_with_control_characters_are_refused_in_one_line(path):
    raw_tensor_file(path, {"x\nnote: all is well": entry([1], 0, 4, "F9")}, bytes(4))
    assert "names with control characters" in refusal(path) and "\n" not in refusal(path)
