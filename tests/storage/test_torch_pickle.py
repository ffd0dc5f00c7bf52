"""Tensors in pickles of PyTorch: their values, and files that hold more than tensors, or less."""

from __future__ import annotations

import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from lora_export.errors import EnvironmentLacking, InputRefused
from lora_export.storage.torch_pickle import open_pickle, text_in_pickle
from support.handmade import Payload

VALUES = [[1.5, -2.0, 0.25], [3.0, 0.0, -8.0]]  # exact in every type below
DTYPES = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float64: np.float64,
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
}


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
def test_tensors_have_their_values_and_types(tmp_path: Path, dtype: torch.dtype, nested: bool) -> None:
    table = OrderedDict(a=torch.tensor(VALUES).to(dtype), b=torch.tensor(VALUES).T)
    file = open_pickle(saved(tmp_path / "x.pt", {"model": table} if nested else table))
    a, b = file.read("a"), file.read("b")
    assert (a.dtype, a.astype(np.float64).tolist()) == (np.dtype(DTYPES[dtype]), VALUES)
    assert b.tolist() == np.transpose(VALUES).tolist()
    assert {name: entry.shape for name, entry in file.entries.items()} == {"a": (2, 3), "b": (3, 2)}
    assert {name: entry.nbytes for name, entry in file.entries.items()} == {"a": a.nbytes, "b": 24}


def test_a_file_that_was_written_to_is_not_unchanged(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", {"a": torch.ones(2)})
    file = open_pickle(path)
    assert file.unchanged()
    saved(path, {"a": torch.ones(3)})
    assert not file.unchanged()
    path.unlink()
    assert not file.unchanged()


def test_names_are_read_without_unpickling(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    path = saved(tmp_path / "x.pt", {"fc.lora_A": torch.ones(1), "more": Payload(ran)})
    assert {"fc.lora_A", "more"} <= text_in_pickle(path)
    assert not ran.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", pickle.dumps({"a": 1})])
def test_another_file_has_no_names(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    assert text_in_pickle(tmp_path / "x.pt") == text_in_pickle(tmp_path / "missing") == frozenset()


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", {"a": torch.ones(1), "b": Payload(tmp_path / "ran")})
    with pytest.raises(InputRefused, match="it is damaged, or it holds more than tensors"):
        open_pickle(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds no table of tensors, but list"),
        ({1: torch.ones(1)}, "holds no table of tensors, but dict"),
        ({"a": torch.ones(1), "epoch": 3}, "holds more than tensors: epoch"),
        ({"a": torch.ones(1).expand(1 << 40)}, r"a \(1099511627776,\) is larger than its data"),
        ({"a": torch.eye(2).to_sparse()}, "a is sparse or quantised; only plain tensors are read"),
        ({"a\n": torch.ones(1)}, "the names in"),
    ],
)
def test_what_is_no_table_of_plain_tensors_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        open_pickle(saved(tmp_path / "x.pt", content))


def test_pickles_that_are_no_archive_are_refused(tmp_path: Path) -> None:
    old = saved(tmp_path / "old.pt", {"a": torch.ones(1)}, _use_new_zipfile_serialization=False)
    with pytest.raises(InputRefused, match=r"is no archive of torch\.save"):
        open_pickle(old)


def test_without_pytorch_the_file_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "x.pt", {"a": torch.ones(1)})
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(EnvironmentLacking, match="is a pickle, and needs PyTorch"):
        open_pickle(path)


def test_an_archive_that_is_cut_short_or_compressed_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", {"a": torch.zeros(1 << 16)})
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other:
        for name in archive.namelist():
            other.writestr(name, archive.read(name))
    with pytest.raises(InputRefused, match=r"has compressed entries, which torch\.save does not write"):
        open_pickle(packed)
    assert text_in_pickle(packed) == frozenset()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputRefused, match="is no archive"):
        open_pickle(path)
