"""Each format and variant: merged, as nodes of a graph, and converted. The outcomes are tables in tests/README.md."""

from __future__ import annotations

import functools
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
from support.format_examples import EXAMPLES, FormatExample
from support.handmade import graph_file

README = ROOT / "tests/README.md"
NOT_HERE = "not in this test"
Array = NDArray[Any]
Tensors = Mapping[str, Array]

# --- Formats of diffusion models; those of language models are in `support/format_examples.py` ---

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

    def example(self, prefix: str, folder: Path) -> FormatExample:
        """The adapter in a file, under names with this prefix."""
        module = MODULE.replace(".", "_") if prefix.endswith("_") else MODULE
        tensors = {f"{prefix}{module}.{ending}": np.ascontiguousarray(value) for ending, value in self.tensors.items()}
        folder.mkdir()
        save_file(tensors, folder / "adapter.safetensors", dict(self.metadata or {}))
        base, merged = (
            {f"{MODULE}.{name}": value for name, value in each.items()} for each in (self.base, self.merged)
        )
        config = {"_class_name": "QwenImageTransformer2DModel", "_diffusers_version": "0.42.1"}
        return FormatExample(folder / "adapter.safetensors", base, merged, config=config)


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
DIFFUSION = {name: functools.partial(variant.example, prefix) for name, (prefix, variant) in VARIANTS.items()}


# --- What each way makes of an example ---


def base_of(example: FormatExample, folder: Path) -> Path:
    base = folder / "base"
    base.mkdir()
    save_file({name: np.ascontiguousarray(value) for name, value in example.base.items()}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(dict(example.config)))
    return base


def is_right(merged: Path, example: FormatExample) -> bool:
    found = load_file(merged / "model.safetensors")
    return all(np.allclose(found[name], value, rtol=1e-5, atol=1e-5) for name, value in example.merged.items())


def merge(example: FormatExample, folder: Path) -> str:
    layout = {name.removesuffix(".weight"): "out_in" for name, value in example.base.items() if value.ndim == 2}
    base, layouts = base_of(example, folder), {} if example.config else dict.fromkeys(layout, "out_in")
    lora_export.merge(base, example.path, folder / "out", reading=example.reading, layout=layouts)
    return "right" if is_right(folder / "out", example) else "wrong"


def nodes(example: FormatExample, folder: Path) -> str:
    if not example.is_linear or len({value.shape[1] for value in example.base.values()}) != 1:
        return NOT_HERE
    base = base_of(example, folder)
    weights = {name.removesuffix(".weight"): value for name, value in example.base.items()}
    graph = graph_file(folder / "base.onnx", {f"{name}.weight": value.T for name, value in weights.items()})
    reading = example.reading.for_base(base)
    options = {"lora": "nodes", "reading": reading, "verify": False}  # it is compared with the formula below
    result = lora_export.export_onnx(graph, folder / "out.onnx", adapters=example.path, **options)
    x = np.random.default_rng(0).standard_normal((3, next(iter(weights.values())).shape[1])).astype(np.float32)
    outputs = onnxruntime.InferenceSession(str(result.output)).run(None, {"x": x})
    expected = [x @ value.T for value in example.merged.values()]
    agree = all(np.allclose(one, other, rtol=1e-4, atol=1e-4) for one, other in zip(outputs, expected, strict=True))
    return "right" if agree else "wrong"


def convert(to: str, *, with_base: bool, **more: Any) -> Callable[[FormatExample, Path], str]:
    def converted(example: FormatExample, folder: Path) -> str:
        base = base_of(example, folder)
        options = {"base": base} if with_base else {"reading": example.reading.for_base(base)}
        written = lora_export.convert(example.path, folder / "written", to=to, **options, **more).output
        assert lora_export.load_adapter(written).format == to
        (folder / "again").mkdir()
        return merge(FormatExample(written, example.base, example.merged, config=example.config), folder / "again")

    return converted


WAYS = {"merge": merge, "nodes": nodes}
# The title of a table in the README -> its examples, and what is made of them.
TABLES = {
    "formats of language models": (
        EXAMPLES,
        WAYS
        | {f"convert to {to}": convert(to, with_base=False) for to in ("peft", "mlx")}
        | {"as LoRA": convert("peft", with_base=False, as_kind="lora", rank=64)},
    ),
    "formats of diffusion models": (
        DIFFUSION,
        WAYS
        | {f"to {to}": convert(to, with_base=True) for to in ("kohya", "comfyui", "diffusers")}
        | {"as LoRA": convert("diffusers", with_base=True, as_kind="lora", rank=64)},
    ),
}


def outcome(table: str, name: str, way: str, folder: Path) -> str:
    """right, wrong, or refused with its reason where that is not the table's own."""
    folder.mkdir()
    examples, ways = TABLES[table]
    try:
        return ways[way](examples[name](folder / "adapter"), folder)
    except InputRefused:
        return "refused"


@pytest.mark.parametrize(
    ("table", "name"), [(table, name) for table, (examples, _) in TABLES.items() for name in examples]
)
def test_each_way_has_the_outcome_of_the_table(table: str, name: str, tmp_path: Path) -> None:
    examples, ways = TABLES[table]
    found = {way: outcome(table, name, way, tmp_path / way) for way in ways}
    if os.environ.get("LORA_EXPORT_TABLES"):
        recorded = tables.rows(tables.text(README, table)) if name != next(iter(examples)) else {}
        tables.put(README, table, tables.table(recorded | {name: found}, "format, variant"))
    assert "wrong" not in found.values()
    assert tables.rows(tables.text(README, table))[name] == found


@pytest.mark.parametrize("table", TABLES)
def test_the_table_has_each_format_once(table: str) -> None:
    assert list(tables.rows(tables.text(README, table))) == list(TABLES[table][0])
