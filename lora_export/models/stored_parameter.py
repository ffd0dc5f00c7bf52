"""A parameter whose values are read, from a file or from a narrower dtype, when something computes with them.

A module of such parameters takes next to no memory. Its `state_dict`, its shapes and its dtypes are those of the whole
model. Each operator gets the values that the module would have had in memory, bit for bit, and they are dropped
afterwards.

transformers builds the module of a folder from empty weights, which tell where each of its tensors ends up. A model
whose weights transformers renames is found so, too. One whose weights it stacks, splits or turns is loaded whole.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn

from lora_export.errors import InputRefused
from lora_export.layers.torch_internals import own_buffers, own_parameters, tree_map, without_subclass_rules
from lora_export.storage.safetensors_file import TensorFile
from lora_export.weights.checkpoint import Checkpoint, is_streamable

MOST_WIDENED_WEIGHTS = 1 << 30  # bytes in fp64; a model with more weights keeps them in their own dtype
SMALLEST_STREAMED = 1 << 18  # numbers; a smaller tensor stays in memory
# Floats that fp32 represents. Values that are stored in another dtype are converted when they are read.
NARROW_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})

_VALUES = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})  # attributes that have the values in them
_LAYOUT = frozenset({"stride", "is_contiguous"})
# fmt: off
_FACTS = frozenset({
    "__len__", "data_ptr", "dim", "element_size", "get_device", "is_complex", "is_floating_point", "ndimension",
    "nelement", "numel", "requires_grad_", "size", "untyped_storage",
})
# fmt: on


class StoredParameter(nn.Parameter):
    """A read-only parameter of these sizes. `stored` returns its values, in the dtype in which they are stored.

    Where it is used outside of PyTorch's functions, as by an extension, the values are NaN: a leak cannot pass for a
    result. Raises RuntimeError for every attempt to change it.
    """

    _make: Callable[[], Tensor]
    stored_dtype: torch.dtype | None  # of the values as they are stored, where that is known before they are read

    def __new__(
        cls,
        shape: Sequence[int],
        make: Callable[[], Tensor],
        dtype: torch.dtype = torch.float32,
        stored_dtype: torch.dtype | None = None,
    ) -> Any:
        made: Any = torch.full((), math.nan, dtype=dtype).expand(*shape).as_subclass(cls)
        made._make, made.stored_dtype = make, stored_dtype
        return made

    def __init__(self, *_: Any) -> None:
        """Nothing is left to do."""

    def stored(self) -> Tensor:
        """The values, made now, in their own dtype where that is a narrow one."""
        values = self._make()
        return values if values.dtype in NARROW_DTYPES else values.to(self.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredParameter:
        made = StoredParameter(self.shape, self._make, self.dtype, self.stored_dtype)
        memo[id(self)] = made
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"StoredParameter({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        attribute = getattr(getattr(func, "__self__", None), "__name__", "") if name in ("__get__", "__set__") else ""
        with without_subclass_rules():
            if name in _FACTS or (attribute and attribute not in _VALUES):
                return func(*args, **kwargs)
            if name in _LAYOUT:
                return func(torch.empty(args[0].shape, dtype=args[0].dtype, device="meta"), *args[1:], **kwargs)
            if isinstance(args[0] if args else None, StoredParameter) and _changes(name):
                raise RuntimeError(f"{name}: the values of a stored parameter cannot be changed")
            if func is Tensor.double:
                return args[0].stored().double()
            if func is F.embedding and isinstance(args[1], StoredParameter):  # reads the rows alone
                return func(args[0], args[1].stored(), *args[2:], **kwargs).to(args[1].dtype)
            args, kwargs = tree_map(_values, (args, kwargs))
            return func(*args, **kwargs)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of the module's `state_dict`, in which stored parameters are not read."""
    return {
        name: value if isinstance(value, StoredParameter) else value.detach()
        for name, value in module.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor)  # `get_extra_state` may return anything
    }


def read_stored(module: nn.Module) -> None:
    """Read every stored parameter below a module into memory, in place, in its own dtype. Tied ones stay tied."""
    read: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in own_parameters(owner).items():
            if isinstance(parameter, StoredParameter):
                if id(parameter) not in read:
                    values = parameter.stored().to(parameter.dtype)
                    read[id(parameter)] = nn.Parameter(values, requires_grad=False)
                own_parameters(owner)[name] = read[id(parameter)]


def packed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype: as a parameter that is converted when something computes with it."""
    kept = tensor.detach()
    return StoredParameter(kept.shape, lambda: kept, dtype)


def _changes(name: str) -> bool:
    """Whether a function of this name changes its first argument."""
    is_in_place = name.endswith("_") and not name.endswith("__")
    return is_in_place or name in ("__set__", "__setitem__") or (name.startswith("__i") and name.endswith("__"))


def _values(value: Any) -> Any:
    return value.stored().to(value.dtype) if isinstance(value, StoredParameter) else value


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
                    other = self.empty[name]
                    if (tensor.dtype, tensor.shape, tensor.stride()) != (other.dtype, other.shape, other.stride()):
                        return False
                    if name not in made:
                        is_parameter = registry is parameters
                        is_large = is_parameter and tensor.numel() >= SMALLEST_STREAMED
                        made[name] = _stored(
                            self._files[name], name, tensor, is_parameter=is_parameter, is_read_later=is_large
                        )
                    registry[attribute] = made[name]
        return True


def streamed_folder(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> StreamedFolder | None:
    """The folder's weights, to be read in this dtype when they are needed.

    None for a small model, and for weights that transformers converts while it loads them.
    """
    shapes = [entry.shape for shard in checkpoint.shards.values() for entry in shard.entries.values()]
    is_small = 8 * sum(map(math.prod, shapes)) <= MOST_WIDENED_WEIGHTS
    return None if is_small or not is_streamable(checkpoint) else StreamedFolder(checkpoint, dtype)


def is_streamed(module: nn.Module) -> bool:
    """Whether some of the module's weights are read when something computes with them."""
    return any(isinstance(parameter, StoredParameter) for parameter in module.parameters())


def weights_in(file: TensorFile, module: nn.Module) -> dict[str, Tensor]:
    """The weights of a file for a module, by name; those that are streamed there are read when they are needed.

    A name that the file lacks has the tensor of another name of the same tied one, and what is no tensor is the
    module's own. The file's other names have empty tensors, which `load_state_dict` refuses.
    """
    own = module.state_dict(keep_vars=True)
    extra = {name: value for name, value in own.items() if not isinstance(value, Tensor)}
    found = {name: torch.empty(0) for name in file.entries}
    tied: dict[int, Tensor] = {}
    for name, like in own.items():
        if name in found:
            is_streamed = isinstance(like, StoredParameter) and file.entries[name].shape == tuple(like.shape)
            is_parameter = isinstance(like, nn.Parameter)
            found[name] = _stored(file, name, like, is_parameter=is_parameter, is_read_later=is_streamed)
            tied.setdefault(id(like), found[name])
    shared = {name: tied[id(like)] for name, like in own.items() if name not in found and id(like) in tied}
    return found | shared | extra


def _stored(file: TensorFile, name: str, like: Tensor, *, is_parameter: bool, is_read_later: bool) -> Tensor:
    """A tensor of a file, in the dtype of another: read now, or when it is needed."""
    read = functools.partial(_read, file, name)
    if is_read_later:
        return StoredParameter(like.shape, read, like.dtype, getattr(torch, file.entries[name].dtype.name, None))
    values = read().to(like.device, like.dtype)
    return nn.Parameter(values, requires_grad=False) if is_parameter else values


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of this shape in little memory. Each axis has a stride of its own: no other order looks alike."""
    strides = range(len(shape))
    needed = 1 + sum(stride * max(size - 1, 0) for stride, size in zip(strides, shape, strict=True))
    return torch.full((needed,), torch.nan, dtype=dtype).as_strided(shape, tuple(strides))


def _read(file: TensorFile, name: str) -> Tensor:
    """One tensor of a file, as stored. Raises InputRefused where the file changed since its header was read."""
    if not file.unchanged():
        raise InputRefused(f"{file.path} changed while the model was in use")
    values: Any = file.read(name)
    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(values)
