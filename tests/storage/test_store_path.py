"""Paths of objects do what paths of files do, and read the object that was planned."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lora_export.errors import EnvironmentLacking, InputRefused, OutputFailed
from lora_export.storage import block_copy, input_files, store_file
from lora_export.storage.store_path import StorePath, copy_in_store, newly_opened, place

if TYPE_CHECKING:
    from support.stores import Stored

TREE = {"config.json": b'{"a": 1}', "model.safetensors": b"12345678", "1_Pooling/config.json": b"{}", "empty": b""}


def both(stored: Stored, folder: Path) -> tuple[Path, Path]:
    """The same tree on the disk and in a store."""
    for name, content in TREE.items():
        (folder / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "m" / name).write_bytes(content)
    stored.put("m", folder / "m")
    stored.put("m.other", b"not in the folder")
    return folder / "m", stored / "m"


def names(paths: Any, root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in paths)


ANSWERS: dict[str, Callable[[Path], Any]] = {
    "kinds": lambda root: [
        (each.exists(), each.is_file(), each.is_dir(), each.is_symlink())
        for each in (root, root / "config.json", root / "1_Pooling", root / "none", root / "none/none")
    ],
    "iterdir": lambda root: names(root.iterdir(), root),
    "glob": lambda root: [names(root.glob(pattern), root) for pattern in ("*.json", "*", "*/*.json", "none*")],
    "rglob": lambda root: [names(root.rglob(pattern), root) for pattern in ("*", "config.json")],
    "parts": lambda root: [
        (each.name, each.suffix, each.stem, each.parent.name, each.with_suffix(".b").name, each.with_name("c").name)
        for each in (root / "model.safetensors", root / "a" / "b.tar")
    ],
    "texts": lambda root: [(root / "config.json").read_text(), (root / "empty").read_bytes()],
    "sizes": lambda root: [path.stat().st_size for path in sorted(root.rglob("*.json"))],
    "files_of": lambda root: names(input_files.files_of(root), root),
    "inside": lambda root: (root / "a/b").is_relative_to(root) and not root.is_relative_to(root / "a"),
    "same": lambda root: ((root / "a").parent == root, root.samefile(root), (root / "a").resolve() == root / "a"),
}


@pytest.mark.parametrize("question", ANSWERS)
def test_a_tree_in_a_store_answers_as_on_the_disk(stored: Stored, tmp_path: Path, question: str) -> None:
    on_disk, in_store = both(stored, tmp_path)
    assert ANSWERS[question](in_store) == ANSWERS[question](on_disk)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("s3://KEY:SECRET@bucket/x", "must have no user name"),
        ("gs://user@bucket", "must have no user name"),
        ("s3://", "is no address"),
        ("s3:///key", "is no address"),
        ("s3://bucket/../other", "is no address"),
        ("S3://bucket/x", "is no address"),
        ("https://KEY:SECRET@host/v1", "begins with s3://, .* and not with https://"),
        ("file:///etc/x", "not with file://"),
    ],
)
def test_a_wrong_address_is_refused_without_its_secret(text: str, reason: str) -> None:
    with pytest.raises(InputRefused, match=reason) as refused:
        place(text)
    assert "SECRET" not in str(refused.value)


@pytest.mark.parametrize("text", ["s3:/local", "folder/s3://x", "https:/host/v1", "C:/x", "C://x"])
def test_other_texts_are_paths(text: str) -> None:
    assert place(text) == Path(text) and not isinstance(place(text), StorePath)


@pytest.mark.parametrize(("given", "named"), [(b"base", "bytes"), (None, "NoneType"), (3, "int")])
def test_another_type_is_no_path(given: object, named: str) -> None:
    with pytest.raises(InputRefused, match=f"a path is a text or a Path, and not of the type {named}"):
        place(given)


def test_the_address_stays_what_was_written() -> None:
    path = place("s3://bucket/a/b.c")
    shown = [str(path), str(path.parent.parent), str(path / "d"), f"{path.relative_to(path.parent)}"]
    assert shown == ["s3://bucket/a/b.c", "s3://bucket", "s3://bucket/a/b.c/d", "b.c"]


def test_what_needs_the_disk_is_refused_by_name() -> None:
    with pytest.raises(InputRefused, match=r"s3://bucket/a is in a store, and this needs a file or folder"):
        os.stat(place("s3://bucket/a"))  # noqa: PTH116 - what libraries do


def test_threads_read_any_range_in_few_requests(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_file, "CHUNK", 1000)
    content = np.random.default_rng(0).integers(0, 256, 20_500, np.uint8)
    stored.put("big", content.tobytes())
    path, requests = stored / "big", []
    read = path.bucket.read
    monkeypatch.setattr(path.bucket, "read", lambda *given: requests.append(given) or read(*given))
    found = np.zeros_like(content)
    with path.open("rb") as file, ThreadPoolExecutor(3) as pool:

        def fill(start: int) -> None:
            block_copy.read(path, file.fileno(), found[start : start + 250], start)

        list(pool.map(fill, range(0, len(content), 250)))
    assert np.array_equal(found, content) and len(requests) == 21


def test_a_chunk_that_failed_is_requested_again(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    stored.put("a", b"content")
    path, failures = stored / "a", [EnvironmentLacking("the store did not answer")]
    read, buffer = path.bucket.read, np.zeros(7, np.uint8)

    def fail_once(*given: Any) -> memoryview:
        if failures:
            raise failures.pop()
        return read(*given)

    with path.open("rb") as file:
        monkeypatch.setattr(path.bucket, "read", fail_once)
        with pytest.raises(EnvironmentLacking):
            block_copy.read(path, file.fileno(), buffer, 0)
        block_copy.read(path, file.fileno(), buffer, 0)
    assert buffer.tobytes() == b"content"


def test_an_object_that_changes_after_it_was_listed_is_refused(stored: Stored) -> None:
    stored.put("m/a", b"first")
    path = newly_opened(str(stored / "m"))
    assert [each.name for each in path.iterdir()] == ["a"]
    stored.put("m/a", b"other")
    with pytest.raises(InputRefused, match=r"m/a changed while it was being read"):
        (path / "a").read_bytes()
    assert (newly_opened(str(stored / "m")) / "a").read_bytes() == b"other"


def test_a_copy_of_another_object_than_planned_is_refused(stored: Stored) -> None:
    stored.put("a", b"first")
    path = stored / "a"
    assert copy_in_store(path, stored / "b") is path.exists() is True and stored.get("b") == b"first"
    stored.put("a", b"other")
    with pytest.raises(InputRefused, match="changed"):
        copy_in_store(path, stored / "c")


@pytest.mark.usefixtures("small_parts")
def test_blocks_in_any_order_become_the_object(stored: Stored) -> None:
    content = np.random.default_rng(0).integers(0, 256, 13 << 9, np.uint8)  # more than one part of an upload
    cuts = [0, 100, 5 << 9, 9 << 9, len(content)]
    pieces = [slice(first, last) for first, last in itertools.pairwise(cuts)]
    with (stored / "big").open("xb") as file:
        for piece in (pieces[0], pieces[3], pieces[2], pieces[1]):
            block_copy.write(file.fileno(), content[piece].data, piece.start)
    assert stored.get("big") == content.tobytes() and (stored / "big").stat().st_size == len(content)


def test_memory_that_is_used_again_does_not_change_what_was_written(stored: Stored) -> None:
    block = np.empty(7 << 20, np.uint8)
    with (stored / "big").open("xb") as file:
        for number in range(2):
            block[:] = number
            block_copy.write(file.fileno(), block.data, number * block.size)
        block[:] = 9
    assert stored.get("big") == bytes(block.size) + bytes([1]) * block.size


@pytest.mark.usefixtures("small_parts")
def test_an_error_leaves_neither_object_nor_upload(stored: Stored) -> None:
    if not stored.keeps_parts:
        pytest.skip("this store aborts no upload: it deletes the parts itself, after a week")
    with pytest.raises(ZeroDivisionError), (stored / "big").open("xb") as file:
        file.write(bytes(13 << 9))
        assert len(stored.uploads()) == 1
        raise ZeroDivisionError
    assert stored.objects() == {} and stored.uploads() == []


def test_a_hole_is_no_object(stored: Stored) -> None:
    with pytest.raises(OutputFailed, match="bytes from 0 on were never written"), (stored / "big").open("xb") as file:
        block_copy.write(file.fileno(), memoryview(b"late"), 5)
    assert stored.objects() == {}
