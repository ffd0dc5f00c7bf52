"""A tensor in its file, read in pieces."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from lora_export.errors import InputRefused
from lora_export.storage import safetensors_file
from lora_export.verification.against_checkpoint import stored_tensor
from lora_export.verification.against_checkpoint.stored_tensor import Scratch, StoredTensor
from lora_export.weights.quantised.mxfp4 import mxfp4_weights
from lora_export.weights.quantised.stored_parts import StoredParts
from support.stored_tensors import stored

VALUES = np.arange(24).reshape(4, 3, 2)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float64])
def test_rows_are_read_as_they_are_stored(tmp_path: Path, dtype: type) -> None:
    tensor = stored(tmp_path / "t.safetensors", VALUES, dtype)
    assert (tensor.shape, tensor.dtype) == ((4, 3, 2), np.dtype(dtype))
    rows = tensor.rows(slice(1, 3))
    assert rows.dtype == np.dtype(dtype) and rows.tolist() == VALUES[1:3].tolist()


def test_pieces_cover_every_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = stored(tmp_path / "t.safetensors", VALUES)  # rows of 6 numbers: 48 bytes in fp64
    for piece_bytes, pieces in [(1, [(0, 1), (1, 2), (2, 3), (3, 4)]), (150, [(0, 3), (3, 4)]), (1 << 20, [(0, 4)])]:
        monkeypatch.setattr(stored_tensor, "PIECE_BYTES", piece_bytes)
        assert [(piece.start, piece.stop) for piece in tensor.pieces()] == pieces


def test_experts_are_read_as_rows_of_one_matrix(tmp_path: Path) -> None:
    tensor = stored(tmp_path / "t.safetensors", VALUES)
    matrix = tensor.as_matrix
    assert (matrix.shape, matrix.rows(slice(5, 7)).tolist()) == ((12, 2), VALUES.reshape(12, 2)[5:7].tolist())
    assert matrix.as_matrix is matrix and matrix.rows_at_once == 1


def test_quantised_rows_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two experts of (32 inputs, 3 outputs) in mxfp4, of which 32 inputs are decoded as cheaply as one."""
    monkeypatch.setattr(stored_tensor, "PIECE_BYTES", 1)
    tensors = {"x_blocks": np.full((2, 3, 1, 16), 0x22, np.uint8), "x_scales": np.full((2, 3, 1), 128, np.uint8)}
    safetensors_file.write(tmp_path / "t.safetensors", tensors)
    file = safetensors_file.open_file(tmp_path / "t.safetensors")
    quantised = mxfp4_weights(StoredParts({"t": file}), {}, "float32")["x"]
    tensor = StoredTensor(file, quantised.entry(file.entries["x_blocks"]), quantised=quantised)
    assert (tensor.shape, tensor.rows_at_once, tensor.as_matrix.rows_at_once) == ((2, 32, 3), 1, 32)
    pieces = list(tensor.as_matrix.pieces(least=tensor.as_matrix.rows_at_once))
    assert pieces == [slice(0, 32), slice(32, 64)]
    assert (tensor.as_matrix.rows(slice(3, 5)) == 2).all() and (tensor.rows(slice(1, 2)) == 2).all()
    assert tensor.rows(slice(1, 2)).shape == (1, 32, 3)


def test_a_scalar_is_one_row(tmp_path: Path) -> None:
    tensor = stored(tmp_path / "t.safetensors", 7)
    (piece,) = tensor.pieces()
    assert tensor.rows(piece).tolist() == [7]


def test_a_file_that_became_shorter_is_refused(tmp_path: Path) -> None:
    tensor = stored(tmp_path / "t.safetensors", VALUES)
    with (tmp_path / "t.safetensors").open("r+b") as file:
        file.truncate(tensor.entry.start + tensor.entry.nbytes - 1)
    assert tensor.rows(slice(0, 1)).tolist() == VALUES[:1].tolist()
    with pytest.raises(InputRefused, match="became shorter"):
        tensor.rows(slice(3, 4))


def test_a_name_keeps_its_memory_until_it_must_grow() -> None:
    scratch = Scratch()
    wide = scratch.array("sum", (4, 3))
    assert (wide.shape, wide.dtype) == ((4, 3), np.float64)
    small = scratch.array("sum", (2, 5), np.float32)
    assert (small.shape, small.dtype) == ((2, 5), np.float32) and np.shares_memory(wide, small)
    assert not np.shares_memory(wide, scratch.array("other", (4, 3)))
    assert not np.shares_memory(wide, scratch.array("sum", (5, 3)))
