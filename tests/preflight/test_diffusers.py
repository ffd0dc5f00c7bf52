"""What diffusers really does with files for a UNet is what `check` says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_export
from support.diffusion import adapter_file, arrays_of, folder_of, fused_by_diffusers, linear_shapes, random_pairs, unet
from support.peft_models import trained

pytestmark = pytest.mark.slow
TARGETS = ("to_q", "to_v", "to_out.0")
KOHYA: dict[str, Any] = {"prefix": "lora_unet_", "flattened": True}
RIGHT = 1e-4  # the largest error of a weight


def pairs(rank: int = 2, **more: Any) -> dict[str, Any]:
    shapes = {name: shape for name, shape in linear_shapes(unet(), **more).items() if name.endswith(TARGETS)}
    return {name: (0.1 * a, 0.1 * b) for name, (a, b) in random_pairs(shapes, rank=rank).items()}


def of_two_ranks() -> dict[str, Any]:
    low, high = pairs(2), pairs(4)
    return {name: (low if name.endswith("to_q") else high)[name] for name in low}


def with_more(path: Path, more: Callable[[str, Any, Any], Mapping[str, Any]], *, alone: bool = False) -> Path:
    """A file of kohya's with further tensors for each module, or with these alone."""
    adapter_file(path, pairs(), alpha=2, **KOHYA)
    tensors: dict[str, Any] = {}
    for name, (a, b) in pairs().items():
        own = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{own}.{key}": value.astype(np.float32) for key, value in more(name, a, b).items()}
    save_file(tensors if alone else load_file(path) | tensors, path)
    return path


def of_peft(path: Path) -> Path:
    trained(unet(), r=2, lora_alpha=2, target_modules=["to_q", "to_v"]).save_pretrained(path.parent / "peft")
    return path.parent / "peft"


DIFFUSERS: dict[str, Any] = {"prefix": "unet.", "spelling": ("lora_A.weight", "lora_B.weight")}
FILES: Mapping[str, tuple[Callable[[Path], Path], str]] = {
    "kohya": (lambda path: adapter_file(path, pairs(), alpha=2, **KOHYA), "fits"),
    "kohya, half": (lambda path: adapter_file(path, pairs(), alpha=1, **KOHYA), "fits"),
    "kohya, two ranks": (lambda path: adapter_file(path, of_two_ranks(), alpha=2, **KOHYA), "fits"),
    "kohya, no alpha": (lambda path: adapter_file(path, pairs(), **KOHYA), "fits"),
    "kohya, rank 16": (lambda path: adapter_file(path, pairs(16), alpha=8, **KOHYA), "fits"),
    "diffusers": (lambda path: adapter_file(path, pairs(), **DIFFUSERS), "fits"),
    "diffusers, two ranks": (lambda path: adapter_file(path, of_two_ranks(), **DIFFUSERS), "fits"),
    "DoRA": (lambda path: with_more(path, lambda _, a, b: {"dora_scale": np.ones((len(b), 1))}), "changed"),
    "LoHa": (
        lambda path: with_more(
            path,
            lambda _, a, b: {"hada_w1_a": b, "hada_w1_b": a, "hada_w2_a": b, "hada_w2_b": a, "alpha": np.ones(())},
            alone=True,
        ),
        "refused",
    ),
    "LoKr": (
        lambda path: with_more(path, lambda _, a, b: {"lokr_w1": np.ones((1, 1)), "lokr_w2": b @ a}, alone=True),
        "refused",
    ),
    "a bias": (lambda path: with_more(path, lambda _, a, b: {"diff_b": b[:, 0]} if _.endswith("0") else {}), "refused"),
    "PEFT's folder": (of_peft, "dropped"),
}


def what_diffusers_does(adapter: Path, folder: Path) -> str:
    file = adapter / "adapter_model.safetensors" if adapter.is_dir() else adapter
    try:
        fused = fused_by_diffusers(unet(), "StableDiffusionPipeline", file, "unet")
    except ValueError as error:
        return "dropped" if "No adapters" in str(error) or "PEFT" in str(error) else "refused"
    base = arrays_of(unet())
    if all(np.array_equal(fused[name], base[name]) for name in base):
        return "dropped"
    lora_export.merge(folder_of(unet(), folder / "base"), adapter, output=folder / "out")
    ours = load_file(folder / "out" / "diffusion_pytorch_model.safetensors")
    return "fits" if all(np.abs(ours[name] - fused[name]).max() <= RIGHT for name in ours) else "changed"


@pytest.mark.parametrize("name", FILES)
def test_what_diffusers_does_with_a_file(name: str, tmp_path: Path) -> None:
    make, effect = FILES[name]
    adapter = make(tmp_path / "a.safetensors")
    (outcome,) = lora_export.check(adapter, runtimes=["diffusers"]).outcomes
    assert next((finding.effect for finding in outcome.findings), "fits") == effect
    assert what_diffusers_does(adapter, tmp_path) == effect
