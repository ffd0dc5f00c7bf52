"""Quantised weights in a file: opened as a checkpoint's are, and read in rows."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from lora_export.storage import safetensors_file
from lora_export.storage.safetensors_file import TensorFile
from lora_export.weights.quantised.stored_parts import QuantisedTensor, StoredParts

EXAMPLES = Path(__file__).with_name("quantised_examples.json")
Tensors = dict[str, torch.Tensor]

LLAMA_SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@dataclass(frozen=True)
class OpenedWeight:
    """A quantised weight, and the file that it is stored in."""

    tensor: QuantisedTensor
    file: TensorFile

    def rows(self, rows: slice) -> NDArray[Any]:
        """Rows of the weight's matrix, as a merge reads them where they are not beside each other."""
        entry = self.file.entries[self.tensor.packed]
        with self.file.path.open("rb") as file:
            return self.tensor.read(self.file.path, file.fileno(), entry.start, entry.nbytes, rows)

    @property
    def whole(self) -> NDArray[Any]:
        return self.rows(slice(0, self.tensor.row_shape[0])).reshape(self.tensor.shape)


def parts_in(path: Path, stored: Tensors) -> StoredParts:
    """The tensors, in a file."""
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, path)
    return StoredParts({path.name: safetensors_file.open_file(path)})


def opened(
    path: Path,
    stored: Tensors,
    read: Callable[[StoredParts, Mapping[str, Any], str], dict[str, QuantisedTensor]],
    quantization: Mapping[str, Any] | None = None,
    dtype: str = "bfloat16",
) -> OpenedWeight:
    """The one quantised weight of these tensors."""
    parts = parts_in(path, stored)
    (tensor,) = read(parts, quantization or {}, dtype).values()
    return OpenedWeight(tensor, parts.shards[path.name])


def bits_of(values: torch.Tensor | NDArray[Any]) -> bytes:
    """The bytes of an array or a tensor."""
    if isinstance(values, torch.Tensor):
        return bytes(values.contiguous().view(torch.uint8).numpy().tobytes())
    return np.ascontiguousarray(values).tobytes()


def example(name: str) -> tuple[Tensors, torch.Tensor]:
    """The stored tensors of a weight, and the weight, both made by the format's own library.

    `quantised_examples.json` states which. These libraries are not installed beside the current PyTorch.
    """
    found = json.loads(EXAMPLES.read_text())[name]
    return {part: _decoded(*own) for part, own in found["stored"].items()}, _decoded(*found["weight"])


def _decoded(dtype: str, shape: list[int], text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=getattr(torch, dtype)).reshape(shape)
