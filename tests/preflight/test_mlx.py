"""What mlx-lm really does with each adapter is what `check` says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lora_export
from lora_export.errors import LoraExportError
from support.gguf_files import llama
from support.llama_cpp_runs import TOKENS
from support.preflight_adapters import CASES

pytestmark = pytest.mark.slow
mlx = pytest.importorskip("mlx.core", reason="mlx is not installed")
mlx_lm = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
RIGHT = 1e-3  # the largest error of a logit, relative to the adapter's effect
READING = lora_export.ReadOptions(allow_pickle=True)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    folders = {tied: tmp_path_factory.mktemp("base") for tied in (False, True)}
    for tied, folder in folders.items():
        llama(tied=tied).save_pretrained(folder)
    return folders


def logits(base: Path, adapter: Path | None) -> Any:
    """What mlx-lm computes. Raises ValueError or AttributeError for an adapter that it refuses."""
    model = mlx_lm.load_model(base)[0]
    model = model if adapter is None else mlx_lm.load_adapters(model, str(adapter))
    model.eval()
    return np.array(model(mlx.array([TOKENS]))[0])


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft(case: str, bases: Mapping[bool, Path], tmp_path: Path) -> None:
    model, base = CASES[case].write(tmp_path / "adapter"), bases[CASES[case].tied]
    with torch.no_grad():
        wanted = model(torch.tensor([TOKENS])).logits[0].numpy()
    found = lora_export.check(tmp_path / "adapter", runtimes=["mlx"], base=base, reading=READING)
    predicted = [repair.name for repair in found.outcomes[0].repairs] == ["mlx"]
    with pytest.raises((AttributeError, FileNotFoundError, RuntimeError)):
        logits(base, tmp_path / "adapter")  # PEFT's folder itself
    options: dict[str, Any] = {"to": "mlx", "base": base, "reading": READING}
    try:
        out = lora_export.convert(tmp_path / "adapter", tmp_path / "out", **options).output
        without, beside = logits(base, None), logits(base, out)
    except (LoraExportError, ValueError):
        assert not predicted
    else:
        right = np.abs(beside - wanted).max() <= RIGHT * np.abs(without - wanted).max()
        assert predicted is bool(right)
