"""Single files in 8 bits as ComfyUI reads them: with scales beside the weights, named in the header, or with none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_export import merge, verify
from lora_export.errors import InputRefused
from lora_export.names.diffusion_layouts import other_layouts
from lora_export.storage import safetensors_file
from lora_export.weights.checkpoint import open_checkpoint
from lora_export.weights.quantised.comfyui_files import LAYERS_IN_HEADER
from support.cli import call
from support.diffusion import adapter_file, layout_of, original_shapes, random_pairs, transformer, unet
from support.handmade import peft_adapter
from support.slow import slow

PREFIX = "model.diffusion_model."
FLOAT8 = torch.float8_e4m3fn


def original_weights(model: str) -> dict[str, torch.Tensor]:
    """A model under the names of its authors."""
    state = (unet() if model == "UNet" else transformer(model)).state_dict()
    layout = other_layouts(state)[0] if model == "UNet" else layout_of(model)
    torch.manual_seed(0)
    shapes = original_shapes(layout, {name: tuple(value.shape) for name, value in state.items()})
    return {PREFIX + name: torch.randn(shape) / 20 for name, shape in shapes.items()}


def in_8_bits(weights: Mapping[str, torch.Tensor], form: str, path: Path) -> Path:
    """The weights as a file: `scaled` in the first form of ComfyUI, `stated` in its second, `plain` without scales."""
    stored: dict[str, torch.Tensor] = {}
    layers = {}
    for name, weight in weights.items():
        module, is_matrix = name.removesuffix(".weight"), name.endswith(".weight") and weight.ndim == 2
        if form == "plain":
            stored[name] = weight.to(FLOAT8)
        elif is_matrix:
            scale = weight.abs().max() / 448
            stored[name] = (weight / scale).to(FLOAT8)
            stored[f"{module}.{'scale_weight' if form == 'scaled' else 'weight_scale'}"] = scale
            layers[module] = {"format": "float8_e4m3fn"}
        else:
            stored[name] = weight.bfloat16()
    metadata = {"modelspec.title": "a model"}
    if form == "scaled":
        stored[f"{PREFIX}scaled_fp8"] = torch.empty(0).to(FLOAT8)
    if form == "stated":
        metadata[LAYERS_IN_HEADER] = json.dumps({"format_version": "1.0", "layers": layers})
    save_file(stored, path, metadata)
    return path


def names_in(path: Path) -> list[str]:
    return list(safetensors_file.open_file(path).entries)


# Model -> a module of it under its authors' names, and one under those of diffusers
MODULES = {
    "Flux": ("double_blocks.0.img_attn.qkv", "single_transformer_blocks.0.attn.to_q"),
    "Wan": ("blocks.1.self_attn.q", "blocks.0.ffn.net.2"),
    "UNet": ("middle_block.1.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1"),
}


def adapters_for(model: str, weights: Mapping[str, torch.Tensor], folder: Path) -> dict[str, Path]:
    """Adapters in three dialects, whose changes are as large as the weights."""
    own, theirs = MODULES[model]
    state = (unet() if model == "UNet" else transformer(model)).state_dict()
    shape = tuple(weights[f"{PREFIX}{own}.weight"].shape)
    first = {own: tuple(factor / 5 for factor in random_pairs({own: shape})[own])}
    its_shape = tuple(state[f"{theirs}.weight"].shape)
    other = {theirs: tuple(factor / 5 for factor in random_pairs({theirs: its_shape})[theirs])}
    named = "unet." if model == "UNet" else "transformer."
    return {
        "comfyui": adapter_file(folder / "c.safetensors", first, prefix="diffusion_model."),
        "kohya": adapter_file(folder / "k.safetensors", first, prefix="lora_unet_", flattened=True),
        "diffusers": adapter_file(
            folder / "d.safetensors", other, prefix=named, spelling=("lora_A.weight", "lora_B.weight")
        ),
    }


@pytest.mark.parametrize(
    ("model", "form"), [("Flux", "stated"), ("Wan", "scaled"), ("UNet", "plain"), slow("UNet", "stated")]
)
def test_adapters_of_every_dialect_are_merged(model: str, form: str, tmp_path: Path) -> None:
    weights = original_weights(model)
    base, out = in_8_bits(weights, form, tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    with pytest.raises(InputRefused, match=r"is quantised \(in a form for ComfyUI\).*keep_quantised=True"):
        merge(base, [], out)
    before = load_file(base)
    for adapter in adapters_for(model, weights, tmp_path).values():
        result = merge(base, [adapter], out, keep_quantised=True, overwrite=True)
        assert result.report is not None and all(layer.is_kept for layer in result.report.layers)
        after = load_file(out)
        assert names_in(out) == names_in(base)  # the names and their order are those of the file
        changed = {name for name in before if before[name].float().ne(after[name].float()).any()}
        assert len(changed) == 1 and {layer.weight for layer in result.report.layers} in (changed, set())
        assert str(verify(out, base=base, adapters=[adapter])).startswith("same")
        assert str(verify(out, base=base, adapters=[adapter], weights=[0.8])).startswith("different")


def test_change_of_a_part_with_dora_is_what_was_measured(tmp_path: Path) -> None:
    weights = original_weights("Flux")
    base, out, (name, _) = in_8_bits(weights, "plain", tmp_path / "base.safetensors"), tmp_path / "out", MODULES["Flux"]
    save_file({key: weight.contiguous() for key, weight in weights.items()}, tmp_path / "floats.safetensors")
    part = weights[f"{PREFIX}{name}.weight"].to(FLOAT8).float().numpy().astype(np.float64)
    rows, columns = len(part) // 3, part.shape[1]
    for module, own in (("to_q", part[:rows]), ("to_v", part[2 * rows :])):
        layer = f"transformer.transformer_blocks.0.attn.{module}"
        magnitude = {f"{layer}.lora_magnitude_vector": np.full(rows, 9, np.float32)}
        pair = np.ones((1, columns)), np.full((rows, 1), 0.25)
        dora = peft_adapter(tmp_path / module, {layer: pair}, magnitude, use_dora=True, modules_to_save=None)
        floats = tmp_path / "floats.safetensors"
        result = merge(base, [dora], out, dequantize=True, float_base=floats, overwrite=True)
        assert result.report is not None
        total = own + 0.25
        expected = np.linalg.norm(9 * total / np.linalg.norm(total, axis=1, keepdims=True) - own)
        changes = {loss.weight: loss.change for loss in result.report.quantisation if loss.change is not None}
        assert changes == {f"{PREFIX}{name}.weight": pytest.approx(float(expected), rel=1e-5)}


def test_layer_with_a_replaced_part_becomes_a_float(tmp_path: Path) -> None:
    weights, name = original_weights("Flux"), f"{PREFIX}{MODULES['Flux'][0]}.weight"
    base, (rows, columns) = in_8_bits(weights, "stated", tmp_path / "base.safetensors"), weights[name].shape
    part, layer = rows // 3, "transformer.transformer_blocks.0.attn"
    pair = {f"{layer}.to_k": (np.ones((1, columns)), np.full((part, 1), 0.25))}
    own = {f"{layer}.to_q.weight": np.full((part, columns), 0.5, np.float32)}
    adapter = peft_adapter(tmp_path / "adapter", pair, own)
    result = merge(base, [adapter], tmp_path / "out", keep_quantised=True)
    assert result.report is not None
    assert [(one.weight, one.why) for one in result.report.layers] == [(name, "the adapter has values of its own")]
    stored, after = load_file(base), load_file(tmp_path / "out.safetensors")[name]
    before = (stored[name].float() * stored[name.removesuffix("weight") + "weight_scale"]).bfloat16()
    assert torch.equal(after[:part], torch.full((part, columns), 0.5).bfloat16())
    assert torch.equal(after[part : 2 * part], (before[part : 2 * part].float() + 0.25).bfloat16())
    assert torch.equal(after[2 * part :], before[2 * part :])


LAYERS = {f"{PREFIX}{name}": (3, 5) for name in ("a.weight", "b.weight", "c.weight")}  # of odd bytes


def small(folder: Path, form: str) -> tuple[Path, Path]:
    """A base of three layers, and an adapter whose change of the second is below what 8 bits hold."""
    torch.manual_seed(0)
    weights = {name: torch.randn(shape) for name, shape in LAYERS.items()} | {f"{PREFIX}a.bias": torch.ones(3)}
    pairs = {"b": (np.ones((1, 5), np.float32), np.full((3, 1), 0.005, np.float32))}
    adapter = adapter_file(folder / "adapter.safetensors", pairs, prefix="diffusion_model.")
    return in_8_bits(weights, form, folder / "base.safetensors"), adapter


@pytest.mark.parametrize("form", ["scaled", "stated", "plain"])
def test_promoted_layer_has_no_scale_and_no_name(form: str, tmp_path: Path) -> None:
    """ComfyUI makes a float layer of one that neither a scale, nor `comfy_quant`, nor the header names."""
    base, adapter = small(tmp_path, form)
    out = tmp_path / "out.safetensors"
    result = merge(base, [adapter], out, keep_quantised=True)
    assert result.report is not None
    (layer,) = result.report.layers
    assert layer.why and layer.stored == "bfloat16"
    after = load_file(out)
    dropped = {name for name in names_in(base) if name not in after}
    assert after[f"{PREFIX}b.weight"].dtype == torch.bfloat16 and all(f"{PREFIX}b." in name for name in dropped)
    assert len(dropped) == (form != "plain")
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.title"] == "a model"
    if form == "stated":
        assert json.loads(metadata[LAYERS_IN_HEADER])["layers"].keys() == {f"{PREFIX}a", f"{PREFIX}c"}
    assert str(verify(out, base=base, adapters=[adapter])).startswith("same")
    save_file(after | {f"{PREFIX}b.weight": after[f"{PREFIX}b.weight"] * 1.01}, out, metadata)
    assert str(verify(out, base=base, adapters=[adapter])).startswith("different")


@pytest.mark.parametrize("form", ["scaled", "stated", "plain"])
def test_dequantised_file_is_a_float_model(form: str, tmp_path: Path) -> None:
    base, adapter = small(tmp_path, form)
    out = tmp_path / "out.safetensors"
    merge(base, [adapter], out, dequantize=True)
    before, after = load_file(base), load_file(out)
    assert after.keys() == LAYERS.keys() | {f"{PREFIX}a.bias"}
    own = before[f"{PREFIX}c.weight"].float()
    scale = before.get(f"{PREFIX}c.scale_weight", before.get(f"{PREFIX}c.weight_scale", torch.ones(())))
    assert torch.equal(after[f"{PREFIX}c.weight"], (own * scale).bfloat16())
    with safe_open(out, "pt") as file:
        assert LAYERS_IN_HEADER not in file.metadata()
    assert str(verify(out, base=base, adapters=[adapter])).startswith("same")


def test_numbers_are_those_of_pytorch(tmp_path: Path) -> None:
    """Times the scale in fp32, and rounded once."""
    every = torch.arange(256, dtype=torch.uint8)
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        floats = every.view(kind)
        stored = floats[floats.float().isfinite()].reshape(2, -1)
        path = tmp_path / f"{kind}.safetensors"
        save_file(
            {"x.weight": stored, "x.scale_weight": torch.tensor(0.3), "scaled_fp8": torch.zeros(0).to(kind)}, path
        )
        tensor = open_checkpoint(path, dequantise=True).quantised["x.weight"]
        packed = stored.view(torch.uint8).numpy().reshape(-1)
        expected = (stored.float() * torch.tensor(0.3)).bfloat16()
        assert tensor.decode(slice(0, 2), packed).tobytes() == expected.view(torch.uint8).numpy().tobytes()


SHAPE = (130, 96)  # more than a tile of rows, and no whole tiles of groups
POSITIVE = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
FLOAT4 = torch.cat([POSITIVE, -POSITIVE])


def in_groups(kind: str, path: Path) -> tuple[Path, torch.Tensor]:
    """A file with one weight in groups, and what it is: the scales are put one by one where cuBLAS has them."""
    torch.manual_seed(0)
    rows, columns, size = *SHAPE, {"nvfp4": 16, "mxfp8": 32}[kind]
    groups, tiles = columns // size, -(-columns // size // 4)
    stored = torch.zeros(256 * tiles * 4, dtype=torch.uint8)
    scales = torch.randint(118, 122, (rows, groups), dtype=torch.uint8)
    if kind == "nvfp4":
        scales = (torch.rand(rows, groups) + 0.5).to(FLOAT8).view(torch.uint8)
    for row in range(rows):
        for group in range(groups):
            tile = row // 128 * tiles + group // 4
            stored[512 * tile + 16 * (row % 32) + 4 * (row % 128 // 32) + group % 4] = scales[row, group]
    stored = stored.reshape(256, tiles * 4)
    tensors = {
        "x.comfy_quant": stated(format=kind),
        "x.bias": torch.zeros(rows),
        "y.weight": torch.ones(4, 4).bfloat16(),
    }
    if kind == "nvfp4":
        codes = torch.randint(0, 16, SHAPE, dtype=torch.uint8)
        tensors |= {"x.weight": codes[:, ::2] << 4 | codes[:, 1::2], "x.weight_scale": stored.view(FLOAT8)}
        tensors["x.weight_scale_2"] = torch.tensor(0.01)
        values, factors = FLOAT4[codes.long()], scales.view(FLOAT8).float() * 0.01
    else:
        tensors |= {"x.weight": torch.randn(SHAPE).to(FLOAT8), "x.weight_scale": stored}
        values, factors = tensors["x.weight"].float(), torch.exp2(scales.float() - 127)
    save_file(tensors, path)
    return path, (values.reshape(rows, groups, size) * factors[..., None]).reshape(SHAPE)


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8"])
def test_weights_in_groups_are_kept_promoted_and_made_floats(kind: str, tmp_path: Path) -> None:
    base, wanted = in_groups(kind, tmp_path / "base.safetensors")
    tensor, packed = open_checkpoint(base, dequantise=True).quantised["x.weight"], bytes_of(load_file(base)["x.weight"])
    for rows in (slice(0, 100), slice(100, 130)):
        found = tensor.decode(rows, packed.reshape(SHAPE[0], -1)[rows].reshape(-1))
        assert found.tobytes() == wanted[rows].bfloat16().view(torch.uint8).numpy().tobytes()
    a, b = (torch.randn(size).numpy() for size in ((2, SHAPE[1]), (SHAPE[0], 2)))
    adapter = adapter_file(tmp_path / "a.safetensors", {"x": (a, b * np.float32(0.01))}, prefix="diffusion_model.")
    change, out = torch.from_numpy(b @ a) * np.float32(0.01), tmp_path / "out.safetensors"
    for strength, rescale, is_kept in ((1.0, False, True), (4.0, True, True), (3e-3, False, False)):
        options: dict[str, Any] = {"keep_quantised": True, "rescale": rescale, "overwrite": True}
        result = merge(base, [adapter], out, weights=[strength], **options)
        assert result.report is not None and [layer.is_kept for layer in result.report.layers] == [is_kept]
        before, after = load_file(base), load_file(out)
        changed = {
            name for name, one in after.items() if not np.array_equal(bytes_of(one), bytes_of(before.get(name, one)))
        }
        assert changed == {"x.weight", *(["x.weight_scale"] if rescale else [])}
        assert ("x.comfy_quant" in after) is is_kept
        codes = tensor.codes
        if is_kept and not rescale and codes is not None:
            grid = codes.values[np.isfinite(codes.values)].astype(np.float64)
            scales = codes.load()(slice(0, SHAPE[0]))[0]
            target = (wanted + strength * change).numpy().astype(np.float64)
            least = np.abs(target[..., None] - grid * scales[..., None].astype(np.float64)).min(-1)
            numbers = codes.layout.unpack(slice(0, SHAPE[0]), bytes_of(after["x.weight"]))
            distance = np.abs(codes.weight(numbers, scales, None) - target)
            assert (distance <= least + 1e-5 * np.abs(target).max()).all()
        assert str(verify(out, base=base, adapters=[adapter], weights=[strength])).startswith("same")
        assert str(verify(out, base=base, adapters=[adapter], weights=[1.5 * strength])).startswith("different")


def bytes_of(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def test_float16_files_become_float16(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x.weight": torch.ones(2, 2).to(FLOAT8), "norm.weight": torch.ones(2).half()}, path)
    assert open_checkpoint(path, dequantise=True).quantised["x.weight"].dtype == np.float16


def stated(**fields: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


WEIGHT = torch.ones(2, 4).to(FLOAT8)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x.scale_weight": torch.ones(())}, r"parts of weights in comfyui belong to no quantised weight:\n.*scale_w"),
        ({"x.weight_scale": torch.ones(())}, "belong to no quantised weight"),
        ({"x.weight_scale_inv": torch.ones(1, 1)}, "belong to no quantised weight"),
        ({"x.comfy_quant": stated(format="float8_e4m3fn")}, "x.weight_scale, which belongs to it, is missing"),
        (
            {"x.comfy_quant": stated(format="nvfp4")},
            "x.weight is float8_e4m3fn, and the file states nvfp4 for it: lora-",
        ),
        ({"x.comfy_quant": stated(format="mxfp8")}, r"the shape \[2, 4\] has no whole groups of 32 columns"),
        (
            {"x.comfy_quant": stated(format="mxfp8"), "x.weight": torch.ones(2, 32).to(FLOAT8)},
            "x.weight_scale, which belongs to it, is missing",
        ),
        (
            {
                "x.comfy_quant": stated(format="nvfp4"),
                "x.weight": torch.zeros(2, 8, dtype=torch.uint8),
                "x.weight_scale": torch.ones(2, 1).to(FLOAT8),
            },
            "x.weight_scale: 2 elements, and x.weight needs 512",
        ),
        ({"x.comfy_quant": stated(format="convrot_w4a4")}, "the file states convrot_w4a4"),
        ({"x.comfy_quant": stated(format="float8_e5m2")}, "the file states float8_e5m2"),
        ({"x.comfy_quant": stated(format="int8_tensorwise", convrot=True)}, "x.weight: its inputs are rotated"),
        ({"x.comfy_quant": stated(format="int8_tensorwise", params={"convrot": True})}, "its inputs are rotated"),
        ({"x.comfy_quant": torch.ones(3, dtype=torch.uint8)}, "x.comfy_quant is not JSON"),
        (
            {"y.comfy_quant": stated(format="float8_e4m3fn")},
            "y.weight is quantised, and its packed numbers are missing",
        ),
        (
            {"x.scale_weight": torch.ones(3), "scaled_fp8": WEIGHT[:0]},
            "x.scale_weight: 3 elements, and x.weight needs 2",
        ),
        ({"x.scale_weight": torch.ones(2), "scaled_fp8": WEIGHT[:0]}, r"the shape \[2\] fits no weight of \[2, 4\]"),
    ],
)
def test_file_that_states_something_else_is_refused(
    tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    save_file({"x.weight": WEIGHT} | tensors, tmp_path / "x.safetensors")
    with pytest.raises(InputRefused, match=message):
        open_checkpoint(tmp_path / "x.safetensors", dequantise=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is not a JSON object"),
        ("{}", "has no table of layers"),
        ('{"layers": {"y": {}}}', "y.weight is quantised"),
    ],
)
def test_header_that_states_something_else_is_refused(text: str, message: str, tmp_path: Path) -> None:
    save_file({"x.weight": WEIGHT}, tmp_path / "x.safetensors", {LAYERS_IN_HEADER: text})
    with pytest.raises(InputRefused, match=message):
        open_checkpoint(tmp_path / "x.safetensors", dequantise=True)


def test_header_that_names_a_promoted_layer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ComfyUI would read its floats as 8 bits."""
    base, adapter = small(tmp_path, "stated")
    out = tmp_path / "out.safetensors"
    assert call("merge", base, adapter, "-o", out, "--keep-quantised") == 0
    with safe_open(base, "pt") as file:
        save_file(load_file(out), out, file.metadata())
    assert call("verify", out, "--base", base, "-a", adapter) == 3
    assert f"{PREFIX}b.weight is bfloat16, and the file states float8_e4m3fn" in capsys.readouterr().err


def test_header_that_states_another_product_is_different(tmp_path: Path) -> None:
    base, adapter = small(tmp_path, "stated")
    out = tmp_path / "out.safetensors"
    merge(base, [adapter], out, keep_quantised=True)
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    table = json.loads(metadata[LAYERS_IN_HEADER])
    table["layers"][f"{PREFIX}a"]["full_precision_matrix_mult"] = True
    save_file(load_file(out), out, metadata | {LAYERS_IN_HEADER: json.dumps(table)})
    text = str(verify(out, base=base, adapters=[adapter]))
    assert text.startswith("different") and f"{LAYERS_IN_HEADER} of the header is not the base's" in text
