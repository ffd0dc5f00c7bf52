"""The files of an adapter's tensors: safetensors at once, pickles where they are allowed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from lora_export.errors import InputRefused
from lora_export.formats.tensor_files import hash_of_files, names_in, open_tensors
from lora_export.options.reading import DEFAULTS, ReadOptions


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """The same tensor in both kinds of files."""
    save_file({"fc.lora_a": np.arange(3, dtype=np.float32)}, tmp_path / "one.safetensors")
    torch.save({"fc.lora_a": torch.arange(3.0)}, tmp_path / "one.pt")
    return tmp_path / "one.safetensors", tmp_path / "one.pt"


def test_a_pickle_is_read_where_it_is_allowed(files: tuple[Path, Path]) -> None:
    stored, pickled = files
    assert open_tensors(stored, DEFAULTS).read("fc.lora_a").tolist() == [0, 1, 2]
    assert open_tensors(pickled, ReadOptions(allow_pickle=True)).read("fc.lora_a").tolist() == [0, 1, 2]
    with pytest.raises(InputRefused, match=r"one\.pt is a pickle, which can run code .* allow_pickle=True reads it"):
        open_tensors(pickled, DEFAULTS)


def test_names_of_both_kinds_are_found(files: tuple[Path, Path]) -> None:
    stored, pickled = files
    assert names_in(stored) == {"fc.lora_a"} <= names_in(pickled)
    stored.write_bytes(b"no tensors")
    assert names_in(stored) == names_in(stored.parent) == names_in(pickled.rename(pickled.with_suffix(".txt"))) == set()


def test_the_hash_is_that_of_the_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two")
    assert hash_of_files([tmp_path / "a", tmp_path / "b"]) == hashlib.sha256(b"onetwo").hexdigest()
