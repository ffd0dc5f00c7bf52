"""A frozen base that no process holds as a whole (FSDP).

Each process keeps a share of every block's weights, and gathers the others while the block computes, forwards and
backwards. What is trained is small: every process holds all of it, as in a training without shares. PyTorch's
`fully_shard` does the work.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from lora_export.errors import InputRefused
from lora_export.layers.four_bit_weights import is_4bit
from lora_export.layers.module_tensors import is_in_shares
from lora_export.models.stored_parameter import read_stored
from lora_export.options.spelling import named
from lora_export.training.processes import world_size

LEAST_BLOCKS = 2


def shard_base(module: nn.Module, device: str) -> None:
    """Leave to each process its share of the frozen weights of every block, in place, on this device.

    A block is an entry of a model's outermost nn.ModuleLists: the layers of a transformer. What is outside of them,
    such as embeddings and the head, stays whole, and so does every parameter that is trained. All processes must run
    the module equally often from then on. Weights that are read from a file when they are needed are read here, one
    block at a time.

    Raises InputRefused for a module without such blocks, and for weights of 4 bits.
    """
    lists = list(_outermost_lists(module))
    if not lists:
        raise InputRefused(
            "the base has no blocks whose weights the processes could share: a module with an nn.ModuleList of "
            f"layers has. Leave out {named('shard_base', True)}"
        )
    if any(is_4bit(parameter) for parameter in module.parameters()):
        raise InputRefused(
            "weights of 4 bits are not shared by processes: leave out "
            f"{named('shard_base', True)} or {named('quantize_base')}"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # takes a second to import

    mesh = init_device_mesh(device, (world_size(),))
    for parent, blocks in lists:
        for block in blocks:
            read_stored(block)
            trained = {parameter for parameter in block.parameters() if parameter.requires_grad}
            fully_shard(block, mesh=mesh, ignored_params=trained)
        if parent is not module:  # whose class has to stay
            # The parent has no weights in shares. It lets the next block be gathered while one computes.
            others = {parameter for parameter in parent.parameters() if not is_in_shares(parameter)}
            fully_shard(parent, mesh=mesh, ignored_params=others)
    read_stored(module)
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if not is_in_shares(tensor):
            tensor.data = tensor.data.to(device)


def move(module: nn.Module, device: torch.device | str) -> None:
    """Move a module to a device, in place. A base in shares is on its device already."""
    if not is_sharded(module):
        module.to(device)


def is_sharded(module: nn.Module) -> bool:
    """Whether the processes share the module's weights, so that all must run it equally often."""
    return any(map(is_in_shares, module.parameters()))


def _outermost_lists(module: nn.Module) -> Iterator[tuple[nn.Module, Sequence[nn.Module]]]:
    """Each module that has a list of blocks, and the blocks."""
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) >= LEAST_BLOCKS:
            yield module, list(child)
        else:
            yield from _outermost_lists(child)
