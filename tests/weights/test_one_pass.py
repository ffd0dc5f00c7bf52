"""Merges in one pass over their base: each is what it is alone, and what ends one ends no other."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

import lora_export as le
from lora_export.api.merge import merge_together
from lora_export.api.merge_request import MergeResult
from lora_export.errors import InputRefused, MatchError, OutputFailed
from lora_export.options.merge import MergeOptions
from lora_export.pairs import computed
from lora_export.storage import atomic_output, block_copy
from lora_export.storage.object_store import Bucket
from lora_export.storage.store_file import SMALL_READ
from lora_export.storage.store_path import StorePath
from lora_export.weights import one_pass
from support.folder_contents import folder_contents
from support.handmade import base_file, peft_adapter
from support.stores import Stored

ROWS, COLUMNS, WORDS = 384, 512, 400
RNG = np.random.default_rng(0)


def numbers(*shape: int) -> NDArray[np.float32]:
    return RNG.integers(-8, 8, shape).astype(np.float32) / 16


def pairs(modules: str, rank: int) -> dict[str, Any]:
    return {f"model.{name}": (numbers(rank, COLUMNS), numbers(ROWS, rank)) for name in modules}


# What each adapter changes, and the options of its merge
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one weight": ({"pairs": pairs("a", 2)}, {}),
    "all weights": ({"pairs": pairs("abc", 4)}, {"weights": [0.5]}),
    "wider numbers": ({"pairs": pairs("b", 2)}, {"dtype": "float32"}),
    "whole tensors": ({"pairs": pairs("c", 2), "whole": {"model.embed.weight": numbers(WORDS, COLUMNS)}}, {}),
    "all weights again": ({"pairs": pairs("abc", 1)}, {}),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base in two files, and adapters. Blocks are so small that a weight has several."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(block_copy, "BLOCK", 1 << 16)
    base = {f"model.{name}.weight": numbers(ROWS, COLUMNS) for name in "abc"} | {"model.norm.weight": numbers(COLUMNS)}
    base |= {"model.embed.weight": numbers(WORDS, COLUMNS)}
    files = dict.fromkeys(list(base)[:2], "model-1.safetensors") | dict.fromkeys(list(base)[2:], "model-2.safetensors")
    Path("base").mkdir()
    for file in sorted(set(files.values())):
        own = {name: base[name] for name in base if files[name] == file}
        base_file(Path("base") / file, own, ml_dtypes.bfloat16, metadata={"format": "pt"})
    Path("base/model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    Path("base/config.json").write_text("{}")
    for name, (tensors, _) in KINDS.items():
        peft_adapter(Path("adapters") / name, **tensors)
    return tmp_path


def options(name: str, output: str = "together/{}", base: str = "base", **more: Any) -> MergeOptions:
    return MergeOptions(base, f"adapters/{name}", output.format(name), **{"min_retention": 0} | KINDS[name][1] | more)


def read_bytes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each byte of the files of weights is read in blocks, on average."""
    read, found = block_copy.read, Counter[str]()

    def counted(source: Path, fd: int, buffer: Any, position: int) -> None:
        found[source.name] += len(buffer)
        read(source, fd, buffer, position)

    monkeypatch.setattr(block_copy, "read", counted)
    return found


def read_of_store(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many bytes of each object are requested from now on."""
    read, found = Bucket.read, Counter[str]()

    def counted(own: Bucket, key: str, start: int, stop: int) -> Any:
        content = read(own, key, start, stop)
        found[key] += len(content)
        return content

    monkeypatch.setattr(Bucket, "read", counted)
    return found


def test_each_merge_is_what_it_is_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {name: le.merge(**vars(options(name, "alone/{}"))) for name in KINDS}
    read = read_bytes(monkeypatch)
    made = dict(zip(KINDS, merge_together([options(name) for name in KINDS]), strict=True))
    assert folder_contents(place / "together") == folder_contents(place / "alone")
    for name, one in made.items():
        assert isinstance(one, MergeResult) and one.report is not None and alone[name].report is not None
        assert one.report.results == alone[name].report.results and one.report.copied == alone[name].report.copied
    for file in Path("base").glob("*.safetensors"):
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert read[file.name] == file.stat().st_size - header
    proofs = [le.verify(f"together/{name}", base="base", adapters=f"adapters/{name}",
                        weights=KINDS[name][1].get("weights", ())) for name in KINDS]  # fmt: skip
    assert all(proofs)


def test_each_merge_has_the_hash_that_it_asks_for(place: Path) -> None:
    every = {"one weight": "sha256", "all weights": "xxh3_128"}
    for name, hashing in every.items():
        le.merge(**vars(options(name, "alone/{}", hashing=hashing)))
    assert all(merge_together([options(name, hashing=hashing) for name, hashing in every.items()]))
    assert folder_contents(place / "together") == folder_contents(place / "alone")


def test_what_ends_one_merge_ends_no_other(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
        "misfit": (pairs("z", 1), MatchError, "model.z"),
        "faint": ({"model.a": (numbers(1, COLUMNS) * 1e-6, numbers(ROWS, 1))}, InputRefused, "lose most of their"),
        "large": ({"model.b": (numbers(1, COLUMNS) * 1e20, numbers(ROWS, 1) * 1e20)}, InputRefused, "would exceed"),
        "full": (pairs("a", 1), OutputFailed, "No space left on device"),
    }
    for name, (tensors, _, _) in wrong.items():
        peft_adapter(Path("adapters") / name, tensors)
    pwrite = os.pwrite

    def write(fd: int, data: memoryview, position: int) -> int:
        if ".full." in str(Path(f"/proc/self/fd/{fd}").readlink()):
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(fd, data, position)

    monkeypatch.setattr(os, "pwrite", write)
    bad = [MergeOptions("base", f"adapters/{name}", f"together/{name}", min_retention=0.1) for name in wrong]
    first, *errors, last = merge_together([options("all weights"), *bad, options("whole tensors")])
    for error, (_, expected, text) in zip(errors, wrong.values(), strict=True):
        assert type(error) is expected and text in str(error)
    assert isinstance(first, MergeResult) and isinstance(last, MergeResult)
    assert sorted(path.name for path in Path("together").iterdir()) == ["all weights", "whole tensors"]


def test_what_is_made_of_a_whole_weight_is_made_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory has the Fourier transform of one weight: merges that need one do not take turns at each block."""
    for number in range(3):
        folder = Path("adapters") / f"fourier {number}"
        folder.mkdir()
        save_file({"base_model.model.model.a.fourierft_spectrum": numbers(64)}, folder / "adapter_model.safetensors")
        config = {"peft_type": "FOURIERFT", "n_frequency": 64, "scaling": 100, "random_loc_seed": number}
        (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["a"]}))
    transform, made = computed._inverse_transform.__wrapped__, list[Any]()
    counted = functools.lru_cache(1)(lambda pair: (made.append(pair), transform(pair))[1])
    monkeypatch.setattr(computed, "_inverse_transform", counted)
    more: dict[str, Any] = {"min_retention": 0, "layout": {"model.a.weight": "out_in"}}
    merges = [MergeOptions("base", f"adapters/fourier {number}", f"together/{number}", **more) for number in range(3)]
    assert all(isinstance(one, MergeResult) for one in merge_together(merges)) and len(made) == 3


def test_a_base_that_cannot_be_opened_ends_its_merges_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is gone between the plan and the copy. Another base is merged by the same call."""
    shutil.copytree("base", "other")
    transfer = one_pass.transfer_together

    def without_base(source: Path, *arguments: Any, **more: Any) -> Any:
        (place / "base" / "model-1.safetensors").unlink(missing_ok=True)
        return transfer(source, *arguments, **more)

    monkeypatch.setattr(one_pass, "transfer_together", without_base)
    merges = [options("all weights"), options("one weight"), options("whole tensors", base="other")]
    *gone, last = merge_together(merges)
    for each in gone:
        assert isinstance(each, OutputFailed) and "No such file" in str(each)
    assert isinstance(last, MergeResult) and [path.name for path in Path("together").iterdir()] == ["whole tensors"]


def test_an_error_of_a_callback_ends_its_merge_alone(place: Path) -> None:
    first, last = merge_together([options("all weights", on_progress=lambda _: 1 / 0), options("one weight")])
    assert isinstance(first, ZeroDivisionError) and isinstance(last, MergeResult)
    assert [path.name for path in Path("together").iterdir()] == ["one weight"]


def test_a_disk_that_holds_some_of_the_outputs_gets_these(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them together would fill it, and none would be whole."""
    size = sum(file.stat().st_size for file in Path("base").iterdir())

    def usage(_: Path) -> SimpleNamespace:  # what is being written has taken its space, or has reserved it
        taken = sum(file.stat().st_size for file in Path("together").glob(".*/**/*") if file.is_file())
        return SimpleNamespace(free=int(2.5 * size) - taken)

    monkeypatch.setattr(atomic_output.shutil, "disk_usage", usage)
    names = ["one weight", "all weights", "whole tensors"]
    *made, refused = merge_together([options(name) for name in names])
    assert all(isinstance(each, MergeResult) for each in made) and isinstance(refused, OutputFailed)
    still_to_come = r"needed beside [13]\.\d+ MB of other outputs that are being written"  # 3 where none is reserved
    assert re.search(still_to_come, str(refused)), refused
    assert isinstance(merge_together([options(names[2])])[0], MergeResult)  # then these are written


def test_an_interrupt_leaves_nothing_unfinished(place: Path) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_together([options("all weights"), options("one weight", on_progress=stop)])
    assert sorted(path.name for path in place.iterdir()) == ["adapters", "base"]


def test_from_store_to_store_the_base_is_read_once(
    place: Path, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["all weights", "all weights again"]  # a file that does not change is read once more, for its hash
    for name in names:
        le.merge(**vars(options(name, "alone/{}")))
    stored.put("base", place / "base")
    found = read_of_store(monkeypatch)
    made = merge_together([options(name, str(stored / "out/{}"), str(stored / "base")) for name in names])
    assert all(isinstance(one, MergeResult) for one in made), made
    for name in names:
        assert stored.files(f"out/{name}") == folder_contents(place / "alone" / name)
    for number in (1, 2):
        size = Path(f"base/model-{number}.safetensors").stat().st_size
        headers = (1 + len(names)) * SMALL_READ
        assert size <= found[f"base/model-{number}.safetensors"] <= size + headers < 2 * size


def test_single_files_in_a_store_are_hashed_once_for_their_headers(
    place: Path, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store takes the header, which has the hash of the source, before the rest."""
    base = "base/model-1.safetensors"
    every = "fourth", "fifth"
    for number, name in enumerate(every, 1):
        peft_adapter(Path("adapters") / name, {"model.a": (numbers(2, COLUMNS), numbers(ROWS, 2) * number)})
    stored.put(base, (place / base).read_bytes())

    def merges(source: Path | StorePath, output: Any) -> list[MergeOptions]:
        return [
            MergeOptions(source, f"adapters/{name}", output / f"{name}.safetensors", min_retention=0) for name in every
        ]

    alone = [le.merge(**vars(one)) for one in merges(stored / base, place / "alone")]
    found = read_of_store(monkeypatch)
    made = merge_together(merges(stored / base, stored / "out"))
    assert all(isinstance(one, MergeResult) for one in made), made
    for one in alone:
        assert stored.get(f"out/{one.output.name}") == one.output.read_bytes()
    size = Path(base).stat().st_size
    assert 2 * size <= found[base] < 2 * size + 6 * SMALL_READ, found[base] / size
