"""Blocks of tensors between two files: their ranges, their size, and which of them are measured."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora_export.errors import InputRefused
from lora_export.lora import LoraPair
from lora_export.pairs.structured import KroneckerPair
from lora_export.plan import Layout, Step, TensorSpec, Term
from lora_export.storage import block_copy
from lora_export.storage.safetensors_file import Entry
from lora_export.weights import tensor_blocks
from lora_export.weights.apply_step import Backend
from lora_export.weights.quantised.stored_parts import Decode, Pieces, QuantisedTensor
from lora_export.weights.tensor_blocks import OutputTensor, Patch, block_size, blocks_to_measure, changed_blocks

FLOAT32 = np.dtype(np.float32)


def step(rows: int, columns: int, b: np.ndarray | None = None) -> Step:
    """Ones are added to every entry, or `b` (rows,) to each row."""
    pair = LoraPair(a=np.ones((1, columns)), b=np.ones((rows, 1)) if b is None else b.reshape(-1, 1), scale=1.0)
    spec = TensorSpec("fc.weight", (rows, columns), "float32", Layout.OUT_IN)
    return Step(spec, (Term("mine", "fc", pair),))


def changed(path: Path, tensor: OutputTensor, target: Entry) -> np.ndarray:
    """The target's bytes after the work of every block, as fp32."""
    after = np.zeros(target.stop, np.uint8)
    with path.open("rb") as file:
        for block in changed_blocks(path, file.fileno(), tensor, target, Backend()):
            before = np.empty(block.stop - block.start, np.uint8)
            block_copy.read(path, file.fileno(), before, block.start)
            assert block.work is not None
            own = after[block.target_start : block.target_stop]
            block.work(before, own, np.empty(8 * max(before.size, own.size), np.uint8))
    return after[target.start :].view(np.float32)


@pytest.mark.parametrize("block", [1, 24, 1 << 20])
def test_blocks_of_whole_rows_cover_a_changed_tensor(tmp_path, monkeypatch, block):
    monkeypatch.setattr(block_copy, "BLOCK", block)
    weight = np.arange(15, dtype=np.float32).reshape(5, 3)
    path = tmp_path / "weights"
    path.write_bytes(b"header" + weight.tobytes())
    tensor = OutputTensor(Entry("fc.weight", FLOAT32, (5, 3), 6, 66), step(5, 3), "fc.weight", FLOAT32)
    after = changed(path, tensor, Entry("fc.weight", FLOAT32, (5, 3), 4, 64))
    assert after.reshape(5, 3).tolist() == (weight + 1).tolist()


def test_a_patch_changes_its_block_of_a_matrix_only(tmp_path, monkeypatch):
    monkeypatch.setattr(block_copy, "BLOCK", 40)
    weight = np.zeros((6, 4), np.float32)
    path = tmp_path / "weights"
    path.write_bytes(weight.tobytes())
    entry = Entry("packed", FLOAT32, (6, 4), 0, 96)
    patch = Patch(step(3, 2, np.array([1, 2, 3])), slice(2, 5), slice(1, 3))
    after = changed(path, OutputTensor(entry, None, "packed", FLOAT32, (patch,)), entry).reshape(6, 4)
    assert after[2:5, 1:3].tolist() == [[1, 1], [2, 2], [3, 3]]
    assert after.sum() == 12


@pytest.mark.parametrize("block", [32, 48, 1000])
def test_rows_beside_the_patches_are_copied_and_checked(tmp_path, monkeypatch, block):
    """Two patches of whole rows, with a row before, between and after them: these are rounded to another dtype."""
    monkeypatch.setattr(block_copy, "BLOCK", block)
    weight, half = np.arange(28, dtype=np.float32).reshape(7, 4), np.dtype(np.float16)
    source, target = Entry("packed", FLOAT32, (7, 4), 0, 112), Entry("packed", half, (7, 4), 0, 56)
    patches = tuple(Patch(step(2, 4), slice(first, first + 2), slice(None)) for first in (1, 4))
    tensor, path = OutputTensor(source, None, "packed", half, patches), tmp_path / "weights"
    path.write_bytes(weight.tobytes())
    after = changed(path, tensor, target).view(np.float16).reshape(7, 4)
    assert (after - weight).tolist() == [[float(row in (1, 2, 4, 5))] * 4 for row in range(7)]
    for row in range(7):
        wrong = weight.copy()
        wrong[row, 2] = 1e9
        path.write_bytes(wrong.tobytes())
        with pytest.raises(InputRefused, match="1 value would exceed 65504"):
            changed(path, tensor, target)


def transposed(rows: int, columns: int) -> QuantisedTensor:
    """A matrix whose packed bytes are the numbers of its transpose."""

    def pieces(own: slice) -> list[Pieces]:
        return [Pieces(own.start, own.stop - own.start, number=columns, step=rows)]

    def load() -> Decode:
        return lambda own, packed: packed.reshape(columns, -1).T.astype(np.float32)

    return QuantisedTensor("packed", (rows, columns), FLOAT32, "packed", (), "x", load, pieces, rows_at_once=2)


@pytest.mark.parametrize("rows_at_once", [1, 2, 5, 6])
def test_packed_bytes_in_many_places_are_hashed_once_and_changed(tmp_path, monkeypatch, rows_at_once):
    monkeypatch.setattr(block_copy, "BLOCK", 8)
    path, weight = tmp_path / "weights", np.arange(24, dtype=np.uint8).reshape(6, 4)
    path.write_bytes(b"head" + weight.T.tobytes())
    quantised = replace(transposed(6, 4), rows_at_once=rows_at_once)
    entry = quantised.entry(Entry("packed", np.dtype(np.uint8), (4, 6), 4, 28))
    patch = Patch(step(3, 2, np.array([1, 2, 3])), slice(2, 5), slice(1, 3))
    tensor = OutputTensor(entry, None, "packed", FLOAT32, (patch,), quantised)
    after = changed(path, tensor, Entry("packed", FLOAT32, (6, 4), 0, 96)).reshape(6, 4)
    change = np.zeros((6, 4))
    change[2:5, 1:3] = [[1, 1], [2, 2], [3, 3]]
    assert (after == weight + change).all()
    with path.open("rb") as file:
        blocks = list(changed_blocks(path, file.fileno(), tensor, replace(entry, start=0, stop=96), Backend()))
    assert [position for block in blocks for position in range(block.start, block.stop)] == list(range(4, 28))
    written = [block for block in blocks if block.target_stop > block.target_start]
    assert len(written) == -(-6 // rows_at_once)
    assert block_size([tensor]) == max(8, 16 * rows_at_once)


def test_norms_of_outputs_are_those_of_decoded_rows(tmp_path):
    """DoRA on a quantised matrix stored as (in, out): every column is an output."""
    path, weight = tmp_path / "weights", np.arange(1, 25, dtype=np.uint8).reshape(6, 4)
    path.write_bytes(weight.T.tobytes())
    quantised = transposed(6, 4)
    entry = quantised.entry(Entry("packed", np.dtype(np.uint8), (4, 6), 0, 24))
    pair = LoraPair(a=np.ones((1, 6)), b=np.ones((4, 1)), scale=1.0, magnitude=np.float32([1, 2, 3, 4]))
    spec = TensorSpec("packed", (6, 4), "float32", Layout.IN_OUT)
    one = OutputTensor(entry, Step(spec, (Term("mine", "fc", pair),)), "packed", FLOAT32, quantised=quantised)
    after = changed(path, one, Entry("packed", FLOAT32, (6, 4), 0, 96)).reshape(6, 4)
    total = weight + 1.0
    np.testing.assert_allclose(after, total / np.linalg.norm(total, axis=0) * [1, 2, 3, 4], rtol=1e-6)


def test_a_copy_is_one_range_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(block_copy, "BLOCK", 10)
    monkeypatch.setattr(block_copy, "share", lambda *_: range(0))
    path = tmp_path / "weights"
    path.write_bytes(bytes(64))
    descriptor = os.open(path, os.O_RDWR)
    blocks = list(tensor_blocks.copied_blocks(descriptor, descriptor, 5, 30, 25))
    os.close(descriptor)
    assert [(block.start, block.stop, block.target_start, block.target_stop) for block in blocks] == [
        (5, 15, 30, 40),
        (15, 25, 40, 50),
        (25, 30, 50, 55),
    ]
    assert all(block.work is None and not block.shared for block in blocks)


def test_block_size_is_that_of_the_widest_changed_row(monkeypatch):
    monkeypatch.setattr(block_copy, "BLOCK", 10)
    half = np.dtype(np.float16)
    wide = Entry("fc.weight", half, (2, 8), 0, 32)
    assert block_size([OutputTensor(wide, None, "fc.weight", half)]) == 10  # a copy has blocks of any size
    assert block_size([OutputTensor(wide, step(2, 8), "fc.weight", half)]) == 8 * 4  # it is summed in fp32


def test_a_large_weight_is_measured_by_a_sample(monkeypatch):
    monkeypatch.setattr(tensor_blocks, "LEAST_MEASURED", 20)
    rows = [slice(first, first + 2) for first in range(0, 20, 2)]
    assert blocks_to_measure(step(20, 2), rows) == [number % 2 == 0 for number in range(10)]
    assert all(blocks_to_measure(None, rows))
    only_unsampled = np.zeros(20)
    only_unsampled[2:4] = 1
    assert all(blocks_to_measure(step(20, 2, only_unsampled), rows))


def test_a_change_without_small_factors_is_measured_whole(monkeypatch):
    monkeypatch.setattr(tensor_blocks, "LEAST_MEASURED", 20)
    rows = [slice(first, first + 2) for first in range(0, 20, 2)]
    change = KroneckerPair({"w1": np.ones((4, 1)), "w2": np.ones((5, 2))}, 1.0)
    lokr = Step(TensorSpec("w", (20, 2), "float32", Layout.OUT_IN), (Term("a", "w", change),))
    assert all(blocks_to_measure(lokr, rows))
