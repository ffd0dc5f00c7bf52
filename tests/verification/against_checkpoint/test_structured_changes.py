"""verify --base of merges of LoHa, LoKr and whole changes: right ones are the same, one wrong entry is different."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_export import merge, verify

RNG = np.random.default_rng(0)


def numbers(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32) * np.float32(0.3)


BASE = {
    "a.weight": numbers(12, 12),
    "b.weight": numbers(12, 20),
    "c.weight": numbers(8, 6, 3, 3),
    "a.bias": numbers(12),
}
CHANGES = {
    "LoKr": {"a.lokr_w1": numbers(3, 4), "a.lokr_w2": numbers(4, 3)},
    "LoKr of a convolution": {"c.lokr_w1": numbers(2, 2), "c.lokr_w2": numbers(4, 27)},
    "LoKr, DoRA": {"a.lokr_w1": numbers(3, 4), "a.lokr_w2": numbers(4, 3), "a.dora_scale": np.abs(numbers(12, 1)) + 1},
    "LoHa": {
        **{f"b.hada_w{number}_a": numbers(12, 2) for number in (1, 2)},
        **{f"b.hada_w{number}_b": numbers(2, 20) for number in (1, 2)},
    },
    "whole": {"a.diff": numbers(12, 12), "a.diff_b": numbers(12)},
    "whole kernel": {"c.diff": numbers(8, 6, 3, 3)},
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
def test_a_right_merge_is_the_same_and_a_wrong_entry_different(name, dtype, tmp_path: Path) -> None:
    base, adapter, merged = (tmp_path / f"{part}.safetensors" for part in ("base", "adapter", "merged"))
    save_file(BASE, base)
    save_file({f"diffusion_model.{key}": value for key, value in CHANGES[name].items()}, adapter)
    merge(base, adapter, merged, weights=[0.7], dtype=dtype)
    result = verify(merged, base=base, adapters=adapter, weights=[0.7])
    assert result.verdict.outcome == "same", str(result)
    changed = [weight for weight in result.verdict.weights if weight.fate == "changed"]
    assert changed and all(weight.controls and all(weight.controls.values()) for weight in changed)
    tensors = {key: value.copy() for key, value in load_file(merged).items()}
    wrong = tensors[changed[0].name].reshape(-1)
    wrong[3] = wrong[3] * wrong.dtype.type(1.1) + wrong.dtype.type(0.01)
    save_file(tensors, merged)
    assert verify(merged, base=base, adapters=adapter, weights=[0.7]).verdict.outcome == "different"


def test_another_strength_is_different(tmp_path: Path) -> None:
    base, adapter, merged = (tmp_path / f"{part}.safetensors" for part in ("base", "adapter", "merged"))
    save_file(BASE, base)
    save_file({f"diffusion_model.{key}": value for key, value in CHANGES["LoKr"].items()}, adapter)
    merge(base, adapter, merged)
    assert verify(merged, base=base, adapters=adapter, weights=[0.99]).verdict.outcome == "different"
