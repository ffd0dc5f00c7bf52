"""The benchmarks that a machine without a GPU cannot take, rehearsed on the processor at a small size."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import bench_gpu, measure
from benchmarks.checkpoints import LlamaShape
from support import tables

SMALL = LlamaShape(hidden=64, inner=128, layers=2, heads=4, words=320)


@pytest.fixture
def readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the benchmarks' README, in which they put what they find."""
    kept = tmp_path / "README.md"
    kept.write_text(measure.README.read_text())
    monkeypatch.setattr(measure, "README", kept)
    small = {"DEVICE": "cpu", "MERGED": SMALL, "PROVEN": SMALL, "ROUNDS": 1, "RUNS": 1, "SHAPES": {"2 x 8": (2, 8)}}
    for name, value in small.items():
        monkeypatch.setattr(bench_gpu, name, value)
    return kept


@pytest.mark.slow
def test_the_benchmarks_of_a_gpu_run_on_the_processor(tmp_path: Path, readme: Path) -> None:
    for name in ("merge", "proof"):
        (tmp_path / name).mkdir()
    bench_gpu.test_a_merge_on_the_gpu(tmp_path / "merge")
    bench_gpu.test_a_proof_on_the_gpu(tmp_path / "proof")
    bench_gpu.test_a_training_step_on_the_gpu("minilm")
    bench_gpu.test_adapters_beside_the_weights_on_the_gpu(tmp_path)
    for place in ("merge", "proof", "training step, minilm", "beside the weights"):
        assert "no GPU, onnxruntime" in tables.text(readme, f"GPU, {place}")
    ratios = tables.rows(tables.text(readme, "GPU, beside the weights"))
    assert set(ratios) == {"merged", "nodes", "inputs", "rows"}
