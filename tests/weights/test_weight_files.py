"""The weights in a folder: one file, an index, or one of several variants."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_export.errors import InputRefused
from lora_export.weights.weight_files import is_index, variant_like, variant_of, weight_files

ONE, HALF = "model.safetensors", "model.fp16.safetensors"
SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
HALF_SHARDS = [f"model.fp16-0000{number}-of-00002.safetensors" for number in (1, 2)]


def folder(path: Path, *names: str, index: str = "", of: list[str] | None = None) -> Path:
    for name in names:
        (path / name).touch()
    if index:
        (path / index).write_text(json.dumps({"weight_map": {name: name for name in of or []}}))
    return path


@pytest.mark.parametrize(("variant", "file"), [("fp16", HALF), ("none", ONE)])
def test_a_variant_is_chosen_by_its_name(variant, file, tmp_path):
    assert weight_files(folder(tmp_path, ONE, HALF), variant) == ("", [file])


def test_the_shards_of_a_variant_have_an_index_of_their_own(tmp_path):
    index = "model.safetensors.index.fp16.json"
    folder(tmp_path, *HALF_SHARDS, index=index, of=HALF_SHARDS)
    assert weight_files(tmp_path) == weight_files(tmp_path, "fp16") == (index, HALF_SHARDS)
    folder(tmp_path, *SHARDS, index="model.safetensors.index.json", of=SHARDS)
    assert weight_files(tmp_path, "fp16") == (index, HALF_SHARDS)
    assert weight_files(tmp_path, "none") == ("model.safetensors.index.json", SHARDS)


def test_a_variant_alone_needs_no_choice(tmp_path):
    assert weight_files(folder(tmp_path, HALF)) == ("", [HALF])
    assert variant_like(tmp_path) is None


@pytest.mark.parametrize(("names", "has"), [((ONE, HALF), "one without a name and fp16"), ((), "none")])
def test_a_variant_that_is_not_there_is_refused(names, has, tmp_path):
    with pytest.raises(InputRefused, match=f"has no weights of the variant bf16. It has {has}"):
        weight_files(folder(tmp_path, *names), "bf16")


@pytest.mark.parametrize("names", [("model.safetensors", "other.fp16.safetensors"), ("a.b.c.safetensors", ONE)])
def test_files_of_other_names_are_no_variants(names, tmp_path):
    with pytest.raises(InputRefused, match="has 2 safetensors files and no index"):
        weight_files(folder(tmp_path, *names))


def test_the_variant_of_other_files_is_found(tmp_path):
    assert (variant_of([HALF]), variant_of(HALF_SHARDS), variant_of(SHARDS)) == ("fp16", "fp16", "none")
    assert variant_of([ONE, HALF]) is None
    folder(tmp_path, ONE, HALF)
    assert [variant_like(tmp_path, names) for names in ([HALF], [ONE], ["x.bf16.safetensors"])] == [
        "fp16",
        "none",
        "fp16",
    ]


def test_an_index_is_known_by_its_name():
    names = ("model.safetensors.index.json", "model.safetensors.index.fp16.json", "model_index.json", "a.json")
    assert [is_index(name) for name in names] == [True, True, False, False]
