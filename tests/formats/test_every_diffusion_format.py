"""Formats of diffusion models: each variant merged, as nodes, and converted. The outcomes are in tests/README.md."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import lora_export
from lora_export.errors import InputRefused
from support import ROOT, tables
from support.handmade import graph_file

README, TABLE = ROOT / "tests/README.md", "formats of diffusion models"
NOT_HERE = "not in this test"
Array = NDArray[Any]
Tensors = Mapping[str, Array]
OUT, IN, KERNEL = 12, 10, (3, 3)
MODULE = "blocks.0.attn.to_q"
RNG = np.random.default_rng(0)


def numbers(*shape: int) -> Array:
    return RNG.integers(-3, 4, shape).astype(np.float32)


LINEAR, CONVOLUTION, VECTOR = numbers(OUT, IN), numbers(OUT, IN, *KERNEL), numbers(OUT)
A, B = numbers(2, IN), numbers(OUT, 2)
A_CONV, MID, A_TUCKER = numbers(2, IN, *KERNEL), numbers(2, 2, *KERNEL), numbers(2, IN, 1, 1)
HADA = {"hada_w1_a": numbers(OUT, 2), "hada_w1_b": numbers(2, IN), "hada_w2_a": B, "hada_w2_b": A}
KRON_1, KRON_2, KRON_2A, KRON_2B = numbers(3, 2), numbers(4, 5), numbers(4, 1), numbers(1, 5)
MAGNITUDE = np.arange(1, OUT + 1, dtype=np.float32)


def rescaled(weight: Array) -> Array:
    return weight * (MAGNITUDE / np.linalg.norm(weight, axis=1))[:, None]


@dataclass(frozen=True)
class Variant:
    """What a file has for one module, the base's tensors, and these after a merge, by the published formula."""

    tensors: Tensors  # ending -> tensor
    base: Tensors
    merged: Tensors
    metadata: Mapping[str, str] | None = None

    @property
    def is_linear(self) -> bool:
        return set(self.base) == {"weight"} and self.base["weight"].ndim == 2


def of_weight(tensors: Tensors, change: Array, base: Array = LINEAR) -> Variant:
    return Variant(tensors, {"weight": base}, {"weight": base + change})


def pair(down: str, up: str, **more: Array) -> Variant:
    alpha = float(more["alpha"]) if "alpha" in more else 2.0
    return of_weight({down: A, up: B, **more}, alpha / 2 * B @ A)


ALPHA = {"alpha": np.float32(1)}
LYCORIS = {
    "LoHa": of_weight({**HADA, **ALPHA}, 0.5 * (HADA["hada_w1_a"] @ HADA["hada_w1_b"]) * (B @ A)),
    "LoKr, whole factors": of_weight({"lokr_w1": KRON_1, "lokr_w2": KRON_2, **ALPHA}, np.kron(KRON_1, KRON_2)),
    "LoKr, one factor decomposed": of_weight(
        {"lokr_w1": KRON_1, "lokr_w2_a": KRON_2A, "lokr_w2_b": KRON_2B, "alpha": np.float32(0.75)},
        0.75 * np.kron(KRON_1, KRON_2A @ KRON_2B),
    ),
    "a whole change": of_weight({"diff": A.repeat(OUT // 2, 0)}, A.repeat(OUT // 2, 0)),
    "a bias and a pair": Variant(
        {"lora_down.weight": A, "lora_up.weight": B, "diff_b": VECTOR},
        {"weight": LINEAR, "bias": MAGNITUDE},
        {"weight": LINEAR + B @ A, "bias": MAGNITUDE + VECTOR},
    ),
    "a norm": Variant({"w_norm": VECTOR, "b_norm": VECTOR}, {"weight": VECTOR, "bias": VECTOR},
                      {"weight": 2 * VECTOR, "bias": 2 * VECTOR}),
    "DoRA": Variant({"lora_down.weight": A, "lora_up.weight": B, "dora_scale": MAGNITUDE[:, None], **ALPHA},
                    {"weight": LINEAR}, {"weight": rescaled(LINEAR + 0.5 * B @ A)}),
    "a convolution": of_weight({"lora_down.weight": A_CONV, "lora_up.weight": B[..., None, None], **ALPHA},
                               0.5 * np.einsum("or,rikl->oikl", B, A_CONV), CONVOLUTION),
    "LoCon's core": of_weight(
        {"lora_down.weight": A_TUCKER, "lora_mid.weight": MID, "lora_up.weight": B[..., None, None], **ALPHA},
        0.5 * np.einsum("op,pqkl,qi->oikl", B, MID, A_TUCKER[..., 0, 0]), CONVOLUTION),
    "DoRA of the inputs": of_weight({"lora_down.weight": A, "lora_up.weight": B, "dora_scale": numbers(1, IN)}, B @ A),
}  # fmt: skip
RECORDED = json.dumps({"unet.r": 2, "unet.lora_alpha": 6, "unet.target_modules": [MODULE]})
VARIANTS: dict[str, tuple[str, Variant]] = {
    "kohya, LoRA": ("lora_unet_", pair("lora_down.weight", "lora_up.weight", **ALPHA)),
    **{f"kohya, {name}": ("lora_unet_", variant) for name, variant in LYCORIS.items()},
    "comfyui, lora_A": ("diffusion_model.", pair("lora_A.weight", "lora_B.weight")),
    "comfyui, lora_down": ("diffusion_model.", pair("lora_down.weight", "lora_up.weight", **ALPHA)),
    **{f"comfyui, {name}": ("diffusion_model.", LYCORIS[name]) for name in ("LoHa", "LoKr, one factor decomposed")},
    "diffusers, lora_A": ("unet.", pair("lora_A.weight", "lora_B.weight")),
    "diffusers, lora.down": ("unet.", pair("lora.down.weight", "lora.up.weight", **ALPHA)),
    "diffusers, alpha in the header": (
        "unet.",
        Variant(
            {"lora_A.weight": A, "lora_B.weight": B},
            {"weight": LINEAR},
            {"weight": LINEAR + 3 * B @ A},
            {"lora_adapter_metadata": RECORDED},
        ),
    ),
}


def adapter_of(name: str, folder: Path) -> tuple[Path, Variant]:
    prefix, variant = VARIANTS[name]
    module = MODULE.replace(".", "_") if prefix.endswith("_") else MODULE
    tensors = {f"{prefix}{module}.{ending}": np.ascontiguousarray(value) for ending, value in variant.tensors.items()}
    save_file(tensors, folder / "adapter.safetensors", dict(variant.metadata or {}))
    return folder / "adapter.safetensors", variant


def merged(adapter: Path, variant: Variant, folder: Path) -> str:
    base = base_of(variant, folder)
    lora_export.merge(base, adapter, folder / "out")
    found = load_file(folder / "out" / "model.safetensors")
    agree = all(np.allclose(found[f"{MODULE}.{name}"], value, atol=1e-5) for name, value in variant.merged.items())
    return "right" if agree else "wrong"


def base_of(variant: Variant, folder: Path) -> Path:
    if not (base := folder / "base").exists():
        base.mkdir()
        save_file({f"{MODULE}.{name}": value for name, value in variant.base.items()}, base / "model.safetensors")
        (base / "config.json").write_text(json.dumps({"_class_name": "X", "_diffusers_version": "0.42.1"}))
    return base


def merge(name: str, folder: Path) -> str:
    return merged(*adapter_of(name, folder), folder)


def nodes(name: str, folder: Path) -> str:
    adapter, variant = adapter_of(name, folder)
    if not variant.is_linear:
        return NOT_HERE
    graph = graph_file(folder / "base.onnx", {f"{MODULE}.weight": variant.base["weight"].T})
    result = lora_export.export_onnx(graph, folder / "out.onnx", adapters=adapter, lora="nodes", verify=False)
    x = RNG.standard_normal((3, IN)).astype(np.float32)
    (output,) = onnxruntime.InferenceSession(str(result.output)).run(None, {"x": x})
    return "right" if np.allclose(output, x @ variant.merged["weight"].T, atol=1e-4) else "wrong"


def convert(to: str) -> Callable[[str, Path], str]:
    def converted(name: str, folder: Path) -> str:
        adapter, variant = adapter_of(name, folder)
        written = lora_export.convert(adapter, folder / "written", to=to, base=base_of(variant, folder)).output
        assert lora_export.load_adapter(written).format == to
        return merged(written, variant, folder)

    return converted


WAYS = {"merge": merge, "nodes": nodes, **{f"to {to}": convert(to) for to in ("kohya", "comfyui", "diffusers")}}


def outcome(name: str, way: str, folder: Path) -> str:
    folder.mkdir()
    try:
        return WAYS[way](name, folder)
    except InputRefused:
        return "refused"


@pytest.mark.parametrize("name", VARIANTS)
def test_each_way_has_the_outcome_of_the_table(name: str, tmp_path: Path) -> None:
    found = {way: outcome(name, way, tmp_path / way.replace(" ", "-")) for way in WAYS}
    if os.environ.get("LORA_EXPORT_TABLES"):
        recorded = tables.rows(tables.text(README, TABLE)) if name != next(iter(VARIANTS)) else {}
        tables.put(README, TABLE, tables.table(recorded | {name: found}, "format, variant"))
    assert "wrong" not in found.values()
    assert tables.rows(tables.text(README, TABLE))[name] == found


def test_the_table_has_each_variant_once() -> None:
    assert list(tables.rows(tables.text(README, TABLE))) == list(VARIANTS)
