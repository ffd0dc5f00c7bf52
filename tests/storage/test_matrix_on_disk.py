"""A matrix in a temporary file."""

from __future__ import annotations

import errno
import os
import tempfile

import numpy as np
import pytest

from lora_export.errors import OutputFailed
from lora_export.storage import matrix_on_disk
from lora_export.storage.matrix_on_disk import MatrixOnDisk


def test_rows_become_columns_and_the_reverse(monkeypatch):
    monkeypatch.setattr(matrix_on_disk, "COLUMNS_BYTES", 5 * 8 * 3)  # three columns of five rows
    matrix, values = MatrixOnDisk((5, 7), np.float64), np.arange(35.0).reshape(5, 7)
    assert matrix.column_blocks == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert not matrix[slice(0, 5)].any()
    for rows in (slice(0, 2), slice(2, 5)):
        matrix.write_rows(rows, values[rows])
    for columns in matrix.column_blocks:
        assert np.array_equal(matrix.columns(columns), values[:, columns])
        matrix.write_columns(columns, -values[:, columns])
    assert np.array_equal(matrix[slice(1, 4)], -values[1:4])


def test_its_file_has_no_name_and_is_closed(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    matrix = MatrixOnDisk((2, 2), np.float32)
    descriptor = matrix._descriptor
    assert not list(tmp_path.iterdir())
    del matrix
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_full_folder_of_temporary_files_is_named(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    matrix = MatrixOnDisk((2, 2), np.float32)
    monkeypatch.setattr(matrix_on_disk.block_copy, "write", full)
    message = r"a temporary file of 16 bytes could not be written: No space left on device\. TMPDIR names"
    with pytest.raises(OutputFailed, match=message):
        matrix.write_rows(slice(0, 2), np.ones((2, 2), np.float32))
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(OutputFailed, match="TMPDIR names"):
        MatrixOnDisk((2, 2), np.float32)
