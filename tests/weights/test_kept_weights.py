"""A merge into a quantised base that stays quantised: every scheme, kept, promoted and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_export
from lora_export.errors import InputRefused
from support.handmade import peft_adapter
from support.quantised_weights import WEIGHTS, quantised, weights_in

ONE_LAYER = [kind for kind in WEIGHTS if kind != "mxfp4"]


def base_of(folder: Path, kind: str, **fields: Any) -> Path:
    """A base of two layers of this kind, and floats."""
    stored, config = quantised(kind, "a.fc")
    other, _ = quantised(kind, "b.other")
    folder.mkdir()
    floats = {"norm.weight": torch.ones(4), "lm_head.weight": torch.ones(4, 4)}
    save_file(stored | other | floats, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"dtype": "float32", "quantization_config": config} | fields))
    return folder


def floats_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: weight.astype(np.float64) for name, weight in weights_in(folder).items()}


def adapter_of(folder: Path, shape: tuple[int, ...], size: float) -> tuple[Path, np.ndarray]:
    """An adapter of `a.fc`, and its change."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, shape[1])).astype(np.float32), rng.normal(size=(shape[0], 2)).astype(np.float32) * size
    return peft_adapter(folder, {"a.fc": (a, b)}), b.astype(np.float64) @ a.astype(np.float64)


def stored_in(folder: Path) -> dict[str, bytes]:
    tensors = load_file(folder / "model.safetensors")
    return {name: bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy()) for name, tensor in tensors.items()}


@pytest.mark.parametrize("kind", ONE_LAYER)
def test_large_change_is_kept_in_the_scheme(kind: str, tmp_path: Path) -> None:
    base, out = base_of(tmp_path / "base", kind), tmp_path / "merged"
    before = floats_of(base)
    weight = before["a.fc.weight"]
    adapter, change = adapter_of(tmp_path / "adapter", weight.shape, weight.std() / 4)
    result = lora_export.merge(base, [adapter], out, keep_quantised=True)
    assert result.report is not None
    (layer,) = result.report.layers
    assert layer.is_kept and layer.stored == layer.scheme and layer.weight == "a.fc.weight"
    one, other = stored_in(base), stored_in(out)
    changed = {name for name in one if one[name] != other[name]}
    assert one.keys() == other.keys() and len(changed) == 1
    assert changed <= {"a.fc.weight", "a.fc.weight_packed", "a.fc.qweight"}
    assert (base / "config.json").read_bytes() == (out / "config.json").read_bytes()
    after = floats_of(out)["a.fc.weight"]
    moved = after - weight
    assert layer.retention == pytest.approx((moved * change).sum() / np.square(change).sum(), rel=2e-3)
    assert layer.noise == pytest.approx(np.linalg.norm(moved - change) / np.linalg.norm(change), rel=5e-3)
    assert layer.retention > 0.5 and layer.noise < 1
    assert_judged(out, base, adapter)


def assert_judged(out: Path, base: Path, adapter: Path) -> None:
    """The output is the same; with one bit of any tensor flipped, it is different."""
    assert str(lora_export.verify(out, base=base, adapters=[adapter])).startswith("same")
    tensors = load_file(out / "model.safetensors")
    for name, tensor in tensors.items():
        changed = tensor.clone()
        flat = changed.view(-1).view(torch.uint8)
        middle = tensor.numel() // 2 * tensor.element_size()
        flat[middle + tensor.element_size() - 1 if tensor.is_floating_point() else middle] ^= 1  # its sign's byte
        save_file(tensors | {name: changed}, out / "model.safetensors", {"format": "pt"})
        try:
            verdict = str(lora_export.verify(out, base=base, adapters=[adapter]))
        except InputRefused:  # it describes no weight any more
            continue
        assert verdict.startswith("different"), name


@pytest.mark.parametrize("kind", ONE_LAYER)
def test_small_change_is_promoted_to_floats(kind: str, tmp_path: Path) -> None:
    base, out = base_of(tmp_path / "base", kind), tmp_path / "merged"
    before = floats_of(base)
    weight = before["a.fc.weight"]
    adapter, change = adapter_of(tmp_path / "adapter", weight.shape, np.abs(weight).max() / 1000)
    result = lora_export.merge(base, [adapter], out, keep_quantised=True, min_retention=0.9)
    assert result.report is not None
    (layer,) = result.report.layers
    assert layer.why.endswith("% of its change would be left") and layer.stored in ("float32", "bfloat16", "float16")
    after = floats_of(out)
    stored = load_file(out / "model.safetensors")["a.fc.weight"]
    assert str(stored.dtype) == f"torch.{layer.stored}"
    np.testing.assert_allclose(after["a.fc.weight"], weight + change, rtol=2.0**-8, atol=1e-6)
    assert np.array_equal(after["b.other.weight"], before["b.other.weight"])
    assert not [name for name in stored_in(out) if name.startswith("a.fc.") and name != "a.fc.weight"]
    assert_judged(out, base, adapter)
    assert states_float(out, "a.fc") and not states_float(out, "b.other") and not states_float(base, "a.fc")


def states_float(folder: Path, module: str) -> bool:
    """Whether the config excludes a module from quantisation."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    lists = ("ignore", "modules_to_not_convert", "llm_int8_skip_modules")
    named = [name for key in lists for name in config.get(key) or ()]
    patterns = [pattern for pattern in config.get("dynamic", {}) if pattern.startswith("-:")]
    import re

    return module in named or any(re.match(pattern[2:], module) for pattern in patterns)
