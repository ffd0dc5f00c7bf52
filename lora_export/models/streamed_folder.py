"""The weights of a Hugging Face folder as parameters that are read when something computes with them.

transformers builds the module from empty weights, which tell where each tensor of the folder ends up. A model whose
weights transformers renames is found so, too. One whose weights it stacks, splits or turns is not: it is loaded whole.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from lora_export.errors import InputRefused
from lora_export.layers.torch_internals import own_buffers, own_parameters
from lora_export.models import stored_parameter
from lora_export.models.stored_parameter import StoredParameter
from lora_export.storage.safetensors_file import TensorFile
from lora_export.weights.checkpoint import Checkpoint, is_streamable


class StreamedFolder:
    """The weights of a folder, each beside an empty tensor that takes its place while the module is built."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32):
        self._files = {name: shard for shard in checkpoint.shards.values() for name in shard.entries}
        self.empty = {name: _empty(file.entries[name].shape, dtype) for name, file in self._files.items()}
        self._names = {tensor.data_ptr(): name for name, tensor in self.empty.items()}

    def fill(self, module: nn.Module, missing: frozenset[str]) -> bool:
        """Put the folder's weights into a module that was built with the empty ones.

        `missing` are the names of those that the folder lacks: these stay as they are. Returns False where a weight is
        no tensor of the folder as it is stored. The module cannot be used then.
        """
        made: dict[str, Tensor] = {}
        for path, owner in module.named_modules():
            parameters, buffers = own_parameters(owner), own_buffers(owner)
            registries: tuple[dict[str, Any], ...] = (parameters, buffers)
            for registry in registries:
                for attribute, tensor in registry.items():
                    if tensor is None or (registry is buffers and tensor.data_ptr() not in self._names):
                        continue  # a buffer that no file has
                    name = self._names.get(tensor.data_ptr(), "")
                    if not name:
                        if f"{path}.{attribute}".lstrip(".") in missing:
                            continue
                        return False
                    if not _is_same_view(tensor, self.empty[name]):
                        return False
                    if name not in made:
                        made[name] = self._tensor(name, tensor, is_parameter=registry is parameters)
                    registry[attribute] = made[name]
        return True

    def _tensor(self, name: str, like: Tensor, *, is_parameter: bool) -> Tensor:
        read = functools.partial(_read, self._files[name], name)
        if not is_parameter:
            return read().to(like.dtype)
        if like.numel() >= stored_parameter.SMALLEST_STREAMED:
            return StoredParameter(like.shape, read, like.dtype)
        return nn.Parameter(read().to(like.dtype), requires_grad=False)


def streamed_folder(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> StreamedFolder | None:
    """The folder's weights, to be read in this dtype when they are needed.

    None for a small model, and for weights that transformers converts while it loads them.
    """
    shapes = [entry.shape for shard in checkpoint.shards.values() for entry in shard.entries.values()]
    is_small = 8 * sum(map(math.prod, shapes)) <= stored_parameter.MOST_WIDENED_WEIGHTS
    return None if is_small or not is_streamable(checkpoint) else StreamedFolder(checkpoint, dtype)


def is_streamed(module: nn.Module) -> bool:
    """Whether some of the module's weights are read when something computes with them."""
    return any(isinstance(parameter, StoredParameter) for parameter in module.parameters())


def load_streamed(module: nn.Module, file: TensorFile) -> None:
    """Give a module the weights of a file, in place, to be read when they are needed.

    Raises RuntimeError, as `load_state_dict`, unless the file has all weights of the module and no others.
    """
    state: dict[str, Tensor] = {}
    shared: dict[int, Tensor] = {}  # the names of a tied tensor have the values of the last one
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name in file.entries:
            read = functools.partial(_read, file, name)
            is_large = isinstance(tensor, StoredParameter) and file.entries[name].shape == tuple(tensor.shape)
            shared[id(tensor)] = StoredParameter(tensor.shape, read, tensor.dtype) if is_large else read().to(tensor)
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name in file.entries:
            state[name] = shared[id(tensor)]
    others = {name: torch.empty(0) for name in file.entries if name not in state}
    module.load_state_dict({**state, **others}, strict=True, assign=True)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of this shape in little memory. Each axis has a stride of its own: no other order looks alike."""
    strides = range(len(shape))
    needed = 1 + sum(stride * max(size - 1, 0) for stride, size in zip(strides, shape, strict=True))
    return torch.full((needed,), torch.nan, dtype=dtype).as_strided(shape, tuple(strides))


def _is_same_view(tensor: Tensor, other: Tensor) -> bool:
    return tensor.dtype is other.dtype and (tensor.shape, tensor.stride()) == (other.shape, other.stride())


def _read(file: TensorFile, name: str) -> Tensor:
    """One tensor of a file, as stored. Raises InputRefused where the file changed since its header was read."""
    if not file.unchanged():
        raise InputRefused(f"{file.path} changed while the model was in use")
    values: Any = file.read(name)
    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(values)
