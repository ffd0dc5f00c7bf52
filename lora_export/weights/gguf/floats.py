"""The tensors of a GGUF file as transformers has them: names, order of rows, a tensor for each expert."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.names.families import EXPERT
from lora_export.storage import safetensors_file
from lora_export.storage.gguf_blocks import FLAT
from lora_export.storage.gguf_file import GgufTensor
from lora_export.storage.json_files import write_json
from lora_export.weights.gguf.base import GgufBase


def write_as_floats(base: GgufBase, folder: Path) -> None:
    """Write the weights of a model into a folder, a file for each tensor, with an index. Blocks become fp32.

    Tensors that transformers does not have are left out. Layers that llama.cpp does not have are zeros. Peak memory is
    the largest tensor in fp32.
    """
    places: dict[str, str] = {}
    every = itertools.chain((dict(_of_transformers(base, name)) for name in base.tensors), [_zeros(base)])
    for number, tensors in enumerate(every):
        if tensors:
            safetensors_file.write(folder / f"{number}.safetensors", tensors, {"format": "pt"})
        places |= dict.fromkeys(tensors, f"{number}.safetensors")
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


def bytes_as_floats(base: GgufBase) -> int:
    """How large those files are."""
    return sum(size_in_floats(tensor) for tensor in base.tensors.values())


def size_in_floats(tensor: GgufTensor) -> int:
    """The bytes of a tensor where blocks become fp32."""
    return tensor.stop - tensor.start if tensor.type in FLAT else 4 * math.prod(tensor.shape)


def _zeros(base: GgufBase) -> dict[str, NDArray[Any]]:
    width = next((each.shape[-1] for each in base.file.tensors if each.name == "token_embd.weight"), 0)
    shapes = {"weight": (width, width), "bias": (width,)}
    return {
        f"{module}.{part}": np.zeros(shape, np.float32)
        for module in base.names.left_out
        for part, shape in shapes.items()
    }


def _of_transformers(base: GgufBase, name: str) -> Iterator[tuple[str, NDArray[Any]]]:
    if base.names.of_transformers(base.tensors[name].name) != name:
        return
    (shard,) = base.checkpoint.shards.values()
    values = shard.read(name)
    order = base.names.row_order(name)
    if order is not None:
        stored, values = values, np.empty_like(values)
        values[order.indices(len(values), base.names.heads)] = stored
    if base.names.shifts_norms and name.endswith("norm.weight"):
        values = values - 1
    if EXPERT in name:
        yield from ((name.replace(EXPERT, str(number)), one) for number, one in enumerate(values))
    else:
        yield name, values
