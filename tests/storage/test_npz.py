"""Arrays of .npz files are read within bounds, and nothing is unpickled."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from lora_export.errors import InputRefused
from lora_export.storage import npz


def refusal(path: Path) -> str:
    with pytest.raises(InputRefused) as refused:
        npz.read_arrays(path)
    return str(refused.value).replace(str(path), "FILE")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_read_as_they_were_saved(tmp_path, save):
    arrays = {
        "x": np.arange(6).reshape(2, 3),
        "scalar": np.float32(2),
        "empty": np.zeros((0, 3)),
        "swapped": np.arange(3, dtype=">f4"),
    }
    save(tmp_path / "a.npz", **arrays)
    read = npz.read_arrays(tmp_path / "a.npz")
    assert {name: array.tolist() for name, array in read.items()} == {
        name: np.asarray(array).tolist() for name, array in arrays.items()
    }
    assert all(array.dtype.isnative for array in read.values())


def test_a_file_that_is_not_a_zip_file_is_refused(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"no zip")
    assert refusal(tmp_path / "a.npz") == "FILE is not an .npz file of plain arrays: File is not a zip file"


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_duplicate_name_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.ones(2))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for _ in range(2):
            archive.write(tmp_path / "x.npy", "x.npy")
    assert refusal(tmp_path / "a.npz") == "FILE names an array more than once"


def test_a_zip_bomb_is_refused_before_it_is_inflated(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros(100_000))
    assert npz.read_arrays(tmp_path / "a.npz")["x"].shape == (100_000,)
    monkeypatch.setattr(npz, "MAX_INFLATED", 1000)
    assert refusal(tmp_path / "a.npz").endswith(" bytes to 800,128; if that is right, save it with numpy.savez")


def test_a_shape_beyond_the_members_size_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.ones(3))
    data = (tmp_path / "x.npy").read_bytes().replace(b"(3,), }         ", b"(3000000000,), }")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", data)
    assert "x.npy is too short for (3000000000,) of float64" in refusal(tmp_path / "a.npz")
