"""Differences of tensors in blocks, and their singular values against NumPy's SVD in fp64."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from lora_export.adapters.singular_values import Truncation
from lora_export.errors import InputRefused
from lora_export.storage import safetensors_file
from lora_export.weights import extract
from lora_export.weights.extract import Difference, TensorInFile, have_equal_bits

RNG = np.random.default_rng(4)


def stored(folder: Path, old: np.ndarray, new: np.ndarray) -> tuple[TensorInFile, TensorInFile]:
    safetensors_file.write(folder / "old", {"w": old})
    safetensors_file.write(folder / "new", {"bert.w": new})
    one, other = (safetensors_file.open_file(folder / name) for name in ("old", "new"))
    return TensorInFile(one, "w"), TensorInFile(other, "bert.w")


def matrix(rows: int, columns: int, rank: int, noise: float, fall: float = 0.8) -> np.ndarray:
    """A matrix of this rank, whose singular values fall, and noise."""
    low = (RNG.normal(size=(rows, rank)) * fall ** np.arange(rank)) @ RNG.normal(size=(rank, columns))
    return (low + noise * RNG.normal(size=(rows, columns))).astype(np.float32)


@pytest.fixture(params=[True, False], ids=["kept", "read again"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks; differences are kept or read from the files each time."""
    monkeypatch.setattr(extract, "BLOCK_ENTRIES", 5000)
    monkeypatch.setattr(extract, "CACHED_ENTRIES", 1 << 25 if request.param else 0)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("shape", [(300, 120), (120, 300)])
@pytest.mark.parametrize("rank", [3, 12, 60])  # by random projection, and by the Gram matrix
def test_a_rank_captures_almost_the_most_that_is_possible(tmp_path: Path, shape: tuple[int, int], rank: int) -> None:
    change = matrix(*shape, rank=20, noise=0.3)
    base = RNG.normal(size=shape).astype(np.float32)
    summed = (base + change).astype(np.float32)
    found = Difference(*stored(tmp_path, base, summed))
    exact = (summed - base).astype(np.float64)
    values = found.singular_values(Truncation(rank=rank))
    best = np.linalg.svd(exact)[1]
    assert found.energy == pytest.approx(np.sum(exact**2), rel=1e-6)
    assert values.captured(rank) == pytest.approx(np.sum(best[:rank] ** 2) / np.sum(best**2), abs=1e-3)
    a, b = values.factors(rank)
    lost = np.sum((exact - b.astype(np.float64) @ a) ** 2) / np.sum(exact**2)
    assert 1 - lost == pytest.approx(values.captured(rank), abs=1e-5)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_an_energy_finds_the_least_rank(tmp_path: Path, energy: float) -> None:
    change = matrix(400, 600, rank=120, noise=0.01, fall=0.97)  # 14, 46 and more
    found = Difference(*stored(tmp_path, 0 * change, change))
    shares = np.cumsum(np.linalg.svd(change.astype(np.float64))[1] ** 2) / np.sum(change.astype(np.float64) ** 2)
    least = int(np.argmax(shares >= energy)) + 1
    truncation = Truncation(energy=energy)
    values = found.singular_values(truncation)
    assert truncation.rank_of(values) in (least, least + 1)
    assert values.captured(truncation.rank_of(values)) >= energy - 1e-6
    capped = Truncation(rank=5, energy=energy)
    assert capped.rank_of(found.singular_values(capped)) == min(5, truncation.rank_of(values))


# Beyond a rank of 2, rounding leaves a little or nothing.
LOW = {
    "random": matrix(200, 100, rank=2, noise=0),
    "equal rows": np.ones((200, 100), np.float32),
    "one row": np.float32(np.arange(200) == 5)[:, None] * matrix(1, 100, rank=1, noise=0),
    "two rows": np.float32([np.arange(100) % 2 == row - 5 if row in (5, 6) else np.zeros(100) for row in range(200)]),
}


@pytest.mark.parametrize("rank", [2, 8])
@pytest.mark.parametrize("change", LOW.values(), ids=LOW)
def test_a_change_of_low_rank_is_found_whole(change: np.ndarray, rank: int, tmp_path: Path) -> None:
    values = Difference(*stored(tmp_path, 0 * change, change)).singular_values(Truncation(rank=rank))
    a, b = values.factors(min(rank, len(values.s)))
    assert np.linalg.norm(b @ a - change) <= 1e-6 * np.linalg.norm(change)  # factors and their product are fp32
    assert values.captured(2) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_values_of_every_float_are_subtracted(tmp_path: Path, dtype: type) -> None:
    old, new = np.array([[1, 2], [3, 4]], dtype), np.array([[1, 2.5], [3, 4]], dtype)
    found = Difference(*stored(tmp_path, old, new))
    assert found.energy == 0.25
    assert found.times(np.eye(2, dtype=np.float32)).tolist() == [[0, 0.5], [0, 0]]


def test_equal_bits_are_no_difference(tmp_path: Path) -> None:
    old = np.array([[1.0, 0.0]], np.float32)
    one, other = stored(tmp_path, old, old.copy())
    assert have_equal_bits(one, other)
    one, other = stored(tmp_path, old, np.array([[1.0, -0.0]], np.float32))
    assert not have_equal_bits(one, other)
    assert Difference(one, other).energy == 0.0
    one, other = stored(tmp_path, old, old.astype(np.float64))
    assert not have_equal_bits(one, other) and Difference(one, other).energy == 0.0


@pytest.mark.parametrize(("old", "new", "where"), [(np.inf, 1, "BASE"), (1, np.nan, "TUNED"), (-3e38, 3e38, "TUNED")])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, old: float, new: float, where: str) -> None:
    tensors = stored(tmp_path, np.array([[old]], np.float32), np.array([[new]], np.float32))
    with pytest.raises(InputRefused, match=f"w: {where} holds values that are not finite, or too far apart"):
        Difference(*tensors)
