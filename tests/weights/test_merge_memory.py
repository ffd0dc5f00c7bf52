"""Peak memory of a merge does not grow with the base, quantised or not."""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from support import peak
from support.handmade import peft_adapter

WIDTH = 4096
LIMIT = 160  # MiB


def sparse_file(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A safetensors file of bf16 zeros that uses no disk blocks."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + offset)
    return path


@pytest.mark.slow
def test_a_base_ten_times_as_large_needs_no_more_memory(tmp_path):
    peaks, sizes = [], []
    # The adapter is loaded: the ranks are chosen so that both adapters are of one size.
    for name, rows, rank, kept in (("small", 14_000, 127, 2_800), ("large", 140_000, 16, 28_000)):
        shapes = {"head.weight": (rows, WIDTH), **{f"kept.{number}": (kept, WIDTH) for number in range(32)}}
        base = sparse_file(tmp_path / f"{name}.safetensors", shapes)
        rng = np.random.default_rng(0)
        pair = rng.standard_normal((rank, WIDTH)), rng.standard_normal((rows, rank))
        adapter, out = peft_adapter(tmp_path / name, {"head": pair}), tmp_path / "out.safetensors"
        run = peak.run([sys.executable, "-m", "lora_export", "merge", base, adapter, "-o", out])
        assert run.code == 0
        peaks.append(run.peak)
        sizes.append(base.stat().st_size)
        out.unlink()
    assert sizes[1] > 8e9 and sizes[1] > 9.99 * sizes[0]
    print(f"peak memory for {sizes[0] / 1e9:.2f} and {sizes[1] / 1e9:.2f} GB: {peaks[0]:.0f} and {peaks[1]:.0f} MiB")
    assert max(peaks) <= LIMIT
    assert abs(peaks[1] - peaks[0]) < 8  # MiB


def gptq_of_zeros(folder: Path, layers: int) -> Path:
    """Layers of 4096 x 4096 in 4 bits that use no disk blocks; their scales are a 64th of the packed numbers."""
    shapes = {
        f"layers.{layer}.{name}": entry
        for layer in range(layers)
        for name, entry in {
            "qweight": ("I32", 4, (WIDTH // 8, WIDTH)),
            "qzeros": ("I32", 4, (WIDTH // 128, WIDTH // 8)),
            "scales": ("F16", 2, (WIDTH // 128, WIDTH)),
        }.items()
    }
    header, offset = {}, 0
    for name, (code, itemsize, shape) in shapes.items():
        size = itemsize * math.prod(shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(folder / "model.safetensors", 8 + len(text) + offset)
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps({"dtype": "float16", "quantization_config": quantization}))
    return folder


@pytest.mark.slow
def test_a_quantised_base_six_times_as_large_needs_no_more_memory(tmp_path):
    peaks = []
    for layers in (10, 60):
        base = gptq_of_zeros(tmp_path / f"base{layers}", layers)
        rng = np.random.default_rng(0)
        adapter = peft_adapter(
            tmp_path / f"adapter{layers}",
            {"layers.0": (rng.standard_normal((16, WIDTH)), rng.standard_normal((WIDTH, 16)))},
        )
        line = [sys.executable, "-m", "lora_export", "merge", base, adapter, "-o", tmp_path / "out", "--dequantize"]
        run = peak.run([*line, "--overwrite"])
        assert run.code == 0
        peaks.append(run.peak)
    print(f"peak memory for 10 and 60 layers: {peaks[0]:.0f} and {peaks[1]:.0f} MiB")
    assert max(peaks) <= LIMIT
    assert abs(peaks[1] - peaks[0]) < 8  # MiB; the scales of all layers take 20


def deft(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    tensors = {f"base_model.model.a.deft_{name}": rng.standard_normal(shape).astype(np.float32) / 64
               for name, shape in {"P": (WIDTH, 8), "R": (8, WIDTH)}.items()}  # fmt: skip
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "DEFT", "target_modules": ["a"], "r": 8, "alpha": 8, "decomposition_method": "qr"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def butterfly(folder: Path) -> Path:
    blocks = np.random.default_rng(0).standard_normal((2, WIDTH // 64, 64, 64)).astype(np.float32) / 99
    save_file({"lora_unet_a.oft_blocks": blocks, "lora_unet_a.alpha": np.zeros(1, np.float32)}, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [deft, butterfly])
def test_no_weight_is_held_whole_where_all_rows_change_together(tmp_path, adapter):
    base, out = sparse_file(tmp_path / "base.safetensors", {"a.weight": (WIDTH, WIDTH)}), tmp_path / "out.safetensors"
    words = ["-a", adapter(tmp_path / "adapter.safetensors"), "--layout", "*=out_in"]
    with base.open("r+b") as file:
        file.seek(-(2 * WIDTH * WIDTH), os.SEEK_END)
        file.write(np.random.default_rng(1).integers(0x3C00, 0x3D00, WIDTH * WIDTH, np.uint16).tobytes())
    for command in (["merge", base, words[1], "-o", out, *words[2:]], ["verify", out, "--base", base, *words]):
        run = peak.run([sys.executable, "-m", "lora_export", *command])
        print(f"{command[0]}: {run.peak:.0f} MiB")
        assert run.code == 0 and run.peak <= LIMIT
