"""Adapters for OpenVINO GenAI: PEFT's keys in one file, with the scale in B.

`Adapter(path)` opens no `adapter_config.json`, ignores an alpha in the file, and multiplies B·A by the `alpha` of
`AdapterConfig` alone (openvino.genai 2026.4, src/cpp/src/lora/adapter.cpp). So a folder of PEFT runs at the strength 1,
whatever its alpha. It passes over tensors whose names it does not know, and reads convolutions of one pixel alone.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from lora_export.formats import WriteOptions
from lora_export.formats.adapter_files import header_in, weights_of
from lora_export.formats.lora_file import OneFileFormat, module_by_prefix
from lora_export.formats.peft_keys import SCALE_IN_B, WRAPPER
from lora_export.formats.writing import OneFile, beyond_pairs, why_no_low_rank
from lora_export.lora import Adapter

DESCRIPTION = "a .safetensors file that `convert` made for OpenVINO GenAI, with PEFT's keys and the scale in B"
SUFFIX = ".safetensors"
_FORMAT = OneFileFormat("openvino", functools.partial(module_by_prefix, prefixes={WRAPPER: ""}))
read = _FORMAT.read


def recognises(path: Path) -> bool:
    """Whether the file is one of ours, by its header."""
    return SCALE_IN_B.items() <= header_in(weights_of(path)).items()


def write(adapter: Adapter, path: Path, options: WriteOptions) -> tuple[str, ...]:  # noqa: ARG001
    """Write the file. Refused is what OpenVINO GenAI would pass over: DoRA, embeddings, experts, whole tensors."""
    file = OneFile(adapter, "openvino", lambda module, ending: f"{WRAPPER}{module}.{ending}")
    file.problems += beyond_pairs(adapter)
    for name, pair in adapter.pairs.items():
        if why_no_low_rank(pair):
            continue  # `beyond_pairs` named it
        if pair.embedding or pair.as_stored or set(pair.shape[2:]) - {1}:
            file.problems.append(f"{name}: no pair of a linear layer, or of a convolution of one pixel")
        else:
            key = f"{WRAPPER}{name}.lora_"
            file.tensors |= {f"{key}A.weight": pair.a, f"{key}B.weight": pair.b * np.float32(pair.scale)}
    file.write(path, SCALE_IN_B)
    return (f"{adapter.name}: its scales are in B. AdapterConfig.add(Adapter(path)) runs it at the trained strength.",)
