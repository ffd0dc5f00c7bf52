"""One weight of every scheme that checkpoints are quantised in, with random numbers, packed here by hand.

Among them are what loaders are wrong about: padded rows, inputs in the order of their activations, zero points, double
quantisation, blocks that do not divide the shape.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitsandbytes import functional

from lora_export.weights.checkpoint import open_checkpoint
from lora_export.weights.quantised.comfyui_files import MARKER
from support.quantised import OpenedWeight, Tensors

Quantised = tuple[Tensors, dict[str, Any]]  # the tensors of the module, and the quantization_config
OUT, IN = 24, 96


def _words(numbers: np.ndarray, bits: int) -> torch.Tensor:
    """(rows, n) -> (rows, words of 32 bits), from the lowest bit on."""
    stream = (numbers[:, :, None].astype(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1
    padded = np.zeros((len(numbers), -(-numbers.shape[1] * bits // 32) * 32), np.uint8)
    padded[:, : numbers.shape[1] * bits] = stream.reshape(len(numbers), -1)
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32))


def _scales(*shape: int) -> torch.Tensor:
    return torch.rand(*shape) / 16 + 0.05


def _compressed_integers(bits: int, columns: int = IN, group: int = 0, zeros: bool = False) -> Quantised:
    rng = np.random.default_rng(bits)
    groups = columns // group if group else 1
    stored = {
        "weight_packed": _words(rng.integers(0, 1 << bits, (OUT, columns)), bits),
        "weight_scale": _scales(OUT, groups).bfloat16(),
        "weight_shape": torch.tensor([OUT, columns]),
    }
    if zeros:
        points = rng.integers(0, 1 << bits, (groups, OUT))
        stored["weight_zero_point"] = _words(points, bits).T
    arguments = {"num_bits": bits, "type": "int", "group_size": group or -1, "symmetric": not zeros}
    return stored, _compressed("pack-quantized", arguments)


def _compressed(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": arguments}}
    return {"quant_method": "compressed-tensors", "format": name, "config_groups": groups, "ignore": ["lm_head"]}


def _compressed_int8() -> Quantised:
    stored = {"weight": torch.randint(-128, 128, (OUT, IN), dtype=torch.int8), "weight_scale": _scales(OUT, 1)}
    return stored, _compressed("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"})


def _float8(*shape: int) -> torch.Tensor:
    return (torch.randn(*shape) * 30).to(torch.float8_e4m3fn)


def _compressed_float8() -> Quantised:
    block = [5, 36]
    stored = {"weight": _float8(OUT, IN), "weight_scale": _scales(-(-OUT // 5), -(-IN // 36)).bfloat16()}
    return stored, _compressed("float-quantized", {"num_bits": 8, "type": "float", "block_structure": block})


def _float8_blocks() -> Quantised:
    stored = {"weight": _float8(OUT, IN), "weight_scale_inv": _scales(-(-OUT // 16), -(-IN // 64))}
    return stored, {"quant_method": "fp8", "weight_block_size": [16, 64]}


def _random_bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _nvfp4() -> Quantised:
    stored = {
        "weight_packed": _random_bytes(OUT, IN // 2),
        "weight_scale": (torch.rand(OUT, IN // 16) * 40 + 20).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([300.0]),
    }
    return stored, _compressed("nvfp4-pack-quantized", {"num_bits": 4, "type": "float"})


def _microscaled(kind: str) -> Callable[[], Quantised]:
    bits = int(kind[-1])

    def made() -> Quantised:
        numbers = _float8(OUT, IN) if bits == 8 else _random_bytes(OUT, IN * bits // 8)
        scales = torch.randint(120, 124, (OUT, IN // 32), dtype=torch.uint8)
        name = f"{kind}-quantized" if bits == 8 else f"{kind}-pack-quantized"
        stored = {"weight" if bits == 8 else "weight_packed": numbers, "weight_scale": scales}
        return stored, _compressed(name, {"num_bits": bits, "type": "float"})

    return made


def _gptq(bits: int, inputs: int = IN, version: str = "gptq", ordered: bool = False) -> Callable[[], Quantised]:
    def made() -> Quantised:
        rng, groups = np.random.default_rng(bits), 3
        first = version == "gptq"
        zeros = rng.integers(1 if first else 0, 1 << bits, (groups, OUT))
        group_of_input = np.arange(inputs) * groups // inputs
        stored = {
            "qweight": _words(rng.integers(0, 1 << bits, (OUT, inputs)), bits).T,
            "qzeros": _words(zeros - first, bits),
            "scales": _scales(groups, OUT).half(),
            "g_idx": torch.from_numpy(
                (group_of_input if ordered else rng.permutation(group_of_input)).astype(np.int32)
            ),
        }
        return stored, {"quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": version}

    return made


def _awq() -> Quantised:
    rng = np.random.default_rng(0)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def packed(numbers: np.ndarray) -> torch.Tensor:
        return _words(numbers.reshape(len(numbers), -1, 8)[:, :, order].reshape(numbers.shape), 4)

    stored = {
        "qweight": packed(rng.integers(0, 16, (IN, OUT))),
        "qzeros": packed(rng.integers(0, 16, (3, OUT))),
        "scales": _scales(3, OUT).half(),
    }
    return stored, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}


def _in_4_bits(kind: str, *, double: bool) -> Callable[[], Quantised]:
    def made() -> Quantised:
        weight = (torch.randn(OUT, 100) * torch.logspace(-1, 0, OUT)[:, None]).bfloat16()  # blocks begin inside of rows
        packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=double, blocksize=64)
        parts = {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
        return {"weight": packed, **parts}, {"quant_method": "bitsandbytes", "load_in_4bit": True}

    return made


def _int8() -> Quantised:
    stored = {"weight": torch.randint(-127, 128, (OUT, IN), dtype=torch.int8), "SCB": torch.rand(OUT) + 5}
    return {**stored, "weight_format": torch.tensor(0, dtype=torch.uint8)}, {"load_in_8bit": True}


def _experts() -> Quantised:
    shape = (2, OUT, IN // 32)
    stored = {"_blocks": _random_bytes(*shape, 16), "_scales": torch.randint(120, 124, shape, dtype=torch.uint8)}
    return stored, {"quant_method": "mxfp4"}


def _modelopt() -> Quantised:
    stored = {
        "weight": _random_bytes(OUT, IN // 2),
        "weight_scale": (torch.rand(OUT, IN // 16) * 40 + 20).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(1 / 300),
    }
    return stored, {"quant_method": "modelopt", "quant_algo": "NVFP4"}


def _of_comfyui(kind: str, scale: str, rows: int = 1) -> Callable[[], Quantised]:
    def made() -> Quantised:
        stored: Tensors = {"weight": (torch.randn(OUT, IN) * (30 if kind == "int8" else 8)).to(getattr(torch, kind))}
        if scale:
            stored |= {scale: _scales(rows, *[1] * (rows > 1)) / 10, "input_scale": torch.ones(())}
        if scale == "scale_weight":
            return {**stored, MARKER: torch.zeros(2).to(torch.float8_e4m3fn)}, {}
        if scale:
            stated = json.dumps({"format": "int8_tensorwise" if kind == "int8" else kind})
            stored["comfy_quant"] = torch.tensor(list(stated.encode()), dtype=torch.uint8)
        return stored, {}

    return made


# What is quantised how -> its tensors, by the ends of their names, and the config
WEIGHTS: dict[str, Callable[[], Quantised]] = {
    "compressed int4": lambda: _compressed_integers(4, group=32),
    "compressed int4, padded rows": lambda: _compressed_integers(4, columns=92, zeros=True),
    "compressed int3": lambda: _compressed_integers(3, group=16, zeros=True),
    "compressed int8": _compressed_int8,
    "compressed fp8, ragged blocks": _compressed_float8,
    "compressed nvfp4": _nvfp4,
    **{f"compressed {kind}": _microscaled(kind) for kind in ("mxfp4", "mxfp6", "mxfp8")},
    "gptq 2": _gptq(2, inputs=92),
    "gptq 3": _gptq(3),
    "gptq 4": _gptq(4, inputs=92),
    "gptq 4, in order": _gptq(4, ordered=True),
    "gptq 8, version 2": _gptq(8, version="gptq_v2"),
    "awq": _awq,
    "nf4, double": _in_4_bits("nf4", double=True),
    "fp4": _in_4_bits("fp4", double=False),
    "bitsandbytes int8": _int8,
    "fp8, ragged blocks": _float8_blocks,
    "mxfp4": _experts,
    "modelopt nvfp4": _modelopt,
    "fp8_scaled": _of_comfyui("float8_e4m3fn", "scale_weight"),
    "comfyui e5m2": _of_comfyui("float8_e5m2", "weight_scale"),
    "comfyui int8 rows": _of_comfyui("int8", "weight_scale", OUT),
    "fp8 without scales": _of_comfyui("float8_e4m3fn", ""),
}


def quantised(kind: str, module: str = "x") -> Quantised:
    """The stored tensors of a module of this kind, and the quantization_config of its model."""
    torch.manual_seed(0)
    stored, config = WEIGHTS[kind]()
    names = {name: f"{module}{'' if kind == 'mxfp4' else '.'}{name}" for name in stored} | {MARKER: MARKER}
    return {names[name]: tensor.contiguous() for name, tensor in stored.items()}, config


def weights_in(folder: Path) -> dict[str, np.ndarray]:
    """The quantised weights of a folder as our decoders make them, and all of its floats."""
    checkpoint = open_checkpoint(folder, dequantise=True)
    found, (file,) = checkpoint.quantised, checkpoint.shards.values()
    weights = {name: OpenedWeight(tensor, file).whole for name, tensor in found.items()}
    parts = {part for tensor in found.values() for part in (tensor.packed, *tensor.parts)}
    return weights | {name: file.read(name) for name in file.entries if name not in parts}
